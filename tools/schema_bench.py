"""What following JSON schemas costs and gives, on any model.

    python -m tools.schema_bench                     # the bundled model
    python -m tools.schema_bench MODEL -n 500 --draft SMALL --json

\b
N schemas are drawn (tools/schemas.py), and for each a text is written in three ways:
    free          without the schema, as long as the text under it
    masked        under it, token by token
    forced        under it, where tokens that have to follow share a pass

invalid counts texts that ended and are no JSON of their schema, differing those that forced tokens changed:
both have to be 0. cut counts texts that --max-tokens ended. Compiling is timed without a cache; masks are
what the grammar takes for a token, in all.
"""

from __future__ import annotations

import json
import random
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field

import click
import numpy as np

import pybmc
from pybmc import Engine, Request
from pybmc.chat.generate import encode_prompt
from pybmc.engine.sampler import Sampler
from pybmc.errors import SchemaError
from pybmc.grammar import Grammar
from pybmc.spec.speculation import Speculation

from .schemas import draw, fits

PROMPT = "Write a JSON object about a mill."
WAYS = ("free", "masked", "forced")


class Timed:
    """A state of a grammar, whose calls are timed."""

    def __init__(self, state, forces: bool):
        self._state, self._forces, self.seconds = state, forces, 0.0

    def _call(self, method, *args):
        started = time.perf_counter()
        try:
            return method(*args)
        finally:
            self.seconds += time.perf_counter() - started

    def mask(self, tokens):
        return self._call(self._state.mask, tokens)

    def accept(self, token):
        self._call(self._state.accept, token)

    def forced(self):
        return self._call(self._state.forced) if self._forces else []


@dataclass
class Way:
    """Texts written in one way: their tokens, seconds from the first token on, passes,
    and seconds in the grammar."""

    tokens: int = 0
    seconds: float = 0.0
    passes: int = 0
    grammar: float = 0.0

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class Result:
    schemas: int = 0
    refused: int = 0
    invalid: int = 0
    differing: int = 0
    cut: int = 0
    compile_ms: list[float] = field(default_factory=list)
    ways: dict[str, Way] = field(default_factory=lambda: {name: Way() for name in WAYS})

    def told(self) -> dict:
        found = asdict(self) | {"compile_ms": {f"p{p}": percentile(self.compile_ms, p) for p in (50, 99)}}
        found["ways"] = {name: asdict(way) | {"tokens_per_second": way.rate}
                         for name, way in self.ways.items()}
        return found


def percentile(values: list[float], p: float) -> float:
    return float(np.percentile(values, p)) if values else 0.0


def write(model, speculation, request: Request, way: Way) -> tuple[str, list[int], bool]:
    """A request's text and ids, and whether it ended."""
    with Engine(model, parallel=1, speculation=speculation) as engine:
        sequence, tokens = engine.add(request), []
        while not sequence.done:
            tokens += [token for _, token in engine.step()]
        if sequence.error:
            raise sequence.error
    way.tokens += max(len(tokens) - 1, 0)
    way.seconds += sequence.stats.predicted_s
    way.passes += sequence.stats.rounds
    way.grammar += getattr(request.schema, "seconds", 0.0)
    return ("".join(t.text for t in tokens), [t.id for t in tokens],
            bool(tokens) and tokens[-1].finish_reason == "stop")


def measure(model, speculation, schemas: list[dict], most: int, temperature: float, update=None) -> Result:
    result, prompt = Result(), encode_prompt(model.tokenizer, PROMPT)
    Grammar.json_object(model)          # reads the vocabulary
    for seed, schema in enumerate(schemas):
        result.schemas += 1
        started = time.perf_counter()
        try:
            grammar = Grammar.json(schema, model, strict=True)
        except SchemaError:
            result.refused += 1
            continue
        result.compile_ms.append(1e3 * (time.perf_counter() - started))
        texts = {}
        for name in ("masked", "forced"):
            request = Request(prompt, most,
                              Sampler(temperature=temperature, seed=seed), stop_ids=model.tokenizer.stop_ids,
                              schema=Timed(grammar.start(), name == "forced"))
            texts[name] = write(model, speculation, request, result.ways[name])
        text, ids, ended = texts["forced"]
        result.differing += texts["masked"][1] != ids
        result.cut += not ended
        result.invalid += ended and not is_valid(text, schema)
        free = Request(prompt, len(ids), Sampler(temperature=temperature, seed=seed))
        write(model, speculation, free, result.ways["free"])
        if update:
            update(seed + 1, len(schemas))
    return result


def is_valid(text: str, schema: dict) -> bool:
    try:
        return fits(json.loads(text), schema)
    except ValueError:
        return False


def table(result: Result) -> str:
    ms = result.compile_ms
    lines = [f"{result.schemas} schemas: {result.refused} refused, {result.invalid} invalid, "
             f"{result.differing} differing, {result.cut} cut",
             f"compiling, ms: p50 {percentile(ms, 50):.2f}, p99 {percentile(ms, 99):.2f}", "",
             "way       tokens/s  tokens a pass  grammar, ms a token"]
    for name, way in result.ways.items():
        lines.append(f"{name:8}  {way.rate:8.1f}  {way.tokens / max(way.passes, 1):13.2f}  "
                     f"{1e3 * way.grammar / max(way.tokens, 1):19.3f}")
    return "\n".join(lines)


@click.command(help=__doc__)
@click.argument("path", required=False, metavar="[MODEL]")
@click.option("-n", "count", type=click.IntRange(1), default=100, show_default=True, metavar="N",
              help="Schemas.")
@click.option("--draft", metavar="MODEL", help="A draft model; every way has it.")
@click.option("--spec", default="off", show_default=True,
              help="Who guesses besides the schema, as in pybmc generate.")
@click.option("--max-tokens", type=click.IntRange(1), default=300, show_default=True, metavar="N")
@click.option("--temperature", type=click.FloatRange(0), default=0.8, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the first schema.")
@click.option("-t", "--threads", type=click.IntRange(1))
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def main(path, count, draft, spec, max_tokens, temperature, seed, threads, as_json):
    from pybmc.cli.terminal import progress

    with ExitStack() as stack, progress("schemas") as update:
        model = stack.enter_context(pybmc.Model(path or pybmc.demo_model(), threads=threads))
        small = stack.enter_context(pybmc.Model(draft, threads=threads)) if draft else None
        speculation = Speculation(model, small, "auto" if draft and spec == "off" else spec)
        schemas = [draw(random.Random(seed + i)) for i in range(count)]
        result = measure(model, speculation, schemas, max_tokens, temperature, update)
    print(json.dumps(result.told()) if as_json else table(result))
    if result.invalid or result.differing:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
