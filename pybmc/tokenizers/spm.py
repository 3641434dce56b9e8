"""SentencePiece vocabularies (tokenizer.ggml.model "llama") through the sentencepiece package.

The package wants its own model file, so one is written from the GGUF's table: a protobuf message of some 30
lines. The algorithm is its BPE, which joins the neighbours with the best score first, as llama.cpp does.
User-defined and unused tokens are ordinary here: the former are cut out of the text before, the latter
llama.cpp takes like any other. Control tokens stay control, so that no text spells them.
"""

from __future__ import annotations

import numpy as np

from .bpe import _hex_byte
from .vocab import BYTE, CONTROL, NORMAL, UNKNOWN, Vocabulary

_SPACE = "▁"
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


class Spm:
    """Ordinary text <-> ids."""

    def __init__(self, metadata: dict[str, object], source: str):
        self.vocab = Vocabulary(metadata, source, {"bos": 1, "eos": 2, "unknown": 0}, True)
        prefix = self.vocab.get("tokenizer.ggml.add_space_prefix", bool)
        self.space_prefix = prefix is not False
        self._processor = self._build()

    def _build(self):
        from sentencepiece import SentencePieceProcessor

        kinds = self._kinds()
        texts = [text.encode() for text in self.vocab.ids]      # in the order of ids
        # not for the package, which has a byte for it
        for id in [id for id, text in enumerate(texts) if b"\0" in text]:
            texts[id], kinds[id] = f"[NUL_{id}]".encode(), CONTROL
        has_bytes = bool((kinds == BYTE).any())
        model = _pieces(texts, self.vocab.scores(), kinds)
        # the package insists on one; ids beyond the vocabulary are dropped again
        if not (kinds == UNKNOWN).any():
            model += _pieces(
                [f"[UNKNOWN_{len(texts)}]".encode()], np.zeros(1, np.float32), np.array([UNKNOWN])
            )
        # trainer: BPE, byte fallback
        model += _field(2, _number(3, 2) + _number(35, has_bytes))
        model += _field(
            3, _field(1, b"identity") + _number(3, self.space_prefix) + _number(4, 0) + _number(5, 1)
        )
        try:
            return SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError) as error:
            raise self.vocab.error(f"not a SentencePiece vocabulary: {error}") from None

    def _kinds(self) -> np.ndarray:
        """Token types as the package knows them: bytes all 256 or none, one unknown token, the rest normal or
        control.
        """
        kinds = self.vocab.types.copy()
        unknown = np.flatnonzero(kinds == UNKNOWN)
        if self.vocab.unknown_id in unknown:
            unknown = unknown[unknown != self.vocab.unknown_id]
        else:
            unknown = unknown[1:]
        kinds[unknown] = CONTROL
        kinds[~np.isin(kinds, (UNKNOWN, CONTROL))] = NORMAL
        ids = [self.vocab.ids.get(text) for text in BYTE_TOKENS]
        if None not in ids and NORMAL in kinds[ids]:
            kinds[ids] = self.vocab.types[ids] = BYTE
        return kinds

    def encode(self, text: str) -> list[int]:
        ids = self._processor.encode(text)
        return (
            ids
            if self.vocab.size == self._processor.vocab_size()
            else [id for id in ids if id < self.vocab.size]
        )

    def piece(self, id: int) -> bytes:
        """The bytes a token stands for."""
        return spelled(self.vocab, id)

    def byte(self, byte: int) -> int | None:
        """The token of a single byte."""
        return self.vocab.ids.get(BYTE_TOKENS[byte])


def spelled(vocab: Vocabulary, id: int) -> bytes:
    """The bytes of a token where U+2581 is a space and <0x0A> a byte."""
    token, kind = vocab.tokens[id], vocab.types[id]
    if kind == BYTE:
        return _hex_byte(token)
    return token.encode() if kind in (CONTROL, UNKNOWN) else token.replace(_SPACE, " ").encode()


# -- protobuf, as far as it goes:
# https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto

def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    out.append(n)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(int(value))


def _field(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _pieces(texts: list[bytes], scores: np.ndarray, kinds: np.ndarray) -> bytes:
    """ModelProto.pieces: for each token its text (1), score (2, a float) and type (3)."""
    tail = np.zeros(len(texts), [("score_tag", "u1"), ("score", "<f4"), ("type_tag", "u1"), ("type", "u1")])
    tail["score_tag"], tail["score"], tail["type_tag"], tail["type"] = 2 << 3 | 5, scores, 3 << 3, kinds
    tails, size = tail.tobytes(), tail.itemsize
    heads: dict[int, bytes] = {}
    out = []
    for index, text in enumerate(texts):
        length = len(text)
        head = heads.get(length)
        if head is None:
            inner = b"\x0a" + _varint(length)
            head = heads[length] = b"\x0a" + _varint(len(inner) + length + size) + inner
        out += (head, text, tails[index * size:index * size + size])
    return b"".join(out)
