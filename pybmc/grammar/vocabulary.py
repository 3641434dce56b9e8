"""A tokenizer's tokens as llguidance reads them."""

from __future__ import annotations

from functools import lru_cache
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary, ref

from ..engine.model import Model
from ..errors import ArgumentError, NeedsPackageError, needs_packages
from ..tokenizers import Tokenizer
from .compiler import compiled

COMPILED = 64                           # grammars of a vocabulary that are kept
PLACES = 256                            # and sets of tokens about marks
GUARD = "\2"                            # a byte that no token joins: before a text, no space is put there


class Vocabulary:
    """What llguidance knows of a model's vocabulary. ends: the ids that end a text; size: ids of the model,
    which may have more than its tokenizer."""

    def __init__(self, tokenizer: Tokenizer, size: int, source: str):
        self.size = size
        self.ends = sorted(id for id in tokenizer.stop_ids if id < size)
        self.stops = frozenset(self.ends)
        if not self.ends:
            raise ArgumentError(f"{source} has no token that ends a text: no grammar could end one")
        self.pieces = [tokenizer.piece(id) for id in range(min(size, tokenizer.vocab_size))]
        usual = (id for id in (tokenizer.eot_id, tokenizer.eos_id) if id in self.stops)
        self.end: int = next(usual, self.ends[0])       # the one that ends most texts
        tokens = _Tokens(tokenizer, self.pieces, self.ends, self.end)
        self.native = llguidance().LLTokenizer(tokens, n_vocab=size, eos_token=self.ends)
        self.compile = lru_cache(COMPILED)(self._compile)
        self.spelling, self.passing = lru_cache(PLACES)(self._spelling), lru_cache(PLACES)(self._passing)

    def _compile(self, source: str) -> tuple[Any, tuple[str, ...]]:
        return compiled(llguidance(), self.native, source)

    def _spelling(self, text: bytes) -> frozenset[int]:
        """Tokens with which a text begins."""
        return frozenset(id for id, piece in enumerate(self.pieces) if piece and text.startswith(piece))

    def _passing(self, mark: bytes, seen: bytes, gap: bytes) -> frozenset[int]:
        """Tokens that, behind a part of a mark, end it and do not go on with the beginning of the gap."""
        tails = tuple(mark[n:] for n in range(1, len(seen) + 1) if seen.endswith(mark[:n]))
        found = (id for id, piece in enumerate(self.pieces) if mark in piece or piece.startswith(tails))
        return frozenset(id for id in found
                         if not gap.startswith((seen + self.pieces[id]).partition(mark)[2]))


class _Tokens:
    """The interface that LLTokenizer expects. It keeps no tokenizer alive, which keeps its Vocabulary."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, pieces: list[bytes], ends: list[int], end: int):
        self._tokenizer = ref(tokenizer)
        self.eos_token_id, self.bos_token_id, self.tokens = end, tokenizer.bos_id, pieces
        self.special_token_ids = sorted(id for id in {*tokenizer.vocab.silent, *ends} if id < len(pieces))

    def __call__(self, text: str) -> list[int]:
        tokenizer = self._tokenizer()
        return [] if tokenizer is None else continued(tokenizer, text)


def continued(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text that continues another one; none where the tokenizer puts a space before each."""
    if not tokenizer.space_prefix:
        return tokenizer.encode(text, bos=False)
    guard = tokenizer.byte_id(ord(GUARD))
    ids = tokenizer.encode(GUARD + text, bos=False) if guard is not None else []
    return ids[ids.index(guard) + 1:] if guard in ids else []


def llguidance() -> Any:
    """The package, loaded when it is first used."""
    try:
        import llguidance
    except ImportError:
        raise NeedsPackageError(needs_packages("an answer with a schema or a grammar", "schema")) from None
    return llguidance


_reading = Lock()                       # one thread reads a vocabulary, and others wait for it
_known: WeakKeyDictionary[Tokenizer, Vocabulary] = WeakKeyDictionary()


def vocabulary_of(model: Model) -> Vocabulary:
    """A model's vocabulary, read once. Raises ArgumentError for a model without one."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ArgumentError(f"{model.path} has no vocabulary: it cannot follow a grammar")
    with _reading:
        found = _known.get(tokenizer)
        if found is None:
            found = _known[tokenizer] = Vocabulary(tokenizer, model.config.vocab_size, model.path)
        return found
