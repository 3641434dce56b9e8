"""Layers on a GPU, by a driver that runs the kernels on the CPU: the same bits, growth, failures, graphs, and
what the commands say."""

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
from gpu import assert_same, fake_driver, nothing_is_left, tokens  # noqa: F401
from test_draft_head import path as head_path

import pybmc
from pybmc.cli import run
from pybmc.engine.engine import Engine
from pybmc.engine.gpu import gpus
from pybmc.engine.perplexity import perplexity
from pybmc.engine.prove import ON_GPU, prove
from pybmc.engine.request import Request

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.gguf"))
WIDTHS = (1, 2, 5, 17)                  # of passes: the kinds of product kernels but for the widest


def passes(model, widths=WIDTHS, rows="auto"):
    """Logits of passes of these widths, one after the other, and of one whose last token alone is wanted."""
    with model.session(rows=rows) as session:
        found = [session.eval(tokens(n, seed=n), "all") for n in widths]
        return np.concatenate([*found, session.eval(tokens(24), "last")[None]])


def write(engine, request):
    """What an engine writes, and how many guesses were checked."""
    sequence, found = engine.add(request), []
    while not sequence.done:
        found += [token.id for _, token in engine.step()]
    assert sequence.error is None
    return found, sequence.stats.draft_n


# The same bits.


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_models_have_the_same_bits(path):
    with pybmc.Model(path, threads=2) as model:
        right = passes(model, (1, 5, 9))
    with pybmc.Model(path, threads=2, n_gpu_layers=-1) as model:
        assert_same(passes(model, (1, 5, 9)), right)
        assert model.gpu_layers == model.config.n_layers


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_a_split_after_every_layer(arch):
    path = tiny.model(arch, n_layers=3)
    with pybmc.Model(path, threads=2) as model:
        right = passes(model)
    for layers in (1, 2, 3):
        with pybmc.Model(path, threads=2, n_gpu_layers=layers) as model:
            assert model.gpu_layers == layers
            assert_same(passes(model), right)


@pytest.mark.parametrize("major, order", [(6, 0), (6, 1), (9, 12345)])
def test_chips_and_orders_of_threads(order, major, fake):
    """Without 8-bit matrices the narrow kernels take all widths; blocks and threads run in any order."""
    path = tiny.model("llama", types="Q4_K", dim=256, head_dim=32)
    with pybmc.Model(path, threads=1) as model:
        right = passes(model)
    with fake.set(order=order, major=major), pybmc.Model(path, threads=1, n_gpu_layers=-1) as model:
        assert_same(passes(model), right)


def test_a_prompt_of_several_passes():
    path = tiny.model("llama")
    with pybmc.Model(path, threads=2) as model, model.session(context=1024) as session:
        right = session.eval(tokens(600), "last"), session.eval(tokens(3), "all")
    with pybmc.Model(path, threads=2, n_gpu_layers=1) as model, model.session(context=1024) as session:
        assert_same(session.eval(tokens(600), "last"), right[0])
        assert_same(session.eval(tokens(3), "all"), right[1])


def test_sessions_of_one_pass(fake):
    path = tiny.model("gemma3")
    texts = [tokens(n, seed=n) for n in (3, 1, 20, 7)]
    found = []
    for layers in (0, -1):
        with pybmc.Model(path, threads=2, n_gpu_layers=layers) as model:
            sessions = [model.session(rows=16) for _ in texts]
            rows = []
            for _ in range(2):
                rows += pybmc.eval_batch([(session, text, "all") for session, text in zip(sessions, texts)])
            found.append(np.concatenate(rows))
            for session in sessions:
                session.close()
    assert_same(found[1], found[0])


def test_forks_and_rewinds_share_rows_on_the_gpu():
    path = tiny.model("llama")
    found = []
    for layers in (0, 1):
        with pybmc.Model(path, threads=1, n_gpu_layers=layers) as model, model.session(rows=16) as session:
            session.eval(tokens(40), "none")
            with session.fork(37) as fork:
                rows = [fork.eval(tokens(5, 1), "all"), session.eval(tokens(4, 2), "all")]
                session.rewind(10)
                rows += [session.eval(tokens(8, 3), "all"), fork.eval(tokens(3, 4), "all")]
            found.append(np.concatenate(rows))
    assert_same(found[1], found[0])


