"""What a file's metadata and tensor names mean: the architectures, as data.

An architecture is a row of ARCHITECTURES: how it differs from llama. `read_config` turns metadata into numbers,
`bind` gives every tensor its role in the forward pass; fused tensors are cut into rows there. What a model does
beyond its row, its tensors say: one that is present is used. Keys and names: GGUF's specification.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from ..errors import FormatError, printable
from ..files.gguf import GGUF, Tensor

RMS, LAYER = "rms", "layer"
SILU, GELU = "silu", "gelu"
NONE, PAIRS, HALVES = "none", "pairs", "halves"


@dataclass(frozen=True)
class Arch:
    """One architecture: what it computes, and the tensors that each layer must have beyond the projections."""

    norm: str = RMS
    act: str = SILU
    rope: str = HALVES
    needs: tuple[str, ...] = ("attn_norm", "ffn_norm", "ffn_gate")
    embedding_scale: Callable[[Config], float] = lambda config: 1.0
    attn_scale: Callable[[Config], float] = lambda config: config.head_dim**-0.5
    windowed: Callable[[GGUF, str, int], list[bool]] | None = None      # layers that see attention.sliding_window rows


def every_sixth_full(file: GGUF, prefix: str, n_layers: int) -> list[bool]:
    """gemma3's pattern: all layers are windowed but every n-th, or as an array of flags says."""
    key = "attention.sliding_window_pattern"
    pattern = file.metadata.get(f"{prefix}.{key}", 6)
    if isinstance(pattern, np.ndarray):
        if len(pattern) != n_layers:
            raise FormatError(f"{file.path}: {prefix}.{key}: expected {n_layers} flags, found {len(pattern)}")
        return [bool(flag) for flag in pattern]
    pattern = _Keys(file, prefix).count(key, 6, low=0)
    return [pattern > 0 and layer % pattern < pattern - 1 for layer in range(n_layers)]


def gemma3_scale(config: Config) -> float:
    """The 27B divides by dim / heads, the others by head_dim."""
    return (config.dim / config.n_heads if config.n_layers == 62 else config.head_dim) ** -0.5


ARCHITECTURES = {
    "llama": Arch(rope=PAIRS),
    "qwen2": Arch(needs=("attn_norm", "ffn_norm", "ffn_gate", "attn_q.bias", "attn_k.bias", "attn_v.bias")),
    "qwen3": Arch(needs=("attn_norm", "ffn_norm", "ffn_gate", "attn_q_norm", "attn_k_norm")),
    "gpt2": Arch(norm=LAYER, act=GELU, rope=NONE,
                 needs=("attn_norm", "attn_norm.bias", "ffn_norm", "ffn_norm.bias", "attn_q.bias", "attn_k.bias", "attn_v.bias",
                        "attn_output.bias", "ffn_up.bias", "ffn_down.bias")),
    "gemma3": Arch(act=GELU, embedding_scale=lambda config: config.dim**0.5, attn_scale=gemma3_scale, windowed=every_sixth_full,
                   needs=("attn_norm", "ffn_norm", "ffn_gate", "attn_q_norm", "attn_k_norm", "attn_post_norm", "ffn_post_norm")),
    "phi3": Arch(),
}

# The tensors of a file, without "blk.N." and ".weight", and the roles they fill. A fused one is cut by rows.
LAYER_ROLES = {name: name for name in (
    "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "attn_q_norm", "attn_k_norm", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down",
)} | {"post_attention_norm": "attn_post_norm", "post_ffw_norm": "ffn_post_norm"}
MODEL_ROLES = ("token_embd", "position_embd", "output", "output_norm")
ROPE_TENSORS = ("rope_freqs", "rope_factors_long", "rope_factors_short")
IGNORED = ("attn_rot_embd", "attn.rotary_emb.inv_freq")         # tables that some converters left behind


