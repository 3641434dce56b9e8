"""Logits next to exact ones and next to llama.cpp's, for every model of a folder.

    python -m tools.golden [DIR] [--json]        DIR: tests/golden of the repository

A pair NAME.gguf and NAME.npz gives a row. The npz holds tokens, ref (float32 logits of the dequantized
weights), llamacpp (llama.cpp's own logits), greedy_prompt, greedy_tokens, greedy_gap (the run that ref
continues with), n_ctx (the context) and, where there are experts, route_gap (how clear each token's choice of
experts is, in routing logits). Three bounds, exit code 3 where one does not hold:

  error    the rms of (ours - ref) is at most 1.1 times llama.cpp's plus 1e-3 of the spread of ref
  top-1    where ref's best leads by a clear gap and llama.cpp finds it, so do we
  greedy   each token of the greedy run with a clear gap is our best one too

A gap is clear from 6 times llama.cpp's rms up: two logits that are each off by that rms differ by 1.4 of it.
Positions whose experts are nearly a tie are left out of the first two bounds: another choice is no error
there, and logits jump. Nearly a tie is a gap up to 2 times llama.cpp's usual error, the median over
positions, which its own jumps leave as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import pybmc

from .distance import rms

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "golden"
CLEAR = 6.0         # in rms of llama.cpp's error
TIE = 2.0           # in its median over positions


@dataclass(frozen=True)
class Row:
    """One file. compared: how many positions; rms, max: our error there; limit: the most rms may be;
    top1, greedy: how many of the clear ones agree."""

    file: str
    compared: int
    rms: float
    max: float
    llamacpp_rms: float
    ratio: float
    limit: float
    top1: int
    top1_clear: int
    greedy: int
    greedy_clear: int

    @property
    def holds(self) -> bool:
        return self.rms <= self.limit and self.top1 == self.top1_clear and self.greedy == self.greedy_clear


def lead(logits: np.ndarray) -> np.ndarray:
    """By how much the best of each row leads."""
    best = np.partition(logits, -2, axis=-1)[..., -2:]
    return best[..., 1] - best[..., 0]


def evaluate(path: Path, golden: dict) -> tuple[np.ndarray, np.ndarray]:
    """Our logits of the tokens (n, vocab), and our best token at each step of the greedy run (m,)."""
    with pybmc.Model(path) as model:
        context = int(golden["n_ctx"])
        if model.config.arch == "gpt2":                 # learned positions end where the model says
            context = min(context, model.config.n_ctx)
        with model.session(context=context) as session:
            logits = session.eval(golden["tokens"], logits="all")
        prompt, run = golden["greedy_prompt"], golden["greedy_tokens"]
        with model.session(context=context) as session:
            best = session.eval(np.concatenate([prompt, run[:-1]]), logits="argmax")[len(prompt) - 1:]
    return logits, best


def routed(golden: dict) -> np.ndarray:
    """(n,) bool: positions where the choice of experts is clear."""
    if "route_gap" not in golden:
        return np.ones(len(golden["tokens"]), bool)
    usual = np.median([rms(row) for row in golden["llamacpp"] - golden["ref"]])
    return golden["route_gap"] > TIE * usual


def compare(path: Path) -> Row:
    """The row of one model; its npz lies beside it."""
    with np.load(path.with_suffix(".npz")) as file:
        golden = dict(file)
    ours, best = evaluate(path, golden)
    keep = routed(golden)
    ours, ref, theirs = ours[keep], golden["ref"][keep], golden["llamacpp"][keep]
    their_rms = rms(theirs - ref)
    clear = (lead(ref) > CLEAR * their_rms) & (theirs.argmax(-1) == ref.argmax(-1))
    clear_steps = golden["greedy_gap"] > CLEAR * their_rms
    return Row(
        file=path.stem, compared=len(ref), rms=rms(ours - ref),
        max=float(np.abs(ours - ref).max()), llamacpp_rms=their_rms, ratio=rms(ours - ref) / their_rms,
        limit=1.1 * their_rms + 1e-3 * float(ref.std()),
        top1=int((ours.argmax(-1) == ref.argmax(-1))[clear].sum()), top1_clear=int(clear.sum()),
        greedy=int((best == golden["greedy_tokens"])[clear_steps].sum()), greedy_clear=int(clear_steps.sum()),
    )


def models(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.gguf") if path.with_suffix(".npz").is_file())


def table(rows: list[Row]) -> str:
    lines = ["| File | positions | our rms | llama.cpp's | ratio | top-1 where clear | greedy where clear | "
             "verdict |",
             "|---|---|---|---|---|---|---|---|"]
    lines += [f"| {row.file} | {row.compared} | {row.rms:.2e} | {row.llamacpp_rms:.2e} | {row.ratio:.2f} | "
              f"{row.top1} of {row.top1_clear} | {row.greedy} of {row.greedy_clear} | "
              f"{'holds' if row.holds else 'FAILS'} |" for row in rows]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, metavar="DIR")
    parser.add_argument("--json", action="store_true", help="one object a line")
    args = parser.parse_args()
    paths = models(args.folder)
    if not paths:
        print(f"{args.folder}: there are no pairs of .gguf and .npz", file=sys.stderr)
        return 1
    rows = [compare(path) for path in paths]
    lines = [json.dumps(asdict(row) | {"holds": row.holds}) for row in rows] if args.json else [table(rows)]
    print("\n".join(lines))
    return 0 if all(row.holds for row in rows) else 3


if __name__ == "__main__":
    sys.exit(main())
