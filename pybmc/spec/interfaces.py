"""What speculation needs of models and sessions, which are made a room above."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from ..tokenizers import Tokenizer


class Session(Protocol):
    """pybmc.engine.session.Session, as a draft model's text."""

    context: int

    def keep_hidden(self) -> None: ...
    def sync(self, tokens: Sequence[int]) -> int: ...
    def close(self) -> None: ...
    def _live(self) -> Any: ...
    def _claimed(self) -> AbstractContextManager[Any]: ...


class Config(Protocol):
    @property
    def vocab_size(self) -> int: ...


class Model(Protocol):
    """pybmc.engine.model.Model, as a target or a draft."""

    threads: int
    gpu_layers: int

    @property
    def path(self) -> str: ...
    @property
    def config(self) -> Config: ...
    @property
    def tokenizer(self) -> Tokenizer | None: ...
    @property
    def packed_bytes(self) -> int: ...
    @property
    def head(self) -> Any: ...
    def coarsen(self) -> bool: ...
    def check_writes(self) -> None: ...
    def session(self, context: int | None = None) -> Any: ...
