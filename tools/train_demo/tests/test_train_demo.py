"""The training of the bundled pair at toy size: all stages, and a pair that an engine can open.

    pip install -e '.[train,test]' && python -m pytest tools/train_demo/tests     (make test leaves them out)
"""

import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pybmc
from pybmc.engine.perplexity import token_losses
from pybmc.engine.sampler import Sampler
from tools.train_demo import choose, text
from tools.train_demo.distill import narrowed, told_rows
from tools.train_demo.evaluate import Rounds, runs
from tools.train_demo.export import read_gguf, read_tokenizer
from tools.train_demo.generate import CHAT
from tools.train_demo.model import Config, KVCache, Llama, attend_causal, blend, grow
from tools.train_demo.recipe import Schedule
from tools.train_demo.tokens import ask, pack
from tools.train_demo.train import Trainer, text_loss

ROOT = Path(__file__).resolve().parents[3]


def run(work, out, *more):
    command = [sys.executable, "-m", "tools.train_demo", "--smoke", "--work", str(work), "--out",
               str(out), *more]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """(work, out) of one smoke run."""
    work, out = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("out")
    done = run(work, out)
    assert done.returncode == 0, done.stderr[-2000:]
    return work, out


def test_smoke_run_leaves_a_pair_and_its_card(smoke):
    work, out = smoke
    vocabularies = []
    for name in ("teller.gguf", "teller-draft.gguf"):
        reader = gguf.GGUFReader(out / name)
        assert reader.get_field("general.architecture").contents() == "llama"
        assert ({t.tensor_type for t in reader.tensors if len(t.shape) == 2}
                == {gguf.GGMLQuantizationType.Q8_0})
        vocabularies.append([reader.get_field(f"tokenizer.ggml.{k}").contents()
                             for k in ("tokens", "merges", "token_type")])
    assert vocabularies[0] == vocabularies[1]
    assert "## Ten tales" in (out / "README.md").read_text()


def test_smoke_run_learns_and_drafts(smoke):
    results = json.loads((smoke[0] / "results.json").read_text())
    assert results["target_heldout"]["nats_per_token"] < 4.5    # a uniform guess over 512 tokens costs 6.2
    assert 0 < results["greedy"]["rate"] <= 1
    by_position = results["greedy"]["by_position"]
    assert by_position == sorted(by_position, reverse=True)


def test_a_second_run_trains_nothing(smoke):
    work, out = smoke
    before = (work / "target.pt").stat().st_mtime_ns
    again = run(work, out, "--stage", "target")
    assert again.returncode == 0 and (work / "target.pt").stat().st_mtime_ns == before


