"""What a GPU computes, compared with the CPU bit by bit, and how fast: one command, a line for each result, JSON in a folder.

    make CUDA=1                                         the kernels, where there is a compiler for them
    python -m tools.gpu_check --out DIR [--gpu N] [--parts bits,models,roofs,speed,prompts,transformers,growth]

Parts, each with a limit in seconds; a part that does not get done says how far it came. Other bits end the check (exit code 3), as do
failures of the GPU (1). Nothing is downloaded: models are made here, of random weights. PyTorch and transformers are used where they
are installed. Together below 9 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

import pybmc
from pybmc.engine.bench import bench
from pybmc.engine.gpu import CHUNK, GPU, PROMPTS, gpus
from pybmc.engine.prove import prove

from . import synth
from .synth import Shape

TYPES = tuple(synth.BLOCKS)
SMALL = Shape("llama", 512, 2, 8, 4, 1024, "tiny", 4096)
WIDTHS = (1, 2, 5, 8, 16, 17, 64, 512)
GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"


class Differs(Exception):
    """The GPU's bits are not the CPU's."""


class Check:
    """The GPU, the folder for results, and what was found so far."""

    def __init__(self, gpu: GPU, out: Path, models: Path):
        self.gpu, self.out, self.models = gpu, out, models
        self.results: list[dict] = []

    def tell(self, part: str, name: str, **values) -> None:
        self.results.append({"part": part, "name": name} | values)
        shown = ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items())
        print(f"{part:14}{name:34}{shown}", flush=True)

    def model(self, name: str, shape: Shape, file_type: str) -> Path:
        """A file of random weights, made once."""
        path = self.models / f"{name}.{file_type}.gguf"
        if not path.is_file():
            synth.write(path, shape, file_type, name)
        return path

    @contextmanager
    def opened(self, path: Path, layers: int | str = -1) -> Iterator[pybmc.Model]:
        """With layers on the GPU, where there have to be some."""
        with pybmc.Model(path, gpu=self.gpu.index, n_gpu_layers=layers) as model:
            if layers and not model.gpu_layers:
                raise pybmc.DeviceError(f"{path.name}: no layer runs on the GPU")
            yield model


def passes(model, widths, rows="auto") -> np.ndarray:
    """Logits of one pass of each width, one after the other."""
    rng = np.random.default_rng(0)
    size = model.config.vocab_size
    with model.session(rows=rows) as session:
        return np.concatenate([session.eval(rng.integers(0, size, n).astype(np.int32), "all" if n <= 64 else "last").reshape(-1, size) for n in widths])


def compare(check: Check, part: str, path: Path, layers=(-1,), rows=("auto",)) -> None:
    """One model on both machines. Raises Differs."""
    with pybmc.Model(path) as model:
        right = passes(model, WIDTHS)
    for n in layers:
        with check.opened(path, n) as model:
            for r in rows:
                ours = passes(model, WIDTHS, r)
                different = int((ours.view(np.uint32) != right.view(np.uint32)).any(axis=-1).sum())
                check.tell(part, path.stem, layers=model.gpu_layers, rows_at_a_time=r, logits=len(right), different=different)
                if different:
                    raise Differs(f"{path.name}: {different} of {len(right)} rows of logits differ, by up to {np.abs(ours - right).max():.3g}")


def part_bits(check: Check) -> None:
    """Every type and width, on a small model."""
    for file_type in TYPES:
        compare(check, "bits", check.model("small", SMALL, f"pure-{file_type}"))


def part_models(check: Check) -> None:
    """Golden models and one of real size: widths, splits, rows; and prove, with drafts."""
    for path in sorted(GOLDEN.glob("*.gguf")):
        with pybmc.Model(path) as model:
            right = passes(model, (1, 5, 17))
        with pybmc.Model(path, gpu=check.gpu.index, n_gpu_layers=-1) as model:      # some have no layer there
            different = int((passes(model, (1, 5, 17)).view(np.uint32) != right.view(np.uint32)).sum())
            check.tell("models", path.stem, layers=model.gpu_layers, different=different)
            if different:
                raise Differs(f"{path.name}: {different} logits differ")
    path = check.model("1b", synth.MODELS["llama-3.2-1b"], "Q4_K_M")
    compare(check, "models", path, layers=(1, 8, -1), rows=(16, 256))
    with pybmc.Model(path) as model, check.opened(path) as on_gpu:
        for found in prove(model, ["The mill", "def f(n):"], 16, temperatures=(0.0,), gpu=on_gpu):
            check.tell("models", f"prove, {found.drafts}", tokens=found.tokens, rows=found.rows, equal=found.difference is None)
            if found.difference:
                raise Differs(f"prove: {found.difference}")


def part_roofs(check: Check) -> None:
    """What the chip can do, as PyTorch finds it."""
    try:
        import torch
    except ImportError:
        check.tell("roofs", "skipped", why="PyTorch is not installed")
        return
    device = torch.device("cuda", check.gpu.index)
    a = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    check.tell("roofs", "copy", GB_s=2 * a.numel() / timed_torch(torch, lambda: b.copy_(a)) / 1e9)
    x = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device)
    check.tell("roofs", "bf16 GEMM of 8192", TFLOP_s=2 * 8192**3 / timed_torch(torch, lambda: x @ x) / 1e12)


def timed_torch(torch, work, reps: int = 10) -> float:
    """Seconds of one run, the median."""
    times = []
    for _ in range(reps + 2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


SPEED = (("1b", "llama-3.2-1b", 0, "Q4_K_M"), ("1b", "llama-3.2-1b", 0, "Q8_0"), ("1b", "llama-3.2-1b", 0, "F16"),
         ("8b-8-layers", "llama-3.1-8b", 8, "Q4_K_M"), ("8b-8-layers", "llama-3.1-8b", 8, "Q8_0"))


def part_speed(check: Check) -> None:
    """Prompts, generation and verification; of 8B 8 of its 32 layers, so that the file is soon made."""
    for name, preset, layers, file_type in SPEED:
        shape = synth.MODELS[preset]
        with check.opened(check.model(name, replace(shape, n_layers=layers) if layers else shape, file_type)) as model:
            for r in bench(model, (512,), (64,), (2, 4, 8, 16, 32), (0, 4096), reps=3):
                check.tell("speed", f"{name} {file_type}, {r.test} {r.n} @{r.depth}", tok_s=r.tok_s, least=r.tok_s_min, most=r.tok_s_max, GB_s=r.gb_s)


def part_prompts(check: Check) -> None:
    """Prompts of a chunk, exact and by cuBLAS, whose bits have to be the same each time."""
    tokens = np.arange(CHUNK, dtype=np.int32)
    for name, preset, layers, file_type in SPEED:
        shape = synth.MODELS[preset]
        path = check.model(name, replace(shape, n_layers=layers) if layers else shape, file_type)
        for prompts in PROMPTS:
            try:
                model = pybmc.Model(path, gpu=check.gpu.index, n_gpu_layers=-1, prompts=prompts)
            except pybmc.DeviceError as error:
                check.tell("prompts", f"{name} {file_type}, {prompts}", skipped=str(error))
                continue
            with model:
                tok_s = next(iter(bench(model, (CHUNK,), (), (), (0,), reps=3))).tok_s
                with model.session() as one, model.session() as other:
                    different = int((one.eval(tokens, "last") != other.eval(tokens, "last")).sum())
            check.tell("prompts", f"{name} {file_type}, {prompts}", tok_s=tok_s, different=different)
            if different:
                raise Differs(f"{path.name}, prompts {prompts}: {different} logits differ from those of the same call before")


def part_transformers(check: Check) -> None:
    """The same shape of 1B by transformers in bf16: what its users have."""
    try:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        check.tell("transformers", "skipped", why=f"{error.name} is not installed")
        return
    s = synth.MODELS["llama-3.2-1b"]
    config = LlamaConfig(hidden_size=s.dim, num_hidden_layers=s.n_layers, num_attention_heads=s.n_heads, num_key_value_heads=s.n_kv_heads,
                         intermediate_size=s.hidden_dim, head_dim=s.head_dim or s.dim // s.n_heads, vocab_size=128256, tie_word_embeddings=True)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config).to(torch.device("cuda", check.gpu.index)).eval()
    ids = torch.randint(0, 128256, (1, 512), device=model.device)
    with torch.no_grad():
        check.tell("transformers", "1b bf16, pp 512", tok_s=512 / timed_torch(torch, lambda: model(ids, use_cache=False), 5))
        began = time.perf_counter()
        model.generate(ids[:, :16], max_new_tokens=64, min_new_tokens=64, do_sample=False)
        torch.cuda.synchronize()
        check.tell("transformers", "1b bf16, tg 64, eager", tok_s=64 / (time.perf_counter() - began))


def part_growth(check: Check) -> None:
    """What it costs to add r rows: the time of a growth, and of the token after it, whose graph is new."""
    with check.opened(check.model("1b", synth.MODELS["llama-3.2-1b"], "Q4_K_M")) as model:
        for r in (16, 64, 256, 1024, 4096):
            grown, after, usual = [], [], []
            with model.session(rows=r) as session:
                for _ in range(4):
                    began = time.perf_counter()
                    session.reserve(session.rows - session.position + 1)
                    grown.append(time.perf_counter() - began)
                    for times in (after, [], usual):
                        began = time.perf_counter()
                        session.eval([1], "argmax")
                        times.append(time.perf_counter() - began)
            check.tell("growth", f"r = {r}", grow_us=1e6 * statistics.median(grown), token_after_us=1e6 * statistics.median(after),
                       token_us=1e6 * statistics.median(usual))


PARTS = {"bits": (part_bits, 120), "models": (part_models, 90), "roofs": (part_roofs, 20), "speed": (part_speed, 120), "prompts": (part_prompts, 60),
         "transformers": (part_transformers, 60), "growth": (part_growth, 30)}


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the main thread after this time."""
    def late(*_):
        raise TimeoutError(f"its {seconds} seconds are over")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(check: Check, parts: list[str]) -> int:
    """All parts; the exit code."""
    for name in parts:
        work, seconds = PARTS[name]
        began = time.perf_counter()
        try:
            with limited(seconds):
                work(check)
        except Differs as error:
            check.tell(name, "OTHER BITS", why=str(error))
            return 3
        except pybmc.BmcError as error:
            check.tell(name, "failed", why=str(error))
            return 1
        except TimeoutError as error:
            check.tell(name, "not done", why=str(error))
        check.tell(name, "took", seconds=time.perf_counter() - began)
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where gpu_check.json goes")
    parser.add_argument("--gpu", type=int, default=0, metavar="N", help="which GPU")
    parser.add_argument("--parts", default=",".join(PARTS), metavar="LIST", help=f"of {', '.join(PARTS)}")
    options = parser.parse_args(arguments)
    parts = options.parts.split(",")
    if wrong := [name for name in parts if name not in PARTS]:
        parser.error(f"--parts: expected some of {', '.join(PARTS)}, found {wrong[0]}")
    try:
        found = gpus()
    except pybmc.DeviceError as error:
        print(error, file=sys.stderr)
        return 1
    if options.gpu not in range(len(found)):
        print(f"GPU: expected 0 to {len(found) - 1}, found {options.gpu}", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as models:
        check = Check(found[options.gpu], options.out, Path(models))
        check.tell("gpu", check.gpu.name, memory_GB=check.gpu.memory / 1e9, capability=check.gpu.capability, cores=os.cpu_count())
        code = run(check, parts)
    (options.out / "gpu_check.json").write_text(json.dumps({"gpu": vars(check.gpu), "exit_code": code, "results": check.results}, indent=1) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