def test_generation_is_the_same_text():
    path = tiny.model("llama")
    texts = []
    for layers in (0, 2):
        with pybmc.Model(path, threads=2, n_gpu_layers=layers) as model:
            stream = pybmc.generate(model, "the mill and the mill", max_tokens=40, seed=3, temperature=0.7)
            texts.append([(token.id, token.logprob) for token in stream])
    assert texts[0] == texts[1]


def test_perplexity_is_the_same():
    found = []
    for layers in (0, 2):
        with pybmc.Model(tiny.model("llama"), threads=2, n_gpu_layers=layers) as model:
            found.append(perplexity(model, tiny.TEXT, 40).ppl)
    assert found[0] == found[1]


@pytest.mark.parametrize("arch", ["llama", *tiny_encoders.ARCHITECTURES])
def test_hidden_states_and_encoders(arch):
    path = tiny.model(arch) if arch == "llama" else tiny_encoders.model(arch)
    found = []
    for layers in (0, -1):
        with pybmc.Model(path, threads=2, n_gpu_layers=layers) as model:
            found.append(model.embed([[5, 6, 7, 8], list(range(20, 60))], pooling="mean"))
            assert model.gpu_layers == -layers * model.config.n_layers
    assert_same(found[1], found[0])


@pytest.mark.parametrize("layers", [1, 2])
def test_a_draft_head_goes_with_its_model(layers):
    """Its output matrix is the model's, and its guesses are those of the CPU."""
    path, texts = head_path("qwen3"), []
    for n in (0, layers):
        with pybmc.Model(path, threads=1, n_gpu_layers=n) as model:
            speculation = pybmc.Speculation(model, None, spec="mtp", fixed=3)
            with Engine(model, speculation=speculation, parallel=1) as engine:
                texts.append(write(engine, Request(tokens(12).tolist(), 16, pybmc.Sampler(temperature=0))))
            assert model.gpu_layers == n
    assert texts[0] == texts[1] and texts[0][1] > 0


@pytest.mark.parametrize("name", tiny_kinds.NAMES)
def test_each_kind_of_block(name):
    path = tiny.model(name) if name in tiny.RECURRENT else tiny_kinds.model(name)
    with pybmc.Model(path, threads=1) as model:
        right = passes(model, (3, 1))
    with pybmc.Model(path, threads=1, n_gpu_layers=-1) as model:
        assert_same(passes(model, (3, 1)), right)
        assert model.gpu_layers == model.config.n_layers


