"""What an answer follows: where its grammar begins, and how long its thought may be."""

from __future__ import annotations

from ..engine.model import Model
from ..engine.schema import Schema
from ..grammar.after import After
from ..grammar.grammar import Grammar
from ..grammar.state import State
from ..tokenizers import Tokenizer
from .budget import Budget
from .reasoning import ANALYSIS, FINAL, START, THINK, Marks, is_closed, is_open
from .template import ChatTemplate

GAP = "\n\n"                            # what models write between a thought and their answer


def schema_of(grammar: Grammar | None, tokenizer: Tokenizer, prompt: list[int],
              thinks: bool = False) -> Schema | None:
    """A grammar's state in the answer to a prompt. thinks: the model may begin with a thought."""
    return None if grammar is None else behind_thought(grammar.start(), tokenizer, prompt, thinks, THINK)


def answer_schema(grammar: Grammar | None, tokenizer: Tokenizer, prompt: list[int],
                  template: ChatTemplate | None, begun: bool = False) -> Schema | None:
    """The same for the answer to messages that a template has written;
    begun: the prompt ends with its beginning."""
    if grammar is None or template is None:
        return schema_of(grammar, tokenizer, prompt)
    if template.channels:
        return grammar.start() if begun else grammar.after(FINAL, ends=False)
    return behind_thought(grammar.start(), tokenizer, prompt, template.thinks and not begun, template.marks)


def behind_thought(inner: State | After, tokenizer: Tokenizer, prompt: list[int], thinks: bool, marks: Marks,
                   ends: bool = False) -> State | After:
    """A state of the answer to a prompt that begins behind the thought.
    ends: the text may end within the thought."""
    closes, gap = marks.closes.encode(), GAP.encode()
    if is_open(tokenizer, prompt, marks):
        return After(closes, inner, gap=gap, ends=ends)
    if thinks and not is_closed(tokenizer, prompt, marks):
        return After(closes, inner, marks.opens.encode(), gap, ends)
    return inner


def limited(inner: Schema | None, model: Model, prompt: list[int], template: ChatTemplate | None,
            budget: int | None) -> Schema | None:
    """A state that limits the tokens of a thought; None: any number."""
    tokenizer = model.tokenizer
    if budget is None or tokenizer is None:
        return inner
    channels = template is not None and template.channels
    marks = ANALYSIS if channels else template.marks if template else THINK
    end = tokenizer.encode(marks.closes + START * channels, bos=False, special=True)
    inside = is_open(tokenizer, prompt, marks)
    return Budget(tokenizer, model.config.vocab_size, budget, marks, end, inside, channels, inner)
