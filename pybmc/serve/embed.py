"""Vectors of texts, for all routes that give them."""

from __future__ import annotations

from typing import Any

import numpy as np
from starlette.requests import Request

from ..engine.embed import PASS, encode_inputs, groups, pooling_kind
from ..errors import BmcError
from .errors import Refused, refusal
from .fields import Fields
from .http import in_pool, service_of, while_here
from .service import Service
from .tasks import content_of, plain_prompt


async def vectors(request: Request, texts: list, truncate: bool = False) -> tuple[np.ndarray, int]:
    """Of texts or lists of ids: float32 (len(texts), dim), and how many tokens were read. truncate: what is
    too long is cut; else it is refused. A client that leaves ends it after the pass."""
    if pooling_of(request) == "none":
        raise Refused(400, "unsupported_parameter",
                      "without pooling there is a vector for each token; /embedding gives these")
    found, n = await vectors_of_tokens(request, texts, truncate)
    return np.stack(found), n


async def vectors_of_tokens(request: Request, texts: list,
                            truncate: bool = False) -> tuple[list[np.ndarray], int]:
    """As vectors(), in a list: without pooling these are (tokens, dim) each."""
    service = service_of(request)
    if pooling_of(request) == "rank":
        raise Refused(400, "unsupported_model",
                      f"{service.name} is a reranker: it gives scores by /rerank, and no embeddings")
    model, context = service.model, service.context
    ids = await in_pool(request, lambda: encode_inputs(model, texts, context, truncate))
    return await while_here(request, passes(service, ids)), sum(map(len, ids))


def pooling_of(request: Request) -> str:
    service = service_of(request)
    return pooling_kind(service.model, service.settings.pooling)


def text_of(given, name: str):
    """The text of an input that is an object: llama-server's prompt_string,
    or parts of a message's content. Others as they are."""
    if isinstance(given, dict) and isinstance(given.get("content"), list):
        parts: Any = content_of(Fields(given, f"{name}."), name)
        return "".join(part["text"] for part in parts)
    return plain_prompt(given, name)


async def passes(service: Service, ids: list[list[int]]) -> list[np.ndarray]:
    """Vectors of texts. The engine makes steps between passes."""
    service.check_files()
    model, pooling = service.model, service.settings.pooling
    found: dict[int, np.ndarray] = {}
    try:
        for group in groups(ids, min(PASS, model.pass_tokens)):
            some = [ids[i] for i in group]
            found |= zip(group, await service.worker.call(lambda: model.embed(some, False, pooling)))
            service.metrics.embedded(sum(map(len, some)))
    except BmcError as error:
        raise refusal(error) from None
    return [found[i] for i in range(len(ids))]


def list_of(service: Service, n: int, **rows: list) -> dict:
    """OpenAI's form of a list that n tokens were read for."""
    return {"object": "list", "model": service.name, "usage": {"prompt_tokens": n, "total_tokens": n}, **rows}


def normalized(rows: np.ndarray, dimensions: int | None = None) -> np.ndarray:
    """Rows cut to some dimensions, of length 1 again."""
    return scaled(rows[:, :dimensions])


def scaled(rows: np.ndarray, norm: int = 2) -> np.ndarray:
    """Rows of length 1 by a norm, as llama-server numbers them: -1 leaves them as they are, 0 takes the
    largest value for 32760, others are p-norms."""
    if norm == -1:
        return rows
    wide = rows.astype(np.float64)
    order = norm or np.inf
    lengths = np.linalg.norm(wide, order, axis=-1, keepdims=True) / (1 if norm else 32760)
    return (wide / np.where(lengths > 0, lengths, 1)).astype(np.float32)
