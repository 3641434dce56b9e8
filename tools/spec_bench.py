"""What speculative decoding brings: paired, interleaved runs of plain and drafted decoding.

    python tools/spec_bench.py                                    the bundled pair
    python tools/spec_bench.py --pairs DIR                        and a 1B model with drafts that agree to a set degree
    python tools/spec_bench.py --pairs DIR --model tiny --quick   does it run at all

A run decodes each request plain and drafted, one right after the other, in an order that alternates, again and again
until each way has had a second; its gain is the quotient of their tokens a second. Reported are medians over the runs,
with the 95% confidence interval that order statistics give. What was learned of costs and of a pair is kept from run to run,
as it is for users; the draft of random weights is met for the first time in each. The controller's rate beside that of the best fixed
length is measured once more after that length was found. Drafted text is checked against the plain one, token by token.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from math import comb
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pybmc  # noqa: E402
from pybmc.controller import FixedLength  # noqa: E402
from pybmc.decode import Choice, Chooser, Stats, alone, eval_prompt, generate, start_loop, timed  # noqa: E402
from pybmc.drafters import Draft, ModelDrafter  # noqa: E402
from pybmc.sampling import Sampler  # noqa: E402
from pybmc.speculate import Speculation  # noqa: E402

REQUESTS = [f"{ask} {who}." for ask in ("Tell me a story about", "Write a short tale of", "What happened to",
                                        "Tell me what became of")
            for who in ("a fox and a well", "the old clockmaker", "two sisters at sea", "a king who could not sleep",
                        "the last lamp in the street")]
FEW = 6                                 # requests to a pair that is not the bundled one
LENGTHS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16)          # of the sweep
LEAST = 1.0                             # seconds of each way in a run: a machine that stumbles does so in both
CURVE = "curve"
SHARES = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)    # of the curve of gain against acceptance


@dataclass(frozen=True)
class Request:
    """What to decode. script: the tokens of the answer, whatever the model says; its passes take their time all the same."""

    prompt: list[int]
    n: int
    settings: dict
    script: list[int] | None = None


@dataclass(frozen=True)
class Case:
    """Requests to one model, and how to draft for one of them."""

    name: str
    aim: str
    model: pybmc.Model
    requests: list[Request]
    speculation: Callable[[Request], Speculation]


@dataclass
class Row:
    """A line of the table: medians over runs, the gain with its confidence interval."""

    case: str
    aim: str
    plain_tok_s: float
    tok_s: float
    gain: float
    low: float
    high: float
    accepted: float
    mean_k: float
    runs: int
    best_k: int | None = None
    of_best: float | None = None        # the controller's rate over that of the best fixed length ..
    of_best_low: float | None = None    # .. and its interval
    of_best_high: float | None = None


# ---- decoding ----------------------------------------------------------------------------------------------


class Scripted(Chooser):
    """Chooses what a script says: an answer of known text at the model's real cost."""

    def __init__(self, answer: Sequence[int], start: int):
        super().__init__(Sampler())
        self.answer, self.start = answer, start

    def script(self, text) -> Sequence[int]:
        return self.answer[len(text) - self.start:]

    def choose(self, row, text) -> Choice:
        super().choose(row, text)
        return Choice(self.answer[len(text) - self.start], 0.0)


def decode(model, request: Request, speculation=None) -> tuple[list[int], Stats]:
    """The answer's tokens, and Stats."""
    if request.script is None:
        stream = generate(model, request.prompt, request.n, draft=speculation, **request.settings)
        return [token.id for token in stream], stream.stats
    stats, chooser = Stats(), Scripted(request.script, len(request.prompt))
    with model.session() as session:
        logits = eval_prompt(session, request.prompt)
        if speculation:
            speculation.follow(request.prompt, chooser.kind)
        choices = timed(alone(start_loop(session, request.prompt, logits, chooser, speculation, request.n, stats),
                              session), stats)
        ids = [next(choices).id for _ in range(request.n)]
        choices.close()
    return ids, stats


def together(found: list[Stats]) -> Stats:
    """The sum of what several requests took."""
    whole = Stats()
    for stats in found:
        whole.predicted_tokens += stats.predicted_tokens - 1
        for name in ("predicted_s", "draft_n", "draft_n_accepted", "rounds"):
            setattr(whole, name, getattr(whole, name) + getattr(stats, name))
    whole.predicted_tokens += 1
    return whole


