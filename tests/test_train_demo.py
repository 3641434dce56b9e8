"""The training of the bundled pair at toy size: all stages, and a pair that an engine can open."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("tokenizers")
gguf = pytest.importorskip("gguf")

TOOLS = Path(__file__).resolve().parents[1] / "tools"


def run(work, out, *more):
    command = [sys.executable, "-m", "train_demo", "--smoke", "--work", str(work), "--out", str(out), *more]
    return subprocess.run(command, cwd=TOOLS, env={**os.environ, "PYTHONPATH": str(TOOLS)}, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """(work, out) of one smoke run."""
    work, out = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("out")
    done = run(work, out)
    assert done.returncode == 0, done.stderr[-2000:]
    return work, out


def test_smoke_run_leaves_a_pair_and_its_card(smoke):
    work, out = smoke
    vocabularies = []
    for name in ("teller.gguf", "teller-draft.gguf"):
        reader = gguf.GGUFReader(out / name)
        assert reader.get_field("general.architecture").contents() == "llama"
        assert {t.tensor_type for t in reader.tensors if len(t.shape) == 2} == {gguf.GGMLQuantizationType.Q8_0}
        vocabularies.append([reader.get_field(f"tokenizer.ggml.{k}").contents() for k in ("tokens", "merges", "token_type")])
    assert vocabularies[0] == vocabularies[1]
    assert "## Ten tales" in (out / "README.md").read_text()


def test_smoke_run_learns_and_drafts(smoke):
    results = json.loads((smoke[0] / "results.json").read_text())
    assert results["target_heldout"]["nats_per_token"] < 4.5        # a uniform guess over 512 tokens costs 6.2
    assert 0 < results["greedy"]["rate"] <= 1
    by_position = results["greedy"]["by_position"]
    assert by_position == sorted(by_position, reverse=True)


def test_a_second_run_trains_nothing(smoke):
    work, out = smoke
    before = (work / "target.pt").stat().st_mtime_ns
    again = run(work, out, "--stage", "target")
    assert again.returncode == 0 and (work / "target.pt").stat().st_mtime_ns == before
