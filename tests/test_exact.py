"""tools.exact: the arithmetic of errors, the float32 file, runs with pybmc in llama.cpp's place."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import gguf
import numpy as np
import oracle
import pytest
import tiny
from click.testing import CliRunner
from raw import I64, Entry, Raw, Typed

import pybmc
from pybmc.files.gguf import GGUF
from pybmc.files.types import dequantize
from tools import distance, exact, golden, versus

FLOAT = 1e-3                            # error of float weights, as in test_golden.py


# The arithmetic


def test_distance_of_known_arrays():
    reference = np.log(np.array([[0.5, 0.25, 0.25], [0.7, 0.2, 0.1]]))
    logits = np.log(np.array([[0.25, 0.5, 0.25], [0.7, 0.2, 0.1]])) + 3     # a constant changes no softmax
    found = distance.distance(logits, reference)
    kl = 0.5 * np.log(2) + 0.25 * np.log(0.5)
    assert (found.n, found.top1) == (2, 0.5)
    assert found.kl_mean == pytest.approx(kl / 2) and found.kl_p99 == pytest.approx(0.99 * kl)
    assert found.error == pytest.approx(golden.rms(logits - reference) / reference.std())
    rows = [golden.rms(row) / reference.std() for row in logits - reference]
    assert found.error_median == pytest.approx(np.sqrt(np.mean(np.square(rows))))


def test_distance_does_not_depend_on_the_pieces(monkeypatch):
    rng = np.random.default_rng(0)
    reference = rng.normal(5, 2, (75, 50)).astype(np.float32)
    logits = (reference + rng.normal(0, 0.1, reference.shape)).astype(np.float32)
    tokens = rng.integers(0, 50, 75)
    found, ppl = distance.distance(logits, reference), distance.perplexity(logits, tokens)
    assert found.error == pytest.approx(0.05, rel=0.05) and 0.9 < found.top1 < 1
    monkeypatch.setattr(distance, "ROWS", 1000)
    assert vars(distance.distance(logits, reference)) == pytest.approx(vars(found))
    assert distance.perplexity(logits, tokens) == pytest.approx(ppl)


def test_one_bad_row_shows_in_the_error_and_not_in_the_median():
    reference = np.random.default_rng(0).normal(0, 1, (9, 100))
    logits = reference + 0.01
    logits[4] += 5
    found = distance.distance(logits, reference)
    assert found.error > 1 and found.error_median == pytest.approx(0.01, rel=0.1)


def test_equal_logits_are_at_distance_zero_and_others_that_are_not_finite_infinitely_far():
    reference = np.random.default_rng(0).normal(0, 1, (5, 20))
    assert vars(distance.distance(reference, reference)) == {
        "n": 5, "error": 0, "error_median": 0, "top1": 1, "kl_mean": 0, "kl_p99": 0}
    for wrong in (np.nan, np.inf):
        logits = reference.copy()
        logits[3, 7] = wrong
        found = distance.distance(logits, reference)
        assert (found.error, found.top1, found.kl_mean) == (np.inf, 0, np.inf)


def test_perplexity_of_known_probabilities():
    logits = np.log(np.array([[0.5, 0.5], [0.25, 0.75], [0.1, 0.9]]))
    assert distance.perplexity(logits, [0, 1, 0]) == pytest.approx((0.5 * 0.25) ** -0.5)


def test_results_say_how_far_each_engine_is_and_the_ratio():
    rng, tokens = np.random.default_rng(0), np.arange(40)
    reference = rng.normal(0, 2, (40, 60))
    near, far = (reference + rng.normal(0, std, reference.shape) for std in (0.02, 0.08))
    found = exact.results({"pybmc": near, "llama.cpp": far}, reference, tokens)
    assert found["ratio"]["error"] == pytest.approx(0.25, rel=0.05)
    assert found["ratio"]["kl_mean"] == pytest.approx(1 / 16, rel=0.2)
    assert "0.25 times llama.cpp's" in exact.verdict(found)
    lines = [line.split("|")[1:-1] for line in exact.table(found).splitlines()]
    assert [line[0].strip("- ") for line in lines] == ["", "", "float32", "pybmc", "llama.cpp", "ratio"]
    assert len({tuple(map(len, line)) for line in lines}) == 1
    assert lines[5][1].strip() == f"{found['ratio']['error']:.3g}"
    with pytest.raises(exact.click.ClickException, match="expected logits"):
        exact.results({"pybmc": near[:, :50]}, reference, tokens)
    with pytest.raises(exact.click.ClickException, match="pybmc or of float32 are not finite"):
        exact.results({"pybmc": near * np.nan}, reference, tokens)


# The float32 file


def float32_of(path, folder):
    copy = folder / "copy.gguf"
    with GGUF(path) as source:
        exact.write_float32(source, copy)
        assert abs(exact.float32_bytes(source) - copy.stat().st_size) < 64 * (len(source.tensors) + 10)
    return copy


def logits_of(path, tokens):
    with pybmc.Model(path, threads=1) as model, model.session() as session:
        return session.eval(tokens, logits="all")


@pytest.mark.parametrize("type", tiny.TYPES)
def test_the_float32_file_has_the_values_of_every_type(type, tmp_path, monkeypatch):
    monkeypatch.setattr(exact, "BLOCKS", 7)         # several pieces of a tensor, the last one shorter
    metadata, tensors = tiny.parts("llama", types=type, dim=256, hidden_dim=512, head_dim=32)
    path = tiny.save(tmp_path / "model.gguf", metadata, tensors)
    copy = float32_of(path, tmp_path)
    with GGUF(path) as source, GGUF(copy) as written:
        assert list(written.tensors) == list(source.tensors)
        for name, tensor in source.tensors.items():
            other, n = written.tensors[name], int(np.prod(tensor.shape))
            assert (other.shape, other.type.name) == (tensor.shape, "f32")
            assert np.array_equal(other.data.view(np.float32), dequantize(tensor.type, tensor.data, n)), name
    tokens = np.random.default_rng(0).integers(0, 401, 24)
    right = oracle.logits(metadata, oracle.weights(tensors), tokens)
    assert golden.rms(logits_of(copy, tokens) - right) / right.std() < FLOAT


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_the_float32_file_keeps_the_metadata_with_their_types(arch, tmp_path):
    metadata, tensors = tiny.parts(arch, types="Q8_0")
    metadata |= {"general.file_type": 7, "tokenizer.ggml.add_bos_token": False}
    path = tiny.save(tmp_path / "model.gguf", metadata, tensors)
    before, after = (gguf.GGUFReader(p).fields for p in (path, float32_of(path, tmp_path)))
    assert before.keys() == after.keys()
    for key in before.keys() - {"general.file_type"}:
        assert (after[key].types, after[key].contents()) == (before[key].types, before[key].contents()), key
    assert after["general.file_type"].contents() == gguf.LlamaFileType.ALL_F32


def test_the_float32_file_has_its_own_alignment_and_no_empty_arrays(tmp_path):
    values = np.arange(3, dtype=np.float32)
    pairs = {"general.architecture": "llama", "general.alignment": 128, "none": np.zeros(0, np.int32),
             "text": "", "wide": Typed(I64, bytes([255] * 8)), "flags": np.array([True, False])}
    entries = [Entry(name, (3,), data=values.tobytes()) for name in ("one", "two")]
    copy = float32_of(Raw(pairs, entries, alignment=128).save(tmp_path / "odd.gguf"), tmp_path)
    with GGUF(copy) as written:
        assert [list(tensor.data.view(np.float32)) for tensor in written.tensors.values()] == [[0, 1, 2]] * 2
        assert written.alignment == 32 and "none" not in written.metadata
        assert written.metadata["wide"] == -1 and written.metadata["text"] == ""
        assert written.metadata["flags"].tolist() == [True, False]


def split(path, metadata, tensors):
    """Save a model in two parts; both paths."""
    paths = [path.with_name(f"{path.stem}-{i:05d}-of-00002.gguf") for i in (1, 2)]
    names = list(tensors)
    for i, part in enumerate((names[:5], names[5:])):
        pairs = (metadata if i == 0 else {"general.architecture": "llama"}) | {
            "split.no": i, "split.count": 2, "split.tensors.count": len(tensors)}
        tiny.save(paths[i], pairs, {name: tensors[name] for name in part})
    return paths


def test_the_float32_file_of_a_split_file_is_one(tmp_path):
    metadata, tensors = tiny.parts("llama", types="Q4_0")
    tokens = np.arange(16)
    right = oracle.logits(metadata, oracle.weights(tensors), tokens)
    for given in split(tmp_path / "model", metadata, tensors):
        copy = float32_of(given, tmp_path)
        with GGUF(copy) as written:
            assert list(written.tensors) == list(tensors)
            assert not [key for key in written.metadata if "split" in key]
        assert golden.rms(logits_of(copy, tokens) - right) / right.std() < FLOAT


# Whole runs


@pytest.fixture
def both_ours(monkeypatch):
    """pybmc in llama.cpp's place."""
    engine = versus.Engine
    monkeypatch.setattr(versus, "Engine", lambda name, command, *rest: engine(
        name, [sys.executable, *command[1:-1], "pybmc"], *rest))


