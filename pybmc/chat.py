"""Messages -> prompt: the chat template of a file, or a common one where it has none.

encode() is the safe way from messages to ids: what stands in a message stays text, even where it spells a
control token such as <|im_end|>. For this every such spelling in a message is broken by a character that no
message contains, the template runs, control tokens are found in what it made, and the character is taken out
of the texts between them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import chain

from .errors import ArgumentError
from .tokenizers import Tokenizer

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content']|default('', true) + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LLAMA2 = (
    "{% set ns = namespace(system='') %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{% set ns.system = '<<SYS>>\n' + message['content'] + '\n<</SYS>>\n\n' %}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content']|default('', true)|trim + ' ' + eos_token }}"
    "{% else %}"
    "{{ bos_token + '[INST] ' + ns.system + message['content']|trim + ' [/INST]' }}{% set ns.system = '' %}"
    "{% endif %}{% endfor %}"
)

# User-defined tokens that a template uses as marks between messages; others (<think>, HTML tags) may stand in
# a message.
_MARK = re.compile(r"<\|.+\|>|<｜.+｜>|\[/?[A-Z_]+\]|<(start|end)_of_\w+>|</?s>", re.DOTALL)
_LONGEST = 48              # characters of a token that are looked for
_ROLE = re.compile(r"\w[\w .-]{0,63}")
_WIDE_TIME = re.compile(r"%[^A-Za-z%]*\d{2}")


class ChatTemplate:
    """How a model wants a conversation written.

    template is a Jinja source; None takes the one in the tokenizer's file, or else ChatML where the
    vocabulary has <|im_start|>, or else Llama 2's way. A template that does not compile, fails, or wants too
    much is a FormatError. messages are mappings with "role" and "content" (a str, None, or OpenAI's list of
    parts), and whatever else the template reads.
    """

    def __init__(self, template: str | None, tokenizer: Tokenizer):
        from .sandbox import Template           # here: jinja2 takes 40 ms to import

        self._tokenizer = tokenizer
        self.source = (
            template
            or tokenizer.chat_template
            or (CHATML if "<|im_start|>" in tokenizer.vocab.ids else LLAMA2)
        )
        self.from_file = template is None and tokenizer.chat_template is not None
        self._template = Template(self.source)
        self._marks = self._find_marks()
        self._speller = _Speller(tokenizer.tokens[id] for id in self._marks)

    def render(self, messages: Sequence[Mapping], add_generation_prompt: bool = True, **others) -> str:
        """The conversation as one text, for people to read. others: what else the template takes (tools)."""
        return self._render(self._checked(messages), add_generation_prompt, others)

    def encode(self, messages: Sequence[Mapping], add_generation_prompt: bool = True, **others) -> list[int]:
        """The conversation's ids, BOS first where the vocabulary wants it. Messages add no control tokens."""
        messages = self._checked(messages)
        mark = _unused_character((self.source, messages, others))
        broken = self._speller.broken(messages, mark)
        text = self._render(broken, add_generation_prompt, self._speller.broken(others, mark))
        ids: list[int] = []
        for part in self._tokenizer.vocab.split(text, special=True):
            ids += self._ordinary(_without(part, mark)) if isinstance(part, str) else [part]
        bos = self._tokenizer.bos_id
        return [bos] + ids if self._tokenizer.add_bos and ids[:1] != [bos] else ids

    # -- inside

    def _render(self, messages: list, add_generation_prompt: bool, others: Mapping) -> str:
        tokens = self._tokenizer.tokens
        bos, eos = self._tokenizer.bos_id, self._tokenizer.eos_id
        given = {
            "bos_token": "" if bos is None else tokens[bos],
            "eos_token": "" if eos is None else tokens[eos],
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "tools": None,
            "documents": None,
        }
        given |= others | {"messages": messages, "add_generation_prompt": add_generation_prompt}
        return self._template.render(given)

    def _checked(self, messages: Sequence[Mapping]) -> list[dict]:
        checked = []
        for number, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise ArgumentError(f"message {number}: expected a mapping with a role, got {message!r:.100}")
            if not _ROLE.fullmatch(message["role"]):
                raise ArgumentError(f"message {number}: {message['role']!r:.100} is no role")
            checked.append(_plain(message) | {"content": self._content(message.get("content"), number)})
        return checked

    def _content(self, content, number: int):
        """A message's content as the template takes it: parts are joined where it knows only text."""
        if isinstance(content, str) or content is None:
            return content
        if not isinstance(content, Sequence) or not all(isinstance(part, Mapping) for part in content):
            raise ArgumentError(
                f"message {number}: expected content to be a text or a list of parts, got {content!r:.100}"
            )
        if "type" in self.source:
            return _plain(content)
        if any(not isinstance(part.get("text"), str) for part in content):
            raise ArgumentError(f"message {number}: this model's chat template takes only text")
        return "".join(part["text"] for part in content)

    def _find_marks(self) -> frozenset[int]:
        """The tokens no message may spell: control tokens, and what the template puts between messages."""
        vocab = self._tokenizer.vocab
        names = {id: vocab.tokens[id].strip() for id in vocab.user_defined}
        marks = {id for id, name in names.items() if _MARK.fullmatch(name) and name in self.source}
        return frozenset(vocab.reserved | marks)

    def _ordinary(self, text: str) -> list[int]:
        """Ids of a text in which control tokens are only text."""
        tokenizer = self._tokenizer
        ids = tokenizer.encode_parts(tokenizer.vocab.split(text, special=False, without=self._marks))
        if self._marks.isdisjoint(ids):
            return ids
        return [byte for id in ids for byte in (self._spell(id) if id in self._marks else [id])]

    def _spell(self, id: int) -> list[int]:
        """A token's text in single bytes, for vocabularies whose merges make a control token out of text."""
        ids = [self._tokenizer.byte_id(byte) for byte in self._tokenizer.piece(id)]
        return [byte for byte in ids if byte is not None and byte not in self._marks]


