"""Model: a file's weights, packed once and shared. Passes of several threads over one model take turns."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np

from .. import checks
from .._native import check, ffi, last_error, lib, owned, pointer, raise_status
from ..errors import ArgumentError, ClosedError, DeviceError, FormatError, OutOfMemoryError
from ..files.gguf import GGUF
from ..models.bind import Role, bind, bind_head
from ..models.config import Config, read_config
from ..models.layers import RMS
from ..tokenizers import Tokenizer, kind_of
from .embed import Pooler, embed
from .free import known_free_memory
from .gpu import CHUNK, CUBLAS, EXACT, Place, asks, check_choice, choose, offload, plan, stream, take_cublas
from .session import Session
from .session_file import load

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]       # called with what is done and how much there is
WEIGHTS = 0.9                               # of the free memory, at most: sessions and buffers need some too


@dataclass(frozen=True)
class ExpertMemory:
    """Experts that are packed when they are used. total: of all layers; room: how many can be packed at a
    time; kept: how many are; made: how often one was packed."""

    total: int
    room: int
    kept: int
    made: int


@dataclass
class Profile:
    """Where the time of a `with model.profile()` went, in seconds: all of it, in calls of the library, and in
    the steps of its passes, which together make up the passes (the mean of the threads, whose waiting is a
    step too). All of a GPU's is one step. Steps that took no time, as those of blocks that the model does not
    have, are left out."""

    wall_s: float = 0.0
    calls_s: float = 0.0
    passes: int = 0
    steps: dict[str, float] = field(default_factory=dict)


class Model:
    """The weights of a GGUF file, checked and packed into the layout that the kernels read.

    threads: None for all cores that this process may use. progress is called with bytes packed and bytes in
    all. repack=False leaves the weights in the file and lays them out again at every pass: much slower, the
    same bits, and no memory but the pages of the file that the system can spare.
    memory: bytes that packed weights may take; None for what is free. Where that is not enough for all, an
    expert is packed when a token first takes it, and those used longest ago make way; experts that no text
    needs are not read. Without experts, or where the other weights alone are too large, it is as with
    repack=False. The bits are the same.
    n_gpu_layers: how many of the last layers run on a GPU, with the head: a number, -1 for all, or "auto" for
    as many as fit; their weights are on the GPU only. gpu: which GPU, "auto" for one where there is one, or
    "off"; it alone means "auto" layers. The bits are the same.
    stream_tokens: where a GPU is asked for, passes of that many tokens and more, of prompts mostly, send the
    weights of the layers on the CPU through it (with gpu=0, n_gpu_layers=0 of all layers); None: from 64
    tokens on, where that is sooner than on the CPU; 0: never. The bits are the same.
    prompts: "cublas" multiplies whole chunks of prompts, the tokens [512 i, 512 (i + 1)) of a sequence, with
    NVIDIA's cuBLAS in f16, for layers on a GPU; "exact" (default) does not. With "cublas" the bits are not
    the CPU's, and a token's depend on whether its whole chunk was read in one call: on how a prompt was cut,
    and on what of it was known before. Drafts still change no text.
    Raises FormatError if the file is not a model that pybmc runs, OSError if it cannot be opened,
    OutOfMemoryError, DeviceError.
    """

    def __init__(self, path, threads: int | None = None, progress: Progress | None = None,
                 repack: bool = True, memory: float | None = None, gpu: int | str | None = None,
                 n_gpu_layers: int | str | None = None, stream_tokens: int | None = None,
                 prompts: str = EXACT):
        check_choice(gpu, n_gpu_layers, stream_tokens, prompts)
        self._begin(threads)
        self._memory = None if memory is None else checks.number("memory", memory, 0, infinite=True)
        self._file = GGUF(path)
        try:
            self.config = read_config(self._file)
            self._handle = bound(self._file, self.config, self.threads)
            self._place(gpu, n_gpu_layers, stream_tokens if repack else 0, prompts)
            self._ready(repack, progress)
        except BaseException:
            self.close()
            raise

    def _begin(self, threads: int | None) -> None:
        self._handle = ffi.NULL
        self.speculations: dict = {}        # the engine's: what generate() was asked for -> who guesses ..
        self.drafts: dict = {}              # .. and a path -> the draft model opened for it
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._locks = defaultdict(threading.Lock)       # of _sessions, by process: a forked one has its own
        self._long = False                  # a context beyond the training was noted
        self._gpu: Place | None = None
        self.gpu_layers = 0                 # how many of the last layers run on a GPU
        self.streams = False                # whether the weights of others go there in long passes
        self.prompt_chunk = 0               # tokens that cuBLAS multiplies at a time; 0: prompts are exact
        self.threads = _thread_count(threads)

    def _place(self, gpu: int | str | None, layers: int | str | None, stream_tokens: int | None,
               prompts: str) -> None:
        if prompts == CUBLAS and layers != 0 and asks(gpu, layers):
            take_cublas(self._handle)
        place = choose(self._handle, self.config, gpu, layers, stream_tokens != 0)
        if place and place.layers:
            self._gpu = place
            self.gpu_layers = offload(self._handle, place, self.path)
        if prompts == CUBLAS:
            if not self.gpu_layers:
                raise DeviceError("prompts by cuBLAS: expected layers on a GPU "
                                  "(-ngl or --gpu, n_gpu_layers or gpu), found none")
            self.prompt_chunk = CHUNK
        if place and stream_tokens != 0:
            self.streams = stream(self._handle, place, stream_tokens, self.path)

    def _ready(self, repack: bool, progress: Progress | None = None) -> None:
        self._packing = lib.BMC_IN_FILE
        if repack:
            self._pack(progress)
        else:
            check(lib.bmc_model_map(self._handle))
        self.streams = self.streams and self._packing != lib.BMC_IN_FILE

    @property
    def gpu(self) -> int | None:
        """The number of the GPU that has its last layers; None without any."""
        return self._gpu.gpu if self._gpu and self.gpu_layers else None

    def gpu_rows(self) -> float:
        """The share of a session's rows that is on the GPU:
        of their bytes, or of the layers where none has rows."""
        with self.session(1) as session:
            every = session.arena_stats().row_bytes
        ours = plan(self._live(), self.gpu_layers).row_bytes if self.gpu_layers else 0
        return ours / every if every else self.gpu_layers / self.config.n_layers

    def _gpu_bytes(self) -> int:
        """Bytes of packed weights that are on a GPU."""
        return plan(self._handle, self.gpu_layers).weight_bytes if self._gpu else 0

    def _room(self) -> int:
        """Bytes that packed weights may take."""
        room = self._memory
        if room is None:
            free = known_free_memory()
            room = float("inf") if free is None else WEIGHTS * free
        return int(min(room, 1 << 62))

    def _pack(self, progress: Progress | None) -> None:
        """The panels are made beside the tokenizer; a vocabulary that is broken shows here too."""
        status: list[tuple[int, str]] = []
        needed, room = self.packed_bytes - self._gpu_bytes(), self._room()

        def pack() -> None:
            status.append((lib.bmc_model_pack_within(self._handle, room), last_error()))

        worker = threading.Thread(target=pack)
        worker.start()
        try:
            self.tokenizer  # noqa: B018
            total = ffi.new("int64_t *")
            while progress and worker.is_alive():
                worker.join(0.05)
                progress(lib.bmc_model_packed(self._handle, total), total[0])
        finally:
            worker.join()
        self._packing, error = status[0]
        raise_status(self._packing, error)
        if self._packing != lib.BMC_PACKED:
            log.warning("%s: packed, the weights take %.3g GB, and there is room for %.3g GB: %s", self.path,
                        needed / 1e9, room / 1e9,
                        "experts are packed when they are used" if self._packing == lib.BMC_EXPERTS_LATE
                        else "they are read from the file in every pass, which is much slower")

    @property
    def path(self) -> str:
        return str(self._file.path)

    @property
    def metadata(self) -> dict[str, object]:
        return self._file.metadata

    @property
    def packed_bytes(self) -> int:
        """Bytes of weights that a token reads, packed or in the file."""
        total = ffi.new("int64_t *")
        lib.bmc_model_packed(self._live(), total)
        return total[0]

    @property
    def experts(self) -> ExpertMemory | None:
        """The experts that are packed; None where all are, or none is."""
        found = ffi.new("bmc_experts *")
        late = lib.bmc_model_experts(self._live(), found)
        return ExpertMemory(found.n, found.room, found.kept, found.made) if late else None

    @cached_property
    def head(self) -> Model | None:
        """The file's draft head, made when it is first asked for: a model that guesses for this one.
        None without one that works."""
        try:
            return Head(self) if self.config.head else None
        except (DeviceError, FormatError, OutOfMemoryError) as error:
            log.warning("the draft head is not used: %s", error)
            return None

    def coarsen(self) -> bool:
        """Give the head a coarse copy of two bits a weight, with which draft() chooses the few ids that the
        head itself decides among. Once; drafting does it. False where that would not save much. Raises
        OutOfMemoryError."""
        return check(lib.bmc_model_coarsen(self._live())) == 1

    @contextmanager
    def profile(self) -> Iterator[Profile]:
        """Take times of every pass inside the with; the Profile it gives is filled at its end.
        One at a time."""
        handle, profile, times = self._live(), Profile(), ffi.new("bmc_times *")
        check(lib.bmc_model_profile(handle, 1))
        started = time.perf_counter()
        try:
            yield profile
        finally:
            profile.wall_s = time.perf_counter() - started
            check(lib.bmc_model_times(handle, times))
            check(lib.bmc_model_profile(handle, 0))
            profile.calls_s, profile.passes = times.calls, times.n_passes
            profile.steps = {ffi.string(lib.bmc_step_name(i)).decode(): seconds
                             for i, seconds in enumerate(times.steps) if seconds}

    @cached_property
    def tokenizer(self):
        """The file's Tokenizer; None if the file has no vocabulary."""
        return Tokenizer(self._file) if kind_of(self._file) else None

    def embed(self, inputs, normalize: bool = True, pooling: str | None = None, dimensions: int | None = None,
              progress: Progress | None = None) -> np.ndarray | list[np.ndarray]:
        """The embedding of each text, float32 (n, values).

        inputs: a text, or a list of texts or of lists of token ids. Texts get the tokens that the file puts
        around them.
        normalize: to length 1.
        pooling: how the vectors of a text's tokens become one: "mean", "first", "last", "rank" (the scores of
        a reranker, which are not normalized) or "none" (all of them: a list of arrays, a vector for each
        token); None: the file's, else the mean.
        dimensions: the first values only, of models trained for that.
        progress: called with the tokens done and those in all.

        A vector does not depend on the texts beside it. Raises ArgumentError for a text that is too long or
        has no tokens.
        """
        return embed(self, inputs, normalize, pooling, dimensions, progress)

    @property
    def pass_tokens(self) -> int:
        """The most tokens that one pass takes; an encoder reads a text in one pass."""
        return lib.bmc_model_pass(self._live())

    @cached_property
    def pooler(self) -> Pooler:
        return Pooler(self.config)

    def check_writes(self) -> None:
        """Raise ArgumentError for an encoder: it has no next tokens."""
        if not self.config.causal:
            raise ArgumentError(f"{self.path} is an encoder ({self.config.arch}): it writes no text, "
                                "it gives embeddings (pybmc embed)")

    def session(self, context: int | None = None, rows: int | str = "auto", kv_type: str = "f16") -> Session:
        """A new, empty sequence.

        context: the most rows it may hold (a cap, not an allocation); None for what the model was trained
        for. More than that works and is noted in the log: text beyond it gets worse.
        rows: how many rows of keys and values are added at a time, rounded up to 16;
        "auto": about 4 MB of them.
        """
        return Session(self, context, rows, kv_type)

    def load_session(self, path: str | os.PathLike, context: int | None = None,
                     rows: int | str = "auto") -> Session:
        """The session that Session.save wrote to a file, as it was: the next logits are those that it would
        have given, on any CPU and with any number of layers on a GPU. Of a file that was cut off or damaged,
        the last whole save. context: another cap; None for the one it had. Raises OSError, ContextFullError,
        OutOfMemoryError, DeviceError, and FormatError for what is no session of this model."""
        return load(self, path, context, rows)

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits that tell a model from others: of its settings, its tensor table and a sample of
        every tensor."""
        found = hashlib.sha256()
        for name, value in sorted(self.metadata.items()):
            if name.startswith(f"{self.config.arch}."):
                found.update(f"{name} {value}\n".encode())
        for tensor in self._file.tensors.values():
            found.update(f"{tensor.name} {tensor.type.name} {tensor.shape}\n".encode())
            found.update(tensor.data[:64].tobytes() + tensor.data[-64:].tobytes())
        return found.hexdigest()

    def close(self) -> None:
        """Free the weights and close every session. Twice is fine. Raises BusyError while one is in use."""
        with self._locks[os.getpid()]:
            sessions = list(self._sessions)
        for session in sessions:
            session.close()
        if head := self.__dict__.pop("head", None):
            head.close()
        self.speculations.clear()
        self.drafts.clear()
        self._handle = ffi.NULL
        self._close_file()

    def _close_file(self) -> None:
        self._file.close()

    @property
    def closed(self) -> bool:
        return self._handle == ffi.NULL

    def _live(self):
        if self._handle == ffi.NULL:
            raise ClosedError(f"the model {self.path} is closed")
        return self._handle

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<pybmc.Model {self.path} {self.config.arch}, {self.threads} threads>"


class Head(Model):
    """The draft head of a model's file. Its tokens come with the model's hidden states,
    so only the library's rounds use it."""

    def __init__(self, model: Model):
        self._begin(model.threads)
        self._file, self.config, self.tokenizer = model._file, model.config.head, model.tokenizer
        self._handle = _bound_head(self._file, self.config, self.threads, model._live())
        share = self.packed_bytes / model.packed_bytes
        self._memory = None if model._memory is None else share * model._memory
        if model.gpu_layers:                # its output matrix may be the model's
            self._gpu = model._gpu
            self.gpu_layers = offload(self._handle, Place(model._gpu.gpu, self.config.n_layers),
                                      f"the draft head of {self.path}")
        self._ready(model._packing != lib.BMC_IN_FILE)

    def _close_file(self) -> None:
        pass                            # it is the model's


