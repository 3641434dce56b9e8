"""Vectors of texts, for all routes that give them."""

from __future__ import annotations

import numpy as np

from ..errors import BmcError, ContextFullError
from .errors import refusal
from .service import Service


async def vectors(service: Service, texts: list[str], truncate: bool = False) -> tuple[np.ndarray, int]:
    """float32 (len(texts), dim), and how many tokens were read. truncate: what is too long is cut; else it is refused."""
    ids = await service.in_pool(lambda: [service.tokenizer.encode(text) for text in texts])
    for i, tokens in enumerate(ids):
        if len(tokens) > service.context and not truncate:
            raise refusal(ContextFullError(f"text {i} has {len(tokens)} tokens; expected at most {service.context}"))
    ids = [tokens[:service.context] for tokens in ids]
    try:
        found = await service.worker.call(lambda: service.model.embed(ids, normalize=False, pooling=service.settings.pooling))
    except BmcError as error:
        raise refusal(error) from None
    return np.asarray(found, np.float32), sum(map(len, ids))


def normalized(rows: np.ndarray, dimensions: int | None = None) -> np.ndarray:
    """Rows cut to some dimensions, of length 1 again."""
    cut = rows[:, :dimensions].astype(np.float64)
    lengths = np.linalg.norm(cut, axis=1, keepdims=True)
    return (cut / np.where(lengths > 0, lengths, 1)).astype(np.float32)
