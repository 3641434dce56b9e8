"""llama-server's own routes, and what lm-eval asks of a remote tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import exp, inf, isfinite
from pathlib import Path
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from .. import __version__
from ..chat import tools
from ..chat.events import Content
from ..engine.sampler import Sampler
from ..engine.text import Token
from .answers import Answers, Choice, Update, one_logprob, progress_of, timings_of
from .embed import pooling_of, scaled, text_of, vectors_of_tokens
from .errors import Refused, invalid, unsupported, wrong
from .fields import Fields
from .http import Bare, Json, answered, body_of, fields_of, in_pool, service_of, writer_of
from .service import Service
from .tasks import (
    SAMPLING,
    Task,
    blaming,
    gap_prompt,
    messages_of,
    refuse_common,
    several,
    template_request,
    text_prompts,
    text_task_of,
    tools_asked,
    turns_of,
    variables_of,
)

NEW_SEED = (1 << 32) - 1                # what llama-server says of a seed that is a new one each time


@dataclass(frozen=True)
class Shown:
    """What an answer to /completion tells besides its text.

    n_top: likeliest ids with each token; as_drawn: with the probabilities by which it was drawn, not the
    model's. settings: how it was asked for. ids: of tokens. only: paths of the only fields of a whole answer,
    if any are named. per_token: chunks have timings.
    """

    n_top: int
    settings: dict
    ids: bool
    only: tuple[str, ...]
    per_token: bool
    as_drawn: bool = False


class NativeAnswer(Answers):
    """Answers to /completion; a list of them where there are several."""

    def __init__(self, service: Service, choices: list[Choice], task: Task, shown: Shown):
        super().__init__(choices, task.n)
        self.service, self.task, self.shown = service, task, shown

    def take(self, update: Update) -> list[dict]:
        choice = self.choices[update.index]
        text = "".join(event.text for event in choice.take(update) if isinstance(event, Content))
        progress = progress_of(choice, update, self.shown.per_token)
        chunks = [self._chunk(choice, "", []) | told for told in progress]
        if text:
            chunks.append(self._chunk(choice, text, choice.news()))
        if update.done:
            chunks.append(self._final(choice, "", []))
        return chunks

    def whole(self):
        found = [self._final(choice, choice.content, choice.shown) for choice in self.choices]
        return found if len(found) > 1 else found[0]

    def _chunk(self, choice: Choice, text: str, tokens: list[Token]) -> dict:
        """A piece of a stream; the ids of its tokens are always there."""
        timings = {"timings": timings_of(choice.stats)} if self.shown.per_token else {}
        return {"index": choice.index, "content": text, "tokens": [token.id for token in tokens],
                "stop": False, "id_slot": -1, "tokens_predicted": choice.stats.predicted_tokens,
                "tokens_evaluated": choice.stats.prompt_tokens} | self._probabilities(tokens) | timings

    def _probabilities(self, tokens: list[Token]) -> dict:
        n_top, tokenizer, drawn = self.shown.n_top, self.service.tokenizer, self.shown.as_drawn
        if not n_top or not tokens:
            return {}

        def one(id: int, logprob: float) -> dict:
            found = {"id": id} | one_logprob(tokenizer, id, logprob)
            if drawn:
                del found["logprob"]
                found["prob"] = exp(logprob)
            return found

        def likeliest(token: Token) -> list[dict]:
            return [one(id, logprob) for id, logprob in token.top[:n_top] if isfinite(logprob) or not drawn]

        name = "top_probs" if drawn else "top_logprobs"
        return {"completion_probabilities": [one(token.id, token.logprob) | {name: likeliest(token)}
                                             for token in tokens]}

    def _final(self, choice: Choice, text: str, tokens: list[Token]) -> dict:
        stats, last = choice.stats, choice.tokens[-1] if choice.tokens else None
        kind = "word" if choice.stop_string else "eos" if last and last.finish_reason == "stop" else "limit"
        ids = self.task.prompts[choice.index // self.task.n][1]
        found = {"index": choice.index, "content": text, "id_slot": -1, "stop": True,
                 "tokens": [token.id for token in tokens if self.shown.ids], "model": self.service.name,
                 "tokens_predicted": stats.predicted_tokens, "tokens_evaluated": stats.prompt_tokens,
                 "generation_settings": self.shown.settings,
                 "prompt": self.service.tokenizer.decode(ids, special=True),
                 "has_new_line": "\n" in choice.content, "truncated": False, "stop_type": kind,
                 "stopping_word": choice.stop_string or "",
                 "tokens_cached": len(ids) + max(stats.predicted_tokens - 1, 0),
                 "timings": timings_of(stats)} | self._probabilities(tokens)
        return picked(found, self.shown.only) if self.shown.only else found


def picked(found: dict, paths: Iterable[str]) -> dict:
    """The fields that some paths name, as in timings/prompt_n, under these paths;
    what is not there is left out."""
    values = {}
    for path in paths:
        value: Any = found
        for name in path.split("/"):
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            values[path] = value
    return values


def settings_of(sampler: Sampler, context: int) -> dict:
    """A sampler's settings under llama-server's names. A bias of null bans a token."""
    bias = [{"token": id, "bias": finite_or_none(value)} for id, value in sampler.logit_bias.items()]
    settings = {name: getattr(sampler, name) for name in ("seed", *SAMPLING)}
    return settings | {"n_ctx": context, "logit_bias": bias}


def finite_or_none(value: float) -> float | None:
    return value if isfinite(value) else None


def native_task(service: Service, fields: Fields, client, prompts):
    refuse_common(fields, but="post_sampling_probs")
    most = next((fields.whole(name, -1, -1) for name in ("n_predict", "max_tokens") if name in fields), -1)
    n_top, as_drawn = fields.whole("n_probs", 0, 0, 20), fields.flag("post_sampling_probs")
    base = template_request(service, fields, client, inf if most < 0 else most)
    base = replace(base, top=n_top, as_drawn=as_drawn)
    only = fields.listed("response_fields")
    if not all(isinstance(name, str) for name in only):
        raise wrong("response_fields", "has something else than names")
    flags = ("stream", "ignore_eos", "timings_per_token", "return_tokens", "post_sampling_probs")
    settings = settings_of(base.sampler, service.context) | {name: fields.flag(name) for name in flags} | {
        "n_predict": most, "max_tokens": most, "n_probs": n_top, "stop": list(base.stop)}
    n = fields.whole("n_cmpl", fields.whole("n", 1, 1, 16), 1, 16)
    task = text_task_of(service, fields, base, prompts, n)
    shown = Shown(n_top, settings, fields.flag("return_tokens"), tuple(only),
                  fields.flag("timings_per_token"), as_drawn)
    return task, NativeAnswer(service, task.choices(), task, shown)


async def completion(request: Request) -> Response:
    return await answered(request, completion_task, Bare)


def completion_task(service: Service, fields: Fields, client):
    return native_task(service, fields, client, text_prompts(service, fields))


async def infill(request: Request) -> Response:
    return await answered(request, infill_task, Bare)


def infill_task(service: Service, fields: Fields, client):
    extra = [_file(Fields(chunk, f"input_extra[{i}].") if isinstance(chunk, dict) else None, i)
             for i, chunk in enumerate(fields.listed("input_extra", 1024))]
    gap = gap_prompt(service, fields.text("input_prefix", ""), fields.text("input_suffix", ""),
                     "input_suffix", fields.text("prompt", ""), extra)
    return native_task(service, fields, client, [gap])


def _file(chunk: Fields | None, i: int) -> tuple[str, str]:
    """Name and text of another file that the filling may need."""
    if chunk is None or "text" not in chunk:
        raise wrong(f"input_extra[{i}]", "has no text; expected an object with text and filename")
    return chunk.text("filename", "file"), chunk.text("text", "")


async def embedding(request: Request) -> Response:
    fields = await fields_of(request)
    inputs = [text_of(one, "content") for one in several(fields.get("content", fields.get("input")))]
    if not inputs or not all(isinstance(one, (str, list)) and one for one in inputs):
        raise invalid("content",
                      "expected content to be a text, token ids, or a list of either, none of them empty")
    found, _ = await vectors_of_tokens(request, inputs)
    norm = fields.whole("embd_normalize", -1 if pooling_of(request) == "none" else 2, -1, 32)
    return Json([{"index": i, "embedding": scaled(np.atleast_2d(rows), norm).tolist()}
                 for i, rows in enumerate(found)])


# ---- tokens and templates ----------------------------------------------------------------------------------


async def tokenize(request: Request) -> Response:
    service, fields = service_of(request), await fields_of(request)
    remote = "prompt" in fields
    text = fields.text("prompt") if remote else fields.text("content", "")
    bos = fields.flag("add_special_tokens", True) if remote else fields.flag("add_special")
    special = remote or fields.flag("parse_special", True)
    with_pieces = fields.flag("with_pieces")

    def encode() -> dict:
        ids = service.tokenizer.encode(text, bos=bos, special=special)
        if remote:
            return {"tokens": ids, "count": len(ids), "max_model_len": service.context}
        return {"tokens": [{"id": id, "piece": piece(service, id)} for id in ids] if with_pieces else ids}

    return Json(await in_pool(request, encode))


def piece(service: Service, id: int) -> str | list[int]:
    """A token's text, or its bytes where it is none."""
    found = service.tokenizer.piece(id)
    try:
        return found.decode()
    except UnicodeDecodeError:
        return list(found)


