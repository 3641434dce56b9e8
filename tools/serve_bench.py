"""Measure a server that speaks OpenAI's chat wire, pybmc's or a peer's, at given rates of requests.

    python -m tools.serve_bench http://127.0.0.1:8080 --rates 0.5,1,2 -n 50
    python -m tools.serve_bench URL --file prompts.jsonl --json

Requests arrive by chance (Poisson) whether or not earlier ones are answered, as people's do, and times count from when a request was
due. At each rate n requests are sent; the next rate begins when all are answered.

\b
    to first    from when a request was due to the first text of its answer, ms: p50 and p99 of the requests
    per token   from there to the end, by each further token, ms: p50 and p99 of the requests
    gap         between two events that carry text, ms: p50 and p99 of the gaps. One event may carry several tokens
    tokens/s    tokens of answers, from the first request to the last answer
    good/s      requests a second whose times to the first and per token are within --first-ms and --token-ms (goodput)
    errors      requests that failed, and why the first did

A line of --file is a JSON object with "messages", or "prompt" for a user's message, and perhaps "max_tokens"; without it prompts are
drawn from words, about a token each. Tokens are those that the server counts in its usage; of one that gives none, events are counted.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click
import httpx
import numpy as np

from pybmc.cli.options import Counts
from pybmc.cli.terminal import note, progress

WORDS = ("the mill house river cat mouse winter night story grain wheel road friend door stone light wind tree bread song king bird "
         "gold ship sea boat sail wave sparrow spring place cold warm old new small great").split()


@dataclass(frozen=True)
class Limits:
    """What a request must meet to count as good, in milliseconds."""

    first_ms: float
    token_ms: float


@dataclass
class Record:
    """A request: when it was due, when its texts came, how many tokens they were, and what went wrong. Seconds of one clock."""

    due: float
    times: list[float] = field(default_factory=list)
    end: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    error: str = ""

    @property
    def first_ms(self) -> float:
        return 1e3 * (self.times[0] - self.due)

    @property
    def token_ms(self) -> float:
        return 1e3 * (self.times[-1] - self.times[0]) / max(self.tokens - 1, 1)

    @property
    def gaps_ms(self) -> list[float]:
        return [1e3 * (later - earlier) for earlier, later in zip(self.times, self.times[1:])]

    def is_good(self, limits: Limits) -> bool:
        return not self.error and self.first_ms <= limits.first_ms and self.token_ms <= limits.token_ms


@dataclass(frozen=True)
class Result:
    """What a rate gave. A pair is p50 and p99 in milliseconds, None where no request was answered."""

    rate: float
    requests: int
    seconds: float
    first_ms: tuple[float, float] | None
    token_ms: tuple[float, float] | None
    gap_ms: tuple[float, float] | None
    tokens_per_second: float
    prompt_tokens: int
    tokens: int
    good_per_second: float
    errors: dict[str, int]


# ---- requests ----------------------------------------------------------------------------------------------


def drawn(rng: random.Random, n: int, prompt: tuple[int, int], answer: tuple[int, int], systems: list[str]) -> list[dict]:
    """Bodies with prompts of words, their lengths between two bounds. Each begins with a number of its own, so that two of them share
    no more than a system prompt."""
    def body():
        text = f"{rng.randrange(10**9)} " + words(rng, rng.randint(*prompt))
        system = [{"role": "system", "content": rng.choice(systems)}] if systems else []
        return {"messages": [*system, {"role": "user", "content": text}], "max_tokens": rng.randint(*answer)}
    return [body() for _ in range(n)]


def words(rng: random.Random, n: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(n))


def from_file(path: Path, n: int, answer: int, systems: list[str], rng: random.Random) -> list[dict]:
    """Bodies from a file's lines, from its beginning again where they are too few."""
    bodies = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if line.strip():
            bodies.append(_body(path, number, line, answer, systems, rng))
    if not bodies:
        raise click.ClickException(f"{path} has no prompts")
    return [bodies[i % len(bodies)] for i in range(n)]


def _body(path: Path, number: int, line: str, answer: int, systems: list[str], rng: random.Random) -> dict:
    try:
        found = json.loads(line)
        messages = found["messages"] if "messages" in found else [{"role": "user", "content": found["prompt"]}]
    except (ValueError, TypeError, KeyError) as error:
        raise click.ClickException(f"{path}, line {number}: expected an object with messages or prompt: {error}") from None
    system = [{"role": "system", "content": rng.choice(systems)}] if systems and messages[0].get("role") != "system" else []
    return {"messages": [*system, *messages], "max_tokens": found.get("max_tokens", answer)}


