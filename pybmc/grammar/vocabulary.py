"""A tokenizer's tokens as llguidance reads them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

from ..engine.model import Model
from ..errors import ArgumentError, NeedsPackageError, UnsupportedSchemaError, printable
from ..tokenizers import Tokenizer

COMPILED = 64                           # grammars of a vocabulary that are kept
GUARD = "\2"                            # keeps SentencePiece from putting a space before a text: a byte that no token joins


class Vocabulary:
    """What llguidance knows of a model's vocabulary. ends: the ids that end a text; size: ids of the model, which
    may have more than its tokenizer."""

    def __init__(self, tokenizer: Tokenizer, size: int, source: str):
        if not tokenizer.stop_ids:
            raise ArgumentError(f"{source} has no token that ends a text: no grammar could end one")
        self.tokenizer, self.size = tokenizer, size
        self.stops, self.ends = tokenizer.stop_ids, sorted(tokenizer.stop_ids)
        self.pieces = [tokenizer.piece(id) for id in range(min(size, tokenizer.vocab_size))]
        usual = (id for id in (tokenizer.eot_id, tokenizer.eos_id) if id in tokenizer.stop_ids)
        self.end: int = next(usual, self.ends[0])       # the one that ends most texts
        self.native = llguidance().LLTokenizer(_Tokens(self), n_vocab=size, eos_token=self.ends)
        self.compile = lru_cache(COMPILED)(self._compile)

    def _compile(self, source: str) -> tuple[Any, tuple[str, ...]]:
        """A matcher at its beginning, and llguidance's warnings."""
        matcher = llguidance().LLMatcher(self.native, source, log_level=0)
        for step in (matcher.compute_bitmask, matcher.compute_ff_bytes):        # what fails at the first token fails here
            if not matcher.is_error():
                step()
        if matcher.stop_reason() in ("NoExtension", "NoExtensionBias") and not matcher.is_accepting():
            raise UnsupportedSchemaError("no text fits it")
        if matcher.is_error():
            raise UnsupportedSchemaError(sentence(matcher.get_error()))
        return matcher, tuple(matcher.get_grammar_warnings())

    def encode(self, text: str) -> list[int]:
        """Ids of a text that continues another one."""
        if not self.tokenizer.space_prefix:
            return self.tokenizer.encode(text, bos=False)
        guard = self.tokenizer.byte_id(ord(GUARD))
        ids = self.tokenizer.encode(GUARD + text, bos=False) if guard is not None else []
        return ids[ids.index(guard) + 1:] if guard in ids else self.native.greedy_tokenize(text)


class _Tokens:
    """The interface that LLTokenizer expects."""

    is_tokenizer_wrapper = True

    def __init__(self, vocabulary: Vocabulary):
        tokenizer = vocabulary.tokenizer
        self.eos_token_id, self.bos_token_id = vocabulary.end, tokenizer.bos_id
        self.tokens = vocabulary.pieces
        silent = {*tokenizer.vocab.silent, *vocabulary.ends}
        self.special_token_ids = sorted(id for id in silent if id < len(self.tokens))
        self._encode = vocabulary.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def sentence(text: str) -> str:
    """What llguidance says, in one line and without the state of its parser."""
    return printable(" ".join(text.partition("<state>")[0].split()) or "unknown error", 300)


def llguidance() -> Any:
    """The package, loaded when it is first used."""
    try:
        import llguidance
    except ImportError:
        raise NeedsPackageError("schemas and grammars need llguidance, which is not installed: pip install 'pybmc[schema]'") from None
    return llguidance


_known: WeakKeyDictionary[Tokenizer, Vocabulary] = WeakKeyDictionary()


def vocabulary_of(model: Model) -> Vocabulary:
    """A model's vocabulary, read once. Raises ArgumentError for a model without one."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ArgumentError(f"{model.path} has no vocabulary: it cannot follow a grammar")
    found = _known.get(tokenizer)
    if found is None:
        found = _known[tokenizer] = Vocabulary(tokenizer, model.config.vocab_size, model.path)
    return found
