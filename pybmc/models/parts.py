"""What families of models share: blocks from the usual keys.

An architecture is a function of Reader and the number of a layer that gives the layer's blocks:

    @architecture("qwen3moe")
    def qwen3moe(k, i):
        return attention(k, i, qk_norm=True), experts(k, i)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ..errors import FormatError
from ..files.gguf import GGUF
from . import rope
from .keys import Keys
from .layers import HALVES, NO_GATE, NONE, RMS, SILU, SOFTMAX, Attention, Block, Dense, Experts


@dataclass(frozen=True)
class Architecture:
    """A row of the registry: the layer's function, and what is the model's as a whole."""

    name: str
    layer: Callable[[Reader, int], tuple[Block, ...]]
    norm: str = RMS
    rope: int = HALVES
    causal: bool = True
    embedding_scale: Callable[[Reader], float] = lambda k: 1.0
    logit_scale: Callable[[Reader], float] = lambda k: 1.0
    logit_softcap: float = 0.0          # where the key final_logit_softcapping is absent
    names: dict[str, str] = field(default_factory=dict)     # the file's names outside the layers for roles
    needs: tuple[str, ...] = ("output_norm",)
    score: str = ""                     # "rank": "first" (token, cls, tanh, cls.output), "last" (.., softmax)
    golden: str = ""                    # the golden file that holds it: NAME.TYPE.gguf; "": there is none


REGISTRY: dict[str, Architecture] = {}


def architecture(*names: str, **settings):
    """Register a layer's function for architectures of these names, each held by a golden file of its name
    unless `golden` says otherwise."""
    def register(layer):
        for name in names:
            REGISTRY[name] = Architecture(name, layer, **{"golden": name} | settings)
        return layer
    return register


class Reader(Keys):
    """The keys of a model, its numbers, and the rope tables that its layers ask for."""

    def __init__(self, file: GGUF, arch: str):
        super().__init__(file, arch)
        self.spec = REGISTRY[arch]
        self.dim = self.count("embedding_length", high=1 << 20)
        self.n_predicting = self.count("nextn_predict_layers", 0, low=0, high=1023)     # the last layers
        self.n_layers = self.count("block_count", high=1024) - self.n_predicting
        self.n_ctx = self.count("context_length")
        self.tables: list[rope.Table] = []
        self.long = False               # table 1 is table 0 for long contexts
        if self.n_layers < 1:
            raise self.error("block_count", "at least one layer besides those that predict further",
                             self.find("block_count"))

    def has(self, name: str) -> bool:
        return f"{name}.weight" in self.file.tensors or name in self.file.tensors

    def in_layer(self, i: int, name: str) -> bool:
        return self.has(f"blk.{i}.{name}")

    def file_number(self, key: str, i: int) -> float:
        """A number of the file as a whole, from -100 to 100: one for all layers, or one for each."""
        value = self.file.metadata.get(key)
        if isinstance(value, np.ndarray):
            if len(value) != self.n_layers + self.n_predicting:
                raise FormatError(f"{self.file.path}: {key}: expected one number, or one for each of "
                                  f"{self.n_layers + self.n_predicting} layers, found {len(value)}")
            value = value[i].item()
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -100 <= value <= 100:
            raise FormatError(f"{self.file.path}: {key}: expected a number from -100 to 100 for layer {i}, "
                              f"found {value!r:.60}")
        return float(value)

    def table(self, table: rope.Table) -> int:
        """The number of a rope table."""
        for number, other in enumerate(self.tables):
            if other == table:
                return number
        self.tables.append(table)
        return len(self.tables) - 1

    def head_dim(self, i: int = 0) -> int:
        """Values of a key of layer i."""
        usual = self.dim // self.count("attention.head_count", high=4096, layer=i)
        return self.count("attention.key_length", usual, high=1024)

    def sections(self) -> list[int]:
        """Parts of a position; in text they are all the same."""
        self.used.add("rope.dimension_sections")
        value = self.file.metadata.get(f"{self.arch}.rope.dimension_sections", [])
        whole = isinstance(value, (list, np.ndarray)) and all(isinstance(n, (int, np.integer)) for n in value)
        if not whole:
            raise self.error("rope.dimension_sections", "whole numbers", f"{value!r:.60}")
        return list(value)

    def window(self, i: int, period: int | None, dense_first: bool = False, default: int = 0) -> int:
        """Rows that layer i sees, 0 for all: attention.sliding_window by its pattern, flags or a period (the
        last or first is full)."""
        rows = self.count("attention.sliding_window", default, low=0)
        pattern = self.file.metadata.get(f"{self.arch}.attention.sliding_window_pattern")
        if isinstance(pattern, np.ndarray):
            self.used.add("attention.sliding_window_pattern")
            self.check_length("attention.sliding_window_pattern", pattern, i)
            return rows if pattern[i] else 0
        every = self.count("attention.sliding_window_pattern", period, low=0)
        return rows if every and (i % every > 0 if dense_first else i % every < every - 1) else 0


def ignore_rope(k: Reader) -> None:
    """For models without rope, whose files have keys of one all the same."""
    k.used |= {key.removeprefix(f"{k.arch}.") for key in k.file.metadata if key.startswith(f"{k.arch}.rope.")}


def rope_dim(k: Reader, head_dim: int, swa: bool = False) -> int:
    dim = k.count("rope.dimension_count", head_dim, low=2, high=1024)
    of_windows = k.count("rope.dimension_count_swa", dim, low=2, high=1024)
    dim = of_windows if swa else dim
    if dim % 2 or dim > head_dim:
        raise k.error("rope.dimension_count", f"an even number up to {head_dim}", dim)
    return dim


def rope_table(k: Reader, head_dim: int, window: int = 0, swa_base: float | None = None,
               swa_scaling: bool = True, magnitude=None, base_factor: float = 1.0) -> int:
    """The table of a layer. swa_base: of windowed layers where rope.freq_base_swa is absent; None for the
    other layers' base."""
    base = k.number("rope.freq_base", 10000.0, above=1.0) * base_factor
    own_base = k.number("rope.freq_base_swa", base if swa_base is None else swa_base, above=1.0)
    dim = rope_dim(k, head_dim, window > 0)
    if window and not swa_scaling:
        return k.table(rope.Table(rope.plain(own_base, dim)))
    k.count("rope.scaling.original_context_length", k.n_ctx)
    if pair := rope.long_tables(k, dim, base, k.n_ctx):
        k.long, k.tables = True, pair
        return 0
    return k.table(rope.table(k, dim, own_base if window else base, k.n_ctx, magnitude))


