"""Long passes of layers on the CPU whose products a GPU does, by the driver of tests/cuda: the same bits,
slices, memory, failures, and what the commands say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_encoders
import tiny_kinds
from gpu import assert_same, bits, fake_driver, nothing_is_left, tokens  # noqa: F401

import pybmc
from pybmc.cli import run
from pybmc.engine.engine import Engine
from pybmc.engine.gpu import gpus, plan
from pybmc.engine.prove import ON_GPU, prove
from pybmc.engine.request import Request

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.gguf"))
ALL = {"gpu": 0, "n_gpu_layers": 0, "stream_tokens": 2}     # layers on the CPU, passes of two tokens and more


def passes(path, widths, threads=2, **settings):
    """Logits of passes of these widths, one after the other."""
    with pybmc.Model(path, threads=threads, **settings) as model, model.session() as session:
        assert model.streams == bool(settings.get("stream_tokens", settings.get("gpu") is not None))
        return np.concatenate([session.eval(tokens(n, seed=n), "all") for n in widths])


def launched(fake, call):
    before = fake["launches"]
    call()
    return fake["launches"] - before


# The same bits.


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_models_have_the_same_bits(path):
    assert_same(passes(path, (1, 5, 9), **ALL), passes(path, (1, 5, 9)))


@pytest.mark.parametrize("arch", ["llama", "gemma3", "qwen2"])
def test_a_split_after_every_layer(arch):
    path = tiny.model(arch, n_layers=3)
    right = passes(path, (3, 70))
    for layers in (0, 1, 2):
        assert_same(passes(path, (3, 70), gpu=0, n_gpu_layers=layers, stream_tokens=20), right)


@pytest.mark.parametrize("name, types", [*((name, "Q8_0") for name in tiny_kinds.NAMES),
                                         ("MLA", "F16"), ("experts", "F16")])
def test_each_kind_of_block(name, types, fake):
    """Copies to the GPU happen as soon as they may; in the other tests as late as they may."""
    path = tiny_kinds.model(name, types)
    with fake.set(eager=1):
        assert_same(passes(path, (20, 1), **ALL), passes(path, (20, 1)))


@pytest.mark.parametrize("major", [6, 9])
@pytest.mark.parametrize("types", ["Q4_K", "Q6_K", "BF16"])
def test_types_and_chips(types, major, fake):
    path = tiny.model("llama", types=types, dim=256, head_dim=32)
    with fake.set(major=major):
        assert_same(passes(path, (17, 70), **ALL), passes(path, (17, 70)))


@pytest.mark.parametrize("eager, registers", [(0, 1), (1, 0)])
def test_matrices_go_in_slices(registers, eager, fake):
    """Two slots for three slices of each of two matrices, the last a short one. Memory need not be pinned."""
    path = tiny.model("llama", types="Q4_0", n_layers=1, dim=32, n_heads=2, hidden_dim=2 * 4096 + 544)
    right = passes(path, (18,))
    with fake.set(eager=eager, registers=registers):
        assert launched(fake, lambda: assert_same(passes(path, (18,), **ALL), right)) == 5 + 3 * 3
        with pybmc.Model(path, threads=1, **ALL):
            assert (fake["registered"] > 0) == bool(registers)


def test_rows_that_are_no_whole_blocks():
    path = tiny.model("llama", types="F32", dim=40, n_heads=2, hidden_dim=100)
    assert_same(passes(path, (33,), **ALL), passes(path, (33,)))


@pytest.mark.parametrize("arch", tiny_encoders.ARCHITECTURES)
def test_encoders(arch):
    path, found = tiny_encoders.model(arch), []
    for settings in ({}, ALL):
        with pybmc.Model(path, threads=2, **settings) as model:
            found.append(model.embed([[5, 6, 7, 8], list(range(20, 60))], pooling="mean"))
    assert_same(found[1], found[0])


def test_sessions_of_one_pass_and_prompts_of_several():
    path, found = tiny.model("gemma3"), []
    for settings in ({}, ALL):
        with pybmc.Model(path, threads=3, **settings) as model:
            sessions = [model.session(context=1024) for _ in range(3)]
            texts = [tokens(n, seed=n) for n in (3, 1, 40)]
            rows = pybmc.eval_batch([(session, text, "all") for session, text in zip(sessions, texts)])
            rows += [sessions[0].eval(tokens(n), "last")[None] for n in (530, 1)]
            found.append(np.concatenate(rows))
            for session in sessions:
                session.close()
    assert_same(found[1], found[0])


def test_experts_that_are_packed_when_they_are_used_stay_on_the_cpu(fake):
    path = tiny_kinds.model("experts")
    with pybmc.Model(path, threads=1, memory=float("inf")) as model:
        total = model.packed_bytes
    right, counts = passes(path, (20,)), {}
    for memory in range(2 * total, 0, -total // 10):
        with pybmc.Model(path, threads=2, memory=memory, **ALL) as model, model.session() as session:
            if not model.streams:
                break
            late = model.experts is not None
            text = tokens(20, seed=20)
            counts[late] = launched(fake, lambda: assert_same(session.eval(text, "all"), right))
    assert 0 < counts[True] < counts[False]


# Which passes.


@pytest.mark.parametrize("n_tok, stream_tokens, there", [
    (63, None, False), (64, None, True), (10, 11, False), (11, 11, True), (100, 0, False),
])
def test_passes_by_their_tokens(n_tok, stream_tokens, there, fake):
    path, settings = tiny.model("llama", types="Q4_0"), ALL | {"stream_tokens": stream_tokens}
    with pybmc.Model(path, threads=1, **settings) as model, model.session() as session:
        assert bool(launched(fake, lambda: session.eval(tokens(n_tok), "none"))) is there
        assert not launched(fake, lambda: session.eval(tokens(1), "last"))


def test_an_engine_reads_prompts_in_whole_passes(fake):
    """However slow it takes the model for: pieces by the time they take would never go through the GPU."""
    found = []
    for settings in ({}, {"gpu": 0, "n_gpu_layers": 0}):
        with pybmc.Model(tiny.model("llama", types="Q4_0"), threads=1, **settings) as model, \
                Engine(model, parallel=1) as engine:
            engine._prompt_rate = 1.0
            sequence = engine.add(Request(tokens(90).tolist(), 4, pybmc.Sampler(temperature=0)))
            rounds = 0
            before = fake["launches"]
            while not sequence.done and sequence.reading:
                engine.step()
                rounds += 1
            found.append((rounds, fake["launches"] > before))
            while not sequence.done:
                engine.step()
            found.append(sequence.text)
    assert found[0] == (6, False) and found[2] == (1, True) and found[1] == found[3]


def test_many_threads_compute_themselves(fake):
    """A rule, not a measurement: with 12 threads 64 tokens are not worth sending Q8_0 for, and 256 are."""
    path = tiny.model("llama", types="Q8_0", n_layers=2, dim=32, n_heads=2, hidden_dim=2048)
    settings = dict(threads=12, gpu=0, n_gpu_layers=0)
    with pybmc.Model(path, **settings) as model, model.session(context=1024) as session:
        assert not launched(fake, lambda: session.eval(tokens(64), "none"))
        assert launched(fake, lambda: session.eval(tokens(256), "none"))


def test_weights_in_the_file_stay_on_the_cpu(fake):
    path = tiny.model("llama")
    right = passes(path, (70,))
    for settings in ({"repack": False}, {"memory": 0}):
        with pybmc.Model(path, threads=2, **ALL, **settings) as model, model.session() as session:
            assert not model.streams and fake["bytes"] == 0
            assert_same(session.eval(tokens(70, seed=70), "all"), right)


# Memory.


@pytest.mark.parametrize("name", ["llama", "MLA", "experts"])
def test_the_plan_says_what_is_taken(name, fake):
    path = tiny.model(name) if name == "llama" else tiny_kinds.model(name)
    with pybmc.Model(path, threads=1, **ALL) as model:
        assert fake["bytes"] == plan(model._handle, 0).stream_bytes == plan(model._handle, 0).bytes(4096) > 0
        assert plan(model._handle, 0).bytes(4096, streams=False) == 0
        assert plan(model._handle, model.config.n_layers).stream_bytes == 0


def test_no_memory_is_a_note_or_an_error(fake, caplog):
    path = tiny.model("llama")
    with fake.set(memory=1000):
        with pybmc.Model(path, threads=1, gpu=0, n_gpu_layers=0) as model:
            assert not model.streams
        why = "long prompts do not go through the GPU: GPU 0: 1 MB for weights of long passes: out of memory"
        assert why in caplog.text
        with pytest.raises(pybmc.OutOfMemoryError, match="weights of long passes"):
            pybmc.Model(path, threads=1, **ALL)


def test_auto_leaves_memory_for_them(fake):
    path = tiny.model("llama", n_layers=24, hidden_dim=320)
    with pybmc.Model(path, threads=1) as model:
        plans = [plan(model._handle, n) for n in range(25)]
    rows = plans[0].bytes(4096)
    assert plans[7].bytes(512) < plans[24].bytes(512)
    for n in (0, 3, 7):
        memory = int(plans[n].bytes(model.config.n_ctx) / 0.95) + 2
        with fake.set(memory=memory):
            assert gpus()[0].available == memory
            with pybmc.Model(path, threads=1, gpu=0) as other:
                assert (other.gpu_layers, other.streams) == (n, True)
    with fake.set(memory=rows // 2), pybmc.Model(path, threads=1, gpu="auto") as other:
        assert (other.gpu_layers, other.streams) == (0, False)


# Failures.


def test_each_call_that_fails_is_a_sentence_and_moves_nothing(fake):
    """Of loading and of passes, but for pinning, without which copies are slower. The next pass is right."""
    path, seen = tiny.model("qwen2", types="Q8_0", n_layers=1), set()
    right = passes(path, (3, 6))
    for nth in range(1, 1000):
        fake["fail_in"] = nth
        try:
            with pybmc.Model(path, threads=2, **ALL) as model, model.session() as session:
                rows = [session.eval(tokens(3, seed=3), "all")]
                try:
                    rows.append(session.eval(tokens(6, seed=6), "all"))
                except pybmc.DeviceError:
                    assert session.position == 3
                    assert_same(np.concatenate([*rows, session.eval(tokens(6, seed=6), "all")]), right)
                    raise
                assert_same(np.concatenate(rows), right)
                if fake["fail_in"] > 0:
                    fake["fail_in"] = 0
                    break
                assert fake.failed == "cuMemHostRegister_v2", f"{fake.failed} failed, and nobody said so"
        except (pybmc.DeviceError, pybmc.OutOfMemoryError) as error:
            assert str(error).startswith(("GPU 0: ", "no GPU can be used")), error
            seen.add(fake.failed)
        finally:
            fake["fail_in"] = 0
        left = fake["alive"], fake["bytes"], fake["registered"]
        assert left == (0, 0, 0), f"after call {nth}, {fake.failed}"
    assert {
        "cuStreamCreate", "cuEventCreate", "cuEventRecord", "cuStreamWaitEvent", "cuMemcpy2DAsync_v2",
        "cuMemcpyHtoDAsync_v2", "cuLaunchKernel", "cuStreamSynchronize", "cuMemAlloc_v2",
        "cuModuleGetFunction"
    } <= seen


@pytest.mark.parametrize("settings", [{"n_gpu_layers": 0}, {"n_gpu_layers": 1}], ids=str)
def test_states_come_back_after_a_failure(settings, fake):
    path = tiny.model("qwen35", n_layers=2)
    with pybmc.Model(path, threads=1) as model, model.session() as session:
        session.eval(tokens(60), "none")
        right = session.eval(tokens(5, 1), "all")
    settings = dict(gpu=0, stream_tokens=30) | settings
    with pybmc.Model(path, threads=1, **settings) as model, model.session() as session:
        session.eval(tokens(60), "none")
        session.snapshot()
        with fake.set(fail_in=12), pytest.raises(pybmc.DeviceError):
            session.eval(tokens(100, 2), "last")
        at = session.position
        assert at <= 60
        session.eval(tokens(60)[at:], "none") if at < 60 else None
        assert_same(session.eval(tokens(5, 1), "all"), right)


FORKED = """
import os, sys
import numpy as np
import pybmc
model = pybmc.Model(sys.argv[1], threads=2, gpu=0, n_gpu_layers=0, stream_tokens=2)
right = model.session().eval(list(range(40)), "last")
if os.fork() == 0:
    same = np.array_equal(model.session().eval(list(range(40)), "last"), right)
    model.close()
    os._exit(0 if same else 1)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
