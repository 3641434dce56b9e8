"""Speculative decoding: who guesses, and what is known of how well.
The decisions are made in native/guess.c."""

from .speculation import Drafter, Speculation

__all__ = ["Drafter", "Speculation"]
