"""gguf.py: right files come out as they went in, wrong ones as a FormatError that says what and where."""

import os
import random
import struct
import sys
import tracemalloc
from collections import Counter

import gguf
import numpy as np
import pytest
import tiny
from raw import ARRAY, BOOL, I32, STRING, U8, U64, Entry, Raw, Typed, array, string, u32, u64

from pybmc.errors import ArgumentError, FormatError
from pybmc.files.gguf import GGUF

Q4_0, Q6_K = 2, 14


def f32(*dims, **more):
    return Entry("t", dims, data=bytes(4 * int(np.prod(dims))), **more)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.gguf"


# -- right files

def test_every_kind_of_value(path):
    numbers = {
        spelling: np.array([0, 1, 100], spelling)
        for spelling in ("u1", "i1", "u2", "i2", "u4", "i4", "f4", "u8", "i8", "f8")
    }
    pairs = numbers | {
        "flags": np.array([True, False]),
        "none": np.array([], "f4"),
        "yes": True,
        "no": False,
        "n": 7,
        "long": -(1 << 40),
        "x": 0.5,
        "text": "Käse ½ 🦙",
        "empty": "",
        "texts": ["", "a\0b", "Ä", ""],
        "no texts": [],
        "nested": array(ARRAY, array(STRING, string("a"), 1).payload + array(U8, b"\1\2", 2).payload, 2),
    }
    with GGUF(Raw(pairs).save(path)) as file:
        found = file.metadata
    assert list(found) == list(pairs)
    for spelling, values in numbers.items():
        assert found[spelling].dtype == values.dtype and found[spelling].tolist() == values.tolist()
    assert found["flags"].tolist() == [True, False] and len(found["none"]) == 0
    assert found["yes"] is True and found["no"] is False and type(found["n"]) is int
    assert (found["n"], found["long"], found["x"]) == (7, -(1 << 40), 0.5)
    assert (found["text"], found["empty"]) == ("Käse ½ 🦙", "")
    assert found["texts"] == ["", "a\0b", "Ä", ""] and found["no texts"] == []
    assert found["nested"][0] == ["a"] and found["nested"][1].tolist() == [1, 2]


def test_text_that_is_only_shown_may_be_in_any_encoding(path):
    pairs = {"general.name": "Mus\xe9e".encode("latin-1"), "general.tags": [b"a", "\xe9".encode("latin-1")],
             "general.architecture": "llama"}
    assert GGUF(Raw(pairs).save(path)).metadata == {"general.name": "Mus\ufffde",
                                                    "general.tags": ["a", "\ufffd"],
                                                    "general.architecture": "llama"}
    for key in ("general.architecture", "tokenizer.ggml.model", "tokenizer.chat_template"):
        Raw({key: b"\xe9"}).save(path)
        with pytest.raises(FormatError, match=f"{key}: not UTF-8"):
            GGUF(path)


@pytest.mark.parametrize("dims, shape", [((32, 4, 1), (32, 4)), ((32, 1, 1, 1), (32,)), ((1, 1), (1,)),
                                         ((1, 4, 1), (1, 4)), ((32, 1, 4), (32, 1, 4))])
def test_dimensions_of_one_at_the_end_mean_nothing(path, dims, shape):
    tensor = GGUF(Raw(tensors=[f32(*dims)]).save(path)).tensors["t"]
    assert tensor.shape == shape and tensor.nbytes == 4 * np.prod(dims)


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_many_strings(path, count):
    texts = [chr(33 + n % 90) * (n % 300) for n in range(count)]
    assert GGUF(Raw({"texts": texts}).save(path)).metadata["texts"] == texts


