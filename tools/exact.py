"""Measure the error of pybmc's and of llama.cpp's logits against float32, on a model file and a text.

    pip install llama-cpp-python gguf
    python -m tools.exact MODEL [--text FILE] [--tokens 512] [--peer-python PYTHON] [--json]

The reference is llama.cpp in float32: MODEL's weights are dequantized to a float32 file by the gguf package,
keys and values are kept in float32, flash attention is off. pybmc and llama.cpp evaluate the same tokens with
MODEL itself, as they come (keys and values in f16; llama.cpp with flash attention). For each engine:

    error         rms of (logits - reference) over the standard deviation of the reference, over all positions
    median        the same of the median position; one with very large activations, often the first of the
                  text, may dominate the rms
    top-1         share of positions whose best token is the reference's
    KL            divergence from the reference's distribution in nats, mean and 99th percentile
    perplexity    of the same tokens; the reference's beside it

llama.cpp takes GELU from a table in f16, so for gpt2 and gemma3 the reference itself is some 1e-3 off.

The float32 file and the logits are written to a temporary folder and removed afterwards; a model of 1.5
billion weights takes 7 GB. One engine runs at a time, in a process of its own.
"""

import json
import shutil
import sys
from contextlib import contextmanager
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np

try:
    import gguf
except ImportError:
    sys.exit("exact.py needs the gguf package: pip install gguf")

from pybmc.cli.options import read_text
from pybmc.errors import BmcError
from pybmc.files.gguf import GGUF
from pybmc.models.config import read_config

from .distance import distance, perplexity
from .versus import OURS, TEXT, THEIRS, default_threads, engine_of

PASS = 64                               # tokens of a pass, whose logits are held at once
BLOCKS = 1 << 14                        # of a tensor, dequantized at once: 16 MB of float32 at most
RATIOS = ("error", "error_median", "kl_mean", "kl_p99")
ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
LAYOUT = ("GGUF.", "split.", "general.alignment", "general.file_type", "general.architecture")    # not copied

# ---- the float32 file --------------------------------------------------------------------------------------


def write_float32(source, path):
    """Write an opened GGUF (all of its parts) as one file of float32 tensors."""
    writer = gguf.GGUFWriter(path, source.metadata["general.architecture"])
    try:
        copy_metadata(writer, gguf.GGUFReader(source.paths[0]))
        for tensor in source.tensors.values():
            shape = tensor.shape[::-1]
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), 4 * prod(shape))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        with open(path, "ab") as file:
            for tensor in source.tensors.values():
                file.write(bytes(-file.tell() % ALIGNMENT))
                write_values(file, tensor)
            file.write(bytes(-file.tell() % ALIGNMENT))
    except (ValueError, KeyError, IndexError, NotImplementedError) as e:     # all of the gguf package
        raise click.ClickException(f"{source.path}: the gguf package cannot copy it: {e}") from None


def copy_metadata(writer, reader):
    """All pairs with their types, but for LAYOUT and for empty arrays, which the package does not write."""
    for key, field in reader.fields.items():
        value, kind = field.contents(), field.types[0]
        if not key.startswith(LAYOUT) and value not in (None, []):
            of = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, value, kind, of)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)


def write_values(file, tensor):
    """A tensor as float32, some blocks at a time, by the gguf package: pybmc's decoding is being measured."""
    kind, step = gguf.GGMLQuantizationType(tensor.type.id), BLOCKS * tensor.type.type_size
    for at in range(0, tensor.nbytes, step):
        file.write(np.ascontiguousarray(gguf.quants.dequantize(tensor.data[at:at + step], kind), np.float32))


def float32_bytes(source):
    """Size of the file that write_float32() makes, a little too large."""
    tensors = source.tensors.values()
    return source.size - sum(t.nbytes for t in tensors) + sum(4 * prod(t.shape) + ALIGNMENT for t in tensors)


def check_space(folder, needed):
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise click.ClickException(f"the float32 file and the logits take {needed / 1e9:.1f} GB, {folder} "
                                   f"has {free / 1e9:.1f} GB free; --work DIR names another folder")


# ---- measuring ---------------------------------------------------------------------------------------------


@contextmanager
def opened(name, python, path, tokens, threads):
    """An engine with a model, ready for that many tokens."""
    with engine_of(name, python) as engine:
        engine.ask("open", path=str(path), threads=threads, context=tokens, outputs=PASS)
        yield engine


