"""The tensors of a file and their places: which block and role each one fills. The library lists the roles of
a kind of block."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace

import numpy as np

from .._native import check, ffi, lib, pointer
from ..errors import FormatError, printable
from ..files.gguf import GGUF, Tensor
from ..files.types import type_info
from .config import NEXTN, Config
from .layers import NORMS, Block
from .pooling import TENSORS as AFTER_THE_PASS
from .rope import TENSORS as ROPE_TENSORS

IGNORED = ("attn_rot_embd", "attn.rotary_emb.inv_freq")         # tables that some converters left behind
SUFFIXES = ("weight", "bias", "scale")
LAST = "layer_output_scale"            # belongs to the end of a layer
COMMON = (*NORMS, LAST)
FUSED = {"attn_qkv": ("attn_q", "attn_k", "attn_v"), "ffn_up": ("ffn_gate", "ffn_up")}
# A draft head's tensors outside its blocks.
HEAD = {"nextn.embed_tokens": "token_embd", "nextn.shared_head_norm": "output_norm",
        "nextn.shared_head_head": "output",
        **{f"nextn.{name}": f"nextn.{name}" for name in NEXTN}}
ONE_EXPERT = re.compile(r"(ffn_(?:gate|up|down))\.(\d{1,4})")


@dataclass(frozen=True)
class Role:
    """A tensor's place: role, block (-1 outside the blocks), expert (-1: all), its rows and its bytes.
    tensor.type: its type."""

    name: str
    block: int
    tensor: Tensor
    n_rows: int
    n_cols: int
    data: np.ndarray
    expert: int = -1
    mapped: bool = True                 # data lies in a mapping of the file


@lru_cache
def roles_of(kind: str | None) -> frozenset[str]:
    """The roles of a kind of block, or of the model."""
    number, names, i = -1 if kind is None else getattr(lib, f"BMC_{kind}"), set(), 0
    while (name := lib.bmc_role(number, i)) != ffi.NULL:
        names.add(ffi.string(name).decode())
        i += 1
    return frozenset(names | (set(COMMON) if kind else set()))


def bind(file: GGUF, config: Config) -> list[Role]:
    """Every tensor's role. Raises FormatError for one that is missing, has no role here, or cannot be cut."""
    by_layer: dict[int, list[tuple[int, Block]]] = {}
    for number, (layer, block) in enumerate(config.blocks):
        by_layer.setdefault(layer, []).append((number, block))
    roles = [role for tensor in file.tensors.values() for role in _roles(file, config, by_layer, tensor)]
    have = {(role.block, role.name) for role in roles}
    if config.causal and (-1, "output") not in have:        # tied: the embedding is the output too
        embedding = next(role for role in roles if role.name == "token_embd")
        roles.append(Role("output", -1, embedding.tensor, embedding.n_rows, embedding.n_cols, embedding.data))
    _check_needs(file, config, have)
    _check_end(file)
    return roles


def bind_head(file: GGUF, config: Config) -> list[Role]:
    """The same for a file's draft head; config: its own. Embedding and last norm are the model's where it has
    none, and the library gives it the model's output matrix."""
    blocks, roles = list(enumerate(block for _, block in config.blocks)), []
    for tensor in file.tensors.values():
        layer, name = _split(tensor)
        if layer == config.first_layer:
            found = ([_role(HEAD[name], -1, tensor)] if name in HEAD
                     else list(_block_roles(file, blocks, layer, name, tensor)))
            if not found:
                raise _misfit(file, tensor,
                              f"pybmc does not know this tensor of a draft head of {config.arch}")
            roles += found
    have = {(role.block, role.name) for role in roles}
    for name in {"token_embd", "output_norm"} - {name for block, name in have if block < 0}:
        if tensor := file.tensors.get(f"{name}.weight"):
            roles.append(_role(name, -1, tensor))
            have.add((-1, name))
    _check_needs(file, config, have)
    return roles


def _check_needs(file: GGUF, config: Config, have: set[tuple[int, str]]) -> None:
    for name in config.spec.needs:
        if (-1, config.spec.names.get(name, name)) not in have:
            raise FormatError(f"{file.path}: {_file_name(None, name)} is missing; {config.arch} needs it")
    for number, (layer, block) in enumerate(config.blocks):
        for name in block.needs:
            if (number, block.role(name)) not in have:
                missing = _file_name(None if name in block.outside else layer, name)
                raise FormatError(f"{file.path}: {missing} is missing; {config.arch} needs it")