def test_a_run_goes_on_from_the_pair_of_another(smoke, tmp_path):
    first = json.loads((smoke[1] / "results.json").read_text())
    done = run(tmp_path, tmp_path, "--from", str(smoke[1]), "--seed", "8", "--more-seconds", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["target"] == first["target"] and results["more"]["tokens"] > first["more"]["tokens"]
    # two seconds from nothing end near a uniform guess's 6.2
    assert results["target_heldout"]["nats_per_token"] < 4.5
    vocabularies = [(folder / "tokenizer.json").read_text() for folder in (smoke[0], tmp_path)]
    assert json.loads(vocabularies[0])["model"] == json.loads(vocabularies[1])["model"]


def test_a_folder_without_a_pair_is_refused(tmp_path):
    (tmp_path / "teller.gguf").touch()
    done = run(tmp_path / "work", tmp_path / "out", "--from", str(tmp_path))
    assert done.returncode == 2 and "lacks teller-draft.gguf, results.json" in done.stderr
    assert not (tmp_path / "work").exists()


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Llama(Config(vocab_size=100, dim=64, hidden_dim=128, head_dim=32, n_layers=2, n_heads=4,
                         n_kv_heads=2, n_ctx=32))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def test_growing_changes_nothing_yet(model):
    tokens = torch.arange(20)[None]
    assert torch.equal(grow(model).logits(tokens), model.logits(tokens))


@torch.inference_mode()
def test_a_cache_gives_the_same_logits(model):
    tokens, cache = torch.arange(20).repeat(2, 1), KVCache(model.config, 2, 20)
    parts = [model.logits(tokens[:, a:b], cache) for a, b in ((0, 7), (7, 8), (8, 9), (9, 20))]
    torch.testing.assert_close(torch.cat(parts, 1), model.logits(tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("n_tok", [1, 3, 5, 64, 127])
def test_attention_in_blocks_is_torchs_own(n_tok):
    torch.manual_seed(n_tok)
    q, k, v = (torch.randn(3, heads, n_tok, 16, requires_grad=True) for heads in (6, 2, 2))
    ours = attend_causal(q, k, v)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    weights = torch.randn_like(ours)
    for a, b in zip((ours, *torch.autograd.grad(ours, (q, k, v), weights)),
                    (theirs, *torch.autograd.grad(theirs, (q, k, v), weights))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_blend_lies_between(model):
    other = grow(model)
    torch.nn.init.normal_(other.embed.weight)
    for share, like in ((0.0, grow(model)), (1.0, other)):
        for name, p in blend(grow(model), other, share).state_dict().items():
            torch.testing.assert_close(p, like.state_dict()[name])
    torch.testing.assert_close(blend(grow(model), other, 0.5).embed.weight,
                               (model.embed.weight + other.embed.weight) / 2)


def test_told_rows_carry_the_targets_choices(smoke):
    work, out = smoke
    target, rows = read_gguf(out / "teller.gguf"), told_rows(work)
    ids = rows["ids"][:4].astype("int64")
    with torch.inference_mode():
        logp = target.logits(torch.from_numpy(ids[:, :-1])).log_softmax(-1)
    theirs = torch.from_numpy(rows["top_logp"][:4].astype("float32"))
    # the engine's activations have 8 bits
    assert (logp.topk(theirs.shape[-1]).values - theirs).abs().mean() < 0.05
    told = np.load(work / "told-000.npz")               # greedy ones come first
    mine = told["own"] == 1
    assert mine.sum() > 100 and (told["ids"][:, 1:][mine] == told["top_ids"][..., 0][mine]).all()


def test_narrowed_chances_are_the_samplers():
    logits = torch.randn(5, 200, generator=torch.Generator().manual_seed(0)) * 2
    best = logits.log_softmax(-1).topk(48)
    ours = torch.zeros_like(logits).scatter_(-1, best.indices, narrowed(best.values))
    for seed in range(3):
        sampler = Sampler(**CHAT, seed=seed)
        for i, row in enumerate(logits.numpy()):
            for position in range(50):
                assert ours[i, sampler.sample(row, position)] > 0
    assert ((ours > 0).sum(-1) < 40).all() and torch.allclose(ours.sum(-1), torch.ones(5))


def test_subjects_are_what_a_tale_should_name():
    assert choose.subjects("Can you tell me a story about two ravens and Gerda?") == {"two", "raven", "gerda"}
    assert choose.subjects("Tell me a fairy tale.") == set()
    assert choose.share_named("Tell me of a king and a golden bird.", "The King had birds.") == 2 / 3
    assert choose.share_named("Tell me a tale.", "Once.") == 1


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 5))
def test_a_token_is_repeated_where_its_run_stood_before(ids, n):
    runs = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    assert (choose.repeated(ids, n)
            == [False] * (len(ids) - len(runs)) + [run in runs[:i] for i, run in enumerate(runs)])


def test_the_best_answer_is_named_sound_and_liked():
    told = {"ids of a cat": list(range(60)), "and a dog": list(range(100, 160)),
            "too short: a cat and a dog": [1] * 10, "a cat and a dog, round and round": [1, 2, 3, 4] * 20,
            "a cat, a dog": list(range(200, 260)), "the dog, the cat": list(range(300, 360)),
            "nothing": list(range(400, 460))}
    words = {tuple(ids): words for words, ids in told.items()}
    tokenizer = SimpleNamespace(decode=lambda ids: words[tuple(ids)])
    judge = lambda prompt, ids: -ids[0]
    best = lambda *named: next(choose.best_answers([("Tell me of a cat and a dog.", [7])],
                                                   [[told[n] for n in named]], 50, tokenizer, judge))
    assert best(*told) == told["a cat, a dog"]
    assert best("nothing", "too short: a cat and a dog", "a cat and a dog, round and round") is None
    assert best("nothing", "and a dog") is None         # half of what was asked is not enough


def test_the_judge_likes_what_belongs_together(smoke):
    with pybmc.Model(smoke[1] / "teller.gguf") as model:
        tokenizer = read_tokenizer(smoke[1] / "teller.gguf")
        judge = choose.Judge(model, tokenizer)
        prompt = tokenizer.encode(ask("Tell me of a king.")).ids
        told = next(choose.told_documents(smoke[0], "told", 0))[0].tolist()[-40:]
        exact = -token_losses(model.session().eval(prompt + told, logits="all")[len(prompt) - 1 : -1],
                              np.array(told))
        np.testing.assert_allclose(judge.log_p(prompt, told), exact)
        assert judge(prompt, told) > judge(prompt, told[::-1])


def test_circles_are_unlearned(smoke):
    documents = list(choose.told_documents(smoke[0], "circles0", 0))
    assert {mark for _, own in documents for mark in own.tolist()} == {0, -1}
    assert all(np.array(choose.repeated(ids.tolist(), choose.LOOP))[own == -1].all()
               for ids, own in documents)


@pytest.mark.parametrize("lead", [0.0, 5.0, 12.0])
def test_unlearning_moves_what_is_nearly_certain_too(lead):
    """The gradient of -log(1 - p) by the logits is p at the token itself, and negative at all others."""
    logits = torch.zeros(1, 3, 10)
    logits[0, 2, 8] = lead
    logits.requires_grad_()
    ids, learn = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0.0, 0.0, -1.0]])
    text_loss(SimpleNamespace(logits=lambda _: logits), False, False)(ids, learn).backward()
    assert logits.grad[0, 2, 8].item() == pytest.approx(logits.softmax(-1)[0, 2, 8].item(), rel=0.02)
    assert not logits.grad[0, :2].any() and (logits.grad[0, 2, :8] < 0).all()


