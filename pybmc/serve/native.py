"""llama-server's own routes, and what lm-eval asks of a remote tokenizer."""

from __future__ import annotations

from dataclasses import replace
from math import inf

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from .. import __version__
from ..engine.sampler import Sampler
from ..engine.text import Token
from .answers import Choice, Update, one_logprob, timings_of, usage_of
from .embed import normalized, vectors
from .errors import Refused, invalid, unsupported
from .fields import Fields
from .http import Json, Sse, client_of, fields_of, in_pool, respond, service_of, writer_of
from .service import Service
from .slots import slot_of
from .tasks import (
    SAMPLING,
    Task,
    gap_prompt,
    messages_of,
    refuse_common,
    task_of,
    template_request,
    text_prompts,
    variables_of,
)


class NativeAnswer:
    """Answers to /completion, one to each prompt; a list of them where there are several. shows: whether ids are told, and
    the only fields that are, if any are named."""

    def __init__(self, service: Service, choices: list[Choice], task: Task, n_top: int, shows: tuple[bool, list[str]]):
        self.service, self.choices, self.prompts, self.sampler = service, choices, task.prompts, task.requests[0].sampler
        self.n_top, (self._ids, self._only) = n_top, shows
        self._told = [0] * len(choices)

    def begin(self) -> list[dict]:
        return []

    def take(self, update: Update) -> list[dict]:
        choice = self.choices[update.index]
        text = "".join(piece.text for piece in choice.take(update))
        chunks = []
        if text:
            new = self._new(choice)
            chunks.append({"index": choice.index, "content": text, "tokens": self._told_ids(new), "stop": False,
                           "id_slot": -1, "tokens_predicted": choice.stats.predicted_tokens,
                           "tokens_evaluated": choice.stats.prompt_tokens} | self._probabilities(new))
        if update.done:
            chunks.append(self._final(choice, "", []))
        return chunks

    def last(self) -> list[dict]:
        return []

    def whole(self):
        found = [self._final(choice, choice.texts["content"], choice.shown) for choice in self.choices]
        return found if len(found) > 1 else found[0]

    def usage(self) -> dict:
        return usage_of(self.choices)

    def _new(self, choice: Choice) -> list[Token]:
        new, self._told[choice.index] = choice.shown[self._told[choice.index]:], len(choice.shown)
        return new

    def _told_ids(self, tokens: list[Token]) -> list[int]:
        return [token.id for token in tokens] if self._ids else []

    def _probabilities(self, tokens: list[Token]) -> dict:
        if not self.n_top:
            return {}
        tokenizer = self.service.tokenizer

        def one(id: int, logprob: float) -> dict:
            return {"id": id} | one_logprob(tokenizer, id, logprob)

        return {"completion_probabilities": [
            one(token.id, token.logprob) | {"top_logprobs": [one(id, logprob) for id, logprob in token.top[:self.n_top]]}
            for token in tokens]}

    def _final(self, choice: Choice, text: str, tokens: list[Token]) -> dict:
        stats, last = choice.stats, choice.tokens[-1] if choice.tokens else None
        kind = "word" if choice.stop_string else "eos" if last and last.finish_reason == "stop" else "limit"
        prompt, ids = self.prompts[choice.index]
        found = {"index": choice.index, "content": text, "tokens": self._told_ids(tokens), "id_slot": -1, "stop": True,
                 "model": self.service.name, "tokens_predicted": stats.predicted_tokens, "tokens_evaluated": stats.prompt_tokens,
                 "generation_settings": self._settings(), "prompt": prompt,
                 "has_new_line": "\n" in choice.texts["content"], "truncated": False, "stop_type": kind,
                 "stopping_word": choice.stop_string or "",
                 "tokens_cached": len(ids) + max(stats.predicted_tokens - 1, 0),
                 "timings": timings_of(stats)} | self._probabilities(tokens)
        return {name: found[name] for name in self._only if name in found} if self._only else found

    def _settings(self) -> dict:
        return {name: getattr(self.sampler, name) for name in ("seed", *SAMPLING)} | {"n_ctx": self.service.context}


def native_task(service: Service, fields: Fields, client, prompts):
    refuse_common(fields)
    fields.flag("stream")
    most, n_top = fields.whole("n_predict", -1, -1), fields.whole("n_probs", 0, 0, 20)
    if "n_predict" not in fields:
        most = fields.whole("max_tokens", -1, -1)
    base = replace(template_request(service, fields, client, inf if most < 0 else most), top=n_top)
    only = fields.listed("response_fields")
    if not all(isinstance(name, str) for name in only):
        raise invalid("response_fields", "response_fields has something else than names")
    task = task_of(service, base, prompts, slot=slot_of(service, fields))
    return task, NativeAnswer(service, task.choices(service), task, n_top, (fields.flag("return_tokens"), only))


