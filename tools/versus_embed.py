"""Compare the embeddings of pybmc and llama.cpp on the same file: tokens a second,
and how close the vectors are.

    pip install llama-cpp-python
    python -m tools.versus_embed MODEL [-n 128] [-b 32] [-r 5] [-t 2] [--peer-python PYTHON]

Both engines embed the same texts of random tokens, b texts of n tokens each, with the same number of threads,
each in a process of its own and in turn; llama.cpp with passes of 512 tokens and with all texts in one pass,
of which the faster counts. What is reported are medians. Exit code 3: the vectors are not of the same model
(a cosine below 0.98).
"""

import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import suppress

import click
import numpy as np

SAME = 0.98
PASSES = (512, 0)                       # tokens of llama.cpp's passes; 0: all


def texts_of(vocab_size, n, b):
    """Ids away from the vocabulary's ends, where special tokens are."""
    return np.random.default_rng(1).integers(vocab_size // 4, vocab_size // 2, (b, n), dtype=np.int32)


# ---- the engines, each in a process of its own -------------------------------------------------------------


def open_pybmc(path, threads):
    """The size of the vocabulary, and what embeds an array of ids, (texts, tokens), in one of the ways."""
    import pybmc

    model = pybmc.Model(path, threads=threads)
    return model.config.vocab_size, [lambda texts: model.embed(texts.tolist())]


def open_llama(path, threads, n, b):
    import llama_cpp as api

    quiet = api.llama_log_callback(lambda level, text, data: None)
    api.llama_log_set(quiet, None)
    api.llama_backend_init()
    params = api.llama_model_default_params()
    params.n_gpu_layers = 0
    model = api.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise RuntimeError(f"llama.cpp cannot open {path}")

    def way(width):
        width = max(width or n * b, n)
        params = api.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = width
        params.n_seq_max, params.embeddings = b, True
        params.n_threads = params.n_threads_batch = threads
        context = api.llama_init_from_model(model, params)
        # the file names none: ours is the mean
        if api.llama_pooling_type(context) == api.LLAMA_POOLING_TYPE_NONE:
            api.llama_free(context)
            params.pooling_type = api.LLAMA_POOLING_TYPE_MEAN
            context = api.llama_init_from_model(model, params)
        batch = api.llama_batch_init(width, 0, 1)
        together = max(width // n, 1)

        def embed(texts):
            vectors = []
            for start in range(0, len(texts), together):
                part = texts[start:start + together]
                fill(batch, part)
                if memory := api.llama_get_memory(context):
                    api.llama_memory_clear(memory, False)
                if status := (api.llama_decode if memory else api.llama_encode)(context, batch):
                    raise RuntimeError(f"llama_decode of {part.size} tokens gives {status}")
                vectors += [np.array(np.ctypeslib.as_array(api.llama_get_embeddings_seq(context, i), (size,)))
                            for i in range(len(part))]
            return np.stack([v / np.linalg.norm(v) for v in vectors])

        embed.quiet = quiet                             # the library calls it as long as it runs
        return embed

    def fill(batch, part):
        batch.n_tokens = part.size
        ctypes.memmove(batch.token, np.ascontiguousarray(part).ctypes.data, 4 * part.size)
        for i in range(part.size):
            batch.pos[i], batch.n_seq_id[i], batch.logits[i] = i % part.shape[1], 1, 1
            batch.seq_id[i][0] = i // part.shape[1]

    size = api.llama_model_n_embd(model)
    return api.llama_vocab_n_tokens(api.llama_model_get_vocab(model)), [way(width) for width in PASSES]


def work(engine, path, threads, n, b):
    """Answer each line read: {"seconds": of each way, "vectors"}."""
    vocab_size, ways = open_pybmc(path, threads) if engine == "pybmc" else open_llama(path, threads, n, b)
    texts = texts_of(vocab_size, n, b)
    for embed in ways:
        embed(texts[:1])
    for _ in sys.stdin:
        seconds = []
        for embed in ways:
            started = time.perf_counter()
            vectors = embed(texts)
            seconds.append(time.perf_counter() - started)
        print(json.dumps({"seconds": seconds, "vectors": np.asarray(vectors).tolist()}), flush=True)


# ---- the comparison ----------------------------------------------------------------------------------------


def ask(process):
    with suppress(BrokenPipeError):                                 # its status says more
        process.stdin.write("\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise click.ClickException(f"{process.args[3]}: its process ended with status {process.wait()}")
    return json.loads(line)


@click.command(help=__doc__.partition("\n")[0])
@click.argument("model", type=click.Path(exists=True, dir_okay=False))
@click.option("-n", "n", default=128, show_default=True, help="Tokens of a text.")
@click.option("-b", "b", default=32, show_default=True, help="Texts.")
@click.option("-r", "runs", default=5, show_default=True)
@click.option("-t", "threads", default=os.cpu_count(), show_default=True)
@click.option("--peer-python", envvar="PYBMC_PEER_PYTHON", default=sys.executable,
              help="An interpreter with llama-cpp-python.")
@click.option("--worker", hidden=True)
def main(model, n, b, runs, threads, peer_python, worker):
    if worker:
        return work(worker, model, threads, n, b)
    arguments = [model, "-n", str(n), "-b", str(b), "-t", str(threads)]
    both = {name: subprocess.Popen([python, "-m", "tools.versus_embed", "--worker", name, *arguments],
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for name, python in (("pybmc", sys.executable), ("llama.cpp", peer_python))}
    try:
        answers = {name: [] for name in both}
        for run in range(runs):
            for name in list(both)[::1 if run % 2 else -1]:
                answers[name].append(ask(both[name]))
    finally:
        for process in both.values():
            process.kill()
            process.wait()
    cosine = min(np.sum(np.asarray(answers["pybmc"][0]["vectors"])
                        * np.asarray(answers["llama.cpp"][0]["vectors"]), axis=1))
    if cosine < SAME:
        print(f"the vectors are not of the same model: a cosine is {cosine:.3f}, expected {SAME} or more")
        sys.exit(3)
    rates = {name: [n * b / min(one["seconds"]) for one in several] for name, several in answers.items()}
    ratios = [ours / theirs for ours, theirs in zip(rates["pybmc"], rates["llama.cpp"])]
    print("| texts | pybmc, tokens/s | llama.cpp, tokens/s | ratio | least cosine |",
          "|---|--:|--:|--:|--:|", sep="\n")
    print(f"| {b} of {n} tokens | {statistics.median(rates['pybmc']):.0f} | "
          f"{statistics.median(rates['llama.cpp']):.0f} | {statistics.median(ratios):.2f} ({min(ratios):.2f} "
          f"to {max(ratios):.2f}) | {cosine:.4f} |")


if __name__ == "__main__":
    main()
