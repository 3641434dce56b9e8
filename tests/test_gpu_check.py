"""The check of a GPU, by the driver that runs the kernels on the CPU: small models, few widths."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu
import pytest

from tools import gpu_check


@pytest.fixture
def fake(monkeypatch):
    path = gpu.build()
    monkeypatch.setenv("PYBMC_CUDA_DRIVER", str(path))
    monkeypatch.setenv("PYBMC_CUDA_KERNELS", str(path))
    monkeypatch.setattr(gpu_check, "TYPES", ("F16", "Q4_K"))
    monkeypatch.setattr(gpu_check, "WIDTHS", (1, 3))
    monkeypatch.setattr(gpu_check, "SMALL", gpu_check.Shape("llama", 256, 2, 8, 4, 256, "tiny", 512))
    return gpu.Fake(path)


def test_bits_are_compared(fake, tmp_path, capsys):
    assert gpu_check.main(["--out", str(tmp_path / "out"), "--parts", "bits"]) == 0
    found = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    compared = [row for row in found["results"] if "different" in row]
    assert [(row["layers"], row["logits"], row["different"]) for row in compared] == [(2, 4, 0)] * 2
    assert "CPU grid" in capsys.readouterr().out


def test_other_bits_end_it(fake, tmp_path, capsys, monkeypatch):
    honest = gpu_check.passes
    calls = []

    def twisted(*arguments):
        calls.append(arguments)
        return honest(*arguments) + (len(calls) == 2)

    monkeypatch.setattr(gpu_check, "passes", twisted)
    assert gpu_check.main(["--out", str(tmp_path), "--parts", "bits,growth"]) == 3
    out = capsys.readouterr().out
    assert "OTHER BITS" in out and "4 of 4 rows of logits differ" in out and "growth" not in out
    assert json.loads((tmp_path / "gpu_check.json").read_text())["exit_code"] == 3


def test_a_gpu_that_fails_ends_it(fake, tmp_path, capsys):
    with fake.set(memory=1 << 16):
        assert gpu_check.main(["--out", str(tmp_path), "--parts", "bits"]) == 1
    assert "out of memory" in capsys.readouterr().out


def test_without_a_gpu(tmp_path):
    env = os.environ | {"PYBMC_CUDA_DRIVER": str(tmp_path / "none.so")}
    found = subprocess.run([sys.executable, "-m", "tools.gpu_check", "--out", tmp_path], capture_output=True, text=True, env=env,
                           cwd=Path(__file__).parents[1], timeout=60)
    assert found.returncode == 1 and found.stdout == "" and "no GPU can be used" in found.stderr and found.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments, what", [(["--parts", "bits,all"], "found all"), (["--gpu", "x"], "invalid int")], ids=str)
def test_wrong_arguments(arguments, what, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        gpu_check.main(["--out", str(tmp_path), *arguments])
    assert error.value.code == 2 and what in capsys.readouterr().err