def measure(case: Case, i: int, make: Callable[[Request], Speculation] | None, expected=None) -> tuple[list[int], Stats]:
    """Decode a request of a case. expected: the plain answers, which a drafted one has to be."""
    request = case.requests[i]
    speculation = make(request) if make else None
    ids, stats = decode(case.model, request, speculation)
    if speculation:
        speculation.kept = False
        speculation.release()
    if expected is not None and ids != expected[i]:
        raise SystemExit(f"{case.name}: the drafted answer to request {i} is not the plain one")
    return ids, stats


def in_turn(case: Case, ways: Sequence, expected, least: float, run: int) -> list[Stats]:
    """For each way to draft (None: plain) what all requests took together, each way's time being `least` at least. Who goes
    first changes with the request, with its repetition, and with the run."""
    found, turn = [[] for _ in ways], run
    while not found[0] or min(sum(stats.predicted_s for stats in way) for way in found) < least:
        for i in range(len(case.requests)):
            for k in sorted(range(len(ways)), reverse=(turn + i) % 2 == 1):
                found[k].append(measure(case, i, ways[k], expected)[1])
        turn += 1
    return [together(way) for way in found]


# ---- runs --------------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95% confidence interval of the median: the widest order statistics that binomial chances allow to be dropped."""
    values, n = sorted(values), len(values)
    dropped, chance = 0, 0.0
    while dropped < n // 2 and (chance := chance + comb(n, dropped) / 2 ** n) <= 0.025:
        dropped += 1
    at = max(dropped - 1, 0)
    return values[at], values[n - 1 - at]


def compare(case: Case, runs: int, least: float) -> Row:
    """Plain and drafted in turn; each request once before, to warm up."""
    expected = [measure(case, i, None)[0] for i in range(len(case.requests))]
    for i in range(len(case.requests)):
        measure(case, i, case.speculation, expected)
    plain, drafted = zip(*(in_turn(case, (None, case.speculation), expected, least, run) for run in range(runs)))
    gains = [d.predicted_tok_s / p.predicted_tok_s for p, d in zip(plain, drafted)]
    low, high = interval(gains)
    return Row(case.name, case.aim, statistics.median(p.predicted_tok_s for p in plain),
               statistics.median(d.predicted_tok_s for d in drafted), statistics.median(gains), low, high,
               statistics.median(d.accepted_share for d in drafted), statistics.median(d.mean_k for d in drafted), runs)


def batched(case: Case, draft, runs: int, parallel: int = 8) -> Row:
    """Requests together through generate_batch, against one at a time without drafts: tokens of all a second."""
    prompts, n, settings = [r.prompt for r in case.requests], case.requests[0].n, case.requests[0].settings

    def one_by_one():
        return [[t.id for t in generate(case.model, prompt, n, **settings)] for prompt in prompts]

    def at_once():
        answers = [[] for _ in prompts]
        for i, token in pybmc.generate_batch(case.model, prompts, n, draft=draft, parallel=parallel, **settings):
            answers[i].append(token.id)
        return answers

    expected, gains, rates = one_by_one(), [], ([], [])
    total = sum(map(len, expected))
    if at_once() != expected:
        raise SystemExit(f"{case.name}: together, the answers are others")
    for run in range(runs):
        seconds = {}
        for work in (one_by_one, at_once) if run % 2 else (at_once, one_by_one):
            started = time.perf_counter()
            work()
            seconds[work] = time.perf_counter() - started
        gains.append(seconds[one_by_one] / seconds[at_once])
        for kept, work in zip(rates, (one_by_one, at_once)):
            kept.append(total / seconds[work])
    return Row(case.name, case.aim, *map(statistics.median, rates), statistics.median(gains), *interval(gains), 0.0, 0.0, runs)


def fixed(case: Case, k: int) -> Callable[[Request], Speculation] | None:
    """A way to draft: always k tokens."""

    def make(request: Request) -> Speculation:
        made = case.speculation(request)
        made._fixed = FixedLength(k)
        return made

    return make if k else None


