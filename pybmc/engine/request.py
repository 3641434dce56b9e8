"""What is asked of an engine, and what it counts of each request."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field, replace
from math import inf

from .. import checks
from ..errors import ArgumentError
from .model import Model
from .sampler import Sampler, check_bias
from .schema import Schema
from .session import Session


@dataclass(frozen=True)
class Request:
    """What to write: the prompt's token ids, and how.

    stop, stop_ids: strings and ids that end the text.
    session: continue in this one, and keep it: what the prompt has in common with its tokens is not evaluated
    again. A drafter that is kept with a session does without hint.
    top: how many of the likeliest ids each token tells.
    as_drawn: those and its own log-probability are of what the sampler leaves, by which it draws.
    priority: of two that wait, the one with the higher goes first.
    context: a cap on a new session's rows.
    schema: what the text has to follow, a Schema of its own, such as Grammar.start() gives.
    progress: called with (done, total) while the prompt is read.
    client: whose request it is; clients get equal shares.
    reuse: rows of an earlier request with the same beginning may serve this one.
    score: None, or how many of the likeliest ids to tell for each token of the prompt, with the
    log-probability of the token itself (Sequence.scores).
    hint: ids that the text may repeat, as an earlier version of it: what is guessed by them changes the time,
    never the text.
    shown: ids whose names are part of the text, although they are no text, as control tokens.
    ended: called with the session of an answer that ended, which an engine that keeps rows lends until
    give_back().
    """

    tokens: Tokens[int]
    max_tokens: float = 256
    sampler: Sampler = Sampler()
    stop: Tokens[str] = ()
    stop_ids: frozenset[int] = frozenset()
    session: Session | None = None
    top: int = 0
    as_drawn: bool = False
    priority: int = 0
    context: int | None = None
    speculate: bool = True
    schema: Schema | None = None
    progress: Callable[[int, int], None] | None = None
    client: Hashable = None
    reuse: bool = True
    score: int | None = None
    hint: Tokens[int] = ()
    shown: frozenset[int] = frozenset()
    ended: Callable[[Session], None] | None = None


def checked(request: Request, model: Model) -> Request:
    """The request with plain values. Raises an ArgumentError for one that the model cannot serve."""
    model.check_writes()
    size = model.config.vocab_size
    tokens = checks.ids("tokens", request.tokens, size)
    if not tokens:
        raise ArgumentError("the prompt is empty")
    if not isinstance(request.sampler, Sampler):
        checks.refuse("sampler", "a Sampler", request.sampler)
    check_bias(request.sampler.logit_bias, size)
    if request.schema is not None and not isinstance(request.schema, Schema):
        checks.refuse("schema", "an object with mask(), accept() and forced()", request.schema)
    if request.session is not None and getattr(request.session, "model", None) is not model:
        checks.refuse("session", "a session of the same model", request.session)
    if request.max_tokens != inf:
        checks.whole("max_tokens", request.max_tokens)
    if request.context is not None:
        checks.whole("context", request.context, 1, 1 << 30)
    checks.number("priority", request.priority)
    if request.score is not None:
        checks.whole("score", request.score, 0, size)
    stop_ids = frozenset(checks.ids("stop_ids", request.stop_ids, size))
    return replace(request, tokens=tokens, stop=checks.strings("stop", request.stop), stop_ids=stop_ids,
                   hint=checks.ids("hint", request.hint, size), top=checks.whole("top", request.top, 0, size))


@dataclass
class Stats:
    """Counts and seconds of a generation. The first token comes with the prompt: its time is the prompt's."""

    prompt_tokens: int = 0
    reused_tokens: int = 0          # of the prompt: already in the session
    prompt_s: float = 0.0
    predicted_tokens: int = 0
    predicted_s: float = 0.0
    draft_n: int = 0                # guesses that were verified
    draft_n_accepted: int = 0
    rounds: int = 0                 # passes after the prompt
    draft_s: float = 0.0            # of predicted_s: guessing and verifying
    verify_s: float = 0.0
    plain_s: float = 0.0            # what plain decoding would have taken, as far as is known
    lengths: dict[int, int] = field(default_factory=dict)       # guesses in a pass -> how many passes

    @property
    def mean_k(self) -> float:
        return self.draft_n / self.rounds if self.rounds else 0.0

    @property
    def plain_tok_s(self) -> float:
        """What plain decoding would have given, as far as is known; 0 without guesses."""
        return (self.predicted_tokens - 1) / self.plain_s if self.plain_s else 0.0

    @property
    def accepted_share(self) -> float:
        return self.draft_n_accepted / self.draft_n if self.draft_n else 0.0

    @property
    def prompt_tok_s(self) -> float:
        return (self.prompt_tokens - self.reused_tokens) / self.prompt_s if self.prompt_s else 0.0

    @property
    def predicted_tok_s(self) -> float:
        return (self.predicted_tokens - 1) / self.predicted_s if self.predicted_s else 0.0
