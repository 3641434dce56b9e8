"""Text <-> token ids, with the vocabulary of a GGUF file of any architecture."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from .. import checks
from ..errors import ArgumentError, FormatError, printable
from ..files.gguf import GGUF
from .bpe import Bpe
from .spm import Spm
from .unigram import Unigram
from .wordpiece import WordPiece

__all__ = ["StreamDecoder", "Tokenizer"]

_KINDS = {                              # by tokenizer.ggml.model
    "gpt2": Bpe, "gemma4": Bpe, "whitespace": Bpe, "llama": Spm, "t5": Unigram, "bert": WordPiece,
}
_NO_KINDS = ("none", "no_vocab")        # what files without a vocabulary say


def kind_of(file: GGUF) -> type | None:
    """The class that reads a file's vocabulary; None where there is none.
    Raises FormatError for an unknown kind."""
    model = file.metadata.get("tokenizer.ggml.model")
    if isinstance(model, str) and model in _KINDS:
        return _KINDS[model]
    if model is None or isinstance(model, str) and model in _NO_KINDS:
        return None
    raise FormatError(f"{file.path}: no vocabulary that pybmc knows: expected a tokenizer.ggml.model of "
                      f"{', '.join(_KINDS)}, found {printable(repr(model), 60)}")


class Tokenizer:
    """The vocabulary of a GGUF file: a path (no weights are needed or read) or an opened GGUF.

    Ids equal llama.cpp's. Two differences are meant: ordinary text never becomes a control token, and decode
    gives back the text as it was, without tidying the spaces before punctuation. What WordPiece ("bert") and
    Unigram ("t5") drop from a text before they cut it (case, accents, spaces) does not come back.
    """

    def __init__(self, source):
        if isinstance(source, GGUF):
            self._load(source)
        else:
            with GGUF(source, vocabulary_only=True) as file:
                self._load(file)

    def _load(self, file: GGUF) -> None:
        kind = kind_of(file)
        if kind is None:
            raise FormatError(f"{file.path}: no vocabulary that pybmc knows: "
                              f"expected a tokenizer.ggml.model of {', '.join(_KINDS)}, found none")
        self._codec = kind(file.metadata, str(file.path))
        self.vocab = self._codec.vocab
        self.tokens: list[str] = self.vocab.tokens                      # as the file spells them
        self.vocab_size: int = self.vocab.size
        self.bos_id: int | None = self.vocab.bos_id
        self.eos_id: int | None = self.vocab.eos_id
        self.eot_id: int | None = self.vocab.eot_id
        self.sep_id: int | None = self.vocab.sep_id
        self.stop_ids: frozenset[int] = self.vocab.stop_ids             # each ends what a model has to say
        self.add_bos: bool = self.vocab.add_bos
        self.add_eos: bool = self.vocab.add_eos
        self.add_sep: bool = self.vocab.add_sep
        self.space_prefix: bool = self._codec.space_prefix              # a text gets a space before it
        self.chat_template: str | None = self.vocab.get("tokenizer.chat_template", str)
        self._pieces: dict[int, bytes] = {}

    def encode(self, text: str, bos: bool = True, special: bool = False) -> list[int]:
        """Ids of a text. bos: begin and end it as the file asks; special: control tokens in it count."""
        ids = [self.bos_id] if bos and self.add_bos else []
        ids += self.encode_parts(self.vocab.split(_checked(text), special))
        ids += [self.eos_id] if bos and self.add_eos else []
        return ids + [self.sep_id] if bos and self.add_sep else ids

    def encode_parts(self, parts: Iterable[str | int]) -> list[int]:
        """Ids of ordinary texts with special tokens, given as ids, between them."""
        ids: list[int] = []
        for part in parts:
            if isinstance(part, str):
                ids += self._codec.encode(part)
            else:
                ids.append(part)
        return ids

    def decode(self, ids: Iterable[int], special: bool = False, continued: bool = False) -> str:
        """The text of some ids. special shows control tokens. Bytes that are not UTF-8 become U+FFFD.

        SentencePiece and WordPiece put a space before a text's first word; it is taken off again, unless the
        text is the continuation of another one.
        """
        stream = StreamDecoder(self, special, continued)
        ids = checks.ids("ids", ids)
        return stream.push(*ids) + stream.flush()

    def stream(self, special: bool = False, continued: bool = True,
               shown: frozenset[int] = frozenset()) -> StreamDecoder:
        """A decoder for ids that come one by one. continued: after a prompt, so that a first space counts.
        shown: control tokens whose names are part of the text."""
        return StreamDecoder(self, special, continued, shown)

    def piece(self, id: int) -> bytes:
        """The bytes of one token; a control token's are its name."""
        try:
            return self._pieces[id]
        except (KeyError, TypeError):
            id = self.vocab.check(id)
            piece = self._pieces[id] = self._codec.piece(id)
            return piece

    def byte_id(self, byte: int) -> int | None:
        """The token that stands for one byte, where there is one."""
        return self._codec.byte(byte)

    def is_control(self, id: int) -> bool:
        return self.vocab.check(id) in self.vocab.control

    def silent_names(self) -> dict[int, str]:
        """Tokens whose text is not shown, as control tokens, and how the vocabulary spells them."""
        return {id: self.tokens[id] for id in self.vocab.silent if self.tokens[id]}

    def __repr__(self) -> str:
        return f"<Tokenizer of {self.vocab.source!r}: {self.vocab_size} tokens>"


class StreamDecoder:
    """Ids in, text out: push() gives what is complete, never half a character; flush() what is left."""

    def __init__(self, tokenizer: Tokenizer, special: bool = False, continued: bool = True,
                 shown: frozenset[int] = frozenset()):
        self._tokenizer = tokenizer
        self._silent = frozenset() if special else tokenizer.vocab.silent - shown
        self._strip = tokenizer._codec.space_prefix and not continued
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, *ids: int) -> str:
        pieces = [self._tokenizer.piece(id) for id in ids if id not in self._silent]
        if self._strip and pieces:
            self._strip = False
            pieces[0] = pieces[0].removeprefix(b" ")
        return self._utf8.decode(b"".join(pieces))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


def _checked(text: str) -> str:
    if not isinstance(text, str):
        raise ArgumentError(f"expected a str to encode, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"{text[error.start]!r} at {error.start} is half a surrogate pair"
        raise ArgumentError(f"not a text: {half}") from None
    return text
