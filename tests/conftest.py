"""Fixtures of the whole suite."""

import atexit
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from places import SHARED

settings.register_profile("suite", deadline=None, derandomize=True)      # the same examples on any machine
settings.load_profile("suite")

# Oracles multiply small matrices: OpenBLAS's threads would spin more than they compute. It reads this when
# numpy loads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

signal.signal(signal.SIGINT, signal.default_int_handler)    # ignored at the start of a background job

# what is measured here is kept nowhere
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="pybmc-cache-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def shared() -> Path:
    """A folder of more files beside the checkout. Skips without it."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared")
    return SHARED
