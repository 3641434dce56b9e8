"""The parts of the GPU's check, each of which runs in a process of its own: tools/gpu_check.py."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import pybmc
from pybmc.engine.bench import bench
from pybmc.engine.gpu import CHUNK, GPU, PROMPTS
from pybmc.engine.prove import decode, prove

from . import synth
from .synth import Shape

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"


class DiffersError(Exception):
    """The GPU's bits are not the CPU's."""


@dataclass(frozen=True)
class Sizes:
    """What the parts run on: models, and how much of them."""

    small: Shape = Shape("llama", 512, 2, 8, 4, 1024, "tiny", 4096)
    types: tuple[str, ...] = (*synth.BLOCKS, *synth.FLOATS)
    widths: tuple[int, ...] = (1, 2, 3, 5, 8, 16, 17, 64, 512)
    golden: int = 100
    one: Shape = synth.MODELS["llama-3.2-1b"]
    eight: Shape = synth.MODELS["llama-3.1-8b"]
    few_layers: int = 8                     # of 8B in types whose file would be large
    chunk: tuple[str, Shape] = ("8b", eight)                # prompts of whole chunks
    splits: tuple[int, ...] = (0, 1, 8, -1)
    proven: int = 16                        # tokens
    prompt: int = 512
    written: int = 64                       # tokens
    verified: tuple[int, ...] = (2, 4, 8, 16, 32)
    depths: tuple[int, ...] = (0, 8192)
    reps: int = 3
    thin: tuple[int, int] = (2, 18)         # layers with next to no work
    growth: tuple[int, ...] = (16, 64, 256, 1024, 4096)
    text: int = 1024                        # tokens of a text whose rows grow
    gemm: int = 8192
    copied: int = 1 << 30                   # bytes


TOY = Sizes(small=Shape("llama", 256, 2, 8, 4, 256, "tiny", 512), types=("F16", "Q4_K"), widths=(1, 3),
            golden=2, one=Shape("llama", 256, 2, 4, 2, 256, "tiny", 512, tied=True),
            eight=Shape("llama", 256, 4, 4, 2, 512, "tiny", 512), few_layers=2,
            chunk=("chunk", Shape("llama", 64, 1, 2, 1, 64, "tiny", 1024)), splits=(0, 1, -1), proven=2,
            prompt=5, written=2, verified=(2,), depths=(0,), reps=1, thin=(1, 2), growth=(16,), text=4,
            gemm=32, copied=1 << 12)


@dataclass
class Check:
    """A part's GPU, its sizes, the folder of its models, and who is told what it finds."""

    gpu: GPU
    sizes: Sizes
    models: Path
    told: Callable[[dict], None]
    part: str = ""

    def tell(self, name: str, **values: Any) -> None:
        self.told({"part": self.part, "name": name} | values)

    def model(self, name: str, shape: Shape, file_type: str) -> Path:
        """A file of random weights, made once."""
        path = self.models / f"{name}.{file_type}.gguf"
        if not path.is_file():
            began = time.perf_counter()
            part = path.with_suffix(".part")
            synth.write(part, shape, file_type, name)
            part.rename(path)
            self.tell(f"made {path.name}", seconds=time.perf_counter() - began, GB=path.stat().st_size / 1e9)
        return path

    @contextmanager
    def opened(self, path: Path, layers: int | str = -1) -> Iterator[pybmc.Model]:
        """With layers on the GPU, where there have to be some; passes of 5 tokens and more do the others'
        products there too."""
        with pybmc.Model(path, gpu=self.gpu.index, n_gpu_layers=layers, stream_tokens=5) as model:
            if layers and not model.gpu_layers:
                raise pybmc.DeviceError(f"{path.name}: no layer runs on the GPU")
            yield model


# Bits.


def passes(model: pybmc.Model, widths: tuple[int, ...], rows: int | str = "auto") -> list[np.ndarray]:
    """Logits of passes of each width, one after the other, each twice: the second of a narrow one is a
    graph."""
    rng = np.random.default_rng(0)
    size = model.config.vocab_size
    with model.session(rows=rows) as session:
        texts = [rng.integers(0, size, n).astype(np.int32) for n in widths for _ in range(2)]
        return [session.eval(text, "all" if len(text) <= 64 else "last").reshape(-1, size) for text in texts]


