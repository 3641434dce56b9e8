"""What was learned of a pair of models on this machine, kept for the next run in the user's cache directory.

One small JSON file for each pair of model files, thread count, layers on a GPU and host. A file that is
missing, broken or from elsewhere is as good as none, and one that cannot be written is no failure.
"""

import json
import os
import platform
from contextlib import suppress

from .. import cache
from .interfaces import Model

VERSION = 4


def identity(model: Model, draft: Model | None = None) -> dict | None:
    """What a record depends on; None for a model that no file holds."""
    try:
        files = [os.stat(m.path) for m in (model, draft) if m is not None]
    except (AttributeError, OSError):
        return None
    sizes = [[file.st_size, file.st_mtime_ns] for file in files]
    key = {"version": VERSION, "files": sizes, "threads": model.threads,
           "host": platform.node(), "machine": platform.machine(), "cpu": os.environ.get("PYBMC_CPU", "")}
    on_gpu = [m.gpu_layers for m in (model, draft) if m is not None]
    return key | ({"gpu_layers": on_gpu} if any(on_gpu) else {})


def load(key: dict | None) -> list[float]:
    """The record kept under a key; empty if there is none that is usable."""
    path = key and cache.path_of("pairs", key)
    if path:
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["key"] == key:
                return [float(x) for x in kept["record"]]
    return []


def save(key: dict | None, record: list[float]) -> None:
    """Keep a record under a key; in one step, so that a reader never sees half of it."""
    if key is not None:
        text = json.dumps({"key": key, "record": [float(f"{x:.5g}") for x in record]})
        cache.replace(cache.path_of("pairs", key), text)
