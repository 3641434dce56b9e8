"""Fixtures of the whole suite."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real vocabularies and golden models beside the checkout, of which they are no part. Without them: skipped."""
    path = Path(__file__).parents[1].parent / "shared"
    if not path.is_dir():
        pytest.skip("needs ../shared")
    return path
