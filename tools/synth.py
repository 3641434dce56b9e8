"""Write a GGUF with a real model's shape, vocabulary size and quantization mix, and random weights.

    python -m tools.synth llama-3.2-1b --type Q4_K_M -o l1b.gguf
    python -m tools.synth gpt-oss-20b --layers 6 --type MXFP4_MOE -o oss.gguf      its first layers only

    python -m tools.synth llama-3.2-1b --pair 0.85 -o l1b.gguf          also writes l1b-draft.gguf

Speed and memory of such a file are those of the real one; its text is noise. A pair is a whole model whose
later layers add little, and its first layer as a draft: how little is found by trying, until the draft agrees
with the model as often as asked. Blocks are drawn at random directly in their quantized form, scaled so that
a matrix of n columns has weights with standard deviation 1/sqrt(n): activations neither explode nor vanish.
The same preset, type and seed give the same bytes.
"""

import argparse
import sys
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist

import gguf
import numpy as np

from . import synth_shapes
from .synth_shapes import Mixed, norm
from .synth_vocab import VOCABS, add_vocabulary

# ---- models ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What a model is made of. head_dim 0 means dim / n_heads; gguf spells the names."""

    arch: str
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    hidden_dim: int
    vocab: str                  # a key of synth_vocab.VOCABS
    n_ctx: int
    head_dim: int = 0
    tied: bool = False
    rope_base: float = 10000.0
    rope_factor: float = 0.0    # > 0: Llama-3 frequency factors in rope_freqs.weight
    eps: float = 1e-5

    @property
    def q_dim(self):
        return self.n_heads * (self.head_dim or self.dim // self.n_heads)

    @property
    def kv_dim(self):
        return self.q_dim // self.n_heads * self.n_kv_heads


def llama3(dim, n_layers, n_heads, hidden_dim, head_dim, factor, tied):
    return Shape("llama", dim, n_layers, n_heads, 8, hidden_dim, "llama3", 131072, head_dim, tied,
                 rope_base=500000.0, rope_factor=factor)


def qwen(arch, dim, n_layers, n_heads, n_kv_heads, hidden_dim, n_ctx, head_dim=0):
    return Shape(arch, dim, n_layers, n_heads, n_kv_heads, hidden_dim, "qwen", n_ctx, head_dim, True,
                 rope_base=1e6, eps=1e-6)


MODELS = {
    "llama-3.2-1b":   llama3(2048, 16, 32, 8192, 64, 32.0, True),
    "llama-3.2-3b":   llama3(3072, 28, 24, 8192, 128, 32.0, True),
    "llama-3.1-8b":   llama3(4096, 32, 32, 14336, 128, 8.0, False),
    "llama-2-7b":     Shape("llama", 4096, 32, 32, 32, 11008, "llama2", 4096),
    "tinyllama-1.1b": Shape("llama", 2048, 22, 32, 4, 5632, "llama2", 2048),
    "llama-160m":     Shape("llama", 768, 12, 12, 12, 3072, "llama2", 2048, eps=1e-6),
    "llama-68m":      Shape("llama", 768, 2, 12, 12, 3072, "llama2", 2048, eps=1e-6),
    "smollm2-135m":   Shape("llama", 576, 30, 9, 3, 1536, "smollm", 8192, tied=True, rope_base=100000.0),
    "smollm2-1.7b":   Shape("llama", 2048, 24, 32, 32, 8192, "smollm", 8192, tied=True, rope_base=130000.0),
    "qwen2.5-0.5b":   qwen("qwen2", 896, 24, 14, 2, 4864, 32768),
    "qwen2.5-1.5b":   qwen("qwen2", 1536, 28, 12, 2, 8960, 32768),
    "qwen3-0.6b":     qwen("qwen3", 1024, 28, 16, 8, 3072, 40960, 128),
    "qwen3-1.7b":     qwen("qwen3", 2048, 28, 16, 8, 6144, 40960, 128),
    "gpt2":           Shape("gpt2", 768, 12, 12, 12, 3072, "gpt2", 1024, tied=True),
    "gpt2-medium":    Shape("gpt2", 1024, 24, 16, 16, 4096, "gpt2", 1024, tied=True),
    "gemma-3-1b":     Shape("gemma3", 1152, 26, 4, 1, 6912, "gemma", 32768, 256, True, 1e6, eps=1e-6),
    "phi-3-mini":     Shape("phi3", 3072, 32, 32, 32, 8192, "phi3", 4096),
    "tiny":           Shape("llama", 256, 2, 4, 2, 512, "tiny", 2048, tied=True),
} | {name: make() for name, make in synth_shapes.MODELS.items()}


def layer_tensors(s):
    """(role, n_cols, n_rows) of every matrix of a layer; rows are outputs."""
    fused = s.arch in ("gpt2", "phi3")
    qkv = [("attn_qkv", s.dim, s.q_dim + 2 * s.kv_dim)] if fused else [
        ("attn_q", s.dim, s.q_dim), ("attn_k", s.dim, s.kv_dim), ("attn_v", s.dim, s.kv_dim)]
    up = [("ffn_up", s.dim, 2 * s.hidden_dim if s.arch == "phi3" else s.hidden_dim)]
    gate = [] if fused else [("ffn_gate", s.dim, s.hidden_dim)]
    return qkv + [("attn_output", s.q_dim, s.dim)] + gate + up + [("ffn_down", s.hidden_dim, s.dim)]


def layer_vectors(s):
    """(name, length, value) of the float32 vectors of a layer."""
    head = s.q_dim // s.n_heads
    norms = [("attn_norm.weight", s.dim, 1.0), ("ffn_norm.weight", s.dim, 1.0)]
    if s.arch == "gemma3":
        norms += [("post_attention_norm.weight", s.dim, 1.0), ("post_ffw_norm.weight", s.dim, 1.0)]
    if s.arch in ("qwen3", "gemma3"):
        norms += [("attn_q_norm.weight", head, 1.0), ("attn_k_norm.weight", head, 1.0)]
    if s.arch == "qwen2":
        norms += [(f"{role}.bias", n, 0.1) for role, n in
                  (("attn_q", s.q_dim), ("attn_k", s.kv_dim), ("attn_v", s.kv_dim))]
    if s.arch == "gpt2":
        norms += [("attn_norm.bias", s.dim, 0.0), ("ffn_norm.bias", s.dim, 0.0)]
        norms += [(f"{role}.bias", n_rows, 0.0) for role, _, n_rows in layer_tensors(s)]
    return norms


# ---- block types: random bytes become a valid block by setting the scales ----------------------------------


@dataclass(frozen=True)
class Block:
    """Where a type keeps its scale, and the standard deviation of its values at scale 1 with random codes."""

    unit: float
    scale: object           # offset of the f16 scale in a block, or a function that sets all blocks' scales
    minimum: int = -1       # offset of the f16 minimum, where the type has one ..
    centre: float = 0.0     # .. which is set to this many scales, so that the mean is 0
    fix: object = None      # called with the (n_blocks, type_size) bytes: repeat scales as minima ..


def q8_without_128(raw):
    raw[:, 2:][raw[:, 2:] == 0x80] = 0x81


def nibbles_equal(raw, columns):
    raw[:, columns] = (raw[:, columns] & 15) * 17


def q45_k_minima(raw):
    """The 12 bytes of 8 six-bit scales and 8 six-bit minima: make every minimum equal to its scale."""
    raw[:, 8:12] = raw[:, 4:8]
    nibbles_equal(raw, slice(12, 16))


def q2_k_minima(raw):
    nibbles_equal(raw, slice(0, 16))


def uniform_std(n):
    """Standard deviation of n equally likely integers in a row."""
    return ((n * n - 1) / 12) ** 0.5


def rms(low, high):
    return float(np.sqrt(np.mean(np.arange(low, high + 1.0) ** 2)))


IQ4 = float(np.sqrt(np.mean(np.square(gguf.quants.IQ4_NL.kvalues, dtype=np.float64))))
MXFP4_RMS = float(np.sqrt(np.mean(np.square(gguf.quants.MXFP4.kvalues, dtype=np.float64))))

TERNARY = (171 / 256) ** 0.5        # a digit of a random byte is 0 in 86 cases of 256, 1 in 85 and 2 in 85


def odd_rms(n):
    """Of the first n odd numbers, equally likely."""
    return ((4 * n * n - 1) / 3) ** 0.5


def grid_rms(type_name):
    """Of the levels of a random index; those of IQ1 are shifted by 1/8, up or down."""
    kind = getattr(gguf.quants, type_name)
    kind.init_grid()
    shift = kind.delta if type_name.startswith("IQ1") else 0
    return float(np.sqrt(np.mean(np.square(kind.grid, dtype=np.float64)) + shift**2))


def iq1_m_scales(raw, values):
    """Four bits of the f16 in the highest of each of the last four words."""
    nibbles = values.astype("<f2").view(np.uint16).reshape(-1, 1) >> np.arange(0, 16, 4) & 15
    raw[:, 49::2] = raw[:, 49::2] & 15 | nibbles << 4


def nvfp4_scales(raw, values):
    """The same for each 16; E4M3 has no sign."""
    raw[:, :4] = gguf.quants.NVFP4.fp32_to_ue4m3(np.abs(values))[:, None]


BLOCKS = {
    "Q8_0":   Block(rms(-127, 127), 0, fix=q8_without_128),
    "Q4_0":   Block(rms(-8, 7), 0),
    "Q5_0":   Block(rms(-16, 15), 0),
    "Q4_1":   Block(uniform_std(16), 0, 2, -7.5),
    "Q5_1":   Block(uniform_std(32), 0, 2, -15.5),
    "Q2_K":   Block(uniform_std(4) * rms(0, 15), 80, 82, 1.5, q2_k_minima),
    "Q3_K":   Block(rms(-4, 3) * rms(-32, 31), 108),
    "Q4_K":   Block(uniform_std(16) * rms(0, 63), 0, 2, 7.5, q45_k_minima),
    "Q5_K":   Block(uniform_std(32) * rms(0, 63), 0, 2, 15.5, q45_k_minima),
    "Q6_K":   Block(rms(-32, 31) * rms(-128, 127), 208),
    "IQ4_NL": Block(IQ4, 0),
    "IQ4_XS": Block(IQ4 * rms(-32, 31), 0),
    "IQ1_S":  Block(grid_rms("IQ1_S") * odd_rms(8), 0),
    "IQ1_M":  Block(grid_rms("IQ1_M") * odd_rms(8), iq1_m_scales),
    "IQ2_XXS": Block(grid_rms("IQ2_XXS") * odd_rms(16) / 8, 0),
    "IQ2_XS": Block(grid_rms("IQ2_XS") * odd_rms(16) / 8, 0),
    "IQ2_S":  Block(grid_rms("IQ2_S") * odd_rms(16) / 8, 0),
    "IQ3_XXS": Block(grid_rms("IQ3_XXS") * odd_rms(16) / 4, 0),
    "IQ3_S":  Block(grid_rms("IQ3_S") * odd_rms(16), 0),
    "TQ1_0":  Block(TERNARY, 52),
    "TQ2_0":  Block(rms(-1, 2), 64),
    "Q1_0":   Block(1.0, 0),
    "NVFP4":  Block(MXFP4_RMS / 2, nvfp4_scales),
}
FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def random_blocks(type_name, n_blocks, std, rng):
    """(n_blocks, type_size) bytes whose values have mean 0 and the given standard deviation."""
    type_size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]][1]
    raw = np.frombuffer(bytearray(rng.bytes(n_blocks * type_size)), np.uint8).reshape(n_blocks, type_size)
    if type_name == "MXFP4":
        raw[:, 0] = mxfp4_exponents(n_blocks, std, rng)
        return raw
    block = BLOCKS[type_name]
    if block.fix:
        block.fix(raw)
    scale = np.float32(std / block.unit) * rng.uniform(0.75, 1.25, n_blocks).astype(np.float32)
    if block.minimum < 0:
        scale *= rng.choice(np.float32([-1, 1]), n_blocks)        # codes such as -8..7 lean to one side
    else:
        set_f16(raw, block.minimum, scale * np.float32(block.centre))
    if callable(block.scale):
        block.scale(raw, scale)
    else:
        set_f16(raw, block.scale, scale)
    return raw


