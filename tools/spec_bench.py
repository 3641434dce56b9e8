"""What speculative decoding brings: plain decoding, each source of guesses alone, and all of them, in turn.

    python -m tools.spec_bench --real DIR     ten tasks of a real pair: DIR/qwen-1.5b.gguf and qwen-0.5b.gguf
    python -m tools.spec_bench --pairs DIR    pairs of a 1B model's shape that agree to a set degree
    python -m tools.spec_bench                the bundled pair

Each task runs in every way, one right after the other, in an order that changes from run to run; what is
reported are medians. Seconds are those from the request to the last token, prompt included. Every text is
compared with the plain one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pybmc
from pybmc.chat.template import ChatTemplate
from pybmc.engine import Engine, Request
from pybmc.engine.sampler import Sampler
from pybmc.spec import Speculation

PLAIN, NGRAMS = "plain", "n-grams"


@dataclass(frozen=True)
class Task:
    """A request: a prompt's tokens, and at most n tokens after it."""

    name: str
    prompt: list[int]
    n: int
    sampler: Sampler
    stop_ids: frozenset[int] = frozenset()


@dataclass
class Measured:
    """One run of a task in one way. gap: the longest time between two tokens."""

    seconds: float
    first: float
    gap: float
    tokens: list[int]
    draft_n: int
    accepted: int


@dataclass
class Row:
    """A task: medians of seconds for each way, and what they say of the arbiter (all sources together)."""

    task: str
    prompt: int
    tokens: int
    seconds: dict[str, float]
    best: str                    # the best way with one source or none
    of_best: dict[str, float]    # for each draft: the rate of all sources over that of the best single one
    first: dict[str, float]      # time to the first token over plain decoding's
    gap: dict[str, float]        # the longest gap in plain tokens


# ---- measuring ---------------------------------------------------------------------------------------------


def measure(model, task: Task, speculation: Speculation) -> Measured:
    """Run a task once, in a session of its own."""
    with Engine(model, speculation=speculation, parallel=1) as engine:
        began, times, found = time.perf_counter(), [], []
        sequence = engine.add(Request(task.prompt, task.n, task.sampler, stop_ids=task.stop_ids))
        while not sequence.done:
            for _, token in engine.step():
                found.append(token.id)
                times.append(time.perf_counter() - began)
    gap = max((b - a for a, b in zip(times, times[1:])), default=0.0)
    return Measured(times[-1], times[0], gap, found, sequence.stats.draft_n, sequence.stats.draft_n_accepted)


def ways_of(model, drafts: dict[str, object]) -> dict[str, Speculation]:
    """Plain, repetitions alone; for each draft that draft alone, and all sources together."""
    ways = {PLAIN: Speculation(model, spec="off"), NGRAMS: Speculation(model, spec="ngram")}
    for name, draft in drafts.items():
        ways[f"{name} alone"] = Speculation(model, draft, "draft")
        ways[f"all with {name}"] = Speculation(model, draft, "auto")
    return ways


def compare(model, task: Task, ways: dict[str, Speculation], runs: int) -> Row:
    """A task in every way, in turn."""
    found: dict[str, list[Measured]] = {name: [] for name in ways}
    names = list(ways)
    for run in range(runs):
        for name in names[run % len(names):] + names[:run % len(names)]:
            found[name].append(measure(model, task, ways[name]))
    expected = found[PLAIN][0].tokens
    for name, several in found.items():
        if any(one.tokens != expected for one in several):
            raise SystemExit(f"{task.name}: the text with {name} is not the plain one")

    def median(name: str, what: str) -> float:
        return statistics.median(getattr(one, what) for one in found[name])

    seconds = {name: median(name, "seconds") for name in names}
    drafts = [name.removeprefix("all with ") for name in names if name.startswith("all with ")]
    token = (seconds[PLAIN] - median(PLAIN, "first")) / max(len(expected) - 1, 1)
    single = [PLAIN, NGRAMS, *(f"{draft} alone" for draft in drafts)]
    return Row(
        task.name, len(task.prompt), len(expected), seconds, min(single, key=seconds.get),
        {d: min(seconds[n] for n in (PLAIN, NGRAMS, f"{d} alone")) / seconds[f"all with {d}"]
         for d in drafts},
        {d: median(f"all with {d}", "first") / median(PLAIN, "first") for d in drafts},
        {d: median(f"all with {d}", "gap") / token for d in drafts} if token else {},
    )


# ---- tasks -------------------------------------------------------------------------------------------------


def real_tasks(model, n: int) -> list[Task]:
    """The ten tasks of tools/spec_tasks.py in the model's chat template."""
    from .spec_tasks import TASKS

    template = ChatTemplate(None, model.tokenizer)
    return [Task(task.name, template.encode([{"role": "user", "content": task.prompt}]), min(n, task.n),
                 Sampler(temperature=task.temperature, seed=1), model.tokenizer.stop_ids) for task in TASKS]


STORIES = ("Tell me a story about a fox and a well.", "What happened to the old clockmaker?",
           "Write a short tale of a king who could not sleep.")


def bundled_tasks(model, n: int) -> list[Task]:
    """Stories of the bundled model, and a text that nobody can guess."""
    template = ChatTemplate(None, model.tokenizer)
    tasks = [Task(f"story {i + 1}, temperature {temperature:g}",
                  template.encode([{"role": "user", "content": text}]), n,
                  Sampler(temperature=temperature, seed=i)) for temperature in (0.0, 0.8)
             for i, text in enumerate(STORIES)]
    wild = Sampler(temperature=3.0, top_k=0, top_p=1.0, min_p=0.0)
    return [*tasks, Task("unpredictable", noise(model), n, wild)]