def with_late_experts(path, layers):
    """A model on a GPU with too little memory for the experts of the layers that stay on the CPU."""
    with pybmc.Model(path, threads=1, memory=float("inf")) as model:
        total = model.packed_bytes
    for memory in range(0, total, total // 40):
        model = pybmc.Model(path, threads=1, memory=memory, n_gpu_layers=layers)
        if model.experts and model.experts.room < model.experts.total:
            return model
        model.close()
    raise AssertionError("no experts are late")


@pytest.mark.parametrize("name", ["experts", "MLA", "latent experts"])
def test_late_experts_beside_layers_on_the_gpu(name):
    path = tiny_kinds.model(name)
    with pybmc.Model(path, threads=1, memory=float("inf")) as model:
        right, n_layers = passes(model), model.config.n_layers
    with with_late_experts(path, 0) as model:
        total = model.experts.total
    with with_late_experts(path, 1) as model:
        assert model.gpu_layers == 1 and 0 < model.experts.total < total
        assert_same(passes(model), right)
        assert model.experts.made > 0
    for settings in ({"memory": 0}, {"repack": False}):
        with pybmc.Model(path, threads=1, n_gpu_layers=n_layers, **settings) as model:
            assert model.gpu_layers == n_layers and model.experts is None
            assert_same(passes(model), right)


def test_memory_is_for_the_weights_that_stay_on_the_cpu(caplog):
    with pybmc.Model(tiny.model("llama"), threads=1, memory=0, n_gpu_layers=-1) as model:
        assert model.packed_bytes > 0
    assert "room for" not in caplog.text


@pytest.mark.parametrize("arch", ["qwen35", "lfm2", "falcon-h1"])
def test_states_on_the_gpu_go_back_and_fork(arch):
    """By their log, by a snapshot, and to the beginning; with some of them, and with all, on the GPU."""
    path, found = tiny.model(arch), []
    for layers in (0, 1, -1):
        with pybmc.Model(path, threads=1, n_gpu_layers=layers) as model, model.session() as session:
            rows = [session.eval(tokens(20), "all")]
            session.snapshot()
            rows += [session.eval(tokens(6, 1), "all")]
            session.rewind(22)
            rows += [session.eval(tokens(1, i), "all") for i in range(3)]
            with session.fork(21) as fork:
                rows += [fork.eval(tokens(60, 2), "last")[None], session.eval(tokens(60, 3), "last")[None]]
                session.rewind(24)
                fork.rewind(20)
                rows += [fork.eval(tokens(3, 4), "all"), session.eval(tokens(3, 5), "all")]
            session.rewind(5)
            rows += [session.eval(tokens(2, 6), "all")]
            found.append(np.concatenate(rows))
            assert model.gpu_layers == (layers if layers >= 0 else model.config.n_layers)
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


def test_a_model_left_in_its_file_goes_to_the_gpu_too():
    path = tiny.model("llama", n_layers=3)
    with pybmc.Model(path, threads=2) as model:
        right = passes(model)
    with pybmc.Model(path, threads=2, repack=False, n_gpu_layers=2) as model:
        assert_same(passes(model), right)


# The arena.


@pytest.mark.parametrize("maps", [0, 1])
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_rows_grow_where_they_stand(arch, maps, fake):
    """By memory that is mapped, and by allocations where the GPU cannot map."""
    path = tiny.model(arch)
    with pybmc.Model(path, threads=1) as model:
        right = passes(model, (1,) * 18, rows=16)
    with fake.set(maps=maps), pybmc.Model(path, threads=1, n_gpu_layers=-1) as model:
        passes(model)                       # room for what passes bring with them stays
        before = fake["bytes"]
        with model.session(rows=16) as session:
            session.eval(tokens(1), "none")
            first = fake["bytes"] - before
            session.eval(tokens(40), "none")
            assert fake["bytes"] - before >= 3 * first > 0
        assert fake["bytes"] == before
        assert_same(passes(model, (1,) * 18, rows=16), right)


def test_no_memory_for_rows_is_no_harm(fake):
    path = tiny.model("llama")
    with pybmc.Model(path, threads=1, n_gpu_layers=-1) as model, model.session(rows=16) as session:
        right = session.eval(tokens(8), "all")
        why = "no memory for 48 rows of keys and values"
        with fake.set(memory=fake["bytes"]), pytest.raises(pybmc.OutOfMemoryError, match=why):
            session.eval(tokens(40), "last")
        assert session.position == 8 and session.rows == 16
        session.rewind(0)
        assert_same(session.eval(tokens(8), "all"), right)


@pytest.mark.parametrize("maps, calls", [(1, 5), (0, 3)])
def test_memory_that_the_gpu_fails_to_give_is_no_lack_of_it(maps, calls, fake):
    """For rows: current context, addresses, memory, its place, access (or an allocation), zeros."""
    path = tiny.model("llama")
    with fake.set(maps=maps), pybmc.Model(path, threads=1, n_gpu_layers=-1) as model:
        for nth in range(1, calls + 1):
            for code, failure in (999, pybmc.DeviceError), (2, pybmc.OutOfMemoryError):
                if nth == 1 and code == 2:
                    continue            # setting the context takes no memory
                with model.session(rows=16) as session, fake.set(fail_in=nth, fail_code=code), \
                        pytest.raises(failure, match="GPU 0: " if code == 999 else "no memory for 48 rows"):
                    session.reserve(40)


def test_a_request_that_the_gpu_has_no_memory_for_says_so(fake):
    """And names no bound that has room left."""
    with pybmc.Model(tiny.model("llama"), threads=1, n_gpu_layers=-1) as model:
        with Engine(model, parallel=1, memory=1e9, spec="off") as engine, fake.set(memory=fake["bytes"]):
            sequence = engine.add(Request(tokens(9).tolist(), 4, pybmc.Sampler(temperature=0)))
            while not sequence.done:
                try:
                    engine.step()
                except pybmc.OutOfMemoryError:
                    assert engine.relieve()
            assert str(sequence.error) == "9 tokens fill the memory that is left"


def test_no_memory_for_a_model_is_a_sentence(fake):
    why = r"GPU 0: \d+ MB for buffers: out of memory"
    with fake.set(memory=1 << 20), pytest.raises(pybmc.OutOfMemoryError, match=why):
        pybmc.Model(tiny.model("llama"), threads=1, n_gpu_layers=-1)


# Failures.


def test_each_call_that_fails_is_a_sentence_and_moves_nothing(fake):
    """Of loading and of passes, but for calls that give something back."""
    path, settings = tiny.model("llama"), dict(threads=1, n_gpu_layers=1, stream_tokens=0)
    with pybmc.Model(path, threads=1) as model, model.session() as session:
        right = session.eval(tokens(6), "all")
    seen = set()
    for nth in range(1, 1000):
        fake["fail_in"] = nth
        try:
            with pybmc.Model(path, **settings) as model, model.session() as session:
                at = 0
                for n in (3, 1, 1, 1):
                    at = session.position
                    try:
                        session.eval(tokens(6)[at:at + n], "last")
                    except pybmc.BmcError:
                        assert session.position == at
                        session.eval(tokens(6)[at:at + n], "last")
                        raise
                assert fake["fail_in"] > 0, f"{fake.failed} failed, and nobody said so"
                fake["fail_in"] = 0
                break
        except (pybmc.DeviceError, pybmc.OutOfMemoryError) as error:
            assert str(error).startswith(("GPU 0: ", "no GPU can be used", "no memory for ")), error
            seen.add(fake.failed)
        finally:
            fake["fail_in"] = 0
        assert (fake["alive"], fake["bytes"]) == (0, 0), f"after call {nth}, {fake.failed}"
    assert {
        "cuLaunchKernel", "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuStreamSynchronize",
        "cuMemAlloc_v2", "cuMemHostAlloc", "cuMemCreate", "cuModuleGetFunction", "cuGraphLaunch",
        "cuStreamEndCapture", "cuGraphInstantiateWithFlags"
    } <= seen
    with pybmc.Model(path, **settings) as model, model.session() as session:
        assert_same(session.eval(tokens(6), "all"), right)


def test_states_on_the_gpu_go_back_to_a_snapshot_when_it_fails(fake):
    path = tiny.model("qwen35")
    with pybmc.Model(path, threads=1) as model, model.session() as session:
        session.eval(tokens(30), "none")
        right = session.eval(tokens(5, 1), "all")
    with pybmc.Model(path, threads=1, n_gpu_layers=-1) as model, model.session() as session:
        session.eval(tokens(20), "none")
        session.snapshot()
        session.eval(tokens(30)[20:], "none")
        with fake.set(fail_in=9), pytest.raises(pybmc.DeviceError):
            session.eval(tokens(5, 2), "all")
        at = session.position
        assert at in (0, 20)
        session.eval(tokens(30)[at:], "none")
        assert_same(session.eval(tokens(5, 1), "all"), right)


def test_states_before_a_pass_that_failed_come_back(fake):
    """A recurrent layer on the CPU has gone on when the GPU after it fails."""
    path = tiny.model("qwen35", n_layers=2)
    with pybmc.Model(path, threads=1) as model, model.session() as session:
        session.eval(tokens(60), "none")
        right = session.eval(tokens(5, 1), "all")
    with pybmc.Model(path, threads=1, n_gpu_layers=1) as model, model.session() as session:
        assert model.gpu_layers == 1
        session.eval(tokens(60), "none")
        with fake.set(fail_in=6), pytest.raises(pybmc.DeviceError):
            session.eval(tokens(5, 2), "all")
        assert session.position == 60
        assert_same(session.eval(tokens(5, 1), "all"), right)


FORKED = """
import os, sys
import pybmc
model = pybmc.Model(sys.argv[1], threads=1, n_gpu_layers=1)
session = model.session()
session.eval([1, 2, 3], "last")
if os.fork() == 0:
    try:
        session.eval([4], "last")
        os._exit(1)
    except pybmc.DeviceError as error:
        assert "forked process" in str(error), error
        session.close()
        model.close()
        os._exit(0)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
session.eval([4], "last")
"""


def test_a_forked_process_is_told():
    subprocess.run([sys.executable, "-c", FORKED, str(tiny.model("llama"))], check=True,
                   cwd=Path(__file__).parents[1], timeout=60)


def no_driver(tmp_path, *arguments, driver="none.so"):
    env = os.environ | {"PYBMC_CUDA_DRIVER": str(tmp_path / driver)}
    return subprocess.run([sys.executable, "-m", "pybmc", *map(str, arguments)], capture_output=True,
                          text=True, env=env, timeout=60, cwd=Path(__file__).parents[1])


def test_without_a_driver(tmp_path):
    """One sentence where a GPU is asked for; none at all where it is left to pybmc."""
    path = tiny.model("llama")
    asked = no_driver(tmp_path, "generate", path, "-p", "a", "-n", 2, "-ngl", 1)
    assert asked.returncode == 1 and asked.stdout == ""
    assert asked.stderr.count("\n") == 1
    assert "no GPU can be used" in asked.stderr and "none.so" in asked.stderr
    assert no_driver(tmp_path, "generate", path, "-p", "a", "-n", 2, "--gpu", "auto").returncode == 0
    (tmp_path / "other.so").write_bytes(b"no library")
    assert "no GPU can be used" in no_driver(tmp_path, "show", path, "--gpu", driver="other.so").stderr


# Graphs.


def test_graphs_are_used_until_rows_are_added(fake):
    path = tiny.model("llama")
    with pybmc.Model(path, threads=1) as model, model.session(rows=16) as session:
        right = np.concatenate([session.eval(tokens(1, i), "all") for i in range(40)])
    with pybmc.Model(path, threads=1, n_gpu_layers=-1) as model, model.session(rows=32) as session:
        graphs, launches = fake["graphs"], fake["graph_launches"]
        ours = np.concatenate([session.eval(tokens(1, i), "all") for i in range(40)])
        assert fake["graph_launches"] - launches >= 34
        assert 1 <= fake["graphs"] - graphs <= 2
    assert_same(ours, right)


def test_long_passes_are_no_graphs(fake):
    path = tiny.model("llama")
    with pybmc.Model(path, threads=1, n_gpu_layers=-1) as model, model.session(rows=256) as session:
        before = fake["graphs"]
        for i in range(4):
            session.eval(tokens(20, i), "last")
        assert fake["graphs"] == before


# Choices and commands.


def test_the_gpu_says_what_it_is():
    found = gpus()
    assert [(g.index, g.name, g.capability) for g in found] == [(0, "CPU grid", "9.0")]
    assert 0 < found[0].available <= found[0].memory


@pytest.mark.parametrize("settings, layers", [
    ({}, 0), ({"gpu": "off", "n_gpu_layers": 2}, 0), ({"n_gpu_layers": 0}, 0), ({"n_gpu_layers": 99}, 2),
    ({"gpu": 0}, 2), ({"gpu": "auto"}, 2),
    ({"gpu": 0, "n_gpu_layers": 1}, 1), ({"n_gpu_layers": "auto"}, 2), ({"gpu": 0, "n_gpu_layers": 0}, 0),
], ids=str)
def test_how_many_layers(settings, layers):
    with pybmc.Model(tiny.model("llama"), threads=1, **settings) as model:
        assert model.gpu_layers == layers


def test_auto_takes_what_fits(fake):
    path = tiny.model("llama", n_layers=3)
    with fake.set(memory=1 << 20), pybmc.Model(path, threads=1, gpu="auto") as model:
        assert model.gpu_layers == 0


@pytest.mark.parametrize("settings, what", [
    ({"gpu": 1}, "GPU: expected 0 to 0, found 1"), ({"gpu": -1}, "gpu"), ({"gpu": "one"}, "gpu"),
    ({"n_gpu_layers": "all"}, "n_gpu_layers"),
    ({"n_gpu_layers": -2}, "n_gpu_layers"), ({"n_gpu_layers": 1.5}, "n_gpu_layers"),
], ids=str)
def test_choices_that_mean_nothing(settings, what):
    with pytest.raises((pybmc.ArgumentError, pybmc.DeviceError), match=what):
        pybmc.Model(tiny.model("llama"), threads=1, **settings)


def test_without_kernels(monkeypatch, tmp_path):
    monkeypatch.setenv("PYBMC_CUDA_KERNELS", str(tmp_path / "none.fatbin"))
    why = "built without kernels for GPUs: .*none.fatbin is missing; make CUDA=1 makes it"
    with pytest.raises(pybmc.DeviceError, match=why):
        pybmc.Model(tiny.model("llama"), threads=1, n_gpu_layers=1)
    with pybmc.Model(tiny.model("llama"), threads=1, gpu="auto") as model:
        assert model.gpu_layers == 0


def test_prove_compares_the_machines(capsys):
    path = tiny.model("llama")
    with pybmc.Model(path, threads=1) as model, pybmc.Model(path, threads=1, n_gpu_layers=1) as other:
        found = [f for f in prove(model, ["abc"], 12, gpu=other) if f.drafts == ON_GPU]
    assert len(found) == 2 and all(f.difference is None and f.rows >= 12 for f in found)
    assert run(["prove", str(path), "-n", "4", "-p", "the mill", "--temp", "0", "-t", "1", "-ngl", "1"]) == 0
    out = capsys.readouterr().out
    assert ON_GPU in out and "proven" in out


def test_prove_finds_another_bit_on_the_gpu():
    path, changed = tiny.model("llama"), tiny.model("llama", seed=7)
    with pybmc.Model(path, threads=1) as model, pybmc.Model(changed, threads=1, n_gpu_layers=1) as other:
        found = next(prove(model, ["abc"], 8, temperatures=(0.0,), gpu=other))
    assert found.drafts == ON_GPU and found.difference is not None


def test_commands(capsys):
    path, draft = str(tiny.model("llama")), str(tiny.model("llama", seed=1))
    plain = ["generate", path, "-p", "the mill", "-n", "8", "--temp", "0", "-t", "1"]
    assert run(plain) == 0
    text = capsys.readouterr().out
    for more in (["-ngl", "1"], ["--gpu", "0"], ["-ngl", "auto", "--draft", draft],
                 ["--draft", draft, "-ngld", "1"]):
        assert run([*plain, *more]) == 0
        assert capsys.readouterr().out == text
    assert run(["bench", path, "-ngl", "1", "-p", "4", "-n", "2", "-r", "1", "-t", "1", "--json"]) == 0
    assert {json.loads(line)["gpu_layers"] for line in capsys.readouterr().out.splitlines()} == {1}
    assert run([*plain, "-ngl", "x"]) == 2
    assert run([*plain, "--gpu", "7"]) == 1
    assert "GPU: expected 0 to 0, found 7" in capsys.readouterr().err


def test_show_says_what_fits(capsys):
    path = str(tiny.model("llama"))
    assert run(["show", path, "--gpu"]) == 0
    out = capsys.readouterr().out
    assert "GPU 0" in out and "2 of 2 layers can run there" in out and "2 fit" in out
    assert run(["show", path, "--gpu", "--json"]) == 0
    gpu = json.loads(capsys.readouterr().out)["gpus"][0]
    assert gpu["layers_that_fit"] == 2 and gpu["memory_bytes"] == gpu["fitting_bytes"] > 0
    assert run(["show", path, "--json"]) == 0
    assert "gpus" not in json.loads(capsys.readouterr().out)


def test_llama_class(fake):
    with pybmc.Llama(str(tiny.model("llama")), n_gpu_layers=-1, verbose=False) as llama:
        assert llama._model.gpu_layers == 2
        assert llama.create_completion("the mill", max_tokens=3, temperature=0)["choices"][0]["text"]
