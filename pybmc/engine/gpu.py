"""GPUs: which there are, and how much of a model goes on one."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .. import checks
from .._native import check, ffi, lib
from ..errors import DeviceError, OutOfMemoryError
from ..models.config import Config

log = logging.getLogger(__name__)

KERNELS = Path(__file__).parents[1] / "kernels.fatbin"
EXACT, CUBLAS = PROMPTS = ("exact", "cublas")           # how the products of prompts are computed
CHUNK = lib.BMC_PROMPT_CHUNK            # tokens that cuBLAS multiplies at a time
ROWS = 4096                             # of context that "auto" leaves memory for
SPARE = 0.95                            # of the memory that is available


@dataclass(frozen=True)
class GPU:
    """A GPU of this machine. memory, available: bytes."""

    index: int
    name: str
    memory: int
    available: int
    capability: str


@dataclass(frozen=True)
class Plan:
    """What the last `layers` layers of a model and its head take on a GPU, in bytes. row_bytes: of a token of
    context. stream_bytes: of buffers that the weights of the other layers go through in long passes.
    why: what keeps it from being more layers."""

    layers: int
    weight_bytes: int
    buffer_bytes: int
    stream_bytes: int
    row_bytes: int
    why: str

    def bytes(self, rows: int, streams: bool = True) -> int:
        layers = self.weight_bytes + self.buffer_bytes + rows * self.row_bytes if self.layers else 0
        return layers + (self.stream_bytes if streams else 0)


@dataclass(frozen=True)
class Place:
    """Where the last layers of a model run: the number of a GPU, and how many of them were asked for.
    0: the GPU is for long passes."""

    gpu: int
    layers: int


def count() -> int:
    """How many GPUs the driver has. Raises DeviceError where there is no driver."""
    return check(lib.bmc_gpu(0, ffi.NULL))


def describe(i: int) -> GPU:
    """One of them. Raises DeviceError, as for one that another process has for itself."""
    info = ffi.new("bmc_gpu_info *")
    check(lib.bmc_gpu(i, info))
    name = ffi.string(info.name).decode("utf-8", "replace")
    return GPU(i, name, info.memory, info.available, f"{info.major}.{info.minor}")


def gpus() -> list[GPU]:
    """All GPUs that the driver has. Raises DeviceError where there is no driver."""
    return [describe(i) for i in range(count())]


def usable() -> list[GPU]:
    """Those that can be used now. Raises DeviceError where there is no driver."""
    found = []
    for i in range(count()):
        try:
            found.append(describe(i))
        except DeviceError as error:
            log.info("passed over: %s", error)
    return found


def kernels() -> Path:
    """The compiled kernels: those that the package carries, or that PYBMC_CUDA_KERNELS names.
    Raises DeviceError."""
    path = Path(os.environ.get("PYBMC_CUDA_KERNELS") or KERNELS)
    if not path.is_file():
        raise DeviceError(f"pybmc was built without kernels for GPUs: {path} is missing; "
                          "make CUDA=1 makes it")
    return path


def plan(handle: Any, layers: int) -> Plan:
    """Of a C model whose tensors are bound."""
    found = ffi.new("bmc_plan *")
    check(lib.bmc_model_plan(handle, min(layers, 1 << 20), found))
    return Plan(found.n_layers, found.weight_bytes, found.buffer_bytes, found.stream_bytes, found.row_bytes,
                ffi.string(found.why).decode("utf-8", "replace"))


def fits(found: Plan, config: Config, available: float, streams: bool) -> bool:
    """Beside the rows of a context."""
    return found.bytes(min(config.n_ctx, ROWS), streams) <= SPARE * available


def fitting(handle: Any, config: Config, available: float, streams: bool = True) -> Plan:
    """The most layers that fit; streams: the others' weights go through the GPU in long passes."""
    low, high = 0, config.n_layers
    if fits(whole := plan(handle, high), config, available, streams):
        return whole
    while low < high:
        middle = (low + high + 1) // 2
        if fits(plan(handle, middle), config, available, streams):
            low = middle
        else:
            high = middle - 1
    return plan(handle, low)


def asks(gpu: int | str | None, layers: int | str | None) -> bool:
    """Whether these settings ask for a GPU."""
    return gpu != "off" and (gpu is not None or layers not in (None, 0))


