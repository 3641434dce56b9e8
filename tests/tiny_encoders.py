"""Tiny encoders with random weights, and their forward pass in plain float64.

tiny_encoders.model("bert")                          a path
metadata, tensors = tiny_encoders.parts("modern-bert")
tiny_encoders.hidden(metadata, oracle.weights(tensors), tokens)         # (n, dim), written from the papers
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import oracle
import tiny

ARCHITECTURES = ("bert", "jina-bert-v2", "modern-bert")
DIM, HIDDEN, HEADS, EPS, WINDOW = 64, 96, 4, 1e-5, 20


def vocabulary(size: int) -> dict:
    """WordPiece: control tokens, letters in both places, and a few words."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    tokens = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *letters,
        *(f"▁{c}" for c in letters + ".,!?'\""),
        "▁the",
        "▁mouse",
        "▁mill",
    ]
    tokens += [f"▁unused{i}" for i in range(size - len(tokens))]
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 5 + [1] * (size - 5),
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.cls_token_id": 2,
        "tokenizer.ggml.seperator_token_id": 3,
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.token_type_count": 2,
    }


def parts(
    arch: str = "bert",
    n_layers: int = 2,
    vocab_size: int = 160,
    n_ctx: int = 2048,
    pooling: int | None = 1,
    types: str = "F16",
    seed: int = 0,
):
    """metadata and tensors, as tiny.parts() gives them."""
    modern = arch == "modern-bert"
    metadata = {
        "general.architecture": arch,
        "general.name": "tiny",
        f"{arch}.context_length": n_ctx,
        f"{arch}.embedding_length": DIM,
        f"{arch}.block_count": n_layers,
        f"{arch}.feed_forward_length": HIDDEN,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.layer_norm_epsilon": EPS,
        f"{arch}.attention.causal": False,
        f"{arch}.pooling_type": pooling,
    }
    if modern:
        metadata |= {
            f"{arch}.attention.sliding_window": WINDOW,
            f"{arch}.rope.freq_base": 160000.0,
            f"{arch}.rope.freq_base_swa": 10000.0,
        }
    make = tiny._Tensors(np.random.default_rng([seed, *arch.encode()]), types)
    make.matrix("token_embd", vocab_size, DIM, 3 * DIM**-0.5)
    make.norm("token_embd_norm", DIM, bias=not modern)
    if not modern:
        make.matrix("token_types", 2, DIM, type="F32")
    if arch == "bert":
        make.matrix("position_embd", n_ctx, DIM, DIM**-0.5, type="F32")
    for i in range(n_layers):
        _layer(make, f"blk.{i}.", arch, first=i == 0)
    if modern:
        make.norm("output_norm", DIM)
    return metadata | vocabulary(vocab_size), make.made


def _layer(make, b: str, arch: str, first: bool) -> None:
    modern = arch == "modern-bert"
    shapes = {"attn_output": (DIM, DIM), "ffn_down": (DIM, HIDDEN)}
    if modern:
        shapes |= {"attn_qkv": (3 * DIM, DIM), "ffn_up": (2 * HIDDEN, DIM)}
    else:
        shapes |= {name: (DIM, DIM) for name in ("attn_q", "attn_k", "attn_v")} | {"ffn_up": (HIDDEN, DIM)}
    if arch == "jina-bert-v2":
        shapes["ffn_gate"] = HIDDEN, DIM
    for name, shape in shapes.items():
        make.matrix(b + name, *shape)
        if not modern and name != "ffn_gate":
            make.vector(f"{b}{name}.bias", shape[0])
    for name in (
        (() if modern and first else ("attn_norm",)) + ("ffn_norm",)
        if modern
        else ("attn_output_norm", "layer_output_norm")
    ):
        make.norm(b + name, DIM, bias=not modern)


@lru_cache(maxsize=None)
def model(arch: str = "bert", **settings) -> Path:
    """A file with parts(), written once per process and removed at its end."""
    return tiny.save(tiny.folder() / f"{arch}-{model.cache_info().misses}.gguf", *parts(arch, **settings))


# ---- float64


def hidden(metadata: dict, w: dict, tokens, window: int = WINDOW, alibi: bool = True) -> np.ndarray:
    """What is pooled."""
    arch, n = metadata["general.architecture"], len(tokens)
    x = w["token_embd.weight"][tokens]
    if arch != "modern-bert":
        x = x + w["token_types.weight"][0]
    if arch == "bert":
        x = x + w["position_embd.weight"][:n]
    x = norm(x, w, "token_embd_norm")
    for i in range(metadata[f"{arch}.block_count"]):
        b = f"blk.{i}."
        if arch == "modern-bert":
            x = x + attention(
                norm(x, w, b + "attn_norm") if i else x,
                w,
                b,
                window=window if i % 3 else 0,
                base=1e4 if i % 3 else 160000.0,
            )
            gate, up = np.split(linear(norm(x, w, b + "ffn_norm"), w, b + "ffn_up"), 2, axis=-1)
            x = x + linear(oracle.gelu(gate) * up, w, b + "ffn_down")
        else:
            x = norm(x + attention(x, w, b, alibi=alibi and arch != "bert"), w, b + "attn_output_norm")
            up = linear(x, w, b + "ffn_up")
            up = up * oracle.gelu(linear(x, w, b + "ffn_gate")) if arch == "jina-bert-v2" else oracle.gelu(up)
            x = norm(x + linear(up, w, b + "ffn_down"), w, b + "layer_output_norm")
    return norm(x, w, "output_norm") if arch == "modern-bert" else x


def norm(x, w, name):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * w[f"{name}.weight"] + w.get(f"{name}.bias", 0)


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def attention(x, w, b, window=0, base=0.0, alibi=False):
    """window: half of it to each side, 0 for all; base: of rope, 0 for none."""
    n, size = len(x), DIM // HEADS
    fused = f"{b}attn_qkv.weight" in w
    qkv = (
        np.split(linear(x, w, b + "attn_qkv"), 3, axis=-1)
        if fused
        else [linear(x, w, b + f"attn_{c}") for c in "qkv"]
    )
    q, k, v = (part.reshape(n, HEADS, size).swapaxes(0, 1) for part in qkv)
    if base:
        q, k = rope(q, base), rope(k, base)
    distance = np.abs(np.arange(n)[:, None] - np.arange(n))
    scores = q @ k.swapaxes(1, 2) * size**-0.5
    if alibi:
        scores = scores - 2.0 ** (-8.0 * np.arange(1, HEADS + 1) / HEADS)[:, None, None] * distance
    if window:
        scores = np.where(distance <= window // 2, scores, -np.inf)
    return linear((oracle.softmax(scores) @ v).swapaxes(0, 1).reshape(n, DIM), w, b + "attn_output")


def rope(x, base):
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] * base ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)
