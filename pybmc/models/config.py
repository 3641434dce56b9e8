"""A model in numbers, read from a file: its blocks, its rope tables, and what holds for all layers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from ..errors import FormatError, printable
from ..files.gguf import GGUF

# These register their architectures.
from . import deepseek, encoders, gemma, hybrids, llama, mixtures, older, phi, qwen  # noqa: F401
from .layers import RMS, Attention, Block, Dense, Experts, Mla
from .parts import REGISTRY, Architecture, Reader
from .pooling import Pooling, read_pooling
from .rope import Table


@dataclass
class Config:
    """A model in numbers. Lengths are counts of values, positions or tokens."""

    arch: str
    dim: int
    n_layers: int
    vocab_size: int
    n_ctx: int                          # the longest sequence it was made for
    norm_eps: float
    layers: list[tuple[Block, ...]]
    ropes: list[Table] = field(default_factory=list)
    long_rope: bool = False             # table 1 is table 0 for contexts beyond original_ctx
    original_ctx: int = 0
    norm: str = RMS
    causal: bool = True
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    per_layer_dim: int = 0
    pooling: Pooling = Pooling()
    first_layer: int = 0                # the file's number of the first of layers
    head: Config | None = None          # of the file's draft head, a model of one layer
    n_predicting: int = 0               # layers of the file after n_layers, which predict further: left out

    @property
    def spec(self) -> Architecture:
        return REGISTRY[self.arch]

    @property
    def blocks(self) -> list[tuple[int, Block]]:
        """Every block with its layer's number, in the order of the pass."""
        return [(i, block) for i, layer in enumerate(self.layers, self.first_layer) for block in layer]

    @property
    def attention(self) -> Attention | Mla | None:
        """The first attention block: what `show` tells of heads."""
        return next((block for _, block in self.blocks if isinstance(block, (Attention, Mla))), None)

    def _of_attention(self, name: str) -> int:
        return getattr(self.attention, name) if self.attention else 0

    @property
    def n_heads(self) -> int:
        return self._of_attention("n_heads")

    @property
    def n_kv_heads(self) -> int:
        return self._of_attention("n_kv_heads")

    @property
    def head_dim(self) -> int:
        return self._of_attention("k_dim")

    @property
    def q_dim(self) -> int:
        return self._of_attention("q_dim")

    @property
    def hidden_dim(self) -> int:
        return next((block.hidden_dim for _, block in self.blocks if hasattr(block, "hidden_dim")), 0)

    @property
    def kv_row_bytes(self) -> int:
        """Bytes that keys and values of one token take in f16, all layers."""
        return sum(2 * getattr(block, "row_values", 0) for _, block in self.blocks)


# Files that are no language model, by general.type or general.architecture. An encoder may be in the model's
# own file.
ENCODER = "pybmc reads text only"
OTHERS = {
    "adapter": "a LoRA adapter, which changes another model; merge it into that model",
    "controlvector": "a control vector, which changes another model",
    "imatrix": "an importance matrix, which helps to quantize a model",
    **dict.fromkeys(("mmproj", "clip-vision", "clip"),
                    "an encoder of images or sound (mmproj), which goes with a model; "
                    f"{ENCODER}: take the model's own file"),
    **dict.fromkeys(("aura", "cosmos", "flux", "hidream", "hyvid", "ltxv", "lumina2", "qwen_image",
                     "sd1", "sd3", "sdxl", "wan"), "a model that makes images or videos"),
}
ENCODER_TENSORS = ("v.", "a.", "mm.")


def _check_model(file: GGUF, arch: object) -> None:
    """Whether the file is a language model of a known architecture."""
    for what in (file.metadata.get("general.type"), arch):
        if isinstance(what, str) and what in OTHERS:
            raise FormatError(f"{file.path}: expected a language model, found {OTHERS[what]}")
    if not isinstance(arch, str) or arch not in REGISTRY:
        raise FormatError(f"{file.path}: architecture {arch!r:.60} is not supported; "
                          f"expected one of the {len(REGISTRY)} that docs/architectures.md lists")
    if tensor := next((name for name in file.tensors if name.startswith(ENCODER_TENSORS)), None):
        raise FormatError(f"{file.path}: {printable(tensor)}: an encoder of images or sound is part of the "
                          f"file; {ENCODER}: take a file without it, such as llama.cpp's converter writes")


