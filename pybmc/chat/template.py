"""Messages -> prompt: the chat template of a file, or a common one where it has none.

encode() is the safe way from messages to ids: what stands in a message stays text, even where it spells a
control token such as <|im_end|>. The template's strings know that they are its own (origin.py), and control
tokens count only in these.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from itertools import count

from ..errors import ArgumentError
from ..tokenizers import Tokenizer
from .origin import Traced, own, own_of, said
from .reasoning import CHANNELS, Marks, marks_of
from .templates import CHATML, LLAMA2, source_of

__all__ = ["CHATML", "LLAMA2", "ChatTemplate", "checked_variables", "template_of"]

# Roles that a template may make a control token of, as in '<|' + role + '|>'.
ROLES = {"system", "developer", "user", "assistant", "model", "tool", "function", "ipython", "observation",
         "context", "document", "documents", "available_tools"}
_ROLE = re.compile(r"\w[\w .-]{0,63}")

# User-defined tokens that are marks between messages: those of these forms ..
_MARK = re.compile(r"<\|.+\|>|<｜.+｜>|\[/?[A-Z_]+\]|<(start|end)_of_\w+>|</?s>", re.DOTALL)
# .. and what else stands in brackets in the template, but for the tags that models write in their answers.
_TAG = re.compile(r"</?(?:think|tool_call)>")
_BRACKETED = re.compile(rf"(?!{_TAG.pattern})(?:<[^<>]+>|\[[^\[\]]+\])")
_OWN = bytes([0, 1, 0, *range(3, 256)])                 # of origin.py's bytes: what is the template's own

_SPECIAL = {                            # what templates call a token, and how GGUF spells the key of its id
    "unk_token": "unknown", "sep_token": "seperator", "pad_token": "padding", "cls_token": "cls",
    "mask_token": "mask", "eot_token": "eot", "eom_token": "eom",
}
_RESERVED = ("messages", "add_generation_prompt", "continue_final_message")
_WIDE_TIME = re.compile(r"%[^A-Za-z%]*\d{2}")
_SURROGATE = re.compile("[\ud800-\udfff]")
_PROBE, _OTHER_PROBE = "zqpybmca", "zqpybmcb"           # words to look for in what a template writes


class ChatTemplate:
    """How a model wants a conversation written.

    template is a Jinja source; None takes the one in the tokenizer's file, or else ChatML where the
    vocabulary has <|im_start|>, or else Llama 2's way. A template that does not compile, fails, or wants too
    much is a FormatError.

    messages are mappings with "role" and "content" (a str, None, or OpenAI's list of parts), and whatever
    else the template reads. Where it does not take them as they are, parts of text are joined, a system
    message is put before the user message that follows it, and neighbours of one role become one message.

    Where the last message is the assistant's, the text ends with its content, so that a model continues
    it; with add_generation_prompt=False it is closed like any other, and with
    continue_final_message=False a new one begins behind it.
    """

    def __init__(self, template: str | None, tokenizer: Tokenizer):
        from .sandbox import Template  # here: jinja2 takes 40 ms to import

        self.tokenizer = tokenizer
        self.source = (
            template
            or tokenizer.chat_template
            or (CHATML if "<|im_start|>" in tokenizer.vocab.ids else LLAMA2)
        )
        self.from_file = template is None and tokenizer.chat_template is not None
        self._guessed = not template and not tokenizer.chat_template
        self._template = Template(self.source)
        self._special = _special_tokens(tokenizer)
        # No text of a message gives one of the marks, nor, by its name, a token such as <unk>.
        self._marks = tokenizer.vocab.control | self._find_marks()
        self._guarded = self._marks | tokenizer.vocab.silent
        self._tags = self._find_tags() - self._marks

    def reads(self, name: str) -> bool:
        """Whether the template looks at a variable."""
        return name in self._template.variables

    @property
    def guessed(self) -> str | None:
        """The name of the template that was taken, where the file has none and nobody gave one."""
        return {CHATML: "chatml", LLAMA2: "llama2"}.get(self.source) if self._guessed else None

    @property
    def thinks(self) -> bool:
        """Whether its model may think before it answers."""
        return self.channels or self.reads("enable_thinking") or self.marks.opens in self.source

    @property
    def channels(self) -> bool:
        """Whether answers are messages in channels (Harmony)."""
        return "<|channel|>" in self.source and "<|message|>" in self.source

    @cached_property
    def shown(self) -> frozenset[int]:
        """Control tokens whose names belong to an answer's text, since its reader looks for them."""
        vocab, names = self.tokenizer.vocab, [*CHANNELS * self.channels, *self.marks]
        return frozenset(vocab.ids[name] for name in names if name in vocab.ids) & vocab.silent

    @cached_property
    def marks(self) -> Marks:
        """What a thought of its model stands between."""
        return marks_of(self.source)

    def render(self, messages: Sequence[Mapping], add_generation_prompt: bool = True,
               continue_final_message: bool = True, **others) -> str:
        """The conversation as one text, for people to read. others: what else the template takes (tools)."""
        return str.__str__(self._written(messages, add_generation_prompt, continue_final_message, others))

    def encode(self, messages: Sequence[Mapping], add_generation_prompt: bool = True,
               continue_final_message: bool = True, **others) -> list[int]:
        """The conversation's ids, BOS first where the vocabulary wants it. Messages add no control tokens."""
        text = self._written(messages, add_generation_prompt, continue_final_message, others)
        known = own_of(text)
        own = known.translate(_OWN)
        masks = dict.fromkeys(self._guarded, own) | dict.fromkeys(self._tags, known)
        parts = self.tokenizer.vocab.split(str.__str__(text), True, masks.get)
        ids: list[int] = []
        for part in parts:
            ids += self._ordinary(part) if isinstance(part, str) else [part]
        bos = self.tokenizer.bos_id
        return [bos, *ids] if bos is not None and self.tokenizer.add_bos and ids[:1] != [bos] else ids

    # -- writing

    def _written(self, messages: Sequence[Mapping], add_generation_prompt: bool, continued: bool,
                 others: Mapping) -> Traced:
        messages, others = _checked(messages), checked_variables(others)
        if add_generation_prompt and continued and _is_begun(messages):
            return self._continued(messages, others)
        return self._fitted(messages, add_generation_prompt, others)

    def _continued(self, messages: list[dict], others: Mapping) -> Traced:
        """Up to the end of the last message's content: a word put there shows where it is."""
        words = (f"{_PROBE}{number}z" for number in count())
        known = " ".join(_strings([messages, others]))
        word = next(word for word in words if word not in known)
        last = messages[-1]
        marked = [*messages[:-1], last | {"content": _followed(last["content"], word)}]
        text = self._fitted(marked, False, others)
        if str.count(text, word) != 1:
            raise ArgumentError(
                "the last message is the assistant's, but this model's chat template does not show where its "
                f"content ends: expected it once, found it {str.count(text, word)} times"
            )
        return text[:str.find(text, word)]

    def _fitted(self, messages: list[dict], add_generation_prompt: bool, others: Mapping) -> Traced:
        """The text of the first form of the messages that the template takes."""
        from .sandbox import Refusal

        refusals: list[Refusal] = []
        for form in self._forms(messages, others):
            try:
                return self._run(form, add_generation_prompt, others)
            except Refusal as refusal:
                refusals.append(refusal)
        raise refusals[0]

    def _forms(self, messages: list[dict], others: Mapping) -> Iterator[list[dict]]:
        """The messages as they are, and if that is refused, as other clients would send them."""
        messages = self._with_contents(messages, others)
        if any(m["role"] == "system" for m in messages) and self._drops_system:
            messages = _folded(messages)
        tried: list[list[dict]] = []
        for start in (messages, _with_empty(messages)):
            for change in (list, _merged, _folded, lambda m: _merged(_folded(m))):
                form = change(start)
                if form not in tried:
                    tried.append(form)
                    yield form

    def _run(self, messages: list[dict], add_generation_prompt: bool, others: Mapping) -> Traced:
        messages = [_known(message) for message in messages]
        given: dict[str, object] = self._special | {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "tools": None,
            "documents": None,
        }
        given |= {**others, "messages": messages, "add_generation_prompt": add_generation_prompt}
        return self._template.render(given)

    # -- what the template takes, found out by trying

    def _shows(self, messages: list[dict], others: Mapping, *words: str) -> list[bool]:
        """Which words stand in what it writes of the messages; none where it refuses them."""
        from .sandbox import Refusal

        try:
            text = str.lower(self._run(messages, True, others))
        except Refusal:
            return [False for _ in words]
        return [word in text for word in words]

    @cached_property
    def _drops_system(self) -> bool:
        """Whether it takes a system message and leaves it out."""
        messages = [{"role": "system", "content": _PROBE}, {"role": "user", "content": _OTHER_PROBE}]
        return self._shows(messages, {}, _PROBE, _OTHER_PROBE) == [False, True]

    @cached_property
    def _takes_only_parts(self) -> bool:
        """Whether it leaves out a content that is a text, and shows one that is a list of parts."""
        forms = (_PROBE, [{"type": "text", "text": _PROBE}])
        shown = [self._shows([{"role": "user", "content": form}], {}, _PROBE) for form in forms]
        return shown == [[False], [True]]

    def _takes_parts(self, messages: list[dict], others: Mapping) -> bool:
        """Whether it shows the text of parts, rather than the list as Python or JSON would print it."""
        trial = [
            message | {"content": [part | {"text": _PROBE} if "text" in part else part for part in content]}
            if isinstance(content := message.get("content"), list) else message
            for message in messages
        ]
        listed = (f"'text': '{_PROBE}'", f'"text": "{_PROBE}"')
        trials = (trial, _merged(_folded(trial)))
        return [True, False, False] in [self._shows(form, others, _PROBE, *listed) for form in trials]

    def _with_contents(self, messages: list[dict], others: Mapping) -> list[dict]:
        """Every content in the form that the template takes: a text or a list of parts."""
        has_parts = any(isinstance(message.get("content"), list) for message in messages)
        if has_parts and not self._takes_parts(messages, others):
            return [_with_text(message, number) for number, message in enumerate(messages)]
        if not self._takes_only_parts:
            return messages
        return [
            message | {"content": [{"type": "text", "text": content}]}
            if isinstance(content := message.get("content"), str) else message
            for message in messages
        ]

    # -- ids

    def _find_marks(self) -> frozenset[int]:
        """The user-defined tokens that no message may spell: what the template puts between messages."""
        vocab = self.tokenizer.vocab
        names = {id: vocab.tokens[id].strip() for id in vocab.user_defined}
        return frozenset(
            id for id, name in names.items()
            if _MARK.fullmatch(name) or _BRACKETED.fullmatch(name) and name in self.source
        )

    def _find_tags(self) -> frozenset[int]:
        """The user-defined tokens that only the template and the assistant's messages may spell: what models
        write around thoughts and calls."""
        vocab = self.tokenizer.vocab
        return frozenset(id for id in vocab.user_defined if _TAG.fullmatch(vocab.tokens[id].strip()))

    def _ordinary(self, text: str) -> list[int]:
        """Ids of a text in which control tokens are only text."""
        ids = self.tokenizer.encode_parts([text])
        if self._marks.isdisjoint(ids):
            return ids
        return [byte for id in ids for byte in (self._spell(id) if id in self._marks else [id])]

    def _spell(self, id: int) -> list[int]:
        """A token's text in single bytes, for vocabularies whose merges make a control token out of text."""
        ids = [self.tokenizer.byte_id(byte) for byte in self.tokenizer.piece(id)]
        return [byte for byte in ids if byte is not None and byte not in self._marks]


def template_of(template, tokenizer: Tokenizer) -> ChatTemplate:
    """A ChatTemplate as callers name it: itself, None for the file's own, or what source_of() takes."""
    if isinstance(template, ChatTemplate):
        return template
    return ChatTemplate(None if template is None else source_of(template), tokenizer)


def checked_variables(variables: Mapping) -> dict:
    """Variables for a template, as copies."""
    for name in _RESERVED:
        if name in variables:
            raise ArgumentError(f"chat template variables: {name} is set by pybmc")
    return _plain(variables, "chat template variables")


def _special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Special tokens under the names that templates know them by. BOS and EOS are always there."""
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    for name, key in _SPECIAL.items():
        id = tokenizer.vocab.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(id, int) and 0 <= id < tokenizer.vocab_size:
            ids[name] = id
    return {name: own("" if id is None else tokenizer.tokens[id]) for name, id in ids.items()}


def _raise_exception(message: str):
    import jinja2

    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    if len(format) > 100 or _WIDE_TIME.search(format):
        raise ValueError("a time is too wide")
    return datetime.now().strftime(format)


# ---- messages ----------------------------------------------------------------------------------------------


def _checked(messages: Sequence[Mapping]) -> list[dict]:
    """Messages as copies. What is None is left out: templates ask whether a key is there."""
    checked = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ArgumentError(f"message {number}: expected a mapping with a role, got {message!r:.100}")
        if not _ROLE.fullmatch(message["role"]):
            raise ArgumentError(f"message {number}: {message['role']!r:.100} is no role")
        given = {key: value for key, value in message.items() if value is not None}
        message = _plain(given, f"message {number}")
        content = message.get("content", "")
        if not isinstance(content, str) and not _is_parts(content):
            raise ArgumentError(
                f"message {number}: expected content to be a text or a list of parts, got {content!r:.100}"
            )
        checked.append(message)
    return checked


def _known(message: dict) -> dict:
    """A message as the template gets it: with a role that it may build control tokens of, and with what the
    assistant wrote marked as such."""
    if message["role"] not in ROLES:
        return message
    texts = {key: _said(message[key]) for key in ("content", "reasoning_content", "thinking")
             if key in message}
    return message | (texts if message["role"] == "assistant" else {}) | {"role": own(message["role"])}


def _said(content):
    if isinstance(content, list):
        return [part | {"text": said(part["text"])} if isinstance(part.get("text"), str) else part
                for part in content]
    return said(content) if isinstance(content, str) else content


def _is_parts(content) -> bool:
    return isinstance(content, list) and all(isinstance(part, dict) for part in content)


def _is_begun(messages: list[dict]) -> bool:
    """Whether the last message is an answer that goes on."""
    last = messages[-1] if messages else {"role": ""}
    return last["role"] == "assistant" and bool(last.get("content")) and not last.get("tool_calls")


def _with_text(message: dict, number: int) -> dict:
    """A message whose parts are joined."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    if any(not isinstance(part.get("text"), str) for part in content):
        raise ArgumentError(f"message {number}: this model's chat template takes only text")
    return message | {"content": "".join(part["text"] for part in content)}


def _with_empty(messages: list[dict]) -> list[dict]:
    """Contents that are missing are empty."""
    return [{"content": ""} | message for message in messages]


def _folded(messages: list[dict]) -> list[dict]:
    """System messages put before the user message that follows them."""
    folded: list[dict] = []
    system: list[dict] = []
    for message in messages:
        if message["role"] == "system":
            system.append(message)
        elif message["role"] == "user" and system:
            folded.append(message | {"content": _joined([*system, message])})
            system = []
        else:
            folded.append(message)
    return folded + [{"role": "user", "content": _joined(system)}] * bool(system)


def _merged(messages: list[dict]) -> list[dict]:
    """Neighbours of one role as one message."""
    merged: list[dict] = []
    for message in messages:
        before = merged[-1] if merged else {"role": ""}
        plain = all(m.keys() <= {"role", "content"} for m in (before, message))
        if plain and before["role"] == message["role"] != "tool":
            merged[-1] = message | {"content": _joined([before, message])}
        else:
            merged.append(message)
    return merged


def _joined(messages: list[dict]):
    """The contents of messages as one, blank lines between them."""
    contents = [message["content"] for message in messages if message.get("content")]
    if all(isinstance(content, str) for content in contents):
        return "\n\n".join(contents)
    parts: list[dict] = []
    for content in contents:
        parts += [{"type": "text", "text": "\n\n"}] * bool(parts)
        parts += [{"type": "text", "text": content}] if isinstance(content, str) else content
    return parts


def _followed(content, word: str):
    """A content with a word at its end."""
    if isinstance(content, str):
        return content + word
    last = content[-1]
    if not isinstance(last.get("text"), str):
        return content
    return [*content[:-1], last | {"text": last["text"] + word}]


def _strings(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings([*value.keys(), *value.values()])
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _plain(value, where: str):
    """Mappings and sequences as dicts and lists of their own, with whole characters in plain strings."""
    try:
        return _copied(value, where)
    except RecursionError:
        raise ArgumentError(f"{where}: it nests too deep") from None


def _copied(value, where: str):
    if isinstance(value, str):
        if half := _SURROGATE.search(value):
            place = f"{half[0]!r} at {half.start()}"
            raise ArgumentError(f"{where}: not a text: {place} is half a surrogate pair")
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_copied(key, where): _copied(item, where) for key, item in value.items()}
    return [_copied(item, where) for item in value] if isinstance(value, (list, tuple)) else value
