"""Embeddings: a text as one vector. Texts share passes; the vector of one does not depend on the others."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

import numpy as np

from .. import checks
from ..errors import ArgumentError, ContextFullError
from ..files.types import dequantize
from ..models.pooling import DENSE, KINDS, Linear
from .session import eval_batch

log = logging.getLogger(__name__)

PASS = 512          # tokens of short texts that share a pass, as of a causal model: buffers grow with them


def embed(model, inputs, normalize: bool = True, pooling: str | None = None, dimensions: int | None = None,
          progress: Callable[[int, int], None] | None = None) -> np.ndarray | list[np.ndarray]:
    """Model.embed."""
    kind = pooling_kind(model, pooling)
    n_values = model.pooler.n_values(kind)
    if dimensions is not None:
        if kind == "rank":
            raise ArgumentError("dimensions: scores are not cut; leave it out with pooling 'rank'")
        dimensions = checks.whole("dimensions", dimensions, 1, n_values)
    texts = encode_inputs(model, inputs)
    results: list = [None] * len(texts)
    done, total = 0, sum(map(len, texts))
    for group in groups(texts, min(PASS, model.pass_tokens)):
        for i, hidden in zip(group, evaluate(model, [texts[i] for i in group], model.pooler.wants(kind))):
            vector = model.pooler.pool(hidden, kind)[..., :dimensions]
            results[i] = (unit(vector) if normalize and kind != "rank" else vector).astype(np.float32)
        done += sum(len(texts[i]) for i in group)
        if progress:
            progress(done, total)
    if kind == "none":
        return results
    return np.stack(results) if results else np.empty((0, dimensions or n_values), np.float32)


def pooling_kind(model, pooling: str | None) -> str:
    """The pooling asked for, else the file's, else the mean."""
    if pooling is not None:
        return checks.choice("pooling", pooling, KINDS)
    if model.config.pooling.kind != "none":
        return model.config.pooling.kind
    if model.config.causal:
        _note_mean(model.path)
    return "mean"


@lru_cache(maxsize=None)                # once for a file
def _note_mean(path: str) -> None:
    log.warning("%s names no pooling: it was not made for embeddings; "
                "the mean of its tokens' vectors is taken", path)


class TooLongError(ArgumentError, ContextFullError):
    """A text has more tokens than the model takes."""


def encode_inputs(model, inputs, context: int | None = None, truncate: bool = False) -> list[list[int]]:
    """Token ids of each text, with the tokens that the file puts around it; ids stay as they are.
    context: fewer tokens than the model takes. truncate: texts that are too long are cut, else they are a
    TooLongError."""
    if isinstance(inputs, (bytes, bytearray, Mapping)) or not isinstance(inputs, Iterable):
        checks.refuse("inputs", "texts or lists of token ids", inputs)
    texts = [encode(model, text) for text in ([inputs] if isinstance(inputs, str) else inputs)]
    most = model.config.n_ctx if model.config.causal else model.pass_tokens
    most = min(most, context or most)
    if truncate:
        texts = [cut(model, ids, most) for ids in texts]
    for i, ids in enumerate(texts):
        if not ids:
            raise ArgumentError(f"inputs: text {i + 1} of {len(texts)} has no tokens")
        if len(ids) > most:
            raise TooLongError(f"inputs: text {i + 1} of {len(texts)} has {len(ids)} tokens, "
                               f"the model takes up to {most}")
    return texts


def cut(model, ids: list[int], most: int) -> list[int]:
    """The first tokens of a text, and the one that the vocabulary puts at its end."""
    if len(ids) <= most:
        return ids
    ends = model.tokenizer is not None and (model.tokenizer.add_eos or model.tokenizer.add_sep)
    return [*ids[:most - 1], ids[-1]] if ends else ids[:most]