assert np.array_equal(model.session().eval(list(range(40)), "last"), right)
"""


def test_a_forked_process_computes_itself():
    subprocess.run([sys.executable, "-c", FORKED, str(tiny.model("llama"))], check=True,
                   cwd=Path(__file__).parents[1], timeout=60)


# Commands.


def test_zero_layers_alone_ask_no_driver(monkeypatch):
    monkeypatch.setenv("PYBMC_CUDA_KERNELS", os.devnull + "/none")
    for settings in ({"n_gpu_layers": 0}, {"gpu": "off", "stream_tokens": 5}, ALL | {"stream_tokens": 0},
                     {"stream_tokens": 5}):
        with pybmc.Model(tiny.model("llama"), threads=1, **settings) as model:
            assert not model.streams
    with pytest.raises(pybmc.DeviceError, match="built without kernels"):
        pybmc.Model(tiny.model("llama"), threads=1, gpu=0, n_gpu_layers=0)


@pytest.mark.parametrize("value", [-1, 1.5, "all", True])
def test_numbers_that_mean_nothing(value):
    with pytest.raises(pybmc.ArgumentError, match="stream_tokens: expected a whole number"):
        pybmc.Model(tiny.model("llama"), threads=1, gpu=0, stream_tokens=value)


def test_prove_sends_layers_of_the_cpu_through_the_gpu(capsys, fake):
    path = tiny.model("llama", types="Q8_0")
    with pybmc.Model(path, threads=1) as model, pybmc.Model(path, threads=1, **ALL) as other:
        found = [f for f in prove(model, ["abc"], 12, gpu=other) if f.drafts == ON_GPU]
    assert len(found) == 2 and all(f.difference is None and f.rows >= 25 for f in found)
    changed = tiny.model("llama", types="Q8_0", seed=7)
    with pybmc.Model(path, threads=1) as model, pybmc.Model(changed, threads=1, **ALL) as other:
        assert next(prove(model, ["abc"], 8, temperatures=(0.0,), gpu=other)).difference is not None
    command = ["prove", str(path), "-n", "16", "-p", "the mill", "--temp", "0", "-t", "1",
               "--gpu", "0", "-ngl", "0"]
    assert launched(fake, lambda: run(command)) > 0
    out = capsys.readouterr().out
    assert ON_GPU in out and "proven" in out
    assert run([*command, "--stream-tokens", "0"]) == 1
    assert "there is nothing to compare" in capsys.readouterr().err


def test_commands(capsys, fake):
    plain = ["generate", str(tiny.model("llama", types="Q8_0")), "-p", "the mill and the mill " * 20,
             "-n", "4", "--temp", "0", "-t", "1"]
    assert run(plain) == 0
    text = capsys.readouterr().out
    none = ["--gpu", "0", "-ngl", "0"]
    for more, there in (none, True), ([*none, "--stream-tokens", "500"], False), (["-ngl", "1"], True):
        assert bool(launched(fake, lambda more=more: run([*plain, *more]))) is there
        assert capsys.readouterr().out == text
    assert run([*plain, "--stream-tokens", "-1"]) == 2


def test_show_counts_their_memory(capsys, fake):
    path = tiny.model("llama", n_layers=24, hidden_dim=320)
    with pybmc.Model(path, threads=1) as model:
        part = plan(model._handle, 3)
    with fake.set(memory=int(part.bytes(model.config.n_ctx) / 0.95) + 2):
        assert run(["show", str(path), "--gpu", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["gpus"][0]
        assert run(["show", str(path), "--gpu"]) == 0
    assert (found["layers_that_fit"], found["stream_bytes"]) == (3, part.stream_bytes)
    assert "of it for prompts over the other layers" in capsys.readouterr().out


def test_llama_class(fake):
    path = str(tiny.model("llama", n_layers=3))
    for settings, streams in (({"n_gpu_layers": 1}, True), ({"n_gpu_layers": 1, "op_offload": False}, False),
                              ({}, False)):
        with pybmc.Llama(path, verbose=False, **settings) as llama:
            assert llama._model.streams is streams
