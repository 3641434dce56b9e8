"""Every example of docs/server.md and docs/llama-server.md runs against a server."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from serving import served

import pybmc
from pybmc.serve import errors

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "server.md").read_text("utf-8")
EXAMPLES = re.findall(r"^```(\w+)\n(.*?)^```", TEXT + (DOCS / "llama-server.md").read_text("utf-8"),
                      re.DOTALL | re.MULTILINE)
NEEDS = {"openai": "OpenAI(", "anthropic": "Anthropic(", "ollama": "ollama."}


@pytest.fixture(scope="module")
def server():
    with pybmc.Model(tiny.model("llama", n_ctx=4000), threads=1) as model, served(model) as server:
        yield server


@pytest.mark.parametrize("language, code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_runs(server, language, code):
    code = code.replace("http://localhost:8080", server.url)
    if language == "sh" and not shutil.which("curl"):
        pytest.skip("needs curl")
    for package, sign in NEEDS.items():
        if sign in code:
            pytest.importorskip(package, reason=f"needs the {package} package")
    command = ["bash", "-ec", code] if language == "sh" else [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    failed = re.search(r'"error":\s*[{"]|event: error|response.failed', done.stdout)
    assert done.returncode == 0 and done.stdout.strip() and not failed, done.stdout + done.stderr


def test_every_code_and_flag_of_the_page_is_real():
    from pybmc.cli.serve import serve

    flags = {name for param in serve.params for name in param.opts}
    named = set(re.findall(r"`(--[a-z-]+)", TEXT))
    assert named <= flags | {"--help", "--max-body"}
    source = "".join(path.read_text("utf-8") for path in Path(errors.__file__).parent.glob("*.py"))
    codes = re.findall(r"`([a-z_]+)`", TEXT.split("## Errors")[1].split("## Flags")[0])
    assert all(f'"{code}"' in source for code in codes if code != "error")
