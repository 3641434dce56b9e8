"""What a machine allows a model: the least time of a pass, by memory and by arithmetic, both measured now."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from pybmc.engine.bench import bytes_of_a_pass, experts_taken, is_expert

from . import lab


def weight_counts(model) -> tuple[Counter, Counter]:
    """How many weights of each type (its GGML number) a token is multiplied by in the layers' matrices,
    and in the head's."""
    layers, head, tensors = Counter(), Counter(), model._file.tensors
    for tensor in tensors.values():
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
            share = experts_taken(model, 1) if is_expert(tensor) else 1
            layers[tensor.type.id] += math.prod(tensor.shape) * share
    tensor = tensors.get("output.weight", tensors["token_embd.weight"])
    head[tensor.type.id] = math.prod(tensor.shape)
    return layers, head


@dataclass(frozen=True)
class Limits:
    """Bytes read from memory a second; weights multiplied a second from the cache, for 16 tokens,
    by type (its GGML number); and products of floats from registers, which attention needs."""

    read: float
    weights: dict[int, float]
    floats: float

    def seconds(self, model, test: str, n: int, depth: int, row_bytes: int) -> tuple[float, str]:
        """The least seconds of a pass of a test of pybmc.engine.bench,
        and whether "memory" or "kernels" set them."""
        in_a_pass, heads = (1, 1) if test == "tg" else (n, 1 if test == "pp" else n)
        layers, head = weight_counts(model)
        memory = bytes_of_a_pass(model, test, n, depth, row_bytes) / self.read
        attention = 2 * model.config.n_layers * model.config.q_dim * (depth + n / 2) * in_a_pass / self.floats
        products = ((type, times * count) for times, counts in ((in_a_pass, layers), (heads, head))
                    for type, count in counts.items())
        kernels = attention + sum(count / self.weights[type] for type, count in products)
        return max((memory, "memory"), (kernels, "kernels"))


def limits_of(model) -> Limits:
    """Measured now, in about a second: the machine may be another one in an hour."""
    layers, head = weight_counts(model)
    weights = {type: lab.arithmetic(type, model.threads) / 2 for type in layers | head}
    return Limits(lab.read_bandwidth(model.threads), weights, lab.arithmetic_rate(model.threads)[1])
