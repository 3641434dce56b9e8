"""Tiny GGUF models with random weights and vocabularies that round-trip text, written in milliseconds.

    tiny.model("llama")                                       a path; the same arguments give the same file
    tiny.model("qwen3", types="Q4_K", dim=256, head_dim=32)   types: one, or by role with "*" for the rest
    metadata, tensors = tiny.parts("phi3")                    for files with something wrong in them: change
    tiny.save(path, metadata, tensors)                        what parts() gives and save it

Rows that a type's blocks do not divide get a smaller type, as llama.cpp's quantizer does it.
Weights are scaled so that logits spread by about 3.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2", "gemma3", "phi3")

# Blocks of each layer of those with recurrent ones, Attention, gated attention (Q), gated Delta
# net, Mamba 2, short Convolution, Feed-forward.
RECURRENT = {
    "qwen35": ("DF", "QF", "DF"), "lfm2": ("CF", "AF", "CF"), "granitehybrid": ("MF", "AF", "MF"),
    "nemotron_h": ("M", "F", "A", "M"),
    "falcon-h1": ("AMF", "AMF"),
}

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
         "IQ4_NL", "IQ4_XS", "MXFP4", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S",
         "TQ1_0", "TQ2_0", "NVFP4")
OWN_TYPES = ("Q1_0", "Q2_0")        # that the gguf package does not decode
NUMBERS = {quant.name: int(quant) for quant in GGMLQuantizationType} | {"Q2_0": 42}
GGML_QUANT_SIZES.setdefault(NUMBERS["Q2_0"], (64, 18))

SMALL = dict(dim=32, hidden_dim=32, n_heads=2, n_layers=1, n_ctx=64, vocab_size=300, vocab="llama")

TEXT = """\
Once upon a time there was a small grey mouse who lived under the floor of a mill. Every night she listened to the
great wheel, and every morning she counted the grains that the miller had dropped. "One for the winter," she said,
"and one for the road, and one for the friend whom I have not met yet." The miller's cat had heard her counting, but
the cat was old and the nights were cold, and in the end they shared the warm place behind the stove. When spring
came the mouse went down to the river with the third grain, and there she planted it. It grew into a tall ear of
wheat, and under it she met a sparrow who told her the story of the sea. 12 boats, 345 sails, 6789 waves. They're
still talking, we'll see; it's said that they never agreed about anything, and never parted either.
"""  # noqa: E501

CHATML = ("{% for message in messages %}"
          "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")

NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE = 1, 2, 3, 5, 6      # token types of GGUF

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


# Vocabularies

@lru_cache
def _trained(spaces: bool):
    """(pieces in the order of training, merges as pairs) of BPE on TEXT,
    over words with "▁" or over bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = (pre_tokenizers.Metaspace() if spaces
                               else pre_tokenizers.ByteLevel(add_prefix_space=False))
    alphabet = [] if spaces else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    return sorted(model["vocab"], key=model["vocab"].get), merges


def _padded(tokens: list[str], types: list[int], size: int):
    for i in range(size - len(tokens)):
        tokens.append(f"<unused{i}>")
        types.append(UNUSED)
    return tokens, types


def bpe_vocabulary(size: int, pre: str) -> dict:
    """Byte-level BPE as GPT-2's: 256 bytes, merges, and three control tokens at the end."""
    pieces, merges = _trained(spaces=False)
    if size < 256 + len(SPECIAL):
        raise ValueError(f"a byte-level vocabulary has at least {256 + len(SPECIAL)} tokens, not {size}")
    n_pieces = min(len(pieces), size - len(SPECIAL))
    known = set(pieces[:n_pieces])
    merges = [f"{a} {b}" for a, b in merges if a + b in known]
    tokens = [*pieces[:n_pieces], *SPECIAL]
    tokens, types = _padded(tokens, [NORMAL] * n_pieces + [CONTROL] * len(SPECIAL), size)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": n_pieces,
        "tokenizer.ggml.eos_token_id": n_pieces,
        "tokenizer.ggml.eot_token_id": n_pieces + 2,
        "tokenizer.chat_template": CHATML,
    }


