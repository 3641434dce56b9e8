"""From requests to tokens: the engine, and what stands around it."""

from .engine import Engine, Event, Request, Sequence, Stats
from .text import Ending, StopStrings, Token

__all__ = ["Ending", "Engine", "Event", "Request", "Sequence", "Stats", "StopStrings", "Token"]
