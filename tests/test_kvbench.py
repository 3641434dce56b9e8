"""tools.kvbench: the constants of the model, what is measured, its predictions and figures."""

import json

import pytest
import tiny
from click.testing import CliRunner

import pybmc
from pybmc._native import lib
from tools import kv_study, kvbench, lab, machine, synthetic
from tools.growth import GrowingSession, Growth, parse

SMALL = synthetic.Shape("small", 2, 4, 2, 32, "for tests")


@pytest.fixture(scope="module")
def model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "WEIGHT_BYTES", 1 << 20)
        with synthetic.SyntheticModel(SMALL, 1) as model:
            yield model


@pytest.fixture
def quick(monkeypatch):
    """Nothing is measured for long."""
    monkeypatch.setattr(machine, "PAGES", 4 << 20)
    monkeypatch.setattr(synthetic, "SHAPES", {"small": SMALL})
    monkeypatch.setattr(synthetic, "WEIGHT_BYTES", 1 << 20)
    monkeypatch.setattr(kv_study, "LENGTHS", (100,))


def run(*arguments):
    return CliRunner().invoke(kvbench.main, [str(argument) for argument in arguments])


def test_a_synthetic_model_evaluates(model):
    assert model.config.kv_row_bytes == 2 * 2 * 2 * 32 * 2 and model.tokenizer is None
    with GrowingSession(model, Growth(), 200) as session, \
            GrowingSession(model, Growth("copy", 16, pad=True), 200) as other:
        logits = session.eval(range(40), logits="all")
        assert (logits == other.eval(range(40), logits="all")).all() and logits.std() > 0
        session.fill(100)
        assert session.position == 140 and len(session.session.tokens) == 140
        assert abs(session.eval([3])).max() < 1e4
    with pytest.raises(pybmc.ArgumentError, match="no shape"):
        synthetic.SyntheticModel("nothing")


def test_filled_rows_survive_growth(model):
    """Noise is rows like any others: what is evaluated after it does not depend on how the arena grew."""
    results = []
    for policy in ("max", "copy:1", "chunk:16", "geometric", "reserve:16"):
        with GrowingSession(model, parse(policy), 400) as session:
            for n in (33, 100, 64):
                session.fill(n)
            results.append(session.eval([1, 2, 3], logits="all"))
    assert all((result == results[0]).all() for result in results)


# ---- constants ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", range(lib.BMC_PROBE_COPY + 1))
def test_every_probe_measures(probe):
    assert lab.memory_seconds(probe, 4 << 20) > 0


@pytest.mark.parametrize("probe, n_bytes", [(-1, 4096), (99, 4096), (0, 0), (0, 5), (0, 1 << 40)])
def test_there_are_no_other_probes(probe, n_bytes):
    with pytest.raises(pybmc.ArgumentError):
        lab.memory_seconds(probe, n_bytes)


def test_constants_are_measured(quick):
    found = vars(machine.measure_machine())
    assert all(seconds > 0 for name, seconds in found.items() if not name.startswith("remap"))
    assert min(found.values()) >= 0


# ---- the bench ---------------------------------------------------------------------------------------------


PLAN = kv_study.Plan(shapes=("small",), prompts=(20, 40), generated=64, rows=(1, 16, 64), ks=(0, 3), reps=2,
                    lengths=(100,))


@pytest.fixture
def results(quick):
    return list(kv_study.bench_kv(PLAN, 1))


def test_every_setting_is_measured_and_predicted(results):
    settings = [r.setting for r in results if isinstance(r, kv_study.Result)]
    assert len([s for s in settings if not s.growth.pad]) == len(kv_study.POLICIES)
    assert len([s for s in settings if s.growth.policy == "max" and s.growth.pad]) == 4
    assert sum(s.r_star for s in settings) == 4
    for r in results:
        json.dumps(r.line())
        if isinstance(r, kv_study.Result):
            assert r.attention_ms > 0 and r.rest_ms > 0 and r.predicted_ms > 0 and r.worst_ms >= r.median_ms
            assert min(r.allocate_ms, r.copy_ms, r.touch_ms) >= 0
            assert (r.copy_ms > 0) == (r.copied_mb > 0)
    found = kvbench.verdicts([r for r in results if isinstance(r, kv_study.Result)])
    assert [(v.prompt, v.k) for v in found] == [(20, 0), (20, 3), (40, 0), (40, 3)]
    text = "\n".join(kvbench.sentences(results))
    assert "of 4: r* within" in text and "chunks at 100 rows" in text


