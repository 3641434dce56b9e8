"""Measure a server that speaks OpenAI's chat wire, pybmc's or a peer's, at given rates of requests.

    python -m tools.serve_bench http://127.0.0.1:8080 --rates 0.5,1,2 -n 50
    python -m tools.serve_bench URL --users 8 --rates 0 --prefix 8
    python -m tools.serve_bench URL --file prompts.jsonl --json

Requests arrive by chance (Poisson) whether or not earlier ones are answered, as people's do, and times count
from when a request was due. At each rate n requests are sent; the next rate begins when all are answered.
With --users U, n requests are first sent by U users, each of whom sends the next one when the last is
answered: tokens/s is then what the server gives at most (rate 0: only that). With --prefix P, before all else
P new system prompts are each sent twice, with two short questions, one after the other: the time to the first
token without and with the prefix in the server's cache.

\b
    to first    from when a request was due to the first text of its answer, ms: p50 and p99 of the requests
    per token   from there to the end, by each further token, ms: p50 and p99 of the requests
    gap         between two events that carry text, ms: p50 and p99. One event may carry several tokens
    tokens/s    tokens of answers, from the first request to the last answer
    good/s      requests a second whose times are within --first-ms and --token-ms (goodput)
    errors      requests that failed, and why the first did

\b
To compare two servers, with 8 users and prompts of 100 to 1,500 tokens, half of them behind the same 600,
ask both for the same:
    python -m tools.serve_bench URL --users 8 --rates 0.1 -n 24 --seconds 100 --prefix 6
        --prompt-words 100,1500 --answer-tokens 64,256 --system-words 600 --share 0.5
        --first-ms 3000 --token-ms 250 --fields '{"logit_bias": {"END": -100}}'

END is the id of the model's end token, which a logit_bias bans in any server;
pybmc, vLLM and llama-server also take --ignore-eos.

A line of --file is a JSON object with "messages", or "prompt" for a user's message, and perhaps "max_tokens";
without it prompts are drawn from words, about a token each. Tokens are those that the server counts in its
usage; of one that gives none, events are counted.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path

import click
import httpx
import numpy as np

from pybmc.cli.options import Counts
from pybmc.cli.terminal import note, progress

WORDS = ("the mill house river cat mouse winter night story grain wheel road friend door stone light "
         "wind tree bread song king bird gold ship sea boat sail wave sparrow spring place cold warm old new "
         "small great").split()


QUESTION = 16                           # words of a short message


@dataclass(frozen=True)
class Limits:
    """What a request must meet to count as good, in milliseconds."""

    first_ms: float
    token_ms: float


@dataclass
class Record:
    """A request: when it was due, when its texts came, how many tokens they were,
    and what went wrong. Seconds of one clock."""

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
    """What a plan gave: a rate, or users in a closed loop.
    A pair is p50 and p99 in milliseconds, None where no request was answered."""

    rate: float
    users: int
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


@dataclass(frozen=True)
class Plan:
    """Requests to send: each at a time of its own, or by users in a closed loop,
    who begin none after some seconds."""

    bodies: list[dict]
    rate: float = 0.0
    times: list[float] = field(default_factory=list)
    users: int = 0
    seconds: float = inf


# ---- requests ----------------------------------------------------------------------------------------------


def drawn(rng: random.Random, n: int, prompt: tuple[int, int], answer: tuple[int, int], systems: list[str],
          share: float = 1.0) -> list[dict]:
    """Bodies with prompts of words, their lengths between two bounds; a share of them, evenly spread, begins
    with a system prompt, which counts. Each message begins with a number of its own, so that two of them
    share no more than a system prompt."""
    def body(i: int):
        shares = bool(systems) and int((i + 1) * share) > int(i * share)
        messages = [{"role": "system", "content": rng.choice(systems)}] if shares else []
        had = len(systems[0].split()) if shares else 0
        low, high = max(prompt[0] - had, QUESTION), max(prompt[1] - had, QUESTION)
        messages.append({"role": "user", "content": question(rng, rng.randint(low, high))})
        return {"messages": messages, "max_tokens": rng.randint(*answer)}
    return [body(i) for i in range(n)]


def question(rng: random.Random, n: int) -> str:
    return f"{rng.randrange(10**9)} " + words(rng, n)


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
        messages = (found["messages"] if "messages" in found
                    else [{"role": "user", "content": found["prompt"]}])
    except (ValueError, TypeError, KeyError) as error:
        raise click.ClickException(f"{path}, line {number}: expected an object with messages or prompt: "
                                   f"{error}") from None
    system = ([{"role": "system", "content": rng.choice(systems)}] if systems
              and messages[0].get("role") != "system" else [])
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


async def run(client: httpx.AsyncClient, plan: Plan, update=None) -> list[Record]:
    """Send a plan's requests, and wait for all answers."""
    start, records, left = time.perf_counter(), [], iter(plan.bodies)

    async def one(body: dict, due: float) -> None:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        records.append(await ask(client, body, due))
        if update:
            update(len(records), len(plan.bodies))

    async def user() -> None:
        while time.perf_counter() < start + plan.seconds and (body := next(left, None)):
            await one(body, time.perf_counter())

    if plan.users:
        await asyncio.gather(*(user() for _ in range(plan.users)))
    else:
        await asyncio.gather(*(one(body, start + at) for body, at in zip(plan.bodies, plan.times)
                               if at < plan.seconds))
    return records


