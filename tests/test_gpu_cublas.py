"""Prompts by cuBLAS: which products it gets, how near the logits stay to the exact ones, what still has to
hold, failures, commands. By the driver that runs the kernels on the CPU, and a cuBLAS beside it
(tests/cuda/cublas.cpp)."""

import contextlib
import ctypes
import json

import gpu
import numpy as np
import oracle
import pytest
import tiny
import tiny_encoders
import tiny_kinds
from gpu import tokens

import pybmc
from pybmc.cli import run
from pybmc.engine import gpu as gpus
from pybmc.engine.engine import Engine
from pybmc.engine.prove import BY_CUBLAS, prove
from pybmc.engine.request import Request
from tools import gpu_parts

CHUNK = 512
FLOAT = 1e-3    # error of float weights, of the logits' spread, as in test_golden.py: f16 rounds to 2^-12
SMALL = tiny.SMALL | {"n_ctx": 2048}


@pytest.fixture(scope="module")
def driver():
    return str(gpu.build())


@pytest.fixture(autouse=True)
def fake(driver, monkeypatch):
    for name in ("PYBMC_CUDA_DRIVER", "PYBMC_CUDA_KERNELS", "PYBMC_CUBLAS"):
        monkeypatch.setenv(name, driver)
    found = gpu.Fake(driver)
    yield found
    assert (found["alive"], found["bytes"]) == (0, 0)


def opened(path, layers=-1, prompts="cublas"):
    return pybmc.Model(path, threads=1, n_gpu_layers=layers, prompts=prompts)


def after_a_chunk(model, n=4):
    """Logits of the last tokens of a text of a chunk and a few tokens."""
    text = tokens(CHUNK + n)
    with model.session(context=2 * CHUNK) as session:
        session.eval(text[:CHUNK], "none")
        return session.eval(text[CHUNK:], "all")


def error(logits, right):
    return np.sqrt(np.mean((logits - right) ** 2)) / right.std()


# Near the exact logits.


@pytest.mark.parametrize("arch, types, shape", [
    ("llama", "F32", {}), ("qwen2", "BF16", {"n_layers": 2}), ("gpt2", "Q8_0", {"n_layers": 2}),
    ("llama", "Q4_K", {"dim": 256, "hidden_dim": 256}),
])
def test_logits_are_as_near_to_the_reference_as_the_exact_ones(arch, types, shape, fake):
    path, text = tiny.model(arch, types=types, **SMALL | shape), tokens(CHUNK + 4)
    right, found = oracle.logits(*oracle.read(path), text)[CHUNK:], []
    for model in (pybmc.Model(path, threads=1), opened(path)):
        with model:
            found.append(error(after_a_chunk(model), right))
    assert fake["cublas_products"] > 0
    assert found[1] < 1.5 * found[0] + FLOAT        # what follows the chunk has activations of 8 bits in both


@pytest.mark.parametrize("name, layers", [("experts", -1), ("MLA", 1), ("qwen35", 1)])
def test_other_kinds_of_blocks_are_near_the_exact_ones(name, layers, fake):
    path = tiny_kinds.model(name)
    with pybmc.Model(path, threads=1) as model:
        right = after_a_chunk(model)
    before = fake["cublas_products"]
    with opened(path, layers) as model:
        assert error(after_a_chunk(model), right) < 10 * FLOAT
    assert fake["cublas_products"] > before


def test_activations_that_f16_does_not_hold():
    """The feed-forward's hidden values are about 10^7."""
    metadata, tensors = tiny.parts("llama", types="F32", **SMALL)
    for name, factor in (("blk.0.ffn_up.weight", 1e7), ("blk.0.ffn_down.weight", 1e-7)):
        kind, rows = tensors[name]
        tensors[name] = (kind, (rows.view(np.float32) * np.float32(factor)).view(rows.dtype))
    path = tiny.save(tiny.model("llama", types="F32", **SMALL).with_name("large.gguf"), metadata, tensors)
    with pybmc.Model(path, threads=1) as model:
        right = after_a_chunk(model)
    with opened(path) as model:
        assert error(after_a_chunk(model), right) < FLOAT