def check_model(file: GGUF, config: Config) -> bool:
    """Raise the FormatError that loading would: every tensor is bound and its shape checked, none is packed.
    Whether there is a draft head that works."""
    handle = bound(file, config, 1)
    try:
        return config.head is not None and bool(_bound_head(file, config.head, 1, handle))
    except FormatError:
        return False


def bound(file: GGUF, config: Config, threads: int):
    """A C model whose tensors are bound."""
    return _bound_roles(file.path, config, bind(file, config), threads)


def _bound_head(file: GGUF, config: Config, threads: int, target):
    """The same for the draft head of a C model."""
    return _bound_roles(file.path, config, bind_head(file, config), threads, target=target)


def _bound_roles(path, config: Config, roles: list[Role], threads: int, mapped: bool = True, target=ffi.NULL):
    """The same from roles; mapped: their data lies in a file mapping, whose pages may be dropped."""
    settings, tensors, kept = _settings(config), *_tensors(roles, mapped)
    settings.pointer.target = target
    handle = ffi.new("bmc_model **")
    try:
        check(lib.bmc_model_new(settings.pointer, tensors, len(tensors), threads, handle))
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
    return owned(handle[0], "bmc_model_free", [kept, target])


def _thread_count(threads: int | None) -> int:
    cores = lib.bmc_cpu_count()
    if threads is None:
        return cores
    threads = checks.whole("threads", threads, 1, 1024)
    if threads > cores:
        _note_threads(threads, cores)
    return threads