def noise(model, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(model.config.vocab_size) for _ in range(32)]


def synthetic_tasks(model, n: int) -> list[Task]:
    """Random prompts: models of random weights write no text."""
    return [Task(f"random prompt {i + 1}", noise(model, i), n, Sampler()) for i in range(3)]


# ---- models ------------------------------------------------------------------------------------------------


@contextmanager
def scrambled(path: Path, threads: int | None) -> Iterator[pybmc.Model]:
    """A draft that knows nothing: a file's weights in random order."""
    from . import synth

    with tempfile.TemporaryDirectory(dir=path.parent if os.access(path.parent, os.W_OK) else None) as folder:
        synth.scramble(shutil.copyfile(path, Path(folder) / "random.gguf"))
        with pybmc.Model(Path(folder) / "random.gguf", threads=threads) as model:
            yield model


def pair_files(folder: Path, name: str, type_name: str, share: float) -> tuple[Path, Path]:
    """A synthetic pair's files, written if they are not there."""
    from . import synth

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{type_name}-{round(100 * share)}.gguf"
    draft = path.with_name(f"{path.stem}-draft.gguf")
    if not path.is_file() or not draft.is_file():
        gain, found = synth.write_pair(path, draft, synth.MODELS[name], type_name, name, share)
        print(f"{path.name}: agreement {found:.1%}, gain of later layers {gain:.4f}", file=sys.stderr)
    return path, draft


def suites(args) -> Iterator[tuple[str, object, list[Task], dict[str, object]]]:
    """(name, model, tasks, drafts) of what is asked for; models are open until the next one is."""
    def opened(stack, path):
        return stack.enter_context(pybmc.Model(path, threads=args.threads))

    with ExitStack() as stack:
        if args.real:
            model, small = opened(stack, args.real / "qwen-1.5b.gguf"), args.real / "qwen-0.5b.gguf"
            drafts = {}
            if "0.5B" in args.drafts:
                drafts["0.5B"] = opened(stack, small)
            if "bundled" in args.drafts:
                drafts["bundled"] = opened(stack, pybmc.demo_model(draft=True))
            if "random" in args.drafts:
                drafts["random"] = stack.enter_context(scrambled(small, args.threads))
            yield "Qwen2.5-Coder 1.5B", model, real_tasks(model, args.n), drafts
            return
        if args.pairs:
            for share in (0.85, 0.6):
                path, draft = pair_files(args.pairs, args.model, args.type, share)
                model = opened(stack, path)
                (yield f"{args.model}, agreement {share:.0%}", model, synthetic_tasks(model, args.n),
                 {"draft": opened(stack, draft)})
            return
        model, small = opened(stack, pybmc.demo_model()), pybmc.demo_model(draft=True)
        drafts = {"draft": opened(stack, small),
                  "random": stack.enter_context(scrambled(small, args.threads))}
        yield "bundled pair", model, bundled_tasks(model, args.n), drafts


# ---- output ------------------------------------------------------------------------------------------------


def header(ways: dict) -> str:
    drafts = [name.removeprefix("all with ") for name in ways if name.startswith("all with ")]
    cells = ["task", "prompt + answer", *(f"{name}, s" for name in ways)]
    cells += [f"{d}: {what}" for d in drafts for what in ("of best single", "first token", "longest gap")]
    return "| " + " | ".join(cells) + " |\n" + "|---" * len(cells) + "|"


def line(row: Row) -> str:
    cells = [row.task, f"{row.prompt} + {row.tokens}", *(f"{s:.2f}" for s in row.seconds.values())]
    for draft in row.of_best:
        cells += [f"{row.of_best[draft]:.2f}", f"{row.first[draft]:.2f}", f"{row.gap.get(draft, 0):.1f}"]
    return "| " + " | ".join(cells) + " |"


def verdict(rows: list[Row]) -> str:
    drafts = rows[0].of_best
    return "; ".join(
        f"with {d}: "
        f"{statistics.geometric_mean(r.seconds[PLAIN] / r.seconds[f'all with {d}'] for r in rows):.2f} "
        f"times plain decoding, at least {min(r.of_best[d] for r in rows):.2f} of the best single source"
        for d in drafts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", type=Path, metavar="DIR",
                        help="where qwen-1.5b.gguf and qwen-0.5b.gguf are")
    parser.add_argument("--drafts", default="0.5B",
                        help="with --real: some of 0.5B, bundled, random, by comma")
    parser.add_argument("--pairs", type=Path, metavar="DIR",
                        help="where synthetic pairs are kept, or written")
    parser.add_argument("--model", default="llama-3.2-1b", help="their shape, as tools.synth names it")
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--case", default="", metavar="TEXT", help="tasks whose name holds this")
    parser.add_argument("-r", "--runs", type=int, default=5)
    parser.add_argument("-n", type=int, default=256, help="tokens of an answer, at most")
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every number")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as cache:            # what other runs learned does not count
        os.environ["XDG_CACHE_HOME"] = cache
        for name, model, tasks, drafts in suites(args):
            ways = ways_of(model, drafts)
            print(f"{name}\n\n{header(ways)}", flush=True)
            found = []
            for task in (task for task in tasks if args.case in task.name):
                found.append(compare(model, task, ways, args.runs))
                print(line(found[-1]), flush=True)
            if found:
                print(f"\n{verdict(found)}\n", flush=True)
            rows += found
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
