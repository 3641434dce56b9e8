"""Draft heads: the layer of a file that predicts one token further.

Its logits are those of a float64 oracle; guesses change no text; and guesses that are right by construction
come true, so that each token of the head meets the right hidden state whatever happened to the session.
"""

import math
import re
from dataclasses import replace
from functools import lru_cache

import gguf
import numpy as np
import pytest
import recurrent_oracle
import tiny
from engines import events, write
from numpy_sampling import choose
from oracle import Oracle, read, weights
from places import SHARED

import pybmc
from pybmc import ArgumentError, Engine, Request, Sampler
from pybmc._native import check, ffi, lib, pointer
from pybmc.cli import run
from pybmc.cli.report import why
from pybmc.engine.prove import prove
from pybmc.errors import OutOfMemoryError
from pybmc.files.gguf import GGUF
from pybmc.models.bind import bind_head
from pybmc.models.config import read_config
from pybmc.show import describe, lines
from pybmc.spec.speculation import Speculation

SIZE = 401
KNOTS = 28              # of native/policy.h: widths whose costs a policy keeps
KEPT = 512              # HIDDEN_KEPT of native/model.h: tokens whose hidden states a session keeps


def text(n, seed=0):
    return np.random.default_rng(seed).integers(0, SIZE, n).tolist()


# Files with a head


def float32(values):
    return "F32", np.ascontiguousarray(values, np.float32).view(np.uint8)


def parts(arch="qwen35", layer=1, **shape):
    """A model of tiny.parts() and, as its head, a layer of another one with random norms and projection."""
    metadata, tensors = tiny.parts(arch, n_ctx=2048, **shape)
    _, others = tiny.parts(arch, n_ctx=2048, **shape | {"seed": 9})
    n, dim = metadata[f"{arch}.block_count"], metadata[f"{arch}.embedding_length"]
    rng = np.random.default_rng(5)
    metadata |= {key: [*value, value[layer]] for key, value in metadata.items() if key.startswith(f"{arch}.")
                 and isinstance(value, list)}
    metadata |= {f"{arch}.block_count": n + 1, f"{arch}.nextn_predict_layers": 1}
    tensors |= {name.replace(f"blk.{layer}.", f"blk.{n}."): tensor for name, tensor in others.items()
                if name.startswith(f"blk.{layer}.")}
    for name in ("enorm", "hnorm", "shared_head_norm"):
        tensors[f"blk.{n}.nextn.{name}.weight"] = float32(1 + 0.2 * rng.standard_normal(dim))
    type = tiny.fitting(shape.get("types", "F16"), 2 * dim)
    projection = tiny.random_tensor(rng, type, dim, 2 * dim, (2 * dim) ** -0.5)
    tensors[f"blk.{n}.nextn.eh_proj.weight"] = type, projection
    return metadata, tensors


@lru_cache(maxsize=None)
def path(arch="qwen35", layer=1, **shape):
    return tiny.save(tiny.folder() / f"head-{path.cache_info().misses}.gguf", *parts(arch, layer, **shape))


@lru_cache(maxsize=None)
def load(arch="qwen35", threads=2, **shape):
    return pybmc.Model(path(arch, **shape), threads=threads)


@lru_cache(maxsize=None)
def clairvoyant(reads):
    """Tokens follow one another in a cycle, whatever came before. The head knows the cycle by what it
    `reads`: the token before, or the hidden state alone, its own where it guesses on."""
    dim, metadata, tensors = 512, *parts("qwen3", 0, dim=512, n_heads=2, head_dim=16, hidden_dim=32,
                                         n_layers=1, types="F32")
    after = np.random.default_rng(2).permutation(SIZE)    # of the cycle that this makes, the token after each
    follows = np.empty(SIZE, int)
    follows[after] = np.roll(after, -1)
    embedding, turned, nothing = np.eye(SIZE, dim), np.zeros((dim, dim)), np.zeros((dim, dim))
    turned[follows, np.arange(SIZE)] = 1
    output = np.zeros((SIZE, dim))
    output[follows, np.arange(SIZE)] = 1
    for name, (kind, rows) in tensors.items():
        if "attn_output" in name or "ffn_down" in name:
            tensors[name] = float32(np.zeros_like(tiny.values(kind, rows)))
        elif name.endswith("_norm.weight") or name.endswith(("enorm.weight", "hnorm.weight")):
            tensors[name] = float32(np.ones_like(tiny.values(kind, rows)))
    tensors |= {"token_embd.weight": float32(embedding), "output.weight": float32(output)}
    halves = [nothing, turned] if reads == "state" else [np.eye(dim), nothing]
    tensors["blk.1.nextn.eh_proj.weight"] = float32(np.hstack(halves))
    return pybmc.Model(tiny.save(tiny.folder() / f"clairvoyant-{reads}.gguf", metadata, tensors), threads=2)


