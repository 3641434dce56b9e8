"""python -m tools.train_demo: text in, two GGUF files and their card out.
Run again to go on where it stopped."""

import argparse
import dataclasses
import os
from pathlib import Path

# Threads that spin at a barrier keep the scheduler from moving the one they wait for: on a shared machine
# waiting asleep is twice as fast.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from . import stages
from .recipe import RECIPES

ROOT = Path(__file__).resolve().parents[2]


def parse(argv=None):
    p = argparse.ArgumentParser(prog="tools.train_demo", description=__doc__)
    p.add_argument("--corpus", type=Path, help="the text, plain or .xz, books parted by lines <|book|>")
    p.add_argument("--heldout", type=Path, help="text of the same kind that is never trained on")
    p.add_argument("--work", type=Path, default=Path("train_demo_work"),
                   help="checkpoints and rows (%(default)s)")
    p.add_argument("--out", type=Path, default=ROOT / "pybmc" / "demo",
                   help="where the models and the card go")
    p.add_argument("--stage", choices=[*stages.STAGES, "all"], default="all")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="where to train (%(default)s)")
    p.add_argument("--from", type=Path, dest="start", metavar="DIR",
                   help="go on from the pair in this folder; give another --seed than it had")
    p.add_argument("--seed", type=int, help="of data and weights (the recipe's: 7)")
    p.add_argument("--target-seconds", type=float, help="training time of the target")
    p.add_argument("--more-seconds", type=float, help="time of its second climb and descent; 0: none")
    p.add_argument("--smoke", action="store_true",
                   help="all stages at toy size, in two minutes; without a corpus it makes a text of its own")
    args = p.parse_args(argv)
    if not args.smoke and not (args.corpus and args.heldout):
        p.error("--corpus and --heldout are needed, but for --smoke")
    lacking = [name for name in stages.PAIR if not (args.start / name).is_file()] if args.start else []
    if lacking:
        p.error(f"--from {args.start}: expected a pair that an earlier run left; it lacks "
                f"{', '.join(lacking)}")
    return args


def recipe_of(args):
    recipe = RECIPES["smoke" if args.smoke else "full"]
    for run, seconds in (("target_run", args.target_seconds), ("more_run", args.more_seconds)):
        if seconds is not None:
            recipe = dataclasses.replace(recipe,
                                         **{run: dataclasses.replace(getattr(recipe, run), seconds=seconds)})
    return recipe if args.seed is None else dataclasses.replace(recipe, seed=args.seed)


def main(argv=None):
    args = parse(argv)
    torch.set_num_threads(args.threads)
    if args.device != "cpu":    # even the same device, set, breaks compiled graphs at every tensor made anew
        torch.set_default_device(args.device)
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    job = stages.Job(recipe_of(args), args.corpus, args.heldout, args.work, args.out, args.start)
    for name in stages.STAGES if args.stage == "all" else [args.stage]:
        stages.STAGES[name](job)


if __name__ == "__main__":
    main()