@dataclass
class Config:
    """A model in numbers. Lengths are counts of values, positions or tokens."""

    arch: str
    dim: int
    hidden_dim: int
    head_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    n_ctx: int                          # the longest sequence it was made for
    norm_eps: float
    rope_dim: int
    rope_base: float
    windows: list[int]                  # per layer: rows a token sees, itself included; 0 = all
    original_ctx: int = 0               # longrope: the context up to which the short factors hold; 0: there are none
    rope_freq: list[np.ndarray] = field(default_factory=list)      # 1 or 2 tables (rope_dim / 2,) of radians per position
    rope_mscale: list[float] = field(default_factory=list)         # what cos and sin are multiplied by
    layer_rope: list[int] = field(default_factory=list)            # which table a layer takes

    @property
    def spec(self) -> Arch:
        return ARCHITECTURES[self.arch]

    @property
    def q_dim(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        return self.n_kv_heads * self.head_dim

    @property
    def kv_row_bytes(self) -> int:
        """Bytes that K and V of one token take in f16, all layers."""
        return 2 * 2 * self.kv_dim * self.n_layers


class _Keys:
    """The metadata of one architecture: numbers, checked."""

    def __init__(self, file: GGUF, arch: str):
        self.file, self.arch = file, arch

    def error(self, key: str, expected: str, found) -> FormatError:
        return FormatError(f"{self.file.path}: {self.arch}.{key}: expected {expected}, found {found}")

    def find(self, key: str):
        return self.file.metadata.get(f"{self.arch}.{key}")

    def text(self, key: str, default: str) -> str:
        value = self.find(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, "a word", f"{value!r:.60}")
        return value or default

    def count(self, key: str, default: int | None = None, low: int = 1, high: int = 1 << 30) -> int:
        """A whole number; per-layer arrays have to agree."""
        value = self.find(key)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "a number", "nothing")
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, "one whole number", f"{value!r:.60}")
        if not low <= value <= high:
            raise self.error(key, f"{low} to {high}", value)
        return value

    def number(self, key: str, default: float | None = None, low: float = 0.0, high: float = 1e30,
               above: float = -math.inf) -> float:
        """A number from low to high, and larger than `above`; outside, the model's arithmetic makes no sense."""
        value = self.find(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "a number", "nothing")
        if (isinstance(value, bool) or not isinstance(value, (int, float))
                or not low <= value <= high or value <= above):
            bounds = f"above {above:g}" if above >= low else f"from {low:g}"
            raise self.error(key, f"a number {bounds} up to {high:g}", f"{value!r:.60}")
        return float(value)


