"""What HTTP costs one user: the same chat streamed by a server and by pybmc.generate, in turn.

\b
    python -m tools.serve_overhead model.gguf
    python -m tools.serve_overhead model.gguf -n 256 --reps 9 --within 3

The tool starts `pybmc serve` on a free port, opens the model itself too, and asks both for the same answer,
each repetition in the other order. Both read the whole prompt each time, and the texts have to be the same.
Idle, the server takes no time from the other.

\b
    to first    from the request to the first text, ms (median)
    tokens/s    from there to the end, by further tokens (median)
    total       from the request to the end, ms (median)
    ratio       of the totals of a repetition, HTTP to generate: the median, and the smallest and largest

With --within P the exit status is 1 where the median ratio is more than P% above 1.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import click
import httpx

import pybmc
from tools.serve_bench import words


@dataclass(frozen=True)
class Answer:
    """Times in seconds from the request on, and what was answered."""

    first: float
    total: float
    tokens: int
    text: str

    @property
    def rate(self) -> float:
        return (self.tokens - 1) / (self.total - self.first) if self.total > self.first else 0.0


@contextmanager
def server(model: str, flags: list[str]) -> Iterator[str]:
    """The URL of a server of a model."""
    command = [sys.executable, "-m", "pybmc", "serve", model, "--port", "0", "--json", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise click.ClickException(f"pybmc serve {model} ended with status {process.wait()}")
        yield json.loads(line)["url"]
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def over_http(client: httpx.Client, messages: list[dict], n: int) -> Answer:
    body = {"messages": messages, "max_tokens": n, "temperature": 0,
            "ignore_eos": True, "cache_prompt": False, "reasoning_format": "none", "stream": True,
            "stream_options": {"include_usage": True}}
    start, first, pieces, tokens = time.perf_counter(), 0.0, [], 0
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise click.ClickException(f"the server said {response.status_code}: "
                                       f"{response.read().decode()[:200]}")
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
            delta = chunk["choices"][0]["delta"] if chunk["choices"] else {}
            if delta.get("content"):
                first = first or time.perf_counter() - start
                pieces.append(delta["content"])
    return Answer(first, time.perf_counter() - start, tokens, "".join(pieces))


def by_generate(model: pybmc.Model, messages: list[dict], n: int) -> Answer:
    """What stops the answer elsewhere is banned here too, so that both write n tokens."""
    banned = dict.fromkeys(model.tokenizer.stop_ids, float("-inf"))
    start, first, pieces, tokens = time.perf_counter(), 0.0, [], 0
    for token in pybmc.generate(model, messages, n, temperature=0, logit_bias=banned):
        tokens += 1
        if token.text:
            first = first or time.perf_counter() - start
            pieces.append(token.text)
    return Answer(first, time.perf_counter() - start, tokens, "".join(pieces))


def compare(http, local, reps: int) -> list[tuple[Answer, Answer]]:
    """Pairs of answers over HTTP and by generate, after one of each to warm up;
    each pair in the other order."""
    found = []
    http(), local()
    for i in range(reps):
        pair = [ask() for ask in ((http, local) if i % 2 else (local, http))]
        found.append((pair[i % 2 == 0], pair[i % 2]))
    return found


def summary(pairs: list[tuple[Answer, Answer]]) -> dict:
    def of(side: int) -> dict:
        answers = [pair[side] for pair in pairs]
        return {"first_ms": 1e3 * median(a.first for a in answers),
                "tokens_per_second": median(a.rate for a in answers),
                "total_ms": 1e3 * median(a.total for a in answers)}

    ratios = sorted(over.total / local.total for over, local in pairs)
    return {"http": of(0), "generate": of(1), "ratio": median(ratios), "smallest": ratios[0],
            "largest": ratios[-1], "tokens": pairs[0][0].tokens}


def told(found: dict) -> str:
    lines = [f"{'':10}{'to first':>10}{'tokens/s':>10}{'total':>10}"]
    for name in ("http", "generate"):
        its = found[name]
        lines.append(f"{name:10}{its['first_ms']:10.1f}{its['tokens_per_second']:10.1f}"
                     f"{its['total_ms']:10.1f}")
    return "\n".join([*lines,
                      f"ratio {found['ratio']:.3f} ({found['smallest']:.3f} to {found['largest']:.3f})"])


@click.command(help=__doc__)
@click.argument("model", type=click.Path(exists=True, dir_okay=False))
@click.option("-n", "tokens", type=click.IntRange(2), default=128, show_default=True, metavar="N",
              help="Tokens of the answer.")
@click.option("-p", "prompt", type=click.IntRange(1), default=64, show_default=True, metavar="N",
              help="Words of the prompt.")
@click.option("--reps", type=click.IntRange(1), default=5, show_default=True, metavar="N",
              help="Repetitions.")
@click.option("-t", "--threads", type=click.IntRange(1), metavar="N", help="Threads of both.")
@click.option("--within", type=click.FloatRange(0), metavar="P",
              help="Fail where HTTP takes over P% more time.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def main(model, tokens, prompt, reps, threads, within, as_json):
    messages = [{"role": "user", "content": words(random.Random(0), prompt)}]
    flags = ["-t", str(threads)] if threads else []
    with server(model, flags) as url, httpx.Client(base_url=url, timeout=600) as client, \
            pybmc.Model(model, threads=threads) as loaded:
        pairs = compare(lambda: over_http(client, messages, tokens),
                        lambda: by_generate(loaded, messages, tokens), reps)
    different = [pair for pair in pairs if pair[0].text != pair[1].text]
    if different:
        over, local = different[0]
        raise click.ClickException(f"the texts differ: {over.text[:80]!r} over HTTP, {local.text[:80]!r} by "
                                   "generate")
    found = summary(pairs)
    print(json.dumps(found) if as_json else told(found))
    if within is not None and found["ratio"] > 1 + within / 100:
        raise click.ClickException(f"HTTP took {100 * (found['ratio'] - 1):.1f}% more; expected at most "
                                   f"{within:g}%")


if __name__ == "__main__":
    main()
