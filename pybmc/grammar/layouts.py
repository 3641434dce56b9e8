"""Rules made of lexemes: what llguidance reads a text by."""

from __future__ import annotations

from dataclasses import dataclass

from .gbnf import Node


@dataclass(eq=False)
class Lexeme:
    """node: what it matches; a text is no lexeme where it is empty.
    optional: whether the node matches that too."""

    number: int
    node: Node
    optional: bool


@dataclass(eq=False)
class Rule:
    """A name where it stands in a rule."""

    name: str


@dataclass(eq=False)
class Series:
    parts: list[Layout]


@dataclass(eq=False)
class Choice:
    parts: list[Layout]


@dataclass(eq=False)
class Times:
    part: Layout
    least: int
    most: int | None


Layout = Lexeme | Rule | Series | Choice | Times
