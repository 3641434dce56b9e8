"""How fast a model runs here: prompts, single tokens, and narrow passes as speculation verifies them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import default_rng  # now: an interrupt while numpy loads it would be lost

from ..errors import ArgumentError

PASSES = 4                              # verification passes that one repetition times


@dataclass(frozen=True)
class Result:
    """One test: n tokens in a pass ("pp", "verify") or generated ("tg") behind depth rows; rates in tokens/s.

    gb_s is how much of the packed weights and of the rows was read a second, once a pass; of experts as many
    as tokens take on average.
    """

    test: str
    n: int
    depth: int
    threads: int
    gpu_layers: int
    tok_s: float
    tok_s_min: float
    tok_s_max: float
    reps: int
    gb_s: float


def experts_taken(model, tokens: int) -> float:
    """Share of the experts that this number of tokens takes on average, if each token takes any;
    1 without experts."""
    metadata = model._file.metadata
    arch = metadata["general.architecture"]
    n, used = (metadata.get(f"{arch}.{key}") for key in ("expert_count", "expert_used_count"))
    return 1 - (1 - used / n) ** tokens if isinstance(n, int) and isinstance(used, int) and n else 1.0


def bytes_of_a_pass(model, test: str, n: int, depth: int, row_bytes: int) -> float:
    """Weights and rows, once each; of experts those that are taken."""
    rows = depth + (n / 2 if test == "tg" else 0)                   # on average
    tensors = model._file.tensors
    looked_up = {"token_embd.weight"} if "output.weight" in tensors else set()
    weights = [t for name, t in tensors.items() if name not in looked_up]
    experts = sum(t.nbytes for t in weights if is_expert(t)) / sum(t.nbytes for t in weights)
    left_out = experts * (1 - experts_taken(model, 1 if test == "tg" else n))
    return model.packed_bytes * (1 - left_out) + rows * row_bytes


def is_expert(tensor) -> bool:
    """Whether it holds the weights of experts that a router chooses from."""
    return "_exps." in tensor.name


@dataclass(frozen=True)
class Breakdown:
    """Where the time of one test went: seconds by step of the passes, waiting for other threads,
    and in Python."""

    test: str
    n: int
    depth: int
    threads: int
    passes: int
    wall_s: float
    steps: dict[str, float]


def bench(model, prompts: Sequence[int] = (512,), generated: Sequence[int] = (64,),
          widths: Sequence[int] = (1, 2, 4, 8, 16), depths: Sequence[int] = (0,), reps: int = 5, rows="auto",
          progress: Callable[[int, int], None] | None = None) -> Iterator[Result]:
    """Run every test at every depth, reps times after one to warm up;
    median, least and greatest rate of each."""
    return _run(model, checked_tests(prompts, generated, widths, depths, reps), reps, rows, progress)


def breakdown(model, prompts: Sequence[int] = (512,), generated: Sequence[int] = (64,),
              widths: Sequence[int] = (8,), depths: Sequence[int] = (0,), reps: int = 5,
              rows="auto") -> Iterator[Breakdown]:
    """Run the same tests and tell what their time was spent on."""
    tests = checked_tests(prompts, generated, widths, depths, reps)
    tokens = random_tokens(model, max(depth + n for _, n, depth in tests))
    with model.session(context=len(tokens), rows=rows) as session:
        for kind, n, depth in tests:
            go_to(session, tokens, depth)
            measure(session, kind, tokens[depth:depth + n])
            with model.profile() as profile:
                for _ in range(reps):
                    measure(session, kind, tokens[depth:depth + n])
            steps = profile.steps | {"Python": profile.wall_s - profile.calls_s}
            yield Breakdown(kind, n, depth, model.threads, profile.passes, profile.wall_s, steps)


def checked_tests(prompts, generated, widths, depths, reps) -> list[tuple[str, int, int]]:
    """(kind, n, depth) of each test. Raises ArgumentError."""
    if reps < 1:
        raise ArgumentError(f"reps is {reps}; expected 1 or more")
    for name, values, least in (("a prompt length", prompts, 1), ("a generated length", generated, 1),
                                ("a width", widths, 1), ("a depth", depths, 0)):
        if any(v < least for v in values):
            raise ArgumentError(f"{name} is {min(values)}; expected {least} or more")
    tests = [(kind, n, depth) for depth in depths for kind, ns in
             (("pp", prompts), ("tg", generated), ("verify", widths)) for n in ns]
    if not tests:
        raise ArgumentError("there is nothing to measure: every list is empty")
    return tests


def _run(model, tests, reps, rows, progress) -> Iterator[Result]:
    context = max(depth + n for _, n, depth in tests)
    tokens = random_tokens(model, context)
    with model.session(context=context, rows=rows) as session:
        for i, (kind, n, depth) in enumerate(tests):
            go_to(session, tokens, depth)
            rates = [measure(session, kind, tokens[depth:depth + n]) for _ in range(reps + 1)][1:]
            yield result(model, session, kind, n, depth, rates)
            if progress:
                progress(i + 1, len(tests))


def random_tokens(model, n: int) -> np.ndarray:
    """The same n ids for the same vocabulary, whatever was measured before."""
    return default_rng(0).integers(0, model.config.vocab_size, n, dtype=np.int32)


def go_to(session, tokens: np.ndarray, depth: int) -> None:
    """Leave the session with the first `depth` tokens."""
    session.rewind(min(session.position, depth))
    if session.position < depth:
        session.eval(tokens[session.position:depth], logits="none")
        session.snapshot()


def measure(session, kind: str, tokens: np.ndarray) -> float:
    """Tokens a second of one repetition; the session is as it was, afterwards."""
    depth, n = session.position, len(tokens)
    started = time.perf_counter()
    if kind == "pp":
        session.eval(tokens)
    elif kind == "tg":
        for token in tokens:
            session.eval([token])
    else:
        for _ in range(PASSES):
            session.eval(tokens, logits="all")
            session.rewind(depth)
        n *= PASSES
    rate = n / (time.perf_counter() - started)
    session.rewind(depth)
    return rate


def result(model, session, kind: str, n: int, depth: int, rates: list[float]) -> Result:
    tok_s = statistics.median(rates)
    passes, row_bytes = tok_s / (1 if kind == "tg" else n), session.arena_stats().row_bytes
    return Result(kind, n, depth, model.threads, model.gpu_layers, tok_s, min(rates), max(rates), len(rates),
                  passes * bytes_of_a_pass(model, kind, n, depth, row_bytes) / 1e9)
