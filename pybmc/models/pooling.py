"""What follows the pass of an embedding model: which of its vectors count, and the matrices after them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..errors import FormatError
from ..files.gguf import Tensor
from .parts import Reader

KINDS = ("none", "mean", "first", "last", "rank")           # pooling_type
DENSE = ("dense_2", "dense_3")                              # of embeddings, one after the other
SCORE = ("cls", "cls.output")                               # of scores, the first optional
TENSORS = (*DENSE, *SCORE, *(f"{name}.bias" for name in SCORE))         # without ".weight"


@dataclass(frozen=True)
class Linear:
    """y = W x + b. weight: (n_in, n_out) as GGUF has it; bias: (n_out,) or None."""

    weight: Tensor
    bias: Tensor | None = None

    @property
    def n_in(self) -> int:
        return self.weight.shape[0]

    @property
    def n_out(self) -> int:
        return math.prod(self.weight.shape[1:])


@dataclass(frozen=True)
class Pooling:
    """kind: of KINDS; "none" also where the file does not say. matrices: those that the file has, by name."""

    kind: str = "none"
    matrices: dict[str, Linear] = field(default_factory=dict)


def read_pooling(k: Reader) -> Pooling:
    """The Pooling of a file. Raises FormatError for matrices that do not follow one another."""
    kind = KINDS[k.count("pooling_type", 0, low=0, high=len(KINDS) - 1)]
    return Pooling(kind, _chain(k, DENSE) | _chain(k, SCORE))


def _chain(k: Reader, names: tuple[str, ...]) -> dict[str, Linear]:
    """Matrices of which each one reads what the one before gives."""
    found, width = {}, k.dim
    for name in names:
        stated = [(key := f"{name}_feat_{end}", k.count(key, 0, low=0)) for end in ("in", "out")]
        weight, bias = k.file.tensors.get(f"{name}.weight"), k.file.tensors.get(f"{name}.bias")
        if weight is None:
            if bias or any(n for _, n in stated):
                raise FormatError(f"{k.file.path}: {name}.weight is missing")
            continue
        linear = Linear(weight, bias)
        _check(k, weight, "rows", width, linear.n_in)
        if bias is not None:
            _check(k, bias, "a bias", linear.n_out, math.prod(bias.shape))
        for (key, n), size in zip(stated, (linear.n_in, linear.n_out)):
            if n not in (0, size):
                raise k.error(key, f"{size}, as {name}.weight has", n)
        found[name], width = linear, linear.n_out
    return found


def _check(k: Reader, tensor: Tensor, what: str, expected: int, found: int) -> None:
    where = f"{k.file.path}: {tensor.name}"
    if found != expected:
        raise FormatError(f"{where}: expected {what} of {expected} values, found {found}")
    if not tensor.type.runs:
        raise FormatError(f"{where}: pybmc does not compute with type {tensor.type}")
