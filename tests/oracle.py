"""The forward pass of every architecture in plain float64, to hold the engine against.

    metadata, tensors = tiny.parts("qwen3")
    oracle.logits(metadata, oracle.weights(tensors), tokens)            # (n, vocab_size)

Written from the papers and GGUF's specification and not from pybmc's code: one sequence, no cache, whole
matrices. `context` is what longrope chooses its factors by. Options of Oracle are for mutations: tests switch
a part off and see that it matters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import gguf
import numpy as np
import tiny


def weights(tensors: dict) -> dict[str, np.ndarray]:
    """float64 arrays of what tiny.parts() gives; a vector has one dimension."""
    values = {name: tiny.values(kind, rows).astype(np.float64) for name, (kind, rows) in tensors.items()}
    return {name: value.reshape(-1) if kind_is_vector(name) else value for name, value in values.items()}


def kind_is_vector(name: str) -> bool:
    return "norm" in name or name.startswith("rope") or name.endswith(".bias")


def read(path) -> tuple[dict, dict[str, np.ndarray]]:
    """(metadata, weights) of a file, through the gguf package."""
    reader = gguf.GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    values = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return metadata, {name: value.astype(np.float64) for name, value in values.items()}


def logits(metadata: dict, tensors: dict, tokens, context: int | None = None, **options) -> np.ndarray:
    return Oracle(metadata, tensors, context, **options).run(np.asarray(tokens))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@dataclass
class Oracle:
    metadata: dict
    tensors: dict[str, np.ndarray]
    context: int | None = None
    rope: bool = True               # mutations from here on
    windows: bool = True
    scaling: bool = True
    swap_pairs: bool = False
    tanh_gelu: bool = True
    embedding_scale: bool = True

    @property
    def arch(self) -> str:
        return self.metadata["general.architecture"]

    def key(self, name, default=None):
        value = self.metadata.get(f"{self.arch}.{name}")
        return default if value is None else value

    def __post_init__(self):
        self.dim, self.n_heads = self.key("embedding_length"), self.key("attention.head_count")
        self.n_kv = self.key("attention.head_count_kv", self.n_heads)
        self.head_dim = self.key("attention.key_length", self.dim // self.n_heads)
        self.eps = self.key("attention.layer_norm_rms_epsilon", self.key("attention.layer_norm_epsilon"))

    # -- pieces

    def norm(self, x, name):
        weight, bias = self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias", 0)
        if self.arch == "gpt2":
            x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.eps) * weight + bias

    def linear(self, x, name):
        return x @ self.tensors[f"{name}.weight"].T + self.tensors.get(f"{name}.bias", 0)

    def act(self, x):
        if self.arch not in ("gpt2", "gemma3"):
            return silu(x)
        return gelu(x) if self.tanh_gelu else silu(x)

    def window(self, layer):
        """Rows that a token of this layer sees, itself included."""
        rows, pattern = (self.key("attention.sliding_window", 0),
                         self.key("attention.sliding_window_pattern", 6))
        if self.arch != "gemma3" or not rows or not self.windows:
            return None
        local = pattern[layer] if isinstance(pattern, list) else (layer + 1) % pattern != 0
        return rows if local else None

    # -- rotary positions

    def frequencies(self, layer):
        """(rope_dim / 2,) radians per position, and what cos and sin are multiplied by."""
        n = self.key("rope.dimension_count", self.head_dim)
        base, kind = self.key("rope.freq_base", 10000.0), self.key("rope.scaling.type")
        factor = self.key("rope.scaling.factor", 1.0)
        if self.window(layer):
            return self.key("rope.freq_base_swa", 10000.0) ** (-np.arange(0, n, 2) / n), 1.0
        freq = base ** (-np.arange(0, n, 2) / n)
        if not self.scaling:
            return freq, 1.0
        divisors, scale = self.divisors(n // 2), self.key("rope.scaling.attn_factor", 1.0)
        if kind == "linear":
            freq = freq / factor
        if kind == "yarn":
            freq, scale = self.yarn(freq, n, base, factor), scale * (1 + 0.1 * math.log(factor))
        return freq / divisors, scale

    def divisors(self, n):
        if "rope_factors_long.weight" in self.tensors:
            original = self.key("rope.scaling.original_context_length")
            long = (self.context or self.key("context_length")) > original
            return self.tensors[f"rope_factors_{'long' if long else 'short'}.weight"]
        return self.tensors.get("rope_freqs.weight", np.ones(n))

    def yarn(self, freq, n, base, factor):
        """Dimensions that turn often keep their pace, those that turn less than once are stretched;
        a ramp between."""
        trained = self.key("rope.scaling.original_context_length", self.key("context_length"))

        def dimension(turns):
            return n * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = max(math.floor(dimension(32)), 0), min(math.ceil(dimension(1)), n - 1)
        keep = [1 - min(1, max(0, (i - low) / max(0.001, high - low))) for i in range(n // 2)]
        return np.array([f * k + f / factor * (1 - k) for f, k in zip(freq, keep)])

    def turn(self, x, layer):
        """x (n, heads, head_dim) by the angle of its position."""
        if self.arch == "gpt2" or not self.rope:
            return x
        freq, scale = self.frequencies(layer)
        angle = np.arange(len(x))[:, None] * freq
        n, turned = 2 * len(freq), x.copy()
        pairs = (self.arch == "llama") != self.swap_pairs
        one, two = (slice(0, n, 2), slice(1, n, 2)) if pairs else (slice(0, n // 2), slice(n // 2, n))
        a, b = x[..., one], x[..., two]
        cos, sin = np.cos(angle)[:, None] * scale, np.sin(angle)[:, None] * scale
        turned[..., one], turned[..., two] = a * cos - b * sin, a * sin + b * cos
        return turned

    # -- the pass

    def qkv(self, x, b):
        q_dim, kv_dim = self.n_heads * self.head_dim, self.n_kv * self.head_dim
        if f"{b}.attn_qkv.weight" in self.tensors:
            q, k, v = np.split(self.linear(x, f"{b}.attn_qkv"), [q_dim, q_dim + kv_dim], -1)
        else:
            q, k, v = (self.linear(x, f"{b}.attn_{name}") for name in "qkv")
        q, k, v = (part.reshape(len(x), -1, self.head_dim) for part in (q, k, v))
        if f"{b}.attn_q_norm.weight" in self.tensors:
            q, k = self.norm(q, f"{b}.attn_q_norm"), self.norm(k, f"{b}.attn_k_norm")
        return q, k, v

    def attention(self, x, layer):
        return self.linear(self.attend(x, layer), f"blk.{layer}.attn_output")

    def attend(self, x, layer):
        b = f"blk.{layer}"
        q, k, v = self.qkv(x, b)
        q, k = self.turn(q, layer), self.turn(k, layer)
        distance = np.arange(len(x))[:, None] - np.arange(len(x))
        seen = (distance >= 0) & (distance < (self.window(layer) or len(x)))
        out = np.empty_like(q)
        for head in range(self.n_heads):
            kv = head // (self.n_heads // self.n_kv)
            scores = np.where(seen, q[:, head] @ k[:, kv].T / math.sqrt(self.head_dim), -np.inf)
            out[:, head] = softmax(scores) @ v[:, kv]
        return out.reshape(len(x), -1)

    def feed_forward(self, x, layer):
        b = f"blk.{layer}"
        up = self.linear(x, f"{b}.ffn_up")
        if self.arch == "phi3":
            gate, up = np.split(up, 2, -1)
            return self.linear(self.act(gate) * up, f"{b}.ffn_down")
        if self.arch == "gpt2":
            return self.linear(self.act(up), f"{b}.ffn_down")
        return self.linear(self.act(self.linear(x, f"{b}.ffn_gate")) * up, f"{b}.ffn_down")

    def run(self, tokens):
        x = self.tensors["token_embd.weight"][tokens]
        if self.arch == "gemma3" and self.embedding_scale:
            x = x * math.sqrt(self.dim)
        if self.arch == "gpt2":
            x = x + self.tensors["position_embd.weight"][:len(tokens)]
        for layer in range(self.key("block_count")):
            b = f"blk.{layer}"
            y = self.attention(self.norm(x, f"{b}.attn_norm"), layer)
            x = x + (self.norm(y, f"{b}.post_attention_norm") if self.arch == "gemma3" else y)
            y = self.feed_forward(self.norm(x, f"{b}.ffn_norm"), layer)
            x = x + (self.norm(y, f"{b}.post_ffw_norm") if self.arch == "gemma3" else y)
        output = self.tensors.get("output.weight", self.tensors["token_embd.weight"])
        return self.norm(x, "output_norm") @ output.T
