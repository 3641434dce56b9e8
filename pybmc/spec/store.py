"""What was learned of a pair of models on this machine, kept for the next run in the user's cache directory.

One small JSON file for each pair of model files, thread count and host. A file that is missing, broken or from elsewhere is as
good as none, and one that cannot be written is no failure.
"""

import hashlib
import json
import os
import platform
import sys
from contextlib import suppress
from pathlib import Path

VERSION = 3


def folder() -> Path:
    """Where pybmc keeps what it can find out again."""
    home = os.environ.get("XDG_CACHE_HOME")
    if not home:
        home = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(home) / "pybmc"


def identity(model, draft=None) -> dict | None:
    """What a record depends on; None for a model that no file holds."""
    try:
        files = [os.stat(m.path) for m in (model, draft) if m is not None]
    except (AttributeError, OSError):
        return None
    return {"version": VERSION, "files": [[file.st_size, file.st_mtime_ns] for file in files], "threads": model.threads,
            "host": platform.node(), "machine": platform.machine(), "cpu": os.environ.get("PYBMC_CPU", "")}


def _path(key: dict) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return folder() / "pairs" / f"{digest[:32]}.json"


def load(key: dict | None) -> list[float]:
    """The record kept under a key; empty if there is none that is usable."""
    if key is not None:
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError):
            kept = json.loads(_path(key).read_text(encoding="utf-8"))
            if kept["key"] == key:
                return [float(x) for x in kept["record"]]
    return []


def save(key: dict | None, record: list[float]) -> None:
    """Keep a record under a key; in one step, so that a reader never sees half of it."""
    if key is None:
        return
    with suppress(OSError, RuntimeError, KeyError):
        path = _path(key)
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps({"key": key, "record": [float(f"{x:.5g}") for x in record]}), encoding="utf-8")
        os.replace(beside, path)
