"""The type table and dequantization, bit for bit as in the gguf package (tiny.values has what it lacks)."""

import numpy as np
import pytest
import tiny
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from pybmc import ArgumentError
from pybmc.files.types import dequantize, type_info

RUNS = [type_info(number) for number in range(64) if type_info(number) and type_info(number).runs]
NAMES = {number: name for name, number in tiny.NUMBERS.items()}

# Where f16 numbers stand in a block; the rest may be any bytes.
F16_FIELDS = {
    "F16": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "IQ4_NL": [0],
    "IQ4_XS": [0], "IQ1_S": [0], "IQ2_XXS": [0], "IQ2_XS": [0], "IQ2_S": [0], "IQ3_XXS": [0], "IQ3_S": [0],
    "TQ1_0": [52], "TQ2_0": [64], "Q1_0": [0], "Q2_0": [0], "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}


def random_blocks(rng, quant, n_blocks):
    """Any bytes, except that every f16 is finite: (n_blocks, type_size) uint8."""
    blocks = rng.integers(0, 256, (n_blocks, quant.type_size), np.uint8)
    for at in F16_FIELDS.get(quant.name.upper(), []):
        top = blocks[:, at + 1]
        top[(top & 0x7c) == 0x7c] &= 0xbf
    if quant.name == "iq1_m":
        blocks[:, 55] &= 0xbf       # the exponent's highest bit
    return blocks


def reference(blocks, quant):
    with np.errstate(over="ignore"):
        return tiny.values(quant.name.upper(), blocks).ravel()


def test_the_types_that_run():
    names = {quant.name for quant in RUNS}
    assert names == {"f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_K", "q3_K", "q4_K",
                     "q5_K", "q6_K", "iq4_nl", "iq4_xs", "mxfp4", "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs",
                     "iq2_s", "iq3_xxs", "iq3_s", "tq1_0", "tq2_0", "q1_0", "q2_0", "nvfp4"}


@pytest.mark.parametrize("number", range(64))
def test_table_agrees_with_gguf(number):
    quant = type_info(number)
    if number not in NAMES:
        assert quant is None
        return
    assert quant.name.lower() == NAMES[number].lower()
    assert (quant.block_size, quant.type_size) == GGML_QUANT_SIZES[number]


@pytest.mark.parametrize("number", [-1, 4, 5, 31, 36, 64, 2**31 - 1, 2**31, 2**40, -2**40])
def test_unknown_numbers_have_no_type(number):
    assert type_info(number) is None


@pytest.mark.parametrize("quant", RUNS, ids=str)
def test_dequantize_is_exact(quant):
    n_blocks = max(1200, 70000 // quant.block_size)     # every index of the largest grid, about 19 times each
    blocks = random_blocks(np.random.default_rng(quant.id), quant, n_blocks)
    expected = reference(blocks, quant)
    actual = dequantize(quant, blocks, expected.size)
    finite = np.isfinite(expected)
    assert finite.mean() > 0.98
    np.testing.assert_array_equal(actual[finite].view(np.uint32), expected[finite].view(np.uint32))
    np.testing.assert_array_equal(np.isfinite(actual), finite)


def test_every_f16_is_exact():
    halves = np.arange(65536, dtype=np.uint16)
    actual = dequantize(GGMLQuantizationType.F16, halves, 65536)
    expected = halves.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(actual, expected)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(actual[number].view(np.uint32), expected[number].view(np.uint32))


@pytest.mark.parametrize("exponent", range(256))
def test_every_mxfp4_scale_is_exact(exponent):
    block = np.array([[exponent, *range(0, 256, 17)]], np.uint8)
    expected = reference(block, type_info(GGMLQuantizationType.MXFP4))
    actual = dequantize(GGMLQuantizationType.MXFP4, block, 32)
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("quant", RUNS, ids=str)
def test_blocks_may_start_anywhere(quant):
    blocks = random_blocks(np.random.default_rng(7), quant, 3)
    shifted = np.concatenate([np.zeros(1, np.uint8), blocks.ravel()])[1:]
    np.testing.assert_array_equal(dequantize(quant, shifted, 3 * quant.block_size),
                                  dequantize(quant, blocks, 3 * quant.block_size))


def test_dequantize_checks_its_arguments():
    q4_0 = type_info(GGMLQuantizationType.Q4_0)
    with pytest.raises(ArgumentError, match="36 bytes, got 18"):
        dequantize(q4_0, bytes(18), 64)
    with pytest.raises(ArgumentError, match="whole blocks of q4_0"):
        dequantize(q4_0, bytes(36), 33)
    with pytest.raises(ArgumentError, match="whole blocks"):
        dequantize(q4_0, bytes(36), -32)
    with pytest.raises(ArgumentError, match="q8_K is not supported"):
        dequantize(GGMLQuantizationType.Q8_K, bytes(292), 256)
    with pytest.raises(ArgumentError, match="no tensor type 4"):
        dequantize(4, bytes(50), 32)
    assert dequantize(q4_0, b"", 0).shape == (0,)