async def completion(request: Request) -> Response:
    service, fields = writer_of(request), await fields_of(request)

    def make():
        return native_task(service, fields, client_of(request), text_prompts(service, fields))

    task, answer = await in_pool(request, make)
    return await respond(request, task, answer, Sse(b"") if fields.flag("stream") else None)


async def infill(request: Request) -> Response:
    service, fields = writer_of(request), await fields_of(request)
    fields.refuse(("input_extra",))

    def make():
        before = fields.text("input_prefix", "") + fields.text("prompt", "")
        gap = gap_prompt(service, before, fields.text("input_suffix", ""), "input_suffix")
        return native_task(service, fields, client_of(request), [gap])

    task, answer = await in_pool(request, make)
    return await respond(request, task, answer, Sse(b"") if fields.flag("stream") else None)


async def embedding(request: Request) -> Response:
    service, fields = service_of(request), await fields_of(request)
    given = fields.get("content", fields.get("input"))
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise invalid("content", "expected content to be a text or a list of texts, none of them empty")
    rows = normalized((await vectors(service, texts))[0]).tolist()
    return Json([{"index": i, "embedding": [row]} for i, row in enumerate(rows)])


# ---- tokens and templates ----------------------------------------------------------------------------------


async def tokenize(request: Request) -> Response:
    service, fields = service_of(request), await fields_of(request)
    remote = "prompt" in fields
    text = fields.text("prompt") if remote else fields.text("content", "")
    bos = fields.flag("add_special_tokens", True) if remote else fields.flag("add_special")
    special = remote or fields.flag("parse_special", True)
    ids = await in_pool(request, lambda: service.tokenizer.encode(text, bos=bos, special=special))
    if remote:
        return Json({"tokens": ids, "count": len(ids), "max_model_len": service.context})
    if not fields.flag("with_pieces"):
        return Json({"tokens": ids})
    return Json({"tokens": [{"id": id, "piece": piece(service, id)} for id in ids]})


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
        continued = fields.flag("continue_final_message", True)
        return service.template.render(messages_of(fields), continue_final_message=continued, **variables_of(fields))

    return Json({"prompt": await in_pool(request, write)})


def token_text(service: Service, id: int | None) -> str | None:
    return None if id is None else service.tokenizer.tokens[id]


async def tokenizer_info(request: Request) -> Response:
    service = service_of(request)
    tokenizer = service.tokenizer
    pad = service.model.metadata.get("tokenizer.ggml.padding_token_id")
    pad = pad if isinstance(pad, int) and 0 <= pad < tokenizer.vocab_size else None
    return Json({"bos_token": token_text(service, tokenizer.bos_id), "eos_token": token_text(service, tokenizer.eos_id),
                 "pad_token": token_text(service, pad), "chat_template": service.template.source})


# ---- the server --------------------------------------------------------------------------------------------


async def health(request: Request) -> Response:
    return Json({"status": "ok"})


async def props(request: Request) -> Response:
    service = service_of(request)
    sampler = Sampler(**{"temperature": 0.8, **service.settings.sampling})
    params = {name: getattr(sampler, name) for name in SAMPLING}
    return Json({"default_generation_settings": {"n_ctx": service.context, "params": params},
                 "total_slots": service.settings.parallel, "model_alias": service.name, "model_path": service.name,
                 "chat_template": service.template.source, "bos_token": token_text(service, service.tokenizer.bos_id),
                 "eos_token": token_text(service, service.tokenizer.eos_id), "build_info": f"pybmc {__version__}",
                 "modalities": {"vision": False, "audio": False}})


async def metrics(request: Request) -> Response:
    if not request.scope["pybmc.metrics"]:
        raise Refused(501, "disabled", "/metrics is disabled by --no-metrics")
    return PlainTextResponse(service_of(request).metrics.text(), media_type="text/plain; version=0.0.4")


async def read_only(request: Request) -> Response:
    raise unsupported(request.url.path, "cannot be changed here")


ROUTES = [
    Route("/health", health), Route("/v1/health", health),
    Route("/props", props), Route("/props", read_only, methods=["POST"]),
    Route("/metrics", metrics), Route("/tokenizer_info", tokenizer_info),
    Route("/completion", completion, methods=["POST"]), Route("/completions", completion, methods=["POST"]),
    Route("/infill", infill, methods=["POST"]), Route("/embedding", embedding, methods=["POST"]),
    Route("/tokenize", tokenize, methods=["POST"]), Route("/detokenize", detokenize, methods=["POST"]),
    Route("/apply-template", apply_template, methods=["POST"]),
]