def measure(path, text, n, threads, peer_python, folder, say):
    """results() of a model on the first n tokens of a text, the engines' versions. Files go to the folder."""
    with GGUF(path) as source:
        config = read_config(source)
        if n > config.n_ctx:
            raise click.ClickException(f"expected at most {config.n_ctx} tokens, the model's context, "
                                       f"found --tokens {n}")
        check_space(folder, float32_bytes(source) + 3 * 4 * n * config.vocab_size)
        say(f"{OURS}: evaluating {n} tokens")
        with opened(OURS, sys.executable, path, n, threads) as engine:
            tokens = engine.ask("tokens", text=text)["ids"]
            if len(tokens) < n:
                raise click.ClickException(f"expected a text of {n} or more tokens, found {len(tokens)}")
            tokens, versions = tokens[:n], [engine.version]
            logits = {OURS: engine.logits(tokens, folder / "pybmc", PASS)}
        say(f"{THEIRS}: evaluating the same")
        with opened(THEIRS, peer_python, path, n, threads) as engine:
            versions.append(engine.version)
            logits[THEIRS] = engine.logits(tokens, folder / "llama.cpp", PASS)
        say(f"writing the float32 file, {float32_bytes(source) / 1e9:.1f} GB")
        copy = folder / "float32.gguf"
        write_float32(source, copy)
    say(f"{THEIRS} in float32: evaluating the same")
    with opened(THEIRS, peer_python, copy, n, threads) as engine:
        reference = engine.logits(tokens, folder / "float32", PASS, mode="float32")
    return results(logits, reference, tokens), versions


def results(logits, reference, tokens):
    """{name: {"perplexity", and of both engines Distance's values}}, "ratio": ours over theirs."""
    found = {"float32": {"perplexity": perplexity(reference, tokens)}}
    for name, values in logits.items():
        if values.shape != reference.shape:
            raise click.ClickException(f"{name}: expected logits {reference.shape}, found {values.shape}")
        distances = vars(distance(values, reference))
        if not np.isfinite(distances["error"]):
            raise click.ClickException(f"logits of {name} or of float32 are not finite")
        found[name] = {"perplexity": perplexity(values, tokens), **distances}
    found["ratio"] = {key: found[OURS][key] / max(found[THEIRS][key], 1e-30) for key in RATIOS}
    return found


# ---- the report --------------------------------------------------------------------------------------------

COLUMNS = {                             # key: heading, format
    "error": ("error", "{:.3%}"),
    "error_median": ("median", "{:.3%}"),
    "top1": ("top-1", "{:.2%}"),
    "kl_mean": ("KL, mean", "{:.3g}"),
    "kl_p99": ("KL, 99%", "{:.3g}"),
    "perplexity": ("perplexity", "{:.4f}"),
}


def table(found):
    """A line for float32, each engine and the ratio."""
    lines = [["", *(heading for heading, _ in COLUMNS.values())], ["-" * 9] + ["-" * 9 + ":"] * len(COLUMNS)]
    for name, values in found.items():
        forms = {key: "{:.3g}" if name == "ratio" else form for key, (_, form) in COLUMNS.items()}
        cells = (form.format(values[key]) if key in values else "" for key, form in forms.items())
        lines.append([name, *cells])
    padded = ([f"{name:9}", *(f"{cell:>10}" for cell in cells)] for name, *cells in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def verdict(found):
    text = "pybmc's error is {error:.2f} times llama.cpp's, {error_median:.2f} times in the median position."
    return text.format(**found["ratio"])


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("model", type=click.Path(exists=True, dir_okay=False))
@click.option("--text", type=click.Path(exists=True, dir_okay=False), default=str(TEXT), metavar="FILE",
              help="The text; default: docs/speculation.md.")
@click.option("--tokens", type=click.IntRange(2), default=512, show_default=True, help="Tokens of the text.")
@click.option("--work", type=click.Path(exists=True, file_okay=False, writable=True), metavar="DIR",
              help="Where the float32 file and the logits go; default: the system's temporary folder.")
@click.option("--keep", type=click.Path(), metavar="FILE", help="Keep the float32 file under this name.")
@click.option("-t", "--threads", type=click.IntRange(1, 512), help="Default: the usable cores.")
@click.option("--peer-python", envvar="PYBMC_PEER_PYTHON", default=sys.executable, metavar="PYTHON",
              help="The interpreter that has llama_cpp; default: this one.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def main(model, text, tokens, work, keep, threads, peer_python, as_json):
    if keep and Path(keep).exists():
        raise click.UsageError(f"--keep {keep}: expected a new file, found one")
    try:
        with TemporaryDirectory(dir=work, prefix="pybmc-exact-") as folder:
            found, versions = measure(model, read_text(None, text), tokens, threads or default_threads(),
                                      peer_python, Path(folder), lambda line: click.echo(line, err=True))
            if keep:
                shutil.move(Path(folder) / "float32.gguf", keep)
    except (BmcError, OSError) as e:
        raise click.ClickException(str(e)) from None
    if as_json:
        found["llama_cpp"] = found.pop(THEIRS)
        print(json.dumps({"model": model, "text": text, "tokens": tokens, "engines": versions, **found}))
    else:
        print(f"**{Path(model).name}**: {tokens} tokens of {Path(text).name}, against llama.cpp in float32\n")
        print("\n".join([table(found), "", verdict(found), "", *(f"- {version}" for version in versions)]))


if __name__ == "__main__":
    main()