def _raise_exception(message: str):
    import jinja2

    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    if len(format) > 100 or _WIDE_TIME.search(format):
        raise ValueError("a time is too wide")
    return datetime.now().strftime(format)


class _Speller:
    """Breaks the control tokens that texts spell, by a mark after their first character.

    Also the ones that the end of a text cuts off, since a template may join texts, and ones hidden by white
    space or upper case, which it may take away. Breaking one too many does no harm.
    """

    def __init__(self, tokens: Iterable[str]):
        self._tokens = sorted({_squeezed(token)[:_LONGEST] for token in tokens} - {""})
        self._firsts = sorted({token[0] for token in self._tokens})

    def broken(self, value, mark: str):
        """A copy of some messages, mark set into their texts. Roles stay: the caller chose them."""
        if isinstance(value, str):
            return self._broken_text(value, mark)
        if isinstance(value, Mapping):
            return {self.broken(key, mark): item if key == "role" else self.broken(item, mark)
                    for key, item in value.items()}
        return [self.broken(item, mark) for item in value] if isinstance(value, (list, tuple)) else value

    def _broken_text(self, text: str, mark: str) -> str:
        squeezed = _squeezed(text)
        if not any(first in squeezed for first in self._firsts):
            return text
        places = [match.start() for match in re.finditer(r"\S", text)]
        ends = {places[at] for at in self._found(squeezed)}
        pieces, start = [], 0
        for end in sorted(ends):
            pieces += (text[start:end + 1], mark)
            start = end + 1
        return "".join(pieces) + text[start:]

    def _found(self, text: str) -> Iterator[int]:
        """Where tokens begin in a text without white space."""
        for token in self._tokens:
            at = text.find(token)
            while at >= 0:
                yield at
                at = text.find(token, at + 1)
        for length in range(1, min(_LONGEST, len(text) + 1)):
            tail = text[-length:]
            if any(token.startswith(tail) for token in self._tokens):
                yield len(text) - length


def _squeezed(text: str) -> str:
    """Without white space, in lower case where that keeps its length."""
    text = "".join(text.split())
    lower = text.lower()
    return lower if len(lower) == len(text) else text


def _unused_character(value) -> str:
    """A character that stands nowhere in the strings of a value: a noncharacter, as a rule."""
    used = set().union(*_strings(value))
    candidates = map(chr, chain(range(0xFDD0, 0xFDF0), range(0xF0000, 0x10FFFE)))
    return next(char for char in candidates if char not in used)


def _without(text: str, mark: str) -> str:
    # a template may have written it as JSON
    return text.replace(mark, "").replace(f"\\u{ord(mark):04x}", "")


def _strings(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings([*value.keys(), *value.values()])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _plain(value):
    """Mappings and sequences as dicts and lists of their own: a template gets copies."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
