"""Measure what a KV cache costs by the way it grows, beside a prediction, and draw it:
the study of docs/bmc.md.

    python -m tools.kvbench [MODEL] [--quick | --full] [--json]      a MODEL of yours instead of the shapes
    python -m tools.kvbench --from kv.jsonl --figures docs           needs matplotlib
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np

from pybmc import Model
from pybmc.cli.options import Counts
from pybmc.cli.terminal import progress
from pybmc.errors import ArgumentError, BmcError, FormatError

from . import kv_study
from .figures import draw
from .kv_study import Plan, Result, Stall

# ---- what it says ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """A U-curve: the best r measured and predicted, what taking the predicted one costs,
    how far off the curve is.

    The best r is where the curve a + b / r + c r through the measured times is lowest, and times at r* are
    that curve's: near its floor a factor 2 in r moves it by less than single points are off, and the best of
    them would be an accident. Where the points do not bend so, it is the best of them all the same.
    """

    shape: str
    prompt: int
    k: int
    accepted: float
    best_r: int                         # measured; 0: everything at once
    r_star: int
    time_at_r_star: float               # over the best time measured
    point_at_r_star: float              # the same of single points
    error: float                        # of the predicted curve, the median over r
    worst_error: float
    over_each_token: float              # how many times faster than growing each token
    over_at_once: float                 # .. than everything at once

    @property
    def holds(self) -> bool:
        """Within a factor 2 and 5%."""
        near = self.best_r and 0.5 <= self.r_star / self.best_r <= 2
        return bool(near) and self.time_at_r_star <= 1.05


def verdicts(results: Sequence[Result]) -> list[Verdict]:
    curves: dict[tuple, list[Result]] = {}
    for result in results:
        s = result.setting
        if s.growth.pad:
            curves.setdefault((s.shape, s.prompt, s.k, s.accepted), []).append(result)
    return [_verdict(curve) for curve in curves.values()]


def _verdict(curve: list[Result]) -> Verdict:
    """What a pass does besides attention does not depend on r: its median over the curve is added to all."""
    rest = statistics.median(result.rest_ms for result in curve)

    def ms(result: Result) -> float:
        return result.cache_ms + rest

    s, best = curve[0].setting, min(curve, key=ms)
    copies = [result for result in curve if result.setting.growth.policy == "copy"]
    star = next(result for result in curve if result.setting.r_star)
    at_once = next(result for result in curve if result.setting.growth.policy == "max")
    each = next((result for result in curve if result.setting.growth.r == 1), at_once)
    errors = [abs(result.predicted_ms - result.cache_ms) / ms(result) for result in curve]
    best_r, star_r, point = best.setting.growth.r, star.setting.growth.r, ms(star) / ms(best)
    bend, at_star = floor_of([result.setting.growth.r for result in copies],
                             [ms(result) for result in copies], star_r)
    if bend and best is not at_once:
        best_r, ratio = bend, at_star
    else:
        ratio = point
    return Verdict(s.shape, s.prompt, s.k, s.accepted, best_r, star_r, ratio, point,
                   statistics.median(errors), max(errors), ms(each) / ms(star), ms(at_once) / ms(star))


def floor_of(rows: Sequence[int], times: Sequence[float], r: int) -> tuple[int, float]:
    """Where t = a + b / r + c r through the times is lowest, within the rows measured,
    and t(r) over t there; points weigh by their relative error. (0, 1.0) for points that do not bend so."""
    if len(set(rows)) < 4:
        return 0, 1.0

    def terms(rows):
        rows = np.asarray(rows, float)
        return np.stack([np.ones_like(rows), 1 / rows, rows], -1)

    times = np.asarray(times)
    found = np.linalg.lstsq(terms(rows) / times[:, None], np.ones(len(times)), rcond=None)[0]
    if found[1] <= 0 or found[2] <= 0:
        return 0, 1.0
    best = min(max(np.sqrt(found[1] / found[2]), min(rows)), max(rows))
    at_r, at_best = terms([r, best]) @ found
    return round(best), float(at_r / at_best)


def sentences(results: Sequence) -> list[str]:
    """What the numbers say, a line for each curve and length."""
    found = verdicts([r for r in results if isinstance(r, Result)])
    lines = [sentence(v) for v in found]
    if found:
        near = sum(v.holds for v in found)
        lines.append(f"{near} of {len(found)}: "
                     "r* within a factor 2 of the best r measured, its time within 5% of the best; "
                     f"curves predicted within {statistics.median(v.error for v in found):.0%} (median), "
                     f"{max(v.worst_error for v in found):.0%} (worst point).")
    return lines + [f"{s.shape}, chunks at {s.rows} rows: a pass takes {s.pass_ms:.2f} ms, with a growth "
                    f"{s.growth_ms:.2f} (worst {s.worst_ms:.2f})." for s in results if isinstance(s, Stall)]


def sentence(v: Verdict) -> str:
    drafts = f", {v.k} drafted ({v.accepted:.0%} accepted)" if v.k else ""
    best = f"r = {v.best_r}" if v.best_r else "everything at once"
    return (f"{v.shape}, prompt {v.prompt}{drafts}: best {best}, r* = {v.r_star} "
            f"takes {v.time_at_r_star:.2f} of its time ({v.point_at_r_star:.2f} by single points), "
            f"is {v.over_each_token:.2f} times faster than growing each token and {v.over_at_once:.2f} than "
            f"everything at once; curve predicted within {v.error:.0%}.")


HEADER = ("shape", "rows", "pad", "prompt", "k", "allocate", "copy", "touch", "attention", "rest", "total",
          "predicted", "worst", "MB")


def cells(r: Result) -> tuple[str, ...]:
    s = r.setting
    times = (r.allocate_ms, r.copy_ms, r.touch_ms, r.attention_ms, r.rest_ms, r.total_ms,
             r.predicted_ms + r.rest_ms, r.worst_ms)
    return (s.shape, str(s.growth) + "*" * s.r_star, "pad" * s.growth.pad, str(s.prompt), str(s.k),
            *(f"{t:.3g}" for t in times), f"{r.peak_mb:.0f}")


# ---- the command -------------------------------------------------------------------------------------------


@click.command()
@click.argument("model", required=False, type=click.Path(exists=True, dir_okay=False))
@click.option("--shapes", default="1b-gqa,gpt2-medium,7b-mha", show_default=True, metavar="NAME,..",
              help="Models whose attention is measured, with random values; a MODEL is measured instead.")
@click.option("-p", "--n-prompt", "prompts", type=Counts(), help="Prompt lengths.  [default: 1024]")
@click.option("-n", "--n-gen", "generated", type=click.IntRange(16),
              help="Tokens after each.  [default: 1024]")
@click.option("--rows", type=Counts(), help="Rows added at a time.  [default: 1,16,32,..,1024]")
@click.option("-k", "--drafted", "ks", type=Counts(), help="Drafted tokens in a pass.  [default: 0,7]")
@click.option("--accepted", type=click.FloatRange(0, 0.99), default=0.7, show_default=True,
              help="Chance that a drafted token is accepted.")
@click.option("-r", "--reps", type=click.IntRange(1), metavar="N", help="Rounds.  [default: 3]")
@click.option("--quick", "size", flag_value="QUICK", help="One shape, few settings, 256 tokens: 15 seconds.")
@click.option("--full", "size", flag_value="FULL", help="Prompts 128 to 4096, 0 to 15 drafted: half an hour.")
@click.option("--every-token", "whole", is_flag=True, help="Evaluate every token instead of a sample; slow.")
@click.option("--figures", type=click.Path(file_okay=False), metavar="DIR",
              help="Draw SVGs there (needs matplotlib).")
@click.option("--from", "source", type=click.Path(exists=True, dir_okay=False), metavar="FILE",
              help="Draw what an earlier --json printed, and measure nothing.")
@click.option("-t", "--threads", type=click.IntRange(1, 512), metavar="N",
              help="Threads; default: the usable cores.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line on stdout.")
def main(model, shapes, prompts, generated, rows, ks, accepted, reps, size, whole, figures, source,
         threads, as_json):
    """Measure what the growth of a KV cache costs: copies, first touch, unused rows, memory; and predict it.

    About two minutes a shape, on a machine that does nothing else.
    """
    given = {"prompts": prompts, "generated": generated, "rows": rows, "ks": ks, "reps": reps, "whole": whole,
             "accepted": (accepted,)} | ({"shapes": shapes.split(",")} if size != "QUICK" else {})
    plan = replace(getattr(kv_study, size) if size else Plan(),
                   **{name: value for name, value in given.items() if value is not None})
    try:
        if source:
            draw_figures(kept_lines(Path(source)), figures or ".")
            return
        results = measure(plan, threads, model, print_line if as_json else lambda result: None)
        if not as_json:
            print_report(results)
        if figures:
            draw_figures([result.line() for result in results], figures)
    except ArgumentError as error:
        raise click.UsageError(str(error)) from None
    except BmcError as error:
        raise click.ClickException(str(error)) from None


def measure(plan: Plan, threads: int | None, path: str | None, say) -> list:
    """All results, each told when it is there."""
    results = []
    with ExitStack() as stack:
        model = stack.enter_context(Model(path, threads)) if path else None
        update = stack.enter_context(progress("measuring"))
        for result in kv_study.bench_kv(plan, threads, model, update):
            results.append(result)
            say(result)
    return results


def print_line(result) -> None:
    print(json.dumps(result.line()), flush=True)


def print_report(results: Sequence) -> None:
    for row in [HEADER, *(cells(r) for r in results if isinstance(r, Result))]:
        print("".join(f"{cell:>{16 if i < 2 else 10}}" for i, cell in enumerate(row)))
    print("\n" + "\n".join(sentences(results)))


def kept_lines(path: Path) -> list[dict]:
    """What an earlier --json printed."""
    lines = []
    for number, text in enumerate(path.read_text("utf-8-sig", errors="replace").splitlines(), 1):
        try:
            lines.append(json.loads(text))
        except ValueError:
            lines.append(None)
        if not isinstance(lines[-1], dict) or "test" not in lines[-1]:
            raise FormatError(f"{path}: line {number}: expected what tools.kvbench --json prints, found "
                              f"{text[:40]!r}")
    if not any(line["test"] == "kv" for line in lines):
        raise FormatError(f"{path}: expected what tools.kvbench --json prints, found no measurement in "
                          f"{len(lines)} lines")
    return lines


def draw_figures(lines: list[dict], folder) -> None:
    for path in draw(lines, folder):
        print(f"drawn: {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
