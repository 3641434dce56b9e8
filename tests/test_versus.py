"""tools.versus: pairs, medians, differences, the table, the protocol with fake engines; a real peer."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

import pybmc
from tools import lab, limits, synth, versus, versus_worker

ROOT = Path(__file__).parents[1]

FAKE = """
import array, json, random, sys
def say(**values): print(json.dumps(values), flush=True)
say(version="fake 1", modes=["slow", "fast"])
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "run":
        say(tok_s={"slow": 10, "fast": 20}[request["mode"]] + request["n"], idle=0.25)
    elif request["do"] == "limit":
        say(tok_s=50, by="memory", idle=0)
    elif request["do"] == "open":
        say(seconds=1, vocab_size=16)
    elif request["do"] == "tokens":
        say(ids=[ord(c) % 16 for c in request["text"]][int(sys.argv[2]):])
    elif request["do"] == "logits":
        n, rng = len(request["tokens"]), random.Random(sys.argv[1])
        open(request["file"], "wb").write(array.array("f", list(rng.randbytes(16 * n))).tobytes())
        say(shape=[n, 16])
    elif request["do"] == "die":
        sys.exit(7)
    else:
        say(error=f"cannot {request['do']}", idle=0)
"""


@pytest.fixture
def fake():
    engine = versus.Engine("fake", [sys.executable, "-c", FAKE, "0", "0"])
    yield engine
    engine.close()


def test_pairs_are_interleaved_and_each_side_goes_first_in_turn():
    calls = []

    def side(name):
        return lambda: calls.append(name) or len(calls)

    assert versus.paired(side("A"), side("B"), 3) == ([1, 4, 5], [2, 3, 6])
    assert calls == list("ABBAAB")


def test_the_ratio_is_the_median_over_pairs():
    row = versus.Row("tg 32", [10.0, 30.0, 20.0], [10.0, 10.0, 40.0])
    assert row.ratios == [1.0, 3.0, 0.5] and row.ratio == 1.0
    assert versus.Row("open", [2.0], [1.0], unit="s").ratio == 0.5          # twice the time is half as good


def test_every_depth_gets_every_test_and_an_empty_list_none():
    names = [versus.test_name(cell) for cell in versus.cells((512,), (), (1, 8), (0, 64))]
    assert names == ["pp 512", "verify 1", "verify 8", "pp 512 @64", "verify 1 @64", "verify 8 @64"]


def test_the_whole_table_names_its_tests_as_they_are_printed():
    for entry in versus.TABLE:
        assert ", ".join(map(versus.test_name, entry.cells)) == entry.tests
        assert entry.shape in synth.MODELS
    assert {entry.section for entry in versus.chosen("depth, 7b", False)} == {"depth", "7b"}
    assert not any(entry.cpu for entry in versus.chosen("", False))
    assert len(versus.chosen("", True)) == len(versus.TABLE)
    with pytest.raises(click.UsageError, match="Q9"):
        versus.chosen("Q9", False)


def test_files_or_the_table_but_not_both(tmp_path):
    for arguments in ([], ["--table", str(tmp_path), __file__]):
        assert CliRunner().invoke(versus.main, arguments).exit_code == 2


def test_the_table_is_markdown_with_a_line_for_each_row():
    rows = [versus.Row("open", [0.5, 0.4], [1.0, 1.0], unit="s"),
            versus.Row("verify 8 @4096", [2500.0] * 3, [100.0, 125.0, 50.0], mode="no flash attention",
                       limits=[{"tok_s": 5000, "by": "memory"}] * 3)]
    lines = [*versus.table_head().splitlines(), *map(versus.table_line, rows)]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {len(line) for line in cells} == {7} and len({len(line) for line in lines}) == 1
    assert cells[2] == ["open, s", "0.45", "1.00", "2.25", "2.00..2.50", "", ""]
    assert cells[3] == ["verify 8 @4096", "2500", "100.0", "25.00", "20.00..50.00", "50% memory",
                        "no flash attention"]


def test_each_run_is_held_against_the_limit_of_its_moment():
    limits = [{"tok_s": 100, "by": "memory"}, {"tok_s": 200, "by": "kernels"}, {"tok_s": 400, "by": "memory"}]
    row = versus.Row("tg 8", [90.0, 120.0, 200.0], [1.0] * 3, limits=limits)
    assert row.limit == {"share": 0.6, "tok_s": 200, "by": "kernels"}
    assert versus.Row("open", [1.0], [2.0], unit="s").limit is None


@pytest.fixture
def loaded(tmp_path):
    with pybmc.Model(tiny(tmp_path), threads=1) as model:
        yield model


def test_a_limit_is_memory_or_kernels(loaded):
    """Whichever takes longer; the head's products count once for a prompt and n times for a verification."""
    layers, head = limits.weight_counts(loaded)
    n_layers, n_head = sum(layers.values()), sum(head.values())
    assert n_layers > 0 < n_head
    slow = limits.Limits(1e18, dict.fromkeys(layers | head, 1e6), 1e18)
    for test, times, heads in (("pp", 8, 1), ("verify", 8, 8), ("tg", 1, 1)):
        least, by = slow.seconds(loaded, test, 8, 0, 100)
        assert by == "kernels" and least == pytest.approx((times * n_layers + heads * n_head) / 1e6)
    deep = limits.Limits(1e6, slow.weights | dict.fromkeys(slow.weights, 1e18), 1e18)
    assert deep.seconds(loaded, "tg", 2, 10, 1000) == (pytest.approx((loaded.packed_bytes + 11_000) / 1e6),
                                                       "memory")
    attention = limits.Limits(1e18, deep.weights, 1e6)
    products = 2 * loaded.config.n_layers * loaded.config.q_dim * (10 + 1) * 2
    assert attention.seconds(loaded, "pp", 2, 10, 1) == (pytest.approx(products / 1e6), "kernels")


