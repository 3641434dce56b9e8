"""What is handed to a Llama: lists of functions, a drafter without a model, and grammars."""

from __future__ import annotations

from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import numpy as np

from .. import checks
from ..errors import ArgumentError
from ..grammar.asked import Asked


class LogitsProcessorList(list):
    """Functions of the ids so far, int32 (n,), and the logits, float32 (vocab_size,):
    each gives new logits."""

    def __call__(self, input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        for processor in self:
            found = np.asarray(processor(input_ids, scores), np.float32)
            if found.shape != scores.shape:
                raise ArgumentError(f"logits_processor: expected logits {scores.shape}, found {found.shape}")
            scores = found
        return scores


class StoppingCriteriaList(list):
    """Functions of the ids so far and of the logits behind them; the text ends where one of them is true."""

    def __call__(self, input_ids: np.ndarray, logits: np.ndarray) -> bool:
        return any([bool(criterion(input_ids, logits)) for criterion in self])


def functions(name: str, value, kind: type):
    """A list of functions, one function, or None, as a list of a kind; None for none at all."""
    if value is None or isinstance(value, kind):
        return value or None
    found = [value] if callable(value) else value
    if not isinstance(found, (list, tuple)) or not all(map(callable, found)):
        checks.refuse(name, "a function or a list of functions", value)
    return kind(found) or None


@dataclass(frozen=True)
class LlamaPromptLookupDecoding:
    """As a draft_model: repetitions in the text are guessed. How long they are and how many tokens are
    guessed is found out while decoding, whatever the values here."""

    max_ngram_size: int = 2
    num_pred_tokens: int = 10


@dataclass(frozen=True)
class LlamaGrammar:
    """A grammar's text, or that of a JSON schema.
    A Llama compiles it when it is used, and keeps what it compiled."""

    _grammar: str = field(kw_only=True)
    _is_schema: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        name = "json_schema" if self._is_schema else "grammar"
        if not isinstance(self._grammar, str) or not self._grammar.strip():
            checks.refuse(name, "a text that is not empty", self._grammar)

    @classmethod
    def from_string(cls, grammar: str, verbose: bool = True) -> LlamaGrammar:
        """GBNF with a rule `root`, or Lark with a rule `start` after %llguidance."""
        return cls(_grammar=grammar)

    @classmethod
    def from_file(cls, file: str | PathLike, verbose: bool = True) -> LlamaGrammar:
        return cls.from_string(Path(file).read_text("utf-8"))

    @classmethod
    def from_json_schema(cls, json_schema: str, verbose: bool = True) -> LlamaGrammar:
        return cls(_grammar=json_schema, _is_schema=True)

    def asked(self) -> Asked:
        """As a request asks for it."""
        return Asked("grammar", "schema" if self._is_schema else "grammar", self._grammar)
