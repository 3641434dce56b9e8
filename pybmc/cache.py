"""What was measured on this machine, kept for the next time in the user's cache directory.

One small JSON file for each model file, thread count, kind of pass and host. A file that is missing, broken or from
elsewhere is as good as none, and one that cannot be written is no failure.
"""

import hashlib
import json
import os
import platform
import sys
from contextlib import suppress
from math import isfinite
from pathlib import Path

VERSION = 1
WIDEST = 512


def folder() -> Path:
    """Where pybmc keeps what it can find out again."""
    home = os.environ.get("XDG_CACHE_HOME")
    if not home:
        home = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(home) / "pybmc"


def identity(model, kind: str) -> dict | None:
    """What costs depend on; None for a model that no file holds."""
    try:
        found = os.stat(model.path)
    except (AttributeError, OSError):
        return None
    return {"version": VERSION, "name": Path(model.path).name, "size": found.st_size, "mtime_ns": found.st_mtime_ns,
            "threads": model.threads, "kind": kind, "host": platform.node(), "machine": platform.machine(),
            "cpu": os.environ.get("PYBMC_CPU", "")}


def _path(key: dict) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return folder() / "costs" / f"{digest[:32]}.json"


def load(key: dict | None) -> dict[int, float] | None:
    """Seconds of a pass by its width; None if nothing usable is kept."""
    if key is None:
        return None
    try:
        with open(_path(key), encoding="utf-8") as file:
            kept = json.load(file)
        if kept["key"] != key:
            return None
        seconds = {int(n): float(t) for n, t in kept["seconds"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    fine = 1 in seconds and all(1 <= n <= WIDEST and isfinite(t) and 0 < t < 1e4 for n, t in seconds.items())
    return seconds if fine else None


def save(key: dict | None, seconds: dict[int, float]) -> None:
    """Keep seconds by width; in one step, so that a reader never sees half of them."""
    if key is None or 1 not in seconds:
        return
    path = _path(key)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    kept = {"key": key, "seconds": {str(n): float(f"{t:.4g}") for n, t in sorted(seconds.items())}}
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(kept), encoding="utf-8")
        os.replace(draft, path)