def check_choice(gpu: int | str | None, layers: int | str | None, stream_tokens: int | None = None,
                 prompts: str = EXACT) -> None:
    """Raise ArgumentError for values that mean nothing."""
    checks.choice("prompts", prompts, PROMPTS)
    if isinstance(gpu, str):
        checks.choice("gpu", gpu, ("auto", "off"))
    elif gpu is not None:
        checks.whole("gpu", gpu, 0, 1 << 10)
    if isinstance(layers, str):
        checks.choice("n_gpu_layers", layers, ("auto",))
    elif layers is not None:
        checks.whole("n_gpu_layers", layers, -1)
    if stream_tokens is not None:
        checks.whole("stream_tokens", stream_tokens)


def choose(handle: Any, config: Config, gpu: int | str | None, layers: int | str | None,
           streams: bool = True) -> Place | None:
    """Where a model's last layers go; None: all stay on the CPU, and no driver is asked.

    gpu: a number; "off"; "auto": the one with the most memory available, or none where none can be used;
    None: 0 where layers are asked for. layers: how many, -1: all; "auto": as many as fit; None: "auto" where
    a GPU is asked for. streams: the GPU is of use without layers too.
    """
    check_choice(gpu, layers)
    if not asks(gpu, layers) or (layers == 0 and not streams):
        return None
    try:
        kernels()
        found = usable() if gpu == "auto" else [describe(int(gpu or 0))]
    except DeviceError as error:
        if gpu != "auto":
            raise
        log.info("all layers stay on the CPU: %s", error)
        return None
    if not found:
        return None
    best = max(found, key=lambda g: g.available)
    wanted = config.n_layers if layers == -1 else layers
    if wanted is None or isinstance(wanted, str):
        room = fitting(handle, config, best.available, streams)
        wanted, streams = room.layers, streams and fits(room, config, best.available, streams)
    return Place(best.index, min(wanted, config.n_layers)) if wanted or streams else None


def cublas() -> str:
    """The file of cuBLAS: what PYBMC_CUBLAS names, or the newest of NVIDIA's wheels here; "": the library
    looks where the system does."""
    spec = find_spec("nvidia")
    places = (spec and spec.submodule_search_locations) or ()
    found = [path for place in places for path in Path(place).glob("*/lib/libcublas.so.*")]
    numbered = {int(number): path for path in found if (number := path.suffix[1:]).isdigit()}
    return os.environ.get("PYBMC_CUBLAS") or (str(numbered[max(numbered)]) if numbered else "")


def take_cublas(handle: Any) -> None:
    """Have whole chunks of prompts multiplied by cuBLAS. Before plan() and offload(). Raises DeviceError."""
    check(lib.bmc_model_prompts(handle, os.fsencode(cublas())))


def offload(handle: Any, place: Place, name: str) -> int:
    """Put the last layers on the GPU; how many it were. Raises DeviceError, OutOfMemoryError."""
    why = plan(handle, place.layers).why
    layers = check(lib.bmc_model_offload(handle, place.gpu, os.fsencode(kernels()), place.layers))
    if layers < place.layers:
        log.warning("%s: %d of %d layers go on the GPU: %s", name, layers, place.layers,
                    why or "the model has no more")
    return layers


def uncut(at: int, n: int, end: int, chunk: int) -> int:
    """Tokens of a piece of a text that is read from `at` to `end`: n, or as many as cut no whole chunk.
    chunk 0: n."""
    if not chunk or at + n >= end:
        return n
    last = (at + n) // chunk * chunk        # where the last chunk that is not read whole begins
    if last > at:
        return last - at
    return chunk if at % chunk == 0 and at + chunk <= end else n


def stream(handle: Any, place: Place, least: int | None, name: str) -> bool:
    """Send the weights of the other layers through the GPU in passes of `least` tokens and more, None: of 64,
    where that is sooner. Whether there are any. Raises DeviceError; OutOfMemoryError only where a number is
    given."""
    try:
        return bool(check(lib.bmc_model_stream(handle, place.gpu, os.fsencode(kernels()), least or 0)))
    except OutOfMemoryError as error:
        if least:
            raise
        log.warning("%s: long prompts do not go through the GPU: %s", name, error)
        return False
