"""tools.spec_bench: what its numbers mean, and that it runs."""

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


def test_intervals_are_order_statistics():
    assert spec_bench.interval(range(1, 11)) == (2, 9)          # of ten runs, as tables of the sign test say
    assert spec_bench.interval(range(1, 7)) == (1, 6)
    assert spec_bench.interval(range(1, 21)) == (6, 15)
    assert spec_bench.interval([3.0]) == (3.0, 3.0)


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_acceptance_can_be_forced(pair, share):
    request = spec_bench.scripted(pair[0], 150)
    made = spec_bench.forced(*pair, share, request)
    made._fixed = spec_bench.FixedLength(1)
    ids, stats = spec_bench.decode(pair[0], request, made)
    assert ids == request.script[:150] == spec_bench.decode(pair[0], request)[0]
    assert stats.accepted_share == pytest.approx(share, abs=0.12)
    made.close()


def test_copies_are_found_by_n_grams(pair):
    request = spec_bench.copying(pair[0], 200)
    made = spec_bench.Speculation(pair[0], None, "ngram", controller=spec_bench.FixedLength(0))
    ids, stats = spec_bench.decode(pair[0], request, made)
    assert ids == request.script[:200]
    again = sum(a == b for a, b in zip(request.prompt, request.script))
    assert again < 200 and len(set(request.prompt) & set(ids)) > 50


def test_it_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(spec_bench, "LENGTHS", (0, 2))
    monkeypatch.setattr(spec_bench, "SHARES", (0.5,))
    monkeypatch.setattr(sys, "argv", ["spec_bench", "--quick", "-t", "1", "--curve", str(tmp_path / "c.svg"), "--json",
                                      str(tmp_path / "c.json")])
    spec_bench.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == spec_bench.HEADER and len(lines) == 8 and all(line.count("|") == 9 for line in lines)
    found = json.loads((tmp_path / "c.json").read_text())
    assert len(found["rows"]) == 6 and found["curve"][0]["share"] == 0.5
    assert (tmp_path / "c.svg").read_text().startswith("<svg")
