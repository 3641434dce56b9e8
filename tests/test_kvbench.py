"""tune, the constants it keeps, `bench kv`, its predictions and figures."""

import json
from dataclasses import replace

import pytest
import tiny

import pybmc
from pybmc import balance, kvbench, machine, synthetic, tune
from pybmc._native import lib
from pybmc.cli import run
from pybmc.growth import Growth
from pybmc.machine import Machine

SMALL = synthetic.Shape("small", 2, 4, 2, 32, "for tests")


@pytest.fixture(scope="module")
def model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "WEIGHT_BYTES", 1 << 20)
        with synthetic.SyntheticModel(SMALL, 1) as model:
            yield model


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Nothing is measured for long, or kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tune, "PAGES", 4 << 20)
    monkeypatch.setattr(tune, "TUNED", ("small",))
    monkeypatch.setattr(tune, "read_bandwidth", lambda threads: 1e10)
    monkeypatch.setattr(synthetic, "SHAPES", {"small": SMALL})
    monkeypatch.setattr(synthetic, "WEIGHT_BYTES", 1 << 20)
    machine.known.cache_clear()
    yield
    machine.known.cache_clear()


def test_a_synthetic_model_evaluates(model):
    assert model.config.kv_row_bytes == 2 * 2 * 2 * 32 * 2 and model.tokenizer is None
    with model.session() as session, model.session(rows=Growth("copy", 16, pad=True)) as other:
        logits = session.eval(range(40), logits="all")
        assert (logits == other.eval(range(40), logits="all")).all() and logits.std() > 0
        session._fill(100)
        assert session.position == 140 and len(session.tokens) == 140
        assert abs(session.eval([3])).max() < 1e4
    with pytest.raises(pybmc.ArgumentError, match="no shape"):
        synthetic.SyntheticModel("nothing")


def test_filled_rows_survive_growth(model):
    """Noise is rows like any others: what is evaluated after it does not depend on how the arena grew."""
    results = []
    for rows in ("max", 1, "chunk:16", "geometric"):
        with model.session(context=400, rows=rows) as session:
            for n in (33, 100, 64):
                session._fill(n)
            results.append(session.eval([1, 2, 3], logits="all"))
    assert all((result == results[0]).all() for result in results)


# ---- constants -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", range(lib.BMC_PROBE_COPY + 1))
def test_every_probe_measures(probe):
    assert tune.memory_seconds(probe, 4 << 20) > 0


@pytest.mark.parametrize("probe, n_bytes", [(-1, 4096), (99, 4096), (0, 0), (0, 5), (0, 1 << 40)])
def test_there_are_no_other_probes(probe, n_bytes):
    with pytest.raises(pybmc.ArgumentError):
        tune.memory_seconds(probe, n_bytes)


def test_arithmetic_is_of_types_that_compute():
    assert tune.arithmetic(8, 1) > 0 and tune.arithmetic(0, 2) > 0
    for type_id, threads in ((16, 1), (-1, 1), (10**6, 1), (8, 0)):
        with pytest.raises(pybmc.ArgumentError):
            tune.arithmetic(type_id, threads)


def test_what_is_kept_is_found_again(quick):
    found = Machine(copy=3e-10, attention={2: {1: 1e-10, 8: 3e-10}}, measured="today")
    assert machine.known(3) == Machine()
    path = machine.keep(found, 3)
    assert machine.known(3) == found and machine.known(2) == Machine()
    assert found.attention_s(4, 1) == 1e-10 and found.attention_s(1, 16) == 6e-10
    assert found.attention_s(2, 4) == pytest.approx(1e-10 + 2e-10 * 3 / 7)
    kept = json.loads(path.read_text())
    for change in ({"copy": -1}, {"copy": "fast"}, {"copy": 0}, {"attention": {}}, {"attention": {"1": {}}},
                   {"more": 1}, {"key": None}, {"attention": {"1": {"1": "x"}}}, {"read_bytes_s": 0}, {"map_s": float("nan")}):
        path.write_text(json.dumps(kept | change))
        machine.known.cache_clear()
        assert machine.known(3) == Machine(), change
    for text in ("", "[]", "null", "{" * 10**5):
        path.write_text(text)
        machine.known.cache_clear()
        assert machine.known(3) == Machine()


