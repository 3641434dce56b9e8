"""The registry: its table in the documents, and the golden files that hold it."""

from pathlib import Path

import pytest
from places import GOLDEN, SHARED

from pybmc.files.gguf import GGUF
from pybmc.models.config import REGISTRY
from tools import architectures

DOCS = Path(__file__).parents[1] / "docs"


def test_the_table_is_that_of_the_registry():
    """Otherwise: python -m tools.architectures > docs/architectures.md"""
    assert set(architectures.MODELS) == set(REGISTRY)
    assert (DOCS / "architectures.md").read_text() == architectures.table()


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
def test_each_row_names_a_golden_file_of_that_architecture():
    folders = [SHARED / name for name in ("golden", "golden-breadth", "golden-embeddings")]
    for name, spec in REGISTRY.items():
        found = [path for folder in folders for path in folder.glob(f"{spec.golden}.*.gguf")]
        assert bool(found) == bool(spec.golden), name
        for path in found:
            with GGUF(path) as file:
                assert file.metadata["general.architecture"] == name


def test_there_are_golden_files_of_most_kinds_here():
    """Where ../shared is absent too."""
    kinds = set()
    for path in GOLDEN:
        with GGUF(path) as file:
            kinds.add(file.metadata["general.architecture"])
    assert kinds >= {"llama", "qwen3", "qwen35moe", "gpt-oss", "deepseek2", "gemma4"}
