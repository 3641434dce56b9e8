"""tools.kv_peers and its worker, with pybmc on both sides."""

import io
import json

import pytest
import tiny
from click.testing import CliRunner

from tools import kv_peers, kv_worker, versus_worker


@pytest.fixture
def both_ours(monkeypatch):
    """The other engine is pybmc too."""
    engine = kv_peers.Engine
    monkeypatch.setattr(kv_peers, "Engine", lambda name, command: engine(name, [*command[:-1], "pybmc"]))


def test_the_worker_answers():
    requests = [{"do": "load", "path": str(tiny.model("llama")), "threads": 1, "shape": {}},
                {"do": "start", "context": 64, "ids": [1, 2, 3]}, {"do": "rate", "n": 5}, {"do": "stop"},
                {"do": "start", "context": 2, "ids": [1, 2, 3]}]
    said = []
    versus_worker.serve(kv_worker.Worker(kv_worker.Pybmc()), {},
                        io.StringIO("\n".join(map(json.dumps, requests))), said.append)
    _, loaded, started, rate, _, failed = map(json.loads, said)
    assert loaded["seconds"] > 0 and started["first_token_s"] >= started["open_s"] > 0
    assert started["cache_mb"] > 0
    assert rate["tok_s"] > 0 and "cap is 2" in failed["error"]


def test_memory_and_rates(both_ours):
    path = str(tiny.model("llama"))
    done = CliRunner().invoke(kv_peers.main,
                              ["memory", path, "-c", "300", "-p", "20", "-r", "2", "-t", "1", "--json"])
    assert done.exit_code == 0, done.output
    ours, theirs = map(json.loads, done.output.splitlines())
    assert ours["context"] == 300 and ours["cache_mb"] == theirs["cache_mb"] > 0
    done = CliRunner().invoke(kv_peers.main, ["rates", path, "-p", "4,9", "-n", "5", "-r", "2", "-t", "1"])
    assert done.exit_code == 0, done.output
    assert done.output.count("dynamic") == done.output.count("static") == 2 and "2 pairs" in done.output


def test_an_engine_that_is_not_there_is_a_sentence():
    done = CliRunner().invoke(kv_peers.main, ["memory", str(tiny.model("llama")), "-t", "1"])
    assert done.exit_code == 1 and "llama_cpp" in done.output