async def prefixes(client: httpx.AsyncClient, pairs: list[tuple[dict, dict]]) -> dict:
    """Times to the first token of two requests that begin alike, one after the other, in milliseconds:
    p50 and p99."""
    found: list[list[Record]] = [[], []]
    for pair in pairs:
        for records, body in zip(found, pair):
            records.append(await ask(client, body, time.perf_counter()))
    times = [percentiles([record.first_ms for record in records if not record.error]) for records in found]
    errors = Counter(record.error for records in found for record in records if record.error)
    return {"prefixes": len(pairs), "prompt_tokens": sum(r.prompt_tokens for r in found[1]) / len(pairs),
            "new_ms": times[0], "known_ms": times[1], "errors": dict(errors)}


def pairs_of(rng: random.Random, n: int, system_words: int, common: dict) -> list[tuple[dict, dict]]:
    def pair():
        system = {"role": "system", "content": question(rng, system_words)}
        return tuple(common | {"messages": [system, {"role": "user", "content": question(rng, QUESTION)}],
                               "max_tokens": 4} for _ in range(2))
    return [pair() for _ in range(n)]


def summary(plan: Plan, records: list[Record], limits: Limits) -> Result:
    answered = [record for record in records if not record.error]
    seconds = max(record.end for record in records) - min(record.due for record in records)
    tokens = sum(record.tokens for record in answered)
    return Result(plan.rate, plan.users, len(records), seconds,
                  percentiles([r.first_ms for r in answered]), percentiles([r.token_ms for r in answered]),
                  percentiles([gap for r in answered for gap in r.gaps_ms]), tokens / seconds,
                  sum(r.prompt_tokens for r in answered),
                  tokens, sum(record.is_good(limits) for record in records) / seconds,
                  dict(Counter(r.error for r in records if r.error)))


def percentiles(values: list[float]) -> tuple[float, float] | None:
    return (float(np.percentile(values, 50)), float(np.percentile(values, 99))) if values else None


async def measure(url: str, headers: dict, timeout: float, pairs: list[tuple[dict, dict]], plans: list[Plan],
                  limits: Limits, tell, update=None):
    """Warm up with one request, then send pairs that begin alike and run the plans, one after another."""
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=timeout,
                                 limits=httpx.Limits(max_connections=None)) as client:
        first = await ask(client, (plans[0].bodies if plans else pairs[0])[0], time.perf_counter())
        if first.error:
            raise click.ClickException(f"{url}: the first request failed: {first.error}")
        if pairs:
            tell(await prefixes(client, pairs))
        for plan in plans:
            tell(summary(plan, await run(client, plan, update), limits))


# ---- output ------------------------------------------------------------------------------------------------

COLUMNS = ("requests/s", "to first p50", "p99", "per token p50", "p99", "gap p50", "p99", "tokens/s",
           "good/s", "errors")
WIDTHS = tuple(max(len(name), 8) for name in COLUMNS)


def line(result: Result) -> str:
    def pair(values):
        return [f"{value:.1f}" for value in values] if values else ["-", "-"]
    cells = [f"{result.users} users" if result.users else f"{result.rate:g}", *pair(result.first_ms),
             *pair(result.token_ms), *pair(result.gap_ms), f"{result.tokens_per_second:.1f}",
             f"{result.good_per_second:.2f}", str(sum(result.errors.values()))]
    reason = f"  ({next(iter(result.errors))})" if result.errors else ""
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, WIDTHS)) + reason


def prefix_line(found: dict) -> str:
    def pair(values):
        return "p50 %.1f, p99 %.1f" % values if values else "-"
    failed = f"; failed: {next(iter(found['errors']))}" if found["errors"] else ""
    read = f" of {found['prompt_tokens']:.0f} tokens" if found["prompt_tokens"] else ""
    return (f"to first token{read}, ms: prefix new {pair(found['new_ms'])}; "
            f"prefix known {pair(found['known_ms'])}{failed}")


