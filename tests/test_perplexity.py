"""Perplexity against a plain computation, and bench's bookkeeping."""

import math

import numpy as np
import pytest
import tiny

import pybmc
from pybmc import ArgumentError
from pybmc.engine import bench
from pybmc.engine.perplexity import perplexity, token_losses


@pytest.fixture(scope="module")
def model():
    with pybmc.Model(tiny.model("llama"), threads=1) as model:
        yield model


@pytest.mark.parametrize("window", [4, 7, 40])
def test_perplexity_is_that_of_the_second_halves(model, window):
    tokens = model.tokenizer.encode(tiny.TEXT)
    losses = []
    for at in range(0, len(tokens) // window * window, window):
        part = [model.tokenizer.bos_id, *tokens[at + 1:at + window]]
        with model.session() as session:
            logits = session.eval(part, logits="all").astype(np.float64)
        for i in range(window // 2, window - 1):
            losses.append(math.log(np.exp(logits[i]).sum()) - logits[i][part[i + 1]])
    found = perplexity(model, tiny.TEXT, window)
    assert found.tokens == len(losses)
    assert found.ppl == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert found.stderr == pytest.approx(found.ppl * np.std(losses) / math.sqrt(len(losses) - 1), rel=1e-4)


def test_bits_per_byte_counts_the_scored_bytes(model):
    tokens = model.tokenizer.encode(tiny.TEXT)
    window = len(tokens)
    n_bytes = sum(len(model.tokenizer.piece(t)) for t in tokens[window // 2 + 1:])
    found = perplexity(model, tiny.TEXT, window)
    assert found.bits_per_byte == pytest.approx(math.log2(found.ppl) * found.tokens / n_bytes)


def test_a_certain_model_loses_nothing_and_a_clueless_one_log_n():
    logits = np.full((2, 8), -1e4, np.float32)
    logits[:, 3] = 1e4
    assert token_losses(logits, np.array([3, 3])).tolist() == [0, 0]
    assert token_losses(np.zeros((2, 8), np.float32), np.array([0, 7])) == pytest.approx([math.log(8)] * 2)


def test_a_text_shorter_than_a_window_is_refused(model):
    with pytest.raises(ArgumentError, match="one window takes 512"):
        perplexity(model, "short")


@pytest.mark.parametrize("kind", ["pp", "tg", "verify"])
@pytest.mark.parametrize("depth", [0, 5])
def test_a_measurement_leaves_the_session_as_it_was(model, kind, depth):
    tokens = bench.random_tokens(model, 20)
    assert tokens.tolist() == bench.random_tokens(model, 20).tolist()
    assert tokens.max() < model.config.vocab_size
    with model.session() as session:
        bench.go_to(session, tokens, depth)
        assert bench.measure(session, kind, tokens[depth:depth + 6]) > 0
        assert session.position == depth and session.tokens == tokens[:depth].tolist()


def test_going_to_a_depth_reuses_rows(model):
    tokens = bench.random_tokens(model, 20)
    with model.session() as session:
        for depth in (4, 9, 2, 20):
            bench.go_to(session, tokens, depth)
            assert session.tokens == tokens[:depth].tolist()


def test_read_bytes_are_weights_and_rows_once_a_pass(model):
    with model.session() as session:
        row, weights = session.arena_stats().row_bytes, model.packed_bytes
        one = bench.result(model, session, "verify", 1, 0, [100.0])
        four = bench.result(model, session, "verify", 4, 10, [100.0])
    assert one.gb_s == pytest.approx(100 * weights / 1e9)
    assert four.gb_s == pytest.approx(25 * (weights + 10 * row) / 1e9)
