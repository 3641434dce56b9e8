"""Models of random weights, made in memory, whose attention is a real model's: what the KV cache is measured with.

The layers, heads and head size are the real ones, so the arena, the kernels and the order in which they meet are too.
All other matrices are narrow, so that a pass takes milliseconds; but together they are larger than the caches. A real
model's weights pass through the caches between two visits of a layer's rows, and so do these.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from pybmc._native import check, lib
from pybmc.engine.model import Model, _bound_roles
from pybmc.errors import ArgumentError
from pybmc.files.types import type_info
from pybmc.models import arch

DIM, VOCAB = 256, 256
WEIGHT_BYTES = 48 << 20
Q4_0, F32 = 2, 0
N_CTX = 1 << 20


@dataclass(frozen=True)
class Shape:
    """Whose attention it is; layers says how many of the real model's there are."""

    name: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    says: str


SHAPES = {shape.name: shape for shape in (
    Shape("1b-gqa", 16, 32, 8, 64, "Llama 3.2 1B: four query heads share a KV head"),
    Shape("gpt2-medium", 24, 16, 16, 64, "GPT-2 medium: every head has keys and values of its own"),
    Shape("7b-mha", 8, 32, 32, 128, "Llama 2 7B, 8 of its 32 layers: every head has its own"),
)}


class SyntheticModel(Model):
    """A Model without a file: nothing to tokenize, and logits of noise."""

    path = property(lambda self: f"synthetic {self.shape.name}")
    tokenizer = None

    def __init__(self, shape: Shape | str, threads: int | None = None):
        if isinstance(shape, str) and shape not in SHAPES:
            raise ArgumentError(f"there is no shape {shape!r}; there are {', '.join(SHAPES)}")
        self.shape = SHAPES[shape] if isinstance(shape, str) else shape
        self._begin(threads)
        self._file = SimpleNamespace(path=self.path, metadata={}, tensors={}, close=lambda: None)
        self.config = _config(self.shape)
        self._handle = _bound_roles(self.path, self.config, _roles(self.config), self.threads, mapped=False)
        check(lib.bmc_model_pack(self._handle))


def _config(shape: Shape) -> arch.Config:
    block, block_bytes = type_info(Q4_0).block_size, type_info(Q4_0).type_size
    around_attention = DIM * 2 * shape.head_dim * (shape.n_heads + shape.n_kv_heads)
    weights = WEIGHT_BYTES * block // block_bytes // shape.n_layers - around_attention
    hidden_dim = max(block, weights // (3 * DIM) // block * block)
    half = shape.head_dim // 2
    return arch.Config(
        "llama", DIM, hidden_dim, shape.head_dim, shape.n_layers, shape.n_heads, shape.n_kv_heads, VOCAB, N_CTX, 1e-5,
        shape.head_dim, 1e4, [0] * shape.n_layers, rope_mscale=[1.0], layer_rope=[0] * shape.n_layers,
        rope_freq=[(1e4 ** (-np.arange(half) / half)).astype(np.float32)])


def _roles(c: arch.Config) -> list[arch.Role]:
    """Every layer has the same weights: what they are changes no time."""
    rng = np.random.default_rng(0)

    def matrix(n_rows: int, n_cols: int):
        blocks = np.frombuffer(bytearray(rng.bytes(n_rows * n_cols // 32 * 18)), np.uint8).reshape(-1, 18)
        blocks[:, :2] = np.full(1, 0.2 * n_cols**-0.5, np.float16).view(np.uint8)
        return type_info(Q4_0), n_rows, n_cols, blocks.reshape(-1)

    def ones():
        return type_info(F32), 1, DIM, np.ones(DIM, np.float32).view(np.uint8)

    def role(name: str, layer: int, made):
        kind, n_rows, n_cols, data = made
        return arch.Role(name, layer, SimpleNamespace(type=kind), n_rows, n_cols, data)

    of_a_layer = {"attn_norm": ones(), "ffn_norm": ones(), "attn_q": matrix(c.q_dim, DIM),
                  "attn_k": matrix(c.kv_dim, DIM), "attn_v": matrix(c.kv_dim, DIM), "attn_output": matrix(DIM, c.q_dim),
                  "ffn_gate": matrix(c.hidden_dim, DIM), "ffn_up": matrix(c.hidden_dim, DIM),
                  "ffn_down": matrix(DIM, c.hidden_dim)}
    of_all = {"token_embd": matrix(VOCAB, DIM), "output_norm": ones(), "output": matrix(VOCAB, DIM)}
    return [role(name, layer, made) for layer in range(c.n_layers) for name, made in of_a_layer.items()] + \
        [role(name, -1, made) for name, made in of_all.items()]