def read_config(file: GGUF) -> Config:
    """The Config of an opened file. Raises FormatError naming the key, or the architecture."""
    name = file.metadata.get("general.architecture")
    _check_model(file, name)
    if "token_embd.weight" not in file.tensors:
        raise FormatError(f"{file.path}: there are no weights in it (token_embd.weight is missing)")
    k = Reader(file, name)
    eps = "attention.layer_norm_rms_epsilon" if k.spec.norm == RMS else "attention.layer_norm_epsilon"
    other = "attention.layer_norm_epsilon" if k.spec.norm == RMS else "attention.layer_norm_rms_epsilon"
    config = Config(
        arch=name, dim=k.dim, n_layers=k.n_layers, n_predicting=k.n_predicting, n_ctx=k.n_ctx,
        norm=k.spec.norm,
        vocab_size=math.prod(file.tensors["token_embd.weight"].shape[1:]),
        norm_eps=k.number(eps, k.find(other), high=1.0),
        layers=[tuple(k.spec.layer(k, i)) for i in range(k.n_layers)],
        causal=k.flag("attention.causal", k.spec.causal),
        embedding_scale=k.spec.embedding_scale(k), logit_scale=k.spec.logit_scale(k),
        logit_softcap=k.number("final_logit_softcapping", k.spec.logit_softcap),
        per_layer_dim=k.count("embedding_length_per_layer_input", 0, low=0, high=1 << 16),
        pooling=read_pooling(k),
    )
    config.ropes, config.long_rope = k.tables, k.long
    config.original_ctx = k.count("rope.scaling.original_context_length", k.n_ctx) if k.long else 0
    _find_sources(k, config)
    config.head = _read_head(k, config)
    _check_vocabulary(file, config)
    k.check_all_used()
    return config


NEXTN = ("eh_proj", "enorm", "hnorm")   # tensors that a draft head has besides those of a layer


def _read_head(k: Reader, config: Config) -> Config | None:
    """The layer that predicts one token further. None where the file has none, although the key counts it, or
    one that does not work as a draft head: its rows have to be all that it keeps of a text."""
    i = config.n_layers
    if not config.causal or config.per_layer_dim or not all(k.in_layer(i, f"nextn.{name}") for name in NEXTN):
        return None
    try:
        layer = k.spec.layer(k, i)
    except FormatError:
        return None
    if not isinstance(layer[0], (Attention, Mla)) or not all(map(_keeps_all_rows, layer)):
        return None
    return replace(config, layers=[layer], n_layers=1, first_layer=i, pooling=Pooling())


def _keeps_all_rows(block: Block) -> bool:
    if isinstance(block, Attention):
        return not block.window and block.source is None
    return isinstance(block, (Mla, Dense, Experts))


def _find_sources(k: Reader, config: Config) -> None:
    """How many blocks back the ones are whose keys and values others read."""
    blocks = config.blocks
    first = {i: number for number, (i, block) in reversed(list(enumerate(blocks)))
             if isinstance(block, Attention)}
    for number, (i, block) in enumerate(blocks):
        if isinstance(block, Attention) and block.source is not None:
            if not 0 <= block.source < i or block.source not in first:
                raise k.error("attention.shared_kv_layers", f"fewer layers than {config.n_layers - 1}",
                              k.find("attention.shared_kv_layers"))
            block.kv_from = number - first[block.source]


def _check_vocabulary(file: GGUF, config: Config) -> None:
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if tokens is not None and not isinstance(tokens, list):
        raise FormatError(f"{file.path}: tokenizer.ggml.tokens: expected a list of strings, "
                          f"found {tokens!r:.60}")
    if tokens is not None and len(tokens) != config.vocab_size:
        raise FormatError(f"{file.path}: the vocabulary has {len(tokens)} tokens, "
                          f"token_embd.weight {config.vocab_size} rows")