def spm_vocabulary(size: int) -> dict:
    """SentencePiece BPE as Llama's: <unk> <s> </s>, 256 bytes, then pieces that score by their rank."""
    pieces, _ = _trained(spaces=True)
    merged = [p for p in pieces if len(p) > 1]
    ranked = [*merged, *(p for p in pieces if len(p) == 1)]    # single characters come last and score lowest
    singles = len(pieces) - len(merged)
    if size < 259 + singles:
        raise ValueError(f"this SentencePiece vocabulary has at least {259 + singles} tokens, not {size}")
    n_merged = min(len(merged), size - 259 - singles)
    ranked = [*merged[:n_merged], *ranked[len(merged):]]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *ranked]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(ranked)]
    tokens, types = _padded(tokens, types, size)
    scores = [0.0] * 259 + [-float(i) for i in range(size - 259)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


VOCABULARIES = {
    "llama": lambda size: bpe_vocabulary(size, "llama-bpe"),
    "qwen2": lambda size: bpe_vocabulary(size, "qwen2"),
    "qwen3": lambda size: bpe_vocabulary(size, "qwen2"),
    "gpt2": lambda size: bpe_vocabulary(size, "gpt-2"),
    "gemma3": spm_vocabulary,
    "phi3": spm_vocabulary,
    "spm": spm_vocabulary,
    **dict.fromkeys(RECURRENT, lambda size: bpe_vocabulary(size, "qwen2")),
}


# Weights

def fitting(type: str, n_cols: int) -> str:
    """The type, or what llama.cpp's quantizer takes instead where its blocks do not divide n_cols."""
    smaller = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
               "IQ4_XS": "IQ4_NL"}
    while n_cols % GGML_QUANT_SIZES[NUMBERS[type]][0]:
        type = smaller.get(type, "F16")
    return type


# Types that the gguf package does not write: where a block's f16 scale and min stand, and min in units of
# scale, so that the mean of random blocks is zero. _put_scale is used where the scale is no f16 in one piece.
RANDOM_BLOCKS = {
    "Q2_K": (80, 82, 1.5), "Q3_K": (108, None, 0), "Q4_K": (0, 2, 7.5), "Q5_K": (0, 2, 15.5),
    "Q6_K": (208, None, 0), "IQ4_NL": (0, None, 0), "IQ4_XS": (0, None, 0), "IQ1_S": (0, None, 0),
    "IQ1_M": (49, None, 0),
    "IQ2_XXS": (0, None, 0), "IQ2_XS": (0, None, 0), "IQ2_S": (0, None, 0), "IQ3_XXS": (0, None, 0),
    "IQ3_S": (0, None, 0), "NVFP4": (0, None, 0), "Q1_0": (0, None, 0), "Q2_0": (0, None, 0),
}


def _put_f16(blocks, at, values):
    if at is not None:
        blocks[:, at:at + 2] = np.asarray(values, np.float16).reshape(-1, 1).view(np.uint8)


def _put_scale(type, blocks, values):
    if type == "NVFP4":
        blocks[:, :4] = gguf.quants.NVFP4.fp32_to_ue4m3(np.repeat(values, 4)).reshape(-1, 4)
    elif type == "IQ1_M":                   # four bits of the f16 in the highest of every second byte
        nibbles = np.asarray(values, np.float16).view(np.uint16).reshape(-1, 1) >> np.arange(0, 16, 4) & 15
        blocks[:, 49::2] = blocks[:, 49::2] & 15 | nibbles << 4
    else:
        _put_f16(blocks, RANDOM_BLOCKS[type][0], values)


def random_tensor(rng, type: str, n_rows: int, n_cols: int, std: float) -> np.ndarray:
    """Weights of the given spread: (n_rows, bytes of a row) uint8."""
    if type not in RANDOM_BLOCKS:
        weights = rng.standard_normal((n_rows, n_cols), np.float32) * np.float32(std)
        return np.ascontiguousarray(gguf.quants.quantize(weights, GGMLQuantizationType[type])).view(np.uint8)
    block_size, type_size = GGML_QUANT_SIZES[NUMBERS[type]]
    n_blocks = n_rows * n_cols // block_size
    _, min_at, min_per_scale = RANDOM_BLOCKS[type]
    blocks = rng.integers(0, 256, (n_blocks, type_size), np.uint8)
    _put_scale(type, blocks, np.ones(n_blocks))
    _put_f16(blocks, min_at, np.full(n_blocks, min_per_scale))
    unit = values(type, blocks).std()
    scales = std / unit * rng.uniform(0.7, 1.3, n_blocks)
    if type == "Q2_0":                      # its codes, -1 to 2, lean to one side
        scales *= rng.choice([-1, 1], n_blocks)
    _put_scale(type, blocks, scales)
    _put_f16(blocks, min_at, scales * min_per_scale)
    return blocks.reshape(n_rows, -1)