def arrivals(rng: random.Random, rate: float, n: int) -> list[float]:
    """When n requests are due, in seconds: a Poisson process that begins with a request."""
    times = [0.0]
    while len(times) < n:
        times.append(times[-1] + rng.expovariate(rate))
    return times


# ---- sending -----------------------------------------------------------------------------------------------


async def ask(client: httpx.AsyncClient, body: dict, due: float) -> Record:
    """Send a request and read its stream to the end."""
    record = Record(due)
    try:
        async with client.stream("POST", "/chat/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                record.error = f"status {response.status_code}"
            else:
                await _read(response, record)
    except httpx.HTTPError as error:
        record.error = type(error).__name__
    record.end = time.perf_counter()
    if not record.error and not record.times:
        record.error = "no text"
    record.tokens = record.tokens or len(record.times)
    return record


async def _read(response: httpx.Response, record: Record) -> None:
    whole = False
    async for line in response.aiter_lines():
        data = line[5:].strip() if line.startswith("data:") else ""
        whole = whole or data == "[DONE]"
        if data and not whole:
            _take(record, data, time.perf_counter())
    if not whole and not record.error:
        record.error = "stream ended early"


def _take(record: Record, data: str, now: float) -> None:
    try:
        chunk = json.loads(data)
        if "error" in chunk:
            record.error = "error in the stream"
        delta = (chunk.get("choices") or [{}])[0].get("delta") or {}
        usage = chunk.get("usage") or {}
    except (ValueError, TypeError, AttributeError, KeyError, IndexError):
        record.error = "broken event"
        return
    if delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning"):
        record.times.append(now)
    record.tokens = usage.get("completion_tokens") or record.tokens
    record.prompt_tokens = usage.get("prompt_tokens") or record.prompt_tokens


async def run(client: httpx.AsyncClient, bodies: list[dict], times: list[float], update=None) -> list[Record]:
    """Send each request when it is due, and wait for all answers."""
    start, done = time.perf_counter(), 0

    async def one(body: dict, at: float) -> Record:
        nonlocal done
        await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
        record = await ask(client, body, start + at)
        done += 1
        if update:
            update(done, len(bodies))
        return record

    return await asyncio.gather(*(one(body, at) for body, at in zip(bodies, times)))


def summary(rate: float, records: list[Record], limits: Limits) -> Result:
    answered = [record for record in records if not record.error]
    seconds = max(record.end for record in records) - min(record.due for record in records)
    tokens = sum(record.tokens for record in answered)
    return Result(rate, len(records), seconds, percentiles([r.first_ms for r in answered]), percentiles([r.token_ms for r in answered]),
                  percentiles([gap for r in answered for gap in r.gaps_ms]), tokens / seconds, sum(r.prompt_tokens for r in answered), tokens,
                  sum(record.is_good(limits) for record in records) / seconds, dict(Counter(r.error for r in records if r.error)))


def percentiles(values: list[float]) -> tuple[float, float] | None:
    return (float(np.percentile(values, 50)), float(np.percentile(values, 99))) if values else None


async def measure(url: str, headers: dict, timeout: float, plans: list[tuple[float, list[dict], list[float]]], limits: Limits, tell, update=None):
    """Warm up with one request, then run the plans (rate, bodies, times) one after another."""
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=timeout, limits=httpx.Limits(max_connections=None)) as client:
        first = await ask(client, plans[0][1][0], time.perf_counter())
        if first.error:
            raise click.ClickException(f"{url}: the first request failed: {first.error}")
        for rate, bodies, times in plans:
            tell(summary(rate, await run(client, bodies, times, update), limits))


# ---- output ------------------------------------------------------------------------------------------------

COLUMNS = ("requests/s", "to first p50", "p99", "per token p50", "p99", "gap p50", "p99", "tokens/s", "good/s", "errors")
WIDTHS = tuple(max(len(name), 8) for name in COLUMNS)


