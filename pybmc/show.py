"""What a GGUF file is, without loading it: shape, types, sizes, and whether it runs here."""

import math
from collections import Counter

from .engine.gpu import GPU, fits, fitting, gpus, plan
from .engine.model import bound, check_model
from .errors import FormatError, printable
from .files.gguf import GGUF
from .models.bind import IGNORED, ROPE_TENSORS
from .models.config import read_config
from .models.layers import Experts
from .tokenizers import kind_of

ROWS_SHOWN = 4096                       # tokens of context that the estimate of memory includes


def describe(path) -> dict:
    """The facts about a file, as `pybmc show --json` prints them. Raises FormatError where it is no sound
    GGUF. path may be an open GGUF, which is closed."""
    with path if isinstance(path, GGUF) else GGUF(path) as file:
        def text(key):
            return value if isinstance(value := file.metadata.get(key), str) else None

        arch, tokens = text("general.architecture"), file.metadata.get("tokenizer.ggml.tokens")
        context = file.metadata.get(f"{arch}.context_length")
        info = {
            "path": str(file.path), "bytes": file.size, "files": len(file.paths),
            "gguf_version": file.version, "architecture": arch, "name": text("general.name"),
            "parameters": sum(math.prod(t.shape) for t in file.tensors.values() if _is_weight(t.name)),
            "tensors": len(file.tensors), "types": _types(file),
            "context": context if isinstance(context, int) else None,
            "tokenizer": {"model": text("tokenizer.ggml.model"), "pre": text("tokenizer.ggml.pre"),
                          "tokens": len(tokens) if isinstance(tokens, list) else 0},
            "chat_template": text("tokenizer.chat_template") is not None,
        }
        return info | _verdict(file)


def describe_gpus(path) -> list[dict]:
    """What the model takes on each GPU of this machine, whole and as many layers of it as fit. Raises
    FormatError, and DeviceError where there is no driver."""
    with GGUF(path) as file:
        config = read_config(file)
        handle, rows = bound(file, config, 1), min(config.n_ctx, ROWS_SHOWN)
        return [_on_gpu(gpu, handle, config, rows) for gpu in gpus()]


def _on_gpu(gpu: GPU, handle, config, rows: int) -> dict:
    whole, most = plan(handle, config.n_layers), fitting(handle, config, gpu.available)
    streams = most.stream_bytes if fits(most, config, gpu.available, True) else 0
    return vars(gpu) | {
        "layers": config.n_layers,
        "layers_that_can_run": whole.layers, "why_not_more": whole.why or None,
        "memory_bytes": whole.bytes(rows), "memory_context": rows,
        "layers_that_fit": most.layers,
        "fitting_bytes": most.bytes(rows) if most.layers or streams else 0,
        "stream_bytes": streams}


def gpu_lines(found: list[dict]) -> list[tuple[str, str]]:
    """The same for people."""
    out = []
    for gpu in found:
        out.append((f"GPU {gpu['index']}",
                    f"{gpu['name']}, {size(gpu['available'])} of {size(gpu['memory'])} available, "
                    f"capability {gpu['capability']}"))
        why = f" ({gpu['why_not_more']})" if gpu["why_not_more"] else ""
        out.append(("", f"{gpu['layers_that_can_run']} of {gpu['layers']} layers can run there{why}: "
                        f"{size(gpu['memory_bytes'])} with {gpu['memory_context']} tokens of context"))
        streams = gpu["stream_bytes"]
        through = f", {size(streams)} of it for prompts over the other layers" if streams else ""
        out.append(("", f"{gpu['layers_that_fit']} fit: {size(gpu['fitting_bytes'])}{through}"))
    return [(label, printable(text)) for label, text in out or [("GPU", "the driver has none")]]


def _is_weight(name: str) -> bool:
    return not any(part in name for part in (*ROPE_TENSORS, *IGNORED))


