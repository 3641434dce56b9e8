"""Models of random weights, made in memory, whose attention is a real model's:
what the KV cache is measured with.

The layers, heads and head size are the real ones, so the arena, the kernels and the order in which they meet
are too. All other matrices are narrow, so that a pass takes milliseconds; but together they are larger than
the caches. A real model's weights pass through the caches between two visits of a layer's rows, and so do
these.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from pybmc._native import check, lib
from pybmc.engine.model import Model, _bound_roles
from pybmc.errors import ArgumentError
from pybmc.files.types import type_info
from pybmc.models.bind import Role
from pybmc.models.config import Config
from pybmc.models.layers import HALVES, Attention, Dense
from pybmc.models.rope import Table, plain

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


def _config(shape: Shape) -> Config:
    block, block_bytes = type_info(Q4_0).block_size, type_info(Q4_0).type_size
    around_attention = DIM * 2 * shape.head_dim * (shape.n_heads + shape.n_kv_heads)
    weights = WEIGHT_BYTES * block // block_bytes // shape.n_layers - around_attention
    hidden_dim = max(block, weights // (3 * DIM) // block * block)
    layer = (Attention(n_heads=shape.n_heads, n_kv_heads=shape.n_kv_heads, k_dim=shape.head_dim,
                       v_dim=shape.head_dim, attn_scale=shape.head_dim**-0.5, rope_style=HALVES,
                       norm="attn_norm"),
             Dense(hidden_dim=hidden_dim, norm="ffn_norm"))
    return Config("llama", DIM, shape.n_layers, VOCAB, N_CTX, 1e-5, [layer] * shape.n_layers,
                  [Table(plain(1e4, shape.head_dim))])


def _roles(c: Config) -> list[Role]:
    """Every layer has the same weights: what they are changes no time."""
    rng = np.random.default_rng(0)

    def matrix(n_rows: int, n_cols: int):
        blocks = np.frombuffer(bytearray(rng.bytes(n_rows * n_cols // 32 * 18)), np.uint8).reshape(-1, 18)
        blocks[:, :2] = np.full(1, 0.2 * n_cols**-0.5, np.float16).view(np.uint8)
        return type_info(Q4_0), n_rows, n_cols, blocks.reshape(-1)

    def ones():
        return type_info(F32), 1, DIM, np.ones(DIM, np.float32).view(np.uint8)

    def role(name: str, number: int, made):
        kind, n_rows, n_cols, data = made
        return Role(name, number, SimpleNamespace(type=kind), n_rows, n_cols, data)

    kv_dim = c.n_kv_heads * c.head_dim
    of_a_layer = ({"norm": ones(), "attn_q": matrix(c.q_dim, DIM), "attn_k": matrix(kv_dim, DIM),
                   "attn_v": matrix(kv_dim, DIM), "attn_output": matrix(DIM, c.q_dim)},
                  {"norm": ones(), "ffn_gate": matrix(c.hidden_dim, DIM), "ffn_up": matrix(c.hidden_dim, DIM),
                   "ffn_down": matrix(DIM, c.hidden_dim)})
    of_all = {"token_embd": matrix(VOCAB, DIM), "output_norm": ones(), "output": matrix(VOCAB, DIM)}
    layers = [role(name, number, made) for number in range(len(c.blocks))
              for name, made in of_a_layer[number % 2].items()]
    return layers + [role(name, -1, made) for name, made in of_all.items()]
