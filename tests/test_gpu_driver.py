"""The host code of GPUs against rules of a real driver: threads beside a capture, contexts, errors that stay,
kernels that do not fit."""

import threading

import numpy as np
import pytest
import tiny
from gpu import fake_driver, nothing_is_left  # noqa: F401

import pybmc
from pybmc.engine.gpu import gpus

UNSUPPORTED_PTX, NO_BINARY, ILLEGAL_ADDRESS = 222, 209, 700


def on_gpu(**settings):
    return pybmc.Model(tiny.model("llama"), threads=1, n_gpu_layers=-1, **settings)


def test_sessions_come_and_go_while_a_pass_is_captured(fake):
    """Their memory is zeroed, copied and freed on other threads, which may neither get into the graph nor end
    it."""
    def passes(session):                    # the second one of a width becomes a graph
        return np.concatenate([session.eval(list(range(n)), "all") for n in range(1, 7) for _ in range(2)])

    with pybmc.Model(tiny.model("llama"), threads=1) as model, model.session(rows=16) as session:
        right = passes(session)
    stop, failed = threading.Event(), []

    def others(model, parent):
        try:
            while not stop.is_set():
                with model.session(rows=16) as session, parent.fork(20):
                    session.reserve(40)
        except pybmc.BmcError as error:
            failed.append(error)

    with fake.set(capture_us=3000), on_gpu() as model, \
            model.session(rows=16) as parent, model.session(rows=16) as session:
        parent.eval(list(range(24)), "none")
        graphs = fake["graphs"]
        thread = threading.Thread(target=others, args=(model, parent))
        thread.start()
        try:
            ours = passes(session)
        finally:
            stop.set()
            thread.join()
        assert fake["graphs"] - graphs == 6
    assert not failed
    assert np.array_equal(ours.view(np.uint32), right.view(np.uint32))


@pytest.mark.parametrize("code", [UNSUPPORTED_PTX, NO_BINARY])
def test_kernels_that_do_not_fit(code, fake):
    why = (rf"GPU 0: loading the kernels of .*\({code}\): expected .* 7.5 or later.*"
           r"found capability 9.0 and a driver of CUDA 12.4")
    with fake.set(module_code=code), pytest.raises(pybmc.DeviceError, match=why):
        on_gpu()


def test_an_error_that_stays_is_said_and_harms_nothing_else(fake):
    """After an illegal address the driver gives the same error for everything: closing and a new start still
    work."""
    with fake.set(stays_broken=1), on_gpu() as model, model.session() as session:
        session.eval([1, 2], "none")
        with fake.set(fail_in=2, fail_code=ILLEGAL_ADDRESS), \
                pytest.raises(pybmc.DeviceError, match="cannot use the GPU any more"):
            session.eval([3], "last")
        assert session.position == 2
    with on_gpu() as model, model.session() as session:
        session.eval([1, 2], "none")


def test_asking_for_gpus_leaves_the_thread_its_context(fake):
    """And no context behind: what a thread has of another library stays current."""
    with on_gpu() as model, model.session() as session:
        session.eval([1], "none")
        assert gpus()[0].available < gpus()[0].memory
        session.eval([2], "none")
    gpus()
    with on_gpu() as model, model.session() as session:
        session.eval([1], "none")


def test_a_busy_gpu_does_not_hide_the_others(fake):
    """In exclusive mode, with another process on the first one."""
    path = tiny.model("llama")
    with fake.set(gpus=2, busy=1):
        with pybmc.Model(path, threads=1, gpu="auto") as model:
            assert model.gpu_layers == 2
        with pybmc.Model(path, threads=1, gpu=1, n_gpu_layers=1) as model:
            assert model.gpu_layers == 1
        with pytest.raises(pybmc.DeviceError, match="GPU 0: using it: .*busy"):
            pybmc.Model(path, threads=1, gpu=0)
    with fake.set(busy=1), pybmc.Model(path, threads=1, gpu="auto") as model:
        assert model.gpu_layers == 0
