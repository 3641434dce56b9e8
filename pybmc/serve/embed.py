"""Vectors of texts, for all routes that give them."""

from __future__ import annotations

import numpy as np
from starlette.requests import Request

from ..engine.embed import PASS, encode_inputs, groups, pooling_kind
from ..errors import BmcError
from .errors import Refused, refusal
from .http import in_pool, service_of, while_here
from .service import Service


async def vectors(request: Request, texts: list[str], truncate: bool = False) -> tuple[np.ndarray, int]:
    """float32 (len(texts), dim), and how many tokens were read. truncate: what is too long is cut; else it is
    refused. A client that leaves ends it after the pass."""
    service = service_of(request)
    if pooling_kind(service.model, service.settings.pooling) == "rank":
        raise Refused(400, "unsupported_model", f"{service.name} is a reranker: it gives scores, not embeddings")
    model, context = service.model, service.context
    ids = await in_pool(request, lambda: encode_inputs(model, texts, context, truncate))
    return await while_here(request, passes(service, ids)), sum(map(len, ids))


async def passes(service: Service, ids: list[list[int]]) -> np.ndarray:
    """Vectors of texts. The engine makes steps between passes."""
    model, pooling = service.model, service.settings.pooling
    found: dict[int, np.ndarray] = {}
    try:
        for group in groups(ids, min(PASS, model.pass_tokens)):
            some = [ids[i] for i in group]
            found |= zip(group, await service.worker.call(lambda: model.embed(some, False, pooling)))
    except BmcError as error:
        raise refusal(error) from None
    return np.stack([found[i] for i in range(len(ids))])


def normalized(rows: np.ndarray, dimensions: int | None = None) -> np.ndarray:
    """Rows cut to some dimensions, of length 1 again."""
    cut = rows[:, :dimensions].astype(np.float64)
    lengths = np.linalg.norm(cut, axis=1, keepdims=True)
    return (cut / np.where(lengths > 0, lengths, 1)).astype(np.float32)
