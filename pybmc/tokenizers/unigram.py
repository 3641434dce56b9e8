"""Unigram vocabularies (tokenizer.ggml.model "t5"): T5, XLM-R.

A text is normalized and cut into the tokens whose scores have the highest sum; what no token spells is
unknown. The tokenizers package is not used. Its normalizer replaces grapheme by grapheme, where SentencePiece
and llama.cpp take the longest sequence that the file's map of characters has. It has no types of tokens, so
the score of padding would decide what an unknown character costs. And its trie of a vocabulary of 250,000
tokens takes 300 MB.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from .charsmap import Charsmap
from .spm import BYTE_TOKENS, spelled
from .vocab import NORMAL, UNUSED, USER_DEFINED, Vocabulary


class Unigram:
    """Ordinary text <-> ids."""

    def __init__(self, metadata: dict[str, object], source: str):
        self.vocab = Vocabulary(metadata, source, {"eos": 1, "unknown": 2}, False, default_add_eos=True)
        self.vocab.need(unknown=self.vocab.unknown_id)
        self._prefix = self.vocab.get("tokenizer.ggml.add_space_prefix", bool, False)
        self._merge = self.vocab.get("tokenizer.ggml.remove_extra_whitespaces", bool, False)
        self.space_prefix = self._prefix or self._merge
        self._charsmap = self._read_charsmap()
        scores = self._read_scores()
        self._unknown = self._unknown_score(scores)
        self._scores = self._by_text(scores)
        self._lengths = _lengths(self._scores)

    def _read_charsmap(self) -> Charsmap:
        key = "tokenizer.ggml.precompiled_charsmap"
        data = self.vocab.metadata.get(key)
        if data is None:
            return Charsmap()
        if not isinstance(data, np.ndarray) or data.dtype not in (np.uint8, np.int8):
            found = getattr(data, "dtype", type(data).__name__)
            raise self.vocab.error(f"{key}: expected an array of bytes, found {found}")
        try:
            return Charsmap(data.tobytes())
        except ValueError as error:
            raise self.vocab.error(f"{key}: {error}") from None

    def _read_scores(self) -> np.ndarray:
        scores = self.vocab.scores()
        if not np.isfinite(scores).all():
            at = int(np.isfinite(scores).argmin())
            found = f"value {at}: expected a finite number, found {scores[at]}"
            raise self.vocab.error(f"tokenizer.ggml.scores: {found}")
        return scores

    def _normal(self) -> np.ndarray:
        """bool (size,): the tokens that the file calls normal."""
        normal = self.vocab.types == NORMAL
        normal[list(self.vocab.control - self.vocab.reserved)] = True
        return normal

    def _unknown_score(self, scores: np.ndarray) -> float:
        """What an unknown character costs: 10 more than the worst normal token, in float32."""
        normal = self._normal()
        return float((scores[normal].min() if normal.any() else np.float32(0)) - np.float32(10))

    def _by_text(self, scores: np.ndarray) -> dict[str, tuple[float, int]]:
        """Text -> (score, id) of the tokens that a text may become."""
        user_defined = self.vocab.types == USER_DEFINED
        spells = self._normal() | user_defined | (self.vocab.types == UNUSED)
        scores = np.where(user_defined, 0, scores).tolist()
        return {text: (scores[id], id) for text, id in self.vocab.ids.items() if spells[id]}

    def encode(self, text: str) -> list[int]:
        """Viterbi: for each place the best way to reach it, then back from the end."""
        text = self.normalize(text)
        size, unknown = len(text), self.vocab.unknown_id
        best = [0.0] + [-math.inf] * size
        steps = [(0, unknown)] * (size + 1)             # to each place: from where, by which token
        for start, char in enumerate(text):
            known = False
            for length in self._lengths.get(char, ()):
                found = self._scores.get(text[start:start + length])
                stop = start + length
                if found is None or stop > size:
                    continue
                known |= length == 1
                score = best[start] + found[0]
                if score > best[stop]:
                    best[stop], steps[stop] = score, (start, found[1])
            if not known and best[start] + self._unknown > best[start + 1]:
                best[start + 1], steps[start + 1] = best[start] + self._unknown, (start, unknown)
        return self._path(steps)

    def _path(self, steps: list[tuple[int, int]]) -> list[int]:
        """The tokens to the last place. Unknown ones side by side are one."""
        ids, at = [], len(steps) - 1
        while at:
            at, id = steps[at]
            if not ids or id != self.vocab.unknown_id or id != ids[-1]:
                ids.append(id)
        return ids[::-1]

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


def _lengths(texts: Iterable[str]) -> dict[str, list[int]]:
    """First character -> how long the texts with it are."""
    lengths: dict[str, set[int]] = {}
    for text in texts:
        lengths.setdefault(text[0], set()).add(len(text))
    return {char: sorted(found) for char, found in lengths.items()}
