"""A GGUF's vocabulary: its tokens, what kind each is, which ones begin and end texts, and where they stand in
a text.

The rules are llama.cpp's, which files are made for: defaults per model, tokens known by their text, and
special tokens found longest first. They are kept where a file says nothing itself.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator

import numpy as np

from .. import checks
from ..errors import ArgumentError, FormatError, printable

log = logging.getLogger(__name__)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6      # tokenizer.ggml.token_type

# Tokens that end a turn, known by their text. The first one present is the vocabulary's end of turn, if its
# file names none.
_END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
                "<EOT>", "_<EOT>", "[EOT]", "<｜end▁of▁sentence｜>", "<end_of_utterance>")
_END_OF_MESSAGE = ("<|eom_id|>",)
_ENDS = _END_OF_TURN + _END_OF_MESSAGE + (
    "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "</s>", "[EOS]", "<eos>", "<turn|>",
    "<|tool_response>", "[e~[")
_FILL_IN = {                            # fill-in-the-middle tokens that end what a model writes
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
_FILL_IN_MARKS = (
    "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",
    "<|code_prefix|>", "<|prefix|>",
    "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
    "<|code_suffix|>", "<|suffix|>",
    "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>",
    "<|code_middle|>", "<|middle|>")
_SPACE = " \t\n\v\f\r"


class Vocabulary:
    """tokens as the file spells them, their types int32 (size,), and the ids that matter: bos_id, eos_id,
    eot_id, sep_id (or None), stop_ids.
    """

    def __init__(self, metadata: dict[str, object], source: str, default_ids: dict[str, int],
                 default_add_bos: bool, default_add_eos: bool = False):
        self.metadata = metadata
        self.source = source
        self.tokens = self.strings("tokens")
        self.size = len(self.tokens)
        if not self.size:
            raise self.error("tokenizer.ggml.tokens: the vocabulary is empty")
        self.types = self._types()
        self.ids = self._index()
        named = {
            name: self._id(name, default_ids.get(name))
            for name in ("bos", "eos", "eot", "eom", "unknown", "seperator", *_FILL_IN)    # GGUF's spelling
        }
        self.bos_id, self.eos_id, self.unknown_id = named["bos"], named["eos"], named["unknown"]
        self.sep_id = named["seperator"]
        self.eot_id = self._known_by_text(named["eot"], _END_OF_TURN)
        self.add_bos = self._adds("bos", self.bos_id, default_add_bos)
        self.add_eos = self._adds("eos", self.eos_id, default_add_eos)
        self.add_sep = False                    # WordPiece: sep_id ends a text
        self._mark_controls()
        self.stop_ids = self._stops(named)
        self._by_start: dict[bool, dict[str, list[str]]] = {}

    # -- reading

    def error(self, what: str) -> FormatError:
        return FormatError(f"{self.source}: {printable(what)}")

    def get(self, key: str, kind: type, default=None):
        """A value of the file, of one kind; default where the file has none."""
        value = self.metadata.get(key, default)
        if value is not default and (not isinstance(value, kind) or isinstance(value, bool) and kind is int):
            raise self.error(f"{key}: expected {kind.__name__}, found {type(value).__name__}")
        return value

    def strings(self, name: str) -> list[str]:
        key = f"tokenizer.ggml.{name}"
        strings = self.get(key, list)
        if strings is None or strings and not isinstance(strings[0], str):
            raise self.error(f"{key}: expected an array of strings, found "
                             + ("nothing" if strings is None else "another one"))
        return strings

    def numbers(self, name: str, kind: str) -> np.ndarray | None:
        """An array with a number for each token at least, or None where the file has none."""
        key = f"tokenizer.ggml.{name}"
        values = self.metadata.get(key)
        if values is None:
            return None
        if not isinstance(values, np.ndarray) or values.dtype.kind not in kind:
            found = getattr(values, "dtype", type(values).__name__)
            raise self.error(f"{key}: expected an array of numbers, found {found}")
        if len(values) < self.size:
            raise self.error(f"{key}: expected {self.size} values, one for each token, found {len(values)}")
        return values[:self.size]

    def scores(self) -> np.ndarray:
        """float32 (size,); 0 where the file has none."""
        scores = self.numbers("scores", "fiu")
        if scores is None:
            return np.zeros(self.size, np.float32)
        if np.isnan(scores).any():
            raise self.error(f"tokenizer.ggml.scores: value {int(np.isnan(scores).argmax())} is not a number")
        return scores.astype(np.float32)

    def need(self, **ids: int | None) -> None:
        """Tokens that an algorithm cannot do without, by the names of their keys."""
        for name, id in ids.items():
            if id is None:
                key = f"tokenizer.ggml.{name}_token_id"
                raise self.error(f"{key}: expected one of {self.size} tokens, found none")

    def _types(self) -> np.ndarray:
        types = self.numbers("token_type", "iu")
        if types is not None:
            return types.astype(np.int32)
        types = np.full(self.size, NORMAL, np.int32)
        for name, kind in (("bos", CONTROL), ("eos", CONTROL), ("unknown", UNKNOWN)):
            id = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
            if isinstance(id, int) and 0 <= id < self.size:
                types[id] = kind
        return types

    def _index(self) -> dict[str, int]:
        """Text -> id. An empty token can stand for no text; it gets a name that none is meant to have."""
        texts = self.tokens if "" not in self.tokens else [self.text(id) for id in range(self.size)]
        ids = dict(zip(texts, range(self.size)))
        if len(ids) < self.size:
            one, other = next((id, ids[text]) for id, text in enumerate(texts) if ids[text] != id)
            raise self.error(f"tokenizer.ggml.tokens: {texts[one]!r} is there twice, as {one} and {other}")
        return ids

    def text(self, id: int) -> str:
        return self.tokens[id] or f"[EMPTY_{id}]"

    def _id(self, name: str, default: int | None) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        id = self.get(key, int)
        if default is not None and default >= self.size:
            default = None
        if id is not None and not 0 <= id < self.size:
            log.warning("%s: %s is %d, the vocabulary has %d tokens; using %s",
                        self.source, key, id, self.size, default)
        return id if id is not None and 0 <= id < self.size else default

    def _adds(self, name: str, id: int | None, default: bool) -> bool:
        key = f"tokenizer.ggml.add_{name}_token"
        adds = self.get(key, bool)
        if adds and id is None:
            raise self.error(f"{key} is true, but there is no such token")
        return default and id is not None if adds is None else adds

    def _known_by_text(self, id: int | None, texts: tuple[str, ...]) -> int | None:
        return id if id is not None else next((self.ids[text] for text in texts if text in self.ids), None)

    def _mark_controls(self) -> None:
        """Tokens that only control can mean, whatever the file calls them."""
        known = [self.ids[text] for text in (*_ENDS, *_FILL_IN_MARKS, *sum(_FILL_IN.values(), ()))
                 if text in self.ids]
        normal = self.types == NORMAL
        self.types[known] = CONTROL
        self.control = frozenset(np.flatnonzero(self.types == CONTROL).tolist())
        # no text may spell these
        self.reserved = frozenset(np.flatnonzero((self.types == CONTROL) & ~normal).tolist())
        self.user_defined = frozenset(np.flatnonzero(self.types == USER_DEFINED).tolist())
        self.silent = frozenset(
            np.flatnonzero(np.isin(self.types, (NORMAL, USER_DEFINED, BYTE), invert=True)).tolist())

    def _stops(self, named: dict[str, int | None]) -> frozenset[int]:
        stops = {self.ids[text] for text in _ENDS if text in self.ids}
        stops |= {self._known_by_text(named[name], texts) for name, texts in _FILL_IN.items()}
        stops |= {self.eos_id, self.eot_id, self._known_by_text(named["eom"], _END_OF_MESSAGE)}
        texts = {self.tokens[id] for id in stops if id is not None}
        if {"<|return|>", "<|call|>"} <= texts or "<|flush|>" in texts and texts & {"<|call|>", "<|calls|>"}:
            stops.discard(self.ids.get("<|end|>"))          # there it ends a message, and the turn goes on
        if "<|tool_response>" in texts:
            stops.discard(self.ids.get("</s>"))
        return frozenset(stops - {None})

    # -- special tokens in a text

    def split(self, text: str, special: bool,
              mask: Callable[[int], bytes | None] = lambda id: None) -> list[str | int]:
        """A text cut at its special tokens: strings and ids. User-defined tokens always count, control tokens
        with special. mask: for an id a byte for each character, or None; a token counts only where none of
        its own is 0.
        """
        parts: list[slice | int] = [slice(0, len(text))] if text else []
        for token in self._present(text, special):
            id = self.ids[token]
            allowed = mask(id)
            parts = [piece for part in parts for piece in
                     (self._cut(text, part, token, id, allowed) if isinstance(part, slice) else [part])]
        return [text[part] if isinstance(part, slice) else part for part in parts]

    def _present(self, text: str, special: bool) -> list[str]:
        """The special tokens in a text, longest first. Gemma has 6,000 of them, so their first two characters
        sieve.
        """
        found = [
            token
            for start, tokens in self._starts(special).items()
            if start in text
            for token in tokens
            if token in text
        ]
        return sorted(found, key=lambda token: -len(token.encode()))

    def _starts(self, special: bool) -> dict[str, list[str]]:
        if special not in self._by_start:
            kinds = (USER_DEFINED, CONTROL, UNKNOWN) if special else (USER_DEFINED,)
            starts: dict[str, list[str]] = {}
            for id in np.flatnonzero(np.isin(self.types, kinds)).tolist():
                if self.tokens[id]:
                    starts.setdefault(self.tokens[id][:2], []).append(self.tokens[id])
            self._by_start[special] = starts
        return self._by_start[special]

    def _cut(self, text: str, part: slice, token: str, id: int, own: bytes | None) -> list[slice | int]:
        """A part of a text, cut at a token; own: only where the token is made of these characters."""
        strip_left, strip_right = self._strips(token)
        parts: list[slice | int] = []
        start = part.start
        for at in _places(text, token, part, own):
            stop = at
            while strip_left and stop > start and text[stop - 1] in _SPACE:
                stop -= 1
            parts += [slice(start, stop)] * (stop > start) + [id]
            start = at + len(token)
            while strip_right and start < part.stop and text[start] in _SPACE:
                start += 1
        return parts + [slice(start, part.stop)] * (start < part.stop)

    def _strips(self, token: str) -> tuple[bool, bool]:
        """Whether a token swallows white space on its left, on its right. GGUF does not say; these models are
        known to.
        """
        name = str(self.metadata.get("general.name", "")).lower()
        pre = self.get("tokenizer.ggml.pre", str)
        arch = self.metadata.get("general.architecture")
        if pre in ("jina-v2-de", "jina-v2-es", "jina-v2-code") or arch in ("nomic-bert-moe", "jina-bert-v3"):
            return token == "<mask>", False
        if "phi-3" in name or "phi3" in name:
            return False, token not in ("<unk>", "<s>", "<|endoftext|>")
        return "modern-bert" in name and token == "[MASK]", False

    def check(self, id: int) -> int:
        """The id of a token, as Python's int."""
        id = checks.whole("a token id", id, -math.inf, math.inf)
        if not 0 <= id < self.size:
            raise ArgumentError(f"token {id} is out of range: the vocabulary has {self.size} tokens")
        return id


def _places(text: str, token: str, part: slice, own: bytes | None) -> Iterator[int]:
    """Where a token stands in a part of a text, one after another."""
    at = text.find(token, part.start, part.stop)
    while at >= 0:
        end = at + len(token)
        counts = own is None or own.find(b"\0", at, end) < 0
        if counts:
            yield at
        at = text.find(token, end if counts else at + 1, part.stop)
