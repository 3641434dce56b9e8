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
from ..errors import DeviceError
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
    """What the last `layers` layers of a model and its head take on a GPU, in bytes. row_bytes: of a token of context. why: what keeps it
    from being more layers."""

    layers: int
    weight_bytes: int
    buffer_bytes: int
    row_bytes: int
    why: str

    def bytes(self, rows: int) -> int:
        return self.weight_bytes + self.buffer_bytes + rows * self.row_bytes


@dataclass(frozen=True)
class Place:
    """Where the last layers of a model run: the number of a GPU, and how many of them were asked for."""

    gpu: int
    layers: int


def gpus() -> list[GPU]:
    """All GPUs that the driver has. Raises DeviceError where there is no driver."""
    info, found = ffi.new("bmc_gpu_info *"), []
    for i in range(check(lib.bmc_gpu(0, ffi.NULL))):
        check(lib.bmc_gpu(i, info))
        found.append(GPU(i, ffi.string(info.name).decode("utf-8", "replace"), info.memory, info.available, f"{info.major}.{info.minor}"))
    return found


def kernels() -> Path:
    """The compiled kernels: those that the package carries, or that PYBMC_CUDA_KERNELS names. Raises DeviceError."""
    path = Path(os.environ.get("PYBMC_CUDA_KERNELS") or KERNELS)
    if not path.is_file():
        raise DeviceError(f"pybmc was built without kernels for GPUs: {path} is missing; make CUDA=1 makes it")
    return path


def plan(handle: Any, layers: int) -> Plan:
    """Of a C model whose tensors are bound."""
    found = ffi.new("bmc_plan *")
    check(lib.bmc_model_plan(handle, min(layers, 1 << 20), found))
    return Plan(found.n_layers, found.weight_bytes, found.buffer_bytes, found.row_bytes, ffi.string(found.why).decode("utf-8", "replace"))


def fitting(handle: Any, config: Config, available: float) -> Plan:
    """The most layers that fit beside the rows of a context."""
    rows, low, high = min(config.n_ctx, ROWS), 0, config.n_layers
    while low < high:
        middle = (low + high + 1) // 2
        if plan(handle, middle).bytes(rows) <= SPARE * available:
            low = middle
        else:
            high = middle - 1
    return plan(handle, low)


def check_choice(gpu: int | str | None, layers: int | str | None, prompts: str = EXACT) -> None:
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


def asked(gpu: int | str | None, layers: int | str | None) -> bool:
    """Whether layers may go on a GPU at all."""
    return gpu != "off" and layers != 0 and not (gpu is None and layers is None)


def choose(handle: Any, config: Config, gpu: int | str | None, layers: int | str | None) -> Place | None:
    """Where a model's last layers go; None: all stay on the CPU, and no driver is asked.

    gpu: a number; "off"; "auto": the one with the most memory available, or none where none can be used; None: 0 where layers are asked
    for. layers: how many, -1: all; "auto": as many as fit; None: "auto" where a GPU is asked for.
    """
    check_choice(gpu, layers)
    if not asked(gpu, layers):
        return None
    try:
        kernels()
        found = gpus()
    except DeviceError as error:
        if gpu != "auto":
            raise
        log.info("all layers stay on the CPU: %s", error)
        return None
    if gpu == "auto" and not found:
        return None
    number = max(found, key=lambda g: g.available).index if gpu == "auto" else int(gpu or 0)
    if number >= len(found):
        raise DeviceError(f"GPU: expected {f'0 to {len(found) - 1}' if found else 'one, which the driver does not have'}, found {number}")
    wanted = config.n_layers if layers == -1 else layers
    if wanted is None or isinstance(wanted, str):
        wanted = fitting(handle, config, found[number].available).layers
    return Place(number, min(wanted, config.n_layers)) if wanted else None


def cublas() -> str:
    """The file of cuBLAS: what PYBMC_CUBLAS names, or the newest of NVIDIA's wheels here; "": the library looks
    where the system does."""
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
        log.warning("%s: %d of %d layers go on the GPU: %s", name, layers, place.layers, why or "the model has no more")
    return layers


def uncut(at: int, n: int, end: int, chunk: int) -> int:
    """Tokens of a piece of a text that is read from `at` to `end`: n, or as many as cut no whole chunk. chunk 0: n."""
    if not chunk or at + n >= end:
        return n
    last = (at + n) // chunk * chunk        # where the last chunk that is not read whole begins
    if last > at:
        return last - at
    return chunk if at % chunk == 0 and at + chunk <= end else n