# The head's logits


def evaluate(*spans):
    """Tokens of sessions of a head in one pass: (session, tokens, hidden states before them (n, dim)).
    The logits and the head's own hidden states of each."""
    array, kept, results = ffi.new("bmc_span[]", len(spans)), [], []
    for span, (session, tokens, states) in zip(array, spans):
        config, ids = session.model.config, np.asarray(tokens, np.int32)
        rows = [np.ascontiguousarray(row) for row in states]
        logits, hidden = (np.empty((len(ids), size), np.float32) for size in (config.vocab_size, config.dim))
        before = ffi.new("float *[]", list(map(pointer, rows)))
        span.session, span.tokens, span.n_tok = session._live(), pointer(ids), len(ids)
        span.want, span.before = lib.BMC_WANT_ALL, before
        span.logits, span.hidden = pointer(logits), pointer(hidden)
        kept += [ids, rows, before]
        results.append((logits, hidden))
    check(lib.bmc_eval(array, len(spans)))
    return results


def hidden_states(model, tokens):
    with model.session() as session:
        return session.eval(tokens, "hidden")


def head_logits(oracle, layer, tokens, hidden):
    """The head's logits after each token, whose hidden states before are given:
    float64, from the description of the format."""
    b, embedding = f"blk.{layer}", oracle.tensors["token_embd.weight"]
    attention = oracle.gated_attention if oracle.arch == "qwen35" else oracle.attention
    both = [oracle.norm(embedding[tokens], f"{b}.nextn.enorm"),
            oracle.norm(hidden.astype(float), f"{b}.nextn.hnorm")]
    x = oracle.linear(np.concatenate(both, -1), f"{b}.nextn.eh_proj")
    x = x + attention(oracle.norm(x, f"{b}.attn_norm"), layer)
    x = x + oracle.feed_forward(oracle.norm(x, f"{b}.post_attention_norm" if oracle.arch == "qwen35"
                                            else f"{b}.ffn_norm"), layer)
    return oracle.norm(x, f"{b}.nextn.shared_head_norm") @ oracle.tensors.get("output.weight", embedding).T


def error(model, oracle, tokens):
    hidden = hidden_states(model, tokens)
    with model.head.session() as session:
        [(ours, _)] = evaluate((session, tokens[1:], hidden[:-1]))
    right = head_logits(oracle, model.config.n_layers, np.array(tokens[1:]), hidden[:-1])
    return np.sqrt(((ours - right) ** 2).mean()) / right.std()


@pytest.mark.parametrize("arch, kind", [("qwen35", recurrent_oracle.Recurrent), ("qwen3", Oracle)])
@pytest.mark.parametrize("types, limit", [("F32", 1e-3), ("Q8_0", 0.03)])
def test_logits_equal_the_oracle(arch, kind, types, limit):
    metadata, tensors = parts(arch, types=types)
    oracle, model = kind(metadata, weights(tensors)), load(arch, types=types)
    assert error(model, oracle, text(40)) < limit
    for name in ("enorm", "hnorm", "shared_head_norm", "eh_proj"):          # each of its tensors is seen
        name = f"blk.{model.config.n_layers}.nextn.{name}.weight"
        other = kind(metadata, oracle.tensors | {name: np.roll(oracle.tensors[name], 1, -1)})
        assert error(model, other, text(40)) > 5 * limit


