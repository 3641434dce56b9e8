"""Where in an answer its grammar begins: behind the thought, where there is one."""

from __future__ import annotations

from ..engine.schema import Schema
from ..grammar.after import After
from ..grammar.grammar import Grammar
from ..grammar.state import State
from ..tokenizers import Tokenizer
from .reasoning import THINK, Marks, is_closed, is_open

GAP = "\n\n"                            # what models write between a thought and their answer


def schema_of(grammar: Grammar | None, tokenizer: Tokenizer, prompt: list[int], thinks: bool = False) -> Schema | None:
    """A grammar's state in the answer to a prompt. thinks: the model may begin with a thought."""
    return None if grammar is None else behind_thought(grammar.start(), tokenizer, prompt, thinks)


def behind_thought(inner: State | After, tokenizer: Tokenizer, prompt: list[int], thinks: bool, marks: Marks = THINK,
                   ends: bool = False) -> State | After:
    """A state of the answer to a prompt that begins behind the thought. ends: the text may end within the thought."""
    closes, gap = marks.closes.encode(), GAP.encode()
    if is_open(tokenizer, prompt, marks):
        return After(closes, inner, gap=gap, ends=ends)
    if thinks and not is_closed(tokenizer, prompt, marks):
        return After(closes, inner, marks.opens.encode(), gap, ends)
    return inner
