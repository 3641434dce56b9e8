"""Models whose experts do not fit the memory: the same bits, and only experts that are used are packed."""

import logging
import os
import threading
from bisect import bisect_left
from functools import lru_cache

import numpy as np
import pytest
import tiny
import tiny_kinds
from engines import write
from test_experts import model_parts, text, unbalanced

import pybmc
from pybmc.cli import run
from pybmc.engine import free, model
from pybmc.spec.speculation import Speculation

WORDS = 200
# Each with experts of another form.
KINDS = ("experts", "sinks", "experts beside", "MLA", "latent experts", "gates of heads")

kinds = pytest.mark.parametrize("name", KINDS)


@lru_cache(maxsize=None)
def total_bytes(path):
    with pybmc.Model(path, threads=1, memory=float("inf")) as packed:
        return packed.packed_bytes


@lru_cache(maxsize=None)
def room(path, memory):
    """How many experts it is for; -1: none, and the weights stay in the file."""
    with pybmc.Model(path, threads=1, memory=memory) as opened:
        return opened.experts.room if opened.experts else -1


@lru_cache(maxsize=None)
def memory_for(path, n):
    """The least memory with room for n experts."""
    return bisect_left(range(total_bytes(path)), n, key=lambda memory: room(path, memory))


@lru_cache(maxsize=None)
def truth(name, n=WORDS):
    with pybmc.Model(tiny_kinds.model(name), threads=1) as packed, packed.session() as session:
        assert packed.experts is None
        return session.eval(text(n), logits="all")


def evaluate(opened, width, n=WORDS):
    with opened.session() as session:
        return np.concatenate([session.eval(text(n)[i:i + width], logits="all") for i in range(0, n, width)])


@kinds
@pytest.mark.parametrize("slots, width, threads",
                         [(1, 1, 1), (1, 200, 2), (2, 7, 3), (3, 1, 2), (5, 40, 1), (5, 1, 3)])
def test_every_bound_gives_the_same_bits(name, slots, width, threads):
    """One expert at a time, fewer than a token takes, fewer than a pass takes."""
    path, n = tiny_kinds.model(name), 40 if width == 1 else WORDS
    with pybmc.Model(path, threads=threads, memory=memory_for(path, slots)) as opened:
        assert opened.experts.room == slots < opened.experts.total and opened.experts.made == 0
        assert (evaluate(opened, width, n) == truth(name)[:n]).all()
        assert opened.experts.kept == slots < opened.experts.made           # some made way


@kinds
def test_where_all_fit_all_are_packed(name):
    total = total_bytes(tiny_kinds.model(name))
    with pybmc.Model(tiny_kinds.model(name), threads=1, memory=total) as opened:
        assert opened.experts is None and opened.packed_bytes == total
    with pybmc.Model(tiny_kinds.model(name), threads=2, memory=total - 1) as opened:
        assert opened.experts is not None and (evaluate(opened, 50) == truth(name)).all()


@pytest.mark.parametrize("name", ["experts", "per-layer inputs"])
@pytest.mark.parametrize("memory", [0, 5000.0])
def test_weights_that_do_not_fit_stay_in_the_file(name, memory, caplog):
    """Where the others alone are too large, and where there are no experts."""
    path = tiny_kinds.model(name)
    with caplog.at_level(logging.WARNING), pybmc.Model(path, threads=2, memory=memory) as opened:
        assert opened.experts is None and (evaluate(opened, 50) == truth(name)).all()
    assert "read from the file in every pass" in caplog.text


def test_experts_that_no_token_takes_are_not_read():
    """All tokens take the same two of six, in both layers."""
    path = unbalanced("F16", "same")
    with pybmc.Model(path, threads=2) as packed:
        right = evaluate(packed, 100, 500)
    with pybmc.Model(path, threads=2, memory=total_bytes(path) - 1) as opened:
        assert (evaluate(opened, 100, 500) == right).all()
        experts = opened.experts
    assert (experts.total, experts.kept, experts.made) == (12, 4, 4)


@pytest.mark.parametrize("slots, made", [(4, 4), (5, 4), (3, 4 + 19 * 2), (2, 20 * 4)])
def test_the_ones_used_longest_ago_make_way(slots, made):
    """Two layers with two experts each, token after token. With room for four nothing is packed twice, with
    room for three one of each layer, with room for two all."""
    path = unbalanced("F16", "same")
    with pybmc.Model(path, threads=1, memory=memory_for(path, slots)) as opened:
        evaluate(opened, 1, 20)
        assert opened.experts.made == made


def test_a_forked_process_packs_its_own():
    name = "experts"
    path = tiny_kinds.model(name)
    with pybmc.Model(path, threads=2, memory=memory_for(path, 3)) as opened:
        stop, passes = threading.Event(), []

        def work():
            while not stop.is_set():
                evaluate(opened, 40)
                passes.append(1)

        worker = threading.Thread(target=work)
        worker.start()
        children = []
        for _ in range(8):
            pid = os.fork()
            if not pid:
                os._exit(0 if (evaluate(opened, 7, 42) == truth(name)[:42]).all() else 1)
            children.append(pid)
        stop.set()
        worker.join()
        assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 8 and passes
        assert (evaluate(opened, 33) == truth(name)).all()


def test_several_threads_share_a_model():
    name = "sinks"
    path = tiny_kinds.model(name)
    with pybmc.Model(path, threads=2, memory=memory_for(path, 2)) as opened:
        results = [None] * 4

        def work(i):
            results[i] = evaluate(opened, 3 + 11 * i, 100)

        workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        [worker.start() for worker in workers]
        while any(worker.is_alive() for worker in workers):
            assert opened.experts.kept <= opened.experts.room == 2
        [worker.join() for worker in workers]
    assert all((result == truth(name)[:100]).all() for result in results)


