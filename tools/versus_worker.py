"""One engine in a process of its own, told what to do by versus.py: a JSON object a line in, one a line out.

    python -m tools.versus_worker pybmc|llama.cpp

The first line out says what the engine is, every later one answers a request {"do": name, ...}; it is
{"error": sentence} if that failed. The requests are Worker's methods. Both engines are timed by the same
lines, those of pybmc.engine.bench; that module needs numpy alone, so the other engine's Python need not have
pybmc installed.
"""

import ctypes
import json
import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from pybmc.engine.bench import go_to, measure, random_tokens

SETTLE_S = 0.05    # a pool may spin that long after its work, and would disturb the other's


class Pybmc:
    """pybmc as it comes."""

    modes = ("",)

    def __init__(self):
        import pybmc
        from pybmc._native import ffi, lib

        self.version = f"pybmc {pybmc.__version__}, {ffi.string(lib.bmc_cpu()).decode()} kernels"
        self.load = pybmc.Model

    def open(self, path, threads, context, outputs):
        self.model = self.load(path, threads=threads)
        self.config = self.model.config
        self.held = self.model.session(context=context)

    def session(self, mode):
        return self.held

    def tokens(self, text):
        if self.model.tokenizer is None:
            raise RuntimeError("the file has no vocabulary")
        return self.model.tokenizer.encode(text)

    def limit(self, kind, n, depth):
        """The rate that this machine allows a test now, and what sets it."""
        from .limits import limits_of  # here: the other engine's Python cannot load our library

        row_bytes = self.held.arena_stats().row_bytes
        least, by = limits_of(self.model).seconds(self.model, kind, n, depth, row_bytes)
        return {"tok_s": (1 if kind == "tg" else n) / least, "by": by}

    def close(self):
        self.model.close()


