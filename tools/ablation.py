"""What each constant of speculative decoding is worth: it is removed, halved and doubled in a simulation.

    python -m tools.ablation                two tables in Markdown: the tasks, and the constants
    python -m tools.ablation --seeds 100    more texts of each task

No model runs and no clock is read: tools/simulated.c gives the library's own rounds (native/guess.c, round.c,
policy.c, ngram.c) texts that are known in advance, and passes that take what a measured curve says.
So a table is the same on every machine.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
from cffi import FFI

ROOT = Path(__file__).parents[1]
SOURCES = ("round", "guess", "policy", "drafter", "ngram", "error")

# Seconds of passes of 1, 2, 4 .. 512 tokens, from docs/benchmarks.md.
CURVES = {
    "1.5B": [.0221, .0238, .0240, .0252, .0427, .083, .16, .30, .58, 1.14],
    "0.5B": [.0086, .0101, .0110, .0116, .0155, .026, .048, .09, .17, .333],
    "1.5B, AVX-512": [.0149, .0152, .0165, .0233, .0400, .075, .146, .29, .58, 1.15],
    "0.5B, AVX-512": [.0043, .0049, .0058, .0082, .0155, .030, .058, .115, .23, .45],  # 32: as 7 of 1
    "F16": [.0769, .0774, .0945, .123, .235, .40, .73, 1.4, 2.7, 5.2],     # a CPU that arithmetic soon limits
}


@dataclass(frozen=True)
class Constant:
    """A constant of the native library. neutral: the value that takes it out of effect."""

    name: str
    file: str
    value: float
    neutral: float

    def edits(self) -> dict[str, Edit]:
        """Ways to change it."""
        if 0.9 < self.value < 1:            # a weight that fades: what it loses each time counts
            halved, doubled = (1 - (1 - self.value) * factor for factor in (0.5, 2))
        else:
            halved, doubled = (type(self.value)(self.value * factor) for factor in (0.5, 2))
        return {way: Edit(self.file, rf"\b{self.name} = [-\d.e]+", f"{self.name} = {value}")
                for way, value in (("removed", self.neutral), ("halved", halved), ("doubled", doubled))}


class Edit(NamedTuple):
    """A change of a source file: what matches the pattern, once, becomes the text."""

    file: str
    pattern: str
    text: str


CONSTANTS = [
    Constant("LATENCY", "guess.c", 3.0, 1e9),
    Constant("WIDER", "guess.c", 4, 1 << 20),
    Constant("FIRST_WINDOW", "drafter.c", 32, 1 << 20),
    Constant("NOISE", "policy.c", 0.08, 0.01),
    Constant("SPEED_WALK", "policy.c", 0.02, 0.0),
    Constant("SHAPE", "policy.c", 0.12, 0.01),
    Constant("ODD", "policy.c", 2.5, 1e9),
    Constant("STREAK", "policy.c", 3, 1 << 20),
    Constant("PER_TOKEN", "policy.c", 0.05, 0.0),
    Constant("FADE", "policy.c", 0.95, 1.0),
    Constant("PRIOR", "policy.c", 4.0, 0.01),
    Constant("FIRST_MEAN", "policy.c", 0.75, 0.5),
    Constant("GRANT", "policy.c", 4.0, 0.0),
    Constant("BANK", "policy.c", 16.0, 1e9),
    Constant("SHARE", "policy.c", 0.01, 0.0),
]

MECHANISMS = {                          # what can only be removed
    "first chances by the length of a match":
        Edit("drafter.c", r"priors\[\] = \{.*?\}", "priors[12] = {" + "0.6, " * 12 + "}"),
    "first chances by the draft model's probability":
        Edit("drafter.c", r"1 - unsure \* unsure", "0.75 + 0 * unsure"),
    "chances of this text": Edit("guess.c", r"&t->drafter->recent\[source\]", "&none"),
    "copies that go on after an edit":
        Edit("ngram.c", r"!from && \(from = rejoined\(g, &length\)\)", "false"),
}


# ---- texts and machines ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What is written, and who may guess. copied: share of the answer that stands in the prompt. right: how
    often the draft model is; both in each stretch of a text in turn, or in each text (whole).
    honest: whether the draft model knows how often."""

    name: str
    copied: tuple[float, ...] = (0.0,)
    right: tuple[float, ...] = (0.7,)
    honest: bool = True
    whole: bool = False
    prompt: int = 300
    n: int = 240
    texts: int = 1
    parallel: int = 1
    target: str = "1.5B"
    draft: str = "0.5B"
    draft_speed: float = 1.0
    noise: float = 0.06
    hiccups: float = 0.0            # share of the time in which the machine does something else
    slow: float = 1.0               # how many times slower it is every other four seconds
    drift: float = 1.0              # how many times slower it is after 20 seconds
    recalls: bool = False


