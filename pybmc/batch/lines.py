"""Lines of a batch: what one asks for, what is said about it, and the file that a run goes on with."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .. import checks
from ..errors import ArgumentError, BmcError, printable
from ..grammar.asked import FIELDS

# Fields beside messages; fields of a line beside a Sampler's settings.
CHAT = ("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call", "reasoning_budget")
ALSO = ("id", "prompt", "messages", "max_tokens", "stop", "chat_template_kwargs", *CHAT, *FIELDS)


class Line(NamedTuple):
    """A line of the input that is not blank. number: counted from 0;
    key: a digest of it and of the run's settings."""

    number: int
    key: str
    data: bytes


def read_lines(path: Path, settings: dict, skip: int = 0) -> Iterator[Line]:
    """The lines of a file that are not blank, from the given one on."""
    seed = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    number = 0
    with open(path, "rb") as file:
        for data in file:
            data = data.strip()
            if data:
                if number >= skip:
                    digest = seed.copy()
                    digest.update(data)
                    yield Line(number, digest.hexdigest()[:12], data)
                number += 1


def count_lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(bool(data.strip()) for data in file)


def parsed(line: Line, known: tuple[str, ...]) -> dict:
    """The line's JSON object, without fields that are null. known: the settings that it may have."""
    try:
        found = json.loads(line.data.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ArgumentError(f"not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise ArgumentError("expected a JSON object, found one that is nested too deeply") from None
    except ValueError as error:
        data = printable(repr(line.data[:60]))
        raise ArgumentError(f"expected a JSON object, found {data}: {error}") from None
    if not isinstance(found, dict):
        checks.refuse("the line", "a JSON object", found)
    found = {name: value for name, value in found.items() if value is not None}
    checks.settings(found, (*ALSO, *known))
    if ("prompt" in found) == ("messages" in found):
        there = "both" if "prompt" in found else "neither"
        raise ArgumentError(f"expected prompt or messages, found {there}")
    return found


def _refuse_constant(name: str):
    raise ArgumentError(f"expected JSON numbers, found {name}")


def written(value: dict) -> bytes:
    """A line of the output."""
    try:
        return json.dumps(value, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:          # an id with half a character in it
        return json.dumps(value).encode() + b"\n"


def failure(line: Line, error: Exception) -> dict:
    return {"index": line.number, **_id_of(line), "key": line.key, "error": " ".join(str(error).split())}


def _id_of(line: Line) -> dict:
    try:
        found = json.loads(line.data, parse_constant=_refuse_constant)
        return {"id": found["id"]} if isinstance(found, dict) and "id" in found else {}
    except (ValueError, RecursionError, BmcError):
        return {}


class Output:
    """The file of answers, in the order of the input. done: how many it holds, failed of them with an error;
    a part of a line at its end, which a killed run left, is cut off. One process at a time writes it."""

    def __init__(self, path: Path, source: Path, settings: dict):
        self.done = self.failed = 0     # answers, and those that are errors
        self.file = open(path, "a+b")
        try:
            self._check(path, source, settings)
        except BaseException:
            self.file.close()
            raise

    def _check(self, path: Path, source: Path, settings: dict) -> None:
        if os.path.samestat(os.fstat(self.file.fileno()), os.stat(source)):
            raise ArgumentError(f"{path} is the input too: the answers need a file of their own")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BmcError(f"{path} is written by another process") from None
        end = 0
        self.file.seek(0)
        lines = read_lines(source, settings)
        for data in self.file:
            if not data.endswith(b"\n"):
                break
            self._check_line(path, data, next(lines, None))
            self.done, end = self.done + 1, end + len(data)
        self.file.truncate(end)
        self.file.seek(end)

    def _check_line(self, path: Path, data: bytes, line: Line | None) -> None:
        try:
            answer = json.loads(data)
            found = answer["key"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ArgumentError(f"{path}, line {self.done + 1}: expected an answer of pybmc batch, found "
                                f"{printable(repr(data[:60]))}; name another file") from None
        if line is None or found != line.key:
            what = "no such line" if line is None else f"one with key {line.key}"
            raise ArgumentError(f"{path}, line {self.done + 1} answers {printable(repr(found), 40)}, "
                                f"the input has {what}: it was changed, or the settings were; "
                                "name another file")
        self.failed += "error" in answer

    def write(self, answer: dict) -> None:
        self.file.write(written(answer))
        self.file.flush()
        self.done += 1
        self.failed += "error" in answer

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *exc) -> None:
        self.close()
