"""What a GPU computes, compared with the CPU bit by bit, and how fast: one command, a line for each result,
JSON in a folder.

    make CUDA=1                                 the library, and the kernels by nvcc or its wheels
    python -m tools.gpu_check --out DIR [--gpu N] [--parts bits,golden,..] [--models DIR]
    python -m tools.gpu_check --out DIR --toy   the same parts at the sizes of the tests, for a slow machine

Each part is a process of its own with a limit in seconds, and one that fails, hangs or ends the driver's
context leaves the others alone. Exceptions: after other bits than the CPU's the rates are left out (exit code
3) unless --go-on is given. The exit code is 1 if a part failed. DIR/gpu_check.jsonl gets each result at once,
DIR/gpu_check.json all of them at the end. Nothing is downloaded: models are made here, of random weights, and
kept in --models for another run. All parts together take less than eight minutes.

On a rented machine without access to PyPI: copy the checkout, pybmc/libpybmc.so, pybmc/kernels.fatbin (run
make CUDA=1 before), and a folder of wheels for the packages that its Python does not have (of numpy, cffi,
gguf, tokenizers, sentencepiece),

    pip download --only-binary :all: --no-deps --python-version 3.12 -d build/wheels cffi pycparser gguf

and make two calls, so that a failure of the first can be mended before the second:

    pip install --no-index --find-links build/wheels --no-deps cffi pycparser gguf &&
    python -m tools.gpu_check --out DIR --models /tmp/models --parts bits,golden,models,launches
    python -m tools.gpu_check --out DIR --models /tmp/models \\
        --parts rates_8b,prompts,rates_1b,growth,speculation,roofs,transformers,rates_few

The first takes 190 s at most, the second 290. PyTorch and transformers are used where they are installed."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import pybmc
from pybmc.engine.gpu import GPU, count, describe

from .gpu_parts import EQUALITY, PARTS, TOY, Check, DiffersError, Sizes, run_part

DIFFERS = 3                             # exit code
ROOT = Path(__file__).resolve().parents[1]


def line_of(result: dict) -> str:
    """A result as it is printed."""
    values = ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                       for key, value in result.items() if key not in ("part", "name"))
    return f"{result['part']:14}{result['name']:40}{values}"


@dataclass
class Report:
    """What was found, which is printed and kept at once."""

    out: Path
    results: list[dict] = field(default_factory=list)

    def tell(self, result: dict) -> None:
        self.results.append(result)
        print(line_of(result), flush=True)
        with open(self.out / "gpu_check.jsonl", "a") as file:
            file.write(json.dumps(result) + "\n")

    def end(self, gpu: GPU, code: int) -> None:
        (self.out / "gpu_check.json").write_text(
            json.dumps({"gpu": vars(gpu), "exit_code": code, "results": self.results}, indent=1) + "\n")


def child(options: argparse.Namespace) -> int:
    """A part, in the process that is there for it: its results as lines of JSON."""
    def told(result: dict) -> None:
        print(json.dumps(result), flush=True)

    try:
        check = Check(describe(options.gpu), TOY if options.toy else Sizes(), options.models, told)
        run_part(check, options.only)
    except DiffersError as error:
        told({"part": options.only, "name": "OTHER BITS", "why": str(error)})
        return DIFFERS
    except Exception as error:              # of whatever kind: the other parts go on
        told({"part": options.only, "name": "failed", "why": f"{type(error).__name__}: {error}",
              "where": traceback.format_exc(limit=-3) if not isinstance(error, pybmc.BmcError) else ""})
        return 1
    return 0


def run(report: Report, name: str, command: list[str], seconds: float) -> int:
    """A part; its exit code. What it says that is no result is shown, and told if it ends badly."""
    began, said = time.perf_counter(), []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
                               errors="replace")
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    assert process.stdout
    for line in process.stdout:
        try:
            report.tell(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError):
            said.append(line.rstrip())
            print(line, end="", flush=True)
    code = process.wait()
    late = not timer.is_alive()
    timer.cancel()
    if late:
        report.tell({"part": name, "name": "not done", "why": f"its {seconds:g} seconds are over"})
    elif code not in (0, 1, DIFFERS):
        why = f"the process ended with {code}"
        report.tell({"part": name, "name": "failed", "why": why, "said": said[-20:]})
    report.tell({"part": name, "name": "took", "seconds": time.perf_counter() - began})
    return 1 if late else code


def run_all(report: Report, options: argparse.Namespace, models: Path) -> int:
    """All parts; the exit code."""
    codes: dict[str, int] = {}
    for name in options.parts.split(","):
        if DIFFERS in codes.values() and name not in EQUALITY and not options.go_on:
            report.tell({"part": name, "name": "left out", "why": "the bits differ"})
            continue
        command = [sys.executable, "-m", "tools.gpu_check", "--only", name, "--out", str(options.out),
                   "--models", str(models), "--gpu", str(options.gpu)]
        codes[name] = run(report, name, command + ["--toy"] * options.toy, options.limit or PARTS[name][1])
    return DIFFERS if DIFFERS in codes.values() else int(any(codes.values()))


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where gpu_check.json goes")
    parser.add_argument("--gpu", type=int, default=0, metavar="N", help="which GPU")
    parser.add_argument("--parts", default=",".join(PARTS), metavar="LIST",
                        help=f"of {', '.join(PARTS)}; in this order by default")
    parser.add_argument("--models", type=Path, metavar="DIR",
                        help="where model files are made and kept; by default they go with the check")
    parser.add_argument("--limit", type=float, metavar="SECONDS",
                        help="of each part, in the place of its own")
    parser.add_argument("--toy", action="store_true", help="small models, to try the check itself")
    parser.add_argument("--go-on", action="store_true", help="measure rates although bits differ")
    parser.add_argument("--only", choices=PARTS, help=argparse.SUPPRESS)    # a part, in a process of its own
    options = parser.parse_args(arguments)
    if wrong := [name for name in options.parts.split(",") if name not in PARTS]:
        parser.error(f"--parts: expected some of {', '.join(PARTS)}, found {wrong[0]}")
    if options.limit is not None and not options.limit > 0:
        parser.error(f"--limit: expected more than 0 seconds, found {options.limit:g}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    if options.only:
        return child(options)
    try:
        number = count()
        if options.gpu not in range(number):
            raise pybmc.DeviceError(f"GPU: expected 0 to {number - 1}, found {options.gpu}")
        gpu = describe(options.gpu)
    except pybmc.DeviceError as error:
        print(error, file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(options.out)
    report.tell({"part": "gpu", "name": gpu.name, "memory_GB": gpu.memory / 1e9, "capability": gpu.capability,
                 "cores": os.cpu_count()})
    with tempfile.TemporaryDirectory() as temporary:
        models = options.models or Path(temporary)
        models.mkdir(parents=True, exist_ok=True)
        code = run_all(report, options, models)
    report.end(gpu, code)
    return code


if __name__ == "__main__":
    sys.exit(main())