def test_limits_are_measured(loaded, monkeypatch):
    monkeypatch.setattr(lab, "read_bandwidth", lambda threads: 1e10)        # half a gigabyte for nothing
    found = limits.limits_of(loaded)
    assert found.read == 1e10 and found.floats > 1e7 and min(found.weights.values()) > 1e6
    with pytest.raises(pybmc.ArgumentError, match="threads, found 0"):
        lab.arithmetic_rate(0)
    for type_id, threads in ((15, 1), (-1, 1), (10**6, 1), (8, 0)):
        with pytest.raises(pybmc.ArgumentError, match="expected a type that computes"):
            lab.arithmetic(type_id, threads)


def test_json_lines_keep_every_measurement():
    row = versus.Row("verify 8", [300.0, 100.0], [100.0, 100.0], mode="m", cell=versus.Cell("verify", 8, 0))
    line = json.loads(json.dumps(versus.json_line("a.gguf", 2, row)))
    assert line["test"] == "verify"
    assert (line["n"], line["depth"], line["threads"], line["reps"]) == (8, 0, 2, 2)
    assert ((line["pybmc"], line["llama_cpp"], line["ratio"], line["ratio_min"], line["ratio_max"])
            == (200, 100, 2, 1, 3))
    assert line["pybmc_all"] == [300, 100] and line["mode"] == "m"


def test_a_difference_is_reported_and_a_large_one_with_what_tells_whose_it_is():
    found = versus.Distance(n=128, error=0.0123, error_median=0.01, top1=0.953, kl_mean=0.0017, kl_p99=0.009)
    text = versus.agreement_text("a.gguf", found)
    for part in ("1.23% of their spread", "top-1 agreement 95.3%", "KL divergence 0.0017"):
        assert part in text
    assert "exact.py" not in text
    assert "python -m tools.exact a.gguf" in versus.agreement_text("a.gguf", replace(found, error=0.07))


def test_noise_is_what_neither_engine_used(monkeypatch):
    monkeypatch.setattr(versus.os, "cpu_count", lambda: 2)
    assert versus.noise(np.zeros(3), np.array([16.0, 1.0, 12.0]), 10) == {"others": 0.2, "stolen": 0.05}
    assert versus.noise(None, None, 10) == {}


def test_an_engine_answers_and_its_faster_mode_is_taken(fake):
    assert fake.version == "fake 1"
    row = versus.compare(fake, fake, versus.Cell("tg", 1, 0), 2)
    assert (row.ours, row.theirs, row.mode) == ([21, 21], [21, 21], "fast")
    assert fake.idle == 0.25


def faked(monkeypatch, seeds=("0", "0"), starts=("0", "0")):
    """Two fake engines: the seeds of their logits, and where in the text their tokens begin."""
    @contextmanager
    def pair(peer_python, cpu):
        names = (versus.OURS, versus.THEIRS)
        engines = [versus.Engine(name, [sys.executable, "-c", FAKE, *more])
                   for name, *more in zip(names, seeds, starts)]
        yield engines
        for engine in engines:
            engine.close()

    monkeypatch.setattr(versus, "engines", pair)
    monkeypatch.setattr(versus, "openings", lambda *arguments, **what: ())


