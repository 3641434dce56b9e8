"""Byte-pair vocabularies (tokenizer.ggml.model "gpt2", "gemma4", "whitespace") by the tokenizers package.

A byte-level token is spelled in printable characters, one for each byte: the Latin-1 characters that print
are themselves, the other 68 bytes are U+0100 and up (GPT-2's encoder.json).
"""

from __future__ import annotations

import logging
import re

from ..errors import FormatError
from .pre import DEFAULT, PRE, Pre
from .vocab import BYTE, NORMAL, Vocabulary

log = logging.getLogger(__name__)


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTES = _byte_alphabet()
CHARS = {byte: char for char, byte in BYTES.items()}
LONG = 1 << 14                          # characters; beyond, a batch: encode() would stop all Python threads
_MISSING = "\0missing"                  # stands for bytes without a token; no vocabulary has it


class Bpe:
    """Ordinary text <-> ids. Merges that name tokens which do not exist are left out, with a warning."""

    space_prefix = False

    def __init__(self, metadata: dict[str, object], source: str):
        raw = metadata.get("tokenizer.ggml.model") == "gemma4"
        name = "gemma4" if raw else metadata.get("tokenizer.ggml.pre", "")
        self.pre = _find_pre(name, source)
        ids = {} if raw or name in ("glm4", "chatglm-bpe") else {"bos": 11, "eos": 11}
        self.vocab = Vocabulary(metadata, source, ids, self.pre.add_bos)
        if self.pre.always_bos:
            self.vocab.need(bos=self.vocab.bos_id)
            self.vocab.add_bos = True
        lower = self.vocab.get("tokenizer.ggml.normalizer.lowercase", bool, False)
        self._lower = self.pre.drops_space and lower
        self._tokenizer = self._build()

    def _build(self):
        from tokenizers import Tokenizer

        merges = [tuple(merge.split(" ", 1)) for merge in self.vocab.strings("merges")]
        words = dict(self.vocab.ids)
        for id in self.vocab.reserved:          # ordinary text is never control
            del words[self.vocab.text(id)]
        self._complete = all(self._spelling(byte) in words for byte in range(256))
        if not self._complete:          # a byte without a token is dropped, but its neighbours stay apart
            words[_MISSING] = self.vocab.size
        # the package panics where a merge makes a long unknown token
        if not all(map(words.__contains__, map("".join, merges))):
            merges = self._known(merges, words)
        try:
            tokenizer = Tokenizer(self._model(words, merges))
        except Exception:
            tokenizer = Tokenizer(self._model(words, self._known(merges, words)))
        tokenizer.pre_tokenizer = _pre_tokenizer(self.pre)
        return tokenizer

    def _model(self, words, merges):
        from tokenizers.models import BPE

        return BPE(vocab=words, merges=merges, ignore_merges=self.pre.ignore_merges,
                   byte_fallback=not self.pre.byte_level, unk_token=None if self._complete else _MISSING)

    def _known(self, merges: list[tuple], words: dict[str, int]) -> list[tuple]:
        known = [merge for merge in merges if len(merge) == 2 and words.keys() >= {*merge, "".join(merge)}]
        log.warning("%s: %d of %d merges name tokens that do not exist; they are left out",
                    self.vocab.source, len(merges) - len(known), len(merges))
        return known

    def encode(self, text: str) -> list[int]:
        if self._lower:
            text = "".join(char.lower()[0] for char in text)
        if not self.pre.byte_level and not self.pre.drops_space:
            text = text.replace(" ", "▁")
        if len(text) < LONG:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        else:
            ids = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids if self._complete else [id for id in ids if id < self.vocab.size]

    def piece(self, id: int) -> bytes:
        """The bytes a token stands for. A character outside the byte alphabet stands for itself."""
        token, kind = self.vocab.tokens[id], self.vocab.types[id]
        if kind == BYTE:
            return _hex_byte(token)
        if kind != NORMAL:
            return token.encode()
        if not self.pre.byte_level:
            return token.replace("▁", " ").encode()
        try:
            return bytes([BYTES[char] for char in token])
        except KeyError:
            return b"".join(bytes([BYTES[char]]) if char in BYTES else char.encode() for char in token)

    def byte(self, byte: int) -> int | None:
        """The token of a single byte."""
        return self.vocab.ids.get(self._spelling(byte))

    def _spelling(self, byte: int) -> str:
        return CHARS[byte] if self.pre.byte_level else f"<0x{byte:02X}>"


def _hex_byte(token: str) -> bytes:
    """<0x0A> -> b"\\n"; anything else is its own text."""
    match = re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)
    return bytes.fromhex(match[1]) if match else token.encode()


def _find_pre(name, source: str) -> Pre:
    if not isinstance(name, str):
        raise FormatError(f"{source}: tokenizer.ggml.pre: expected str, found {type(name).__name__}")
    if name not in PRE:
        found = f"unknown pre-tokenizer {name!r}" if name else "no pre-tokenizer is named"
        log.warning("%s: %s, using the default one: expect worse text", source, found)
    return PRE.get(name, DEFAULT)


def _pre_tokenizer(pre: Pre):
    from tokenizers import Regex, pre_tokenizers

    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    if pre.drops_space:
        steps.append(pre_tokenizers.Split(Regex(r"[\s&&[^\x1C-\x1F]]+"), "removed"))
    if pre.byte_level:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return pre_tokenizers.Sequence(steps)
