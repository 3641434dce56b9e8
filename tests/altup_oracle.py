"""Gemma 3n in plain float64: AltUp, LAuReL, sparse gates, inputs of a layer's own, and layers that read
others' keys and values.

`left_out` names parts that a test leaves out, to see that they matter.
"""

import math

import numpy as np
import oracle

SPARSE_LAYERS = 10
PARTS = ("prediction", "correction", "low rank", "sparsity", "values' norm", "correct scale", "per layer",
         "lengths", "other versions")


def rms(x):
    return np.sqrt((x**2).mean(-1, keepdims=True))


class Gemma3n(oracle.Oracle):
    def __init__(self, metadata, weights, left_out=""):
        assert left_out in ("", *PARTS)
        self.left_out, self.rows = left_out, {}
        super().__init__(metadata, weights)
        self.n = self.key("altup.num_inputs")

    def act(self, x):
        return oracle.gelu(x)

    def window(self, layer):
        windowed = self.key("attention.sliding_window_pattern")[layer]
        return self.key("attention.sliding_window") if windowed else None

    def frequencies(self, layer):
        base = 10000.0 if self.window(layer) else self.key("rope.freq_base")
        return base ** (-np.arange(0, self.head_dim, 2) / self.head_dim), 1.0

    def source(self, layer):
        """The layer whose keys and values it reads."""
        own = self.key("block_count") - self.key("attention.shared_kv_layers", 0)
        return layer if layer < own else own - 2 if self.window(layer) else own - 1

    def attend(self, x, layer):
        b = f"blk.{layer}"
        q = self.norm(self.linear(x, f"{b}.attn_q").reshape(len(x), -1, self.head_dim), f"{b}.attn_q_norm")
        if self.source(layer) == layer:
            k, v = (self.linear(x, f"{b}.attn_{name}").reshape(len(x), -1, self.head_dim) for name in "kv")
            if self.left_out != "values' norm":
                v = v / np.sqrt((v**2).mean(-1, keepdims=True) + self.eps)
            self.rows[layer] = self.turn(self.norm(k, f"{b}.attn_k_norm"), layer), v
        k, v = self.rows[self.source(layer)]
        distance = np.arange(len(x))[:, None] - np.arange(len(x))
        seen = (distance >= 0) & (distance < (self.window(layer) or len(x)))
        q, out = self.turn(q, layer), np.empty_like(q)
        for head in range(self.n_heads):
            kv = head // (self.n_heads // self.n_kv)
            out[:, head] = oracle.softmax(np.where(seen, q[:, head] @ k[:, kv].T, -np.inf)) @ v[:, kv]
        return out.reshape(len(x), -1)

    def feed_forward(self, x, layer):
        b = f"blk.{layer}"
        gate = self.linear(x, f"{b}.ffn_gate")
        scales = self.key("activation_sparsity_scale")
        usual = 1.6448533535003662 if layer < SPARSE_LAYERS else -math.inf
        scale = usual if scales is None else scales[layer]
        if scale > 0 and self.left_out != "sparsity":
            least = gate.mean(-1, keepdims=True) + scale * gate.std(-1, keepdims=True, ddof=1)
            gate = np.maximum(gate - least, 0)
        return self.linear(self.act(gate) * self.linear(x, f"{b}.ffn_up"), f"{b}.ffn_down")

    def coefficients(self, x, b, name):
        """(n, rows) of a token."""
        scores = self.linear(self.norm(x, f"{b}.altup_router_norm") / self.dim, f"{b}.altup_router")
        return np.tanh(scores) @ self.tensors[f"{b}.altup_{name}_coef.weight"].T

    def matrices(self, name):
        return self.tensors[f"{name}.weight"].reshape(self.n - 1, self.dim, self.dim)

    def long_as(self, y, x):
        return y if self.left_out == "lengths" else y * rms(x) / rms(y)

    def layer(self, versions, inputs, i):
        b = f"blk.{i}"
        if self.left_out != "prediction":
            c = self.coefficients(versions[0], b, "predict").reshape(-1, self.n, self.n)
            versions = versions + np.einsum("tij,jtd->itd", c, versions)
        active = versions[0]
        x = self.norm(active, f"{b}.attn_norm")
        low = self.linear(self.linear(x, f"{b}.laurel_l"), f"{b}.laurel_r")
        low = self.norm(low, f"{b}.laurel_post_norm")
        low = x + (0 if self.left_out == "low rank" else low)
        x = (active + self.norm(self.attention(x, i), f"{b}.post_attention_norm") + low) / math.sqrt(2)
        x = x + self.norm(self.feed_forward(self.norm(x, f"{b}.ffn_norm"), i), f"{b}.post_ffw_norm")
        c = 1 + (self.left_out != "correction") * self.coefficients(x, b, "correct")
        versions = versions + c.T[..., None] * (x - active)
        if self.left_out == "per layer":
            return versions
        scale = 1 if self.left_out == "correct scale" else self.tensors[f"{b}.altup_correct_scale.weight"]
        gate = oracle.gelu(self.linear(versions[0] * scale, f"{b}.inp_gate"))
        versions[1:] += self.norm(self.linear(gate * inputs[:, i], f"{b}.proj"), f"{b}.post_norm")
        return versions

    def run(self, tokens):
        x = self.tensors["token_embd.weight"][tokens] * math.sqrt(self.dim)
        size = self.key("embedding_length_per_layer_input")
        own = self.tensors["per_layer_token_embd.weight"][tokens].reshape(len(x), -1, size) * math.sqrt(size)
        made = self.linear(x, "per_layer_model_proj").reshape(len(x), -1, size) / math.sqrt(self.dim)
        inputs = (self.norm(made, "per_layer_proj_norm") + own) / math.sqrt(2)
        versions = np.stack([x, *(self.long_as(x @ w.T, x) for w in self.matrices("altup_proj"))])
        for i in range(self.key("block_count")):
            versions = self.layer(versions, inputs, i)
        unembed = self.matrices("altup_unembd_proj")
        back = [self.long_as(y @ w.T, versions[0]) for y, w in zip(versions[1:], unembed)]
        x = (versions[0] + (0 if self.left_out == "other versions" else sum(back))) / self.n
        logits = self.norm(x, "output_norm") @ self.tensors["token_embd.weight"].T
        return 30 * np.tanh(logits / 30)
