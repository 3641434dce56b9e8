"""The check of a GPU, by the driver that runs the kernels on the CPU: each part at toy sizes, its limits, and
what it makes of failures."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gpu
import numpy as np
import pytest

import pybmc
from pybmc.engine.gpu import describe
from tools import gpu_check, gpu_parts

ROOT = Path(__file__).parents[1]


@pytest.fixture
def fake(monkeypatch):
    path = gpu.build()
    monkeypatch.setenv("PYBMC_CUDA_DRIVER", str(path))
    monkeypatch.setenv("PYBMC_CUDA_KERNELS", str(path))
    return gpu.Fake(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def check(fake, models):
    """Of toy sizes, and what it tells."""
    told = []
    return gpu_parts.Check(describe(0), gpu_parts.TOY, models, told.append), told


@pytest.mark.parametrize("part", gpu_parts.PARTS)
def test_each_part_runs(part, check):
    made, told = check
    gpu_parts.run_part(made, part)
    assert all(row["part"] == part for row in told) and len(told) > 1
    assert all(row.get("different", 0) == 0 and row.get("equal", True) for row in told)
    assert all(value > 0 for row in told for key, value in row.items() if key.startswith("tok_s"))
    assert all(gpu_check.line_of(json.loads(json.dumps(row))).startswith(part) for row in told)


def test_other_bits_are_told_of_every_model(check, monkeypatch):
    """Each type and width that differs, not the first alone."""
    made, told = check
    honest, calls = gpu_parts.passes, []

    def twisted(*arguments):
        calls.append(arguments)
        rows = honest(*arguments)
        if len(calls) % 2 == 0:
            rows[2] = rows[2] + np.float32(1)
        return rows

    monkeypatch.setattr(gpu_parts, "passes", twisted)
    with pytest.raises(gpu_parts.DiffersError, match="2 comparisons found other bits"):
        gpu_parts.run_part(made, "bits")
    assert [row["width 3"] for row in told if row.get("different")] == ["3 of 3 rows, by up to 1"] * 2


def test_not_a_number_is_another_bit():
    zeros = np.zeros((1, 4), np.float32)
    assert gpu_parts.differing([zeros, -zeros], [zeros, zeros], (1,)) == {1: "1 of 1 rows, by up to 0"}
    assert 1 in gpu_parts.differing([zeros * np.nan, zeros], [zeros, zeros], (1,))


@pytest.fixture
def report(tmp_path):
    return gpu_check.Report(tmp_path)


def saying(*lines, code=0):
    program = f"import sys\nfor line in {lines!r}: print(line, flush=True)\nsys.exit({code})"
    return [sys.executable, "-c", program]


def test_results_are_kept_at_once(report, capsys):
    row = {"part": "bits", "name": "a", "tok_s": 1.25}
    assert gpu_check.run(report, "bits", saying(json.dumps(row), "a warning", "[1]", code=1), 60) == 1
    kept = [json.loads(line) for line in (report.out / "gpu_check.jsonl").read_text().splitlines()]
    assert kept[0] == row and kept[-1]["name"] == "took"
    assert "a warning" in capsys.readouterr().out


@pytest.mark.parametrize("command, code, name, why", [
    (["-c", "import time; time.sleep(60)"], 1, "not done", "its 0.5 seconds are over"),
    (["-c", "import os; print('said', flush=True); os.abort()"], -6, "failed", "the process ended with -6"),
], ids=["hangs", "crashes"])
def test_a_part_that_does_not_end_well(command, code, name, why, report):
    seconds = 0.5 if name == "not done" else 60
    assert gpu_check.run(report, "bits", [sys.executable, *command], seconds) == code
    assert any(row["name"] == name and row["why"] == why for row in report.results)


def test_what_follows_other_bits(report, monkeypatch):
    """The rest of what compares bits is run, rates are not."""
    ran = []

    def part(report, name, command, seconds):
        ran.append(name)
        return 3 if name == "bits" else 0

    monkeypatch.setattr(gpu_check, "run", part)
    arguments = ["--out", str(report.out), "--parts", "bits,golden,rates_1b"]
    assert gpu_check.run_all(report, gpu_check.parsed(arguments), report.out) == 3
    assert ran == ["bits", "golden"]
    ran.clear()
    assert gpu_check.run_all(report, gpu_check.parsed([*arguments, "--go-on"]), report.out) == 3
    assert ran == ["bits", "golden", "rates_1b"]


def test_the_whole_takes_less_than_eight_minutes():
    assert sum(seconds for _, seconds in gpu_parts.PARTS.values()) <= 480
    parts = list(gpu_parts.PARTS)
    assert set(gpu_parts.EQUALITY) < set(parts) and parts[:3] == list(gpu_parts.EQUALITY)
    for name in gpu_parts.PARTS:                    # the two calls that its docstring names
        assert name in gpu_check.__doc__


def test_a_part_in_its_process(fake, tmp_path):
    arguments = [
        sys.executable, "-m", "tools.gpu_check", "--out", tmp_path / "out", "--toy", "--parts", "golden,roofs"
    ]
    found = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert found.returncode == 0, found.stdout + found.stderr
    kept = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert kept["exit_code"] == 0 and kept["gpu"]["name"] == "CPU grid"
    assert [row["part"] for row in kept["results"] if row["name"] == "took"] == ["golden", "roofs"]


def test_a_gpu_that_fails_is_a_part_that_fails(check, monkeypatch, capsys, tmp_path):
    def part(_):
        raise pybmc.DeviceError("GPU 0: computing: unspecified launch failure (719)")

    monkeypatch.setitem(gpu_parts.PARTS, "roofs", (part, 20))
    folder = str(tmp_path)
    options = gpu_check.parsed(["--out", folder, "--models", folder, "--only", "roofs", "--toy"])
    assert gpu_check.child(options) == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["name"] == "failed" and "unspecified launch failure" in last["why"]


def test_sizes_are_those_of_real_models():
    real = gpu_parts.Sizes()
    assert (real.one.n_layers, real.eight.n_layers, real.eight.dim) == (16, 32, 4096)
    assert replace(real) == real and real != gpu_parts.TOY


def test_without_a_gpu(tmp_path):
    env = os.environ | {"PYBMC_CUDA_DRIVER": str(tmp_path / "none.so")}
    found = subprocess.run([sys.executable, "-m", "tools.gpu_check", "--out", tmp_path], capture_output=True,
                           text=True, env=env, cwd=ROOT, timeout=60)
    assert found.returncode == 1 and found.stdout == ""
    assert "no GPU can be used" in found.stderr and found.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments, what", [
    (["--parts", "bits,all"], "found all"), (["--gpu", "x"], "invalid int"),
    (["--limit", "0"], "more than 0 seconds, found 0"),
], ids=str)
def test_wrong_arguments(arguments, what, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        gpu_check.main(["--out", str(tmp_path), *arguments])
    assert error.value.code == 2 and what in capsys.readouterr().err
