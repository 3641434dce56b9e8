"""The compiled kernels, as PTX, behind the fake driver: their text is loaded as a real driver does it, and
models give the CPU's bits.

make test-ptx compiles the kernels and names the files in PYBMC_PTX. Without it only texts that are no kernels
are tried."""

import os
import re
from pathlib import Path

import gpu
import numpy as np
import pytest
import tiny

import pybmc
from pybmc.errors import DeviceError

FILES = os.environ.get("PYBMC_PTX", "").split()
compiled = pytest.mark.skipif(not FILES, reason="needs nvcc: make test-ptx")
GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.gguf"))


@pytest.fixture(scope="module")
def fake():
    return gpu.Fake(str(gpu.build()))


@pytest.fixture
def driver(monkeypatch, fake):
    """Sets which file the kernels are from. The library opens a driver once: this has to be the first."""
    monkeypatch.setenv("PYBMC_CUDA_DRIVER", str(gpu.DRIVER))
    yield lambda path: monkeypatch.setenv("PYBMC_CUDA_KERNELS", str(path))
    assert (fake["alive"], fake["bytes"]) == (0, 0)


def logits(path, widths, **where):
    rng = np.random.default_rng(7)
    with pybmc.Model(path, threads=1, **where) as model, model.session() as session:
        rows = [session.eval(rng.integers(0, 256, n).astype(np.int32), "all") for n in widths]
    return np.concatenate(rows).view(np.uint32)


@compiled
@pytest.mark.parametrize("file", FILES, ids=lambda path: Path(path).stem)
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_models_have_the_same_bits(path, file, driver, fake):
    driver(file)
    with fake.set(major=8 if "80" in Path(file).stem else 7):
        assert np.array_equal(logits(path, (1, 5), n_gpu_layers=-1), logits(path, (1, 5)))


@compiled
@pytest.mark.parametrize("types", ["Q4_K", "Q8_0"])
def test_wide_passes_have_the_same_bits(types, driver):
    """The kernels of each width: 1, 2, 3, 7, 17 and more than 64 tokens."""
    driver(FILES[-1])
    path, widths = tiny.model("llama", types=types, dim=256, head_dim=32), (1, 2, 3, 7, 17, 70)
    assert np.array_equal(logits(path, widths, n_gpu_layers=-1), logits(path, widths))


@compiled
def test_what_stops_a_kernel_is_told(driver, tmp_path):
    """Floats that are read two bytes further on than they are."""
    text = Path(FILES[-1]).read_text()
    begin = text.index(".visible .entry norm_tokens(")
    end = text.index("\n}\n", begin)
    late = re.sub(r"(ld\.global\.f32.*\[%rd\d+)\]", r"\1+2]", text[begin:end])
    path = tmp_path / "kernels.ptx"
    path.write_text(text[:begin] + late + text[end:])
    driver(path)
    with pytest.raises(DeviceError, match=r"norm_tokens, block .* thread .* is not a multiple of 4"):
        logits(tiny.model("llama"), (1, 1), n_gpu_layers=-1)


@pytest.mark.parametrize("text, message", [
    ("// no kernels\n", r"expected PTX with a \.target and kernels"),
    ("//\n.target sm_80\n.visible .entry norm_tokens(\n\t.param .align 8 .b8 norm_tokens_param_0[16]\n)\n"
     "{\n\tret;\n}\n",
     r"norm_tokens: expected \d+ bytes of arguments .* found 16 and 0"),
])
def test_a_file_that_is_no_kernels_is_refused(text, message, driver, tmp_path):
    path = tmp_path / "kernels.ptx"
    path.write_text(text)
    driver(path)
    with pytest.raises(DeviceError, match=message):
        logits(tiny.model("llama"), (1,), n_gpu_layers=-1)
