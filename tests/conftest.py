"""Fixtures of the whole suite."""

import atexit
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True)      # the same examples every time, on any machine
settings.load_profile("suite")

signal.signal(signal.SIGINT, signal.default_int_handler)        # a background job of a shell starts with it ignored

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="pybmc-cache-")       # what is measured here is kept nowhere
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real vocabularies and golden models, beside the checkout and no part of it. Skips without them."""
    path = Path(__file__).parents[1].parent / "shared"
    if not path.is_dir():
        pytest.skip("needs ../shared")
    return path
