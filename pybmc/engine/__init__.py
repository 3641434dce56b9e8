"""From models and requests to tokens. Names are loaded when they are first used: bench.py needs numpy alone."""

from .._lazy import lazy

_HOMES = dict.fromkeys(("Engine", "Event", "Request", "Sequence", "Stats"), "engine") | \
    {"Schema": "schema"} | dict.fromkeys(("Ending", "StopStrings", "Token"), "text")

__all__ = [*_HOMES]
__getattr__, __dir__ = lazy(__name__, _HOMES)