def _types(file: GGUF) -> dict:
    """Type -> tensors, bytes and share of all bytes, the largest first."""
    types: dict[str, dict] = {}
    for tensor in file.tensors.values():
        entry = types.setdefault(tensor.type.name, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += tensor.nbytes
    total = sum(entry["bytes"] for entry in types.values()) or 1
    for entry in types.values():
        entry["share"] = round(entry["bytes"] / total, 4)
    return dict(sorted(types.items(), key=lambda item: -item[1]["bytes"]))


def _verdict(file: GGUF) -> dict:
    """Shape, memory, and whether pybmc runs it; why_not is the sentence that loading it would fail with."""
    facts = dict.fromkeys(("layers", "blocks", "experts", "dim", "hidden_dim", "heads", "kv_heads",
                           "head_dim", "kv_bytes_per_token", "memory_bytes", "memory_context",
                           "causal", "pooling", "draft_head"))
    try:
        config = read_config(file)
        rows = min(config.n_ctx, ROWS_SHOWN)
        weights = sum(t.nbytes for t in file.tensors.values())
        experts = next((block for _, block in config.blocks if isinstance(block, Experts)), None)
        kinds = Counter(block.kind.lower().replace("_", " ") for _, block in config.blocks)
        facts |= {"layers": config.n_layers, "blocks": dict(kinds),
                  "experts": [experts.n_active, experts.n_experts] if experts else None,
                  "dim": config.dim, "hidden_dim": config.hidden_dim,
                  "heads": config.n_heads, "kv_heads": config.n_kv_heads, "head_dim": config.head_dim,
                  "kv_bytes_per_token": config.kv_row_bytes,
                  "memory_bytes": weights + rows * config.kv_row_bytes, "memory_context": rows,
                  "causal": config.causal, "pooling": config.pooling.kind}
        facts["draft_head"] = check_model(file, config)
        kind_of(file)
    except FormatError as error:
        return facts | {"runs": False, "why_not": str(error).removeprefix(f"{file.path}: ")}
    return facts | {"runs": True, "why_not": None}


def lines(info: dict) -> list[tuple[str, str]]:
    """The facts as (label, text) pairs, for people. Each stays on its line,
    whatever characters the file has."""
    yes = {True: "yes", False: "no"}
    parts = f" in {info['files']} parts" if info["files"] > 1 else ""
    out = [("file", f"{info['path']}, {size(info['bytes'])}{parts}"),
           ("name", info["name"] or "-"),
           ("architecture", str(info["architecture"])),
           ("parameters", count(info["parameters"]))]
    if info["layers"]:
        out.append(("shape", f"{info['layers']} layers of {info['dim']}, feed-forward {info['hidden_dim']}, "
                             f"{info['heads']} heads and {info['kv_heads']} KV heads of {info['head_dim']}"))
    if info["blocks"]:
        active = " ({} of {} for a token)".format(*info["experts"]) if info["experts"] else ""
        out.append(("blocks", ", ".join(f"{n} {kind}" for kind, n in info["blocks"].items()) + active))
    shares = (f"{name} {entry['share']:.1%}" for name, entry in info["types"].items())
    out.append(("types", ", ".join(shares) or "-"))
    tokenizer = info["tokenizer"]
    kind = " ".join(str(t) for t in (tokenizer["model"], tokenizer["pre"]) if t) or "none"
    out.append(("tokenizer", f"{kind}, {tokenizer['tokens']} tokens"))
    out.append(("context", str(info["context"] or "-")))
    out.append(("chat template", yes[info["chat_template"]]))
    if info["kv_bytes_per_token"]:
        out.append(("KV cache", f"{size(info['kv_bytes_per_token'])} a token"))
        out.append(("memory", f"about {size(info['memory_bytes'])} "
                              f"with {info['memory_context']} tokens of context"))
    if info["draft_head"]:
        out.append(("draft head", "yes"))
    if info["causal"] is False or info["pooling"] not in (None, "none"):
        kind = {"none": "none, the mean is taken"}.get(info["pooling"], info["pooling"])
        encoder = "" if info["causal"] else "; an encoder, which writes no text"
        out.append(("embeddings", f"pooling {kind}{encoder}"))
    out.append(("runs", "yes" if info["runs"] else f"no: {info['why_not']}"))
    return [(label, printable(text)) for label, text in out]


def size(n: float) -> str:
    """Bytes with a unit, three digits: 808 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 999.5:
            break
        n /= 1000
    else:
        unit = "TB"
    return f"{n:.3g} {unit}" if n < 999.5 else f"{n:.0f} {unit}"


def count(n: float) -> str:
    """A large number with its size in a letter: 1.24 B."""
    for unit in ("", " K", " M", " B"):
        if n < 999.5:
            break
        n /= 1000
    else:
        unit = " T"
    return f"{n:.3g}{unit}"
