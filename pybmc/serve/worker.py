"""The engine's thread, and the way from the event loop to it and back.

The thread owns the engine. Calls reach it through one queue; after each step it hands the loop one bundle
of updates. Without requests it sleeps in the queue.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue

from ..engine.engine import Engine
from ..engine.request import Request
from ..engine.sequence import Sequence
from ..errors import BmcError, OutOfMemoryError
from .answers import Update
from .errors import Refused, busy, refusal

log = logging.getLogger(__name__)


class Gone(Exception):
    """The client has closed the connection."""


class Run:
    """The requests of one client's request, on their way through the engine. Belongs to the event loop."""

    def __init__(self, worker: Worker, requests: list[Request], slot: int | None = None):
        self.worker, self.requests, self.slot = worker, requests, slot
        self.closed = False
        self.left = len(requests)
        self.started = time.perf_counter()
        self.reading: dict[int, float] = {}     # the thread's: when the first step began that read a prompt
        self._updates: asyncio.Queue[Update | None] = asyncio.Queue()

    def deliver(self, updates: list[Update]) -> None:
        if self.closed:
            return
        self.worker.waiting.discard(self)
        for update in updates:
            self.left -= update.done
            self._updates.put_nowait(update)
        if not self.left:
            self.worker.runs.discard(self)

    def leave(self) -> None:
        """The client has gone: next() raises Gone."""
        self._updates.put_nowait(None)

    async def next(self, seconds: float | None = None) -> Update | None:
        """The next update; None where none comes within some seconds.
        Raises Gone, or the Refused that ended a sequence."""
        try:
            update = await asyncio.wait_for(self._updates.get(), seconds)
        except asyncio.TimeoutError:
            return None
        if update is None:
            raise Gone
        if update.error:
            raise update.error
        return update

    def close(self) -> None:
        """Cancel what still runs; its rows are free before the next pass. Twice is fine."""
        if not self.closed:
            self.closed = True
            self.worker.forget(self)

    def fail(self, refused: Refused) -> None:
        """End it with an error."""
        self._updates.put_nowait(Update(0, error=refused))


@dataclass
class Slot:
    """Room for a sequence. text: the tokens of the last one, as far as they have rows."""

    sequence: Sequence | None = None
    text: list[int] = field(default_factory=list)


