"""The user's cache directory: where pybmc keeps what it can find out again."""

import hashlib
import json
import os
import sys
from contextlib import suppress
from pathlib import Path


def user_folder(variable: str, default: str) -> Path | None:
    """pybmc's own folder in the one that an environment variable names, else in the home directory. None
    where there is neither: a user of a container may have no entry in the password file."""
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
        with suppress(OSError):
            draft.unlink()
        return False
    return True


def path_of(kind: str, key: dict) -> Path | None:
    """The file in which something is kept; None where nothing can be."""
    home, digest = folder(), hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return home and home / kind / f"{digest[:32]}.json"
