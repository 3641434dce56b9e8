"""The examples run, and print something."""

import subprocess
import sys
from pathlib import Path

import pytest

ENDLESS = {"ray_serve"}                 # it runs until it is stopped, and needs a cluster
EXAMPLES = [path for path in sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
            if path.stem not in ENDLESS]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path):
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=120,
                          check=False)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
