"""What a layer is: one to three blocks, each a row of numbers for the library.

A block is x += block(norm(x)). Fields have the names and meanings of `bmc_block` (native/bmc.h); those that
only Python reads stand in Block. `norm`, `post`, `sum_norm` and `out_norm` are names of the file's tensors,
None for no such norm.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

RMS, LAYER = "rms", "layer"
NONE, PAIRS, HALVES = 0, 1, 2                                           # enum bmc_rope
SILU, GELU, RELU, RELU2, XIELU, SWIGLU_OAI = range(6)                   # enum bmc_act
NO_GATE, GATE_IN_QUERY, GATE_SIGMOID, GATE_SOFTPLUS = range(4)          # enum bmc_gate
SOFTMAX, SIGMOID, CHOSEN = 1, 2, 3                                      # enum bmc_gating
NORMED, LAYER_INPUT, SCALED = range(3)                                  # enum bmc_route

NORMS = ("norm", "post_norm", "sum_norm", "out_norm")                   # roles in every block


@dataclass(kw_only=True)
class Block:
    kind: ClassVar[str]                 # of enum bmc_kind
    norm: str | None = None             # of what the block reads
    post: str | None = None             # of its result
    sum_norm: str | None = None         # of the sum of blocks side by side
    out_norm: str | None = None         # of x after the sum
    names: dict[str, str] = field(default_factory=dict)     # other names of the file for roles
    needs: tuple[str, ...] = ()         # tensors that must be there beyond those that the library asks for
    outside: tuple[str, ...] = ()       # roles that are tensors of the file outside the layers
    unused: tuple[str, ...] = ()        # roles that it leaves, though the file may have such tensors
    beside: int = 0
    scale: float = 1.0
    sum_scale: float = 1.0

    def sizes(self) -> dict[str, int]:
        """Rows of the parts of fused tensors, by role."""
        return {}

    def rows(self, name: str) -> dict[str, np.ndarray]:
        """Which rows of a tensor of this name are which roles', where they are not in one piece."""
        return {}

    def role(self, name: str) -> str:
        """The role of a tensor of the layer, by its name without "blk.N." and ".weight"; "": none here."""
        stem, dot, tail = name.partition(".")
        norms = dict(zip((self.norm, self.post, self.sum_norm, self.out_norm), NORMS))
        if stem not in norms and stem in NORMS:
            return ""                   # a name of the file that is a role's by chance
        return self.names.get(name) or norms.get(stem, stem) + dot + tail


@dataclass(kw_only=True)
class Attention(Block):
    kind = "ATTENTION"
    n_heads: int
    n_kv_heads: int
    k_dim: int
    v_dim: int
    attn_scale: float
    rope_style: int = NONE
    rope: int = 0
    rope_late: int = 0
    window: int = 0
    gate: int = NO_GATE
    v_norm: int = 0
    kv_from: int = 0                    # counted from `source` when all blocks are known
    source: int | None = None           # the layer whose keys and values this one reads
    attn_softcap: float = 0.0
    alibi: float = 0.0
    scale_ctx: int = 0
    scale_log: float = 0.0

    @property
    def q_dim(self) -> int:
        return self.n_heads * self.k_dim

    @property
    def row_values(self) -> int:
        """Values of keys and values that a token adds to the cache."""
        return 0 if self.source is not None else self.n_kv_heads * (self.k_dim + self.v_dim)

    def sizes(self) -> dict[str, int]:
        return {"attn_q": self.q_dim * (2 if self.gate == GATE_IN_QUERY else 1),
                "attn_k": self.n_kv_heads * self.k_dim, "attn_v": self.n_kv_heads * self.v_dim}


@dataclass(kw_only=True)
class Dense(Block):
    kind = "DENSE"
    hidden_dim: int
    act: int = SILU
    act_param: tuple[float, ...] = ()
    gated: bool = True
    sparsity: float = 0.0

    def sizes(self) -> dict[str, int]:
        return {"ffn_gate": self.hidden_dim, "ffn_up": self.hidden_dim}


@dataclass(kw_only=True)
class Experts(Block):
    kind = "EXPERTS"
    n_experts: int
    n_active: int
    hidden_dim: int
    gating: int = SOFTMAX
    renorm: int = 1
    expert_scale: float = 1.0
    expert_groups: int = 0
    groups_used: int = 0
    shared_dim: int = 0
    latent_dim: int = 0
    act: int = SILU
    route: int = NORMED


@dataclass(kw_only=True)
class PerLayer(Block):
    kind = "PER_LAYER"
    per_layer: int
    act: int = GELU
    n_altup: int = 0
    others: int = 0


@dataclass(kw_only=True)
class Laurel(Block):
    kind = "LAUREL"
    hidden_dim: int                     # the rank


@dataclass(kw_only=True)
class AltUp(Block):
    n_altup: int


class AltUpBegin(AltUp):
    kind = "ALTUP_BEGIN"


class AltUpPredict(AltUp):
    kind = "ALTUP_PREDICT"


class AltUpCorrect(AltUp):
    kind = "ALTUP_CORRECT"


class AltUpEnd(AltUp):
    kind = "ALTUP_END"


@dataclass(kw_only=True)
class Mla(Block):
    kind = "MLA"
    n_heads: int
    k_dim: int                          # of a query, rope included
    v_dim: int
    attn_scale: float
    q_rank: int
    kv_rank: int
    rope_dim: int
    rope_style: int = PAIRS
    rope: int = 0
    n_kv_heads: int = 1

    @property
    def q_dim(self) -> int:
        return self.n_heads * self.k_dim

    @property
    def row_values(self) -> int:
        """Values that a token adds to the cache: [c | r], whose c is the value too."""
        return self.kv_rank + self.rope_dim


@dataclass(kw_only=True)
class DeltaNet(Block):
    kind = "DELTA_NET"
    conv: int
    state_dim: int
    n_groups: int                       # heads of keys
    n_heads: int                        # heads of values
    inner_dim: int
    interleaved: int = 0

    def rows(self, name: str) -> dict[str, np.ndarray]:
        """Files of qwen3next have a group's rows side by side: queries, keys, values and gates in ssm_in,
        betas and alphas in ssm_ba."""
        values = self.inner_dim // self.n_groups
        if name == "ssm_in":
            q, k, v, gate = self._parts(self.state_dim, self.state_dim, values, values)
            return {"attn_qkv": np.concatenate([q, k, v]), "attn_gate": gate}
        if name == "ssm_ba":
            each = self.n_heads // self.n_groups
            return dict(zip(("ssm_beta", "ssm_alpha"), self._parts(each, each)))
        return {}

    def _parts(self, *sizes: int) -> list[np.ndarray]:
        """Of rows that every group has in parts of these sizes: the rows of each part, of all groups."""
        rows = np.arange(self.n_groups * sum(sizes)).reshape(self.n_groups, -1)
        return [part.ravel() for part in np.split(rows, np.cumsum(sizes)[:-1], axis=1)]


@dataclass(kw_only=True)
class Mamba2(Block):
    kind = "MAMBA2"
    conv: int
    state_dim: int
    n_groups: int
    n_heads: int
    inner_dim: int


@dataclass(kw_only=True)
class ShortConv(Block):
    kind = "SHORT_CONV"
    conv: int
