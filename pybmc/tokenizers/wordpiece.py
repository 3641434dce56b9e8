"""WordPiece vocabularies (tokenizer.ggml.model "bert").

The file spells a token that begins a word with U+2581 before it, and one that continues a word as it is. A
text is cut into words, and each word, from its left, into the longest tokens there are; a word that cannot be
cut is one unknown token. The tokenizers package does the same with other character classes than llama.cpp,
gives up on words of more than 100 characters, and takes quadratic time for them where it is told not to.
"""

from __future__ import annotations

import unicodedata

from .spm import spelled
from .vocab import Vocabulary

_HAN = (range(0x3400, 0x4DC0), range(0x4E00, 0xA000), range(0xF900, 0xFB00), range(0x20000, 0x2A6E0),
        range(0x2A700, 0x2B740), range(0x2B740, 0x2B820), range(0x2B920, 0x2CEB0), range(0x2F800, 0x2FA20))


class WordPiece:
    """Ordinary text <-> ids. A text begins with [CLS], which is bos here, and ends with [SEP]."""

    space_prefix = True

    def __init__(self, metadata: dict[str, object], source: str):
        cls = metadata.get("tokenizer.ggml.cls_token_id")
        ids = {"bos": cls if type(cls) is int and cls >= 0 else 101, "unknown": 100, "seperator": 102}
        self.vocab = vocab = Vocabulary(metadata, source, ids, True)
        vocab.need(bos=vocab.bos_id, seperator=vocab.sep_id, unknown=vocab.unknown_id)
        vocab.add_bos, vocab.add_eos, vocab.add_sep = True, False, True         # whatever the file says
        self._words = {text: id for text, id in vocab.ids.items() if id not in vocab.reserved}
        self._lengths = sorted({len(text) for text in self._words}, reverse=True)
        lower = vocab.get("tokenizer.ggml.normalizer.lowercase", bool, True)
        accents = vocab.get("tokenizer.ggml.normalizer.strip_accents", bool, lower)
        self._characters = _Characters(lower, accents)

    def encode(self, text: str) -> list[int]:
        words = text.translate(self._characters).split()
        return [id for word in words for id in self._pieces("▁" + word)]

    def _pieces(self, word: str) -> list[int]:
        ids, start = [], 0
        while start < len(word):
            for length in self._lengths:
                if start + length <= len(word) and word[start:start + length] in self._words:
                    break
            else:
                return [self.vocab.unknown_id]
            ids.append(self._words[word[start:start + length]])
            start += length
        return ids

    def piece(self, id: int) -> bytes:
        """The bytes a token stands for."""
        return spelled(self.vocab, id)

    def byte(self, byte: int) -> None:
        """No token stands for one byte."""


class _Characters(dict):
    """For str.translate: code point -> nothing, a space, or the character, between spaces if it is a word.

    With strip_accents, only the first part is left of a character that decomposes, such as a letter with an
    accent or, as in llama.cpp, a Hangul syllable.
    """

    def __init__(self, lower: bool, strip_accents: bool):
        self._lower, self._strip_accents = lower, strip_accents

    def __missing__(self, point: int) -> str:
        self[point] = text = self._text(chr(point))
        return text

    def _text(self, char: str) -> str:
        if self._strip_accents:
            char = unicodedata.normalize("NFD", char)[0]
        category = unicodedata.category(char)
        if char.isspace() and not "\x1c" <= char <= "\x1f":
            return " "
        if category in ("Cc", "Cf", "Co") or char == "\ufffd" or self._strip_accents and category[0] == "M":
            return ""
        symbol = category[0] == "P" or category[0] == "S" and char.isascii()
        alone = symbol or any(ord(char) in han for han in _HAN)
        char = char.lower()[0] if self._lower else char
        return f" {char} " if alone else char