# Which products.


def products(fake, model, *spans):
    """Products by cuBLAS of one call for new sessions, each with (position, tokens)."""
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(model.session(context=4 * CHUNK)) for _ in spans]
        for session, (position, _) in zip(sessions, spans):
            if position:
                session.eval(tokens(position), "none")
        before = fake["cublas_products"]
        pybmc.eval_batch([(session, tokens(n, 1), "last") for session, (_, n) in zip(sessions, spans)])
        return fake["cublas_products"] - before


def test_whole_chunks_of_one_sequence_alone(fake):
    """The last layer's feed-forward and attn_output see only the token asked for: q, k and v of a chunk are
    left."""
    with opened(tiny.model("llama", **SMALL)) as model:
        assert products(fake, model, (0, CHUNK - 1)) == 0
        assert products(fake, model, (5, CHUNK)) == 0
        assert products(fake, model, (0, 300), (0, 300)) == 0
        assert products(fake, model, (0, CHUNK)) == 3
        assert products(fake, model, (500, CHUNK + 20)) == 3
        assert products(fake, model, (0, 7), (0, 2 * CHUNK + 7), (0, 1)) == 6


def test_one_shape_for_each_matrix(fake):
    """q (32), k and v (16) of 32 columns; in the first of two layers attn_output (32), gate, up (48), down
    too."""
    before = fake["cublas_shapes"]
    shape = SMALL | {"n_layers": 2, "hidden_dim": 48, "n_heads": 4, "n_kv_heads": 2}
    with opened(tiny.model("llama", **shape)) as model:
        after_a_chunk(model)
        first = fake["cublas_shapes"]
        after_a_chunk(model)
    assert fake["cublas_shapes"] == first and 0 < first - before <= 4


def test_logits_do_not_depend_on_what_is_wanted():
    with opened(tiny.model("llama", **SMALL)) as model, model.session() as session:
        last = session.eval(tokens(CHUNK), "last")
        session.rewind(0)
        assert np.array_equal(session.eval(tokens(CHUNK), "all")[-1], last)


def test_exact_is_exact(fake):
    path = tiny.model("llama", **SMALL)
    with pybmc.Model(path, threads=1) as model:
        right = after_a_chunk(model)
    with opened(path, prompts="exact") as model:
        assert np.array_equal(after_a_chunk(model), right) and model.prompt_chunk == 0


@pytest.mark.parametrize("at, n, end, piece", [
    (0, 64, 2000, 512), (0, 600, 2000, 512), (0, 1100, 2000, 1024), (0, 2000, 2000, 2000),
    (0, 64, 500, 64), (0, 512, 512, 512),
    (100, 64, 2000, 64), (100, 500, 2000, 412), (1536, 64, 2000, 64), (512, 16, 1024, 512),
])
def test_pieces_cut_no_chunk(at, n, end, piece):
    assert gpus.uncut(at, n, end, CHUNK) == piece
    assert gpus.uncut(at, n, end, 0) == n


# What still has to hold.


def write(model, speculation, n=24, prompts=((CHUNK + 40, 0),)):
    with Engine(model, speculation=speculation, parallel=len(prompts)) as engine:
        sampler = pybmc.Sampler(temperature=0.8, seed=3)
        sequences = [engine.add(Request(tokens(size, seed).tolist(), n, sampler)) for size, seed in prompts]
        found = {sequence: [] for sequence in sequences}
        while not all(sequence.done for sequence in sequences):
            for sequence, token in engine.step():
                found[sequence].append((token.id, token.logprob))
        assert not any(sequence.error for sequence in sequences)
        return [found[each] for each in sequences], sum(each.stats.draft_n for each in sequences)


def test_text_is_the_same_with_drafts_and_without(fake):
    path = tiny.model("llama", **SMALL)
    with opened(path) as model, pybmc.Model(path, threads=1) as draft:
        before = fake["cublas_products"]
        plain, _ = write(model, pybmc.Speculation(model, None, spec="off"))
        assert fake["cublas_products"] == before + 3    # though the first piece of a prompt is of 64 tokens
        drafted, n = write(model, pybmc.Speculation(model, draft, spec="draft", fixed=5))
    assert drafted == plain and n > 0


