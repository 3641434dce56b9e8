"""pybmc runs GGUF language models on CPUs.

    model = pybmc.Model("model.gguf")
    for token in pybmc.generate(model, "Once upon a time"):
        print(token.text, end="")

Names are loaded when they are first used, so that `import pybmc` is quick.
"""

from importlib import import_module
from pathlib import Path

from .errors import (
    ArgumentError,
    BmcError,
    BusyError,
    ClosedError,
    ContextFullError,
    FormatError,
    OutOfMemoryError,
)

__version__ = "0.1.0"

_HOMES = {
    "Model": "model",
    "Session": "model",
    "eval_batch": "model",
    "Tokenizer": "tokenizers",
    "Sampler": "sampling",
    "generate": "engine.generate",
    "generate_batch": "engine.generate",
    "Engine": "engine",
    "Request": "engine",
    "Speculation": "spec",
}

__all__ = [*_HOMES, "demo_model", "ArgumentError", "BmcError", "BusyError", "ClosedError", "ContextFullError",
           "FormatError", "OutOfMemoryError"]


def demo_model(draft: bool = False) -> Path:
    """The bundled model that tells tales, or the draft that goes with it."""
    path = Path(__file__).parent / "demo" / ("teller-draft.gguf" if draft else "teller.gguf")
    if not path.is_file():
        raise BmcError(f"the bundled model is missing: {path}")
    return path


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