def sweep(case: Case, runs: int, least: float) -> int:
    """The best fixed length, by medians of interleaved runs."""
    rates = [[stats.predicted_tok_s for stats in in_turn(case, [fixed(case, k) for k in LENGTHS], None, least, run)]
             for run in range(runs)]
    medians = [statistics.median(of_one) for of_one in zip(*rates)]
    return LENGTHS[medians.index(max(medians))]


def beside(case: Case, k: int, runs: int, least: float) -> list[float]:
    """The controller's rate over that of k tokens a round, run by run. Measured after k was chosen: the best of many that were measured
    is one that was also lucky."""
    pairs = (in_turn(case, (fixed(case, k), case.speculation), None, least, run) for run in range(runs))
    return [controlled.predicted_tok_s / best.predicted_tok_s for best, controlled in pairs]


# ---- drafters that are forced ------------------------------------------------------------------------------


class Forced(ModelDrafter):
    """Takes the draft model's time, and is right as often as it is told to be: share, place by place."""

    def __init__(self, model, target_size: int, script: Sequence[int], start: int, share: float, seed: int = 0):
        super().__init__(model, target_size)
        self.script, self.start, self.share, self.rng = script, start, share, random.Random(seed)

    def bulk(self, target) -> bool:
        return False

    def propose(self, text, k, p_min, sampler) -> Draft:
        draft = super().propose(text, k, 0.0, sampler)
        at = len(text) - self.start
        ids = [self.script[at + i] if self.rng.random() < self.share else (self.script[at + i] + 1) % self.size
               for i in range(min(len(draft.ids), len(self.script) - at))]
        return Draft(ids, [12] * len(ids))


def forced(model, draft, share: float, request: Request) -> Speculation:
    made = with_stranger(model, draft, request)
    made.drafter = Forced(draft, model.config.vocab_size, request.script, len(request.prompt), share)
    return made


def with_draft(model, draft, spec: str, request: Request) -> Speculation:
    return Speculation(model, draft, spec)


def with_stranger(model, draft, request: Request) -> Speculation:
    """With a draft of which nothing is known, however often it was met."""
    made = with_draft(model, draft, "draft", request)
    made._pair = lambda kind: None
    return made


# ---- cases -------------------------------------------------------------------------------------------------


def scripted(model, n: int, seed: int = 0) -> Request:
    """Any answer: the model's passes do not depend on it."""
    rng = random.Random(seed)
    ids = [rng.randrange(model.config.vocab_size) for _ in range(n + 64)]
    return Request(ids[:32], n, {}, ids[32:])


def copying(model, n: int, seed: int = 0) -> Request:
    """The stated copying task: a prompt of n random tokens, and an answer that repeats it, with a run of one to three
    tokens in twenty replaced, left out or put in, as an edit does."""
    rng = random.Random(seed)

    def token():
        return rng.randrange(model.config.vocab_size)

    source, answer, at = [token() for _ in range(n)], [], 0
    while len(answer) < n + 32:
        if rng.random() < 1 / 20:
            length = rng.randint(1, 3)
            answer += [token() for _ in range(length)] * (rng.random() < 2 / 3)
            at += length * (rng.random() < 2 / 3)
        answer.append(source[at % n])
        at += 1
    return Request(source, n, {}, answer)


def told(model, temperature: float, n: int, count: int) -> list[Request]:
    """Requests to the bundled model."""
    from pybmc.chat import ChatTemplate

    template = ChatTemplate(None, model.tokenizer)
    return [Request(template.encode([{"role": "user", "content": text}]), n, {"temperature": temperature, "seed": i})
            for i, text in enumerate(REQUESTS[:count])]


def noise(model, n: int, count: int, **settings) -> list[Request]:
    rng = random.Random(1)
    return [Request([rng.randrange(model.config.vocab_size) for _ in range(32)], n, settings | {"stop_tokens": ()})
            for _ in range(count)]


def bundled_cases(model, draft, ignorant, n: int, count: int) -> list[Case]:
    return [
        Case("bundled pair, greedy", ">= 1.6", model, told(model, 0.0, n, count), partial(with_draft, model, draft, "auto")),
        Case("bundled pair, temperature 0.8", ">= 1.6", model, told(model, 0.8, n, count),
             partial(with_draft, model, draft, "auto")),
        Case("bundled, random draft", ">= 0.97", model, told(model, 0.0, n, min(count, 2)),
             partial(with_stranger, model, ignorant)),
        Case("bundled, unpredictable text", ">= 0.97", model, noise(model, n, 2, temperature=3.0, top_k=0, top_p=1.0, min_p=0.0),
             partial(with_draft, model, draft, "auto")),
        Case("bundled, copying, n-grams", ">= 2.5", model, [copying(model, n)], partial(with_draft, model, None, "ngram")),
    ]


