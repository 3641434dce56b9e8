"""Every example of docs/sessions.md runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from serving import served

import pybmc
from pybmc.engine import session_file

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "sessions.md").read_text("utf-8")
EXAMPLES = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with pybmc.Model(tiny.model("llama", n_ctx=500), threads=1) as model, \
            served(model, sessions=str(tmp_path_factory.mktemp("sessions"))) as server:
        yield server


@pytest.mark.parametrize("language, code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_runs(server, language, code, tmp_path):
    if language == "sh" and "curl" in code and not shutil.which("curl"):
        pytest.skip("needs curl")
    os.symlink(tiny.model("llama", n_ctx=500), tmp_path / "model.gguf")
    code = code.replace("http://localhost:8080", server.url)
    code = code.replace("| pybmc ", f"| {sys.executable} -m pybmc ")
    command = ["bash", "-ec", code] if language == "sh" else [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode == 0 and done.stdout.strip()
            and '"error"' not in done.stdout), done.stdout + done.stderr


def test_the_format_is_the_one_that_is_described():
    assert session_file.MAGIC == b"pybmc session\n" and session_file.OPENING.size == 8
    assert session_file.VERSION == 1
    assert session_file.HEAD.size == 7 * 4 + 8 and session_file.PART.size == 12 and session_file.BOTH == 4
