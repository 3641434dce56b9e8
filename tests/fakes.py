"""A model without weights: bytes are tokens, and logits are a hash of the tokens before."""

import codecs
import zlib
from math import exp, inf, log
from types import SimpleNamespace

import numpy as np

from pybmc import ArgumentError, ClosedError, ContextFullError
from pybmc.drafters import guess
from pybmc.engine.sampler import logprob
from pybmc.engine.session import Best

END, VOCAB = 256, 257


class FakeTokenizer:
    stop_ids = frozenset({END})
    vocab_size, bos_id, eos_id, add_bos = VOCAB, None, END, False

    def encode(self, text, bos=True, special=False):
        return list(text.encode())

    def piece(self, id):
        return bytes([id]) if id < 256 else b"<end>"

    def is_control(self, id):
        return id == END

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def silent_names(self):
        return {END: "<end>"}

    def stream(self):
        return FakeStream()


class FakeStream:
    def __init__(self):
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id):
        return self.utf8.decode(bytes([id]) if id < 256 else b"")

    def flush(self):
        return self.utf8.decode(b"", final=True)


class FakeSession:
    """Keeps the rules of a Session: tokens, position, rewind, a cap. evaluated counts what went through eval."""

    def __init__(self, model, context=None):
        self.model, self.context = model, context
        self.tokens, self.evaluated, self.closed = [], 0, False

    @property
    def position(self):
        return len(self.tokens)

    def agreement(self, text, known=0):
        return next((i for i, (a, b) in enumerate(zip(self.tokens, text)) if a != b), min(len(self.tokens), len(text)))

    def rewind(self, n):
        if not 0 <= n <= len(self.tokens):
            raise ArgumentError(f"rewind to {n} of {len(self.tokens)}")
        del self.tokens[n:]

    def eval(self, tokens, logits="last", last=0, sampler=None):
        if self.closed:
            raise ClosedError("the session is closed")
        if self.context is not None and len(self.tokens) + len(tokens) > self.context:
            raise ContextFullError(f"{len(self.tokens)} + {len(tokens)} > {self.context}")
        rows, ids = [], []
        for token in tokens:
            self.tokens.append(token)
            self.evaluated += 1
            rows.append(self.model.logits(self.tokens))
            ids.append(sampler.sample(rows[-1], len(self.tokens)) if sampler else int(rows[-1].argmax()))
        if logits == "best":
            return Best(np.array(ids, np.int32), np.array([logprob(row, id) for row, id in zip(rows, ids)], np.float32))
        return {"last": rows[-1], "all": np.array(rows), "none": None}[logits]

    def draft(self, tokens, k, p_min=0.0, last=0, sampler=None):
        ids, logs = [], []
        for _ in range(k):
            row = self.eval(tokens)
            id, sure = guess(sampler, row, len(self.tokens), []) if sampler else best(row)
            ids.append(id)
            logs.append(log(sure) if sure else -inf)
            tokens = [id]
            if sure < p_min:
                break
        return Best(np.array(ids, np.int32), np.array(logs, np.float32))

    def reserve(self, rows):
        if self.context is not None and len(self.tokens) + rows > self.context:
            raise ContextFullError(f"{len(self.tokens)} + {rows} > {self.context}")

    def close(self):
        self.closed = True


def best(row):
    id = int(row.argmax())
    return id, exp(logprob(row, id))


class FakeModel:
    """script: a text that the model says whatever it is asked, then it ends; None: noise."""

    def __init__(self, script=None, context=None):
        self.tokenizer, self.context, self.sessions = FakeTokenizer(), context, []
        self.script = None if script is None else [*script.encode(), END]
        self.asked = 0
        self.config, self.threads, self.path = SimpleNamespace(n_ctx=10**6, vocab_size=VOCAB), 1, "fake.gguf"

    def close(self):
        for session in self.sessions:
            session.close()

    def session(self, context=None):
        self.sessions.append(FakeSession(self, context or self.context))
        return self.sessions[-1]

    def logits(self, tokens):
        if self.script is None:
            rng = np.random.default_rng(zlib.crc32(bytes(t % 256 for t in tokens)))
            return rng.normal(0, 2, VOCAB).astype(np.float32)
        said = max(len(tokens) - self.asked, 0)
        logits = np.zeros(VOCAB, np.float32)
        logits[self.script[min(said, len(self.script) - 1)]] = 20
        return logits
