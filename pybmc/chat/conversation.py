"""A conversation in one session: messages, what of them the session already holds,
and room for the next answer."""

import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from .. import checks
from ..engine import Stats, Token
from ..engine.model import Model
from ..engine.prefixes import common
from ..engine.session import Session
from ..errors import ArgumentError, ContextFullError, FormatError
from ..tokenizers import Tokenizer
from .generate import generate
from .reader import Channels, channel_tail
from .template import checked_variables, template_of

CUT = 8                                 # characters: of a longer word the last 8 to 15 are not certain


class Conversation:
    """Messages and the session that holds them. ask() and again() stream an answer and remember it.

    Only what is new in a turn is evaluated. chat_template, chat_template_kwargs and settings are those of
    generate(), max_tokens among them.
    """

    def __init__(self, model: Model, session: Session, system: str | None = None, *,
                 chat_template: Any = None, chat_template_kwargs: Mapping | None = None, **settings: Any):
        if model.tokenizer is None:
            raise ArgumentError(f"{model.path} has no vocabulary: it cannot chat")
        self.model, self.session, self.settings = model, session, settings
        self.template = template_of(chat_template, model.tokenizer)
        self.variables = checked_variables(chat_template_kwargs or {})
        self.messages: list[dict] = []
        if system:
            self.messages.append({"role": "system", "content": whole_characters(system)})
        self.stats = Stats()
        self.dropped = 0                            # messages forgotten in the last turn, to make room
        self.prompt: list[int] = []                 # of the last turn
        self._ids: list[int] = []                   # the last prompt and its answer, as they were evaluated

    # ---- turns

    def ask(self, text: str, progress: Callable[[int, int], None] | None = None) -> Iterator[Token]:
        """The answer to a message."""
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        yield from self._answer(before, progress)

    def again(self, progress: Callable[[int, int], None] | None = None) -> Iterator[Token]:
        """Another answer to the last message, from the next seed."""
        if not any(m["role"] == "user" for m in self.messages):
            raise ArgumentError("there is nothing to answer yet")
        before = list(self.messages)
        if self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        self.settings["seed"] = (self.settings.get("seed") or 0) + 1
        yield from self._answer(before, progress)

    def undo(self) -> str:
        """Forget the last message and its answer; the message."""
        at = max((i for i, m in enumerate(self.messages) if m["role"] == "user"), default=None)
        if at is None:
            raise ArgumentError("there is nothing to undo")
        text = self.messages[at]["content"]
        del self.messages[at:]
        return text

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages = [m for m in self.messages if m["role"] == "system"]

    def _answer(self, before: list[dict], progress: Callable[[int, int], None] | None) -> Iterator[Token]:
        """before: the messages to go back to if nothing gets said."""
        text, said, stream = [], [], None
        try:
            self.prompt = prompt = self._prompt()
            stream = generate(self.model, prompt, session=self.session, progress=progress,
                              chat_template=self.template, **self.settings)
            for token in stream:
                said.append(token.id)
                text.append(token.text)
                yield token
        finally:                                    # also where the reader stops listening
            if stream is not None:
                stream.close()
                self.stats = stream.stats
            if said:
                self.messages.append(self._message("".join(text)))
                stops = self.model.tokenizer.stop_ids
                self._ids = prompt + (said[:-1] if said[-1] in stops else said)
            else:
                self.messages = before

    def _message(self, text: str) -> dict:
        """An answer as a message: all of its text, thoughts among it;
        but of one in channels, what templates want of it."""
        if not self.template.channels:
            return {"role": "assistant", "content": text}
        reader = Channels(channel_tail(self.model.tokenizer, self.prompt))
        pieces = reader.push(text) + reader.flush()
        return {"role": "assistant", "content": "".join(piece for piece, thought in pieces if not thought)}

    # ---- the prompt

    def coming(self, text: str = "") -> list[int]:
        """Ids that the prompt of the next turn begins with. text: its message, as far as it is typed."""
        part = lasting(text)
        within = part and not part[-1].isspace()        # a long word
        variants = part + "a", text if within else part + "1"       # what both prompts begin with lasts
        one, other = (self._fitted([*self.messages, {"role": "user", "content": content}])[0]
                      for content in variants)
        return one[:common(np.array(one), np.array(other))]

    def _prompt(self) -> list[int]:
        """Ids of the whole conversation, without its oldest turns if it leaves no room for an answer."""
        self.dropped, n = 0, len(self.messages)
        ids, self.messages = self._fitted(self.messages)
        self.dropped = n - len(self.messages)
        return ids

    def _fitted(self, messages: list[dict]) -> tuple[list[int], list[dict]]:
        """Ids of messages, and those of the messages that there is room for."""
        ids = self.template.encode(messages, **self.variables)
        room = self.session.context
        if room is None or len(ids) <= room - min(room // 4, 256):
            return resume(self.model.tokenizer, self._ids, ids), messages
        while len(ids) > room // 2 and len(shorter := without_oldest(messages)) < len(messages):
            messages = shorter
            ids = self.template.encode(messages, **self.variables)
        if len(ids) >= room:
            raise ContextFullError(f"the message takes {len(ids)} tokens, the context has room for {room}")
        return ids, messages

    # ---- files

    def save(self, path: str | os.PathLike) -> None:
        """Write the messages to a new file, or over a conversation saved before: over nothing else."""
        path = os.path.realpath(path)
        if os.path.lexists(path):
            try:
                saved_messages(path)
            except FormatError as error:
                raise FormatError(f"{error}: it stays as it is") from None
        text = json.dumps({"messages": self.messages}, ensure_ascii=False, indent=1) + "\n"
        replace_file(path, text.encode())

    def load(self, path: str | os.PathLike) -> None:
        """Take up a saved conversation, if the template takes it."""
        messages = saved_messages(path)
        if any(m["role"] == "user" for m in messages):
            self.template.encode(messages, add_generation_prompt=False, **self.variables)
        self.messages = messages

    def save_session(self, path: str | os.PathLike) -> None:
        """Write the session and the messages to one file: a later conversation goes on where this one
        ends, and reads nothing again."""
        held = self.session.tokens              # all but the last token of an answer
        after = self._ids[len(held):] if self._ids[:len(held)] == held else None
        self.session.notes = {"messages": self.messages, "after": after}
        self.session.save(path)

    def take_up(self, system: str | None = None) -> None:
        """Go on with the conversation of a session that save_session wrote. system: another system message,
        if any is given. Raises FormatError where the session came with none."""
        notes = self.session.notes
        try:
            messages, after = checked_messages(notes["messages"]), notes["after"]
            size = self.model.config.vocab_size
            self._ids = [] if after is None else self.session.tokens + checks.ids("after", after, size)
        except (ValueError, KeyError, TypeError):
            raise FormatError("there is no conversation in this session") from None
        if system:
            messages = [{"role": "system", "content": whole_characters(system)},
                        *(m for m in messages if m["role"] != "system")]
        self.messages = messages


def without_oldest(messages: list[dict]) -> list[dict]:
    """The messages without the first turn, unless it is the only one."""
    users = [i for i, m in enumerate(messages) if m["role"] == "user"]
    return messages[:users[0]] + messages[users[1]:] if len(users) > 1 else messages


def lasting(text: str) -> str:
    """The part of a message being typed whose tokens hardly depend on what follows: all but the last word,
    and in texts without spaces all but the last characters."""
    at = next((i for i in range(len(text), 0, -1) if text[i - 1].isspace()), 0)
    return text[:at + max((len(text) - at) // CUT - 1, 0) * CUT]


def saved_messages(path: str | os.PathLike) -> list[dict]:
    """The messages in a file that save() wrote."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise FormatError(f"{os.fspath(path)} is not a saved conversation: it is no regular file")
    try:
        with open(path, "rb") as file:
            if file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"{":      # a model, say: it may be large
                raise ValueError("not JSON")
            file.seek(0)
            messages = json.loads(file.read().decode("utf-8-sig"))["messages"]
        return checked_messages(messages)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise FormatError(f"{os.fspath(path)} is not a saved conversation") from None


def checked_messages(messages: object) -> list[dict]:
    """Messages out of a file. Raises ValueError, KeyError or TypeError."""
    if not isinstance(messages, list):
        raise TypeError("messages are no list")
    return [{"role": _role(m["role"]), "content": whole_characters(m["content"])} for m in messages]


def _role(role: object) -> str:
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"expected system, user or assistant, found {role!r:.100}")
    return role


def whole_characters(text: str) -> str:
    """A text whose halves of surrogate pairs, which bytes that are not UTF-8 may become, are U+FFFD."""
    if not isinstance(text, str):
        raise TypeError(f"expected a text, found {type(text).__name__}")
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def replace_file(path: str, data: bytes) -> None:
    """Write a file beside, then rename it: a reader sees the whole old file or the whole new one."""
    beside = os.path.join(os.path.dirname(path), f".pybmc-{os.getpid()}.tmp")
    with suppress(FileNotFoundError):
        os.unlink(beside)
    try:
        with open(beside, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if os.path.exists(path):
            os.chmod(beside, stat.S_IMODE(os.stat(path).st_mode))
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(beside)
        raise


def resume(tokenizer: Tokenizer, held: Sequence[int], ids: list[int]) -> list[int]:
    """ids, but beginning with the tokens that a session holds, where these spell the same.

    A model may write a word in other tokens than the tokenizer does. What it wrote stays as it was evaluated.
    """
    spelled = [_spelled(tokenizer, id) for id in held]
    left, n = sum(map(len, spelled)), 0
    while left > 0 and n < len(ids):
        left -= len(_spelled(tokenizer, ids[n]))
        n += 1
    same = left == 0 and b"".join(spelled) == b"".join(_spelled(tokenizer, id) for id in ids[:n])
    return [*held, *ids[n:]] if same else ids


def _spelled(tokenizer: Tokenizer, id: int) -> bytes:
    """A token's bytes; a control token's are unlike any text's."""
    return b"\xff%d\xff" % id if tokenizer.is_control(id) else tokenizer.piece(id)
