"""What was measured on this machine, kept for the next time in the user's cache directory.

One small JSON file for each model file (or pair of them), thread count, kind of pass and host. A file that is missing,
broken or from elsewhere is as good as none, and one that cannot be written is no failure.
"""

import hashlib
import json
import os
import platform
import sys
from contextlib import suppress
from math import isfinite
from pathlib import Path

VERSION = 2
WIDEST = 512
RECORD = ("by_mark", "accepted", "offered", "seconds")      # parts of a drafter's record


def user_folder(variable: str, default: str) -> Path | None:
    """pybmc's own folder in the one that an environment variable names, else in the home directory. None where there
    is neither: a user of a container may have no entry in the password file."""
    named = os.environ.get(variable)
    try:
        return (Path(named) if named else Path.home() / default) / "pybmc"
    except (RuntimeError, KeyError):
        return None


def folder() -> Path | None:
    """Where pybmc keeps what it can find out again."""
    return user_folder("XDG_CACHE_HOME", "Library/Caches" if sys.platform == "darwin" else ".cache")


def replace(path: Path | None, text: str) -> bool:
    """Write a file in one step, so that a reader never sees half of it. False where it cannot be written."""
    if path is None:
        return False
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except OSError:
        return False
    return True


def identity(model, kind: str) -> dict | None:
    """What costs depend on; None for a model that no file holds."""
    try:
        found = os.stat(model.path)
    except (AttributeError, OSError):
        return None
    return {"version": VERSION, "name": Path(model.path).name, "size": found.st_size, "mtime_ns": found.st_mtime_ns,
            "threads": model.threads, "kind": kind, "host": platform.node(), "machine": platform.machine(),
            "cpu": os.environ.get("PYBMC_CPU", "")}


def pair(model, draft, kind: str) -> dict | None:
    """What a drafter's record depends on: both models."""
    ours, theirs = identity(model, kind), identity(draft, "draft")
    return None if ours is None or theirs is None else {**ours, "draft": theirs}


def path_of(kind: str, key: dict) -> Path | None:
    """The file in which something is kept; None where nothing can be."""
    home, digest = folder(), hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return home and home / kind / f"{digest[:32]}.json"


def _path(key: dict) -> Path | None:
    return path_of("pairs" if "draft" in key else "costs", key)


def read(key: dict | None) -> dict:
    """What is kept under a key; nothing, if it is not usable."""
    if key is None:
        return {}
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        with open(_path(key), encoding="utf-8") as file:
            kept = json.load(file)
        if kept["key"] == key:
            return kept
    return {}


def write(key: dict | None, **kept) -> None:
    """Keep something under a key."""
    if key is not None:
        replace(_path(key), json.dumps({"key": key, **kept}))


def load(key: dict | None) -> dict[int, float] | None:
    """Seconds of a pass by its width; None if nothing usable is kept."""
    with suppress(ValueError, TypeError, AttributeError):
        seconds = {int(n): float(t) for n, t in read(key).get("seconds", {}).items()}
        if 1 in seconds and all(1 <= n <= WIDEST and isfinite(t) and 0 < t < 1e4 for n, t in seconds.items()):
            return seconds
    return None


def save(key: dict | None, seconds: dict[int, float]) -> None:
    """Keep seconds by width."""
    if 1 in seconds:
        write(key, seconds={str(n): float(f"{t:.4g}") for n, t in sorted(seconds.items())})


def load_record(key: dict | None) -> dict[str, list[list[float]]] | None:
    """A drafter's record (see Source.record); None if nothing usable is kept."""
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        found = {name: [[float(x) for x in row] for row in rows] for name, rows in read(key)["record"].items()}
        rows = [row for rows in found.values() for row in rows]
        if found.keys() <= set(RECORD) and all(len(row) == 2 and all(0 <= x < 1e9 for x in row) for row in rows):
            return found
    return None


def save_record(key: dict | None, record: dict[str, list[list[float]]]) -> None:
    write(key, record={name: [[float(f"{x:.4g}") for x in row] for row in rows] for name, rows in record.items()})
