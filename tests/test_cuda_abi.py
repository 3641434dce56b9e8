"""The driver's prototypes, structs and numbers against NVIDIA's cuda.h, where there is one."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def header() -> Path:
    """The folder of cuda.h: a toolkit's, or that of the nvcc in PATH."""
    nvcc = shutil.which("nvcc")
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include",
               *sorted(Path("/usr/local").glob("cuda-*/include"))]
    if nvcc:
        folders.insert(0, Path(nvcc).resolve().parents[1] / "include")
    for folder in folders:
        if (folder / "cuda.h").is_file():
            return folder
    pytest.skip("there is no cuda.h here")


def compiled(folder: Path, include: Path) -> str:
    compiler = shutil.which("c++") or shutil.which("g++") or pytest.skip("there is no C++ compiler here")
    found = subprocess.run([compiler, "-std=c++17", "-fsyntax-only", f"-I{include}", folder / "tests" / "cuda"
                            / "abi.cpp"], capture_output=True, text=True, timeout=60)
    return found.stderr


def test_the_driver_is_declared_as_in_its_header():
    assert compiled(ROOT, header()) == ""


@pytest.mark.parametrize("old, new, what", [
    (r"X\(cuMemUnmap, \(uint64_t", "X(cuMemUnmap, (int", "cuMemUnmap"),
    (r"cuStreamCreate, \(void \*\*stream, unsigned flags", "cuStreamCreate, (void **stream",
     "cuStreamCreate"), (r"\{ int32_t type, id; \}", "{ int32_t id, type; }", "CUmemLocation"),
    (r"MAPS = 102", "MAPS = 103", "VIRTUAL_MEMORY"),
], ids=lambda value: None)
def test_a_wrong_declaration_is_found(old, new, what, tmp_path):
    include = header()
    shutil.copytree(ROOT / "native", tmp_path / "native", ignore=shutil.ignore_patterns("*.c"))
    (tmp_path / "tests" / "cuda").mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "cuda" / "abi.cpp", tmp_path / "tests" / "cuda")
    path = tmp_path / "native" / "cuda" / "driver.h"
    text, n = re.subn(old, new, path.read_text())
    assert n == 1
    path.write_text(text)
    assert what in compiled(tmp_path, include)
