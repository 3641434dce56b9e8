"""The fake CUDA driver of tests/cuda/driver.cpp: built where there is a C++ compiler, opened in the place of
the real one."""

import ctypes
import fcntl
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DRIVER = ROOT / "build" / "release" / "tests" / "cuda" / "driver.so"


def build() -> Path:
    """The driver's library. Skips the test where it cannot be made;
    processes that make it at once take turns."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if not compiler or not shutil.which("make") or not (ROOT / "Makefile").is_file():
        pytest.skip("needs make and a C++ compiler: the fake GPU is made of the kernels' source")
    DRIVER.parent.mkdir(parents=True, exist_ok=True)
    with open(DRIVER.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
        subprocess.run(["make", "-s", "fake-driver", f"CXX={compiler}"], cwd=ROOT, check=True, env=env)
    return DRIVER


class Fake:
    """The driver's settings and counts."""

    def __init__(self, path: Path):
        self.library = ctypes.CDLL(str(path))
        self.library.fake_get.restype = ctypes.c_longlong
        self.library.fake_set.argtypes = [ctypes.c_char_p, ctypes.c_longlong]
        self.library.fake_failed.restype = ctypes.c_char_p

    def __getitem__(self, name: str) -> int:
        return self.library.fake_get(name.encode())

    def __setitem__(self, name: str, value: int) -> None:
        self.library.fake_set(name.encode(), value)

    @property
    def failed(self) -> str:
        """The call that was made to fail."""
        return self.library.fake_failed().decode()

    @contextmanager
    def set(self, **values: int):
        before = {name: self[name] for name in values}
        for name, value in values.items():
            self[name] = value
        try:
            yield self
        finally:
            for name, value in before.items():
                self[name] = value
