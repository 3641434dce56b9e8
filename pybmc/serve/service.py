"""What a server serves: a model, its engine's thread, and the settings of requests that name none."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from .. import __version__
from ..chat.template import ChatTemplate
from ..engine.engine import Engine
from ..engine.model import Model
from ..errors import ArgumentError
from ..spec.speculation import Speculation
from .errors import Refused
from .fill import fill_tokens
from .metrics import Metrics
from .sessions import Sessions, open_folder
from .worker import Run, Worker

THREADS = 2                             # of the pool for tokenizing and templates


@dataclass
class Settings:
    """How a model is served; `pybmc serve --help` says what each means. sampling: pybmc.Sampler's settings; without a seed
    each request gets a new one."""

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
    strict_model: bool = False
    log_texts: str | None = None
    sessions: str | None = None


class Service:
    """An opened model behind a worker. load_seconds: what opening it took."""

    def __init__(self, model: Model, draft: Model | None = None, settings: Settings | None = None,
                 load_seconds: float = 0.0):
        self.model, self.settings = model, settings or Settings()
        if model.tokenizer is None:
            raise ArgumentError(f"{model.path} has no vocabulary: it cannot be served")
        given = self.settings
        self.tokenizer, self.load_seconds, self.created = model.tokenizer, load_seconds, int(time.time())
        self.names = list(given.names) or [Path(model.path).name.removesuffix(".gguf")]
        self.writes = model.config.causal
        self.context = given.context or (model.config.n_ctx if self.writes else model.pass_tokens)
        self.template = ChatTemplate(given.chat_template, self.tokenizer)
        self.fill = fill_tokens(self.tokenizer)
        self.fingerprint = f"b{__version__}-{model.fingerprint[:12]}"
        self.metrics = Metrics(self)
        self.closing = self.closed = False
        memory = given.memory if given.memory is not None else free_memory() / 2
        if draft is not None and not self.writes:
            raise ArgumentError(f"{model.path} is an encoder: it writes no text, so a draft model has nothing to guess")
        if given.sessions is not None and not self.writes:
            raise ArgumentError(f"{model.path} is an encoder: it has no sessions that could be saved")
        folder = None if given.sessions is None else open_folder(given.sessions)
        self.speculation = Speculation(model, draft, given.spec if self.writes else "off", given.draft_max, given.draft_min)
        self.worker = Worker(Engine(model, parallel=given.parallel, memory=memory, keep=True,
                                    speculation=self.speculation, pass_seconds=given.pass_seconds), given.queue)
        self._pool = ThreadPoolExecutor(THREADS, "pybmc-text")
        self.sessions: Any = None
        if folder is not None:
            self.sessions = Sessions(folder, model, self.worker, self.context, given.queue_seconds)

    @property
    def name(self) -> str:
        return self.names[0]

    async def in_pool(self, function: Callable, *args):
        """The result of work that would hold up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    def submit(self, requests: list, slot: int | None = None) -> Run:
        if self.closing:
            raise Refused(503, "shutting_down", "the server is shutting down")
        return self.worker.submit(requests, slot)

    def stop(self) -> None:
        """End all answers with an error."""
        self.closing = True
        for run in list(self.worker.runs):
            run.fail(Refused(503, "shutting_down", "the server is shutting down"))

    def close(self) -> None:
        """Twice is fine."""
        if not self.closed:
            self.closing = True
            if self.sessions:
                self.sessions.close()
            self.worker.close()
            self._pool.shutdown()
            self.closed = True

    @cached_property
    def capabilities(self) -> list[str]:
        """What the model can do here, in Ollama's words."""
        if not self.writes:
            return ["embedding"]
        thinks = self.template.reads("enable_thinking") or "<think>" in self.template.source
        known = {"completion": True, "thinking": thinks, "insert": self.fill is not None,
                 "embedding": self.model.config.pooling.kind != "none"}
        return [name for name, has in known.items() if has]


def free_memory() -> float:
    """Bytes that the system could give now."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    except OSError:
        pass
    return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
