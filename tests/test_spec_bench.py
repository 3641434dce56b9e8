"""tools.spec_bench: that it runs, compares texts, and says what its numbers mean."""

import json
import sys

import pytest
import tiny

import pybmc
from tools import spec_bench


@pytest.fixture(scope="module")
def pair():
    with pybmc.Model(tiny.model("llama"), threads=1) as model, \
            pybmc.Model(tiny.model("llama", seed=1, n_layers=1), threads=1) as draft:
        yield model, draft


def test_every_way_gives_the_plain_text(pair):
    model, draft = pair
    ways = spec_bench.ways_of(model, {"stranger": draft, "twin": model})
    task = spec_bench.synthetic_tasks(model, 40)[0]
    assert list(ways) == ["plain", "n-grams", "stranger alone", "all with stranger", "twin alone",
                          "all with twin"]
    row = spec_bench.compare(model, task, ways, 2)
    assert row.prompt == 32 and row.tokens == 40
    assert list(row.seconds) == list(ways) and all(s > 0 for s in row.seconds.values())
    assert row.best in ("plain", "n-grams", "stranger alone", "twin alone")
    assert set(row.of_best) == {"stranger", "twin"}


def test_another_text_is_no_result(pair, monkeypatch):
    """A way that gives another text: the comparison ends with a sentence."""
    model, draft = pair
    honest = spec_bench.measure

    def measure(model, task, speculation):
        found = honest(model, task, speculation)
        if speculation.spec == "ngram":
            found.tokens[-1] ^= 1
        return found

    monkeypatch.setattr(spec_bench, "measure", measure)
    with pytest.raises(SystemExit, match="the text with n-grams is not the plain one"):
        spec_bench.compare(model, spec_bench.synthetic_tasks(model, 9)[0], spec_bench.ways_of(model, {}), 1)


def test_it_runs(pair, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tasks = spec_bench.synthetic_tasks(pair[0], 12)
    monkeypatch.setattr(spec_bench, "suites", lambda args: [("tiny pair", pair[0], tasks, {"d": pair[1]})])
    monkeypatch.setattr(sys, "argv", ["spec_bench", "-r", "1", "-n", "12", "-t", "1", "--json",
                                      str(tmp_path / "c.json")])
    spec_bench.main()
    out = capsys.readouterr().out
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3 and len({line.count("|") for line in table}) == 1 and "tiny pair" in out
    assert "times plain decoding" in out and len(json.loads((tmp_path / "c.json").read_text())) == 3