def differing(ours: list[np.ndarray], right: list[np.ndarray], widths: tuple[int, ...]) -> dict[int, str]:
    """What differs, by width of pass."""
    found = {}
    for i, (a, b) in enumerate(zip(ours, right)):
        wrong = int((a.view(np.uint32) != b.view(np.uint32)).any(axis=-1).sum())
        if wrong:
            found[widths[i // 2]] = f"{wrong} of {len(b)} rows, by up to {float(np.abs(a - b).max()):.3g}"
    return found


def compare(check: Check, path: Path, widths: tuple[int, ...], layers: tuple[int, ...] = (-1,),
            rows: tuple[int | str, ...] = ("auto",)) -> int:
    """One model on both machines: how many comparisons found other bits."""
    wrong = 0
    with pybmc.Model(path) as model:
        right = passes(model, widths)
    for n in layers:
        with check.opened(path, n) as model:
            for r in rows:
                found = differing(passes(model, widths, r), right, widths)
                wrong += bool(found)
                by_width = {f"width {width}": what for width, what in found.items()}
                check.tell(path.stem, layers=model.gpu_layers, rows_at_a_time=r, logits=sum(map(len, right)),
                           different=len(found), **by_width)
    return wrong


def must_be_equal(wrong: int) -> None:
    """Raise DiffersError unless nothing is: at the end of a part, so that it tells all that is wrong."""
    if wrong:
        raise DiffersError(f"{wrong} comparisons found other bits than the CPU's")


def part_bits(check: Check) -> None:
    """Every type and width, on a small model."""
    s = check.sizes
    paths = (check.model("small", s.small, f"pure-{file_type}") for file_type in s.types)
    must_be_equal(sum(compare(check, path, s.widths) for path in paths))


def part_golden(check: Check) -> None:
    """The golden models: every kind of layer."""
    paths = sorted(GOLDEN.glob("*.gguf"))[:check.sizes.golden]
    must_be_equal(sum(compare(check, path, (1, 5, 17)) for path in paths))


def part_models(check: Check) -> None:
    """A model of real size: widths, splits, rows; and prove, with drafts."""
    s = check.sizes
    path = check.model("1b", s.one, "Q4_K_M")
    wrong = compare(check, path, s.widths, s.splits, (16, 256))
    with pybmc.Model(path) as model, check.opened(path) as on_gpu:
        for found in prove(model, ["The mill", "def f(n):"], s.proven, temperatures=(0.0,), gpu=on_gpu):
            check.tell(f"prove, {found.drafts}", tokens=found.tokens, rows=found.rows,
                       equal=found.difference is None)
            wrong += found.difference is not None
    must_be_equal(wrong)


# Rates.


def torch_of(check: Check) -> tuple[Any, Any]:
    """PyTorch and its device: the CPU where its GPU is not there, for a toy run. (None, None) without it,
    which is told."""
    try:
        import torch
    except ImportError:
        check.tell("skipped", why="PyTorch is not installed")
        return None, None
    if torch.cuda.is_available():
        return torch, torch.device("cuda", check.gpu.index)
    if check.sizes is TOY:
        return torch, torch.device("cpu")
    check.tell("skipped", why="PyTorch has no GPU")
    return None, None


def timed(torch: Any, device: Any, work: Callable[[], object], reps: int = 10) -> float:
    """Seconds of one run, the median."""
    times = []
    for _ in range(reps + 2):
        wait(torch, device)
        began = time.perf_counter()
        work()
        wait(torch, device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def wait(torch: Any, device: Any) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def part_launches(check: Check) -> None:
    """A token of a model whose layers have next to no work: what launches, graphs and the host take, by
    layer."""
    times = {}
    few, many = check.sizes.thin
    reps = 2 if check.sizes is TOY else 32
    for layers in (few, many):
        shape = replace(check.sizes.small, n_layers=layers)
        path = check.model(f"thin-{layers}", shape, "pure-Q4_K")
        with check.opened(path) as model, model.session(rows=256) as session:
            for _ in range(3):              # the second makes the graph
                session.eval([1], "argmax")
            began = time.perf_counter()
            for _ in range(reps):
                session.eval([1], "argmax")
            times[layers] = (time.perf_counter() - began) / reps
    check.tell("a token of thin layers", layer_us=1e6 * (times[many] - times[few]) / (many - few),
               token_us=1e6 * times[few])


def part_roofs(check: Check) -> None:
    """What the chip can do, as PyTorch finds it."""
    torch, device = torch_of(check)
    if not torch:
        return
    a = torch.empty(check.sizes.copied, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    check.tell("copy", GB_s=2 * a.numel() / timed(torch, device, lambda: b.copy_(a)) / 1e9)
    n = check.sizes.gemm
    x = torch.randn(n, n, dtype=torch.bfloat16, device=device)
    check.tell(f"bf16 GEMM of {n}", TFLOP_s=2 * n**3 / timed(torch, device, lambda: x @ x) / 1e12)


def rates(check: Check, name: str, path: Path) -> None:
    """Prompts, generation and verification at each depth; c: what a pass costs, in tokens generated one by
    one."""
    s = check.sizes
    with check.opened(path) as model:
        one: dict[int, float] = {}
        for r in bench(model, (s.prompt,), (s.written,), s.verified, s.depths, reps=s.reps):
            one |= {r.depth: r.tok_s} if r.test == "tg" else {}
            cost = {"c": r.n * one[r.depth] / r.tok_s} if r.test == "verify" else {}
            check.tell(f"{name}, {r.test} {r.n} @{r.depth}", tok_s=r.tok_s, least=r.tok_s_min,
                       most=r.tok_s_max, GB_s=r.gb_s, **cost)


def part_rates_8b(check: Check) -> None:
    """All of 8B in Q4_K_M."""
    rates(check, "8b Q4_K_M", check.model("8b", check.sizes.eight, "Q4_K_M"))


def part_rates_1b(check: Check) -> None:
    for file_type in ("Q4_K_M", "Q8_0", "F16"):
        rates(check, f"1b {file_type}", check.model("1b", check.sizes.one, file_type))


def part_rates_few(check: Check) -> None:
    """Some layers of 8B, in types whose file would be large."""
    few = check.sizes.few_layers
    for file_type in ("Q8_0", "F16"):
        rates(check, f"8b, {few} layers, {file_type}",
              check.model(f"8b-{few}", replace(check.sizes.eight, n_layers=few), file_type))


def part_prompts(check: Check) -> None:
    """Prompts of a whole chunk, exact and by cuBLAS, whose bits have to be the same each time."""
    path = check.model(*check.sizes.chunk, "Q4_K_M")
    tokens = np.arange(CHUNK, dtype=np.int32) % 100
    for prompts in PROMPTS:
        try:
            model = pybmc.Model(path, gpu=check.gpu.index, n_gpu_layers=-1, prompts=prompts)
        except pybmc.DeviceError as error:
            check.tell(prompts, skipped=str(error))
            continue
        with model:
            tok_s = next(iter(bench(model, (CHUNK,), (), (), (0,), reps=check.sizes.reps))).tok_s
            with model.session() as one, model.session() as other:
                different = int((one.eval(tokens, "last") != other.eval(tokens, "last")).sum())
        check.tell(prompts, tok_s=tok_s, different=different)
        if different:
            raise DiffersError(f"{path.name}, prompts {prompts}: {different} logits differ from those of "
                               "the same call before")


def part_growth(check: Check) -> None:
    """The claim about growing by r rows: a text of many tokens with each r, the memory it holds, what a
    growth costs, and the token after it, whose graph may be new."""
    s = check.sizes
    with check.opened(check.model("1b", s.one, "Q4_K_M")) as model:
        for r in s.growth:
            with model.session(rows=r) as session:
                session.eval([1], "none")
                began = time.perf_counter()
                for _ in range(s.text):
                    session.eval([1], "argmax")
                seconds, rows = time.perf_counter() - began, session.rows
            grown, after, usual = [], [], []
            with model.session(rows=r) as session:
                for _ in range(4):
                    grown.append(clocked(session.reserve, session.rows - session.position + 1))
                    after.append(clocked(session.eval, [1], "argmax"))
                    clocked(session.eval, [1], "argmax")
                    usual.append(clocked(session.eval, [1], "argmax"))
            check.tell(f"r = {r}", tok_s=s.text / seconds, rows=rows, grow_us=1e6 * statistics.median(grown),
                       token_after_us=1e6 * statistics.median(after), token_us=1e6 * statistics.median(usual))


def clocked(work: Callable, *arguments: Any) -> float:
    began = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - began


def part_speculation(check: Check) -> None:
    """The same text with guesses and without: from repetitions, and from a draft on the same GPU that always
    agrees."""
    s = check.sizes
    path = check.model("1b", s.one, "Q4_K_M")
    with check.opened(path) as model, check.opened(path) as draft:
        tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, 8).tolist() * 4
        sampler = pybmc.Sampler(temperature=0.0)
        plain: list[int] = []
        for name, who, settings in (("off", None, {"spec": "off"}), ("ngram", None, {"spec": "ngram"}),
                                    ("draft", draft, {"spec": "draft", "fixed": 4})):
            began = time.perf_counter()
            found, stats = decode(model, tokens, 2 * s.written, sampler, who, settings)
            seconds, ids = time.perf_counter() - began, [token.id for token in found]
            plain = plain or ids
            check.tell(name, tok_s=len(ids) / seconds, guesses=stats.draft_n, accepted=stats.draft_n_accepted,
                       equal=ids == plain)
            if ids != plain:
                raise DiffersError(f"speculation, {name}: another text than without")


def part_transformers(check: Check) -> None:
    """The same shape of 1B by transformers in bf16: a prompt, and decoding eager and as a captured graph."""
    torch, device = torch_of(check)
    if not torch:
        return
    try:
        import transformers
    except ImportError:
        check.tell("skipped", why="transformers is not installed")
        return
    s, shape = check.sizes, check.sizes.one
    vocab = 256 if s is TOY else 128256
    config = transformers.LlamaConfig(
        hidden_size=shape.dim, num_hidden_layers=shape.n_layers, num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads, intermediate_size=shape.hidden_dim, vocab_size=vocab,
        head_dim=shape.head_dim or shape.dim // shape.n_heads, tie_word_embeddings=True)
    torch.set_default_dtype(torch.bfloat16)
    with device:                            # weights are drawn there
        model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, vocab, (1, s.prompt), device=device)
    with torch.no_grad():
        check.tell(f"1b bf16, pp {s.prompt}",
                   tok_s=s.prompt / timed(torch, device, lambda: model(ids, use_cache=False), 5))
        cache = model(ids[:, :16], use_cache=True).past_key_values
        began = time.perf_counter()
        for _ in range(s.written):
            cache = model(ids[:, :1], past_key_values=cache, use_cache=True).past_key_values
        wait(torch, device)
        check.tell(f"1b bf16, tg {s.written}, eager", tok_s=s.written / (time.perf_counter() - began))
        captured_decode(check, torch, device, transformers, model, ids)


def captured_decode(check: Check, torch: Any, device: Any, transformers: Any, model: Any, ids: Any) -> None:
    """A token with a static cache, as one CUDA graph; on the CPU the same calls without the graph."""
    n = check.sizes.written
    cache = transformers.StaticCache(config=model.config, max_cache_len=512)
    token, position = ids[:, :1].clone(), torch.tensor([16], device=device)

    def step() -> Any:
        return model(token, past_key_values=cache, cache_position=position, position_ids=position[None],
                     use_cache=True).logits

    model(ids[:, :16], past_key_values=cache, cache_position=torch.arange(16, device=device), use_cache=True)
    run = step
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        run = graph.replay
    began = time.perf_counter()
    for _ in range(n):
        run()
        position += 1
    wait(torch, device)
    check.tell(f"1b bf16, tg {n}, captured", tok_s=n / (time.perf_counter() - began))


# In this order: what decides first. Seconds; together under eight minutes.
PARTS: dict[str, tuple[Callable[[Check], None], int]] = {
    "bits": (part_bits, 80),
    "golden": (part_golden, 40),
    "models": (part_models, 55),
    "launches": (part_launches, 15),
    "rates_8b": (part_rates_8b, 70),
    "prompts": (part_prompts, 45),
    "rates_1b": (part_rates_1b, 50),
    "growth": (part_growth, 25),
    "speculation": (part_speculation, 25),
    "roofs": (part_roofs, 15),
    "transformers": (part_transformers, 25),
    "rates_few": (part_rates_few, 35),
}
EQUALITY = ("bits", "golden", "models")


def run_part(check: Check, name: str) -> None:
    check.part = name
    check.tell("begins", cores=os.cpu_count())
    PARTS[name][0](check)