OWN_ROWS = ("attn_k", "attn_v", "attn_k_norm")      # of no use where a layer reads another's keys and values


def _named(*names: str | None) -> tuple[str, ...]:
    """Those of a block's norms that it has."""
    return tuple(name for name in names if name)


def attention(k: Reader, i: int, *, qk_norm: bool = False, bias: bool = False, norm: str | None = "attn_norm",
              post: str | None = None, out_norm: str | None = None, window: int = 0, rope: bool = True,
              table: int | None = None, gate: int = NO_GATE, attn_scale: float | None = None,
              source: int | None = None, values_are_keys: bool = False, **fields) -> Attention:
    """Attention with grouped heads from the usual keys; fields of Attention go through.

    qk_norm, bias: the tensors that must be there. rope=False: queries and keys of the layer do not turn;
    table: its rope table. source: the layer whose keys and values it reads; values_are_keys: attn_v may be
    absent.
    """
    n_heads = k.count("attention.head_count", high=4096, layer=i)
    n_kv_heads = k.count("attention.head_count_kv", n_heads, high=n_heads, layer=i)
    if n_heads % n_kv_heads:
        raise k.error("attention.head_count_kv", f"a divisor of {n_heads} heads", n_kv_heads)
    k_dim = k.head_dim(i)
    usual = k_dim if k.find("attention.key_length") else k.dim // n_heads
    v_dim = k.count("attention.value_length", usual, high=1024)
    if window:
        k_dim = k.count("attention.key_length_swa", k_dim, high=1024)
        v_dim = k.count("attention.value_length_swa", v_dim, high=1024)
    style = k.spec.rope if rope else NONE
    if style and table is None:
        table = rope_table(k, k_dim, window)
    needs = ("attn_q", "attn_output", "attn_k") + ("attn_v",) * (not values_are_keys)
    needs += ("attn_q_norm", "attn_k_norm") * qk_norm + ("attn_q.bias", "attn_k.bias", "attn_v.bias") * bias
    unused = () if source is None else OWN_ROWS
    return Attention(
        n_heads=n_heads, n_kv_heads=n_kv_heads, k_dim=k_dim, v_dim=v_dim,
        attn_scale=attn_scale or k_dim**-0.5, rope_style=style, rope=table or 0, window=window, gate=gate,
        source=source, norm=norm, post=post, out_norm=out_norm, unused=unused,
        needs=tuple(name for name in needs if name not in unused) + _named(norm, post, out_norm), **fields)