async def detokenize(request: Request) -> Response:
    service, fields = service_of(request), await fields_of(request)
    ids = fields.listed("tokens")
    text = await in_pool(request, lambda: service.tokenizer.decode(ids, special=True))
    return Json({"content": text, "prompt": text})


async def apply_template(request: Request) -> Response:
    service, fields = writer_of(request), await fields_of(request)

    def write() -> str:
        refuse_common(fields)
        messages = messages_of(fields)
        turns = turns_of(fields, messages)
        with blaming():
            messages, more = tools.written(tools.format_of(service.template), messages, tools_asked(fields))
        return service.template.render(messages, **turns, **variables_of(service, fields) | more)

    return Json({"prompt": await in_pool(request, write)})


def token_text(service: Service, id: int | None) -> str | None:
    return None if id is None else service.tokenizer.tokens[id]


async def tokenizer_info(request: Request) -> Response:
    service = service_of(request)
    tokenizer = service.tokenizer
    pad = service.model.metadata.get("tokenizer.ggml.padding_token_id")
    pad = pad if isinstance(pad, int) and 0 <= pad < tokenizer.vocab_size else None
    return Json({"bos_token": token_text(service, tokenizer.bos_id),
                 "eos_token": token_text(service, tokenizer.eos_id),
                 "pad_token": token_text(service, pad), "chat_template": service.template.source})