def test_a_folder_that_cannot_be_written_is_no_failure(quick, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    machine.keep(Machine(), 1)
    assert machine.known(1) == Machine()


def test_tune_says_what_it_found_and_others_use_it(quick, capsys):
    path = str(tiny.model("llama"))
    assert run(["tune", path, "-t", "1"]) == 0
    out = capsys.readouterr().out
    for words in ("GB/s", "GOP/s", "small pages", "--rows auto", "a pass of so many", "Kept in"):
        assert words in out
    kept = machine.known(1)
    assert kept.measured and kept.map_s > 0 and kept.attention[2][16] > 0
    with pybmc.Model(path, threads=1) as loaded, loaded.session() as session:
        assert session.arena_stats().why
    assert run(["tune", "--json", "-t", str(lib.bmc_cpu_count())]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["copy"] > 0 and found["threads"] == lib.bmc_cpu_count()
    assert run(["bench", path, "-p", "8", "-n", "", "-b", "", "-r", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["roof"] > 0
    assert run(["show", path, "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["limit_tok_s"] > 0 and info["auto_rows"] == 256
    assert run(["show", path]) == 0 and "limit here" in capsys.readouterr().out


def test_chunks_follow_what_growth_costs():
    s = 32 << 10
    rows = [balance.chunk_rows(replace(Machine(), map_s=a), s) for a in (1e-7, 1.7e-5, 3e-5, 1)]
    assert rows == sorted(rows) and rows[0] * s >= 2 << 20 and rows[-1] * s <= 8 << 20


# ---- the bench -------------------------------------------------------------------------------------------------


PLAN = kvbench.Plan(shapes=("small",), prompts=(20, 40), generated=64, rows=(1, 16, 64), ks=(0, 3), reps=2,
                    lengths=(100,))


@pytest.fixture
def results(quick):
    return list(kvbench.bench_kv(PLAN, 1))


def test_every_setting_is_measured_and_predicted(results):
    settings = [r.setting for r in results if isinstance(r, kvbench.Result)]
    assert len([s for s in settings if not s.growth.pad]) == len(kvbench.POLICIES)
    assert len([s for s in settings if s.growth.policy == "max" and s.growth.pad]) == 4
    assert sum(s.r_star for s in settings) == 4
    for r in results:
        json.dumps(r.line())
        if isinstance(r, kvbench.Result):
            assert r.attention_ms > 0 and r.rest_ms > 0 and r.predicted_ms > 0 and r.worst_ms >= r.median_ms
            assert min(r.allocate_ms, r.copy_ms, r.touch_ms) >= 0
            assert (r.copy_ms > 0) == (r.copied_mb > 0)
    found = kvbench.verdicts([r for r in results if isinstance(r, kvbench.Result)])
    assert [(v.prompt, v.k) for v in found] == [(20, 0), (20, 3), (40, 0), (40, 3)]
    text = "\n".join(kvbench.sentences(results))
    assert "of 4: r* within" in text and "--rows auto at 100 rows" in text


def test_the_floor_is_that_of_the_curve_and_not_of_a_point():
    """Times that are off by 3% here and there: the best point is an accident, the curve's floor is not."""
    rows = [1, 16, 64, 80, 256, 1024]
    exact = [10 + 400 / r + 0.1 * r for r in rows]
    assert kvbench.floor_of(rows, exact, 63) == (63, pytest.approx(1, abs=1e-4))
    assert kvbench.floor_of(rows, exact, 126)[1] == pytest.approx((10 + 400 / 126 + 12.6) / (10 + 2 * 40**0.5), rel=1e-3)
    noisy = [t * f for t, f in zip(exact, (1.02, 0.98, 1.03, 1.02, 0.97, 1.01))]
    best, ratio = kvbench.floor_of(rows, noisy, 63)
    assert 50 < best < 80 and 1 <= ratio < 1.01
    assert kvbench.floor_of(rows, [300 - 0.1 * r for r in rows], 63)[0] == 0      # ever cheaper: no floor between
    assert kvbench.floor_of([1, 16, 64], exact[:3], 16)[0] == 0        # three points fit any three numbers


def test_the_sample_has_the_arena_of_the_whole(model):
    """Reserved rows are those of a run over every token."""
    for growth in (Growth("copy", 1), Growth("copy", 16), Growth("geometric", 16), Growth("chunk", 32), Growth("max")):
        for k in (0, 3):
            s = kvbench.Setting("small", growth, 20, 100, k)
            with model.session(context=s.cap, rows=growth) as session:
                session._fill(s.prompt)
                seen = []
                for i in range(round(s.generated / s.tau)):
                    used, before = s.prompt + int(i * s.tau), session.rows
                    session._fill(max(0, used - session.position))
                    session.eval([1] * s.width, logits="none")
                    session.rewind(used)
                    if session.rows > before:
                        seen.append(kvbench.Grow(i, used, before, session.rows))
            assert kvbench.growths_of(s) == seen


def test_every_token_gives_the_same_kind_of_numbers(model):
    s = kvbench.Setting("small", Growth("copy", 16, touch=True, pad=True), 40, 64)
    sampled, whole = kvbench.measure(model, s), kvbench.measure(model, s, whole=True)
    assert whole.growths == sampled.growths == 4 and whole.copied_mb == sampled.copied_mb
    assert whole.attention_ms > 0 and whole.touch_ms > 0


def test_the_command(quick, capsys, tmp_path):
    assert run(["bench", "kv", "--shapes", "small", "-p", "20", "-n", "32", "--rows", "1,16", "-k", "0", "-r", "1",
                "-t", "1", "--json"]) == 0
    out = capsys.readouterr().out
    lines = [json.loads(line) for line in out.splitlines()]
    assert {line["test"] for line in lines} == {"constants", "kv", "stall"}
    path = str(tiny.model("llama"))
    assert run(["bench", "kv", path, "-p", "20", "-n", "32", "--rows", "16", "-k", "0,3", "-r", "1", "-t", "1"]) == 0
    assert "r* within a factor 2" in capsys.readouterr().out
    for bad in (["-p", "0"], ["-p", ""], ["-k", "99"], ["--rows", "0"], ["--shapes", "nothing"]):
        assert run(["bench", "kv", *bad]) == 2
    assert run(["bench", path, "-p", "", "-n", "2", "-b", "", "-r", "1"]) == 0         # the other bench is still there
    pytest.importorskip("matplotlib")
    (tmp_path / "lines.json").write_text(out)
    assert run(["bench", "kv", "--from", str(tmp_path / "lines.json"), "--figures", str(tmp_path / "drawn")]) == 0
    assert {p.name for p in (tmp_path / "drawn").iterdir()} == {"bmc-curve.svg", "bmc-parts.svg", "bmc-memory.svg"}


@pytest.mark.parametrize("text, said", [
    ("", "no measurement"), ('{"x"', "line 1"), ("[]", "line 1"), ('{"test": "kv"}\nx', "line 2"), ('{"test": "stall"}', "no measurement")])
def test_what_bench_kv_did_not_print_is_refused(text, said, tmp_path, capsys):
    (tmp_path / "lines.json").write_text(text)
    assert run(["bench", "kv", "--from", str(tmp_path / "lines.json")]) == 1
    assert said in capsys.readouterr().err