def test_logits_of_a_golden_file_equal_the_oracle():
    golden = SHARED / "golden-breadth" / "qwen35.F16.gguf"
    if not golden.is_file():
        pytest.skip("needs ../shared")
    metadata, values = read(golden)
    values = {name: value.reshape(-1) if "norm" in name else value for name, value in values.items()}
    with pybmc.Model(golden, threads=2) as model:
        assert error(model, recurrent_oracle.Recurrent(metadata, values),
                     [id % 290 for id in text(40)]) < 1e-3


@pytest.mark.parametrize("arch", ["qwen35", "qwen3"])
def test_no_cut_and_no_company_changes_a_bit(arch):
    model, tokens = load(arch), text(120)
    hidden = hidden_states(model, tokens)
    with model.head.session() as whole:
        [(right, _)] = evaluate((whole, tokens[1:], hidden[:-1]))
    sessions = [model.head.session(), model.head.session()]
    for at, end in ((0, 1), (1, 7), (7, 40), (40, 119)):
        for ours, _ in evaluate(*((session, tokens[1 + at:1 + end], hidden[at:end]) for session in sessions)):
            assert (ours == right[at:end]).all()
        sessions[1].rewind(end // 2)
        [(ours, _)] = evaluate((sessions[1], tokens[1 + end // 2:1 + end], hidden[end // 2:end]))
        assert (ours == right[end // 2:end]).all()


def test_the_output_matrix_is_the_models():
    model = load("qwen35", vocab_size=2000)
    output = sum(tensor.nbytes for name, tensor in model._file.tensors.items() if name == "output.weight")
    assert 0 < model.head.packed_bytes < output


@pytest.mark.parametrize("own", ["embed_tokens", "shared_head_head"])
def test_matrices_of_its_own(tmp_path, own):
    metadata, tensors = parts("qwen3")
    role = {"embed_tokens": "token_embd", "shared_head_head": "output"}[own]
    kind, rows = tensors[f"{role}.weight"]
    changed = tensors | {f"blk.2.nextn.{own}.weight": (kind, np.ascontiguousarray(rows[::-1]))}
    with pybmc.Model(tiny.save(tmp_path / "own.gguf", metadata, changed), threads=1) as model:
        values = weights(tensors)
        assert error(model, Oracle(metadata, values), text(30)) > 0.1
        assert error(model, Oracle(metadata, values | {f"{role}.weight": values[f"{role}.weight"][::-1]}),
                     text(30)) < 1e-3


def test_without_a_norm_of_its_own_it_is_the_models(tmp_path):
    metadata, tensors = parts("qwen3")
    del tensors["blk.2.nextn.shared_head_norm.weight"]
    values = weights(tensors)
    with pybmc.Model(tiny.save(tmp_path / "norm.gguf", metadata, tensors), threads=1) as model:
        values["blk.2.nextn.shared_head_norm.weight"] = values["output_norm.weight"]
        assert error(model, Oracle(metadata, values), text(30)) < 1e-3


# Guesses


SAMPLERS = [Sampler(), Sampler(temperature=0.9, seed=3, top_k=0),
            Sampler(temperature=0.7, repeat_penalty=1.2, logit_bias={5: 2.0})]


@pytest.mark.parametrize("arch", ["qwen35", "qwen3"])
@pytest.mark.parametrize("settings", [{"spec": "mtp", "fixed": 5}, {"spec": "mtp"}, {"spec": "auto"},
                                      {"spec": "auto", "fixed": 3}], ids=str)
def test_the_text_is_plain_decodings(arch, settings):
    """Of three at a time, with prompts of a token, of some and of more than a session keeps states of."""
    model = load(arch)
    requests = [Request(text(n, n), 60, sampler, top=2) for n, sampler in zip((1, 40, 700), SAMPLERS)]
    with Engine(model, speculation=Speculation(model, **settings)) as engine:
        sequences, given = list(map(engine.add, requests)), {}
        for sequence, token in events(engine):
            given.setdefault(sequence.number, []).append(token._replace(from_draft=False, by=None))
    assert [given[i] for i in range(3)] == [write(model, request)[0] for request in requests]
    if "fixed" in settings:
        assert all(sequence.stats.draft_n > 60 for sequence in sequences)


@pytest.mark.parametrize("name, layer",
                         [("glm4moe", None), ("qwen35moe", 3), ("qwen3next", 3), ("deepseek2", 2)])
def test_heads_with_experts_and_with_compressed_rows(tmp_path, name, layer):
    """Golden files; where one has no head, a layer of its own becomes one."""
    file = SHARED / "golden-breadth" / f"{name}.F16.gguf"
    if not file.is_file():
        pytest.skip("needs ../shared")
    if layer is not None:
        file = tiny.save(tmp_path / "head.gguf", *with_a_layer_as_head(file, layer))
    with pybmc.Model(file, threads=2) as model:
        tokens = [id % 290 for id in text(40)]
        found, stats = write(model, Request(tokens, 40), Speculation(model, spec="mtp", fixed=4))
        assert found == write(model, Request(tokens, 40))[0] and stats.draft_n > 40
        hidden = hidden_states(model, tokens)
        with model.head.session() as whole, model.head.session() as parts:
            [(right, _)] = evaluate((whole, tokens[1:], hidden[:-1]))
            for at in range(0, 39, 13):
                [(ours, _)] = evaluate((parts, tokens[1 + at:14 + at], hidden[at:13 + at]))
                assert (ours == right[at:13 + at]).all()


def with_a_layer_as_head(file, layer):
    """Metadata and tensors of a file, whose layer is there again as a head."""
    reader, rng = gguf.GGUFReader(file), np.random.default_rng(1)
    metadata = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    tensors = {t.name: (t.tensor_type.name, t.data.view(np.uint8)) for t in reader.tensors}
    arch = metadata["general.architecture"]
    n, dim = metadata[f"{arch}.block_count"], metadata[f"{arch}.embedding_length"]
    metadata |= {key: [*value, value[layer]] for key, value in metadata.items() if key.startswith(f"{arch}.")
                 and isinstance(value, list)}
    metadata |= {f"{arch}.block_count": n + 1, f"{arch}.nextn_predict_layers": 1}
    tensors |= {name.replace(f"blk.{layer}.", f"blk.{n}."): tensor for name, tensor in tensors.items()
                if name.startswith(f"blk.{layer}.")}
    tensors |= {f"blk.{n}.nextn.{name}.weight": float32(np.ones(dim)) for name in ("enorm", "hnorm")}
    tensors[f"blk.{n}.nextn.eh_proj.weight"] = float32(rng.standard_normal((dim, 2 * dim)) * dim**-0.5)
    return metadata, tensors


@pytest.mark.parametrize("reads", ["token", "state"])
@pytest.mark.parametrize("fixed", [1, 4, 32])
@pytest.mark.parametrize("n", [1, 2, 30, KEPT - 1, KEPT, KEPT + 1, 900])
def test_guesses_that_are_right_come_true(reads, fixed, n):
    model = clairvoyant(reads)
    found, stats = write(model, Request(text(n), 80), Speculation(model, spec="mtp", most=32, fixed=fixed))
    assert found == write(model, Request(text(n), 80))[0]
    assert stats.draft_n_accepted == stats.draft_n >= 79 - stats.rounds > 0


@pytest.mark.parametrize("n, least", [(5, 100), (60, 150), (700, KEPT)])
def test_the_head_reads_more_of_the_text_as_its_guesses_pay(monkeypatch, n, least):
    """Every round believes that the head takes a ten-thousandth of the model's time:
    guesses are made from the last 32 tokens on, and then from all whose hidden states are kept."""
    monkeypatch.setattr(pybmc.engine.engine, "CALL_SECONDS", 0.0)           # a round a step
    model, request = clairvoyant("state"), Request(text(n), 200)
    made = Speculation(model, spec="mtp")
    costs = ffi.new("double[]", lib.bmc_policy_save(made.policy, ffi.NULL, 0))
    with model.session() as session, Engine(model, speculation=made) as engine:
        sequence, found = engine.add(replace(request, session=session)), []
        while not sequence.done:
            lib.bmc_policy_save(made.policy, costs, len(costs))
            costs[0:KNOTS], costs[KNOTS:2 * KNOTS] = [0.0] * KNOTS, [math.log(1e-4)] * KNOTS
            check(lib.bmc_policy_load(made.policy, costs, len(costs)))
            found += [token._replace(from_draft=False, by=None) for _, token in engine.step()]
        assert session.drafter._session.position > least
    assert found == write(model, request)[0]
    assert sequence.stats.draft_n_accepted == sequence.stats.draft_n > 150


def test_choices_of_a_sampler_are_guessed_with_its_noise():
    model = clairvoyant("token")
    request = Request(text(20), 80, Sampler(temperature=8.0, seed=4, top_k=0, top_p=1.0, min_p=0.0))
    found, stats = write(model, request, Speculation(model, spec="mtp", fixed=4))
    assert len({token.id for token in found}) > 20 and found == write(model, request)[0]
    assert stats.draft_n_accepted == stats.draft_n > 50


@lru_cache(maxsize=None)
def attentive():
    """A model whose head goes by what its attention reads, more than by the token itself."""
    metadata, tensors = parts("qwen3", types="F32")
    name = "blk.2.attn_output.weight"
    tensors[name] = float32(40 * tiny.values(*tensors[name]))
    return pybmc.Model(tiny.save(tiny.folder() / "attentive.gguf", metadata, tensors), threads=2)


@pytest.mark.parametrize("n", [3, 40, KEPT + 100])
def test_guesses_are_those_of_a_head_that_has_read_all_it_can(n):
    """A round's guesses, made here by the head alone:
    from every hidden state that is kept, and then from its own."""
    model, k = attentive(), 3
    sampler = Sampler(temperature=3.0, seed=2, top_k=0, top_p=1.0, min_p=0.0,
                      logit_bias={id: 1000.0 for id in range(5, 9)})
    request = Request(text(n), 90, sampler)
    with Engine(model, speculation=Speculation(model, spec="mtp", fixed=k)) as engine:
        engine.add(request)
        written = [token for _, token in events(engine)]
    tokens = request.tokens + [token.id for token in written]
    hidden, first = hidden_states(model, tokens), max(0, n - KEPT)
    flags, at = [False], n + 1                  # the first token comes with the prompt
    with model.head.session() as session:
        while at < len(tokens):
            session.rewind(0)
            guesses, rows, pending = [], hidden[first:at - 1], tokens[first + 1:at]
            while len(guesses) < min(k, len(tokens) - at - 1):
                [(logits, states)] = evaluate((session, pending, rows))
                guesses.append(choose(sampler, logits[-1], at + len(guesses), tokens[:at] + guesses))
                pending, rows = guesses[-1:], states[-1:]
            good = next((i for i, id in enumerate(guesses) if id != tokens[at + i]), len(guesses))
            flags += [True] * good + [False]
            at += good + 1
    assert [token.from_draft for token in written] == flags
    assert 10 < sum(flags) < 80


def test_sessions_that_go_back_and_on():
    """Texts that change at their end, and in the middle; calls beside the rounds; and forks."""
    model = clairvoyant("state")
    made, prompt = Speculation(model, spec="mtp", fixed=4), text(600)
    with model.session() as session:
        for words in (prompt, prompt[:590], [*prompt[:300], *text(20, 1)], [*prompt[:300], *text(700, 2)],
                      prompt[:3]):
            found, stats = write(model, Request(words, 40, session=session), made)
            assert found == write(model, Request(words, 40))[0]
            assert stats.draft_n_accepted == stats.draft_n > 0
            session.eval([1, 2, 3], "none")
            session.rewind(session.position - 2)
        with session.fork() as fork:
            words = [*fork.tokens, 8]
            _, stats = write(model, Request(words, 40, session=fork), made)
            assert stats.draft_n_accepted == stats.draft_n > 0


def test_a_round_without_the_head_is_caught_up_with():
    """Repetitions guess first, then the head again: it reads what came meanwhile."""
    model, prompt = clairvoyant("state"), text(20)
    ngrams, head = Speculation(model, spec="ngram", fixed=9), Speculation(model, spec="mtp", fixed=4)
    with model.session() as session:
        drafter = head.drafter(session)
        for made in (head, ngrams, head):
            if made is head:
                session.drafter = drafter
            written, stats = write(model, Request(prompt, 60, session=session), made)
            prompt = [*prompt, *(token.id for token in written)]
            assert made is ngrams or stats.draft_n_accepted == stats.draft_n > 0


def test_who_guesses():
    model = clairvoyant("state")
    made = Speculation(model, spec="auto")
    assert made.head and made.draft is model.head
    assert not Speculation(model, spec="ngram").head and not Speculation(model, spec="off").head
    with pybmc.Model(tiny.model("qwen3", n_layers=1), threads=1) as other:
        assert not Speculation(model, other).head and Speculation(model, other).draft is other
        assert Speculation(model, other, "mtp").draft is model.head and other.head is None


def test_weights_left_in_the_file_give_the_same():
    with pybmc.Model(path("qwen35"), threads=2, repack=False) as model:
        request = Request(text(30), 30)
        found, stats = write(model, request, Speculation(model, spec="mtp", fixed=4))
        assert found == write(load("qwen35"), request)[0] and stats.draft_n > 40


@pytest.mark.long
def test_a_coarse_head_is_shared(tmp_path):
    """65,536 ids of 256 values, the least for which one is made."""
    metadata, tensors = parts("qwen3", 0, types="Q8_0", vocab="spm", vocab_size=1 << 16, dim=256,
                              n_layers=1, tied=True)
    with pybmc.Model(tiny.save(tmp_path / "coarse.gguf", metadata, tensors), threads=2) as model:
        made = Speculation(model, spec="mtp", fixed=3)
        assert model.coarsen() and model.head.coarsen()
        request = Request([5, 6, 7], 20)
        assert write(model, request, made)[0] == write(model, request)[0]


def test_it_is_proven():
    found = list(prove(load("qwen35"), ["abc abc abc"], 24))
    assert {f.drafts for f in found} >= {"head", "head of 5"}
    assert all(f.difference is None for f in found)


def test_without_memory_for_hidden_states_decoding_is_plain(monkeypatch):
    def no_memory(self):
        raise OutOfMemoryError("none")

    monkeypatch.setattr(pybmc.Session, "keep_hidden", no_memory)
    model = load("qwen35")
    found, stats = write(model, Request([1, 2, 3], 20), Speculation(model, spec="mtp", fixed=4))
    assert found == write(model, Request([1, 2, 3], 20))[0] and stats.draft_n == 0


def test_a_closed_model_takes_its_head_along():
    model = pybmc.Model(path("qwen35"), threads=1)
    head = model.head
    session = head.session()
    model.close()
    model.close()
    assert head.closed and model.closed
    with pytest.raises(pybmc.ClosedError):
        session.position


# What is refused


def test_hidden_states_go_with_tokens_of_a_head_only():
    model = load("qwen35")
    with model.session() as session, model.head.session() as own:
        with pytest.raises(ArgumentError, match="its tokens come with the hidden states"):
            own.eval([1, 2])
        with pytest.raises(ArgumentError, match="of a draft head only"):
            evaluate((session, [1], np.zeros((1, 64), np.float32)))
        with pytest.raises(ArgumentError, match="expected a model that writes text"):
            own.keep_hidden()
        other = Speculation(load("qwen3"), spec="mtp")
        with pytest.raises(ArgumentError, match="draft head of another model"):
            write_with(session, other)


def write_with(session, made):
    item = ffi.new("bmc_item *")
    limits = ffi.new("bmc_limits *", {"n_rounds": 1, "seconds": 1e9, "policy": made.policy})
    drafter, ids, logprobs, drafted = made.drafter(), *(ffi.new(f"{kind}[]", [1])
                                                        for kind in ("int32_t", "float", "uint8_t"))
    item.session, item.drafter, item.pending, item.n_pending = session._live(), drafter.native, ids, 1
    item.choose, item.max_tokens, item.ids, item.logprobs, item.drafted = 1, 1, ids, logprobs, drafted
    check(lib.bmc_round(ffi.new("bmc_item *[]", [item]), 1, limits))


def without(*names):
    return lambda metadata, tensors: [tensors.pop(f"blk.2.{name}.weight") for name in names]


@pytest.mark.parametrize("change", [
    without("nextn.eh_proj"), without("nextn.enorm"), without("nextn.hnorm"),
    lambda metadata, tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("blk.2.")],
])
def test_what_the_key_counts_may_be_missing(tmp_path, caplog, change):
    metadata, tensors = parts("qwen3")
    change(metadata, tensors)
    file = tiny.save(tmp_path / "bare.gguf", metadata, tensors)
    with pybmc.Model(file, threads=1) as model:
        assert model.head is None and not Speculation(model).head and caplog.text == ""
        with pytest.raises(ArgumentError, match="spec is 'mtp', but .* has no draft head"):
            Speculation(model, spec="mtp")
    info = describe(file)
    assert info["runs"] and info["draft_head"] is False and "draft head" not in dict(lines(info))


@pytest.mark.parametrize("change, message", [
    (without("attn_q"), "blk.2.attn_q.weight is missing"),
    (lambda m, t: t.update({"blk.2.nextn.eh_proj.weight": float32(np.ones((64, 64)))}),
     "expected 64 rows of 128 values, found 64 of 64"),
    (lambda m, t: t.update({"blk.2.nextn.more.weight": float32(np.ones((64, 64)))}),
     "does not know this tensor of a draft head"),
    (lambda m, t: t.update({"blk.2.nextn.shared_head_head.weight": float32(np.ones((9, 64)))}),
     "expected 401 rows of 64 values, found 9"),
])
def test_a_head_with_something_wrong_is_left_out(tmp_path, caplog, change, message):
    metadata, tensors = parts("qwen3")
    change(metadata, tensors)
    file = tiny.save(tmp_path / "wrong.gguf", metadata, tensors)
    with pybmc.Model(file, threads=1) as model:
        assert model.head is None and message in caplog.text and "the draft head is not used" in caplog.text
        assert len(write(model, Request([1, 2], 5), Speculation(model))[0]) == 5
    assert describe(file)["draft_head"] is False


def test_a_head_that_does_not_keep_rows_is_none():
    """A recurrent layer, or one that sees a window:
    what it has read could not be taken back to any position."""
    for arch, layer in (("lfm2", 0), ("gemma3", 0)):
        with GGUF(path(arch, layer)) as file:
            assert read_config(file).head is None


def test_show_tells_of_a_head():
    info = describe(path("qwen35"))
    assert info["draft_head"] is True and info["layers"] == 3 and dict(lines(info))["draft head"] == "yes"


def test_layers_beyond_the_first_are_left_out(tmp_path):
    metadata, tensors = parts("qwen3")
    metadata |= {"qwen3.block_count": 4, "qwen3.nextn_predict_layers": 2}
    tensors |= {name.replace("blk.2.", "blk.3."): tensor for name, tensor in tensors.items()
                if name.startswith("blk.2.")}
    with pybmc.Model(tiny.save(tmp_path / "two.gguf", metadata, tensors), threads=1) as model:
        assert model.head.config.first_layer == 2
        assert {role.tensor.name[:5] for role in bind_head(model._file, model.head.config)
                if role.block >= 0} == {"blk.2"}


def test_why_names_the_head():
    made = Speculation(clairvoyant("state"), spec="mtp", fixed=2)
    _, stats = write(made.model, Request([1, 2], 20), made)
    assert any(line.startswith("draft head: ") for line in why(stats, made))


def test_the_command_line(capsys):
    def output(*args):
        status = run(list(map(str, args)))
        return status, *capsys.readouterr()

    assert re.search(r"draft head +yes", output("show", path("qwen35"))[1])
    words = ("-p", "one two", "-n", "20", "--temp", "0", "--spec")
    found, plain = (output("generate", path("qwen35"), *words, spec) for spec in ("mtp", "off"))
    assert found == plain and found[0] == 0 and found[1]
    status, out, said = output("generate", tiny.model("llama"), *words, "mtp")
    assert status == 1 and out == "" and said.count("\n") == 1 and "has no draft head" in said
