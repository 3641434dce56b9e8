"""The metadata of one architecture: numbers and flags, checked, also where each layer has its own."""

from __future__ import annotations

import math

import numpy as np

from ..errors import FormatError
from ..files.gguf import GGUF

# Keys that change nothing of what is computed, whatever their value: sizes that tensors have too, positions
# of images (text has the same ones in all sections; glm4 reads the key), and how a model was made.
HARMLESS = {
    "vocab_size", "rope.dimension_sections", "rope.scaling.finetuned", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "tensor_data_layout", "classifier.output_labels",
}

# Keys that change nothing where an architecture does not read them, if they have this value.
NEUTRAL = {
    "attention.clamp_kqv": 0, "attention.max_alibi_bias": 0, "attention.sliding_window": 0,
    "attn_logit_softcapping": 0,
    "embedding_scale": 1, "residual_scale": 1, "logit_scale": 1, "attention.temperature_scale": 0,
    "expert_count": 0, "expert_used_count": 0, "expert_feed_forward_length": 0, "expert_shared_count": 0,
    "expert_shared_feed_forward_length": 0, "leading_dense_block_count": 0,
}


class Keys:
    """The keys `<arch>.*` of a file. A name is given without the architecture; layer picks from an array of
    one per layer, those that predict further included."""

    def __init__(self, file: GGUF, arch: str):
        self.file, self.arch = file, arch
        self.used: set[str] = set()

    def error(self, key: str, expected: str, found) -> FormatError:
        return FormatError(f"{self.file.path}: {self.arch}.{key}: expected {expected}, found {found}")

    def find(self, key: str, layer: int | None = None):
        """The value of a key, None where the file has none. Raises FormatError for an array that is not one
        number for each layer."""
        self.used.add(key)
        value = self.file.metadata.get(f"{self.arch}.{key}")
        if not isinstance(value, np.ndarray):
            return value
        self.check_length(key, value, layer)
        if layer is not None:
            return value[layer].item()
        return value[0].item() if (value == value[0]).all() else value

    def check_length(self, key: str, value: np.ndarray, layer: int | None) -> None:
        """Raise FormatError for an array that does not have one element for each layer; those that predict
        further may have none."""
        total, after = (self.file.metadata.get(f"{self.arch}.{name}", 0)
                        for name in ("block_count", "nextn_predict_layers"))
        after = after if isinstance(after, int) else 0
        right = [n for n in (total, total - after) if n > (layer or 0)] if isinstance(total, int) else []
        if len(value) not in right:
            raise self.error(key, f"one for each of {total!r:.20} layers", len(value))

    def text(self, key: str, default: str) -> str:
        value = self.find(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, "a word", f"{value!r:.60}")
        return value or default

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.find(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, "true or false", f"{value!r:.60}")
        return default if value is None else value

    def count(self, key: str, default: int | None = None, low: int = 1, high: int = 1 << 30,
              layer: int | None = None) -> int:
        """A whole number; without a layer, per-layer arrays have to agree."""
        value = self.find(key, layer)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "a number", "nothing")
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, "one whole number", f"{value!r:.60}")
        if not low <= value <= high:
            raise self.error(key, f"{low} to {high}", value)
        return value

    def number(self, key: str, default: float | None = None, low: float = 0.0, high: float = 1e30,
               above: float = -math.inf, layer: int | None = None) -> float:
        """A number from low to high, and above `above`; outside, the model's arithmetic makes no sense."""
        value = self.find(key, layer)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "a number", "nothing")
        if (isinstance(value, bool) or not isinstance(value, (int, float))
                or not low <= value <= high or value <= above):
            bounds = f"above {above:g}" if above >= low else f"from {low:g}"
            raise self.error(key, f"a number {bounds} up to {high:g}", f"{value!r:.60}")
        return float(value)

    def check_all_used(self) -> None:
        """Raise FormatError for a key that nothing here has read: what it asks for would be missing."""
        for name, value in self.file.metadata.items():
            key = name[len(self.arch) + 1:]
            if not name.startswith(f"{self.arch}.") or key in self.used | HARMLESS:
                continue
            if key not in NEUTRAL:
                raise FormatError(f"{self.file.path}: pybmc does not know the key {name} ({value!r:.40}); "
                                  "the answer could be wrong without it")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value != NEUTRAL[key]:
                raise self.error(key, f"{NEUTRAL[key]}, as pybmc knows of no other for {self.arch}",
                                 f"{value!r:.60}")
