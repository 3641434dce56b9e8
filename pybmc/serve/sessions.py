"""Saved sessions in a folder, by name: read for a request, and saved when its answer has ended."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from weakref import WeakValueDictionary

from .._native import ffi
from ..engine.model import Model
from ..engine.session import Session
from ..engine.session_file import load, save
from ..errors import BmcError, FormatError, OutOfMemoryError
from .errors import Refused, busy, refusal, wrong
from .worker import Worker

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def checked_name(name: str, field: str) -> str:
    if not NAME.fullmatch(name):
        raise wrong(field, f"is {name!r:.80}; "
                           "expected a letter or digit, and up to 63 more of them, or of . _ -")
    return name


def open_folder(path: str) -> int:
    """A descriptor of a folder, which is made where there is none."""
    os.makedirs(path, mode=0o700, exist_ok=True)
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def unreadable(name: str, error: OSError, field: str) -> Refused:
    return Refused(400, "invalid_session", f"the session {name} cannot be read: {error.strerror}", field)


def unsaved(name: str, error: Exception, field: str) -> Refused:
    why = error.strerror if isinstance(error, OSError) else error
    return Refused(500, "session_not_saved", f"the session {name} could not be saved: {why}", field)


class Sessions:
    """Saved sessions in a folder, whose descriptor it closes. seconds: how long a request waits for
    another one with the same name."""

    def __init__(self, folder: int, model: Model, worker: Worker, context: int, seconds: float):
        self._folder = folder
        self.model, self.worker, self.context, self.seconds = model, worker, context, seconds
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._known: WeakValueDictionary[str, Session] = WeakValueDictionary()      # saved or read here
        self._pool = ThreadPoolExecutor(1, "pybmc-sessions")

    def close(self) -> None:
        self._pool.shutdown()
        os.close(self._folder)

    async def lease(self, name: str) -> Lease:
        """The name, for one request at a time."""
        lock = self._locks.setdefault(name, asyncio.Lock())
        try:
            await asyncio.wait_for(lock.acquire(), self.seconds)
        except asyncio.TimeoutError:
            why = f"the session {name} was in use for {self.seconds:g} seconds"
            raise busy("queue_timeout", why, 5) from None
        return Lease(self, name, lock)

    async def restore(self, name: str, field: str) -> tuple[list[int], int]:
        """Let the engine have the rows in a file; their tokens, and bytes read. Raises
        OutOfMemoryError where it has no room."""
        engine, size = self.worker.engine, self._stat(name).st_size
        if not await self.worker.call(lambda: engine.make_way(size)):
            raise OutOfMemoryError(f"the session {name} has {size} bytes, for which there is no memory now")
        try:
            session = await self._in_thread(
                lambda: load(self.model, name, self.context, engine.grain, self._folder))
        except FormatError as error:
            raise Refused(400, "invalid_session", str(error), field) from None
        tokens, self._known[name] = session.tokens, session
        await self.worker.call(lambda: engine.prefixes.give(session))
        return tokens, size

    async def save(self, name: str, session: Session) -> int:
        """Save a session that the engine has lent, and give it back; bytes of the file."""
        try:
            await self._in_thread(lambda: save(session, name, self._folder))
            self._known[name] = session
            return self._stat(name).st_size
        finally:
            await self.worker.call(lambda: self.worker.engine.give_back(session))

    def has(self, name: str) -> bool:
        """Whether the engine has the rows of a file already, as far as they are kept."""
        session, found = self._known.get(name), self._stat(name)
        saved = session.saved if session is not None and session._handle != ffi.NULL else None
        its = found.st_dev, found.st_ino, found.st_size
        return saved is not None and (saved.device, saved.inode, saved.size) == its

    def _stat(self, name: str) -> os.stat_result:
        return os.stat(name, dir_fd=self._folder, follow_symlinks=False)

    async def _in_thread(self, function: Callable):
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)


class Lease:
    """A name that one request uses. ended() gets the session of its answer, by the engine's thread; close()
    lets go of the name, once that session is saved."""

    def __init__(self, sessions: Sessions, name: str, lock: asyncio.Lock):
        self.sessions, self.name = sessions, name
        self._lock, self._loop = lock, asyncio.get_running_loop()
        self._session: Session | None = None
        self._saving: asyncio.Future | None = None
        self._closed = False

    async def restore(self) -> None:
        """Let the engine have what is saved, unless it does; no file yet, or no memory for it, is fine."""
        try:
            if not self.sessions.has(self.name):
                await self.sessions.restore(self.name, "session")
        except FileNotFoundError:
            pass
        except OutOfMemoryError as error:
            log.warning("%s: it is read anew", error)
        except BmcError as error:
            raise refusal(error) from None
        except OSError as error:
            raise unreadable(self.name, error, "session") from None

    def ended(self, session: Session) -> None:
        with suppress(RuntimeError):            # the loop is closed
            self._loop.call_soon_threadsafe(self._arrive, session)

    def _arrive(self, session: Session) -> None:
        self._session = session

    async def save(self) -> None:
        """Save the session of an answer that has ended."""
        if self._session is None:
            return
        self._saving = asyncio.ensure_future(self.sessions.save(self.name, self._session))
        try:
            await asyncio.shield(self._saving)
        except (OSError, BmcError) as error:
            raise unsaved(self.name, error, "session") from None

    def close(self) -> None:
        """Let go of the name, after what the engine and the disk still do for it. Twice is fine."""
        if not self._closed:
            self._closed = True
            self.sessions.worker.post(lambda: self._loop.call_soon_threadsafe(self._settle))

    def _settle(self) -> None:
        """The engine has nothing to hand over any more."""
        if self._saving is None and self._session is not None:     # the client left when its answer ended
            self._saving = asyncio.ensure_future(self.sessions.save(self.name, self._session))
        if self._saving is None:
            self._lock.release()
        else:
            self._saving.add_done_callback(self._release)

    def _release(self, saving: asyncio.Future) -> None:
        self._lock.release()
        if not saving.cancelled() and saving.exception():
            log.warning("the session %s was not saved: %s", self.name, saving.exception())