@pytest.mark.parametrize("arch, types", [("llama", "Q4_K"), ("gpt2", "F16"), ("gemma3", "Q8_0")])
def test_against_the_gguf_package(arch, types):
    path = tiny.model(arch, types=types, dim=256, hidden_dim=256)
    reader = gguf.GGUFReader(path)
    with GGUF(path) as file:
        assert file.paths == [file.path] and file.size == path.stat().st_size
        assert (file.version, file.alignment) == (3, 32)
        assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
        for theirs in reader.tensors:
            ours = file.tensors[theirs.name]
            assert (ours.type.id, ours.shape, ours.nbytes) == (
                theirs.tensor_type,
                tuple(theirs.shape.tolist()),
                theirs.n_bytes,
            )
            assert not ours.data.flags.writeable and ours.data.tobytes() == theirs.data.tobytes()
        for key, value in file.metadata.items():
            theirs = reader.fields[key].contents()
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == theirs


def test_version_2_and_other_alignments(path):
    tensor = f32(8, 2)
    assert GGUF(Raw(version=2, tensors=[tensor]).save(path)).version == 2
    for alignment in (8, 64, 4096):
        raw = Raw(
            {"general.alignment": alignment},
            [tensor, Entry("u", (1,), data=b"\0\0\x80?")],
            alignment=alignment,
        )
        file = GGUF(raw.save(path))
        assert file.alignment == alignment and file.tensors["u"].data.view("<f4")[0] == 1
        assert file.tensors["u"].data.ctypes.data % alignment == 0


def test_views_outlive_the_file(path):
    file = GGUF(Raw(tensors=[Entry("t", (2,), data=b"\0\0\x80?\0\0\0@")]).save(path))
    view = file.tensors["t"].data
    file.close()
    file.close()
    assert file.closed and not file.tensors
    assert view.view("<f4").tolist() == [1, 2]


def test_a_vocabulary_needs_no_library_and_no_tensors(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pybmc._native", None)
    raw = Raw({"a": 1}, [Entry("strange", (3, 0), type=12345)])
    assert GGUF(raw.save(path), vocabulary_only=True).metadata == {"a": 1}


def test_a_vocabulary_is_read_without_a_call_for_each_string(path):
    """That is what makes a reader slow: the gguf package takes seconds for a real vocabulary."""
    strings = [f"token {i}" for i in range(20_000)]
    Raw({"tokenizer.ggml.tokens": strings}).save(path)
    calls = Counter()
    sys.setprofile(lambda frame, event, arg: calls.update([event]))
    try:
        file = GGUF(path)
    finally:
        sys.setprofile(None)
    assert file.metadata["tokenizer.ggml.tokens"] == strings
    assert calls["call"] < 1000, calls


# -- split files

def parts(tmp_path, count=3, **change):
    """A model in parts, a tensor each."""
    paths = []
    for number in range(count):
        pairs = {"split.no": number, "split.count": count, "split.tensors.count": count} | (
            {"name": "whole"} if number == 0 else {}
        )
        pairs |= change.get(f"part{number}", {})
        tensor = Entry(f"t{number}", (2,), data=struct.pack("<2f", number, 0.5))
        paths.append(Raw(pairs, [tensor]).save(tmp_path / f"m-{number + 1:05d}-of-{count:05d}.gguf"))
    return paths


def test_split_from_any_part(tmp_path):
    paths = parts(tmp_path)
    for given in paths:
        with GGUF(given) as file:
            assert file.paths == paths and file.size == sum(path.stat().st_size for path in paths)
            assert file.metadata["name"] == "whole"
            assert [file.tensors[f"t{n}"].data.view("<f4")[0] for n in range(3)] == [0, 1, 2]
        assert GGUF(given, vocabulary_only=True).metadata["name"] == "whole"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"part1": {"split.no": 2}}, "00002-of-00003.*split.no: expected 1, found 2"),
        ({"part2": {"split.count": 4}}, "00003-of-00003.*split.count: expected 3, found 4"),
        (
            {"part0": {"split.tensors.count": 9}},
            "split.tensors.count: expected 9|split.tensors.count: expected 3, found 9",
        ),
        ({"part0": {"split.count": 2}}, "its name says 3 parts, its split.count 2"),
        ({"part1": {"split.no": "one"}}, "split.no: expected 1, found 'one'"),
    ],
)
def test_split_parts_that_disagree(tmp_path, change, message):
    with pytest.raises(FormatError, match=message):
        GGUF(parts(tmp_path, **change)[0])