TASKS = [
    Task("write code", (0.2,), (0.9,), prompt=70),
    Task("explain", (0.1,), (0.75,)),
    Task("rewrite", (0.85,), (0.75,), prompt=500),
    Task("summarise", (0.3,), (0.4,), prompt=800),
    Task("random draft", (), (0.02,)),
    Task("random draft, sure of itself", (0.2,), (0.1,), honest=False),
    Task("slow draft", (0.2,), (0.8,), draft_speed=2.2),
    Task("changing text", (0.9, 0.0, 0.0), (0.5, 0.92, 0.1), n=400),
    Task("short answers, long prompt", (0.3,), (0.75,), prompt=1600, n=40, texts=5),
    Task("long answer, long prompt", (0.1,), (0.85,), prompt=1600, n=400),
    Task("texts of other kinds", (0.9, 0.0, 0.2), (0.3, 0.92, 0.1, 0.7), texts=12, n=160, whole=True),
    Task("noisy machine", (0.3,), (0.8,), n=800, noise=0.25, hiccups=0.03),
    Task("machine changes speed", (0.3,), (0.8,), n=600, slow=2.0),
    Task("passes become slower", (0.3,), (0.8,), n=600, drift=2.5),
    Task("narrow passes pay", (0.3,), (0.85,), target="F16"),
    Task("wide draft passes cost", (0.2,), (0.9,), prompt=70, target="1.5B, AVX-512", draft="0.5B, AVX-512"),
    Task("batch of 4", (0.3, 0.0), (0.8,), texts=12, parallel=4),
    Task("batch of 8", (0.3, 0.0), (0.8,), texts=24, parallel=8),
    Task("learned elsewhere", (0.2, 0.0), (0.9, 0.9, 0.1, 0.1), texts=6, n=60, recalls=True),
]

STRETCH = 80                        # tokens of a text that are alike


def novel(rng, n: int) -> list[int]:
    """Tokens as often as words are: common ones follow each other again by chance."""
    return [int(x) % 50_000 for x in rng.zipf(1.35, n)]


def turn(task: Task, text: int, place: int) -> int:
    """Which kind of text a token is of."""
    return text if task.whole else text + place // STRETCH


def answer(rng, task: Task, number: int, prompt: list[int]) -> list[int]:
    """Tokens of its own, and copies of the prompt with an edit here and there."""
    text: list[int] = []
    at = int(rng.integers(len(prompt)))
    while len(text) < task.n:
        share = task.copied[turn(task, number, len(text)) % len(task.copied)] if task.copied else 0.0
        run = int(rng.integers(6, 30))
        if rng.random() < share:
            text += prompt[at:at + run]
            at = (at + run + int(rng.integers(0, 2))) % len(prompt)
        else:
            text += novel(rng, max(1, int(run * (1 - share) / (2 if share else 1))))
    return text[:task.n]