def run(*arguments):
    return CliRunner().invoke(exact.main, ["-t", "1", *map(str, arguments)])


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_run_measures_both_engines_and_leaves_nothing(both_ours, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    path = tiny.model("llama", types="Q4_0")
    done = run(path, "--tokens", 100, "--work", work)
    assert done.exit_code == 0, done.output
    assert "100 tokens of speculation.md" in done.stdout and "is 1.00 times llama.cpp's" in done.stdout
    assert "evaluating" not in done.stdout and "evaluating" in done.stderr and left(work) == []
    found = json.loads(run(path, "--tokens", 100, "--json").stdout)
    assert found["pybmc"] == found["llama_cpp"] and found["ratio"]["error"] == 1
    assert 1e-3 < found["pybmc"]["error"] < 3e-2 and found["pybmc"]["n"] == found["tokens"] == 100
    assert found["float32"]["perplexity"] == pytest.approx(found["pybmc"]["perplexity"], rel=0.05)


def test_the_float32_file_is_kept_where_it_is_asked_for_and_overwrites_nothing(both_ours, tmp_path):
    path, kept = tiny.model("llama", types="Q4_0"), tmp_path / "kept.gguf"
    assert run(path, "--tokens", 70, "--keep", kept).exit_code == 0
    with GGUF(kept) as file:
        assert {tensor.type.name for tensor in file.tensors.values()} == {"f32"}
    before = path.read_bytes()
    again = run(path, "--keep", path)
    assert again.exit_code == 2 and "expected a new file" in again.output and path.read_bytes() == before


@pytest.mark.parametrize("tokens, message", [
    (80, "expected a text of 80 or more tokens, found 5"),
    (600, "expected at most 512 tokens, the model's context, found --tokens 600"),
])
def test_a_text_or_a_context_that_is_too_short_is_a_sentence(tokens, message, both_ours, tmp_path):
    (tmp_path / "short.txt").write_text("12345")
    done = run(tiny.model("llama"), "--text", tmp_path / "short.txt", "--tokens", tokens)
    assert done.exit_code == 1 and message in done.output and done.stdout == ""


def test_too_little_disk_space_is_said_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(exact.shutil, "disk_usage", lambda folder: SimpleNamespace(free=5))
    monkeypatch.setattr(exact, "write_float32", None)
    done = run(tiny.model("llama"), "--work", tmp_path)
    assert done.exit_code == 1 and "0.0 GB free; --work DIR names another folder" in done.output
    assert left(tmp_path) == []


def test_a_disk_that_fills_up_is_a_sentence(both_ours, monkeypatch, tmp_path):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exact, "write_values", fail)
    done = run(tiny.model("llama"), "--tokens", 70, "--work", tmp_path)
    assert done.exit_code == 1 and "Error: [Errno 28] No space left" in done.output and left(tmp_path) == []