class _Tensors:
    """Collects name -> (type, uint8 rows); a vector is one row of F32."""

    def __init__(self, rng, types):
        self.rng = rng
        self.types = {"*": types} if isinstance(types, str) else {"*": "F16", **types}
        self.made = {}

    def matrix(self, name, n_rows, n_cols, std=None, type=None):
        role = name.split(".")[-1]
        type = fitting(type or self.types.get(role, self.types["*"]), n_cols)
        self.made[name + ".weight"] = type, random_tensor(self.rng, type, n_rows, n_cols, std or n_cols**-0.5)

    def vector(self, name, n, mean=0.0, std=0.1):
        values = (mean + std * self.rng.standard_normal(n)).astype(np.float32)
        self.made[name] = "F32", values.view(np.uint8)

    def norm(self, name, n, bias=False):
        self.vector(name + ".weight", n, mean=1.0)
        if bias:
            self.vector(name + ".bias", n)


def _layer(make: _Tensors, arch, i, dim, hidden_dim, n_heads, n_kv_heads, head_dim):
    b = f"blk.{i}."
    q_dim, kv_dim, gpt2 = n_heads * head_dim, n_kv_heads * head_dim, arch == "gpt2"
    make.norm(b + "attn_norm", dim, bias=gpt2)
    if arch in ("gpt2", "phi3"):
        make.matrix(b + "attn_qkv", q_dim + 2 * kv_dim, dim)
    else:
        for role, n_rows in (("attn_q", q_dim), ("attn_k", kv_dim), ("attn_v", kv_dim)):
            make.matrix(b + role, n_rows, dim)
            if arch == "qwen2":
                make.vector(b + role + ".bias", n_rows)
    if arch in ("qwen3", "gemma3"):
        make.norm(b + "attn_q_norm", head_dim)
        make.norm(b + "attn_k_norm", head_dim)
    make.matrix(b + "attn_output", dim, q_dim)
    if arch == "gemma3":
        make.norm(b + "post_attention_norm", dim)
    make.norm(b + "ffn_norm", dim, bias=gpt2)
    if arch not in ("gpt2", "phi3"):
        make.matrix(b + "ffn_gate", hidden_dim, dim)
    make.matrix(b + "ffn_up", 2 * hidden_dim if arch == "phi3" else hidden_dim, dim)
    make.matrix(b + "ffn_down", dim, hidden_dim)
    if arch == "gemma3":
        make.norm(b + "post_ffw_norm", dim)
    if gpt2:
        for role, n in (("attn_qkv", q_dim + 2 * kv_dim), ("attn_output", dim), ("ffn_up", hidden_dim),
                        ("ffn_down", dim)):
            make.vector(b + role + ".bias", n)


def _recurrent_metadata(arch, dim, hidden_dim, n_kv_heads, head_dim):
    """What the blocks of RECURRENT add: sizes that vectors do not divide, for Mamba 2,
    and states of two slices a head."""
    blocks = RECURRENT[arch]
    metadata = {f"{arch}.attention.head_count_kv": [n_kv_heads * ("A" in layer or "Q" in layer)
                                                    for layer in blocks],
                f"{arch}.attention.key_length": head_dim, f"{arch}.attention.value_length": head_dim}
    if arch == "lfm2":
        return metadata | {"lfm2.shortconv.l_cache": 3}
    delta = arch == "qwen35"
    metadata |= {f"{arch}.ssm.conv_kernel": 4, f"{arch}.ssm.state_size": 32 if delta else 9,
                 f"{arch}.ssm.time_step_rank": 4, f"{arch}.ssm.group_count": 1 if arch == "granitehybrid"
                 else 2, f"{arch}.ssm.inner_size": 128 if delta else 96}
    if delta:
        metadata |= {"qwen35.full_attention_interval": 2, "qwen35.attention.head_count_kv": n_kv_heads}
    if arch == "granitehybrid":
        metadata |= {"granitehybrid.rope.scaling.finetuned": False, "granitehybrid.residual_scale": 0.6}
    if arch == "nemotron_h":
        metadata["nemotron_h.feed_forward_length"] = [hidden_dim * (layer == "F") for layer in blocks]
    return metadata


