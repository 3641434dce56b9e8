"""llama-cpp-python's class over pybmc's engine. Names are loaded when they are first used."""

from .._lazy import lazy

_HOMES = {"Llama": "llama", "LlamaGrammar": "parts", "LlamaPromptLookupDecoding": "parts",
          "LlamaRAMCache": "cache", "LlamaState": "cache", "LogitsProcessorList": "parts",
          "StoppingCriteriaList": "parts"}

__all__ = [*_HOMES]
__getattr__, __dir__ = lazy(__name__, _HOMES)
