"""What a KV cache costs in other runtimes:
memory and start-up of llama.cpp, rates of Hugging Face transformers.

    python -m tools.kv_peers memory MODEL [-c 32768] [-p 200] --peer-python PYTHON     # llama-cpp-python
    python -m tools.kv_peers rates MODEL [-p 16,2048] [-n 64] --peer-python PYTHON     # torch, transformers

memory: a context of -c tokens is opened and a prompt of -p tokens taken in: what the process grows by, and
the seconds until the first token. rates: greedy decoding, tokens a second behind each prompt, against
transformers' generate() with its dynamic and its static cache, on a model of MODEL's shape with random
weights in bf16; MODEL should be an F16 file. Each engine has a process of its own, they take turns, and both
use the same number of threads.
"""

import json
import os
import statistics
import sys

import click
import numpy as np

from pybmc.cli.options import Counts
from pybmc.files.gguf import GGUF
from pybmc.models.config import read_config

from .versus import Engine, cpu_model, default_threads, paired, warm

SHAPE = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "n_ctx")
CACHES = ("dynamic", "static")


def workers(peer, peer_python, path, threads):
    """Both engines with the model loaded, and what each said of that."""
    with GGUF(path) as file:
        config = read_config(file)
    shape = {name: getattr(config, name) for name in SHAPE}
    opened = []
    try:
        for name, python in (("pybmc", sys.executable), (peer, peer_python)):
            opened.append(Engine(name, [python, "-m", "tools.kv_worker", name]))
        return (opened,
                [engine.ask("load", path=path, threads=threads, shape=shape) for engine in opened], config)
    except BaseException:
        for engine in opened:
            engine.close()
        raise


def prompt_of(config, n):
    return np.random.default_rng(0).integers(0, config.vocab_size, n).tolist()


@click.group(help=__doc__.split("\n\n")[0])
def main():
    pass


def common(function):
    for option in (
        click.option("--json", "as_json", is_flag=True, help="One JSON object a line on stdout."),
        click.option("--peer-python", envvar="PYBMC_PEER_PYTHON", default=sys.executable, metavar="PYTHON",
                     help="The interpreter that has the other engine."),
        click.option("-t", "--threads", type=click.IntRange(1, 512), help="Threads of both."),
        click.option("-r", "--reps", type=click.IntRange(1), default=3, show_default=True,
                     help="Pairs of runs."),
        click.argument("model", type=click.Path(exists=True, dir_okay=False)),
    ):
        function = option(function)
    return function


@main.command()
@common
@click.option("-c", "--ctx-size", "context", default=32768, show_default=True, help="Tokens of context.")
@click.option("-p", "--n-prompt", "prompt", default=200, show_default=True, help="Tokens that are used.")
def memory(model, context, prompt, reps, threads, peer_python, as_json):
    """Resident memory of a long context that is used a little, and seconds to the first token,
    against llama.cpp."""
    warm(model)
    engines, loaded, config = workers("llama.cpp", peer_python, model, threads or default_threads())
    ids = prompt_of(config, prompt)

    def run(engine):
        answer = engine.ask("start", context=context, ids=ids)
        engine.ask("stop")
        return answer

    try:
        results = paired(*(lambda engine=engine: run(engine) for engine in engines), reps)
    finally:
        for engine in engines:
            engine.close()
    for engine, before, runs in zip(engines, loaded, results):
        first = runs[0]                     # later ones find memory that the first left behind
        line = {"test": "memory", "engine": engine.version, "context": context, "used": prompt,
                "loaded_mb": before["private_mb"],
                "opened_mb": first["opened"]["private_mb"] - before["private_mb"],
                "used_mb": first["used"]["private_mb"] - before["private_mb"], "cache_mb": first["cache_mb"],
                "open_s": statistics.median(run["open_s"] for run in runs),
                "first_token_s": statistics.median(run["first_token_s"] for run in runs)}
        print(json.dumps(line) if as_json else
              f"{engine.name:10} opening a context of {context} tokens: {line['opened_mb']:8.1f} MB, "
              f"{line['open_s']:.3f} s; {prompt} tokens later: {line['used_mb']:8.1f} MB, first token after "
              f"{line['first_token_s']:.2f} s"
              + (f"; rows of keys and values {line['cache_mb']:.1f} MB" if line["cache_mb"] else ""))
    if not as_json:
        print(f"keys and values of {context} tokens are {context * config.kv_row_bytes / 1e6:.0f} MB in f16; "
              f"{cpu_model()}, medians of {reps}")


@main.command()
@common
@click.option("-p", "--n-prompt", "prompts", type=Counts(), default="16,2048", show_default=True,
              help="Prompt lengths.")
@click.option("-n", "--n-gen", "generated", type=click.IntRange(4), default=64, show_default=True,
              help="Tokens after each.")
def rates(model, prompts, generated, reps, threads, peer_python, as_json):
    """Tokens a second of greedy decoding, against transformers with its dynamic and static cache."""
    warm(model)
    engines, _, config = workers("transformers", peer_python, model, threads or default_threads())

    def run(engine, prompt, mode):
        engine.ask("start", context=prompt + generated + 1, ids=prompt_of(config, prompt), mode=mode)
        rate = engine.ask("rate", n=generated)["tok_s"]
        engine.ask("stop")
        return rate

    try:
        for prompt in prompts:
            for mode in CACHES:
                ours, theirs = paired(lambda: run(engines[0], prompt, ""),
                                      lambda: run(engines[1], prompt, mode), reps)
                ratios = [a / b for a, b in zip(ours, theirs)]
                line = {"test": "rate", "prompt": prompt, "generated": generated, "cache": mode,
                        "pybmc": statistics.median(ours), "transformers": statistics.median(theirs),
                        "ratio": statistics.median(ratios), "ratio_min": min(ratios),
                        "ratio_max": max(ratios), "engines": [engine.version for engine in engines]}
                print(json.dumps(line) if as_json else
                      f"prompt {prompt:5}, {mode:7} cache: pybmc {line['pybmc']:6.2f} tok/s, transformers "
                      f"{line['transformers']:6.2f}, {line['ratio']:.2f} times "
                      f"({min(ratios):.2f}..{max(ratios):.2f})",
                      flush=True)
    finally:
        for engine in engines:
            engine.close()
    if not as_json:
        print("; ".join([*(engine.version for engine in engines), cpu_model(), f"{reps} pairs"]))


if __name__ == "__main__":
    if os.environ.get("TOKENIZERS_PARALLELISM") is None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    main()