def _check_end(file: GGUF) -> None:
    """Some programs give a file its full size before they fetch it: the missing part is zeros."""
    for last in file.ends:
        if last.name.endswith(".weight") and not last.data[-4096:].any() and not last.data.any():
            raise FormatError(f"{file.path}: the file is incomplete, as when a download broke off: "
                              f"{printable(last.name)}, the last of its tensors, is {last.nbytes} zeros")


def _file_name(layer: int | None, name: str) -> str:
    prefix = "" if layer is None else f"blk.{layer}."
    return prefix + name + ("" if name.rpartition(".")[2] in SUFFIXES else ".weight")


def _misfit(file: GGUF, tensor: Tensor, what: str) -> FormatError:
    return FormatError(f"{file.path}: {printable(tensor.name)}: {what}")


def _split(tensor: Tensor) -> tuple[int | None, str]:
    """The layer of a tensor, None outside the layers, and its name without "blk.N." and ".weight"."""
    name = tensor.name.removesuffix(".weight")
    if not name.startswith("blk."):
        return None, name
    number, _, inner = name[4:].partition(".")
    return (int(number) if number.isdecimal() and len(number) < 6 else 1 << 20), inner


def _knows(roles: frozenset[str], name: str) -> bool:
    stem, _, tail = name.rpartition(".")
    return name in roles or (tail in ("bias", "scale") and stem in roles)


def _roles(file: GGUF, config: Config, by_layer: dict, tensor: Tensor) -> Iterator[Role]:
    layer, name = _split(tensor)
    if name in IGNORED or name.partition(".")[0] in ROPE_TENSORS:
        return
    if layer is None and name in AFTER_THE_PASS:
        return
    if layer is not None and layer >= config.n_layers:
        if layer < config.n_layers + config.n_predicting:
            return                      # blocks that predict further
        raise _misfit(file, tensor, f"the model has {config.n_layers} layers")
    found = False
    if layer is None:
        role = config.spec.names.get(name, name)
        if _knows(roles_of(None), role):
            found = True
            yield _first_row(_role(role, -1, tensor)) if role == "token_types" else _role(role, -1, tensor)
        for number, (_, block) in enumerate(config.blocks):
            if name in block.outside:
                found = True
                yield _role(name, number, tensor)
    for role in _block_roles(file, by_layer.get(layer, []), layer, name, tensor):
        found = True
        yield role
    if not found and not any(name in block.unused for _, block in by_layer.get(layer, [])):
        raise _misfit(file, tensor, f"pybmc does not know this tensor of {config.arch}; "
                                    "the answer would be wrong without it")


def _block_roles(file: GGUF, blocks: list[tuple[int, Block]], layer: int | None, name: str,
                 tensor: Tensor) -> Iterator[Role]:
    """What a tensor is to the blocks of its layer."""
    for number, block in blocks[-1:] if name == LAST else blocks:
        yield from _roles_in(file, number, block, layer, name, tensor)


def _roles_in(file: GGUF, number: int, block: Block, layer: int | None, name: str,
              tensor: Tensor) -> Iterator[Role]:
    """What a tensor of the layer is to one of its blocks; nothing where it is another's."""
    roles, sizes = roles_of(block.kind), block.sizes()
    stem, dot, tail = name.partition(".")
    parts = [part for part in FUSED.get(stem, ()) if part in sizes]
    whole = stem in roles and not _is_fused(block, tensor)
    if parts and not whole and f"blk.{layer}.{parts[0]}.weight" not in file.tensors:
        yield from _cut(file, tensor, number, dot + tail, {part: sizes[part] for part in parts})
    elif rows := block.rows(stem):
        yield from _gather(file, tensor, number, dot + tail, rows)
    elif name == "ffn_gate_up_exps" and "ffn_gate_exps" in roles:
        yield from _cut_experts(file, tensor, number, block)
    elif (match := ONE_EXPERT.fullmatch(name)) and "ffn_up_exps" in roles:
        yield _role(f"{match[1]}_exps", number, tensor, expert=int(match[2]))
    elif name == "attn_kv_b" and "attn_k_b" in roles:
        yield from _split_kv_b(file, tensor, number, block)
    elif name not in block.unused and _knows(roles, role := block.role(name)):
        yield _role(role, number, tensor)


def _is_fused(block: Block, tensor: Tensor) -> bool:
    return getattr(block, "gated", False) and tensor.shape[-1] != block.hidden_dim