def line(result: Result) -> str:
    def pair(values):
        return [f"{value:.1f}" for value in values] if values else ["-", "-"]
    cells = [f"{result.rate:g}", *pair(result.first_ms), *pair(result.token_ms), *pair(result.gap_ms), f"{result.tokens_per_second:.1f}",
             f"{result.good_per_second:.2f}", str(sum(result.errors.values()))]
    reason = f"  ({next(iter(result.errors))})" if result.errors else ""
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, WIDTHS)) + reason


class Rates(click.ParamType):
    """Positive numbers by comma."""

    name = "R,R,.."

    def convert(self, value, param, ctx):
        try:
            rates = [float(part) for part in value.split(",")]
        except ValueError:
            rates = []
        if not rates or not all(0 < rate < 1e6 for rate in rates):
            self.fail(f"{value!r}: expected requests a second, above 0, by comma", param, ctx)
        return rates


class Bounds(Counts):
    """LOW,HIGH; one number is both."""

    name = "LOW,HIGH"

    def convert(self, value, param, ctx):
        counts = super().convert(value, param, ctx)
        low, high = (counts * 2)[:2] if len(counts) == 1 else counts if len(counts) == 2 else (0, 0)
        if not 1 <= low <= high:
            self.fail(f"{value!r}: expected two counts from 1 up, the lower first", param, ctx)
        return low, high


@click.command(help=__doc__)
@click.argument("url")
@click.option("--rates", type=Rates(), default="1", show_default=True, help="Requests a second.")
@click.option("-n", "requests", type=click.IntRange(1), default=50, show_default=True, metavar="N", help="Requests at each rate.")
@click.option("-f", "--file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Prompts, a JSON object a line.")
@click.option("--prompt-words", type=Bounds(), default="32,512", show_default=True, help="Lengths of drawn prompts.")
@click.option("--answer-tokens", type=Bounds(), default="32,256", show_default=True, help="max_tokens of drawn requests; of a file's, HIGH.")
@click.option("--systems", type=click.IntRange(0), default=1, show_default=True, metavar="N", help="System prompts that requests share.")
@click.option("--system-words", type=click.IntRange(1), default=200, show_default=True, metavar="N", help="The length of each.")
@click.option("--temperature", type=float, default=0.0, show_default=True)
@click.option("--ignore-eos", is_flag=True, help="Ask for ignore_eos, which vLLM and llama-server know.")
@click.option("--first-ms", type=float, default=2000, show_default=True, metavar="MS", help="Limit of the time to the first token.")
@click.option("--token-ms", type=float, default=200, show_default=True, metavar="MS", help="Limit of the time per token.")
@click.option("--timeout", type=float, default=600, show_default=True, metavar="S", help="Seconds of silence until a request has failed.")
@click.option("--model", default="default", show_default=True, help="The model's name in requests.")
@click.option("--api-key", envvar="OPENAI_API_KEY", help="Sent as a bearer token; also from OPENAI_API_KEY.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of arrivals, lengths and words.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a rate on stdout.")
def main(url, rates, requests, file, prompt_words, answer_tokens, systems, system_words, temperature, ignore_eos, first_ms, token_ms, timeout,
         model, api_key, seed, as_json):
    rng = random.Random(seed)
    shared = [words(rng, system_words) for _ in range(systems)]
    common = {"model": model, "stream": True, "stream_options": {"include_usage": True}, "temperature": temperature}
    common |= {"ignore_eos": True} if ignore_eos else {}
    plans = []
    for rate in rates:
        bodies = (from_file(file, requests, answer_tokens[1], shared if systems else [], rng) if file
                  else drawn(rng, requests, prompt_words, answer_tokens, shared))
        plans.append((rate, [common | body for body in bodies], arrivals(rng, rate, requests)))
    if not as_json:
        print("  ".join(name.rjust(width) for name, width in zip(COLUMNS, WIDTHS)), flush=True)

    def tell(result: Result) -> None:
        print(json.dumps(asdict(result)) if as_json else line(result), flush=True)

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with progress("requests") as update:
        try:
            asyncio.run(measure(api_base(url), headers, timeout, plans, Limits(first_ms, token_ms), tell, update))
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise click.ClickException(f"{url}: {error}") from None
        except KeyboardInterrupt:
            note("interrupted")
            raise SystemExit(130) from None


def api_base(url: str) -> str:
    """The address that /chat/completions belongs to, whether or not it was given with /v1."""
    url = url.rstrip("/")
    return url if url.endswith("/v1") else f"{url}/v1"


if __name__ == "__main__":
    main()