def dense(k: Reader, i: int, *, act: int = SILU, gated: bool = True, norm: str | None = "ffn_norm",
          post: str | None = None, out_norm: str | None = None, needs: tuple[str, ...] = (),
          **fields) -> Dense:
    """A feed-forward of feed_forward_length; gated: with a matrix of gates."""
    needs += ("ffn_up", "ffn_down") + ("ffn_gate",) * gated + _named(norm, post, out_norm)
    return Dense(hidden_dim=k.count("feed_forward_length", high=1 << 22, layer=i), act=act, gated=gated,
                 norm=norm, post=post, out_norm=out_norm, needs=needs, **fields)


def experts(k: Reader, i: int, *, gating: int = SOFTMAX, renorm: bool = True, norm: str | None = "ffn_norm",
            post: str | None = None, needs: tuple[str, ...] = (), **fields) -> Experts:
    """Experts as the keys say; gating and renorm: where the keys are absent."""
    n_experts = k.count("expert_count", high=4096)
    hidden = k.count("feed_forward_length", 0, low=0, high=1 << 22, layer=i)
    hidden = k.count("expert_feed_forward_length", hidden or None, high=1 << 22, layer=i)
    shared = _shared_dim(k, i, hidden)
    needs += ("ffn_up_shexp", "ffn_down_shexp") if shared else ()
    return Experts(
        n_experts=n_experts, n_active=k.count("expert_used_count", high=n_experts, layer=i),
        hidden_dim=hidden, shared_dim=shared,
        gating=k.count("expert_gating_func", 0, low=0, high=3) or gating,
        renorm=int(k.flag("expert_weights_norm") or renorm),
        expert_scale=k.number("expert_weights_scale", 0.0, high=1e6) or 1.0,
        expert_groups=k.count("expert_group_count", 0, low=0, high=4096),
        groups_used=k.count("expert_group_used_count", 0, low=0, high=4096),
        names={"exp_probs_b": "exp_probs_b.bias"}, norm=norm, post=post, needs=needs + _named(norm, post),
        **fields)


def _shared_dim(k: Reader, i: int, hidden: int) -> int:
    """Values of the expert that is always on: as the keys say, which have to agree with the tensors; without
    any, the tensor's."""
    stated = {key: k.count(key, -1, low=0, high=1 << 22, layer=i) if k.find(key) is not None else -1
              for key in ("expert_shared_feed_forward_length", "expert_shared_count")}
    width, count = stated.values()
    tensor = k.file.tensors.get(f"blk.{i}.ffn_up_shexp.weight")
    if tensor is not None and width < 1 > count:
        for key in (key for key, n in stated.items() if n == 0):
            raise k.error(key, f"at least 1, as there is {tensor.name}", 0)
        return tensor.shape[-1]
    return width if width > 0 else max(0, count) * hidden


def feed_forward(k: Reader, i: int, **fields) -> Block:
    """Experts where the layer has a router, an ordinary feed-forward elsewhere (the leading dense layers)."""
    routed, lead = k.in_layer(i, "ffn_gate_inp"), k.count("leading_dense_block_count", 0, low=0)
    if lead and routed == (i < lead):
        least, there = ("at most", "there") if routed else ("more than", "missing")
        raise k.error("leading_dense_block_count",
                      f"{least} {i}, as blk.{i}.ffn_gate_inp.weight is {there}", lead)
    if routed:
        return experts(k, i, **fields)
    common = {name: fields[name] for name in ("norm", "post", "act") if name in fields}
    return dense(k, i, **common)


def beside(first: Block, second: Block) -> tuple[Block, Block]:
    """Two blocks that read the same x, whose results are summed."""
    second.beside = 1
    return first, second


def sqrt_dim(k: Reader) -> float:
    return math.sqrt(k.dim)
