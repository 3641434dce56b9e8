"""Every example of docs/grammar.md and docs/python.md runs,
against the bundled model and a server with it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from serving import served

import pybmc

pytest.importorskip("llguidance", reason="schemas need llguidance")

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "grammar.md").read_text("utf-8")
EXAMPLES = re.findall(r"^```(\w+)\n(.*?)^```", TEXT + (DOCS / "python.md").read_text("utf-8"),
                      re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def server():
    with pybmc.Model(pybmc.demo_model(), threads=1) as model, served(model) as server:
        yield server


@pytest.mark.parametrize("language, code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_runs(server, language, code, tmp_path):
    if "curl" in code and not shutil.which("curl"):
        pytest.skip("needs curl")
    shell = tmp_path / "pybmc"          # as if it was installed
    shell.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pybmc "$@"\n')
    shell.chmod(0o755)
    code = code.replace("http://localhost:8080", server.url)
    code = code.replace('"model.gguf"', repr(str(pybmc.demo_model())))
    command = ["bash", "-ec", code] if language == "sh" else [sys.executable, "-c", code]
    root = str(Path(pybmc.__file__).parents[1])
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": root}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=env, cwd=root)
    assert (done.returncode == 0 and done.stdout.strip()
            and '"error"' not in done.stdout), done.stdout + done.stderr


def test_the_page_names_what_is_there():
    from pybmc.grammar import Grammar
    from pybmc.grammar.asked import OLLAMA

    assert all(hasattr(Grammar, name) for name in re.findall(r"`Grammar\.(\w+)", TEXT))
    assert all(f"| `{name}` |" in TEXT for name in OLLAMA)