# ---- the server --------------------------------------------------------------------------------------------


async def health(request: Request) -> Response:
    return Json({"status": "ok"})


async def props(request: Request) -> Response:
    service = service_of(request)
    sampler = Sampler(**{"temperature": 0.8, **service.settings.sampling})
    seed = service.settings.sampling.get("seed", NEW_SEED)
    settings = settings_of(sampler, service.context)
    params = settings | {"seed": seed, "n_predict": -1, "max_tokens": -1, "stop": []}
    return Json({"default_generation_settings": {"n_ctx": service.context, "params": params},
                 "is_sleeping": False, "total_slots": service.settings.parallel, "model_alias": service.name,
                 "model_path": Path(service.model.path).name,
                 "chat_template": service.template.source,
                 "bos_token": token_text(service, service.tokenizer.bos_id),
                 "eos_token": token_text(service, service.tokenizer.eos_id),
                 "build_info": f"pybmc {__version__}", "modalities": {"vision": False, "audio": False}})


async def metrics(request: Request) -> Response:
    if not request.scope["pybmc.policy"].metrics:
        raise Refused(501, "disabled", "/metrics is disabled by --no-metrics")
    service = service_of(request)
    return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4",
                             headers={"Process-Start-Time-Unix": str(service.created)})


async def adapters(request: Request) -> Response:
    """LoRA's: there are none, so that none can be scaled."""
    if request.method == "POST":
        body = await body_of(request)
        if body.strip() not in (b"[]", b""):
            raise unsupported("lora", "is not supported here: there are no adapters")
        return Json({"success": True})
    return Json([])


async def read_only(request: Request) -> Response:
    raise unsupported(request.url.path, "cannot be changed here")


ROUTES = [
    Route("/health", health), Route("/v1/health", health),
    Route("/props", props), Route("/props", read_only, methods=["POST"]),
    Route("/lora-adapters", adapters, methods=["GET", "POST"]), Route("/metrics", metrics),
    Route("/tokenizer_info", tokenizer_info),
    Route("/completion", completion, methods=["POST"]), Route("/completions", completion, methods=["POST"]),
    Route("/infill", infill, methods=["POST"]), Route("/embedding", embedding, methods=["POST"]),
    Route("/tokenize", tokenize, methods=["POST"]), Route("/detokenize", detokenize, methods=["POST"]),
    Route("/apply-template", apply_template, methods=["POST"]),
]
