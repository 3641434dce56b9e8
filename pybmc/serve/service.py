"""What a server serves: a model, its engine's thread, and the settings of requests that name none."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__
from ..chat.template import ChatTemplate
from ..chat.tools import format_of
from ..engine.engine import Engine
from ..engine.memory import usual_memory
from ..engine.model import Model
from ..errors import ArgumentError
from ..spec.speculation import Speculation
from .errors import Refused, shutting_down
from .fill import fill_tokens
from .metrics import Metrics
from .sessions import Sessions, open_folder
from .worker import Run, Worker

if TYPE_CHECKING:
    from .pull import Pull

log = logging.getLogger(__name__)

THREADS = 2                             # that tokenize and write templates ..
LARGE = 64 << 10                        # .. of bodies up to this many bytes; larger ones take turns


@dataclass
class Settings:
    """How a model is served; `pybmc serve --help` says what each means. sampling: pybmc.Sampler's settings;
    without a seed each request gets a new one. template_variables: what the chat template gets where a
    request says nothing else."""

    names: Sequence[str] = ()
    parallel: int = 8
    queue: int = 64
    queue_seconds: float = 600
    context: int | None = None
    max_tokens: int = 8192
    memory: float | None = None
    pass_seconds: float = 0.1
    pooling: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    spec: str = "auto"
    draft_max: int = 16
    draft_min: int = 0
    chat_template: str | None = None
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    strict_model: bool = False
    log_texts: str | None = None
    reasoning_budget: int = -1
    sessions: str | None = None


def marks_of(path: Path) -> tuple | None:
    """Which file a path names, its size, and when it was written; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_dev, found.st_ino), found.st_size, found.st_mtime_ns


class Service:
    """An opened model behind a worker. load_seconds: what opening it took."""

    def __init__(self, model: Model, draft: Model | None = None, settings: Settings | None = None,
                 load_seconds: float = 0.0):
        self.model, self.settings = model, settings or Settings()
        self._files = {path: marks for one in (model, draft) if one for path in one._file.paths
                       if (marks := marks_of(path))}
        if model.tokenizer is None:
            raise ArgumentError(f"{model.path} has no vocabulary: it cannot be served")
        given = self.settings
        self.tokenizer, self.load_seconds, self.created = model.tokenizer, load_seconds, int(time.time())
        self.names = list(given.names) or [Path(model.path).name.removesuffix(".gguf")]
        self.writes = model.config.causal
        self.context = given.context or (model.config.n_ctx if self.writes else model.pass_tokens)
        self.template = ChatTemplate(given.chat_template, self.tokenizer)
        if self.writes and self.template.guessed:
            log.warning("%s has no chat template: messages are written as for %s; "
                        "--chat-template takes another", model.path, self.template.guessed)
        self.fill = fill_tokens(self.tokenizer)
        self.fingerprint = f"b{__version__}-{model.fingerprint[:12]}"
        self.metrics = Metrics(self)
        self.closing = self.closed = False
        self.pulling: Pull | None = None                # a model on its way from the hub
        memory = given.memory if given.memory is not None else usual_memory(model)
        if draft is not None and not self.writes:
            raise ArgumentError(f"{model.path} is an encoder: it writes no text, "
                                "so a draft model has nothing to guess")
        if given.sessions is not None and not self.writes:
            raise ArgumentError(f"{model.path} is an encoder: it has no sessions that could be saved")
        folder = None if given.sessions is None else open_folder(given.sessions)
        spec = given.spec if self.writes else "off"
        self.speculation = Speculation(model, draft, spec, given.draft_max, given.draft_min)
        engine = Engine(model, parallel=given.parallel, memory=memory, keep=True,
                        speculation=self.speculation, pass_seconds=given.pass_seconds)
        self.worker = Worker(engine, given.queue)
        self._small, self._large = (ThreadPoolExecutor(n, "pybmc-text") for n in (THREADS, 1))
        self.sessions: Any = None
        if folder is not None:
            self.sessions = Sessions(folder, model, self.worker, self.context, given.queue_seconds)

    @property
    def name(self) -> str:
        return self.names[0]

    async def in_pool(self, size: int, function: Callable, *args):
        """The result of work on a text of this size in bytes, which would hold up the event loop."""
        pool = self._large if size > LARGE else self._small
        return await asyncio.get_running_loop().run_in_executor(pool, function, *args)

    def check_files(self) -> None:
        """Refuse to go on with files that were written to: what is mapped of them is not what was loaded.
        Files that took their names, or none, are no harm."""
        for path, before in self._files.items():
            now = marks_of(path)
            if now is not None and now[0] == before[0] and now != before:
                raise Refused(503, "model_changed",
                              "the file of the model was changed while it is served; start the server anew")

    def submit(self, requests: list, slot: int | None = None) -> Run:
        self.check_files()
        if self.closing:
            raise shutting_down()
        return self.worker.submit(requests, slot)

    def stop(self) -> None:
        """End all answers with an error."""
        self.closing = True
        over = shutting_down()
        for run in list(self.worker.runs):
            run.fail(over)
        if self.pulling:
            self.pulling.fail(over)

    def close(self) -> None:
        """Twice is fine."""
        if not self.closed:
            self.closing = True
            if self.sessions:
                self.sessions.close()
            self.worker.close()
            for pool in (self._small, self._large):
                pool.shutdown(cancel_futures=True)
            self.closed = True

    @cached_property
    def n_params(self) -> int:
        return sum(int(np.prod(tensor.shape)) for tensor in self.model._file.tensors.values())

    @cached_property
    def capabilities(self) -> list[str]:
        """What the model can do here, in Ollama's words."""
        embeds = (self.settings.pooling or self.model.config.pooling.kind) != "rank"
        if not self.writes:
            return ["embedding"] * embeds
        known = {"completion": True, "tools": format_of(self.template).prompts,
                 "thinking": self.template.thinks, "insert": self.fill is not None,
                 "embedding": embeds and self.model.config.pooling.kind != "none"}
        return [name for name, has in known.items() if has]