def test_split_part_missing_or_renamed(tmp_path):
    first, second, third = parts(tmp_path)
    third.unlink()
    with pytest.raises(FormatError, match="one of 3 parts; m-00003-of-00003.gguf is missing"):
        GGUF(second)
    second.rename(tmp_path / "m.gguf")
    with pytest.raises(FormatError, match="part of a file split in 3: expected a name such as"):
        GGUF(tmp_path / "m.gguf")


def test_split_tensor_in_two_parts(tmp_path):
    paths = parts(tmp_path, 2)
    Raw({"split.no": 1, "split.count": 2}, [f32(2), ]).save(paths[1])
    Raw({"split.no": 0, "split.count": 2}, [f32(2), ]).save(paths[0])
    with pytest.raises(FormatError, match="'t' is there twice"):
        GGUF(paths[0])


# -- files that cannot be opened

def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.gguf: no such file"):
        GGUF(tmp_path / "nothing.gguf")
    with pytest.raises(IsADirectoryError, match="is a directory"):
        GGUF(tmp_path)
    with pytest.raises(ArgumentError, match="no path"):
        GGUF("a\0b")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="pipe: not a regular file"):
        GGUF(tmp_path / "pipe")


@pytest.mark.parametrize("content, message", [
    (b"", "x.gguf: the file is empty"),
    (b"G", "not a GGUF file: it begins with b'G'"),
    (b"hello, world", "not a GGUF file: it begins with b'hell'"),
    (b"PK\3\4" + bytes(100), "a zip archive"),
    (b"version https://git-lfs", "git-lfs pointer"),
    (b"<!DOCTYPE html>", "web page"),
    (b"\xef\xbb\xbf\n  <!doctype HTML>", "web page"),
    (b"<HTML><body>", "web page"),
    (b'{"error": "Repository not found"}', "a JSON document; the download went wrong"),
    (b"Entry not found", "a server's error message"),
    (b"<?xml version='1.0'?><Error>", "an XML document"),
    (u64(1000) + b'{"__metadata__":{}', "a safetensors file"),
    (b"\x1f\x8b\x08" + bytes(100), "a gzip archive"),
    (b"\x80\x02}q\0", "a Python pickle"),
    (bytes(5000), "zeros, as when a download broke off"),
    (b"tjgg" + bytes(100), "old GGML"),
    (b"GGUF", "truncated in version: expected 4 more bytes, found 0 .at byte 4."),
    (b"GGUF" + struct.pack(">I", 3) + bytes(16), "big-endian GGUF file"),
    (b"GGUF" + u32(1) + bytes(16), "version 1 is not supported: expected 2 or 3; convert"),
    (b"GGUF" + u32(4) + bytes(16), "version 4 is not supported"),
    (b"GGUF" + u32(0) + bytes(16), "version 0 is not supported"),
])
def test_not_gguf(path, content, message):
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message):
        GGUF(path)


# -- wrong headers. 2^61 and 2^63 are what overflows in peers: CVE-2025-53630, CVE-2026-27940, CVE-2026-33298

HUGE = [1 << 61, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]