def test_text_does_not_depend_on_other_sequences():
    with opened(tiny.model("llama", **SMALL)) as model:
        off, prompts = pybmc.Speculation(model, None, spec="off"), ((600, 1), (520, 2))
        alone = [write(model, off, 4, [prompt])[0][0] for prompt in prompts]
        together, _ = write(model, off, 4, prompts)
    assert together == alone


@pytest.mark.parametrize("arch", ["llama", "qwen35"])
def test_layers_on_both_machines_and_a_file_for_the_cpu(arch, tmp_path):
    """Layers on the CPU by way of the GPU or not; what follows a chunk is exact, also where it is loaded."""
    path = tiny.model(arch, n_ctx=2048, n_layers=2)
    found = []
    for least in (0, 5):
        with pybmc.Model(path, threads=1, n_gpu_layers=1, prompts="cublas", stream_tokens=least) as model, \
                model.session() as session:
            session.eval(tokens(CHUNK + 1), "none")
            session.save(tmp_path / "s")
            found.append(session.eval(tokens(2, 1), "all"))
    with pybmc.Model(path, threads=1) as model, model.load_session(tmp_path / "s") as session:
        found.append(session.eval(tokens(2, 1), "all"))
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


def proven(path, seed=0):
    with pybmc.Model(path, threads=1) as model, opened(path) as other:
        return next(prove(model, ["abc"], 8, temperatures=(0.0,), gpu=other))


def test_prove_tells_the_distance():
    found = proven(tiny.model("llama", **SMALL))
    assert found.drafts == BY_CUBLAS and found.difference is None
    assert found.rows >= 7 and 0 < found.distance < 0.1


def test_prove_finds_a_cublas_that_varies(fake):
    with fake.set(cublas_varies=1):
        assert proven(tiny.model("llama", **SMALL | {"types": "F32"})).difference is not None


# Failures.


def test_each_call_that_fails_is_a_sentence_and_moves_nothing(fake):
    path, seen = tiny.model("llama", **SMALL), []
    for nth in range(1, 7):
        fake["cublas_fail_in"] = nth
        with pytest.raises(pybmc.DeviceError, match=r"GPU 0: cuBLAS: .*: execution failed \(13\)"), \
                opened(path) as model, model.session() as session:
            try:
                session.eval(tokens(CHUNK), "last")
            finally:
                assert session.position == 0
                assert session.eval(tokens(3), "last").shape == (300,)
        seen.append(fake.failed)
    assert seen == [
        "cublasCreate_v2", "cublasSetStream_v2", "cublasSetWorkspace_v2", "cublasSetMathMode", "cublasGemmEx",
        "cublasGemmEx"
    ]
    fake["cublas_fail_in"] = 0


def test_no_memory_for_cublas(fake):
    with fake.set(cublas_fail_in=1, cublas_fail_code=3), \
            pytest.raises(pybmc.OutOfMemoryError, match="cuBLAS: .*: out of memory"):
        opened(tiny.model("llama", **SMALL))


@pytest.mark.parametrize("library, what", [
    ("/none/libcublas.so.13", "cuBLAS cannot be opened: /none/libcublas.so.13"),
    ("libm.so.6",
     "cuBLAS: libm.so.6 has no cublasCreate_v2: expected version 11 or later; pip install nvidia-cublas"),
])
def test_no_library_that_can_be_used(library, what, monkeypatch):
    monkeypatch.setenv("PYBMC_CUBLAS", library)
    with pytest.raises(pybmc.DeviceError, match=what):
        opened(tiny.model("llama", **SMALL))


def test_a_missing_library_says_what_to_install(monkeypatch):
    for number in (11, 12, 13):
        with contextlib.suppress(OSError):
            ctypes.CDLL(f"libcublas.so.{number}")
            pytest.skip("the system has cuBLAS")
    monkeypatch.delenv("PYBMC_CUBLAS")
    monkeypatch.setattr(gpus, "find_spec", lambda name: None)
    with pytest.raises(pybmc.DeviceError,
                       match=r"cuBLAS is missing: libcublas.so.11: .*; pip install nvidia-cublas brings it"):
        opened(tiny.model("llama", **SMALL))


