"""What a model thinks before it answers: the text between two marks at the beginning of an answer."""

from __future__ import annotations

from typing import NamedTuple


class Marks(NamedTuple):
    """What a thought stands between."""

    opens: str
    closes: str


THINK = Marks("<think>", "</think>")
KNOWN = (THINK, Marks("[THINK]", "[/THINK]"), Marks("<seed:think>", "</seed:think>"),
         Marks("<|START_THINKING|>", "<|END_THINKING|>"))

# Harmony: an answer begins, its content begins.
START, FINAL = "<|start|>assistant", "<|channel|>final<|message|>"
CHANNELS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|constrain|>")
ANALYSIS = Marks("<|channel|>analysis<|message|>", "<|end|>")


def marks_of(template: str) -> Marks:
    """The marks that the source of a chat template knows."""
    return next((marks for marks in KNOWN if marks.closes in template), THINK)


class Reasoning:
    """Splits a streamed answer into (text, is thought), the same way however the stream was cut.

    The marks belong to the thought, and so does white space around it: the pieces together are the whole
    answer. inside: the prompt has opened the thought already.
    """

    def __init__(self, inside: bool = False, marks: Marks = THINK):
        self._part = self._thought if inside else self._begin
        self._held, (self._opens, self._closes) = "", marks

    def push(self, text: str) -> list[tuple[str, bool]]:
        """What is certain of the text so far."""
        text, self._held = self._held + text, ""
        pieces = []
        while text:
            done, is_thought, text = self._part(text)
            pieces += [(done, is_thought)] * bool(done)
            if self._held:
                break
        return pieces

    def flush(self) -> list[tuple[str, bool]]:
        """What was held back, when nothing follows."""
        text, self._held = self._held, ""
        return [(text, self._part == self._thought)] * bool(text)

    # -- the parts of an answer: each gives what it takes of a text, whether that is thought, and the rest

    def _begin(self, text: str) -> tuple[str, bool, str]:
        word = text.lstrip()
        if self._opens.startswith(word[:len(self._opens)]) and len(word) < len(self._opens):
            self._held = text
            return "", False, ""
        self._part = self._thought if word.startswith(self._opens) else self._answer
        end = len(text) - len(word) + len(self._opens)
        return (text[:end], True, text[end:]) if self._part == self._thought else ("", False, text)

    def _thought(self, text: str) -> tuple[str, bool, str]:
        at = text.find(self._closes)
        if at >= 0:
            self._part = self._pause
            return text[:at + len(self._closes)], True, text[at + len(self._closes):]
        n = next((n for n in range(min(len(self._closes) - 1, len(text)), 0, -1)
                  if text.endswith(self._closes[:n])), 0)
        self._held = text[len(text) - n:]
        return text[:len(text) - n], True, ""

    def _pause(self, text: str) -> tuple[str, bool, str]:
        rest = text.lstrip()
        if rest:
            self._part = self._answer
        return text[:len(text) - len(rest)], True, rest

    def _answer(self, text: str) -> tuple[str, bool, str]:
        return text, False, ""


def is_open(tokenizer, prompt: list[int], marks: Marks = THINK) -> bool:
    """Whether a prompt ends with the beginning of a thought."""
    return tokenizer.decode(prompt[-32:], special=True).rstrip().endswith(marks.opens)


def is_closed(tokenizer, prompt: list[int], marks: Marks = THINK) -> bool:
    """Whether a prompt ends with a thought, which may be empty: the answer begins without one."""
    return tokenizer.decode(prompt[-32:], special=True).rstrip().endswith(marks.closes)
