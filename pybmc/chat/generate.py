"""generate() and generate_batch(): an engine with one request, and one with many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

from .. import checks
from ..engine.engine import Engine
from ..engine.generate import Batch, Generation, checked_wishes, encode_text, filled, speculation_of
from ..engine.model import Model
from ..engine.request import Request
from ..engine.sampler import Sampler
from ..engine.session import Session
from ..errors import ArgumentError, ContextFullError
from ..grammar.grammar import Grammar, grammar_of
from ..spec import Speculation
from ..tokenizers import Tokenizer
from .schema import answer_schema, limited
from .template import ChatTemplate, checked_variables, template_of

Prompt = str | Iterable[int] | Iterable[Mapping]
Draft = Model | Speculation | str | PathLike | None


def generate(model: Model, prompt: Prompt, max_tokens: int | None = 256, *, session: Session | None = None,
             draft: Draft = None, spec: str = "auto", draft_max: int = 16, draft_min: int = 0,
             stop: str | Sequence[str] | None = (), stop_tokens: int | Iterable[int] | None = None,
             chat_template: Any = None, chat_template_kwargs: Mapping | None = None,
             schema: Mapping | str | bool | None = None, grammar: Grammar | str | None = None,
             reasoning_budget: int | None = None, progress: Callable[[int, int], None] | None = None,
             **settings: Any) -> Generation:
    """Continue a prompt: an iterator of Token.

    prompt     a text, a list of token ids, or a list of chat messages ({"role": .., "content": ..}).
               Where the last message is the assistant's, its content is continued
    max_tokens at most this many tokens; None: until the model ends or the context is full
    session    evaluate in this session, and keep it: what the prompt has in common with its tokens is not
               evaluated again. Without one a new session is used and closed. A generation in it ends the
               one before
    draft      a smaller model that guesses ahead, best with the same vocabulary: a Model or a path. The
               text is the same as without it, at any temperature; only the time differs
    spec       who guesses: "auto" (repetitions in the text, and the draft model if there is one, else the
               draft head if the model's file has one), "draft", "mtp" (the draft head), "ngram"
               (repetitions alone), "self" (the model itself with less attention: in long texts) or "off"
    draft_max, draft_min  bounds of the guesses in a pass; how many pay is found out while decoding
    stop       strings that end the text and are not part of it; they may name control tokens; None: none
    stop_tokens  ids that end the text, or one id; None: the vocabulary's end-of-text and end-of-turn
               tokens, (): none
    chat_template  how messages are written: a name such as "chatml", a Jinja source, a file, or a
               pybmc.chat.template.ChatTemplate; None: the model's own. A ChatTemplate may also stand
               beside ids that it made
    chat_template_kwargs  more variables for the template, such as {"enable_thinking": False}
    schema     the text is compact JSON of this JSON schema: a mapping, its text, or true for any JSON
    grammar    the text follows this grammar: GBNF with a rule `root`, Lark with a rule `start` after
               %llguidance, or a pybmc.Grammar. A thought of a model that thinks comes before and is free.
               The end of the grammar ends the text
    reasoning_budget  the most tokens of a thought, behind which its end is forced; None: any number
    progress   called with (done, total) while a prompt is evaluated
    settings   those of pybmc.Sampler: temperature, seed, top_k, top_p, min_p, repeat_penalty, ...;
               None: default

    The last Token tells why it was the last (finish_reason). The same prompt, settings and seed give the same
    text. A text that begins with the vocabulary's BOS gets no second one. Wrong arguments raise ArgumentError
    at once.
    """
    checks.settings(settings, Sampler.__dataclass_fields__, ("max_tokens", *(generate.__kwdefaults__ or ())))
    wishes = checked_wishes(model, max_tokens, stop, stop_tokens, settings)
    if session is not None and getattr(session, "model", None) is not model:
        checks.refuse("session", "a session of the same model", session)
    compiled = grammar_of(model, schema, grammar)
    budget = None if reasoning_budget is None else checks.whole("reasoning_budget", reasoning_budget)
    read = read_prompt(model.tokenizer, prompt, chat_template, chat_template_kwargs)
    speculation = speculation_of(session, model, draft, spec, draft_max, draft_min)
    wishes |= followed(compiled, model, read, budget, wishes)
    request = Request(read.tokens, session=session, progress=progress, **wishes)
    return Generation(Engine(model, parallel=1, speculation=speculation), request)


def generate_batch(model: Model, prompts: Iterable[Prompt], max_tokens: int | None = 256, *,
                   draft: Draft = None, spec: str = "auto", draft_max: int = 16, draft_min: int = 0,
                   parallel: int = 8, context: int | None = None, stop: str | Sequence[str] | None = (),
                   stop_tokens: int | Iterable[int] | None = None, chat_template: Any = None,
                   chat_template_kwargs: Mapping | None = None, schema: Mapping | str | bool | None = None,
                   grammar: Grammar | str | None = None, reasoning_budget: int | None = None,
                   **settings: Any) -> Batch:
    """Continue many prompts together: an iterator of (number of the prompt, Token), as tokens come.

    Prompts and settings are those of generate(), and so is each prompt's text. parallel: how many are written
    at a time; context: a cap on each one's rows. There are fewer guesses the more prompts share a pass: the
    next one goes to the prompt where it is likeliest to come true.
    """
    own = ("max_tokens", *(generate_batch.__kwdefaults__ or ()))
    checks.settings(settings, Sampler.__dataclass_fields__, own)
    wishes = checked_wishes(model, max_tokens, stop, stop_tokens, settings)
    parallel = checks.whole("parallel", parallel, 1)
    context = None if context is None else checks.whole("context", context, 1)
    if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
        checks.refuse("prompts", "a list of prompts", prompts)
    compiled = grammar_of(model, schema, grammar)
    budget = None if reasoning_budget is None else checks.whole("reasoning_budget", reasoning_budget)
    texts = [read_prompt(model.tokenizer, prompt, chat_template, chat_template_kwargs) for prompt in prompts]
    room = context or model.config.n_ctx
    for text in texts:
        if len(text.tokens) > room:
            raise ContextFullError(f"the prompt has {len(text.tokens)} tokens, "
                                   f"the context has room for {room}")
    speculation = speculation_of(None, model, draft, spec, draft_max, draft_min)
    engine = Engine(model, parallel=parallel, speculation=speculation)
    requests = [Request(text.tokens, context=context,
                        **wishes | followed(compiled, model, text, budget, wishes)) for text in texts]
    return Batch(engine, [engine.add(request) for request in requests])


class Read(NamedTuple):
    """A prompt's ids, the template that wrote its messages, and whether its end begins the answer."""

    tokens: list[int]
    template: ChatTemplate | None = None
    begun: bool = False


def followed(grammar: Grammar | None, model: Model, read: Read, budget: int | None, wishes: Mapping) -> dict:
    """The fields of a request that tell what its answer follows;
    the end of a grammar ends the text, whatever else does."""
    tokenizer, (tokens, template, begun) = model.tokenizer, read
    schema = answer_schema(grammar, tokenizer, tokens, template, begun)
    found = limited(schema, model, tokens, template, budget)
    ends = {"stop_ids": wishes["stop_ids"] | tokenizer.stop_ids} if grammar else {}
    return {"schema": found, "shown": template.shown if template else frozenset()} | ends


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt, chat_template: Any = None,
                  variables: Mapping | None = None) -> list[int]:
    """Token ids of a prompt, as in read_prompt()."""
    return read_prompt(tokenizer, prompt, chat_template, variables).tokens


def read_prompt(tokenizer: Tokenizer, prompt: Prompt, chat_template: Any = None,
                variables: Mapping | None = None) -> Read:
    """A prompt: a text, in which control tokens count, a list of ids, or a list of chat messages.

    chat_template and variables are for messages, as in generate().
    """
    if isinstance(prompt, (bytes, bytearray, Mapping)) or not isinstance(prompt, Iterable):
        checks.refuse("prompt", "a text, a list of token ids or a list of messages", prompt)
    items: Any = prompt if isinstance(prompt, str) else list(prompt)
    if items and isinstance(items[0], Mapping):
        template = template_of(chat_template, tokenizer)
        tokens = filled(template.encode(items, **checked_variables(variables or {})))
        return Read(tokens, template, items[-1].get("role") == "assistant")
    if isinstance(chat_template, ChatTemplate) and not isinstance(items, str) and not variables:
        return Read(encode_text(tokenizer, items), chat_template)
    if chat_template is not None or variables:
        raise ArgumentError("a chat template needs messages: expected mappings with role and content")
    return Read(encode_text(tokenizer, items))
