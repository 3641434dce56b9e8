"""pybmc runs GGUF language models on CPUs.

    model = pybmc.Model("model.gguf")
    for token in pybmc.generate(model, "Once upon a time"):
        print(token.text, end="")

Names are loaded when they are first used, so that `import pybmc` is quick.
"""

from pathlib import Path

from ._lazy import lazy
from .errors import (
    ArgumentError,
    BmcError,
    BusyError,
    ClosedError,
    ContextFullError,
    DeviceError,
    FormatError,
    OutOfMemoryError,
)

__version__ = "0.1.0"

_HOMES = {
    "Model": "engine.model",
    "Session": "engine.session",
    "eval_batch": "engine.session",
    "Tokenizer": "tokenizers",
    "Sampler": "engine.sampler",
    "generate": "chat.generate",
    "generate_batch": "chat.generate",
    "Engine": "engine.engine",
    "Request": "engine.request",
    "Grammar": "grammar",
    "Speculation": "spec",
    **dict.fromkeys(("Llama", "LlamaGrammar", "LlamaPromptLookupDecoding", "LlamaRAMCache",
                     "LogitsProcessorList", "StoppingCriteriaList"), "llama"),
}

__all__ = [*_HOMES, "demo_model", "ArgumentError", "BmcError", "BusyError", "ClosedError", "ContextFullError",
           "DeviceError", "FormatError", "OutOfMemoryError"]


def demo_model(draft: bool = False) -> Path:
    """The bundled model that tells tales, or the draft that goes with it."""
    path = Path(__file__).parent / "demo" / ("teller-draft.gguf" if draft else "teller.gguf")
    if not path.is_file():
        raise BmcError(f"the bundled model is missing: {path}")
    return path


__getattr__, __dir__ = lazy(__name__, _HOMES)
