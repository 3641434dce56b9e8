"""How likely a model finds a text that is there already."""

from __future__ import annotations

from typing import NamedTuple

from .._native import check, ffi, lib


class Score(NamedTuple):
    """A token's log-probability after the tokens before it, and the likeliest (id, log-probability) there."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Scorer:
    """The library reduces the logits: no row of them reaches Python."""

    def __init__(self, model):
        self.model = model

    def __call__(self, session, tokens: list[int], n_top: int) -> list[Score]:
        """Evaluate all tokens but the last in a claimed session; the scores of all but the first."""
        n, ids = len(tokens) - 1, ffi.new("int32_t[]", tokens)
        logprobs = ffi.new("float[]", n)
        top_ids, top = ffi.new("int32_t[]", n * n_top), ffi.new("float[]", n * n_top)
        span = ffi.new("bmc_span *", {"session": session, "tokens": ids, "n_tok": n, "want": lib.BMC_WANT_ALL,
                                      "given": ids + 1, "given_logprob": logprobs})
        if n_top == 1:                  # the best id alone needs no whole row of logits
            span.next, span.logprob = top_ids, top
        elif n_top:
            span.n_top, span.top_ids, span.top_logprobs = n_top, top_ids, top
        check(lib.bmc_eval(span, 1))
        best = list(zip(ffi.unpack(top_ids, n * n_top), ffi.unpack(top, n * n_top))) if n_top else []
        return [Score(logprobs[i], tuple(best[i * n_top:(i + 1) * n_top])) for i in range(n)]
