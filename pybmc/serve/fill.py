"""Fill in the middle: the tokens by which a model is told what stands before and behind a gap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

NAMES = {                               # of GGUF's keys, and what such tokens are called in vocabularies
    "fim_pre": ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",
                "<|code_prefix|>"),
    "fim_suf": ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
                "<|code_suffix|>"),
    "fim_mid": ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>",
                "<|code_middle|>"),
}
FILES = {
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}


class FillTokens(NamedTuple):
    """repo and file: what stands before the names of a repository and of its files,
    where there are such tokens."""

    prefix: int
    suffix: int
    middle: int
    repo: int | None = None
    file: int | None = None


def fill_tokens(tokenizer) -> FillTokens | None:
    """A vocabulary's; None where it has not all three."""
    vocab = tokenizer.vocab
    found = [_named(vocab, f"tokenizer.ggml.{key}_token_id", names) for key, names in NAMES.items()]
    ids = [id for id in found if id is not None]
    files = [_named(vocab, f"tokenizer.ggml.{key}_token_id", names) for key, names in FILES.items()]
    return FillTokens(*ids, *files) if len(ids) == len(NAMES) else None


def _named(vocab, key: str, names: tuple[str, ...]) -> int | None:
    id = vocab.metadata.get(key)
    if isinstance(id, int) and 0 <= id < vocab.size:
        return id
    return next((vocab.ids[name] for name in names if name in vocab.ids), None)


def fill_prompt(tokenizer, tokens: FillTokens, before: str, behind: str, begun: str = "",
                extra: Sequence[tuple[str, str]] = ()) -> list[int]:
    """Ids of a text with a gap, which a model then fills. begun: how the filling begins. extra: names
    and texts of other files."""
    bos = [tokenizer.bos_id] if tokenizer.add_bos else []
    return [*bos, *_files(tokenizer, tokens, extra),
            tokens.prefix, *tokenizer.encode(before, bos=False),
            tokens.suffix, *tokenizer.encode(behind, bos=False),
            tokens.middle, *tokenizer.encode(begun, bos=False)]


def _files(tokenizer, tokens: FillTokens, extra: Sequence[tuple[str, str]]) -> list[int]:
    """Other files as models learned them: after their names, where there are tokens for that;
    else their texts alone."""
    ids: list[int] = []
    if not extra:
        return ids
    if tokens.repo is None or tokens.file is None:
        return tokenizer.encode("".join(f"{text}\n" for _, text in extra), bos=False)
    files = [(tokens.file, f"{name}\n{text}\n") for name, text in extra]
    for token, text in ((tokens.repo, "myproject\n"), *files, (tokens.file, "filename\n")):
        ids += [token, *tokenizer.encode(text, bos=False)]
    return ids
