"""A llama in one page: RMSNorm, grouped-query attention with rotary positions, SwiGLU,
one matrix for embedding and head.

The rotation turns consecutive pairs, as GGUF's llama expects, so Q and K are exported as they are.
"""

from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Config:
    vocab_size: int
    dim: int
    hidden_dim: int
    head_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    n_ctx: int = 1024
    rope_base: float = 10000.0
    norm_eps: float = 1e-5

    @property
    def q_dim(self):
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self):
        return self.n_kv_heads * self.head_dim

    def matrix_params(self):
        """Weights multiplied for one token, the head included, the embedding's lookup not:
        the cost of a token."""
        attention = 2 * self.dim * (self.q_dim + self.kv_dim)
        return self.vocab_size * self.dim + self.n_layers * (attention + 3 * self.dim * self.hidden_dim)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


def rope_table(n_ctx, head_dim, base):
    """cos and sin, each (n_ctx, head_dim / 2)."""
    freq = base ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angle = torch.arange(n_ctx).float()[:, None] * freq
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn the pairs (x0, x1), (x2, x3), ...
    of x (batch, heads, n_tok, head_dim) by their positions' angles."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def attend_causal(q, k, v, n_blocks=4):
    """q (batch, n_heads, n_tok, head_dim), each row over those up to its own of k and v (batch,
    n_kv_heads, n_tok, head_dim).

    On a CPU a block of queries at a time, the heads that share keys as rows of one product:
    in bf16 1.7 times as fast, both ways, as torch's own.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    batch, n_heads, n_tok, head_dim = q.shape
    # (batch and keys' head, heads that share it, rows, head_dim)
    shared = lambda x: x.reshape(batch * k.shape[1], -1, x.shape[2], head_dim)
    q, k, v = shared(q) * head_dim**-0.5, shared(k)[:, 0], shared(v)[:, 0]
    blocks, end = [], 0
    for block in q.chunk(n_blocks, dim=2):
        rows = block.shape[2]
        end += rows
        seen = torch.ones(rows, end, dtype=torch.bool).tril(end - rows)
        scores = torch.bmm(block.flatten(1, 2), k[:, :end].mT).float().unflatten(1, (-1, rows))
        shares = torch.where(seen, scores, -torch.inf).softmax(-1).to(v.dtype)
        blocks.append(torch.bmm(shares.flatten(1, 2), v[:, :end]).unflatten(1, (-1, rows)))
    return torch.cat(blocks, dim=2).view(batch, n_heads, n_tok, head_dim)


def attend_cached(q, k, v):
    """q (batch, n_heads, n_tok, head_dim) over k and v (batch, n_kv_heads, rows, head_dim),
    whose last n_tok rows are q's own."""
    n_tok, rows = q.shape[2], k.shape[2]
    if n_tok == 1:          # nothing to hide: the heads that share keys stand as rows of one head
        return F.scaled_dot_product_attention(q.view(len(q), k.shape[1], -1, q.shape[3]), k, v).view_as(q)
    seen = torch.ones(n_tok, rows, dtype=torch.bool).tril(rows - n_tok)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


class KVCache:
    """Keys and values of a batch whose sequences have the same length; `length` may be set back."""

    def __init__(self, config, batch, n_ctx):
        self.k, self.v = torch.zeros(2, config.n_layers, batch, config.n_kv_heads, n_ctx, config.head_dim)
        self.length = 0

    def layer(self, i):
        return CacheLayer(self.k[i], self.v[i], self.length)


@dataclass(frozen=True)
class CacheLayer:
    k: torch.Tensor         # (batch, n_kv_heads, n_ctx, head_dim), v too
    v: torch.Tensor
    length: int

    def append(self, k, v):
        end = self.length + k.shape[2]
        self.k[:, :, self.length : end], self.v[:, :, self.length : end] = k, v
        return self.k[:, :, :end], self.v[:, :, :end]


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.q = nn.Linear(c.dim, c.q_dim, bias=False)
        self.k = nn.Linear(c.dim, c.kv_dim, bias=False)
        self.v = nn.Linear(c.dim, c.kv_dim, bias=False)
        self.o = nn.Linear(c.q_dim, c.dim, bias=False)

    def forward(self, x, cos, sin, cache=None):
        """x (batch, n_tok, dim). cache: a CacheLayer, or None when the rows stand alone."""
        heads = lambda y: y.unflatten(-1, (-1, self.c.head_dim)).transpose(1, 2)
        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        if cache is None:
            y = attend_causal(q, k, v)
        else:
            y = attend_cached(q, *cache.append(k, v))
        return self.o(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attn_norm, self.ffn_norm = RMSNorm(c.dim, c.norm_eps), RMSNorm(c.dim, c.norm_eps)
        self.attn = Attention(c)
        self.gate = nn.Linear(c.dim, c.hidden_dim, bias=False)
        self.up = nn.Linear(c.dim, c.hidden_dim, bias=False)
        self.down = nn.Linear(c.hidden_dim, c.dim, bias=False)
        self.dropout = nn.Dropout(0.0)      # in training, as its schedule says

    def forward(self, x, cos, sin, cache=None):
        x = x + self.dropout(self.attn(self.attn_norm(x), cos, sin, cache))
        y = self.ffn_norm(x)
        return x + self.dropout(self.down(F.silu(self.gate(y)) * self.up(y)))


class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.dim)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layers))
        self.norm = RMSNorm(c.dim, c.norm_eps)
        cos, sin = rope_table(c.n_ctx, c.head_dim, c.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.reset()

    def reset(self):
        """Normal weights of 0.02; the matrices that write into the residual begin smaller, by depth."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                into_residual = name.endswith(("attn.o.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / (2 * self.config.n_layers) ** 0.5 if into_residual else 0.02)

    def forward(self, tokens, cache=None):
        """tokens (batch, n_tok) -> the normed states (batch, n_tok, dim); `head` makes logits of them."""
        start = 0 if cache is None else cache.length
        rows = slice(start, start + tokens.shape[1])
        cos, sin = self.cos[rows], self.sin[rows]
        x = self.embed(tokens)
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, None if cache is None else cache.layer(i))
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.norm(x)

    def head(self, x):
        return F.linear(x, self.embed.weight)

    def logits(self, tokens, cache=None):
        return self.head(self(tokens, cache))


def grow(model):
    """The same function with twice the blocks: behind each stands its copy,
    whose last matrices are zero and so add nothing yet."""
    grown = Llama(replace(model.config, n_layers=2 * model.config.n_layers))
    with torch.no_grad():
        for ours, theirs in ((grown.embed, model.embed), (grown.norm, model.norm)):
            ours.load_state_dict(theirs.state_dict())
        for i, block in enumerate(grown.blocks):
            block.load_state_dict(model.blocks[i // 2].state_dict())
            if i % 2:
                block.attn.o.weight.zero_()
                block.down.weight.zero_()
    return grown


def blend(start, end, share):
    """Weights between those where a run began and those where it ended, `share` of the way: runs over text
    that was read before learn it by heart, and the mean forgets that part (model soups, arXiv 2203.05482)."""
    mean = Llama(end.config)
    first, last = start.state_dict(), end.state_dict()
    mean.load_state_dict({name: torch.lerp(first[name], last[name], share) for name in last})
    return mean


def save_model(model, path):
    torch.save({"config": asdict(model.config), "weights": model.state_dict()}, path)


def load_model(path):
    saved = torch.load(path, weights_only=True, map_location=torch.get_default_device())
    model = Llama(Config(**saved["config"]))
    model.load_state_dict(saved["weights"])
    return model
