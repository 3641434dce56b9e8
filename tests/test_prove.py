"""The proof: it holds for an engine that keeps its promise, and finds one that does not."""

import json

import numpy as np
import pytest
import tiny
from fakes import FakeModel, FakeSession
from places import GOLDEN

import pybmc
from pybmc.cli import run
from pybmc.prove import prove


class Unsteady(FakeModel):
    """Its logits depend on what shares a pass: by a lot, or only in the last bit."""

    def __init__(self, by):
        super().__init__()
        self.by = by

    def session(self, context=None):
        session = FakeSession(self, context)
        plain = session.eval

        def eval(tokens, logits="last", last=0, sampler=None):
            if logits == "best":                            # what is chosen may be right where logits are not
                return plain(tokens, logits, last, sampler)
            rows = plain(tokens, logits)
            return rows if logits != "all" or len(tokens) < 5 else np.nextafter(rows, np.float32(9)) + np.float32(self.by)
        session.eval = eval
        return session


def test_a_steady_engine_is_proven():
    found = list(prove(FakeModel(), ["abc", "xyz"], 30))
    assert len(found) == 4 and all(f.difference is None and f.tokens == 30 for f in found)
    assert all(f.rows >= 30 for f in found) and sum(f.accepted < f.drafted for f in found) >= 2


@pytest.mark.parametrize("by", [0.0, 1.0])
def test_one_bit_is_found(by):
    found = list(prove(Unsteady(by), ["abc"], 40, temperatures=(0.0,)))
    difference = found[0].difference
    assert difference.what == "logits" and difference.position > 3 and difference.gap > 0
    assert difference.largest == pytest.approx(max(by, 1e-7), rel=10)


def test_another_text_is_found():
    model = Unsteady(0.0)
    model.session = lambda context=None: Turned(model, context)
    found = list(prove(model, ["abc"], 40, temperatures=(0.0,)))
    assert found[0].difference.what in ("id", "logprob") and found[0].difference.plain >= 0


class Turned(FakeSession):
    """Wide passes choose something else."""

    def eval(self, tokens, logits="last", last=0, sampler=None):
        result = super().eval(tokens, logits, last, sampler)
        if logits == "best" and len(tokens) > 3:
            result.ids[-1] = (result.ids[-1] + 1) % 256
        return result


@pytest.fixture(scope="module")
def path():
    return str(tiny.model("llama"))


def test_the_command_says_so(path, capsys):
    assert run(["prove", path, "--draft", str(tiny.model("llama", seed=1)), "-n", "8", "-p", "the mill", "-t", "1"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 7 and all(line.endswith(": equal") for line in out[:6]) and out[-1].startswith("proven: 48 tokens")
    assert run(["prove", path, "-n", "6", "--temp", "0", "--json", "-t", "1"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == [0, 1, 2, 3]
    assert all(line["equal"] and line["difference"] is None and line["rows"] >= 6 for line in lines)


def test_a_difference_is_exit_status_3(path, capsys, monkeypatch):
    honest = pybmc.Session.eval

    def eval(self, tokens, logits="last", last=0, sampler=None):
        found = honest(self, tokens, logits, last, sampler)
        return np.nextafter(found, np.float32(99)) if logits == "all" else found

    monkeypatch.setattr(pybmc.Session, "eval", eval)
    assert run(["prove", path, "-n", "8", "-p", "the mill", "--temp", "0", "-t", "1"]) == 3
    out = capsys.readouterr().out
    assert "logits differs at position" in out and "apart" in out and "not proven: 1 of 1" in out


@pytest.mark.parametrize("path", GOLDEN[:3], ids=lambda path: path.stem)
def test_golden_models_are_proven(path):
    with pybmc.Model(path, threads=2) as model:
        assert all(f.difference is None for f in prove(model, max_tokens=12, draft=model))


def test_the_bundled_pair_is_proven():
    with pybmc.Model(pybmc.demo_model()) as model, pybmc.Model(pybmc.demo_model(draft=True)) as draft:
        assert all(f.difference is None for f in prove(model, max_tokens=24, draft=draft))
