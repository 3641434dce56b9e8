"""Inputs of each layer, AltUp, LAuReL and sparse gates on a GPU, by the driver of tests/gpu.py: the CPU's
bits at every split, and which splits there are."""

import numpy as np
import places
import pytest
import tiny
import tiny_kinds
from gpu import assert_same, fake_driver, nothing_is_left, tokens  # noqa: F401
from test_gpu import passes

import pybmc

MODELS = {"per-layer inputs": 4, "AltUp": 4}    # the fewest last layers that read no others' keys and values


def splits(path):
    """The model with each number of its layers asked for on the GPU, beginning with none."""
    with pybmc.Model(path, threads=1) as model:
        n_layers = model.config.n_layers
    for layers in range(n_layers + 1):
        with pybmc.Model(path, threads=1, n_gpu_layers=layers) as model:
            yield model


@pytest.mark.parametrize("types", ["F16", "Q8_0"])
@pytest.mark.parametrize("name", MODELS)
def test_a_split_before_every_layer(name, types, caplog):
    right, went = None, []
    for model in splits(tiny_kinds.model(name, types)):
        if not went or model.gpu_layers:
            ours = passes(model, (1, 9) if types == "Q8_0" else (3,))
            right = ours if right is None else right
            assert_same(ours, right)
        went.append(model.gpu_layers)
    assert went == [n if n >= MODELS[name] else 0 for n in range(len(went))]
    assert f"both go there with {MODELS[name]} layers or more" in caplog.text


@pytest.mark.parametrize("name", ["gemma3n.F16", "gemma4.F16", "gemma4-moe.F16"])
def test_golden_models_at_every_split(name):
    found = [path for path in places.GOLDEN if path.stem == name]
    if not found:
        pytest.skip(f"needs {name}.gguf of ../shared")
    right, went = None, set()
    for model in splits(found[0]):
        if model.gpu_layers in went:
            continue
        ours = passes(model, (6,))
        right = ours if right is None else right
        assert_same(ours, right)
        went.add(model.gpu_layers)
    assert {0, model.config.n_layers} < went


@pytest.mark.parametrize("layers", [4, 5])
def test_sessions_of_one_pass(layers):
    path = tiny_kinds.model("AltUp")
    texts = [tokens(n, seed=n) for n in (3, 1, 20, 7)]
    found = []
    for n in (0, layers):
        with pybmc.Model(path, threads=1, n_gpu_layers=n) as model:
            sessions = [model.session(rows=16) for _ in texts]
            rows = []
            for _ in range(2):
                rows += pybmc.eval_batch([(s, text, "all") for s, text in zip(sessions, texts)])
            rows += pybmc.eval_batch([(s, text, "last") for s, text in zip(sessions, texts)])
            found.append(np.concatenate([np.atleast_2d(row) for row in rows]))
            for session in sessions:
                session.close()
            assert model.gpu_layers == n
    assert_same(found[1], found[0])


@pytest.mark.parametrize("layers", [4, 5])
def test_a_graph_takes_each_token_s_own_rows(layers, fake):  # noqa: F811
    path = tiny_kinds.model("AltUp")
    rows = []
    for n in (0, layers):
        before = fake["graph_launches"]
        with pybmc.Model(path, threads=1, n_gpu_layers=n) as model, model.session(rows=32) as session:
            rows.append(np.concatenate([session.eval(tokens(1, i), "all") for i in range(12)]))
        assert not n or fake["graph_launches"] - before >= 9
    assert_same(rows[1], rows[0])


@pytest.mark.parametrize("layers", [4, 5])
def test_a_pass_that_fails_is_a_sentence_and_moves_nothing(layers, fake):  # noqa: F811
    """Wherever it fails, what it brings with it among the calls."""
    path = tiny_kinds.model("AltUp")
    with pybmc.Model(path, threads=1, n_gpu_layers=layers) as model, model.session() as session:
        session.eval(tokens(4), "none")
        right, failed = session.eval(tokens(3, 1), "all"), []
        for nth in range(1, 100):
            session.rewind(4)
            with fake.set(fail_in=nth):
                try:
                    session.eval(tokens(3, 1), "all")
                    break
                except (pybmc.DeviceError, pybmc.OutOfMemoryError) as error:
                    assert str(error).startswith("GPU 0: ")
            failed.append(fake.failed)
            assert session.position == 4
            assert_same(session.eval(tokens(3, 1), "all"), right)
        # tokens, x, per-layer rows, and versions that the CPU kept
        assert failed.count("cuMemcpyHtoDAsync_v2") == (4 if layers == 4 else 3)


def test_experts_of_several_types_stay_on_the_cpu(tmp_path, caplog):
    """Files with a tensor for each expert could have them."""
    metadata, tensors = tiny_kinds.parts("experts")
    own = {}
    for name, (type, data) in tensors.items():
        if name.startswith("blk.0.ffn_") and "_exps" in name:
            for i, each in enumerate(data):
                values = each.view(np.float16).astype(np.float32).view(np.uint8) if i == 1 else each
                own[name.replace("_exps", f".{i}")] = ("F32" if i == 1 else type, values)
        else:
            own[name] = (type, data)
    right, went = None, []
    for model in splits(tiny.save(tmp_path / "split.gguf", metadata, own)):
        ours = passes(model, (5,))
        right = ours if right is None else right
        assert_same(ours, right)
        went.append(model.gpu_layers)
    assert went == [*range(len(went) - 1), len(went) - 2]
    assert "layer 0 has experts of several types, which pybmc computes on the CPU" in caplog.text
    with pybmc.Model(tiny_kinds.model("experts"), threads=1) as model:
        assert_same(passes(model, (5,)), right)