def pair_cases(name: str, model, draft, ignorant, aim: str, n: int, count: int) -> list[Case]:
    cases = [Case(name, aim, model, noise(model, n, count), partial(with_draft, model, draft, "draft"))]
    if "85" in name:
        cases += [Case("1B, random draft", ">= 0.97", model, noise(model, n, 1), partial(with_stranger, model, ignorant)),
                  Case("1B, copying, n-grams", ">= 2.5", model, [copying(model, n)], partial(with_draft, model, None, "ngram"))]
    return cases


def curve(model, draft, n: int, runs: int, least: float) -> list[dict]:
    """Gain against forced acceptance, measured, and what the cost model says of the best fixed length."""
    points = []
    for share in SHARES:
        case = Case(f"forced {share:.0%}", "", model, [scripted(model, n)], partial(forced, model, draft, share))
        row = compare(case, runs, least)
        made = forced(model, draft, share, case.requests[0])
        decode(model, case.requests[0], made)
        points.append({"share": share, "gain": row.gain, "low": row.low, "high": row.high,
                       "predicted": predicted(made, share)})
        made.close()
    return points


def predicted(made: Speculation, share: float) -> float:
    """max over k of tau(k) / (c(k + 1) + k d), by measured costs."""
    controller, source = made.controller("best"), made.source("draft", "best")
    rates = [controller.rate(sum(share ** i for i in range(k + 1)), k + 1, source.seconds.at(k) if k else 0.0) for k in range(17)]
    return max(rates) / rates[0]


# ---- output ------------------------------------------------------------------------------------------------

HEADER = "| case | aim | plain tok/s | drafted tok/s | gain (95% CI) | accepted | mean k | of the best fixed k (95% CI) |"


def line(r: Row) -> str:
    best = "" if r.best_k is None else f"{r.of_best:.2f} ({r.of_best_low:.2f}-{r.of_best_high:.2f}, k = {r.best_k})"
    return (f"| {r.case} | {r.aim} | {r.plain_tok_s:.1f} | {r.tok_s:.1f} | {r.gain:.2f} ({r.low:.2f}-{r.high:.2f}) | "
            f"{r.accepted:.0%} | {r.mean_k:.1f} | {best} |")


def svg(points: Sequence[dict]) -> str:
    """The curve as a picture: measured points with their intervals, the cost model as a line."""
    top = max(1.5, *(p["high"] for p in points), *(p["predicted"] for p in points)) * 1.05

    def place(share, gain):
        return f"{60 + 500 * share:.1f},{340 - 300 * gain / top:.1f}"

    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 390" font-family="sans-serif" font-size="13">',
             '<rect width="600" height="390" fill="white"/>', '<path d="M60 40V340H560" fill="none" stroke="black"/>',
             '<text x="310" y="380" text-anchor="middle">drafted tokens that come true</text>',
             '<text x="60" y="28">gain over plain decoding</text>']
    parts += [f'<text x="{60 + 500 * s:.0f}" y="358" text-anchor="middle">{s:.0%}</text>' for s in (0, .25, .5, .75, 1)]
    parts += [f'<text x="52" y="{344 - 300 * g / top:.0f}" text-anchor="end">{g}</text>' for g in range(int(top) + 1)]
    parts.append('<polyline fill="none" stroke="#888" points="' + " ".join(place(p["share"], p["predicted"]) for p in points)
                 + '"/>')
    for p in points:
        parts.append(f'<path d="M{place(p["share"], p["low"])}L{place(p["share"], p["high"])}" stroke="#06c"/>')
        x, y = place(p["share"], p["gain"]).split(",")
        parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="#06c"/>')
    return "\n".join([*parts, "</svg>\n"])


