"""One engine in a process of its own, told what to do by kv_peers.py: a JSON object a line in,
one a line out.

    python -m tools.kv_worker pybmc|llama.cpp|transformers

The first line out says what the engine is, every later one answers a request {"do": name, ...}; it is
{"error": sentence} if that failed. The requests are the methods of Worker.
"""

import os
import time
from contextlib import suppress
from pathlib import Path

from . import versus_worker


class Pybmc:
    def __init__(self):
        self.engine = versus_worker.Pybmc()
        self.version = self.engine.version

    def load(self, path, threads, **shape):
        self.model = self.engine.load(path, threads=threads)

    def open(self, context, mode):
        self.session = self.model.session(context=context)

    def prompt(self, ids):
        self.next = int(self.session.eval(ids, logits="argmax")[-1])

    def tokens(self, n):
        for _ in range(n):
            self.next = int(self.session.eval([self.next], logits="argmax")[0])
            yield

    def cache_bytes(self):
        return self.session.arena_stats().bytes_reserved

    def close(self):
        self.session.close()


class LlamaCpp:
    """Memory and start-up only; versus.py compares its rates."""

    def __init__(self):
        self.engine = versus_worker.LlamaCpp()
        self.version = self.engine.version

    def load(self, path, threads, **shape):
        params = self.engine.api.llama_model_default_params()
        params.n_gpu_layers = 0
        self.engine.model = self.engine.api.llama_model_load_from_file(os.fsencode(path), params)
        if not self.engine.model:
            raise RuntimeError(f"llama.cpp cannot open {path}")
        vocab = self.engine.api.llama_model_get_vocab(self.engine.model)
        self.engine.config = type("Config", (), {"vocab_size": self.engine.api.llama_vocab_n_tokens(vocab)})
        self.threads = threads

    def open(self, context, mode):
        self.session = versus_worker.LlamaSession(self.engine, self.threads, context, 1,
                                                  flash=mode != "no flash attention")

    def prompt(self, ids):
        self.next = int(self.session.eval(ids)[0].argmax())

    def tokens(self, n):
        for _ in range(n):
            self.next = int(self.session.eval([self.next])[0].argmax())
            yield

    def cache_bytes(self):
        return 0                            # not told

    def close(self):
        self.session.close()


class Transformers:
    """A Llama of the same shape with random weights in bf16; generate() with either of its caches."""

    def __init__(self):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        self.torch, self.api = torch, transformers
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"

    def load(self, path, threads, **shape):
        self.torch.set_num_threads(threads)
        config = self.api.LlamaConfig(
            vocab_size=shape["vocab_size"], hidden_size=shape["dim"], intermediate_size=shape["hidden_dim"],
            num_hidden_layers=shape["n_layers"], num_attention_heads=shape["n_heads"],
            head_dim=shape["head_dim"], num_key_value_heads=shape["n_kv_heads"],
            max_position_embeddings=shape["n_ctx"], tie_word_embeddings=True)
        default = self.torch.get_default_dtype()
        self.torch.set_default_dtype(self.torch.bfloat16)
        try:
            self.model = self.api.LlamaForCausalLM(config).eval()
        finally:
            self.torch.set_default_dtype(default)

    def open(self, context, mode):
        config = self.model.config
        self.cache = (self.api.DynamicCache(config=config) if mode == "dynamic" else
                      self.api.StaticCache(config=config, max_cache_len=context))

    def prompt(self, ids):
        """The last token is generate()'s. Rows of noise stand for those before it: without instructions for
        bf16 a long prompt takes minutes, and how long a token takes does not depend on what rows hold."""
        self.ids, config = self.torch.tensor([ids]), self.model.config
        rows = self.torch.randn(1, config.num_key_value_heads, len(ids) - 1, config.head_dim,
                                dtype=self.torch.bfloat16)
        for layer in range(config.num_hidden_layers if len(ids) > 1 else 0):
            self.cache.update(rows, rows, layer)

    def tokens(self, n):
        """generate() tells of each token when it has it; the first comes with the prompt."""
        times = []

        class Clock:
            def put(self, value):
                times.append(time.perf_counter())

            def end(self):
                pass

        with self.torch.inference_mode():
            self.model.generate(self.ids, attention_mask=self.torch.ones_like(self.ids), do_sample=False,
                                streamer=Clock(), max_new_tokens=n + 1, min_new_tokens=n + 1, pad_token_id=0,
                                past_key_values=self.cache, disable_compile=True)
        yield from times[1:]                # the first put is the prompt's own tokens

    def cache_bytes(self):
        return 0

    def close(self):
        pass


class Worker:
    """Answers requests; each method that has no underscore is one."""

    def __init__(self, engine):
        self._engine = engine

    def load(self, path, threads, shape):
        started = time.perf_counter()
        self._engine.load(path, threads, **shape)
        return {"seconds": time.perf_counter() - started} | memory()

    def start(self, context, ids, mode=""):
        """Open a context and take in a prompt: seconds of both, memory after each. It stays open."""
        started = time.perf_counter()
        self._engine.open(context, mode)
        opened, after_opening = time.perf_counter(), memory()
        self._engine.prompt(ids)
        return {"open_s": opened - started, "first_token_s": time.perf_counter() - started,
                "opened": after_opening, "used": memory(), "cache_mb": self._engine.cache_bytes() / 1e6}

    def rate(self, n):
        """Tokens a second of n tokens, one at a time."""
        times = [at if at is not None else time.perf_counter() for at in self._engine.tokens(n)]
        return {"tok_s": (len(times) - 1) / (times[-1] - times[0])}

    def stop(self):
        self._engine.close()
        return {}


def memory():
    """MB resident that are this process's own; empty where the system does not tell."""
    with suppress(OSError):
        sizes = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return {"private_mb": int(sizes["RssAnon"].split()[0]) * 1024 / 1e6}
    return {}


def main():
    versus_worker.start({"pybmc": Pybmc, "llama.cpp": LlamaCpp, "transformers": Transformers}, Worker)


if __name__ == "__main__":
    main()