def arrays(task: Task, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([seed, *task.name.encode()])
    rows = []
    for number in range(task.texts):
        prompt = novel(rng, task.prompt)
        rows.append(prompt + answer(rng, task, number, prompt))
    tokens = np.array(rows, np.int32)
    kinds = [turn(task, text, place) for text in range(task.texts) for place in range(tokens.shape[1])]
    mean = np.array(task.right)[np.array(kinds) % len(task.right)].clip(0.01, 0.99)
    chance = rng.beta(2 * mean, 2 * (1 - mean))
    sure = chance if task.honest else rng.beta(8, 2, tokens.size)
    speed = np.exp(rng.normal(0, task.noise, 8000))
    speed[rng.random(8000) < task.hiccups] *= 6
    speed *= np.where(np.arange(8000) // 800 % 2, task.slow, 1.0)
    speed *= 1 + (task.drift - 1) * np.arange(8000).clip(0, 4000) / 4000
    luck = rng.random(tokens.size)
    return {"tokens": tokens.ravel(), "chance": chance.astype(np.float32), "luck": luck.astype(np.float32),
            "sure": sure.astype(np.float32), "speed": speed}


# ---- the simulator ---------------------------------------------------------------------------------------


class Simulator:
    """The library's decisions with some constants changed, compiled for the occasion."""

    def __init__(self, folder: Path, edit: Edit | None = None):
        self.ffi = FFI()
        source = (ROOT / "tools" / "simulated.c").read_text()
        plain = re.sub(r"/\*.*?\*/", "", source, flags=re.DOTALL)
        structs = re.findall(r"struct (?:task|outcome) \{.*?\};", plain, flags=re.DOTALL)
        declared = "".join(structs).replace("POINTS", "10")
        self.ffi.cdef(declared + "struct outcome simulate(const struct task *);")
        folder.mkdir(parents=True)
        for path in [*(ROOT / "native" / f"{name}.c" for name in SOURCES), *(ROOT / "native").glob("*.h")]:
            text = path.read_text()
            (folder / path.name).write_text(edited(text, edit) if edit and edit.file == path.name else text)
        subprocess.run(["cc", "-O1", "-std=c11", "-D_GNU_SOURCE", "-fPIC", "-shared", "-fvisibility=hidden",
                        f"-I{folder}", "-include", str(ROOT / "tools" / "simulated.h"),
                        *(str(folder / f"{name}.c") for name in SOURCES), str(ROOT / "tools" / "simulated.c"),
                        "-lm", "-o", str(folder / "simulator.so")], check=True)
        self.lib = self.ffi.dlopen(str(folder / "simulator.so"))

    def run(self, task: Task, data: dict[str, np.ndarray], ngrams: bool = True, drafts: bool = True):
        """Seconds of the answers, and the longest gap between tokens."""
        native = self.ffi.new("struct task *")
        native.n_texts, native.parallel = task.texts, task.parallel
        native.prompt, native.n = task.prompt, task.n
        native.needs, native.n_speed, native.recalls = 64.0, len(data["speed"]), task.recalls
        native.target = CURVES[task.target]
        native.draft = [x * task.draft_speed for x in CURVES[task.draft]]
        native.ngrams, native.drafts = ngrams, drafts
        for name, values in data.items():
            kind = {"tokens": "int32_t", "speed": "double"}.get(name, "float")
            setattr(native, name, self.ffi.cast(f"{kind} *", values.ctypes.data))
        return self.lib.simulate(native)


def edited(text: str, edit: Edit) -> str:
    text, n = re.subn(edit.pattern, lambda _: edit.text, text, flags=re.DOTALL)
    if n != 1:
        raise ValueError(f"{edit.pattern}: expected it once in {edit.file}, found it {n} times")
    return text


# ---- tables ----------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """Tasks' seconds, and the longest gap of all."""

    seconds: dict[str, float] = field(default_factory=dict)
    gaps: dict[str, float] = field(default_factory=dict)


def measure(simulator: Simulator, seeds: int, **sources: bool) -> Measured:
    found = Measured()
    for task in TASKS:
        outcomes = [simulator.run(task, arrays(task, seed), **sources) for seed in range(seeds)]
        found.seconds[task.name] = sum(outcome.seconds for outcome in outcomes)
        found.gaps[task.name] = max(outcome.longest_gap for outcome in outcomes)
    return found


def table_of_tasks(ways: dict[str, Measured]) -> Iterator[str]:
    yield "| task | plain | repetitions alone | draft alone | all | loss to the best single | longest gap |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    for name in (task.name for task in TASKS):
        plain, ngrams, draft, both = (ways[way].seconds[name] for way in ("plain", "ngrams", "draft", "all"))
        loss = both / min(plain, ngrams, draft) - 1
        yield (f"| {name} | 1 | {plain / ngrams:.2f} | {plain / draft:.2f} | {plain / both:.2f} | "
               f"{loss:.1%} | {ways['all'].gaps[name]:.1f} |")


QUIET = [task.name for task in TASKS if task.noise < 0.1 and task.slow == task.drift == task.parallel == 1]


def change(found: Measured, usual: Measured) -> str:
    """The worst and the mean loss in percent, and the longest gap where it is longer than usual."""
    losses = {name: 100 * (found.seconds[name] / usual.seconds[name] - 1) for name in usual.seconds}
    worst = max(losses, key=losses.__getitem__)
    gap, usual_gap = (max(measured.gaps[name] for name in QUIET) for measured in (found, usual))
    text = f"{losses[worst]:+.1f} ({worst}), mean {sum(losses.values()) / len(losses):+.1f}"
    return text + f", gap {gap:.1f}" * (gap > 1.2 * usual_gap)


def table_of_changes(usual: Measured, folder: Path, seeds: int) -> Iterator[str]:
    """Rows; `folder` takes what is compiled."""
    number = count()

    def loss(edit: Edit) -> str:
        return change(measure(Simulator(folder / str(next(number)), edit), seeds), usual)

    yield "| constant | value | removed | halved | doubled |\n|---|--:|---|---|---|"
    for constant in CONSTANTS:
        cells = " | ".join(map(loss, constant.edits().values()))
        yield f"| {constant.name} | {constant.value:g} | {cells} |"
    for name, edit in MECHANISMS.items():
        yield f"| {name} | | {loss(edit)} | | |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=40, help="texts of each task")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        simulator = Simulator(folder / "usual")
        ways = {"plain": (False, False), "ngrams": (True, False), "draft": (False, True), "all": (True, True)}
        found = {name: measure(simulator, args.seeds, ngrams=n, drafts=d) for name, (n, d) in ways.items()}
        print(*table_of_tasks(found), "", sep="\n")
        for line in table_of_changes(found["all"], folder, args.seeds):
            print(line, flush=True)


if __name__ == "__main__":
    main()