def test_experts_of_a_kind_each_with_a_type_of_its_own(tmp_path):
    """Layers of different sizes share slots: the largest decides."""
    metadata, tensors = model_parts(types="Q4_0")
    _, other = model_parts(types="Q8_0")
    tensors |= {name: value for name, value in other.items() if name.startswith("blk.1.ffn_down")}
    path = tiny.save(tmp_path / "m.gguf", metadata, tensors)
    with pybmc.Model(path, threads=1) as packed:
        right, total = evaluate(packed, 50), packed.packed_bytes
    for missing in (1, 9000, 17000):
        with pybmc.Model(path, threads=2, memory=total - missing) as opened:
            assert opened.experts and (evaluate(opened, 9) == right).all()


def with_a_head():
    """The last layer of "experts" once more, as a draft head."""
    metadata, tensors = tiny_kinds.parts("experts")
    arch, rng = metadata["general.architecture"], np.random.default_rng(5)
    n, dim = metadata[f"{arch}.block_count"], metadata[f"{arch}.embedding_length"]
    metadata |= {f"{arch}.block_count": n + 1, f"{arch}.nextn_predict_layers": 1}
    tensors |= {name.replace(f"blk.{n - 1}.", f"blk.{n}."): value for name, value in tensors.items()
                if name.startswith(f"blk.{n - 1}.")}
    made = {"enorm": (dim,), "hnorm": (dim,), "eh_proj": (dim, 2 * dim)}
    for name, shape in made.items():
        values = (rng.standard_normal(shape) / 8 + (len(shape) == 1)).astype(np.float32)
        tensors[f"blk.{n}.nextn.{name}.weight"] = "F32", values.view(np.uint8)
    return metadata, tensors


@pytest.mark.parametrize("part", [0.9, 0.1])
def test_a_draft_head_takes_its_part_of_the_memory(part, tmp_path):
    path, request = tiny.save(tmp_path / "m.gguf", *with_a_head()), pybmc.Request(text(30).tolist(), 30)
    with pybmc.Model(path, threads=2) as packed:
        total, right = packed.packed_bytes, write(packed, request)[0]
    with pybmc.Model(path, threads=2, memory=part * total) as opened:
        found, stats = write(opened, request, Speculation(opened, spec="mtp", fixed=4))
        assert found == right and stats.draft_n > 20
        late = opened.experts is not None
        assert late == (part > 0.5) and (opened.head.experts is not None) == late
        assert not late or 0 < opened.head.experts.made


@pytest.mark.parametrize("memory", [-1, float("nan"), "8G", True])
def test_memory_out_of_range(memory):
    with pytest.raises(pybmc.ArgumentError, match="memory: expected a number from 0 up"):
        pybmc.Model(tiny_kinds.model("experts"), memory=memory)


# What is free


def fill(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)


@pytest.fixture
def machine(tmp_path):
    fill(tmp_path / "proc", meminfo="MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    fill(tmp_path / "proc" / "self", cgroup="0::/a/b\n")
    return tmp_path


def measured(machine):
    return free.known_free_memory(str(machine / "proc"), str(machine / "cgroup"))


def test_without_groups_the_system_decides(machine):
    assert measured(machine) == 8000 * 1024
    (machine / "proc" / "self" / "cgroup").unlink()
    assert measured(machine) == 8000 * 1024
    (machine / "proc" / "meminfo").unlink()
    assert measured(machine) is None and free.free_memory() > 0


def test_the_narrowest_group_decides(machine):
    fill(machine / "cgroup" / "a" / "b", memory__max="max\n", memory__current="100\n")
    assert measured(machine) == 8000 * 1024
    fill(machine / "cgroup" / "a", memory__max="5000\n", memory__current="4000\n",
         memory__stat="anon 900\nactive_file 30\ninactive_file 70\n")
    assert measured(machine) == 1100
    fill(machine / "cgroup", memory__max="600", memory__current="700")     # as a container sees its own
    assert measured(machine) == 0


def test_first_version_groups(machine):
    fill(machine / "proc" / "self", cgroup="5:cpu:/x\n4:memory:/a\n")
    fill(machine / "cgroup" / "memory" / "a", memory__limit_in_bytes="5000", memory__usage_in_bytes="3000",
         memory__stat="total_inactive_file 5\n")
    fill(machine / "cgroup" / "memory", memory__limit_in_bytes=str(2**63 - 4096), memory__usage_in_bytes="9")
    assert measured(machine) == 2005


def test_by_default_the_free_memory_is_the_bound(monkeypatch):
    total = total_bytes(tiny_kinds.model("experts"))
    for free_bytes, packed in ((total / model.WEIGHTS + 1, True), (total, False), (None, True)):
        monkeypatch.setattr(model, "known_free_memory", lambda free_bytes=free_bytes: free_bytes)
        with pybmc.Model(tiny_kinds.model("experts"), threads=1) as opened:
            assert (opened.experts is None) == packed


# The command line


def test_the_flag_says_the_same(capsys):
    path, said = tiny_kinds.model("experts"), []
    for flags in ([], ["--weights-memory", str(total_bytes(path) - 1)], ["--weights-memory", "1k"]):
        assert run(["generate", str(path), "-p", "Once", "-n", "8", "--temp", "0", *flags]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2] != ""


def test_a_size_that_is_none(capsys):
    assert run(["generate", str(tiny_kinds.model("experts")), "-p", "x", "--weights-memory", "much"]) == 2
    assert "'much' is no size: expected a number and a unit, as in 8G or 512Mi" in capsys.readouterr().err
