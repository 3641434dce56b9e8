"""What a KV cache costs by the way it grows, measured on the real arena and kernels, beside a prediction.

A setting is a shape, a prompt length, a number of drafted tokens and a way to grow. Of the tokens that follow
the prompt a sample is evaluated, spread evenly: passes at different fillings of the reserved rows, and
growths with the pass that they interrupt. Rows in between are filled with noise. What costs the same every
time need not be done a thousand times; `whole` does it nevertheless, to check the sampling.

The rows of a growth are touched at once, so that first touch is a cost of its own. With `pad` attention works
on every row reserved, as kernels over whole arrays do: that is where the paper's trade-off lives
(docs/bmc.md).
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from pybmc.errors import ArgumentError

from . import balance
from .growth import POLICIES as GROWTHS
from .growth import GrowingSession, Growth, grown, parse
from .machine import Machine, attention_times, lines_through, measure_machine
from .synthetic import SyntheticModel

R_GRID = (1, 16, 32, 64, 128, 256, 512, 1024)
POLICIES = ("copy:1", "copy:128", "geometric:1.5", "geometric", "chunk", "reserve", "remap",
            "max-lazy", "max")
ACCEPTED = 0.7                          # chance that a drafted token comes true, if those before it did
SAMPLED, PASSES, REPS = 8, 10, 3        # growths and passes of a setting; evaluations of each pass
LENGTHS = (512, 2048, 8192, 32768)      # at which stalls are looked for
ROWS_BEYOND = 2048                      # that they may take
MOST_BYTES = 3 << 29                    # of rows there


def tau_of(k: int, accepted: float) -> float:
    """Tokens that a pass brings, on average: those accepted of k drafted, and one more."""
    return sum(accepted**i for i in range(k + 1))


@dataclass(frozen=True)
class Setting:
    shape: str
    growth: Growth
    prompt: int
    generated: int
    k: int = 0
    accepted: float = ACCEPTED
    r_star: bool = False                # r is the one that the model takes

    @property
    def width(self) -> int:
        return self.k + 1

    @property
    def tau(self) -> float:
        return tau_of(self.k, self.accepted)

    @property
    def cap(self) -> int:
        return self.prompt + self.generated + self.width


@dataclass
class Result:
    """Milliseconds a token, those of the start among them; the same from the model; stalls and memory."""

    setting: Setting
    r: int
    row_bytes: int
    allocate_ms: float
    copy_ms: float
    touch_ms: float
    attention_ms: float
    rest_ms: float
    growths: int
    worst_ms: float                     # the worst pass: one that waits for a growth
    median_ms: float                    # of passes
    copied_mb: float                    # all growths
    peak_mb: float                      # reserved at once, the copy beside the original
    memory: list[tuple[int, float]]     # (tokens, MB reserved)
    predicted: balance.Cost = field(default_factory=balance.Cost)

    @property
    def cache_ms(self) -> float:
        """What depends on the cache."""
        return self.allocate_ms + self.copy_ms + self.touch_ms + self.attention_ms

    @property
    def total_ms(self) -> float:
        return self.cache_ms + self.rest_ms

    @property
    def predicted_ms(self) -> float:
        """Of cache_ms."""
        return 1e3 * self.predicted.total

    def scaled(self, factor: float) -> Result:
        """With times of passes multiplied; growths as they are."""
        return replace(self, attention_ms=factor * self.attention_ms, rest_ms=factor * self.rest_ms)

    def line(self) -> dict:
        """For --json."""
        s = self.setting
        values = {name: value for name, value in asdict(self).items()
                  if name not in ("setting", "predicted", "memory")}
        return ({"test": "kv", "shape": s.shape, "rows": str(s.growth), "pad": s.growth.pad,
                 "prompt": s.prompt, "generated": s.generated, "k": s.k, "accepted": s.accepted, "tau": s.tau,
                 "r_star": s.r_star} | values
                | {"cache_ms": self.cache_ms, "total_ms": self.total_ms, "predicted_ms": self.predicted_ms,
                   "predicted": {name: 1e3 * value for name, value in asdict(self.predicted).items()},
                   "memory": [[n, round(mb, 2)] for n, mb in self.memory]})


@dataclass(frozen=True)
class Grow:
    """A growth to come: before pass i, from `before` rows to `after`."""

    i: int
    used: int
    before: int
    after: int


def growths_of(s: Setting) -> list[Grow]:
    reserved, out = grown(s.growth, s.prompt, 0, s.cap), []
    for i in range(max(1, round(s.generated / s.tau))):
        used = s.prompt + int(i * s.tau)
        if used + s.width > reserved:
            after = grown(s.growth, used + s.width, reserved, s.cap)
            out.append(Grow(i, used, reserved, after))
            reserved = after
    return out


def measure(model, s: Setting, whole: bool = False, reference: Callable[[], float] = lambda: 1.0) -> Result:
    """One setting, in a session of its own.
    With a reference, passes are in times of it instead of milliseconds."""
    warm_up(model, grown(s.growth, s.prompt, 0, s.cap))
    with GrowingSession(model, s.growth, s.cap) as session:
        run = _Run(session, s, reference)
        start = run.start()
        plan = growths_of(s)
        if whole:
            run.everything()
        elif len(plan) <= SAMPLED:
            run.along(plan)
        else:
            run.beside(spread(plan, SAMPLED))
        return run.result(start, plan)


def warm_up(model, rows: int) -> None:
    """Touch the pages that the next rows are going to take. In a virtual machine those that nobody has
    touched for a few seconds may be the host's again: getting one back costs 20 times what a page costs
    otherwise."""
    with GrowingSession(model, Growth("max"), rows):
        pass


def spread(items: Sequence, n: int) -> list:
    """n of the items, from the middle of n equal parts."""
    return [items[int((i + 0.5) * len(items) / n)] for i in range(n)]


class _Run:
    def __init__(self, session: GrowingSession, s: Setting, reference: Callable[[], float] = lambda: 1.0):
        self.session, self.s, self.reference = session, s, reference
        self.passes: list[dict] = []
        self.grown: list[tuple[int, dict]] = []         # rows in use, what a growth took

    def start(self) -> dict:
        """The prompt's rows; what they cost without their computation."""
        self.session.reserve(self.s.prompt)
        spent = dict(self.session.spent)
        self.session.fill(self.s.prompt)
        return spent

    def go_to(self, used: int, reserved: int) -> None:
        if used > self.session.position:
            self.session.fill(used - self.session.position)
        else:
            self.session.rewind(used)
        self.session.reserve(reserved)

    def evaluate(self) -> dict:
        return self.session.evaluate(self.s.width)

    def one_growth(self, growth: Grow) -> None:
        self.go_to(growth.used, growth.before)
        warm_up(self.session.model, growth.after - growth.before * (not GROWTHS[self.s.growth.policy].copies))
        self.grown.append((growth.used, self.evaluate()))

    def one_pass(self) -> None:
        self.evaluate()    # what the jump left in the caches is not this pass's fault
        runs = [self.evaluate() | {"reference": self.reference()} for _ in range(REPS)]
        self.passes.append({name: statistics.median(run[name] for run in runs) for name in runs[0]})

    def along(self, plan: list[Grow]) -> None:
        """Every growth, and passes in between."""
        s, todo = self.s, list(plan)
        for n in range(PASSES):
            i = int((n + 0.5) * s.generated / s.tau / PASSES)
            while todo and todo[0].i <= i:
                self.one_growth(todo.pop(0))
            self.go_to(s.prompt + int(i * s.tau), self.session.rows)
            self.one_pass()
        for growth in todo:
            self.one_growth(growth)

    def beside(self, sample: list[Grow]) -> None:
        """Some growths, and after each a pass at another place of the rows that it brought."""
        for n, growth in enumerate(sample):
            self.one_growth(growth)
            room = growth.after - growth.used - self.s.width
            self.go_to(growth.used + int(room * (n * 0.618034 % 1)), growth.after)
            self.one_pass()

    def everything(self) -> None:
        for i in range(max(1, round(self.s.generated / self.s.tau))):
            self.go_to(self.s.prompt + int(i * self.s.tau), 0)
            before = self.session.rows
            spent = self.evaluate()
            if self.session.rows > before:
                self.grown.append((self.session.position, spent))
                spent = spent | {"wall": spent["wall"] - spent["allocate"] - spent["copy"] - spent["touch"]}
            self.passes.append(spent | {"reference": self.reference()})

    def growth_seconds(self, plan: list[Grow], name: str) -> float:
        """Of all growths: those that were done, or as many times what they suggest.
        What is copied costs by the row."""
        costs = [spent[name] for _, spent in self.grown]
        if len(costs) == len(plan):
            return sum(costs)
        if self.s.growth.policy in ("copy", "geometric"):
            by_row = statistics.median(cost / max(1, used) for cost, (used, _) in zip(costs, self.grown))
            return by_row * sum(growth.used for growth in plan)
        return statistics.median(costs) * len(plan)

    def result(self, start: dict, plan: list[Grow]) -> Result:
        s, stats = self.s, self.session.session.arena_stats()
        n = max(1, round(s.generated / s.tau)) * s.tau
        growing = {name: start[name] + self.growth_seconds(plan, name)
                   for name in ("allocate", "copy", "touch")}
        mean = {name: statistics.fmean(p[name] / p["reference"] for p in self.passes) / s.tau
                for name in ("wall", "attention")}
        median = statistics.median(p["wall"] for p in self.passes)
        worst = max([median] + [spent["wall"] for _, spent in self.grown])
        copies = GROWTHS[s.growth.policy].copies
        mb = stats.row_bytes / 1e6
        peak = max([stats.rows_reserved] + [g.after + (g.before if copies else 0) for g in plan]) * mb
        return Result(
            s, stats.r, stats.row_bytes, *(1e3 * growing[name] / n for name in ("allocate", "copy", "touch")),
            1e3 * mean["attention"], 1e3 * (mean["wall"] - mean["attention"]), len(plan), 1e3 * worst,
            1e3 * median, sum(g.used for g in plan) * mb * copies, peak, memory_over_tokens(s, plan, mb))


