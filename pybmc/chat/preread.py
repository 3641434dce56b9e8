"""Reading ahead: while the user types, a thread reads what the next prompt is certain to begin with.

The next turn keeps of that what its prompt begins with, as it does with all that a session holds: a wrong
guess costs time, and no text depends on it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..engine.prefixes import common
from .conversation import Conversation, lasting

log = logging.getLogger(__name__)

PASS_SECONDS = 0.05                     # that Enter may wait for a pass to end
LEAST = 4                               # tokens of the first pass and the smallest: hardly slower than one
QUIET_SECONDS = 1.0                     # without a key, before states that are far back are read again
POWER_SECONDS = 5.0                     # between two looks at the power supply
SUPPLIES = Path("/sys/class/power_supply")


class Preread:
    """Entered, it reads ahead in a thread. note() tells what is typed so far.
    An error ends it until it is entered again."""

    def __init__(self, reader: Reader):
        self._reader = reader
        self._wake, self._stopping = threading.Event(), False
        self._thread: threading.Thread | None = None

    def note(self, text: str) -> None:
        self._reader.note(text)
        self._wake.set()

    def __enter__(self) -> Preread:
        self._join()                    # an interrupt may have come while the last one was joined
        self._stopping = False
        self._reader.begin()
        self._thread = threading.Thread(target=self._run, name="preread", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._join()
        except KeyboardInterrupt:
            self._join()
            raise

    def _join(self) -> None:
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        try:
            while True:
                self._wake.clear()
                if self._stopping:
                    return
                wait = self._reader.step()
                if wait != 0:
                    self._wake.wait(wait)
        except Exception as error:      # whatever it is, the turn meets it where it matters
            log.debug("reading ahead has ended: %s", error)


class Reader:
    """Reads ahead in a conversation's session, a short pass at a time.
    on_battery: nothing is read while it is true."""

    def __init__(self, talk: Conversation, on_battery: Callable[[], bool] | None = None,
                 clock: Callable[[], float] = time.monotonic):
        self._talk, self._clock = talk, clock
        self._on_battery = on_battery or Power(clock=clock).on_battery
        self._rate = 0.0                # tokens a second of the last pass
        self.begin()

    def begin(self) -> None:
        """A new message begins: the conversation may be another than before."""
        self._typed = "", self._clock()             # what is typed, and when it changed
        self._coming: tuple[str, np.ndarray] | None = None

    def note(self, text: str) -> None:
        self._typed = text, self._clock()

    def step(self) -> float | None:
        """Make a pass, if there is something to read.
        Seconds until the next step: 0 at once, None when more is typed."""
        if self._on_battery():
            return POWER_SECONDS
        (text, since), session = self._typed, self._talk.session
        ids, held = self._ids(text), np.array(session.tokens, np.int32)
        n = common(ids, held)
        if n < len(held):
            quiet = self._clock() - since
            if session.nearest(n) < n and quiet < QUIET_SECONDS:    # states: to go back is to read much again
                return QUIET_SECONDS - quiet
            n = session.sync(ids[:n])
        if n == len(ids):
            return None
        self._read(ids[n:n + max(LEAST, int(self._rate * PASS_SECONDS))])
        return 0

    def _ids(self, text: str) -> np.ndarray:
        """What the next prompt is certain to begin with."""
        part = lasting(text)
        if self._coming is None or self._coming[0] != part:
            self._coming = part, np.array(self._talk.coming(text), np.int32)
        return self._coming[1]

    def _read(self, ids: np.ndarray) -> None:
        started = self._clock()
        self._talk.session.eval(ids, "none")
        self._rate = len(ids) / max(self._clock() - started, 1e-6)


class Power:
    """Whether the machine runs on its battery, as Linux has it in a folder of supplies;
    elsewhere it never does."""

    def __init__(self, folder: Path = SUPPLIES, clock: Callable[[], float] = time.monotonic):
        self._folder, self._clock = folder, clock
        self._known, self._until = False, clock()

    def on_battery(self) -> bool:
        """Looks at the folder every few seconds."""
        if self._clock() >= self._until:
            self._known, self._until = on_battery(self._folder), self._clock() + POWER_SECONDS
        return self._known


def on_battery(folder: Path = SUPPLIES) -> bool:
    """Whether a battery discharges and no other supply is on. Batteries of mice and the like do not count."""
    try:
        supplies = [{name: read(path / name) for name in ("type", "scope", "online", "status")}
                    for path in folder.iterdir()]
    except OSError:
        return False
    if any(supply["type"] != "Battery" and supply["online"] not in ("", "0") for supply in supplies):
        return False
    batteries = [supply for supply in supplies if supply["type"] == "Battery" and supply["scope"] != "Device"]
    return any(battery["status"] == "Discharging" for battery in batteries)


def read(path: Path) -> str:
    """A line of a file; nothing where there is none."""
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""
