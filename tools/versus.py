"""Compare pybmc with llama.cpp on the same files: opening, prompts, single tokens,
verification passes, memory.

    pip install llama-cpp-python
    python -m tools.versus MODEL... [-p 512] [-n 32] [-b 1,2,4,8,16] [-d 0,4096] [-r 5] [-t 2] [--json]
    python -m tools.versus --table DIR [--only types,depth] [-r 5] [-t 2] [--json-file results.jsonl]

The second form measures the whole table (TABLE below) on files of random weights,
which it writes to DIR where they are missing.

What makes the comparison fair: both engines evaluate the same tokens with the same number of threads, the
files in the page cache, each engine in a process of its own, never both at a time, in the order A B B A A B
...; a ratio is the median over these pairs. llama.cpp attends with flash attention and without, the faster is
taken for each line; weights are repacked as its build has it, batch sizes are its defaults. A verification
pass gives the logits of all its tokens on both sides (pybmc can do with less, `logits="argmax"`), then
rewinds. Before anything is timed, the logits of a text are compared; how far they are apart is printed below
the table, and tools.exact tells which engine is closer to float32. "limit" is our share of what the machine
allows, measured right before each of our runs, since its speed changes: weights and rows read from memory, or
our kernels working from the cache (tools.limits); the median of the runs.

The peer may live in an environment of its own, with numpy and llama-cpp-python: --peer-python, or the
environment variable PYBMC_PEER_PYTHON.

Exit codes: 0 done, 1 it failed, 2 wrong usage, 3 the engines do not compute the same model: they read the
text as different tokens, or prefer the same next token in less than half of the places.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np

from pybmc.cli.measure import test_name
from pybmc.cli.options import Counts
from pybmc.errors import BmcError

from .distance import Distance, distance

OURS, THEIRS = "pybmc", "llama.cpp"
ROOT = Path(__file__).parents[1]
TEXT = ROOT / "docs" / "speculation.md"
CHECKED = 64                            # tokens of it whose logits are compared
SAME_MODEL = 0.5                        # share of equal best tokens below which it is another model
FAR = 0.05                              # error from which on the report names tools.exact
OPENINGS = 3
LONG = 5.0                              # seconds of a run from which on nothing is gained by warming up
BUSY = 0.05                             # share of the cores in other hands from which on a run does not count

# ---- the engines -------------------------------------------------------------------------------------------


def with_root():
    """The environment in which another Python finds this checkout too."""
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}


class Engine:
    """A worker process that holds one engine."""

    def __init__(self, name, command, environment=None):
        self.name, self.idle = name, 0.0
        try:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                            env=os.environ | with_root() | (environment or {}))
        except OSError as e:
            raise click.ClickException(f"{command[0]} does not start: {e.strerror}") from None
        about = self._answer()
        self.version, self.modes = about["version"], about["modes"]

    def ask(self, request, **arguments):
        """What the worker answers to a request. Raises ClickException with the worker's sentence."""
        with suppress(BrokenPipeError):                             # what is left to read says why
            self.process.stdin.write(json.dumps({"do": request, **arguments}) + "\n")
            self.process.stdin.flush()
        answer = self._answer()
        self.idle = answer.pop("idle", 0.0)
        return answer

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise click.ClickException(f"{self.name}: its process ended with status {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise click.ClickException(answer["error"])
        return answer

    def logits(self, tokens, file, width, mode=""):
        """Logits of the tokens in passes of width: float32 (n, vocab_size), mapped from their file."""
        shape = self.ask("logits", tokens=tokens, file=str(file), width=width, mode=mode)["shape"]
        return np.memmap(file, np.float32, "r", shape=tuple(shape))

    def close(self):
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def engine_of(name, python, cpu=""):
    """A fresh engine: what a file before it used is not its own. cpu: the kernels that pybmc is to take."""
    engine = Engine(name, [python, "-m", "tools.versus_worker", name], {"PYBMC_CPU": cpu} if cpu else {})
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def engines(peer_python, cpu=""):
    with engine_of(OURS, sys.executable, cpu) as ours, engine_of(THEIRS, peer_python) as theirs:
        yield ours, theirs


# ---- the whole table ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """Tests of one file of a real model's shape: "tg 32 @4096" is one. threads 0: as asked;
    cpu: pybmc's kernels."""

    section: str
    shape: str
    type: str
    tests: str
    threads: int = 0
    cpu: str = ""

    @property
    def cells(self):
        return [parse_test(test.strip()) for test in self.tests.split(",")]


WIDTHS = "pp 512, tg 32, verify 2, verify 4, verify 8, verify 16"
TABLE = [
    *(Entry("types", "llama-3.2-1b", type, WIDTHS) for type in (
        "Q4_K_M", "Q4_0", "Q8_0", "F16", "BF16", "Q6_K", "Q5_K_M", "Q5_0", "Q3_K_M", "Q2_K", "IQ4_XS",
        "IQ4_NL", "MXFP4")),
    Entry("one-thread", "llama-3.2-1b", "Q4_K_M", "tg 32, verify 8, pp 512", threads=1),
    Entry("depth", "llama-3.2-1b", "Q4_K_M", "tg 32 @4096, tg 32 @8192, verify 8 @4096"),
    Entry("long-prompt", "llama-3.2-1b", "Q4_K_M", "pp 8192"),
    Entry("7b", "llama-2-7b", "Q4_0", "tg 16, tg 16 @2048, verify 8"),
    Entry("68m", "llama-68m", "Q4_0", "tg 64, verify 8, pp 512"),
    Entry("0.5b", "qwen2.5-0.5b", "Q4_K_M", WIDTHS),
    Entry("avx2", "llama-3.2-1b", "Q4_K_M", WIDTHS, cpu="avx2"),
    Entry("avx2", "llama-3.2-1b", "Q8_0", WIDTHS, cpu="avx2"),
]


def file_of(entry, folder):
    """The entry's file, written if it is missing."""
    path = Path(folder) / f"{entry.shape}-{entry.type}.gguf"
    if not path.exists():
        from . import synth

        synth.write(path, synth.MODELS[entry.shape], entry.type)
    return str(path)


# ---- measuring ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A test of pybmc.engine.bench: "pp", "tg" or "verify" of n tokens behind depth others."""

    test: str
    n: int
    depth: int


@dataclass(frozen=True)
class Row:
    """A line of the table: what both engines measured, pair by pair.
    Of tok/s more is better, of s and MB less."""

    work: str
    ours: list
    theirs: list
    unit: str = "tok/s"
    mode: str = ""
    cell: Cell | None = None
    limits: list | None = None    # for each of our runs: "tok_s" that the machine allowed, and "by" what

    @property
    def ratios(self):
        """How many times better pybmc is."""
        return [o / t if self.unit == "tok/s" else t / o for o, t in zip(self.ours, self.theirs)]

    @property
    def ratio(self):
        return statistics.median(self.ratios)

    @property
    def limit(self):
        """The median share of its limit that a run of ours reached, that limit's "tok_s" and "by";
        or None."""
        if not self.limits:
            return None
        shares = [{"share": rate / limit["tok_s"], **limit} for rate, limit in zip(self.ours, self.limits)]
        return sorted(shares, key=lambda limit: limit["share"])[len(shares) // 2]


def parse_test(text):
    """The Cell that test_name() spells so."""
    test, n, *depth = text.split()
    return Cell(test, int(n), int(depth[0].removeprefix("@")) if depth else 0)


def cells(prompts, generated, widths, depths):
    return [Cell(test, n, depth) for depth in depths for test, ns in
            (("pp", prompts), ("tg", generated), ("verify", widths)) for n in ns]


def paired(ours, theirs, reps):
    """Call both reps times in the order A B B A A B ...; two lists."""
    results = ([], [])
    for i in range(reps):
        for side in (0, 1) if i % 2 == 0 else (1, 0):
            results[side].append((ours, theirs)[side]())
    return results


def compare(a, b, cell, reps):
    """The Row of one test, each side in its best mode."""
    def runs(engine, mode):
        return lambda: engine.ask("run", kind=cell.test, n=cell.n, depth=cell.depth, mode=mode)["tok_s"]

    modes = [best_mode({mode: runs(engine, mode) for mode in engine.modes}) for engine in (a, b)]
    limits = []

    def ours():
        limits.append(a.ask("limit", kind=cell.test, n=cell.n, depth=cell.depth))
        return runs(a, modes[0])()

    rates = paired(ours, runs(b, modes[1]), reps)
    return Row(test_name(cell), *rates, mode=modes[1], cell=cell, limits=limits)


def best_mode(runs):
    """The fastest of {mode: run}, by two runs of each after one to warm up,
    or by that one where it takes long."""
    started = time.perf_counter()
    rates = [{mode: run() for mode, run in runs.items()}]
    if len(runs) == 1:
        return next(iter(runs))
    if time.perf_counter() - started < LONG * len(runs):
        rates = [{mode: run() for mode, run in runs.items()} for _ in range(2)]
    return max(runs, key=lambda mode: max(rate[mode] for rate in rates))


def openings(a, b, first, **what):
    """The Rows of opening the file, again after the seconds that it took first,
    and of the memory that this took."""
    memory = [engine.ask("memory") for engine in (a, b)]
    again = paired(*(lambda engine=engine: engine.ask("open", **what)["seconds"] for engine in (a, b)),
                   OPENINGS - 1)
    yield Row("open", *([seconds, *more] for seconds, more in zip(first, again)), unit="s")
    for name in memory[0]:
        yield Row(f"{name} memory", *([sizes[name]] for sizes in memory), unit="MB")


# ---- do they compute the same? -----------------------------------------------------------------------------


class OtherModel(click.ClickException):
    """The engines do not compute the same model."""

    exit_code = 3

    def __init__(self, message):
        super().__init__(f"nothing was timed: {message}")


def agreement(a, b):
    """The Distance of our logits of the text from theirs, token by token and, as in a verification pass, all
    at once. Raises OtherModel."""
    text = TEXT.read_text("utf-8")
    ours, theirs = (engine.ask("tokens", text=text)["ids"][:CHECKED] for engine in (a, b))
    if ours != theirs:
        at = len(os.path.commonprefix([ours, theirs]))
        raise OtherModel(f"the engines read {TEXT.name} as different tokens: from number {at} on, "
                         f"{ours[at:at + 4]} in pybmc, {theirs[at:at + 4]} in llama.cpp")
    with TemporaryDirectory() as folder:
        logits = [np.concatenate([engine.logits(ours, Path(folder) / f"{engine.name}-{width}", width)
                                  for width in (1, len(ours))]) for engine in (a, b)]
    if logits[0].shape != logits[1].shape:
        raise OtherModel(f"pybmc gives logits of shape {logits[0].shape}, llama.cpp {logits[1].shape}")
    found = distance(*logits)
    if found.top1 < SAME_MODEL:
        raise OtherModel("the engines do not compute the same model: expected the same best token in "
                         f"{SAME_MODEL:.0%} of {found.n} places, found {found.top1:.0%}")
    return found


def agreement_text(path, found):
    line = (f"pybmc's logits of a text differ from llama.cpp's by {found.error:.2%} of their spread, top-1 "
            f"agreement {found.top1:.1%}, KL divergence {found.kl_mean:.2g} (99%: {found.kl_p99:.2g})")
    return line + (f"; whose error it is: python -m tools.exact {path}" if found.error > FAR else "")


# ---- the machine -------------------------------------------------------------------------------------------


def cpu_model():
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_seconds():
    """CPU time of all processes, stolen by the host, and of this process with its ended workers;
    None if unknown."""
    with suppress(OSError):
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        own = os.times()
        tick = os.sysconf("SC_CLK_TCK")
        return np.array([(user + nice + system + irq + softirq) / tick, steal / tick, sum(own[:4])])
    return None


def roof(threads):
    """What the machine allows, by our library's own measure: GB/s, billions of products a second."""
    from .lab import arithmetic_rate, read_bandwidth

    int8, f32 = arithmetic_rate(threads)
    return {"read": rounded(read_bandwidth(threads) / 1e9), "int8": rounded(int8 / 1e9),
            "f32": rounded(f32 / 1e9)}


def noise(before, after, seconds):
    """{"others": share of all cores that other processes took, "stolen": share that the host took}."""
    if before is None or after is None:
        return {}
    busy, stolen, own = (after - before) / (seconds * os.cpu_count())
    return {"others": round(max(0.0, busy - own), 3), "stolen": round(stolen, 3)}


def warm(path):
    """Read the file and its other parts once, so that neither engine waits for the disk."""
    from pybmc.files.gguf import GGUF

    with GGUF(path) as file:
        paths = file.paths
    for part in paths:
        with open(part, "rb", buffering=0) as f:
            while f.read(1 << 24):
                pass


# ---- the report --------------------------------------------------------------------------------------------


def table_head():
    return (f"| {'work':19} | {OURS:>9} | {THEIRS:>9} | ratio | {'spread':>12} | {'limit':>12} | "
            f"{'llama.cpp with':18} |\n"
            f"|{'-' * 21}|{'-' * 10}:|{'-' * 10}:|------:|{'-' * 13}:|{'-' * 13}:|{'-' * 20}|")


def table_line(row):
    work = row.work if row.unit == "tok/s" else f"{row.work}, {row.unit}"
    ours, theirs = (spelled(statistics.median(side)) for side in (row.ours, row.theirs))
    spread = f"{min(row.ratios):.2f}..{max(row.ratios):.2f}" if len(row.ratios) > 1 else ""
    limit = f"{row.limit['share']:.0%} {row.limit['by']}" if row.limit else ""
    return (f"| {work:19} | {ours:>9} | {theirs:>9} | {row.ratio:5.2f} | {spread:>12} | {limit:>12} | "
            f"{row.mode:18} |")


def json_line(path, threads, row):
    test = vars(row.cell) if row.cell else {"test": row.work}
    return {"model": path, **test, "unit": row.unit, "threads": threads,
            "pybmc": rounded(statistics.median(row.ours)),
            "llama_cpp": rounded(statistics.median(row.theirs)), "ratio": rounded(row.ratio),
            "ratio_min": rounded(min(row.ratios)), "ratio_max": rounded(max(row.ratios)),
            "reps": len(row.ours), "mode": row.mode, "limit": rounded_limit(row.limit),
            "pybmc_all": [rounded(x) for x in row.ours], "llama_cpp_all": [rounded(x) for x in row.theirs]}


def rounded_limit(limit):
    return limit and {**limit, "share": rounded(limit["share"]), "tok_s": rounded(limit["tok_s"])}


def spelled(value):
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def rounded(value):
    return float(f"{value:.5g}")


def machine_text(path, machine):
    """The facts below a table."""
    waiting = "while the other worked, pybmc used {pybmc:.1%} of a core, llama.cpp {llama_cpp:.1%}"
    lines = ["{cpu}, {threads} threads, {system}, {date}".format(**machine), *machine["engines"],
             agreement_text(path, Distance(**machine["agreement"])), waiting.format(**machine["idle"])]
    if "roof" in machine:
        limits = ("the machine's limits: {read:.1f} GB/s read, {int8:.0f} billion int8 products a second, "
                  "{f32:.0f} of floats")
        lines.append(limits.format(**machine["roof"]))
    if "others" in machine:
        taken = "meanwhile other processes took {others:.1%} of the cores, the host {stolen:.1%}"
        verdict = "; too much: measure again" if machine["others"] + machine["stolen"] > BUSY else ""
        lines.append(taken.format(**machine) + verdict)
    return "\n".join(f"- {line}" for line in lines)


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("models", nargs=-1, type=click.Path(exists=True, dir_okay=False), metavar="MODEL...")
@click.option("-p", "--n-prompt", "prompts", type=Counts(), default="512", show_default=True,
              help="Prompt lengths.")
@click.option("-n", "--n-gen", "generated", type=Counts(), default="32", show_default=True,
              help="Single tokens.")
@click.option("-b", "--widths", type=Counts(), default="1,2,4,8,16", show_default=True,
              help="Verification widths.")
@click.option("-d", "--depths", type=Counts(), default="0,4096", show_default=True,
              help="Tokens held before.")
@click.option("-r", "--reps", type=click.IntRange(1), default=5, show_default=True, help="Pairs of runs.")
@click.option("-t", "--threads", type=click.IntRange(1, 512),
              help="Threads of both; default: the usable cores.")
@click.option("--table", type=click.Path(file_okay=False), metavar="DIR",
              help="The whole table, with files in DIR.")
@click.option("--only", default="", metavar="NAMES", help="Sections of the table, or types, by comma: "
              + ", ".join(dict.fromkeys(entry.section for entry in TABLE)) + ".")
@click.option("--peer-python", envvar="PYBMC_PEER_PYTHON", default=sys.executable, metavar="PYTHON",
              help="The interpreter that has llama_cpp; default: this one.")
@click.option("--avx2-peer-python", envvar="PYBMC_AVX2_PEER_PYTHON", metavar="PYTHON",
              help="One whose llama_cpp is built without AVX-512; without it the table has no avx2 section.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line on stdout.")
@click.option("--json-file", type=click.File("a"), help="Append them to a file, beside the table on stdout.")
def main(models, prompts, generated, widths, depths, reps, threads, table, only, peer_python,
         avx2_peer_python, as_json, json_file):
    if bool(models) == bool(table):
        raise click.UsageError("expected files to compare on, or --table DIR")
    threads = threads or default_threads()
    say = Say(as_json, json_file)
    try:
        for path in models:
            report(path, cells(prompts, generated, widths, sorted(depths)), reps, threads, peer_python, say)
        for entry in chosen(only, bool(avx2_peer_python)) if table else ():
            python = avx2_peer_python if entry.cpu else peer_python
            report(file_of(entry, table), entry.cells, reps, entry.threads or threads, python, say, entry.cpu)
    except BmcError as e:
        raise click.ClickException(str(e)) from None


def chosen(only, has_avx2_peer):
    """The entries of the table whose section or type is named, or all."""
    names = {name.strip() for name in only.split(",") if name.strip()}
    known = {name for entry in TABLE for name in (entry.section, entry.type)}
    if names - known:
        raise click.UsageError(f"--only {', '.join(sorted(names - known))}: expected some of "
                               f"{', '.join(sorted(known))}")
    return [entry for entry in TABLE if (not names or names & {entry.section, entry.type})
            and (has_avx2_peer or not entry.cpu)]


@dataclass(frozen=True)
class Say:
    """Print a line as text or JSON, and as JSON to a file where one is asked for."""

    as_json: bool
    file: object = None

    def __call__(self, text, values):
        print(json.dumps(values) if self.as_json else text, flush=True)
        if self.file:
            print(json.dumps(values), file=self.file, flush=True)


def report(path, todo, reps, threads, peer_python, say, cpu=""):
    """Measure one file and print each line when it is known."""
    sizes = {"threads": threads,
             "outputs": max([CHECKED, *(cell.n for cell in todo if cell.test == "verify")]),
             "context": max([CHECKED, *(cell.depth + cell.n for cell in todo)])}
    warm(path)
    limits = roof(threads)
    before, started = cpu_seconds(), time.perf_counter()
    with engines(peer_python, cpu) as (a, b):
        first = [engine.ask("open", path=path, **sizes)["seconds"] for engine in (a, b)]
        agreed = agreement(a, b)
        if not say.as_json:
            print(f"**{Path(path).name}**: tokens/s, medians of {reps} pairs; ratio: how many times pybmc is "
                  "better\n")
            print(table_head())
        for row in chain(openings(a, b, first, path=path, **sizes),
                         (compare(a, b, cell, reps) for cell in todo)):
            say(table_line(row), json_line(path, threads, row))
        idle = {"pybmc": a.idle, "llama_cpp": b.idle}
    spent = noise(before, cpu_seconds(), time.perf_counter() - started)
    machine = {"cpu": cpu_model(), "threads": threads, "system": f"{platform.system()} {platform.machine()}",
               "date": time.strftime("%Y-%m-%d"), "engines": [a.version, b.version], "roof": limits,
               "agreement": vars(agreed), "idle": idle, **spent}
    say(f"\n{machine_text(path, machine)}\n", {"model": path, "test": "machine", **machine})


def default_threads():
    from pybmc._native import lib

    return lib.bmc_cpu_count()


if __name__ == "__main__":
    main()
