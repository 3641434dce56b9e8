"""A query and a document as the one text that a reranker scores."""

from __future__ import annotations

import re

from ..tokenizers import Tokenizer

TEMPLATE = "tokenizer.chat_template.rerank"             # of files whose rerankers are chat models
# Vocabularies whose separator stands twice between two texts, whatever the file says.
DOUBLED = ("roberta-bpe", "jina-v1-en", "jina-v2-code")
_PLACE = re.compile(r"\{(query|document)\}")


def pair_ids(tokenizer: Tokenizer, query: str, document: str) -> list[int]:
    """[CLS] query [SEP] document [SEP], with the tokens that the file has for these; or what the file's
    template says. Neither text spells a control token."""
    template = tokenizer.vocab.get(TEMPLATE, str)
    if template is not None:
        given, split = {"query": query, "document": document}, tokenizer.vocab.split

        def filled(part: str) -> list[str | int]:
            return split(_PLACE.sub(lambda found: given[found[1]], part), False)

        return tokenizer.encode_parts(piece for part in split(template, True)
                                      for piece in (filled(part) if isinstance(part, str) else [part]))
    first, second = tokenizer.encode(query), tokenizer.encode(document)
    return [*first, *_between(tokenizer), *second[tokenizer.add_bos:]]


def _between(tokenizer: Tokenizer) -> list[int]:
    """The separator where the end of the first text is not enough,
    as in RoBERTa's <s> query </s></s> document </s>."""
    vocab = tokenizer.vocab
    doubled = (vocab.get("tokenizer.ggml.add_sep_token", bool, False)
               or vocab.get("tokenizer.ggml.pre", str) in DOUBLED)
    return [tokenizer.sep_id] if doubled and tokenizer.add_eos and tokenizer.sep_id is not None else []
