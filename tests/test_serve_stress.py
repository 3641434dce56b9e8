"""The stress tool: a server stays as it was and serves others; and what the tool says where it does not.
Its long form is the tool itself: python -m tools.serve_stress MODEL."""

import asyncio
from collections import Counter

import pytest
import tiny
from click.testing import CliRunner
from serving import served

import pybmc
from tools import serve_stress
from tools.serve_stress import ATTACKS, Attacks, Bounds, Server, State, grown, main, stress


@pytest.fixture(scope="module")
def model():
    with pybmc.Model(tiny.model("llama", n_ctx=500), threads=1) as model:
        yield model


def run(*args):
    return CliRunner().invoke(main, list(map(str, args)))


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(serve_stress, "PATIENCE", 0.3)


def test_a_server_of_its_own_stands_a_little_stress(monkeypatch):
    monkeypatch.delitem(ATTACKS, "long prompt")         # seconds of work
    done = run(tiny.model("llama", n_ctx=500), "--leave", 40, "--hostile", 12, "--seconds", 0.5, "--grown-mb",
               300, "-t", 1)
    assert done.exit_code == 0, done.output
    assert "40 clients left" in done.output and "honest answers" in done.output
    assert done.output.count(" files, ") == 3


def test_an_answer_of_status_500_and_another_text_are_told(model, monkeypatch):
    monkeypatch.setattr(serve_stress, "ATTACKS", {})
    monkeypatch.setattr(serve_stress, "PATIENCE", 60)
    serve_stress.sends("a chat", serve_stress.request("/v1/chat/completions",
                                                      {"messages": [{"role": "user", "content": "a"}]}))

    def fail(*_):
        raise ValueError("a bug")

    with served(model, memory=1 << 20) as server:
        port = int(server.url.rpartition(":")[2])
        asked = []

        async def ask(_):
            asked.append(1)
            return "other" if len(asked) == 2 else "text"

        monkeypatch.setattr("pybmc.serve.openai.chat_task", fail)
        monkeypatch.setattr(serve_stress, "ask_honestly", ask)
        wrong = asyncio.run(stress(Server("127.0.0.1", port), 0, 4, 0.3, 1, Bounds(0),
                                   tell=lambda line: None))
    assert any("a chat" in line and "status 500" in line for line in wrong)
    assert "an honest answer: expected 'text', found 'other'" in wrong


def test_rows_that_are_held_and_sequences_that_run_are_told(monkeypatch):
    async def gauges(self, seconds=0):
        return {"pybmc_waiting": 0.0, "pybmc_running": 2.0, "pybmc_rows": 30.0, "pybmc_kept_rows": 10.0}

    monkeypatch.setattr(Server, "settled", gauges)
    wrong, _ = asyncio.run(serve_stress.checked(Server("127.0.0.1", 1), None, Bounds(0)))
    assert wrong == ["pybmc_running: expected 0, found 2", "rows: expected those that are kept, 10, found 30"]


@pytest.mark.parametrize("after, words", [
    (State(12, 8, 150), []), (State(13, 5, 100), ["files: expected at most 12, found 13"]),
    (State(10, 9, 151),
     ["threads: expected at most 8, found 9", "resident: expected at most 150, found 151"]), (None, []),
])
def test_what_a_process_has_more_is_told(after, words):
    assert grown(State(10, 5, 100), after, Bounds(50)) == words


def test_statuses_that_are_fine_are_not_odd():
    attacks = Attacks()
    name = next(iter(ATTACKS))
    attacks.statuses[name] = Counter({0: 1, 400: 2, 200: 1, 500: 3})
    assert attacks.odd() == [f"{name}: 3 answers of status 500"]


@pytest.mark.parametrize("args, status, words", [
    (["http://127.0.0.1:1"], 1, "127.0.0.1:1"), (["https://example.org"], 2, "http://HOST:PORT"),
    (["/no/model.gguf"], 1, "status 1"),
    (["x", "--seconds", "0"], 2, "seconds"),
])
def test_what_cannot_be_put_under_stress_is_a_sentence(args, status, words):
    done = run(*args)
    assert done.exit_code == status and words in done.output and "Traceback" not in done.output