def encode(model, text) -> list[int]:
    if not isinstance(text, str):
        if not isinstance(text, Iterable):
            checks.refuse("inputs", "texts or lists of token ids", text)
        return checks.ids("inputs", text, model.config.vocab_size)
    if model.tokenizer is None:
        raise ArgumentError(f"{model.path} has no vocabulary: give token ids instead of texts")
    return model.tokenizer.encode(text)


def groups(texts: list[list[int]], most: int) -> Iterator[list[int]]:
    """Numbers of texts that share a pass: up to `most` tokens, or a longer text alone.
    The shortest come first."""
    group: list[int] = []
    size = 0
    for i in sorted(range(len(texts)), key=lambda i: len(texts[i])):
        if group and size + len(texts[i]) > most:
            yield group
            group, size = [], 0
        group.append(i)
        size += len(texts[i])
    if group:
        yield group


def evaluate(model, texts: list[list[int]], wants: str) -> list[Any]:
    """Vectors after the last norm, as Session.eval names them."""
    with ExitStack() as sessions:
        return eval_batch([(sessions.enter_context(model.session(rows=len(ids))), ids, wants)
                           for ids in texts])


def unit(vector: np.ndarray) -> np.ndarray:
    """Vectors of length 1; a zero stays what it is."""
    length = np.sqrt(np.square(vector).sum(axis=-1, keepdims=True))
    return np.divide(vector, length, out=np.zeros_like(vector), where=length > 0)


class Matrix:
    """y = W x + b in float64: one sum for each value, in one order."""

    def __init__(self, linear: Linear):
        self.n_out = linear.n_out
        self._weight = _values(linear.weight).reshape(linear.n_out, linear.n_in)
        self._bias = 0.0 if linear.bias is None else _values(linear.bias)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return np.einsum("ij,j->i", self._weight, x) + self._bias


def _values(tensor) -> np.ndarray:
    return dequantize(tensor.type, tensor.data, math.prod(tensor.shape)).astype(np.float64)


class Pooler:
    """How the vectors of a text's tokens become its own:
    in float64, text by text, in the order of its tokens."""

    def __init__(self, config):
        self.config = config
        self._matrices = {name: Matrix(linear) for name, linear in config.pooling.matrices.items()}
        self._dense = [self._matrices[name] for name in DENSE if name in self._matrices]

    def n_values(self, kind: str) -> int:
        """Values of a text's vector. Raises ArgumentError for scores that the model does not give."""
        if kind == "rank":
            return self._output().n_out
        return self._dense[-1].n_out if self._dense and kind != "none" else self.config.dim

    def _output(self) -> Matrix:
        if not self.config.spec.score:
            raise ArgumentError(f"pooling: pybmc does not know how {self.config.arch} models score a text")
        if "cls.output" not in self._matrices:
            raise ArgumentError("pooling: the model gives no scores: cls.output.weight is missing")
        return self._matrices["cls.output"]

    def wants(self, kind: str) -> str:
        """What Session.eval has to give."""
        kind = self.config.spec.score if kind == "rank" else kind
        return f"{kind} hidden" if kind in ("first", "last") else "hidden"

    def pool(self, hidden: np.ndarray, kind: str) -> np.ndarray:
        """A text's vector, or scores, or with "none" its tokens' vectors."""
        vector = hidden.astype(np.float64)
        if kind == "none":
            return vector
        if kind == "rank":
            return self._scores(vector)
        if kind == "mean":
            vector = np.add.reduce(vector, axis=0) / len(vector)
        for matrix in self._dense:
            vector = matrix(vector)
        return vector

    def _scores(self, vector: np.ndarray) -> np.ndarray:
        """A BERT's: of its first token, through cls and tanh.
        Qwen 3's: the shares of the answers after the last."""
        if self.config.spec.score == "first" and "cls" in self._matrices:
            vector = np.tanh(self._matrices["cls"](vector))
        scores = self._output()(vector)
        if self.config.spec.score == "first":
            return scores
        weights = np.exp(scores - scores.max())
        return weights / weights.sum()
