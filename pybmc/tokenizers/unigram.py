"""Unigram vocabularies (tokenizer.ggml.model "t5") through the tokenizers package: T5, XLM-R.

A text is normalized and cut into the tokens whose scores have the highest sum; what no token spells is unknown.
The package finds that sum. Its own normalizer replaces grapheme by grapheme, where SentencePiece and llama.cpp take
the longest sequence that the file's map of characters has, so the normalizing is done here.
"""

from __future__ import annotations

import numpy as np

from .charsmap import Charsmap
from .spm import BYTE_TOKENS, spelled
from .vocab import NORMAL, UNUSED, USER_DEFINED, Vocabulary


class Unigram:
    """Ordinary text <-> ids."""

    add_sep = False

    def __init__(self, metadata: dict[str, object], source: str):
        self.vocab = Vocabulary(metadata, source, {"eos": 1, "unknown": 2}, False, default_add_eos=True)
        self.vocab.need(unknown=self.vocab.unknown_id)
        self._prefix = self.vocab.get("tokenizer.ggml.add_space_prefix", bool, False)
        self._merge = self.vocab.get("tokenizer.ggml.remove_extra_whitespaces", bool, False)
        self.space_prefix = self._prefix or self._merge
        self._charsmap = self._read_charsmap()
        self._tokenizer = self._build()

    def _read_charsmap(self) -> Charsmap:
        key = "tokenizer.ggml.precompiled_charsmap"
        data = self.vocab.metadata.get(key)
        if data is None:
            return Charsmap()
        if not isinstance(data, np.ndarray) or data.dtype.itemsize != 1:
            found = getattr(data, "dtype", type(data).__name__)
            raise self.vocab.error(f"{key}: expected an array of bytes, found {found}")
        try:
            return Charsmap(data.tobytes())
        except ValueError as error:
            raise self.vocab.error(f"{key}: {error}") from None

    def _build(self):
        from tokenizers import Tokenizer, models

        scores, spellings = self._scores()
        return Tokenizer(models.Unigram(list(zip(spellings, scores)), unk_id=self.vocab.unknown_id))

    def _scores(self) -> tuple[list[float], list[str]]:
        """Scores and spellings for the package. A token that no text may become is spelled with a space, which a
        normalized text does not have. The worst normal score decides what an unknown character costs, so an unused
        token with a score below it, as padding of the table has, is left out too.
        """
        vocab = self.vocab
        scores = vocab.scores().astype(np.float64)
        if not np.isfinite(scores).all():
            at = int(np.isfinite(scores).argmin())
            raise vocab.error(f"tokenizer.ggml.scores: value {at}: expected a finite number, found {scores[at]}")
        normal = vocab.types == NORMAL
        normal[list(vocab.control - vocab.reserved)] = True
        worst = scores[normal].min() if normal.any() else 0.0
        scores[vocab.types == USER_DEFINED] = 0
        spells = normal | (vocab.types == USER_DEFINED) | (vocab.types == UNUSED) & (scores >= worst)
        scores[~spells] = worst
        return scores.tolist(), [text if spells[id] else f" {id}" for text, id in vocab.ids.items()]

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(self.normalize(text), add_special_tokens=False).ids

    def normalize(self, text: str) -> str:
        """Characters replaced as the file's map says, U+2581 for spaces."""
        text = self._charsmap.replace(text)
        if self._merge:
            return "".join("▁" + word for word in text.split(" ") if word)
        return "▁" * (self._prefix and text.strip(" ") != "") + text.replace(" ", "▁")

    def piece(self, id: int) -> bytes:
        """The bytes a token stands for."""
        return spelled(self.vocab, id)

    def byte(self, byte: int) -> int | None:
        """The token of a single byte."""
        return self.vocab.ids.get(BYTE_TOKENS[byte])