class LlamaCpp:
    """llama.cpp through the C functions of llama-cpp-python, with a context for each way to do attention."""

    modes = ("flash attention", "no flash attention")       # what is timed; "float32" is for reference logits

    def __init__(self):
        try:
            import llama_cpp
        except ImportError as e:
            raise RuntimeError(f"{sys.executable} cannot import llama_cpp ({e}); `pip install "
                               "llama-cpp-python` "
                               "there, or name another interpreter with --peer-python") from None
        self.api = api = llama_cpp
        self.quiet = api.llama_log_callback(lambda level, text, data: None)
        api.llama_log_set(self.quiet, None)
        api.llama_backend_init()
        features = re.findall(r"(\w+) = 1", api.llama_print_system_info().decode())
        self.version = f"llama-cpp-python {api.__version__} ({' '.join(features)})"

    def open(self, path, threads, context, outputs):
        params = self.api.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = self.api.llama_model_load_from_file(os.fsencode(path), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot open {path}")
        vocab_size = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.sizes, self.sessions = (threads, context, outputs), {}
        self.session(self.modes[0])

    def session(self, mode):
        mode = mode or self.modes[0]
        if mode not in self.sessions:
            self.sessions[mode] = LlamaSession(self, *self.sizes, flash=mode == self.modes[0],
                                               float32=mode == "float32")
        return self.sessions[mode]

    def tokens(self, text):
        data = text.encode()
        ids = np.empty(len(data) + 2, np.int32)                     # and the tokens that begin and end a text
        to = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        vocab = self.api.llama_model_get_vocab(self.model)
        n = self.api.llama_tokenize(vocab, data, len(data), to, len(ids), True, False)
        if n < 0:
            raise RuntimeError(f"llama_tokenize gives {n}")
        return ids[:n].tolist()

    def close(self):
        for session in self.sessions.values():
            session.close()
        self.api.llama_model_free(self.model)


class LlamaSession:
    """What pybmc.engine.bench asks of a session, for a llama.cpp context with room for `context` tokens.

    outputs: the most tokens whose logits one pass gives. float32: keys and values are in float32, not in f16.
    """

    def __init__(self, engine, threads, context, outputs, flash, float32=False):
        self.api, self.vocab_size, self.position = engine.api, engine.config.vocab_size, 0
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch = context, threads, threads
        params.n_outputs_max = params.n_outputs_max_per_seq = outputs
        params.flash_attn_type = int(flash)
        if float32:
            params.type_k = params.type_v = self.api.GGML_TYPE_F32
        self.n_batch = params.n_batch = max(params.n_batch, outputs)
        self.context = self.api.llama_init_from_model(engine.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp has no context of {context} tokens for this model")
        self.memory = self.api.llama_get_memory(self.context)
        self.batch = self.api.llama_batch_init(self.n_batch, 0, 1)
        for i in range(self.n_batch):
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, 0

    def eval(self, tokens, logits="last"):
        """As pybmc's. The result is llama.cpp's own memory, good until the next call."""
        tokens = np.asarray(tokens, np.int32)
        for start in range(0, len(tokens), self.n_batch):
            part = tokens[start:start + self.n_batch]
            self._decode(part, logits if start + len(part) == len(tokens) else "none")
        if logits == "none":
            return None
        values = self.api.llama_get_logits(self.context)
        return np.ctypeslib.as_array(values, (len(tokens) if logits == "all" else 1, self.vocab_size))

    def _decode(self, tokens, logits):
        batch, n = self.batch, len(tokens)
        positions, wanted = np.arange(self.position, self.position + n, dtype=np.int32), np.zeros(n, np.int8)
        if logits != "none":
            wanted[0 if logits == "all" else n - 1:] = 1
        for to, values in ((batch.token, tokens), (batch.pos, positions), (batch.logits, wanted)):
            ctypes.memmove(to, values.ctypes.data, values.nbytes)
        batch.n_tokens = n
        status = self.api.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode of {n} tokens after {self.position} gives {status}")
        self.api.llama_synchronize(self.context)
        self.position += n

    def rewind(self, position):
        if not self.api.llama_memory_seq_rm(self.memory, 0, position, -1):
            raise RuntimeError("llama.cpp cannot rewind this model")
        self.position = position

    def close(self):
        self.api.llama_batch_free(self.batch)
        self.api.llama_free(self.context)


class Worker:
    """Answers requests; each method that has no underscore is one."""

    def __init__(self, engine):
        self._engine, self._is_open = engine, False

    def open(self, path, threads, context, outputs):
        """Open the model, in place of the one before; seconds until a token can be evaluated."""
        self.close()
        started = time.perf_counter()
        self._engine.open(path, threads, context, outputs)
        seconds = time.perf_counter() - started
        self._is_open, self._tokens = True, random_tokens(self._engine, context)
        return {"seconds": seconds, "vocab_size": self._engine.config.vocab_size}

    def close(self):
        if self._is_open:
            self._engine.close()
        self._is_open = False
        return {}

    def tokens(self, text):
        return {"ids": self._engine.tokens(text)}

    def logits(self, tokens, file, width, mode=""):
        """Evaluate the tokens from position 0 in passes of width; write their logits, (n, vocab_size)."""
        session = self._engine.session(mode)
        session.rewind(0)
        with open(file, "wb") as out:
            for at in range(0, len(tokens), width):
                out.write(np.ascontiguousarray(session.eval(tokens[at:at + width], logits="all"), np.float32))
        session.rewind(0)
        return {"shape": (len(tokens), self._engine.config.vocab_size)}

    def run(self, kind, n, depth, mode):
        """One repetition of a test of pybmc.engine.bench: {"tok_s"}."""
        session = self._engine.session(mode)
        go_to(session, self._tokens, depth)
        rate = measure(session, kind, self._tokens[depth:depth + n])
        time.sleep(SETTLE_S)
        return {"tok_s": rate}

    def limit(self, kind, n, depth):
        """What our library measures of the machine."""
        found = self._engine.limit(kind, n, depth)
        time.sleep(SETTLE_S)
        return found

    def memory(self):
        """MB resident now, the private part of them, and the most so far;
        empty where the system does not tell."""
        with suppress(OSError):
            sizes = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            resident, private, peak = (int(sizes[name].split()[0]) / 1e3
                                       for name in ("VmRSS", "RssAnon", "VmHWM"))
            return {"resident": resident, "private": private, "peak": peak}
        return {}


def serve(worker, about, lines, write):
    """Answer line by line. "idle" is the share of a core that the engine used while it was not
    asked for anything."""
    write(json.dumps(about))
    idle = np.zeros(2)                                              # CPU time, time
    last = clocks()
    for line in lines:
        idle += clocks() - last
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as e:
            answer = {"error": str(e) or type(e).__name__}
        last = clocks()
        write(json.dumps(answer | {"idle": round(idle[0] / max(idle[1], 1e-9), 4)}))


def clocks():
    return np.array([time.process_time(), time.perf_counter()])


def start(engines, make_worker):
    """Serve the engine that the command line names, or say why it does not start."""
    wire = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)    # what a library prints stays out of the answers

    def write(line):
        print(line, file=wire, flush=True)

    try:
        engine = engines[sys.argv[1]]()
    except Exception as e:
        write(json.dumps({"error": f"{sys.executable}: {e}"}))
        sys.exit(1)
    serve(make_worker(engine), {"version": engine.version, "modes": getattr(engine, "modes", [])},
          sys.stdin, write)


def main():
    start({"pybmc": Pybmc, "llama.cpp": LlamaCpp}, Worker)


if __name__ == "__main__":
    main()
