"""Where in an answer its grammar begins: behind the thought, where there is one."""

from __future__ import annotations

from ..engine.schema import Schema
from ..grammar.grammar import Grammar
from ..tokenizers import Tokenizer
from .reasoning import CLOSES, OPENS, is_closed, is_open

GAP = "\n\n"                            # what models write between a thought and their answer


def schema_of(grammar: Grammar | None, tokenizer: Tokenizer, prompt: list[int], thinks: bool = False) -> Schema | None:
    """A grammar's state in the answer to a prompt. thinks: the model may begin with a thought."""
    if grammar is None:
        return None
    if is_open(tokenizer, prompt):
        return grammar.after(CLOSES, gap=GAP, ends=False)
    if thinks and not is_closed(tokenizer, prompt):
        return grammar.after(CLOSES, opens=OPENS, gap=GAP, ends=False)
    return grammar.start()
