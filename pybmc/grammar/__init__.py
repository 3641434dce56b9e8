"""Grammars: what a text has to follow, compiled by llguidance for a model's vocabulary."""

from .._lazy import lazy

_HOMES = {"Grammar": "grammar", "grammar_of": "grammar", "grammar_asked": "asked", "State": "state",
          "After": "after"}

__all__ = [*_HOMES]
__getattr__, __dir__ = lazy(__name__, _HOMES)