class Worker:
    """Owns an engine in a thread of its own. queue: how many requests may wait."""

    def __init__(self, engine: Engine, queue: int = 64):
        self.engine, self.queue = engine, queue
        self.waiting: set[Run] = set()          # the loop's: runs of which nothing was admitted yet ..
        self.runs: set[Run] = set()             # .. and all that have not ended
        self.busy_seconds, self.steps = 0.0, 0
        self.sequences = 0                      # over all steps
        self.slots = [Slot() for _ in range(engine.parallel)]
        self._calls: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._sequences: dict = {}              # the thread's: sequence -> (run, index)
        self._step_began = 0.0
        self._updates: dict = {}                # .. (run, index) -> what is new
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._work, name="pybmc-engine", daemon=True)
        self._thread.start()

    # ---- called by the event loop

    def submit(self, requests: list[Request], slot: int | None = None) -> Run:
        """Queue requests. slot: where they run, if it is free by then. Raises Refused where too many wait."""
        if len(self.waiting) >= self.queue:
            n = len(self.waiting)
            raise busy("queue_full", f"{n} requests wait already; expected at most {self.queue}", status=429)
        self._loop = asyncio.get_running_loop()
        run = Run(self, requests, slot)
        self.waiting.add(run)
        self.runs.add(run)
        self._calls.put(lambda: self._add(run))
        return run

    def forget(self, run: Run) -> None:
        self.waiting.discard(run)
        self.runs.discard(run)
        if run.left:
            self.post(lambda: self._cancel(run))

    def post(self, function: Callable[[], object]) -> None:
        """Let the engine's thread run a function between two steps."""
        self._calls.put(function)

    async def call(self, function: Callable[[], object]):
        """The result of a function that the engine's thread runs between two steps."""
        result = asyncio.get_running_loop().create_future()
        self._calls.put(lambda: fulfil(result, function))
        return await result

    def close(self) -> None:
        """End the thread; the engine is closed in it."""
        self._calls.put(None)
        self._thread.join()

    # ---- the thread

    def _work(self) -> None:
        with self.engine:
            while self._listen():
                if self.engine.waiting or self.engine.running:
                    self._step()
                self._post()

    def _listen(self) -> bool:
        """Make the calls that wait; without requests wait for one. False: it is over."""
        idle = not (self.engine.waiting or self.engine.running)
        with suppress(Empty):
            while True:
                call = self._calls.get(block=idle)
                if call is None:
                    return False
                call()
                idle = False
        return True

    def _add(self, run: Run) -> None:
        for index, request in enumerate(run.requests):
            if request.progress:
                request = replace(request, progress=self._progress(run, index))
            try:
                self._sequences[self.engine.add(request)] = run, index
            except BmcError as error:
                self._update(run, index).error = refusal(error)

    def _progress(self, run: Run, index: int) -> Callable[[int, int], None]:
        def note(done: int, total: int) -> None:
            now = time.perf_counter()
            began = run.reading.setdefault(index, self._step_began)
            self._update(run, index).progress.append((done, total, now - began))
        return note

    def _cancel(self, run: Run) -> None:
        for sequence in [s for s, (its, _) in self._sequences.items() if its is run]:
            self.engine.cancel(sequence)
            del self._sequences[sequence]

    def _update(self, run: Run, index: int) -> Update:
        return self._updates.setdefault((run, index), Update(index))

    def _step(self) -> None:
        started, before = time.perf_counter(), {s for s in self._sequences if s.started}
        self._step_began = started
        try:
            events = self.engine.step()
        except OutOfMemoryError:
            events = []
            if not self.engine.relieve():
                self._fail_all()
        except Exception:
            log.exception("a step of the engine failed")
            self._fail_all()
            return
        for sequence, token in events:
            if sequence in self._sequences:
                self._update(*self._sequences[sequence]).tokens.append(token)
        self.sequences += sum(s.started for s in self._sequences)
        for sequence, (run, index) in list(self._sequences.items()):
            if sequence.started and sequence not in before:
                begun = sequence.stats.reused_tokens, len(sequence.prompt)
                self._update(run, index).progress[:0] = [(*begun, 0.0)] if sequence.request.progress else []
                self._seat(sequence, run.slot)
            if sequence.done:
                self._end(sequence)
            elif (run, index) in self._updates:
                self._update(run, index).stats = copy.copy(sequence.stats)
                self._update(run, index).scores = [] if sequence.unscored else sequence.scores
        self.busy_seconds += time.perf_counter() - started
        self.steps += 1

    def _seat(self, sequence: Sequence, wanted: int | None) -> None:
        """Give a sequence the slot that it asks for, else the first one that is free."""
        free = [slot for slot in self.slots if slot.sequence not in self._sequences] or self.slots
        slot = next((slot for slot in free if wanted is not None and slot is self.slots[wanted]), free[0])
        slot.sequence, slot.text = sequence, []

    def _end(self, sequence: Sequence) -> None:
        run, index = self._sequences.pop(sequence)
        for slot in self.slots:
            if slot.sequence is sequence and not sequence.error:
                slot.text = sequence.text[:-1] if sequence.stats.predicted_tokens else sequence.text
        update = self._update(run, index)
        update.done, update.stats = True, sequence.stats
        update.stop_string, update.scores = sequence.stop_string, sequence.scores
        update.error = refusal(sequence.error) if sequence.error else None

    def _fail_all(self) -> None:
        for sequence in list(self._sequences):
            self.engine.cancel(sequence)
            run, index = self._sequences.pop(sequence)
            self._update(run, index).error = Refused(500, "internal", "internal error")

    def _post(self) -> None:
        """Hand the loop what is new."""
        if not self._updates or self._loop is None:
            return
        bundle = defaultdict(list)
        for (run, _), update in self._updates.items():
            bundle[run].append(update)
        self._updates = {}
        with suppress(RuntimeError):            # the loop is closed
            self._loop.call_soon_threadsafe(_deliver, dict(bundle))


def fulfil(result: asyncio.Future, function: Callable[[], object]) -> None:
    """Run a function in this thread, and let a future of the event loop have what it gives or raises."""
    def settle(set_it, value) -> None:
        if not result.done():
            set_it(value)

    try:
        value, set_it = function(), result.set_result
    except BaseException as error:
        value, set_it = error, result.set_exception
    with suppress(RuntimeError):                # the loop is closed
        result.get_loop().call_soon_threadsafe(settle, set_it, value)


def _deliver(bundle: dict[Run, list[Update]]) -> None:
    for run, updates in bundle.items():
        run.deliver(updates)
