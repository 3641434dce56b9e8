"""The fake CUDA driver of tests/cuda/driver.cpp: built where there is a C++ compiler, opened in the place of
the real one."""

import ctypes
import fcntl
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import numpy as np
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


@pytest.fixture(scope="module", autouse=True, name="fake")
def fake_driver():
    """The library opens a driver once, so a process that runs a test with it has this one from then on."""
    path = str(build())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYBMC_CUDA_DRIVER", path)
        patch.setenv("PYBMC_CUDA_KERNELS", path)
        yield Fake(path)


@pytest.fixture(autouse=True)
def nothing_is_left(fake):
    yield
    assert (fake["alive"], fake["bytes"], fake["registered"]) == (0, 0, 0)


def tokens(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, n).astype(np.int32)


def bits(rows):
    return np.asarray(rows, np.float32).view(np.uint32)


def assert_same(ours, right):
    assert ours.shape == right.shape
    n = (bits(ours) != bits(right)).sum()
    assert not n, f"{n} of {ours.size} differ, by up to {np.abs(ours - right).max()}"