def test_requests_are_made_of_the_passage():
    books = text.invented_books(seed=1)
    documents = text.chat_documents(books, seed=1, rounds=1.0, limit=400)
    asked = [(request, passage.lower()) for d in documents for request, passage in d.turns[:1]
             if "tell me of" in request.lower()]
    assert len(asked) > 20
    for request, passage in asked:
        named = request.lower().replace("tell me of", "").rstrip(".").replace(",", " ").split()
        assert all(word in passage for word in named if word not in ("a", "an", "the", "and"))


def test_passages_end_with_their_sentences():
    chapter = text.chapters(text.invented_books(seed=2)[0])[0]
    for passage in text.passages(chapter, random.Random(0), limit=300):
        assert passage[-1] in '.!?"'


def test_packed_rows_keep_every_token():
    items = [([n] * size, [1] * size) for n, size in enumerate((5, 9, 3, 2, 8, 4), start=1)]
    ids, learn = pack(items, 10, random.Random(0))
    assert sorted(ids[learn == 1].tolist()) == sorted(token for i, _ in items for token in i)


def test_short_documents_begin_rows_too():
    items = [([1] * 10, [1] * 10), ([2] * 3, [1] * 3)] * 40
    ids, _ = pack(items, 13, random.Random(0))
    assert 5 < (ids[:, 0] == 2).sum() < 35


def test_dropout_is_of_training_alone(model):
    schedule, tokens = Schedule(1.0, 16, 1, 0.02, 1e-3, dropout=0.5), torch.arange(20)[None]
    before = model.logits(tokens)
    Trainer("more", model, schedule, None, None, "no checkpoint")
    assert not torch.equal(model.logits(tokens), before)
    torch.testing.assert_close(model.eval().logits(tokens), before)


def test_rounds_count_by_position():
    counts = Rounds()
    for n in (4, 2, 0):
        counts.add(n)
    summary = counts.summary()
    assert summary["rate"] == 6 / 12 and summary["by_position"] == [2 / 3, 2 / 3, 1 / 3, 1 / 3]
    assert summary["tokens_a_round"] == 3


def test_runs_are_equal_where_their_ids_are():
    ids = np.random.default_rng(0).integers(0, 4096, 3000)
    known = runs(ids, 8)
    assert len(known) == len(set(known.tolist())) == 2993
    assert (runs(ids[100:120], 8) == known[100:113]).all() and not np.isin(runs(ids[::-1], 8), known).any()
    assert runs(ids[:7], 8).size == 0