@pytest.mark.parametrize("huge", [1000, 1 << 32, *HUGE])
@pytest.mark.parametrize(
    "raw, message",
    [
        (lambda n: Raw(n_tensors=n), "number of tensors: .* cannot be right"),
        (lambda n: Raw(n_pairs=n), "number of metadata pairs: .* cannot be right"),
        (lambda n: Raw({"a": Typed(STRING, u64(n) + b"abc")}), "truncated in a: expected"),
        (lambda n: Raw({"a": array(U8, b"abc", n)}), "a: .* cannot be right"),
        (lambda n: Raw({"a": array(U64, b"abc", n)}), "a: .* cannot be right"),
        (lambda n: Raw({"a": array(STRING, b"abc", n)}), "a: .* cannot be right"),
        (lambda n: Raw({"a": array(ARRAY, b"abc", n)}), "a: .* cannot be right"),
        (lambda n: Raw({"a": array(STRING, string("x") + u64(n) + b"abc", 2)}), r"truncated in a\[1\] of 2"),
        (lambda n: Raw({"a": array(STRING, u64(n) + b"abc" + string("x"), 2)}), r"truncated in a\[0\] of 2"),
        (
            lambda n: Raw(tensors=[Entry("t", (n - n % 32, 1 << 32), data=bytes(64))]),
            "tensor 't': f32 .* takes .* bytes, the file has",
        ),
        (
            lambda n: Raw(tensors=[Entry("t", (32, n), Q4_0, data=bytes(64))]),
            "tensor 't': q4_0 .* takes .* bytes, the file has",
        ),
        (
            lambda n: Raw(tensors=[Entry("t", (1,), offset=n // 32 * 32, data=bytes(64))]),
            "tensor 't' ends at byte",
        ),
    ],
)
def test_sizes_that_overflow_elsewhere(path, raw, message, huge):
    raw(huge).save(path)
    with pytest.raises(FormatError, match=message):
        GGUF(path)


@pytest.mark.parametrize("dims", [
    (1 << 32, 1 << 32),                             # 2^64 elements: 0 in 64 bits
    (1 << 31, 1 << 31, 4),
    (1 << 16,) * 4,
    ((1 << 62) + 8, 1),                             # times 4 bytes: 32 in 64 bits
    (1 << 63, 2),
    (8, 1, 1, 1 << 61),
])
def test_products_that_wrap_to_something_small(path, dims):
    Raw(tensors=[Entry("t", dims, data=bytes(1024))]).save(path)
    with pytest.raises(FormatError, match="takes .* bytes, the file has"):
        GGUF(path)


@pytest.mark.parametrize(
    "tensor, message",
    [
        (Entry("t", (), n_dims=0), "tensor 't': expected 1 to 4 dimensions, found 0"),
        (Entry("t", (1,) * 5), "expected 1 to 4 dimensions, found 5"),
        (Entry("t", (1,), n_dims=1 << 31), "expected 1 to 4 dimensions, found 2147483648"),
        (Entry("t", (0,)), r"a dimension is zero in shape \(0,\)"),
        (Entry("t", (4, 0)), r"a dimension is zero in shape \(4, 0\)"),
        (Entry("t", (33, 2), Q4_0, data=bytes(64)), "rows of 33 values: expected a multiple of q4_0's 32"),
        (
            Entry("t", (128, 2), Q6_K, data=bytes(512)),
            "rows of 128 values: expected a multiple of q6_K's 256",
        ),
        (Entry("t", (4,), 99, data=bytes(64)), "tensor 't': unknown tensor type 99"),
        (Entry("t", (4,), 4, data=bytes(64)), "unknown tensor type 4"),  # a number that was taken back
        (Entry("t", (4,), 31, data=bytes(64)),
         r"unknown tensor type 31 \(Q4_0_4_4 of 2024; take a Q4_0 file\)"),
        (Entry("t", (4,), 36, data=bytes(64)), r"unknown tensor type 36 \(I2_S of bitnet.cpp"),
        (Entry("t", (4,), 139, data=bytes(64)), r"unknown tensor type 139 \(a type of ik_llama.cpp's own"),
        (Entry("t", (4,), 0xFFFFFFFF, data=bytes(64)), "unknown tensor type 4294967295"),
        (Entry("t", (4,), offset=8, data=bytes(64)), "expected an offset that is a multiple of 32, found 8"),
        (Entry("t", (16,), data=bytes(63)), r"tensor 't' ends at byte \d+, the file at \d+"),
        (Entry(b"t\xff", (4,), data=bytes(16)), "name of tensor 0 of 1: not UTF-8"),
        (
            Entry("t" * 70000, (4,), data=bytes(16)),
            "name of tensor 0 of 1: expected at most 65535 bytes, found 70000",
        ),
    ],
)
def test_wrong_tensors(path, tensor, message):
    Raw(tensors=[tensor]).save(path)
    with pytest.raises(FormatError, match=f"x.gguf: .*{message}"):
        GGUF(path)


def test_an_incomplete_file_says_so_with_both_sizes(path):
    whole = Raw(tensors=[Entry(name, (64,), data=bytes(256)) for name in ("a", "b", "c")]).bytes()
    for lost in (1, 200, 300):
        path.write_bytes(whole[:-lost])
        with pytest.raises(FormatError, match=f"tensor 'c' ends at byte {len(whole)}, the file at "
                                              f"{len(whole) - lost}: it is "
                                              "incomplete, as when a download broke off"):
            GGUF(path)
    Raw(tensors=[Entry("large", (1 << 20,), data=bytes(64))]).save(path)
    with pytest.raises(FormatError, match=r"takes 4194304 bytes, the file has \d+: it is incomplete"):
        GGUF(path)


@pytest.mark.parametrize("given", [None, 5, ["a.gguf"], object()])
def test_what_is_no_path(given):
    with pytest.raises(ArgumentError, match="expected the path of a GGUF file, found"):
        GGUF(given)


def test_an_empty_path():
    for given in ("", b""):
        with pytest.raises(ArgumentError, match="expected the path of a GGUF file, found an empty one"):
            GGUF(given)


def test_tensors_that_collide(path):
    data = bytes(256)
    Raw(tensors=[Entry("a", (16,), offset=0, data=data), Entry("b", (16,), offset=32, data=data)]).save(path)
    with pytest.raises(
        FormatError, match="'a' and 'b' overlap: the second begins at 32, the first ends at 64"
    ):
        GGUF(path)
    Raw(tensors=[Entry("a", (16,), data=data), Entry("a", (16,), data=data)]).save(path)
    with pytest.raises(FormatError, match="tensor 'a' is there twice"):
        GGUF(path)


@pytest.mark.parametrize("pairs, message", [
    ([("a", 1), ("a", 2)], "key 'a' is there twice"),
    ([("a", Typed(13, b"abcd"))], "a: unknown value type 13"),
    ([("a", Typed(1 << 31, b"abcd"))], "a: unknown value type 2147483648"),
    ([("a", array(99, b"abcd", 1))], "a: unknown value type 99"),
    ([("a", Typed(BOOL, b"\2"))], "a: expected a bool, 0 or 1, found 2"),
    ([("a", array(BOOL, b"\0\1\xff", 3))], "a: expected a bool, 0 or 1, found 255"),
    ([("tokenizer.a", b"ok \xc3\x28")], "a: not UTF-8: invalid continuation byte"),
    ([("tokenizer.a", ["fine", b"\xff", "fine"])], r"a\[1\]: not UTF-8"),
    ([("tokenizer.a", ["\0", b"\x80"])], r"a\[1\]: not UTF-8"),
    ([("tokenizer.a", [b"\xc3", b"\xa4"])], r"a\[0\]: not UTF-8: unexpected end of data"),
    ([(b"\xfe", 1)], "key 0 of 1: not UTF-8"),
    ([("\x1b[1m\n" + "k" * 1000, Typed(13, b""))], r"\\x1b\[1m\\nkkk.{300,400}\.\.\. \(at byte 1037\)$"),
    ([("k" * 70000, 1)], "key 0 of 1: expected at most 65535 bytes, found 70000"),
    ([("general.alignment", 0)], "general.alignment: expected a power of two from 8 to 1073741824, found 0"),
    ([("general.alignment", 4)], "found 4"),
    ([("general.alignment", 48)], "found 48"),
    ([("general.alignment", Typed(U64, u64(1 << 63)))], "found 9223372036854775808"),
    ([("general.alignment", "32")], "found '32'"),
    ([("general.alignment", True)], "found True"),
    ([("general.alignment", np.array([32, 32], "i4"))], "general.alignment: expected"),
])
def test_wrong_metadata(path, pairs, message):
    Raw(pairs).save(path)
    with pytest.raises(FormatError, match=f"x.gguf: .*{message}"):
        GGUF(path)


def test_nested_arrays_end_somewhere(path):
    inner = array(I32, u32(5), 1)
    for _ in range(1000):
        inner = array(ARRAY, inner.payload, 1)
    Raw({"a": inner}).save(path)
    with pytest.raises(FormatError, match="nested deeper than 4"):
        GGUF(path)


def test_absurd_numbers_of_strings(path):
    """A file of zeros is an array of empty strings: large, but no larger than the file can justify."""
    path.write_bytes(Raw({"a": array(STRING, b"", (1 << 24) + 1)}).bytes())
    with path.open("r+b") as file:
        file.truncate(1 << 28)                          # sparse
    with pytest.raises(FormatError, match="expected at most 16777216 elements, found 16777217"):
        GGUF(path)


# -- damaged files

@pytest.fixture(scope="module")
def model():
    return tiny.model("llama", types="Q4_0").read_bytes()


def opens_or_says_so(path, content):
    """Any file either opens, with every view inside it, or is a FormatError."""
    path.write_bytes(content)
    try:
        file = GGUF(path)
    except FormatError as error:
        assert str(path) in str(error)
        return False
    whole = np.frombuffer(content, np.uint8)
    for tensor in file.tensors.values():
        assert tensor.nbytes <= len(whole)
        assert (
            tensor.nbytes * tensor.type.block_size
            == np.prod(tensor.shape, dtype=object) * tensor.type.type_size
        )
        tensor.data.sum()                               # every byte can be read
    file.close()
    return True


def test_truncated_anywhere(path, model):
    random_points = random.Random(1).sample(range(len(model)), 160)
    header = len(model) - sum(
        tensor.nbytes for tensor in GGUF(tiny.model("llama", types="Q4_0")).tensors.values()
    )
    for size in [*random_points, *random.Random(2).sample(range(header), 40)]:
        assert not opens_or_says_so(path, model[:size]), f"cut at {size}"


def test_flipped_bits_in_the_header(path, model):
    with GGUF(tiny.model("llama", types="Q4_0")) as file:
        header = len(model) - sum(tensor.nbytes for tensor in file.tensors.values())
    draw = random.Random(3)
    tracemalloc.start()
    refused = 0
    for _ in range(500):
        damaged = bytearray(model)
        damaged[draw.randrange(header)] ^= 1 << draw.randrange(8)
        refused += not opens_or_says_so(path, bytes(damaged))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 20 < refused < 480
    assert peak < 8 * len(model) + (1 << 20), "memory follows the file's size, whatever it says"


def test_flipped_bits_in_the_counts(path):
    """The same where it hurts most: a file that is nothing but counts, lengths and dimensions."""
    raw = Raw(
        {"a": ["x", "yy"], "b": np.arange(4, dtype="i4"), "c": "z", "general.alignment": 32},
        [f32(8), Entry("u", (4, 2), data=bytes(32))],
    )
    content = raw.bytes()
    for position in range(len(raw.header())):
        for bit in (0, 4, 7):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            opens_or_says_so(path, bytes(damaged))


def test_a_file_without_header_costs_nothing(path):
    for fill in (b"\0", b"\xff", b"\x01\0\0\0"):
        path.write_bytes(b"GGUF" + u32(3) + u64(1) + u64(1) + fill * (1 << 20))
        with pytest.raises(FormatError):
            GGUF(path)
