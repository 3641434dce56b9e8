"""Fixtures of the whole suite."""

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True)      # the same examples every time, on any machine
settings.load_profile("suite")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real vocabularies and golden models, beside the checkout and no part of it. Skips without them."""
    path = Path(__file__).parents[1].parent / "shared"
    if not path.is_dir():
        pytest.skip("needs ../shared")
    return path
