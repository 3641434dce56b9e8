"""Compiling grammars of any origin: in a thread with room for deep recursion, and not for long."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import UnsupportedSchemaError, printable

T = TypeVar("T")

# Bytes of the thread's stack, of which only what is used is taken: the 26,000 levels that a schema of 256 kB
# may have, by references
# too, take 100 MB. Usual stacks overflow at 1,500, which ends the process.
STACK = 256 << 20
SECONDS = 20.0                          # that a grammar may take
AT_A_TIME = 4                           # also those that were given up, which end by themselves

_free = threading.BoundedSemaphore(AT_A_TIME)
_starting = threading.Lock()            # the size of stacks is one setting for all threads


def compiled(llguidance: Any, tokenizer: Any, source: str) -> tuple[Any, tuple[str, ...]]:
    """A matcher at its beginning, and llguidance's warnings. Raises UnsupportedSchemaError with its words."""
    return in_time(lambda: _compiled(llguidance, tokenizer, source))


def _compiled(llguidance: Any, tokenizer: Any, source: str) -> tuple[Any, tuple[str, ...]]:
    matcher = llguidance.LLMatcher(tokenizer, source, log_level=0)
    probe = matcher.deep_copy()         # what fails at the first tokens fails here
    if not probe.is_error():
        forced = probe.compute_ff_tokens()
        probe.consume_tokens(forced[:probe.validate_tokens(forced)])
        probe.compute_bitmask()
    if probe.is_error():
        words = sentence(probe.get_error())
        raise UnsupportedSchemaError("no text fits it" if words == "NoExtensionBias" else words)
    return matcher, tuple(matcher.get_grammar_warnings())


def in_time(work: Callable[[], T]) -> T:
    """The result of work in a thread with a large stack."""
    result: list[tuple[T | None, Exception | None]] = []

    def run() -> None:
        try:
            result.append((work(), None))
        except Exception as error:
            result.append((None, error))
        except BaseException as error:          # a panic of llguidance; an interrupt comes to the main thread
            result.append((None, UnsupportedSchemaError(f"llguidance failed: {sentence(str(error))}")))
        finally:
            _free.release()

    if not _free.acquire(timeout=SECONDS):
        raise UnsupportedSchemaError(f"other grammars were compiled for more than {SECONDS:g} seconds")
    thread = threading.Thread(target=run, name="pybmc-grammar", daemon=True)
    try:
        with _starting:
            before = threading.stack_size(STACK)
            try:
                thread.start()
            finally:
                threading.stack_size(before)
    except BaseException:
        _free.release()
        raise
    thread.join(SECONDS)
    if not result:
        raise UnsupportedSchemaError(f"compiling it takes more than {SECONDS:g} seconds")
    value, error = result[0]
    if error is not None:
        raise error
    return value                        # type: ignore[return-value]


def sentence(text: str) -> str:
    """What llguidance says, in one line and without the state of its parser."""
    return printable(" ".join(text.partition("<state>")[0].split()) or "unknown error", 300)
