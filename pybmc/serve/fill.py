"""Fill in the middle: the tokens by which a model is told what stands before and behind a gap."""

from __future__ import annotations

from typing import NamedTuple

NAMES = {                               # of GGUF's keys, and what such tokens are called in vocabularies
    "fim_pre": ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>"),
    "fim_suf": ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>"),
    "fim_mid": ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>"),
}


class FillTokens(NamedTuple):
    prefix: int
    suffix: int
    middle: int


def fill_tokens(tokenizer) -> FillTokens | None:
    """A vocabulary's; None where it has not all three."""
    vocab = tokenizer.vocab
    found = [_named(vocab, f"tokenizer.ggml.{key}_token_id", names) for key, names in NAMES.items()]
    ids = [id for id in found if id is not None]
    return FillTokens(*ids) if len(ids) == len(NAMES) else None


def _named(vocab, key: str, names: tuple[str, ...]) -> int | None:
    id = vocab.metadata.get(key)
    if isinstance(id, int) and 0 <= id < vocab.size:
        return id
    return next((vocab.ids[name] for name in names if name in vocab.ids), None)


def fill_prompt(tokenizer, tokens: FillTokens, before: str, behind: str) -> list[int]:
    """Ids of a text with a gap, which a model then fills."""
    bos = [tokenizer.bos_id] if tokenizer.add_bos else []
    return [*bos, tokens.prefix, *tokenizer.encode(before, bos=False), tokens.suffix,
            *tokenizer.encode(behind, bos=False), tokens.middle]
