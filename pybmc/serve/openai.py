"""OpenAI's routes: chat, completions, embeddings and models."""

from __future__ import annotations

import base64
from dataclasses import replace
from math import inf

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..chat.calls import new_id
from .answers import ChatAnswer, Head, TextAnswer
from .embed import list_of, normalized, text_of, vectors
from .errors import invalid, no_model, unsupported, wrong
from .fields import Fields
from .http import Json, Sse, answered, fields_of, in_pool, service_of, writer_of
from .service import Service
from .tasks import (
    chat_task_of,
    check_model,
    count_of,
    gap_prompt,
    messages_of,
    prediction_of,
    refuse_common,
    template_request,
    text_prompts,
    text_task_of,
    tools_asked,
    turn_of,
    variables_of,
)


def head(service: Service, prefix: str) -> Head:
    return Head(new_id(prefix), service.name, service.fingerprint)


def most_tokens(fields: Fields, names, default: float) -> float:
    """A length by one of its names; -1 is as much as the context has room for."""
    most = next((fields.whole(name, None, -1) for name in names if name in fields), default)
    return inf if most == -1 else most


async def chat(request: Request) -> Response:
    return await answered(request, chat_task, Sse)


def chat_task(service: Service, fields: Fields, client):
    """The task of a chat request, and its answer."""
    check_model(service, fields)
    refuse_common(fields)
    n_top = fields.whole("top_logprobs", 0, 0, 20) if fields.flag("logprobs") else None
    if n_top is None and fields.get("top_logprobs"):
        raise wrong("top_logprobs", "is given without logprobs; expected logprobs to be true")
    names = ("max_completion_tokens", "max_tokens", "n_predict")
    most = most_tokens(fields, names, service.settings.max_tokens)
    base = replace(template_request(service, fields, client, most), top=n_top or 0,
                   hint=prediction_of(service, fields))
    usage, n = fields.object("stream_options").flag("include_usage"), fields.whole("n", 1, 1, 16)
    form = fields.choice("reasoning_format", ("none", "auto", "deepseek", "deepseek-legacy"), "auto")
    turn = turn_of(service, fields, split=form != "none")
    task = chat_task_of(service, fields, base, turn, n)
    return task, ChatAnswer(head(service, "chatcmpl-"), service.tokenizer, task.choices(), n_top, usage,
                            fields.flag("timings_per_token"), "prediction" in fields,
                            bool(fields.get("functions")))


async def count(request: Request) -> Response:
    """How many tokens a chat request's prompt has."""
    service, fields = writer_of(request), await fields_of(request)

    def counted() -> int:
        refuse_common(fields)
        messages, tools = messages_of(fields), tools_asked(fields)
        return count_of(service, fields, messages, tools, variables_of(service, fields))

    return Json({"object": "response.input_tokens", "input_tokens": await in_pool(request, counted)})


async def completions(request: Request) -> Response:
    return await answered(request, text_task, Sse)


def text_task(service: Service, fields: Fields, client):
    check_model(service, fields)
    refuse_common(fields)
    n_top, echo = fields.whole("logprobs", None, 0, 20), fields.flag("echo")
    if "suffix" in fields and fields["suffix"] != "":
        if echo or not isinstance(fields.get("prompt"), str):
            raise unsupported("suffix",
                              "with echo, or with prompts that are not one text, is not supported here")
        prompts = [gap_prompt(service, fields["prompt"], fields.text("suffix", ""), "suffix")]
    else:
        prompts = text_prompts(service, fields)
    most = most_tokens(fields, ("max_tokens", "n_predict"), 16)
    base = replace(template_request(service, fields, client, most), top=n_top or 0,
                   score=n_top if echo else None)
    task = text_task_of(service, fields, base, prompts, fields.whole("n", 1, 1, 16))
    return task, TextAnswer(head(service, "cmpl-"), service.tokenizer, task.choices(), prompts, n_top,
                            fields.object("stream_options").flag("include_usage"), echo,
                            fields.flag("timings_per_token"))


async def embeddings(request: Request) -> Response:
    service, fields = service_of(request), await fields_of(request)
    check_model(service, fields)
    given = fields.get("input")
    texts = [text_of(one, "input") for one in (given if isinstance(given, list) else [given])]
    if any(isinstance(text, (int, float, list)) for text in texts):
        raise wrong("input", "has token ids; expected text, since the ids may be of another vocabulary. "
                             "LangChain sends text with check_embedding_ctx_length=False")
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise invalid("input", "expected input to be a text or a list of texts, none of them empty")
    if len(texts) > 2048:
        raise wrong("input", f"has {len(texts)} texts; expected at most 2048")
    encoding = fields.choice("encoding_format", ("float", "base64"), "float")
    found, n = await vectors(request, texts)
    found = normalized(found, fields.whole("dimensions", None, 1, found.shape[1]))
    write = coded if encoding == "base64" else np.ndarray.tolist
    return Json(list_of(service, n, data=[{"object": "embedding", "index": i, "embedding": write(row)}
                                          for i, row in enumerate(found)]))


def coded(row: np.ndarray) -> str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode()


def described(service: Service, name: str) -> dict:
    config = service.model.config
    meta = {"n_vocab": service.tokenizer.vocab_size, "n_ctx_train": config.n_ctx, "n_ctx": service.context,
            "n_embd": config.dim, "n_params": service.n_params, "size": service.model._file.size}
    return {"id": name, "object": "model", "created": service.created, "owned_by": "pybmc", "meta": meta}


async def models(request: Request) -> Response:
    service = service_of(request)
    return Json({"object": "list", "data": [described(service, name) for name in service.names]})


async def one_model(request: Request) -> Response:
    service, name = service_of(request), request.path_params["id"]
    if name not in service.names:
        raise no_model(name, service.names)
    return Json(described(service, name))


ROUTES = [
    *(Route(prefix + "/chat/completions", chat, methods=["POST"]) for prefix in ("/v1", "")),
    *(Route(prefix + "/chat/completions/input_tokens", count, methods=["POST"]) for prefix in ("/v1", "")),
    Route("/v1/completions", completions, methods=["POST"]),
    *(Route(prefix + "/embeddings", embeddings, methods=["POST"]) for prefix in ("/v1", "")),
    *(Route(prefix + "/models", models) for prefix in ("/v1", "")),
    *(Route(prefix + "/models/{id:path}", one_model) for prefix in ("/v1", "")),
]