def _recurrent_layer(make: _Tensors, arch, i, dim, hidden_dim, n_heads, n_kv_heads, head_dim, metadata):
    def size(key):
        return metadata.get(f"{arch}.ssm.{key}", 0)

    b, blocks = f"blk.{i}.", RECURRENT[arch][i]
    heads, inner, keys = size("time_step_rank"), size("inner_size"), size("state_size") * size("group_count")
    make.norm(b + "attn_norm", dim)
    if "A" in blocks or "Q" in blocks:
        for role, n_rows in (("attn_q", n_heads * head_dim * (1 + ("Q" in blocks))),
                             ("attn_k", n_kv_heads * head_dim), ("attn_v", n_kv_heads * head_dim)):
            make.matrix(b + role, n_rows, dim)
        make.matrix(b + "attn_output", dim, n_heads * head_dim)
        if arch in ("qwen35", "lfm2"):
            make.norm(b + "attn_q_norm", head_dim)
            make.norm(b + "attn_k_norm", head_dim)
    if "C" in blocks:
        make.matrix(b + "shortconv.in_proj", 3 * dim, dim)
        make.matrix(b + "shortconv.conv", dim, 3, type="F32")
        make.matrix(b + "shortconv.out_proj", dim, dim)
    if "D" in blocks:
        for role, n_rows in (("attn_qkv", 2 * keys + inner), ("attn_gate", inner), ("ssm_alpha", heads),
                             ("ssm_beta", heads)):
            make.matrix(b + role, n_rows, dim)
        make.norm(b + "ssm_norm", inner // heads)
    if "M" in blocks:
        make.matrix(b + "ssm_in", 2 * inner + 2 * keys + heads, dim)
        make.vector(b + "ssm_conv1d.bias", 2 * keys + inner)
        make.matrix(b + "ssm_d", heads, 1, type="F32")
        make.made[b + "ssm_d"] = make.made.pop(b + "ssm_d.weight")
        if arch != "falcon-h1":
            make.matrix(b + "ssm_norm", size("group_count"), inner // size("group_count"), type="F32")
    if "D" in blocks or "M" in blocks:
        make.matrix(b + "ssm_conv1d", 2 * keys + inner, 4, type="F32")
        make.matrix(b + "ssm_out", dim, inner)
        make.vector(b + "ssm_dt.bias", heads)
        a = -np.exp(make.rng.uniform(-2, 1, (heads, 1))).astype(np.float32)
        make.made[b + "ssm_a"] = "F32", (a if "M" in blocks else a.ravel()).view(np.uint8)
    if "F" in blocks:
        if arch != "nemotron_h":
            make.norm(b + ("post_attention_norm" if arch == "qwen35" else "ffn_norm"), dim)
            make.matrix(b + "ffn_gate", hidden_dim, dim)
        make.matrix(b + "ffn_up", hidden_dim, dim)
        make.matrix(b + "ffn_down", dim, hidden_dim)


# Files

def parts(arch="llama", types="F16", dim=64, hidden_dim=96, n_layers=None, n_heads=4, n_kv_heads=None,
          head_dim=None, vocab_size=401, n_ctx=512, tied=None, vocab=None, rope_factors=False,
          window=16, seed=0):
    """metadata {key: value} and tensors {name: (type, uint8 rows)} of a model.

    n_kv_heads is 2 (gpt2: n_heads), head_dim is dim / n_heads, n_layers is 2 (gemma3: 7, of which the sixth
    sees everything), tied is True for gpt2 and gemma3. vocab names the vocabulary of another architecture, or
    "spm". rope_factors adds Llama-3's rope_freqs, or phi3's long and short factors.
    """
    n_layers = n_layers or (7 if arch == "gemma3" else len(RECURRENT.get(arch, "12")))
    n_kv_heads = n_kv_heads or (n_heads if arch == "gpt2" else min(2, n_heads))
    n_rot = head_dim or dim // n_heads
    epsilon = "layer_norm_epsilon" if arch == "gpt2" else "layer_norm_rms_epsilon"
    metadata = {
        "general.architecture": arch,
        "general.name": "tiny",
        f"{arch}.context_length": n_ctx,
        f"{arch}.embedding_length": dim,
        f"{arch}.block_count": n_layers,
        f"{arch}.feed_forward_length": hidden_dim,
        f"{arch}.attention.head_count": n_heads,
        f"{arch}.attention.head_count_kv": None if arch == "gpt2" else n_kv_heads,
        f"{arch}.attention.{epsilon}": 1e-5,
        f"{arch}.vocab_size": vocab_size,
    }
    if arch != "gpt2":
        metadata |= {f"{arch}.rope.dimension_count": n_rot, f"{arch}.rope.freq_base": 10000.0}
    if arch in ("qwen3", "gemma3") or n_rot * n_heads != dim:
        metadata |= {f"{arch}.attention.key_length": n_rot, f"{arch}.attention.value_length": n_rot}
    if arch in ("gemma3", "phi3"):
        metadata[f"{arch}.attention.sliding_window"] = window
    if arch == "phi3":
        metadata[f"{arch}.rope.scaling.original_context_length"] = n_ctx
    if arch in RECURRENT:
        metadata |= _recurrent_metadata(arch, dim, hidden_dim, n_kv_heads, n_rot)
    metadata |= VOCABULARIES[vocab or arch](vocab_size)

    make = _Tensors(np.random.default_rng([seed, *arch.encode()]), types)
    make.matrix("token_embd", vocab_size, dim, 3 * dim**-0.5)
    if arch == "gpt2":
        make.matrix("position_embd", n_ctx, dim, dim**-0.5, type="F32")
    for i in range(n_layers):
        if arch in RECURRENT:
            _recurrent_layer(make, arch, i, dim, hidden_dim, n_heads, n_kv_heads, n_rot, metadata)
        else:
            _layer(make, arch, i, dim, hidden_dim, n_heads, n_kv_heads, n_rot)
    make.norm("token_embd_norm" if arch == "lfm2" else "output_norm", dim, bias=arch == "gpt2")
    if not (arch in ("gpt2", "gemma3") if tied is None else tied):
        make.matrix("output", vocab_size, dim, 3 * dim**-0.5)
    for name in ("rope_freqs", "rope_factors_long", "rope_factors_short"):
        if rope_factors and (arch == "phi3") == name.startswith("rope_factors"):
            factors = np.linspace(1, 8 if name != "rope_factors_short" else 2, n_rot // 2, dtype=np.float32)
            make.made[name + ".weight"] = "F32", factors.view(np.uint8)
    return metadata, make.made


def save(path, metadata: dict, tensors: dict) -> Path:
    """Write a GGUF. Integers become uint32 (int32 in arrays), floats float32;
    a value of None leaves its key out."""
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
             list: writer.add_array}
    for key, value in metadata.items():
        if value is not None and key != "general.architecture":
            kinds[type(value)](key, value)
    for name, (kind, rows) in tensors.items():
        writer.add_tensor(name, rows, raw_dtype=NUMBERS[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def values(type: str, rows: np.ndarray) -> np.ndarray:
    """What a tensor of parts() holds, as float32."""
    if type in OWN_TYPES:
        return _own_values(type, rows)
    return gguf.quants.dequantize(rows, GGMLQuantizationType[type])


def _own_values(type, rows):
    """Blocks of 18 bytes: a scale, then numbers of one bit or two, from the lowest bits up."""
    blocks, bits = rows.reshape(-1, 18), 1 if type == "Q1_0" else 2
    codes = blocks[:, 2:, None] >> np.arange(0, 8, bits, dtype=np.uint8) & (1 << bits) - 1
    codes = codes.reshape(len(blocks), -1).astype(np.float32)
    scales = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    return (scales * ((2 * codes if type == "Q1_0" else codes) - 1)).reshape(*rows.shape[:-1], -1)


@lru_cache
def folder() -> Path:
    path = Path(tempfile.mkdtemp(prefix="pybmc-tiny-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def shuffled(path, order: list[int], **shape) -> Path:
    """A copy of a llama model whose token i is the original's order[i]."""
    metadata, tensors = parts("llama", **shape)
    for key in ("tokens", "token_type"):
        values = metadata[f"tokenizer.ggml.{key}"]
        metadata[f"tokenizer.ggml.{key}"] = [values[i] for i in order]
    for key in ("bos", "eos", "eot"):
        key = f"tokenizer.ggml.{key}_token_id"
        metadata[key] = order.index(metadata[key])
    for name in ("token_embd.weight", "output.weight"):
        kind, rows = tensors[name]
        tensors[name] = kind, np.ascontiguousarray(rows[order])
    return save(path, metadata, tensors)


@lru_cache(maxsize=None)
def _model(arguments) -> Path:
    arguments = {key: dict(value) if key == "types" and isinstance(value, tuple) else value
                 for key, value in arguments}
    return save(folder() / f"{arguments['arch']}-{_model.cache_info().misses}.gguf", *parts(**arguments))


def model(arch="llama", types="F16", **shape) -> Path:
    """A file with a model, written once per process and removed at its end; arguments as for parts()."""
    types = tuple(sorted(types.items())) if isinstance(types, dict) else types
    return _model((("arch", arch), ("types", types), *sorted(shape.items())))
