"""The oracle's recurrent layers, token by token in float64, from the papers and GGUF's names."""

import numpy as np
import tiny
from oracle import Oracle, silu, weights


def logits(metadata, tensors, tokens):
    return Recurrent(metadata, weights(tensors)).run(np.asarray(tokens))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def convolution(x, weight, bias=0.0):
    """Causal, each channel by itself: weight (channels, k)."""
    k = weight.shape[1]
    past = np.concatenate([np.zeros((k - 1, x.shape[1])), x])
    return sum(past[i:i + len(x)] * weight[:, i] for i in range(k)) + bias


class Recurrent(Oracle):
    def __post_init__(self):
        super().__post_init__()
        self.layers = tiny.RECURRENT[self.arch]
        self.n_kv = int(np.max(self.n_kv))
        self.rope = self.arch not in ("granitehybrid", "nemotron_h")
        self.heads, self.groups, self.keys = (self.key(f"ssm.{name}", 0)
                                              for name in ("time_step_rank", "group_count", "state_size"))
        self.inner = self.key("ssm.inner_size", 0)

    def tensor(self, b, name):
        return self.tensors[f"{b}.{name}"].reshape(-1)

    def step(self, b, raw):
        """dt and the decay of each head, (n, heads)."""
        dt = np.log1p(np.exp(raw + self.tensor(b, "ssm_dt.bias")))
        return dt, np.exp(self.tensor(b, "ssm_a") * dt)

    def gated_attention(self, x, layer):
        name = f"blk.{layer}.attn_q.weight"
        both = self.tensors[name].reshape(self.n_heads, 2, self.head_dim, -1)
        query, gate = (part.reshape(self.n_heads * self.head_dim, -1) for part in (both[:, 0], both[:, 1]))
        own = Recurrent(self.metadata, self.tensors | {name: query})
        return self.linear(own.attend(x, layer) * sigmoid(x @ gate.T), f"blk.{layer}.attn_output")

    def delta_net(self, x, layer):
        b, n, keys = f"blk.{layer}", len(x), self.groups * self.keys
        mixed = silu(convolution(self.linear(x, f"{b}.attn_qkv"), self.tensors[f"{b}.ssm_conv1d.weight"]))
        q, k = (part.reshape(n, self.groups, self.keys)
                for part in (mixed[:, :keys], mixed[:, keys:2 * keys]))
        q, k = (part / np.sqrt((part**2).sum(-1, keepdims=True) + self.eps) for part in (q, k))
        v = mixed[:, 2 * keys:].reshape(n, self.heads, -1)
        _, decay = self.step(b, self.linear(x, f"{b}.ssm_alpha"))
        beta, out = sigmoid(self.linear(x, f"{b}.ssm_beta")), np.empty_like(v)
        for h in range(self.heads):
            s, g = np.zeros((self.keys, v.shape[2])), h % self.groups
            for t in range(n):
                s = decay[t, h] * s
                s = s + np.outer(k[t, g], beta[t, h] * (v[t, h] - s.T @ k[t, g]))
                out[t, h] = s.T @ q[t, g] / np.sqrt(self.keys)
        out = self.norm(out, f"{b}.ssm_norm").reshape(n, -1) * silu(self.linear(x, f"{b}.attn_gate"))
        return self.linear(out, f"{b}.ssm_out")

    def mamba2(self, x, layer):
        b, n, inner, keys = f"blk.{layer}", len(x), self.inner, self.groups * self.keys
        z, mixed, raw = np.split(self.linear(x, f"{b}.ssm_in"), [inner, 2 * inner + 2 * keys], -1)
        mixed = silu(convolution(mixed, self.tensors[f"{b}.ssm_conv1d.weight"],
                                 self.tensors[f"{b}.ssm_conv1d.bias"]))
        v = mixed[:, :inner].reshape(n, self.heads, -1)
        k, q = (part.reshape(n, self.groups, self.keys)
                for part in (mixed[:, inner:inner + keys], mixed[:, inner + keys:]))
        (dt, decay), d, out = self.step(b, raw), self.tensor(b, "ssm_d"), np.empty_like(v)
        for h in range(self.heads):
            s, g = np.zeros((v.shape[2], self.keys)), h // (self.heads // self.groups)
            for t in range(n):
                s = decay[t, h] * s + np.outer(dt[t, h] * v[t, h], k[t, g])
                out[t, h] = s @ q[t, g] + d[h] * v[t, h]
        out = out.reshape(n, inner) * silu(z)
        if f"{b}.ssm_norm.weight" in self.tensors:
            out = out.reshape(n, self.groups, -1)
            out = out / np.sqrt((out**2).mean(-1, keepdims=True) + self.eps)
            out = out.reshape(n, inner) * self.tensor(b, "ssm_norm.weight")
        return self.linear(out, f"{b}.ssm_out")

    def short_convolution(self, x, layer):
        before, after, x = np.split(self.linear(x, f"blk.{layer}.shortconv.in_proj"), 3, -1)
        return self.linear(after
                           * convolution(before * x, self.tensors[f"blk.{layer}.shortconv.conv.weight"]),
                           f"blk.{layer}.shortconv.out_proj")

    def feed_forward(self, x, layer):
        if self.arch != "nemotron_h":
            return super().feed_forward(x, layer)
        return self.linear(np.maximum(self.linear(x, f"blk.{layer}.ffn_up"), 0) ** 2, f"blk.{layer}.ffn_down")

    def run(self, tokens):
        x, scale = self.tensors["token_embd.weight"][tokens], self.key("residual_scale", 1.0)
        mixers = {"A": self.attention, "Q": self.gated_attention, "D": self.delta_net, "M": self.mamba2,
                  "C": self.short_convolution}
        for layer, blocks in enumerate(self.layers):
            b, second = f"blk.{layer}", "post_attention_norm" if self.arch == "qwen35" else "ffn_norm"
            h = self.norm(x, f"{b}.attn_norm")
            if blocks == "F":
                x = x + self.feed_forward(h, layer)
                continue
            x = x + scale * sum(mixers[kind](h, layer) for kind in blocks.removesuffix("F"))
            if blocks.endswith("F"):
                x = x + scale * self.feed_forward(self.norm(x, f"{b}.{second}"), layer)
        x = self.norm(x, "token_embd_norm" if self.arch == "lfm2" else "output_norm")
        return x @ self.tensors.get("output.weight", self.tensors["token_embd.weight"]).T