def read_config(file: GGUF) -> Config:
    """The Config of an opened file. Raises FormatError naming the key, or the architecture and those there are."""
    arch = file.metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise FormatError(f"{file.path}: architecture {arch!r:.60} is not supported; supported are {', '.join(sorted(ARCHITECTURES))}")
    if "token_embd.weight" not in file.tensors:
        raise FormatError(f"{file.path}: there are no weights in it (token_embd.weight is missing)")
    keys = _Keys(file, arch)
    if n_experts := keys.count("expert_count", 0, low=0):
        raise FormatError(f"{file.path}: mixtures of experts are not supported yet ({arch}.expert_count is {n_experts})")
    dim, n_heads, n_layers = keys.count("embedding_length", high=1 << 20), keys.count("attention.head_count", high=4096), \
        keys.count("block_count", high=1024)
    head_dim = keys.count("attention.key_length", dim // n_heads, high=1024)
    if keys.count("attention.value_length", head_dim) != head_dim:
        raise keys.error("attention.value_length", f"{head_dim} as key_length", keys.find("attention.value_length"))
    eps = "attention.layer_norm_rms_epsilon" if ARCHITECTURES[arch].norm == RMS else "attention.layer_norm_epsilon"
    config = Config(
        arch=arch, dim=dim, n_heads=n_heads, n_layers=n_layers, head_dim=head_dim,
        hidden_dim=keys.count("feed_forward_length", high=1 << 22),
        n_kv_heads=keys.count("attention.head_count_kv", n_heads, high=n_heads),
        vocab_size=math.prod(file.tensors["token_embd.weight"].shape[1:]),
        n_ctx=keys.count("context_length"),
        norm_eps=keys.number(eps, high=1.0),
        rope_dim=0, rope_base=0.0,
        windows=[0] * n_layers,
    )
    if n_heads % config.n_kv_heads:
        raise keys.error("attention.head_count_kv", f"a divisor of {n_heads} heads", config.n_kv_heads)
    _check_vocabulary(file, config)
    window = keys.count("attention.sliding_window", 0, low=0)
    if config.spec.windowed and window:
        config.windows = [window if windowed else 0 for windowed in config.spec.windowed(file, arch, n_layers)]
    if config.spec.rope != NONE:
        _read_rope(keys, config)
    return config


def _check_vocabulary(file: GGUF, config: Config) -> None:
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if tokens is not None and not isinstance(tokens, list):
        raise FormatError(f"{file.path}: tokenizer.ggml.tokens: expected a list of strings, found {tokens!r:.60}")
    if tokens is not None and len(tokens) != config.vocab_size:
        raise FormatError(f"{file.path}: the vocabulary has {len(tokens)} tokens, token_embd.weight {config.vocab_size} rows")


# Rotary positions: a table of frequencies, after every kind of scaling.

def _read_rope(keys: _Keys, config: Config) -> None:
    config.rope_dim = keys.count("rope.dimension_count", config.head_dim, low=2, high=config.head_dim)
    config.rope_base = keys.number("rope.freq_base", 10000.0, above=1.0)
    if config.rope_dim % 2:
        raise keys.error("rope.dimension_count", "an even number", config.rope_dim)
    scaled, mscale = _scaled_frequencies(keys, config)
    factors = {name: _rope_factors(keys.file, f"{name}.weight", config.rope_dim // 2) for name in ROPE_TENSORS}
    config.layer_rope = [0] * config.n_layers
    if factors["rope_factors_long"] is not None and factors["rope_factors_short"] is not None:
        config.original_ctx = keys.count("rope.scaling.original_context_length", config.n_ctx)
        config.rope_freq = [scaled / factors["rope_factors_short"], scaled / factors["rope_factors_long"]]
        config.rope_mscale = [mscale, mscale]
        return
    if factors["rope_freqs"] is not None:
        scaled = scaled / factors["rope_freqs"]
    config.rope_freq, config.rope_mscale = [scaled], [mscale]
    if any(config.windows):             # windowed layers turn by a base of their own, not scaled
        base = keys.number("rope.freq_base_swa", 10000.0, above=1.0)
        config.rope_freq.append(_frequencies(base, config.rope_dim))
        config.rope_mscale.append(1.0)
        config.layer_rope = [int(window > 0) for window in config.windows]


def _frequencies(base: float, rope_dim: int) -> np.ndarray:
    return base ** (-np.arange(0, rope_dim, 2, dtype=np.float64) / rope_dim)


def _scaled_frequencies(keys: _Keys, config: Config) -> tuple[np.ndarray, float]:
    """Frequencies (rope_dim / 2,) after none, linear or YaRN scaling (arXiv 2309.00071), and the factor of cos and sin."""
    plain = _frequencies(config.rope_base, config.rope_dim)
    linear = _scale(keys, "rope.scale_linear", 0.0)
    kind = keys.text("rope.scaling.type", "linear" if linear else "none")
    factor = _scale(keys, "rope.scaling.factor", linear) or 1.0
    mscale = keys.number("rope.scaling.attn_factor", 1.0, high=1e3, above=0.0)
    if kind in ("none", "longrope"):
        return plain, mscale
    if kind == "linear":
        return plain / factor, mscale
    if kind != "yarn":
        raise keys.error("rope.scaling.type", "none, linear, yarn or longrope", kind)
    trained = keys.count("rope.scaling.original_context_length", config.n_ctx)
    low, high = (_turns_dim(config, trained, keys.number(f"rope.scaling.yarn_beta_{name}", beta, 1e-3, 1e6))
                 for name, beta in (("fast", 32.0), ("slow", 1.0)))
    low, high = max(0.0, math.floor(low)), min(config.rope_dim - 1.0, math.ceil(high))
    ramp = 1.0 - np.clip((np.arange(config.rope_dim // 2) - low) / max(0.001, high - low), 0.0, 1.0)
    mix = ramp * keys.number("rope.scaling.yarn_ext_factor", 1.0, high=1.0)
    return plain / factor * (1.0 - mix) + plain * mix, mscale * (1.0 + 0.1 * math.log(factor))


def _scale(keys: _Keys, key: str, default: float) -> float:
    """By what positions are divided; 0 in a file is none."""
    scale = keys.number(key, default, high=1e4)
    if 0 < scale < 1e-3:
        raise keys.error(key, "0, or a number from 0.001 up to 10000", scale)
    return scale


def _turns_dim(config: Config, trained: int, turns: float) -> float:
    """The dimension that makes `turns` turns over the context the model was trained on."""
    return config.rope_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(config.rope_base))


def _rope_factors(file: GGUF, name: str, n: int) -> np.ndarray | None:
    tensor = file.tensors.get(name)
    if tensor is None:
        return None
    if tensor.type.name != "f32" or tensor.shape != (n,):
        raise FormatError(f"{file.path}: {name}: expected f32 ({n},), found {tensor.type} {tensor.shape}")
    factors = tensor.data.view(np.float32).astype(np.float64)
    if not ((factors >= 1e-3) & (factors <= 1e30)).all():       # NaN is in no range
        raise FormatError(f"{file.path}: {name}: expected factors from 0.001 up to 1e30, "
                          f"found {factors.min():g} to {factors.max():g}")
    return factors


# Tensors and their roles.

@dataclass(frozen=True)
class Role:
    """A tensor's place: role, layer (-1 outside the layers), type, (n_rows, n_cols) and its bytes."""

    name: str
    layer: int
    tensor: Tensor
    n_rows: int
    n_cols: int
    data: np.ndarray


def bind(file: GGUF, config: Config) -> list[Role]:
    """Every tensor's role. Raises FormatError for a tensor that is missing, has no role here, or cannot be cut."""
    roles = [role for tensor in file.tensors.values() for role in _roles(file, config, tensor)]
    have = {(role.layer, role.name): role for role in roles}
    if (-1, "output") not in have:      # tied: the embedding is the output too
        embedding = have[-1, "token_embd"]
        roles.append(Role("output", -1, embedding.tensor, embedding.n_rows, embedding.n_cols, embedding.data))
    for name in ("position_embd", "output_norm.bias") if config.arch == "gpt2" else ():
        if (-1, name) not in have:
            raise FormatError(f"{file.path}: {_file_name(-1, name)} is missing; gpt2 needs it")
    needed = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down", *config.spec.needs)
    for layer in range(config.n_layers):
        for name in needed:
            if (layer, name) not in have:
                raise FormatError(f"{file.path}: {_file_name(layer, name)} is missing; {config.arch} needs it")
    _check_end(file)
    return roles


def _check_end(file: GGUF) -> None:
    """Some programs give a file its full size before they fetch it: the missing part is zeros."""
    for last in file.ends:
        if last.name.endswith(".weight") and not last.data[-4096:].any() and not last.data.any():
            raise FormatError(f"{file.path}: the file is incomplete, as when a download broke off: "
                              f"{printable(last.name)}, the last of its tensors, is {last.nbytes} zeros")


def _file_name(layer: int, role: str) -> str:
    name, _, suffix = role.partition(".")
    names = {theirs: ours for ours, theirs in LAYER_ROLES.items()}
    return f"blk.{layer}." * (layer >= 0) + f"{names.get(name, name)}.{suffix or 'weight'}"


def _misfit(file: GGUF, tensor: Tensor, what: str) -> FormatError:
    return FormatError(f"{file.path}: {printable(tensor.name)}: {what}")


def _roles(file: GGUF, config: Config, tensor: Tensor) -> Iterator[Role]:
    name, _, suffix = tensor.name.rpartition(".")
    layer, inner = -1, name
    if name.startswith("blk."):
        number, _, inner = name[4:].partition(".")
        layer = int(number) if number.isdecimal() and len(number) < 6 else config.n_layers
        if layer >= config.n_layers:
            raise _misfit(file, tensor, f"the model has {config.n_layers} layers")
    if inner in IGNORED or inner in ROPE_TENSORS:
        return
    tail = "" if suffix == "weight" else f".{suffix}"
    if inner == "attn_qkv" and layer >= 0:
        yield from _cut(file, tensor, layer, tail, {"attn_q": config.q_dim, "attn_k": config.kv_dim, "attn_v": config.kv_dim})
    elif (inner == "ffn_up" and layer >= 0 and "ffn_gate" in config.spec.needs and tensor.shape[-1] != config.hidden_dim
          and f"blk.{layer}.ffn_gate.weight" not in file.tensors):
        yield from _cut(file, tensor, layer, tail, {"ffn_gate": config.hidden_dim, "ffn_up": config.hidden_dim})
    elif suffix in ("weight", "bias") and (inner in LAYER_ROLES if layer >= 0 else inner in MODEL_ROLES):
        yield _role(LAYER_ROLES.get(inner, inner) + tail, layer, tensor)
    else:
        raise _misfit(file, tensor, f"pybmc does not know this tensor of {config.arch}; "
                                    "the answer would be wrong without it")


def _extent(tensor: Tensor) -> tuple[int, int]:
    """(n_rows, n_cols); what has more than two dimensions is rows all the same."""
    return math.prod(tensor.shape[1:]), tensor.shape[0]


def _role(name: str, layer: int, tensor: Tensor) -> Role:
    n_rows, n_cols = _extent(tensor)
    return Role(name, layer, tensor, n_rows, n_cols, tensor.data)


def _cut(file: GGUF, tensor: Tensor, layer: int, tail: str, parts: dict[str, int]) -> Iterator[Role]:
    """A fused tensor as its parts: rows of a matrix, values of a bias."""
    total = sum(parts.values())
    bias = len(tensor.shape) == 1
    n_rows, n_cols = (tensor.shape[0], 1) if bias else _extent(tensor)
    if n_rows != total:
        raise _misfit(file, tensor, f"expected {total} rows ({' + '.join(map(str, parts.values()))}), found {n_rows}")
    row_bytes, start = tensor.nbytes // total, 0
    for name, n in parts.items():
        data = tensor.data[start * row_bytes : (start + n) * row_bytes]
        yield Role(name + tail, layer, tensor, 1 if bias else n, n if bias else n_cols, data)
        start += n
