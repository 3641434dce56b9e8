"""The metadata of one architecture: numbers and flags, checked, also where each layer has its own."""

from __future__ import annotations

import math

import numpy as np

from ..errors import FormatError
from ..files.gguf import GGUF

# Keys that change nothing of what is computed here, or only name what the tensors say too.
HARMLESS = {
    "vocab_size", "block_count", "rope.dimension_sections", "rope.dimension_count_swa", "rope.scaling.finetuned", "pooling_type",
    "attention.causal", "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "tensor_data_layout", "expert_count", "nextn_predict_layers", "interleave_moe_layer_step", "expert_shared_count", "moe_every_n_layers", "decoder_start_token_id",
    "classifier.output_labels", "attention.clamp_kqv", "use_parallel_residual",
}


class Keys:
    """The keys `<arch>.*` of a file. A name is given without the architecture; layer picks from an array of one per layer."""

    def __init__(self, file: GGUF, arch: str):
        self.file, self.arch = file, arch
        self.used: set[str] = set()

    def error(self, key: str, expected: str, found) -> FormatError:
        return FormatError(f"{self.file.path}: {self.arch}.{key}: expected {expected}, found {found}")

    def find(self, key: str, layer: int | None = None):
        """The value of a key, None where the file has none. Raises FormatError for an array that is too short."""
        self.used.add(key)
        value = self.file.metadata.get(f"{self.arch}.{key}")
        if isinstance(value, np.ndarray) and layer is not None:
            if layer >= len(value):
                raise self.error(key, f"a number for each layer, {layer} among them", f"{len(value)} numbers")
            return value[layer].item()
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            return value[0].item()
        return value

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

    def count(self, key: str, default: int | None = None, low: int = 1, high: int = 1 << 30, layer: int | None = None) -> int:
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
        """A number from low to high, and larger than `above`; outside, the model's arithmetic makes no sense."""
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
            if name.startswith(f"{self.arch}.") and name[len(self.arch) + 1:] not in self.used | HARMLESS:
                raise FormatError(f"{self.file.path}: pybmc does not know the key {name} ({value!r:.40}); "
                                  "the answer could be wrong without it")
