"""From models and requests to tokens. Names are loaded when they are first used:
bench.py needs numpy alone."""

from .._lazy import lazy

_HOMES = {"Engine": "engine", "Schema": "schema", **dict.fromkeys(("Request", "Stats"), "request"),
          **dict.fromkeys(("Event", "Sequence"), "sequence"),
          **dict.fromkeys(("Ending", "StopStrings", "Token"), "text")}
__all__ = [*_HOMES]
__getattr__, __dir__ = lazy(__name__, _HOMES)
