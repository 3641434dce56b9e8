"""Conversations: messages as a model's template writes them, and what stands around that.
Names are loaded when they are first used."""

from .._lazy import lazy

_HOMES = {"ChatTemplate": "template", "Conversation": "conversation"}

__all__ = [*_HOMES]
__getattr__, __dir__ = lazy(__name__, _HOMES)
