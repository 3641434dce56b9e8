"""Files made by llama.cpp: those of the repository, and more where a folder `shared` lies beside
the checkout."""

from pathlib import Path

HERE = Path(__file__).parent
SHARED = HERE.parents[1] / "shared"


def _by_name(pattern: str, *folders: Path) -> dict[str, Path]:
    """One file for each name, the first folder's first."""
    found = {}
    for path in (path for folder in folders for path in sorted(folder.glob(pattern))):
        found.setdefault(path.name, path)
    return found


# NAME.gguf beside its NAME.npz
_models = _by_name("*.gguf", HERE / "golden", SHARED / "golden", SHARED / "golden-breadth")
GOLDEN = [path for path in _models.values() if path.with_suffix(".npz").is_file()]

# "llama-spm" -> ggml-vocab-llama-spm.gguf.xz, beside its .inp and .out
_packed = _by_name("ggml-vocab-*.gguf.xz", HERE / "vocab", SHARED / "data" / "vocab")
VOCABULARIES = {name.removeprefix("ggml-vocab-").removesuffix(".gguf.xz"): path
                for name, path in _packed.items()}