def memory_over_tokens(s: Setting, plan: list[Grow], mb: float) -> list[tuple[int, float]]:
    """Corners of the curve: tokens, MB reserved; with copies, both arrays at a growth."""
    copies = GROWTHS[s.growth.policy].copies
    reserved = grown(s.growth, s.prompt, 0, s.cap)
    corners = [(s.prompt, reserved * mb)]
    for growth in plan[:: max(1, len(plan) // 128)]:
        corners += [(growth.used, growth.before * mb),
                    (growth.used, (growth.after + growth.before * copies) * mb),
                    (growth.used, growth.after * mb)]
    return [*corners, (s.prompt + s.generated, max([reserved] + [g.after for g in plan]) * mb)]


# ---- the experiments ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What is measured. rows: sizes of a growth; ks: drafted tokens;
    policies: those compared at the middle prompt."""

    shapes: Sequence[str] = ("1b-gqa", "gpt2-medium", "7b-mha")
    prompts: Sequence[int] = (1024,)
    generated: int = 1024
    rows: Sequence[int] = R_GRID
    ks: Sequence[int] = (0, 7)
    accepted: Sequence[float] = (ACCEPTED,)
    policies: Sequence[str] = POLICIES
    reps: int = 3
    whole: bool = False
    lengths: Sequence[int] = LENGTHS


QUICK = Plan(shapes=("1b-gqa",), generated=256, rows=(1, 16, 64, 256), policies=("copy:1", "chunk", "max"),
             reps=1, lengths=(512,))
FULL = Plan(prompts=(128, 1024, 4096), rows=(1, 16, 64, 256, 1024), ks=(0, 3, 7, 15), reps=2)


@dataclass(frozen=True)
class Found:
    """What the predictions for a shape and a prompt are made of, measured in the same run:
    experiments E1 and E2."""

    shape: str
    row_bytes: int
    prompt: int
    machine: Machine
    attention: dict[int, tuple[float, float]]           # width -> seconds over no rows, over each row

    def line(self) -> dict:
        return {"test": "constants"} | asdict(self)


def bench_kv(plan: Plan, threads: int | None = None, model=None,
             progress: Callable[[int, int], None] | None = None) -> Iterator[Result | Found | Stall]:
    """For each shape and prompt its constants, then a Result for each setting.
    model: its shape alone is measured."""
    _check(plan)
    shapes = [None] if model else plan.shapes
    n_blocks, done, machine = len(shapes) * len(plan.prompts), 0, None
    for shape in shapes:
        with nullcontext(model) if model else SyntheticModel(shape, threads) as loaded:
            machine = machine or measure_machine()
            for prompt in plan.prompts:
                block = _Block(loaded, plan, prompt, machine)
                yield from block.run(lambda i, n: progress and progress(done * n + i, n_blocks * n))
                done += 1
            yield from stalls(loaded, plan.lengths)


def _check(plan: Plan) -> None:
    if not (plan.rows and plan.ks and plan.prompts and min(*plan.prompts, *plan.rows) >= 1
            and min(plan.ks) >= 0):
        raise ArgumentError("expected lists of prompts and rows from 1 up, and of drafted tokens from 0 up")
    if plan.generated < 16 or max(plan.ks) > 63:
        raise ArgumentError("expected 16 tokens to generate or more, and 63 drafted ones at most")


class _Reference:
    """A pass that is always the same. What a machine gives changes from second to second, so passes are told
    in times of the reference's beside them, and turned into seconds by what it takes on the whole."""

    def __init__(self, session: GrowingSession, rows: int):
        session.fill(rows)
        self.run, self.times = _Run(session, Setting("", Growth(), 1, 0)), []

    def __call__(self) -> float:
        self.times.append(self.run.evaluate()["wall"])
        return self.times[-1]

    def usual(self) -> float:
        return statistics.median(self.times)


class _Block:
    """One shape and prompt. All settings are measured in each of a few rounds,
    in another order every time; and so are the constants that predict them."""

    def __init__(self, model, plan: Plan, prompt: int, machine: Machine):
        self.model, self.plan, self.prompt, self.machine = model, plan, prompt, machine
        self.name = model.shape.name if hasattr(model, "shape") else Path(model.path).stem
        self.row_bytes = model.config.kv_row_bytes

    def run(self, progress: Callable[[int, int], None]) -> Iterator[Result | Found]:
        with GrowingSession(self.model, Growth(), self.prompt + 16) as session:
            reference = _Reference(session, self.prompt)
            times = [self.times(reference)]
            todo = list(self.settings(self.found(times, reference)))
            runs: list[list[Result]] = [[] for _ in todo]
            for n in range(self.plan.reps):
                times.append(self.times(reference))
                for i, at in enumerate(random.Random(n).sample(range(len(todo)), len(todo))):
                    runs[at].append(measure(self.model, todo[at], self.plan.whole, reference))
                    progress(n * len(todo) + i + 1, self.plan.reps * len(todo))
        found = self.found(times, reference)
        yield found
        for results in runs:
            yield predicted(combined(results).scaled(reference.usual()), found)

    def times(self, reference: _Reference) -> dict[tuple[int, int], float]:
        """What attention takes, in times of the reference."""
        widths = sorted({1, *(k + 1 for k in self.plan.ks)})
        return attention_times(self.model, widths,
                               (self.prompt, self.prompt + self.plan.generated), reference)

    def found(self, times: list[dict], reference: _Reference) -> Found:
        usual = {at: reference.usual() * statistics.median(t[at] for t in times) for at in times[0]}
        return Found(self.name, self.row_bytes, self.prompt, self.machine, lines_through(usual))

    def setting(self, policy: str) -> Setting:
        """A policy as it comes, with the r that the arena takes where it leaves that open."""
        growth = parse(policy, touch=True)
        setting = Setting(self.name, growth, self.prompt, self.plan.generated)
        if not GROWTHS[growth.policy].spare:
            return setting
        with GrowingSession(self.model, growth, setting.cap) as session:
            return replace(setting, growth=session.growth)

    def settings(self, found: Found) -> Iterator[Setting]:
        """Growth by copies with padded attention over all r and drafts;
        at the middle prompt, policies as they come."""
        plan = self.plan
        for k in plan.ks:
            for accepted in plan.accepted if k else plan.accepted[:1]:
                base = Setting(self.name, Growth("max", touch=True, pad=True), self.prompt, plan.generated,
                               k, accepted)
                for r in sorted({*(r for r in plan.rows if r <= plan.generated), r_star(base, found)}):
                    yield replace(base, growth=Growth("copy", r, touch=True, pad=True),
                                  r_star=r == r_star(base, found))
                yield base
        if self.prompt == sorted(plan.prompts)[len(plan.prompts) // 2]:
            for name in plan.policies:
                yield self.setting(name)


def r_star(s: Setting, found: Found) -> int:
    return balance.best_r(found.machine, found.row_bytes, found.attention[s.width][1],
                          s.prompt + s.generated / 2, s.width, s.tau)


def combined(results: list[Result]) -> Result:
    """Of several runs of a setting the median of every time."""
    names = [f.name for f in fields(Result) if f.name.endswith("_ms")]
    return replace(results[0],
                   **{name: statistics.median(getattr(r, name) for r in results) for name in names})


def predicted(result: Result, found: Found) -> Result:
    s, machine = result.setting, found.machine
    cost = balance.predict(s.growth, machine, found.row_bytes, found.attention[s.width], s.prompt,
                           s.generated, s.cap, s.width, s.tau)
    if s.growth.policy == "max-lazy":       # the noise has touched its pages: what they cost elsewhere
        touched = machine.touch_huge * found.row_bytes * (s.prompt + s.generated) / s.generated
        cost, result = replace(cost, touch=touched), replace(result, touch_ms=1e3 * touched)
    return replace(result, predicted=cost)


# ---- stalls ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stall:
    """A pass that waits for a growth of a chunk, at a length:
    milliseconds, the median and the worst of a few, and of passes that do not wait."""

    shape: str
    rows: int
    growth_ms: float
    worst_ms: float
    pass_ms: float

    def line(self) -> dict:
        return {"test": "stall"} | asdict(self)


def stalls(model, lengths: Sequence[int] = LENGTHS, tries: int = 5) -> Iterator[Stall]:
    """For each length that fits the memory: the chunks that come next, and passes between them."""
    name = model.shape.name if hasattr(model, "shape") else Path(model.path).stem
    lengths = [n for n in lengths if n * model.config.kv_row_bytes <= MOST_BYTES]
    with GrowingSession(model, Growth(), max(lengths) + ROWS_BEYOND) as session:
        run = _Run(session, Setting(name, Growth(), 1, 0))
        for n in lengths:
            run.go_to(n, 0)
            growing, others = [], []
            for _ in range(tries):
                run.go_to(session.rows, 0)
                before = session.rows
                growing.append(run.evaluate()["wall"])
                assert session.rows > before
                others += [run.evaluate()["wall"] for _ in range(REPS)]
            yield Stall(name, n, 1e3 * statistics.median(growing), 1e3 * max(growing),
                        1e3 * statistics.median(others))