def set_f16(raw, offset, values):
    raw[:, offset:offset + 2] = values.astype("<f2").view(np.uint8).reshape(-1, 2)


def mxfp4_exponents(n_blocks, std, rng):
    """Powers of two only: mix two neighbours so that the mean square comes out right."""
    power = np.log2(std / MXFP4_RMS)
    low = np.floor(power)
    share = (4 ** (power - low) - 1) / 3
    return (low + 128 + (rng.random(n_blocks) < share)).astype(np.uint8)


_quantiles = {}


def random_floats(type_name, n, std, rng):
    """Normal values by looking 16 random bits up in a table of quantiles."""
    if "normal" not in _quantiles:
        inverse = NormalDist().inv_cdf
        _quantiles["normal"] = np.array([inverse((i + 0.5) / 65536) for i in range(65536)], np.float32)
    table = _quantiles["normal"] * np.float32(std)
    if type_name == "BF16":
        table = (table.view(np.uint32) >> 16).astype(np.uint16)
    else:
        table = table.astype(FLOATS[type_name])
    return table[np.frombuffer(rng.bytes(2 * n), np.uint16)]


def random_matrix(type_name, n_cols, n_rows, std, rng):
    """The bytes of a tensor, shaped (n_rows, row bytes)."""
    if type_name in FLOATS:
        return random_floats(type_name, n_cols * n_rows, std, rng).view(np.uint8).reshape(n_rows, -1)
    block_size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]][0]
    return random_blocks(type_name, n_rows * n_cols // block_size, std, rng).reshape(n_rows, -1)


# ---- mixes: which tensor gets which type, as llama-quantize decides without an importance matrix -----------

# file type: (the usual type, {role: another type or a rule})
MIXES = {
    "Q2_K":   ("Q2_K", {"attn_v": lambda m: "Q4_K" if m.gqa >= 4 else "Q3_K", "attn_output": "Q3_K",
                        "ffn_down": "Q3_K"}),
    "Q3_K_S": ("Q3_K", {}),
    "Q3_K_M": ("Q3_K", {"attn_v": lambda m: "Q5_K" if m.layer < 2 else "Q4_K", "attn_output": "Q4_K",
                        "ffn_down": lambda m: "Q5_K" if m.layer < m.n_layers // 16 else "Q4_K"}),
    "Q3_K_L": ("Q3_K", {"attn_v": "Q5_K", "attn_output": "Q5_K", "ffn_down": "Q5_K"}),
    "Q4_K_S": ("Q4_K", {"attn_v": lambda m: "Q5_K" if m.layer < 4 else "Q4_K",
                        "ffn_down": lambda m: "Q5_K" if m.layer < m.n_layers // 8 else "Q4_K"}),
    "Q4_K_M": ("Q4_K", {"attn_v": lambda m: "Q6_K" if m.more_bits else "Q4_K",
                        "ffn_down": lambda m: "Q6_K" if m.more_bits else "Q4_K"}),
    "Q5_K_S": ("Q5_K", {}),
    "Q5_K_M": ("Q5_K", {"attn_v": lambda m: "Q6_K" if m.more_bits else "Q5_K",
                        "ffn_down": lambda m: "Q6_K" if m.more_bits else "Q5_K"}),
    "IQ4_NL": ("IQ4_NL", {"attn_v": lambda m: "Q5_K" if m.gqa >= 4 else "IQ4_NL",
                          "ffn_down": lambda m: "Q5_K" if m.layer < m.n_layers // 8 else "IQ4_NL"}),
    "IQ4_XS": ("IQ4_XS", {"attn_v": lambda m: "Q5_K" if m.gqa >= 4 else "IQ4_XS",
                          "ffn_down": lambda m: "Q5_K" if m.layer < m.n_layers // 8 else "IQ4_XS"}),
    "MXFP4":  ("MXFP4", {"token_embd": "Q8_0", "output": "Q8_0"}),
    "MXFP4_MOE": ("Q8_0", {f"ffn_{name}_exps": "MXFP4" for name in ("gate", "up", "down")}),
} | {name: (name, {}) for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q6_K")}

# when a row is no multiple of 256
FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
             "IQ4_XS": "IQ4_NL"}


# roles that stay in floats
FLOAT_ROLES = ("ffn_gate_inp", "ffn_gate_inp_shexp", "ssm_conv1d", "ssm_norm", "shortconv.conv",
               "position_embd", "token_types")


@dataclass(frozen=True)
class Place:
    """What a mix may ask about a tensor."""

    layer: int
    n_layers: int
    gqa: int

    @property
    def more_bits(self):
        eighth = self.n_layers // 8
        return self.layer < eighth or self.layer >= 7 * self.n_layers // 8 or (self.layer - eighth) % 3 == 2


def tensor_type(file_type, role, n_cols, place, is_output=False):
    """The type name of a matrix; is_output also for an embedding that serves as the output."""
    if role in FLOAT_ROLES:
        return "F32"
    if file_type.startswith("pure-"):
        usual, rules = file_type[5:], {}
    else:
        usual, rules = MIXES[file_type]
        if is_output and usual not in FLOATS and usual not in ("Q8_0", "MXFP4"):
            return "Q6_K" if n_cols % 256 == 0 else "Q8_0"
    plain = role.removesuffix("_exps").removesuffix("_shexp")
    choice = rules.get(role, rules.get("attn_v" if role == "attn_qkv" else plain, usual))
    choice = choice(place) if callable(choice) else choice
    return choice if n_cols % 256 == 0 else FALLBACKS.get(choice, choice)


# ---- the file ----------------------------------------------------------------------------------------------


def add_keys(writer, shape):
    """The metadata of a model whose layers differ."""
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
             list: writer.add_array}
    for key, value in shape.keys(shape).items():
        kinds[type(value)](f"{shape.arch}.{key}", value)


def add_metadata(writer, name, shape, file_type):
    writer.add_name(f"synthetic {name}")
    mostly = {"F32": "ALL_F32", "Q2_K": "MOSTLY_Q2_K", "MXFP4": "MOSTLY_MXFP4_MOE"}
    mostly = mostly.get(file_type, f"MOSTLY_{file_type}")
    writer.add_file_type(getattr(gguf.LlamaFileType, mostly, gguf.LlamaFileType.GUESSED))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if isinstance(shape, Mixed):
        add_keys(writer, shape)
        return
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.dim)
    writer.add_block_count(shape.n_layers)
    writer.add_feed_forward_length(shape.hidden_dim)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_kv_heads)
    if shape.arch == "gpt2":
        writer.add_layer_norm_eps(shape.eps)
        return
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_rope_dimension_count(shape.q_dim // shape.n_heads)
    writer.add_rope_freq_base(shape.rope_base)
    if shape.arch in ("qwen3", "gemma3"):
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
    if shape.arch == "gemma3":
        writer.add_sliding_window(512)


def rope_factors(shape, low=1.0, high=4.0, old_ctx=8192):
    """Llama-3's divisors: slow frequencies are divided by the factor, fast ones stay, those between blend."""
    head = shape.q_dim // shape.n_heads
    waves = 2 * np.pi * shape.rope_base ** (np.arange(0, head, 2) / head)
    blend = np.clip((old_ctx / waves - low) / (high - low), 0, 1)
    return (1 / ((1 - blend) / shape.rope_factor + blend)).astype(np.float32)


def tensors(shape, file_type, seed=0, whole=0):
    """(name, type name, (n_cols, n_rows) or (n,), function giving the data) of every tensor, in file order.

    A tensor's random numbers depend on its name and the seed alone: models that share names share weights.
    whole: the layers of the model that this one is the beginning of, if it is a draft."""
    gqa = shape.n_heads // shape.n_kv_heads
    vocab_size = VOCABS[shape.vocab].size
    n_layers = whole or shape.n_layers
    calm = (2 * n_layers) ** -0.5               # what each layer may add to the residual stream

    def matrix(role, n_cols, n_rows, layer=-1, gain=1.0, is_output=False, kind=None):
        name = f"blk.{layer}.{role}.weight" if layer >= 0 else f"{role}.weight"
        kind = kind or tensor_type(file_type, role, n_cols, Place(layer, n_layers, gqa), is_output)
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        std = gain * n_cols ** -0.5
        return name, kind, (n_cols, n_rows), lambda: random_matrix(kind, n_cols, n_rows, std, rng)

    def vector(name, n, value):
        return name, "F32", (n,), lambda: np.full(n, value, np.float32)

    yield matrix("token_embd", shape.dim, vocab_size, gain=3.0, is_output=shape.tied)
    if isinstance(shape, Mixed):
        yield from mixed_tensors(shape, file_type, seed, n_layers, vocab_size)
        if not shape.tied:
            yield matrix("output", shape.dim, vocab_size, gain=3.0, is_output=True)
        return
    if shape.arch == "gpt2":
        yield matrix("position_embd", shape.dim, shape.n_ctx, kind="F32")
    if shape.rope_factor:
        factors = rope_factors(shape)
        yield "rope_freqs.weight", "F32", factors.shape, lambda: factors
    for layer in range(shape.n_layers):
        for name, n, value in layer_vectors(shape):
            yield vector(f"blk.{layer}.{name}", n, value)
        for role, n_cols, n_rows in layer_tensors(shape):
            yield matrix(role, n_cols, n_rows, layer, calm if role in ("attn_output", "ffn_down") else 1.0)
    yield vector("output_norm.weight", shape.dim, 1.0)
    if shape.arch == "gpt2":
        yield vector("output_norm.bias", shape.dim, 0.0)
    if not shape.tied:
        yield matrix("output", shape.dim, vocab_size, gain=3.0, is_output=True)


INTO_THE_STREAM = ("attn_output", "ffn_down", "ffn_down_exps", "ffn_down_shexp", "ssm_out",
                   "shortconv.out_proj")


def mixed_tensors(shape, file_type, seed, n_layers, vocab_size):
    """Those of a model whose layers differ, but for the embedding and the output."""
    def tensor(weight, layer):
        role = weight.name.removesuffix(".weight")
        name = f"blk.{layer}.{weight.name}" if layer >= 0 else weight.name
        if weight.fill is not None:
            return name, "F32", weight.dims, lambda: np.full(weight.dims[::-1], weight.fill, np.float32)
        n_cols, n_rows = weight.dims[0], int(np.prod(weight.dims[1:]))
        kind = tensor_type(file_type, role, n_cols, Place(layer, n_layers, shape.n_heads // shape.n_kv_heads))
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        std = ((2 * n_layers) ** -0.5 if role in INTO_THE_STREAM else 1.0) * n_cols**-0.5
        return name, kind, weight.dims, lambda: random_matrix(kind, n_cols, n_rows, std, rng)

    for weight in shape.outside(shape, vocab_size):
        yield tensor(weight, -1)
    for layer in range(shape.n_layers):
        for weight in shape.layer(shape, layer):
            yield tensor(weight, layer)
    for weight in norm("output_norm", shape.dim) if shape.final_norm is None else shape.final_norm:
        yield tensor(weight, -1)


def write(path, shape, file_type, name="model", seed=0, whole=0):
    """Write the model and return the bytes of its tensors."""
    vocab = VOCABS[shape.vocab]
    writer = gguf.GGUFWriter(path, shape.arch)
    add_metadata(writer, name, shape, file_type)
    add_vocabulary(writer, vocab)
    writer.add_vocab_size(vocab.size)
    todo = list(tensors(shape, file_type, seed, whole))
    total = 0
    for tensor_name, kind, dims, _ in todo:
        kind = gguf.GGMLQuantizationType[kind]
        block_size, type_size = gguf.GGML_QUANT_SIZES[kind]
        n_bytes = int(np.prod(dims)) // block_size * type_size
        writer.add_tensor_info(tensor_name, dims[::-1], np.dtype(np.float32), n_bytes, raw_dtype=kind)
        total += n_bytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for *_, data in todo:
        writer.write_tensor_data(data())
    writer.close()
    return total


# ---- pairs -------------------------------------------------------------------------------------------------

def scramble(path, seed=0):
    """Put the blocks of every matrix of a file in random order, in place:
    a model of the same cost that knows nothing."""
    rng = np.random.default_rng(seed)
    for tensor in gguf.GGUFReader(path, "r+").tensors:
        if len(tensor.shape) > 1:
            rng.shuffle(tensor.data.reshape(-1, gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]
                                            // tensor.data.itemsize))


TRIES = 8                               # of a gain; after each the models are loaded and compared
SAMPLE = (4, 96)                        # texts and tokens of a comparison


def set_gain(path, shape, file_type, first, gain):
    """Set the input norms of the layers from `first` on, in a file that is there:
    what they add shrinks with them."""
    ALIGNED = 32
    names = [(name, n) for name, n, _ in layer_vectors(shape)
             if name in ("attn_norm.weight", "ffn_norm.weight")]
    wanted = {f"blk.{layer}.{name}": n for layer in range(first, shape.n_layers) for name, n in names}
    at, places = 0, {}
    for name, kind, dims, _ in tensors(shape, file_type):
        block_size, type_size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        places[name] = at
        at += -(-int(np.prod(dims)) // block_size * type_size // ALIGNED) * ALIGNED
    start = Path(path).stat().st_size - at
    with open(path, "r+b") as file:
        for name, n in wanted.items():
            file.seek(start + places[name])
            file.write(np.full(n, gain, "<f4").tobytes())


def agreement(target, draft):
    """How often the draft's best token is the target's, along texts that the target writes from
    random beginnings."""
    import pybmc

    texts, length = SAMPLE
    with pybmc.Model(target) as model, pybmc.Model(draft) as small:
        rng, same = np.random.default_rng(0), 0
        for _ in range(texts):
            text = rng.integers(0, model.config.vocab_size, 4).tolist()
            text += [t.id for t in pybmc.generate(model, text, length, stop_tokens=())]
            with model.session() as one, small.session() as other:
                best = [s.eval(text[:-1], "argmax")[3:] for s in (one, other)]
            same += int((best[0] == best[1]).sum())
        return same / (texts * length)


def write_pair(path, draft_path, shape, file_type, name, wanted, layers=1, seed=0):
    """Write both models; the gain that was found and the agreement that was measured."""
    shape = replace(shape, tied=False)          # tied weights would repeat a token for ever
    write(path, shape, file_type, name, seed)
    write(draft_path, replace(shape, n_layers=layers), file_type, f"{name} draft", seed, whole=shape.n_layers)
    low, high, tried = 0.0, 1.0, []             # agreement falls as the gain rises
    for _ in range(TRIES):
        gain = (low + high) / 2
        set_gain(path, shape, file_type, layers, gain)
        found = agreement(path, draft_path)
        tried.append((abs(found - wanted), gain, found))
        low, high = (gain, high) if found > wanted else (low, gain)
    _, gain, found = min(tried)
    set_gain(path, shape, file_type, layers, gain)
    return gain, found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=sorted(MODELS), metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--type", default="Q4_K_M", help=f"{', '.join(MIXES)}; pure-TYPE: no mix")
    parser.add_argument("--layers", type=int, help="write only the first LAYERS layers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pair", type=float, metavar="SHARE",
                        help="also write OUTPUT-draft.gguf, a draft whose best token is the model's so "
                             "often (0.85)")
    parser.add_argument("--draft-layers", type=int, default=1, help="layers of that draft")
    parser.add_argument("-o", "--output", type=Path, help="default: MODEL-TYPE.gguf")
    args = parser.parse_args()
    if args.type.removeprefix("pure-") not in MIXES.keys() | BLOCKS.keys():
        parser.error(f"unknown type {args.type}; there are {', '.join(MIXES)} and pure-TYPE")
    shape = MODELS[args.model]
    if args.layers and not 0 < args.layers <= shape.n_layers:
        parser.error(f"--layers: expected 1 to {shape.n_layers}, found {args.layers}")
    shape = replace(shape, n_layers=args.layers or shape.n_layers)
    path = args.output or Path(f"{args.model}-{args.type}.gguf")
    if args.pair is not None:
        if isinstance(shape, Mixed):
            parser.error(f"there are no pairs of {args.model}: its layers differ")
        if not 0 < args.pair < 1 or not 0 < args.draft_layers < shape.n_layers:
            parser.error("a pair needs an agreement between 0 and 1, and a draft with fewer layers than "
                         "the model")
        draft = path.with_name(f"{path.stem}-draft.gguf")
        gain, found = write_pair(path, draft, shape, args.type, args.model, args.pair,
                                 args.draft_layers, args.seed)
        print(f"{path} and {draft}: they agree on {found:.1%} of tokens (gain of later layers {gain:.4f})",
              file=sys.stderr)
        return
    total = write(path, shape, args.type, args.model, args.seed)
    print(f"{path}: {total / 1e6:.0f} MB of tensors", file=sys.stderr)


if __name__ == "__main__":
    main()