class Rates(click.ParamType):
    """Positive numbers by comma, or 0 for none."""

    name = "R,R,.."

    def convert(self, value, param, ctx):
        try:
            rates = [float(part) for part in value.split(",")]
        except ValueError:
            rates = []
        if rates == [0]:
            return []
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


class Object(click.ParamType):
    """A JSON object."""

    name = "JSON"

    def convert(self, value, param, ctx):
        try:
            found = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            found = None
        if not isinstance(found, dict):
            self.fail(f"{value!r}: expected a JSON object", param, ctx)
        return found


@click.command(help=__doc__)
@click.argument("url")
@click.option("--rates", type=Rates(), default="1", show_default=True, help="Requests a second; 0: none.")
@click.option("--users", type=click.IntRange(0), default=0, metavar="N",
              help="First N users in a closed loop, for tokens/s at saturation.")
@click.option("--prefix", type=click.IntRange(0), default=0, metavar="N",
              help="Before that, N system prompts, each sent twice.")
@click.option("-n", "requests", type=click.IntRange(1), default=50, show_default=True, metavar="N",
              help="Requests of the users, and at each rate.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=inf, metavar="S",
              help="No new requests after S seconds of a plan.")
@click.option("-f", "--file", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Prompts, a JSON object a line.")
@click.option("--prompt-words", type=Bounds(), default="32,512", show_default=True,
              help="Lengths of drawn prompts, system prompt included.")
@click.option("--answer-tokens", type=Bounds(), default="32,256", show_default=True,
              help="max_tokens of drawn requests; of a file's, HIGH.")
@click.option("--systems", type=click.IntRange(0), default=1, show_default=True, metavar="N",
              help="System prompts that requests share.")
@click.option("--system-words", type=click.IntRange(1), default=200, show_default=True, metavar="N",
              help="The length of each.")
@click.option("--share", type=click.FloatRange(0, 1), default=1.0, show_default=True, metavar="X",
              help="The share of requests that have one.")
@click.option("--temperature", type=float, default=0.0, show_default=True)
@click.option("--ignore-eos", is_flag=True,
              help="Ask for ignore_eos, which pybmc, vLLM and llama-server know.")
@click.option("--fields", type=Object(), default="{}", metavar="JSON",
              help="More fields of each request, such as a logit_bias for end tokens.")
@click.option("--first-ms", type=float, default=2000, show_default=True, metavar="MS",
              help="Limit of the time to the first token.")
@click.option("--token-ms", type=float, default=200, show_default=True, metavar="MS",
              help="Limit of the time per token.")
@click.option("--timeout", type=float, default=600, show_default=True, metavar="S",
              help="Seconds of silence until a request has failed.")
@click.option("--model", default="default", show_default=True, help="The model's name in requests.")
@click.option("--api-key", envvar="OPENAI_API_KEY", help="Sent as a bearer token; also from OPENAI_API_KEY.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of arrivals, lengths and words.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a rate on stdout.")
def main(url, rates, users, prefix, requests, seconds, file, prompt_words, answer_tokens, systems,
         system_words, share, temperature, ignore_eos, fields, first_ms, token_ms, timeout, model, api_key,
         seed, as_json):
    if not (rates or users or prefix):
        raise click.UsageError("there is nothing to measure: expected --rates above 0, --users or --prefix")
    rng = random.Random(seed)
    shared = [words(rng, system_words) for _ in range(systems)]
    common = {"model": model, "stream": True, "stream_options": {"include_usage": True},
              "temperature": temperature}
    common |= ({"ignore_eos": True} if ignore_eos else {}) | fields

    def bodies():
        found = (from_file(file, requests, answer_tokens[1], shared if systems else [], rng) if file
                 else drawn(rng, requests, prompt_words, answer_tokens, shared, share))
        return [common | body for body in found]

    plans = [Plan(bodies(), users=users, seconds=seconds)] if users else []
    plans += [Plan(bodies(), rate, arrivals(rng, rate, requests), seconds=seconds) for rate in rates]
    pairs = pairs_of(rng, prefix, system_words, common)
    heading = ["  ".join(name.rjust(width) for name, width in zip(COLUMNS, WIDTHS))]

    def tell(result: Result | dict) -> None:
        known = isinstance(result, Result)
        if as_json:
            lines = [json.dumps(asdict(result) if known else result)]
        else:
            lines = [*(heading.pop() for _ in heading[:known]),
                     line(result) if known else prefix_line(result)]
        print(*lines, sep="\n", flush=True)

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with progress("requests") as update:
        try:
            asyncio.run(measure(api_base(url), headers, timeout, pairs, plans, Limits(first_ms, token_ms),
                                tell, update))
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