def test_the_newest_wheel_is_found(monkeypatch, tmp_path):
    monkeypatch.delenv("PYBMC_CUBLAS")
    for name in ("cu98/lib/libcublas.so.98", "cu99/lib/libcublas.so.99", "cublas/lib/libcublas.so.9",
                 "cu99/lib/libcublas.so.old"):
        path = tmp_path / "nvidia" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert gpus.cublas() == str(tmp_path / "nvidia/cu99/lib/libcublas.so.99")


@pytest.mark.parametrize("settings",
                         [{}, {"n_gpu_layers": 0}, {"gpu": "off"}, {"gpu": 0, "n_gpu_layers": 0}], ids=str)
def test_without_layers_on_a_gpu(settings, monkeypatch):
    monkeypatch.setenv("PYBMC_CUBLAS", "/none")
    with pytest.raises(pybmc.DeviceError, match="prompts by cuBLAS: expected layers on a GPU .*, found none"):
        pybmc.Model(tiny.model("llama", **SMALL), threads=1, prompts="cublas", **settings)


def test_layers_that_all_stay_on_the_cpu():
    with pytest.raises(pybmc.DeviceError, match="expected layers on a GPU .*, found none"):
        opened(tiny_kinds.model("AltUp"), layers=1)


def test_choices_that_mean_nothing():
    with pytest.raises(pybmc.ArgumentError, match="prompts"):
        pybmc.Model(tiny.model("llama", **SMALL), threads=1, prompts="fast")
    with pytest.raises(pybmc.ArgumentError, match="expected a model that writes text, found an encoder"):
        opened(tiny_encoders.model("bert"))


def test_its_buffers_are_counted(fake):
    path, counted, taken = tiny.model("llama", **SMALL), [], []
    for prompts in gpus.PROMPTS:
        with opened(path, prompts=prompts) as model:
            counted.append(gpus.plan(model._handle, 1).buffer_bytes)
            taken.append(fake["bytes"])
    assert counted[1] - counted[0] == taken[1] - taken[0] > 32 << 20
    with fake.set(memory=taken[0] + (1 << 20)), pytest.raises(pybmc.OutOfMemoryError, match="MB for buffers"):
        opened(path)


# Commands.


def test_commands(capsys, fake):
    path = str(tiny.model("llama", **SMALL))
    command = [
        "generate", path, "-p", "the mill " * 300, "-n", "4", "--temp", "0", "-t", "1", "-ngl", "-1",
        "--prompts", "cublas"
    ]
    assert run(command) == 0
    plain = capsys.readouterr().out
    assert fake["cublas_products"] > 0
    assert run([*command, "--draft", path]) == 0
    assert capsys.readouterr().out == plain
    assert run(["generate", path, "-p", "a", "-n", "1", "--prompts", "cublas"]) == 1
    assert "expected layers on a GPU (-ngl or --gpu" in capsys.readouterr().err
    assert run([*command, "--prompts", "fast"]) == 2


def test_prove_command(capsys):
    command = ["prove", str(tiny.model("llama", **SMALL)), "-n", "3", "-p", "the mill", "--temp", "0",
               "-t", "1", "-ngl", "1", "--prompts", "cublas"]
    assert run(command) == 0
    out = capsys.readouterr().out
    assert BY_CUBLAS in out and "prompts by cuBLAS are not the CPU's: logits differ by up to" in out
    assert run([*command, "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["distance"] is not None for row in found] == [True, *[False] * (len(found) - 1)]


def test_the_check_of_a_gpu_times_both(tmp_path, fake):
    told = []
    gpu_parts.run_part(gpu_parts.Check(gpus.describe(0), gpu_parts.TOY, tmp_path, told.append), "prompts")
    found = [(row["name"], row["different"]) for row in told if "tok_s" in row]
    assert found == [("exact", 0), ("cublas", 0)]
    assert fake["cublas_products"] > 0