def test_the_floor_is_that_of_the_curve_and_not_of_a_point():
    """Times that are off by 3% here and there: the best point is an accident, the curve's floor is not."""
    rows = [1, 16, 64, 80, 256, 1024]
    exact = [10 + 400 / r + 0.1 * r for r in rows]
    assert kvbench.floor_of(rows, exact, 63) == (63, pytest.approx(1, abs=1e-4))
    assert (kvbench.floor_of(rows, exact, 126)[1]
            == pytest.approx((10 + 400 / 126 + 12.6) / (10 + 2 * 40**0.5), rel=1e-3))
    noisy = [t * f for t, f in zip(exact, (1.02, 0.98, 1.03, 1.02, 0.97, 1.01))]
    best, ratio = kvbench.floor_of(rows, noisy, 63)
    assert 50 < best < 80 and 1 <= ratio < 1.01
    assert kvbench.floor_of(rows, [300 - 0.1 * r for r in rows], 63)[0] == 0  # ever cheaper: no floor between
    assert kvbench.floor_of([1, 16, 64], exact[:3], 16)[0] == 0        # three points fit any three numbers


def test_the_sample_has_the_arena_of_the_whole(model):
    """Reserved rows are those of a run over every token."""
    for growth in (Growth("copy", 1), Growth("copy", 16), Growth("geometric", 16), Growth("chunk", 32),
                   Growth("max")):
        for k in (0, 3):
            s = kv_study.Setting("small", growth, 20, 100, k)
            with GrowingSession(model, growth, s.cap) as session:
                session.fill(s.prompt)
                seen = []
                for i in range(round(s.generated / s.tau)):
                    used, before = s.prompt + int(i * s.tau), session.rows
                    session.fill(max(0, used - session.position))
                    session.eval([1] * s.width, logits="none")
                    session.rewind(used)
                    if session.rows > before:
                        seen.append(kv_study.Grow(i, used, before, session.rows))
            assert kv_study.growths_of(s) == seen


def test_every_token_gives_the_same_kind_of_numbers(model):
    s = kv_study.Setting("small", Growth("copy", 16, touch=True, pad=True), 40, 64)
    sampled, whole = kv_study.measure(model, s), kv_study.measure(model, s, whole=True)
    assert whole.growths == sampled.growths == 4 and whole.copied_mb == sampled.copied_mb
    assert whole.attention_ms > 0 and whole.touch_ms > 0


def test_the_command(quick, tmp_path):
    done = run("--shapes", "small", "-p", 20, "-n", 32, "--rows", "1,16", "-k", 0, "-r", 1, "-t", 1, "--json")
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["test"] for line in lines} == {"constants", "kv", "stall"}
    path = tiny.model("llama")
    table = run(path, "-p", 20, "-n", 32, "--rows", 16, "-k", "0,3", "-r", 1, "-t", 1)
    assert table.exit_code == 0 and "r* within a factor 2" in table.stdout
    for bad in (["-p", "0"], ["-p", ""], ["-k", "99"], ["--rows", "0"], ["--shapes", "nothing"]):
        assert run(*bad).exit_code == 2
    pytest.importorskip("matplotlib")
    (tmp_path / "lines.json").write_text(done.stdout)
    assert run("--from", tmp_path / "lines.json", "--figures", tmp_path / "drawn").exit_code == 0
    assert ({p.name for p in (tmp_path / "drawn").iterdir()}
            == {"bmc-curve.svg", "bmc-parts.svg", "bmc-memory.svg"})


@pytest.mark.parametrize("text, said", [
    ("", "no measurement"), ('{"x"', "line 1"), ("[]", "line 1"), ('{"test": "kv"}\nx', "line 2"),
    ('{"test": "stall"}', "no measurement")])
def test_what_it_did_not_print_is_refused(text, said, tmp_path):
    (tmp_path / "lines.json").write_text(text)
    done = run("--from", tmp_path / "lines.json")
    assert done.exit_code == 1 and said in done.output and "Traceback" not in done.output
