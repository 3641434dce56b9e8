"""The boundary to C: loading, statuses, arrays."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cffi import FFI

import pybmc
from pybmc import _native
from pybmc._native import ERRORS, as_array, check, ffi, lib, pointer

ROOT = Path(__file__).parents[1]
PRODUCT, LAB = ROOT / "native" / "bmc.h", ROOT / "native" / "lab" / "bmc_lab.h"


def test_every_status_is_an_exception_of_its_own():
    statuses = {name: value for name in dir(lib) if re.fullmatch("BMC_E[A-Z]+", name)
                and (value := getattr(lib, name)) < 0}
    assert len(statuses) >= 5 and set(ERRORS) == set(statuses.values())
    for error in ERRORS.values():
        assert issubclass(error, pybmc.BmcError) and len(error.__mro__) > 4  # and a builtin besides Exception


def test_check_gives_counts_back_and_raises_the_sentence():
    assert check(0) == 0 and check(7) == 7
    with pytest.raises(pybmc.ArgumentError, match="bmc_type: info is NULL"):
        check(lib.bmc_type(2, ffi.NULL))
    with pytest.raises(pybmc.BmcError):
        check(-1000)


def functions(header):
    return re.findall(r"\b(bmc_\w+)\([^)]*\);", _native._declarations(header))


def test_the_library_defines_what_its_headers_declare():
    product, experiments = functions(PRODUCT), functions(LAB)
    assert len(product) > 10 and len(experiments) > 5 and not set(product) & set(experiments)
    _native.declare(LAB)
    _native.declare(LAB)
    assert [name for name in product + experiments if not hasattr(lib, name)] == []


def test_the_product_knows_nothing_of_experiments():
    names = [*functions(LAB), "bmc_lab.h", "lab/"]
    sources = [*ROOT.glob("pybmc/**/*.py"), *ROOT.glob("native/*.[ch]"), *ROOT.glob("native/kernels/*.[ch]")]
    assert len(sources) > 50
    code = {path: re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL) for path in sources}
    assert [(path.name, name) for path, text in code.items() for name in names if name in text] == []


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
def test_the_library_exports_nothing_else():
    listing = subprocess.run(["nm", "-g", "-D", _native._LIBRARY], capture_output=True, text=True,
                             check=True).stdout
    exported = re.findall(r" [TDBRV] _?(\w+)$", listing, re.MULTILINE)
    assert exported and [name for name in exported if not name.startswith("bmc_")] == []


def test_a_missing_or_broken_library_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(_native, "_LIBRARY", tmp_path / "libpybmc.so")
    with pytest.raises(pybmc.BmcError, match="libpybmc.so; run make"):
        _native._load(ffi)
    (tmp_path / "libpybmc.so").write_bytes(b"not a library")
    with pytest.raises(pybmc.BmcError, match="does not load.*run make"):
        _native._load(ffi)


def test_an_older_library_says_what_to_do(monkeypatch):
    class Older:
        BMC_VERSION = lib.BMC_VERSION
        bmc_version = staticmethod(lambda: lib.BMC_VERSION - 1)

    class OlderFFI:
        dlopen = staticmethod(lambda path: Older)

    with pytest.raises(pybmc.BmcError,
                       match=f"has version {lib.BMC_VERSION - 1}, pybmc needs {lib.BMC_VERSION}; run make"):
        _native._load(OlderFFI)


def test_importing_pybmc_loads_nothing_heavy():
    code = ("import sys, pybmc; print(sorted({'numpy', 'cffi', 'jinja2', 'tokenizers', 'click'} & "
            "set(sys.modules)))")
    assert in_a_process(code) == ["[]"]


def refusal(*blocks):
    """What a model says that is made of these blocks."""
    sizes = dict(dim=32, vocab_size=8, n_ctx=8, n_layers=1, causal=1, n_blocks=len(blocks))
    kept = ffi.new("bmc_block[]", [dict(layer=7) | block for block in blocks])
    config, tensors = ffi.new("bmc_config *", sizes | dict(blocks=kept)), ffi.new("bmc_tensor[1]")
    with pytest.raises(pybmc.FormatError) as error:
        check(lib.bmc_model_new(config, tensors, 1, 1, ffi.new("bmc_model **")))
    return str(error.value)


@pytest.mark.parametrize("kv_from", [-1, -10**6, -2**31, 2, 2**31 - 1])
def test_rows_of_a_block_that_is_not_there(kv_from):
    attention = dict(kind=lib.BMC_ATTENTION, n_heads=1, n_kv_heads=1, k_dim=16, v_dim=16, attn_scale=0.25)
    found = refusal(attention, attention | dict(kv_from=kv_from))
    assert "cannot read the keys and values of layer -1" in found


@pytest.mark.parametrize("setting", [dict(act=-1), dict(act=lib.BMC_ACTS), dict(route=-1), dict(route=3)])
@pytest.mark.parametrize("kind", ["BMC_DENSE", "BMC_EXPERTS", "BMC_PER_LAYER"])
def test_functions_that_are_not_there(kind, setting):
    sizes = dict(kind=getattr(lib, kind), hidden_dim=32, n_experts=4, n_active=2, gating=1)
    assert "layer 7: there is no activation" in refusal(sizes | setting)


def test_as_array_accepts_what_fits():
    tokens = np.arange(5, dtype=np.int32)
    assert np.shares_memory(as_array(tokens, np.int32), tokens)
    for x in ([1, 2], (1, 2), range(1, 3), np.array([1, 2], np.int64), np.arange(1, 5, dtype=np.uint8)[:2]):
        array = as_array(x, np.int32, (None,))
        assert array.dtype == np.int32 and array.flags.c_contiguous and array.tolist() == [1, 2]
    assert as_array(np.eye(4)[:, ::2], np.float32, (4, 2)).flags.c_contiguous
    assert as_array([], np.int32, (None,)).shape == (0,)


@pytest.mark.parametrize("x",
                         [[1.5], ["a"], [2**31], [2**70], [[1], [2, 3]], 7, [[1]], [None], b"ab", [True]])
def test_as_array_refuses_what_does_not(x):
    with pytest.raises(pybmc.ArgumentError, match="^tokens: "):
        as_array(x, np.int32, (None,), "tokens")


def test_pointers_point_at_the_values():
    values = np.array([1.5, 2.5], np.float32)
    assert list(pointer(values)) == [1.5, 2.5]


def test_an_interrupt_while_a_handle_is_freed_reaches_the_caller(monkeypatch):
    python = FFI()
    python.cdef("void PyErr_SetInterrupt(void *unused);")        # what a Ctrl-C does
    freed = []
    monkeypatch.setattr(_native, "lib", python.dlopen(None))
    monkeypatch.setattr(sys, "unraisablehook", freed.append)
    with pytest.raises(KeyboardInterrupt):
        handle = _native.owned(ffi.new("char *"), "PyErr_SetInterrupt")
        del handle
        for _ in range(10):
            pass
    assert not freed


def in_a_process(code, **environment):
    """What Python code prints in a new process, where the library has resolved nothing yet."""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.split("\n")[:-1]


def test_kernels_are_resolved_once():
    code = """
import os
from pybmc._native import ffi, lib
first = ffi.string(lib.bmc_cpu())
os.environ["PYBMC_CPU"] = "ref" if first != b"ref" else "nonsense"
print(ffi.string(lib.bmc_cpu()) == first)
"""
    assert in_a_process(code) == ["True"]


def test_every_thread_is_told_why_there_are_no_kernels():
    code = """
from threading import Thread
from pybmc._native import last_error, lib
def ask():
    lib.bmc_cpu()
    print(last_error())
for thread in [Thread(target=ask) for _ in range(3)]:
    thread.start()
    thread.join()
"""
    lines = in_a_process(code, PYBMC_CPU="mmx")
    assert len(lines) == 3 and len(set(lines)) == 1
    assert re.fullmatch('PYBMC_CPU: expected ref.*, found "mmx"', lines[0])


def test_the_levels_of_this_cpu_begin_with_the_reference():
    levels = _native.cpu_levels()
    assert levels[0] == "ref" and ffi.string(lib.bmc_cpu()).decode() in levels
    assert lib.bmc_cpu_level(len(levels)) == lib.bmc_cpu_level(-1) == ffi.NULL