ONE_TEST = ["-p", "", "-n", "1", "-b", "", "-d", "0", "-r", "1", "-t", "1"]


def test_engines_that_agree_are_timed_and_the_agreement_is_in_the_json(tmp_path, monkeypatch):
    faked(monkeypatch)
    done = CliRunner().invoke(versus.main, [tiny(tmp_path), *ONE_TEST, "--json"])
    assert done.exit_code == 0, done.output
    row, machine = map(json.loads, done.output.splitlines())
    assert row["ratio"] == 1
    nothing = dict.fromkeys(("error", "error_median", "kl_mean", "kl_p99"), 0)
    assert machine["agreement"] == {"n": 2 * versus.CHECKED, "top1": 1, **nothing}
    done = CliRunner().invoke(versus.main, [tiny(tmp_path), *ONE_TEST])
    assert "differ from llama.cpp's by 0.00%" in done.output


@pytest.mark.parametrize("difference, message", [
    ({"seeds": ("0", "1")}, "nothing was timed: the engines do not compute the same model: expected"),
    ({"starts": ("0", "1")}, "as different tokens: from number 0 on"),
])
def test_engines_of_different_models_are_not_timed(difference, message, tmp_path, monkeypatch):
    faked(monkeypatch, **difference)
    done = CliRunner().invoke(versus.main, [tiny(tmp_path), *ONE_TEST])
    assert done.exit_code == 3 and message in done.output and "|" not in done.output


def test_an_engine_that_fails_or_dies_is_one_sentence(fake):
    with pytest.raises(click.ClickException, match="^cannot fly$"):
        fake.ask("fly")
    with pytest.raises(click.ClickException, match="fake: its process ended with status 7"):
        fake.ask("die")
    with pytest.raises(click.ClickException, match="ended with status 7"):
        fake.ask("run")
    with pytest.raises(click.ClickException, match="does not start"):
        versus.Engine("none", ["/no/such/python"])


def test_without_the_peer_the_message_says_what_to_install(tmp_path):
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('none here')")
    done = subprocess.run([sys.executable, "-m", "tools.versus_worker", "llama.cpp"], capture_output=True,
                          text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert "pip install llama-cpp-python" in json.loads(done.stdout)["error"]


def test_the_worker_serves_pybmc(tmp_path):
    path, out, file = tiny(tmp_path), [], tmp_path / "logits"
    requests = [{"do": "open", "path": path, "threads": 1, "context": 32, "outputs": 4},
                {"do": "tokens", "text": "in the end"},
                {"do": "logits", "tokens": [5, 6, 7], "file": str(file), "width": 2},
                {"do": "run", "kind": "verify", "n": 4, "depth": 16, "mode": ""}, {"do": "close"},
                {"do": "fly"}]
    worker = versus_worker.Worker(versus_worker.Pybmc())
    versus_worker.serve(worker, {"version": ""}, map(json.dumps, requests), out.append)
    about, opened, tokens, logits, run, closed, unknown = map(json.loads, out)
    assert opened["seconds"] > 0 and logits["shape"] == [3, opened["vocab_size"]]
    with pybmc.Model(path, threads=1) as model, model.session() as session:
        assert tokens["ids"] == model.tokenizer.encode("in the end")
        right = session.eval([5, 6, 7], logits="all")
    assert np.array_equal(np.fromfile(file, np.float32).reshape(right.shape), right)
    assert run["tok_s"] > 0 and 0 <= run["idle"] and "fly" in unknown["error"] and "error" not in closed


def test_against_the_real_peer(tmp_path):
    python = os.environ.get("PYBMC_PEER_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode:
        pytest.skip(f"{python} has no llama_cpp")
    arguments = ["-p", "64", "-n", "4", "-b", "2", "-d", "0,32", "-r", "1", "-t", "1", "--peer-python",
                 python, "--json"]
    done = CliRunner().invoke(versus.main, [tiny(tmp_path), *arguments])
    assert done.exit_code == 0, done.output
    *rows, machine = map(json.loads, done.output.splitlines())
    assert [row["test"] for row in rows if "n" in row] == ["pp", "tg", "verify"] * 2
    assert machine["agreement"]["top1"] > 0.8 and machine["agreement"]["error"] < 0.1


def tiny(folder):
    path = folder / "tiny.gguf"
    synth.write(path, replace(synth.MODELS["tiny"], n_layers=1), "Q4_0")
    return str(path)