@pytest.mark.parametrize("data, message", [
    (b"", "the file is empty"), (b"hello, world", "not a GGUF file"), (b"GGUF\3\0\0\0", "truncated"),
])
def test_files_that_are_no_model_are_a_sentence(data, message, tmp_path):
    (tmp_path / "model.gguf").write_bytes(data)
    done = run(tmp_path / "model.gguf")
    assert done.exit_code == 1 and message in done.output and isinstance(done.exception, SystemExit)


def test_what_the_gguf_package_does_not_read_is_a_sentence(both_ours, monkeypatch):
    monkeypatch.setattr(exact.gguf, "GGUFReader", lambda path: {}["general.alignment"])
    done = run(tiny.model("llama"), "--tokens", 70)
    assert done.exit_code == 1 and "the gguf package cannot copy it" in done.output


def test_without_llama_cpp_nothing_large_is_written(monkeypatch, tmp_path):
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('none here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(exact, "write_float32", None)
    done = run(tiny.model("llama"), "--tokens", 70, "--peer-python", sys.executable)
    assert done.exit_code == 1 and "pip install llama-cpp-python" in done.output


def test_against_the_real_peer():
    python = os.environ.get("PYBMC_PEER_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode:
        pytest.skip(f"{python} has no llama_cpp")
    path = tiny.model("llama", types="Q4_K", dim=256, hidden_dim=512, head_dim=64)
    done = run(path, "--tokens", 64, "--peer-python", python, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert 1e-3 < found["pybmc"]["error"] < 3e-2 and 1e-3 < found["llama_cpp"]["error"] < 6e-2
