"""The proof: it holds for an engine that keeps its promise, and finds one that does not."""

import json

import numpy as np
import pytest
import tiny
from places import GOLDEN

import pybmc
from pybmc.cli import run
from pybmc.engine import prove as prove_module
from pybmc.engine.prove import KINDS, prove
from pybmc.spec.pair import PairError


@pytest.fixture(scope="module")
def model():
    with pybmc.Model(tiny.model("llama"), threads=1) as model:
        yield model


def test_a_steady_engine_is_proven(model):
    with pybmc.Model(tiny.model("llama", types="Q4_0"), threads=1) as draft:
        found = list(prove(model, ["abc", "xyz"], 30, draft))
    assert len(found) == 2 * 2 * sum("head" not in kind for kind in KINDS)
    assert all(f.difference is None and f.tokens == 30 for f in found)
    rehearsed = [f for f in found if f.drafts == "rehearsed"]
    assert all(f.rows >= 30 and f.accepted < f.drafted for f in rehearsed)
    assert all(f.drafted > 0 for f in found if f.drafts == "draft of 5")


@pytest.mark.parametrize("by", [0.0, 1.0])
def test_one_bit_is_found(model, monkeypatch, by):
    """Logits that depend on what shares a pass, by a lot or only in the last bit."""
    honest = pybmc.Session.eval

    def unsteady(self, tokens, logits="last", last=0, sampler=None):
        rows = honest(self, tokens, logits, last, sampler)
        steady = logits != "all" or len(tokens) < 5
        return rows if steady else np.nextafter(rows, np.float32(9)) + np.float32(by)

    monkeypatch.setattr(pybmc.Session, "eval", unsteady)
    difference = next(prove(model, ["abc"], 40, temperatures=(0.0,))).difference
    assert difference.what == "logits" and difference.position > 3 and difference.gap > 0
    assert difference.largest == pytest.approx(max(by, 1e-7), rel=10)


def test_another_text_is_found(model, monkeypatch):
    """A verification of many guesses that chooses something else."""
    honest = prove_module.verify

    def turned(session, pending, guesses, *more):
        ids, *rest = honest(session, pending, guesses, *more)
        return [*ids[:-1], (ids[-1] + 1) % 256] if len(guesses) > 3 else ids, *rest

    monkeypatch.setattr(prove_module, "verify", turned)
    difference = next(prove(model, ["abc"], 40, temperatures=(0.0,))).difference
    assert difference.what in ("id", "logprob") and difference.plain >= 0


def test_a_draft_that_does_not_go_with_the_model_is_refused(model, tmp_path):
    metadata, tensors = tiny.parts("llama")
    path = tiny.save(tmp_path / "bare.gguf", {k: v for k, v in metadata.items()
                                              if not k.startswith("tokenizer")}, tensors)
    with pybmc.Model(path, threads=1) as bare, pytest.raises(PairError):
        next(prove(model, ["abc"], 4, bare))


@pytest.fixture(scope="module")
def path():
    return str(tiny.model("llama"))


def test_the_command_says_so(path, capsys):
    draft = str(tiny.model("llama", seed=1))
    assert run(["prove", path, "--draft", draft, "-n", "8", "-p", "the mill", "-t", "1"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 9 and all(line.endswith(": equal") for line in out[:8])
    assert out[-1].startswith("proven: 64 tokens")
    assert run(["prove", path, "-n", "6", "--temp", "0", "--json", "-t", "1"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kinds = [(i, kind) for i in range(4) for kind in ("rehearsed", "repetitions")]
    assert [(line["prompt"], line["drafts"]) for line in lines] == kinds
    assert all(line["equal"] and line["difference"] is None for line in lines)
    assert all(line["rows"] >= 6 for line in lines[::2])


def test_a_difference_is_exit_status_3(path, capsys, monkeypatch):
    honest = pybmc.Session.eval

    def eval(self, tokens, logits="last", last=0, sampler=None):
        found = honest(self, tokens, logits, last, sampler)
        return np.nextafter(found, np.float32(99)) if logits == "all" else found

    monkeypatch.setattr(pybmc.Session, "eval", eval)
    assert run(["prove", path, "-n", "8", "-p", "the mill", "--temp", "0", "-t", "1"]) == 3
    out = capsys.readouterr().out
    assert "logits differs at position" in out and "apart" in out and "not proven: 1 of 2" in out


@pytest.mark.parametrize("path", GOLDEN[:3], ids=lambda path: path.stem)
def test_golden_models_are_proven(path):
    with pybmc.Model(path, threads=2) as model:
        assert all(f.difference is None for f in prove(model, max_tokens=12, draft=model))


def test_the_bundled_pair_is_proven():
    with pybmc.Model(pybmc.demo_model()) as model, pybmc.Model(pybmc.demo_model(draft=True)) as draft:
        assert all(f.difference is None for f in prove(model, max_tokens=24, draft=draft))
