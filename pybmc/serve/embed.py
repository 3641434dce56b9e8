"""Vectors of texts, for all routes that give them."""

from __future__ import annotations

import numpy as np

from ..engine.embed import PASS, encode_inputs, groups, pooling_kind
from ..errors import BmcError
from .errors import Refused, refusal
from .service import Service


async def vectors(service: Service, texts: list[str], truncate: bool = False) -> tuple[np.ndarray, int]:
    """float32 (len(texts), dim), and how many tokens were read. truncate: what is too long is cut; else it is
    refused. The engine makes steps between passes."""
    model, pooling = service.model, service.settings.pooling
    if pooling_kind(model, pooling) == "rank":
        raise Refused(400, "unsupported_model", f"{service.name} is a reranker: it gives scores, not embeddings")
    found: dict[int, np.ndarray] = {}
    try:
        ids = await service.in_pool(lambda: encode_inputs(model, texts, service.context, truncate))
        for group in groups(ids, min(PASS, model.pass_tokens)):
            some = [ids[i] for i in group]
            found |= zip(group, await service.worker.call(lambda: model.embed(some, False, pooling)))
    except BmcError as error:
        raise refusal(error) from None
    return np.stack([found[i] for i in range(len(ids))]), sum(map(len, ids))


def normalized(rows: np.ndarray, dimensions: int | None = None) -> np.ndarray:
    """Rows cut to some dimensions, of length 1 again."""
    cut = rows[:, :dimensions].astype(np.float64)
    lengths = np.linalg.norm(cut, axis=1, keepdims=True)
    return (cut / np.where(lengths > 0, lengths, 1)).astype(np.float32)
