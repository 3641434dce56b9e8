"""A conversation in one session: messages, what of them the session already holds, and room for the next answer."""

import json
from collections.abc import Callable, Iterator, Sequence

from .chat import ChatTemplate
from .decode import Stats, Token, generate
from .errors import ArgumentError, ContextFullError, FormatError


class Conversation:
    """Messages and the session that holds them. ask() and again() stream an answer and remember it.

    Only what is new in a turn is evaluated. settings are those of generate(), max_tokens among them.
    """

    def __init__(self, model, session, system: str | None = None, **settings):
        self.model, self.session, self.settings = model, session, settings
        self.template = ChatTemplate(None, model.tokenizer)
        self.messages: list[dict] = [{"role": "system", "content": system}] if system else []
        self.stats = Stats()
        self.dropped = 0                            # messages forgotten in the last turn, to make room
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
        self.settings["seed"] = self.settings.get("seed", 0) + 1
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

    def _answer(self, before: list[dict], progress) -> Iterator[Token]:
        """before: the messages to go back to if nothing gets said."""
        text, said, stream = [], [], None
        try:
            prompt = self._prompt()
            stream = generate(self.model, prompt, session=self.session, progress=progress, **self.settings)
            for token in stream:
                said.append(token.id)
                text.append(token.text)
                yield token
        finally:                                    # also where the reader stops listening
            if stream is not None:
                stream.close()
                self.stats = stream.stats
            if said:
                self.messages.append({"role": "assistant", "content": "".join(text)})
                stops = self.model.tokenizer.stop_ids
                self._ids = prompt + (said[:-1] if said[-1] in stops else said)
            else:
                self.messages = before

    # ---- the prompt

    def _prompt(self) -> list[int]:
        """Ids of the whole conversation, after dropping its oldest turns if it leaves no room for an answer."""
        self.dropped = 0
        ids = self.template.encode(self.messages)
        room = self.session.context
        if room is None or len(ids) <= room - min(room // 4, 256):
            return resume(self.model.tokenizer, self._ids, ids)
        while len(ids) > room // 2 and self._drop_oldest():
            ids = self.template.encode(self.messages)
        if len(ids) >= room:
            raise ContextFullError(f"the message takes {len(ids)} tokens, the context has room for {room}")
        return ids

    def _drop_oldest(self) -> bool:
        """Forget the first turn, unless it is the only one."""
        users = [i for i, m in enumerate(self.messages) if m["role"] == "user"]
        if len(users) < 2:
            return False
        self.dropped += users[1] - users[0]
        del self.messages[users[0]:users[1]]
        return True

    # ---- files

    def save(self, path: str) -> None:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"messages": self.messages}, file, ensure_ascii=False, indent=1)
            file.write("\n")

    def load(self, path: str) -> None:
        with open(path, encoding="utf-8") as file:
            try:
                messages = json.load(file)["messages"]
                messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in messages]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise FormatError(f"{path} is not a saved conversation") from None
        self.messages = messages


def resume(tokenizer, held: Sequence[int], ids: list[int]) -> list[int]:
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


def _spelled(tokenizer, id: int) -> bytes:
    """A token's bytes; a control token's are unlike any text's."""
    return b"\xff%d\xff" % id if tokenizer.is_control(id) else tokenizer.piece(id)