@lru_cache(maxsize=None)            # once: a model and its draft are opened alike
def _note_threads(threads: int, cores: int) -> None:
    log.warning("%d threads are asked for, this process may use %d cores: that is slower than %d threads",
                threads, cores, cores)


class _settings:
    """A Config as the C struct, with the arrays it points to."""

    def __init__(self, config: Config):
        self.pointer = c = ffi.new("bmc_config *")
        for name in ("dim", "vocab_size", "n_ctx", "n_layers", "causal", "norm_eps", "embedding_scale",
                     "logit_scale", "logit_softcap", "per_layer_dim", "long_rope"):
            setattr(c, name, getattr(config, name))
        c.norm = lib.BMC_NORM_RMS if config.norm == RMS else lib.BMC_NORM_LAYER
        freqs = [np.asarray(table.freq, np.float32) for table in config.ropes]
        c.n_ropes, ropes = len(freqs), ffi.new("bmc_rope_table[]", max(len(freqs), 1))
        for row, table, freq in zip(ropes, config.ropes, freqs):
            row.dim, row.mscale, row.freq = table.dim, table.mscale, pointer(freq)
        blocks = ffi.new("bmc_block[]", len(config.blocks))
        for row, (layer, block) in zip(blocks, config.blocks):
            row.layer, row.kind = layer, getattr(lib, f"BMC_{block.kind}")
            for name in _BLOCK_FIELDS & vars(block).keys():
                setattr(row, name, getattr(block, name))
        c.ropes, c.n_blocks, c.blocks = ropes, len(blocks), blocks
        self.kept = [freqs, ropes, blocks]


_BLOCK_FIELDS = frozenset(name for name, _ in ffi.typeof("bmc_block").fields)


def _tensors(roles: list[Role], mapped: bool):
    """The roles as a C array, and what must stay alive while the model lives."""
    tensors, kept = ffi.new("bmc_tensor[]", len(roles)), []
    for tensor, role in zip(tensors, roles):
        name, data = ffi.new("char[]", role.name.encode()), ffi.from_buffer(role.data)
        label = ffi.new("char[]", getattr(role.tensor, "name", role.name).encode()[:95])
        kept += [name, label, data, role.data]
        tensor.name, tensor.role, tensor.block, tensor.expert = label, name, role.block, role.expert
        tensor.type, tensor.mapped = role.tensor.type.id, mapped and role.mapped
        tensor.n_cols, tensor.n_rows, tensor.data = role.n_cols, role.n_rows, data
    return tensors, kept