def _extent(tensor: Tensor) -> tuple[int, int]:
    """(n_rows, n_cols); what has more than two dimensions is rows all the same."""
    return math.prod(tensor.shape[1:]), tensor.shape[0]


def _role(name: str, block: int, tensor: Tensor, expert: int = -1) -> Role:
    n_rows, n_cols = _extent(tensor)
    return Role(name, block, tensor, n_rows, n_cols, tensor.data, expert)


def _first_row(role: Role) -> Role:
    return Role(role.name, role.block, role.tensor, 1, role.n_cols,
                role.data[: len(role.data) // role.n_rows], role.expert)


def _cut(file: GGUF, tensor: Tensor, block: int, tail: str, parts: dict[str, int]) -> Iterator[Role]:
    """A fused tensor as its parts: rows of a matrix, values of a bias; a factor holds for all of them."""
    total = sum(parts.values())
    bias = len(tensor.shape) == 1
    n_rows, n_cols = (tensor.shape[0], 1) if bias else _extent(tensor)
    if tail == ".scale":
        yield from (_role(name + tail, block, tensor) for name in parts)
        return
    if n_rows != total:
        raise _misfit(file, tensor,
                      f"expected {total} rows ({' + '.join(map(str, parts.values()))}), found {n_rows}")
    row_bytes, start = tensor.nbytes // total, 0
    for name, n in parts.items():
        data = tensor.data[start * row_bytes : (start + n) * row_bytes]
        yield Role(name + tail, block, tensor, 1 if bias else n, n if bias else n_cols, data)
        start += n


def _gather(file: GGUF, tensor: Tensor, block: int, tail: str,
            parts: dict[str, np.ndarray]) -> Iterator[Role]:
    """A tensor whose rows are several roles', in pieces: copies of them."""
    n_rows, n_cols = _extent(tensor)
    total = sum(map(len, parts.values()))
    if tail == ".scale":
        yield from (_role(name + tail, block, tensor) for name in parts)
        return
    if n_rows != total:
        raise _misfit(file, tensor, f"expected {total} rows, found {n_rows}")
    rows = tensor.data.reshape(n_rows, -1)
    for name, which in parts.items():
        yield Role(name, block, tensor, len(which), n_cols, rows[which].ravel(), mapped=False)


def _split_kv_b(file: GGUF, tensor: Tensor, number: int, block: Block) -> Iterator[Role]:
    """Each head's rows for keys and for values in one tensor, as first files have it. Those for keys turn
    round: the library multiplies queries with them. As float32."""
    nope = block.k_dim - block.rope_dim
    n_rows, n_cols = _extent(tensor)
    if (n_rows, n_cols) != (expected := (block.n_heads * (nope + block.v_dim), block.kv_rank)):
        raise _misfit(file, tensor,
                      f"expected {expected[0]} rows of {expected[1]} values, found {n_rows} of {n_cols}")
    heads = dequantize(tensor).reshape(block.n_heads, nope + block.v_dim, n_cols)
    float32 = SimpleNamespace(name=tensor.name, type=type_info(0))
    for name, values in (("attn_k_b", heads[:, :nope].transpose(0, 2, 1)), ("attn_v_b", heads[:, nope:])):
        yield Role(name, number, float32, values.shape[0] * values.shape[1], values.shape[2],
                   np.ascontiguousarray(values).reshape(-1).view(np.uint8), mapped=False)


def dequantize(tensor: Tensor) -> np.ndarray:
    """The values of a tensor, float32 (n_rows, n_cols)."""
    n_rows, n_cols = _extent(tensor)
    values = np.empty((n_rows, n_cols), np.float32)
    check(lib.bmc_dequantize(tensor.type.id, ffi.from_buffer(tensor.data), values.size, pointer(values)))
    return values


def _cut_experts(file: GGUF, tensor: Tensor, number: int, block: Block) -> Iterator[Role]:
    """Gate and up of all experts in one tensor: each expert's rows of gates, then of the others."""
    n_rows, n_cols = _extent(tensor)
    expected = 2 * block.hidden_dim * block.n_experts
    if n_rows != expected:
        raise _misfit(file, tensor, f"expected {expected} rows, found {n_rows}")
    half = tensor.nbytes // (2 * block.n_experts)
    for expert in range(block.n_experts):
        for part, role in enumerate(("ffn_gate_exps", "ffn_up_exps")):
            start = (2 * expert + part) * half
            yield Role(role, number, tensor, block.hidden_dim, n_cols, tensor.data[start : start + half],
                       expert)