def pair_files(folder: Path, name: str, type_name: str, share: float) -> tuple[Path, Path]:
    """A pair's files, written if they are not there."""
    import synth

    path = folder / f"{name}-{type_name}-{round(100 * share)}.gguf"
    draft = path.with_name(f"{path.stem}-draft.gguf")
    if not path.is_file() or not draft.is_file():
        gain, found = synth.write_pair(path, draft, synth.MODELS[name], type_name, name, share)
        print(f"{path.name}: agreement {found:.1%}, gain of later layers {gain:.4f}", file=sys.stderr)
    return path, draft


@contextmanager
def of_random_weights(path: Path, threads: int | None):
    """A draft that knows nothing: one that does, with its weights in random order."""
    import synth

    with tempfile.TemporaryDirectory() as folder:
        synth.scramble(shutil.copyfile(path, Path(folder) / "random.gguf"))
        with pybmc.Model(Path(folder) / "random.gguf", threads=threads) as model:
            yield model


def all_cases(args):
    """(cases, whether the curve is asked for) of each pair of models, which are open while their cases run."""
    pairs = [("bundled", pybmc.demo_model(), pybmc.demo_model(draft=True))]
    for share in (0.85, 0.6) if args.pairs else ():
        args.pairs.mkdir(parents=True, exist_ok=True)
        pairs.append((f"1B, agreement {share:.0%}", *pair_files(args.pairs, args.model, args.type, share)))
    for name, path, draft_path in pairs:
        if args.only not in (None, CURVE) and args.only not in name:
            continue
        with pybmc.Model(path, threads=args.threads) as model, pybmc.Model(draft_path, threads=args.threads) as draft, \
                of_random_weights(draft_path, args.threads) as ignorant:
            if name == "bundled":
                yield bundled_cases(model, draft, ignorant, args.n, args.requests), model, draft, not args.pairs
            else:
                aim = ">= 2.2" if "85" in name else ">= 1.4"
                yield pair_cases(name, model, draft, ignorant, aim, args.n, min(args.requests, FEW)), model, draft, "85" in name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=Path, metavar="DIR", help="where pairs of set agreement are kept, or written")
    parser.add_argument("--model", default="llama-3.2-1b", help="their shape, as tools/synth.py names it")
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--only", metavar="TEXT", help="models whose name holds this: bundled, 85, 60; curve: the curve alone")
    parser.add_argument("--case", default="", metavar="TEXT", help="cases whose name holds this")
    parser.add_argument("-r", "--runs", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=LEAST, help="of each way in a run, at least")
    parser.add_argument("-n", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--requests", type=int, default=len(REQUESTS), help=f"to the bundled pair; to others, at most {FEW} of them")
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--sweep", type=int, default=3, metavar="RUNS", help="runs of each fixed length; 0: none")
    parser.add_argument("--curve", type=Path, metavar="SVG", help="also plot gain against acceptance")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every number")
    parser.add_argument("--quick", action="store_true", help="two short runs of everything, to see that it works")
    args = parser.parse_args()
    if args.quick:
        args.runs, args.n, args.requests, args.sweep, args.seconds = 2, 16, 1, min(args.sweep, 1), 0.0
    if args.only == CURVE and not args.curve:
        parser.error("--only curve: expected --curve SVG too")
    rows, points = [], []
    print(HEADER + "\n" + "|---" * (HEADER.count("|") - 1) + "|")
    for cases, model, draft, with_curve in all_cases(args):
        if args.curve and with_curve:
            points = curve(model, draft, args.n, args.runs, args.seconds)
            args.curve.write_text(svg(points))
        if args.only == CURVE:
            continue
        for case in (case for case in cases if args.case in case.name):
            row = compare(case, args.runs, args.seconds)
            if args.sweep:
                row.best_k = sweep(case, args.sweep, args.seconds)
                shares = beside(case, row.best_k, args.runs, args.seconds)
                row.of_best, (row.of_best_low, row.of_best_high) = statistics.median(shares), interval(shares)
            rows.append(row)
            print(line(row), flush=True)
        name = cases[0].name.split(",")[0] + ", 8 prompts together"
        if "60" not in cases[0].name and args.case in name:
            requests = told(model, 0.0, args.n, 8) if "bundled" in name else noise(model, args.n, 8)
            rows.append(batched(Case(name, ">= 3", model, requests, None), draft, args.runs))
            print(line(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"rows": [asdict(row) for row in rows], "curve": points}, indent=1) + "\n")


if __name__ == "__main__":
    main()
