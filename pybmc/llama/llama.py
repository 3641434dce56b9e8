"""Llama: one model behind the methods of llama-cpp-python's class of that name.

What the object holds between calls is a text, as ids. Each call takes a session whose rows the text
begins with, and gives it back: so calls of several threads, and streams that are open beside each
other, do not disturb one another.
"""

from __future__ import annotations

import fnmatch
import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from math import inf
from typing import Any

import numpy as np

from .. import checks
from ..chat.calls import new_id
from ..chat.schema import schema_of
from ..chat.template import ChatTemplate
from ..chat.tools import tools_of
from ..chat.turn import Turn
from ..engine.engine import Engine
from ..engine.generate import Generation, encode_text, filled, speculation_of
from ..engine.model import Model
from ..engine.request import Request, Stats, checked
from ..engine.sampler import Sampler
from ..engine.schema import Schema
from ..engine.session import Session
from ..engine.text import Ending, StopStrings
from ..errors import ArgumentError, BmcError, ContextFullError, needs_packages
from ..files.gguf import GGUF
from ..serve import answers
from ..serve.answers import ChatAnswer, Choice, TextAnswer, Update
from ..serve.fill import fill_prompt, fill_tokens
from ..spec.speculation import Speculation
from ..tokenizers import Tokenizer
from . import arguments
from .arguments import RANDOM_SEEDS
from .cache import LlamaRAMCache, LlamaState, is_closed
from .parts import LlamaPromptLookupDecoding, LogitsProcessorList, StoppingCriteriaList, functions

log = logging.getLogger(__name__)

PIECE = 512                             # tokens that one call reads, so that an interrupt gets through
STOPPED = -1                            # for the id of a last token: a stopping criterion ended the text


class Head(answers.Head):
    """What an answer begins with here: llama-cpp-python has no fingerprint."""

    def dict(self, object: str) -> dict:
        found = super().dict(object)
        del found["system_fingerprint"]
        return found


class Llama:
    """A model and a text that it has read, with the arguments and results of llama_cpp.Llama.

    n_ctx caps a text, 0: what the model was trained for. draft_model: a path, a Model, a Llama, or
    LlamaPromptLookupDecoding(). logprobs need no logits_all, and embeddings no embedding. seed: -1 or the
    default is a new one for each call. verbose: notes are logged as warnings. n_gpu_layers has an effect
    where a GPU can be used, and there op_offload=False keeps prompts over the other layers on the CPU;
    other arguments of GPUs and those of mapping have none; those that would change the text and are not
    supported raise an ArgumentError.
    """

    def __init__(
        self, model_path, *, n_gpu_layers=0, split_mode=1, main_gpu=0, tensor_split=None, vocab_only=False,
        use_mmap=True, use_mlock=False, kv_overrides=None, seed=0xFFFFFFFF, n_ctx=0, n_batch=512,
        n_ubatch=512, n_threads=None, n_threads_batch=None, rope_scaling_type=-1, pooling_type=-1,
        attention_type=-1, rope_freq_base=0.0, rope_freq_scale=0.0, yarn_ext_factor=-1.0,
        yarn_attn_factor=1.0, yarn_beta_fast=32.0, yarn_beta_slow=1.0, yarn_orig_ctx=0, logits_all=False,
        embedding=False, offload_kqv=True, flash_attn=False, op_offload=None, swa_full=None, no_perf=False,
        last_n_tokens_size=64, lora_base=None, lora_scale=1.0, lora_path=None, numa=False, chat_format=None,
        chat_handler=None, draft_model=None, tokenizer=None, type_k=None, type_v=None, spm_infill=False,
        verbose=True,
    ):
        given = {name: value for name, value in locals().items() if name != "self"}
        defaults = arguments.defaults_of(Llama.__init__)
        self._given = {name: value for name, value in given.items() if name not in defaults
                       or value is not defaults[name]}
        self._model: Model | None = None
        arguments.refuse_changes(given, defaults)
        self.model_path, self.verbose = str(model_path), verbose
        self.chat_format, self.chat_handler, self.draft_model = chat_format, chat_handler, draft_model
        self.last_n_tokens_size = checks.whole("last_n_tokens_size", last_n_tokens_size, -1)
        self.cache: LlamaRAMCache | None = None
        self._pooling = checks.whole("pooling_type", pooling_type, min(arguments.POOLINGS),
                                     max(arguments.POOLINGS))
        self._logits_all, self._cap = logits_all, checks.whole("n_ctx", n_ctx or 0, 0, 1 << 30)
        self._lock = threading.RLock()              # of these two:
        self._text: list[int] = []
        self._held: list[np.ndarray] = []           # logits of its last tokens, blocks of (n, vocab_size)
        self._last = LlamaRAMCache(0)               # without a cache: the rows of the last text
        self.set_seed(seed)
        if not os.path.isfile(self.model_path):
            raise ArgumentError(f"model_path: expected a GGUF file, found none at {self.model_path}")
        self._open(vocab_only, n_threads, n_gpu_layers, op_offload)
        on_gpu = self._model is not None and self._model.gpu_layers
        effective = ("n_gpu_layers", "op_offload") if on_gpu else ()
        level = logging.WARNING if verbose else logging.INFO
        arguments.note_without_effect(given, defaults, level, effective)
        self._template_source = arguments.source_of_format(chat_format, self._metadata)

    def _open(self, vocab_only: bool, n_threads: int | None, n_gpu_layers: int,
              op_offload: bool | None) -> None:
        if vocab_only:
            with GGUF(self.model_path, vocabulary_only=True) as file:
                self._metadata, self._tokenizer = file.metadata, Tokenizer(file)
            return
        self._draft = draft_of(self.draft_model)
        self._model = model = Model(
            self.model_path, threads=n_threads or None, gpu="auto" if n_gpu_layers else "off",
            n_gpu_layers=max(n_gpu_layers, -1), stream_tokens=0 if op_offload is False else None)
        try:
            self._metadata, self._tokenizer = model.metadata, model.tokenizer
            if self._tokenizer is None:
                raise ArgumentError(f"{self.model_path} has no vocabulary: expected one to write text with")
            if self.draft_model is not None:
                self._speculation  # noqa: B018   what is wrong with it shows here
        except BaseException:
            model.close()
            raise

    @cached_property
    def _speculation(self) -> Speculation:
        """Who guesses. Models that only give embeddings have none."""
        return speculation_of(None, self._live, *self._draft, 16, 0)

    @classmethod
    def from_pretrained(cls, repo_id, filename, additional_files=None, local_dir=None,
                        local_dir_use_symlinks="auto", cache_dir=None, **kwargs) -> Llama:
        """A Llama of a file of the Hugging Face hub. filename and additional_files, the other parts of a
        split file, may be patterns that one file fits; kwargs are the class's arguments."""
        try:
            from huggingface_hub import HfApi, hf_hub_download
        except ImportError:
            raise BmcError(needs_packages("Llama.from_pretrained", "hub")) from None
        names = checks.strings("filename", [filename, *(additional_files or ())])
        if any(set(name) & set("*?[") for name in names):
            there = HfApi().list_repo_files(repo_id)
            names = [matching(repo_id, name, there) for name in names]
        paths = [hf_hub_download(repo_id, name, local_dir=local_dir, cache_dir=cache_dir) for name in names]
        return cls(model_path=paths[0], **kwargs)

    # ---- texts and chats

    def create_completion(
        self, prompt, suffix=None, max_tokens=16, temperature=0.8, top_p=0.95, min_p=0.05, typical_p=1.0,
        logprobs=None, echo=False, stop=(), frequency_penalty=0.0, presence_penalty=0.0, repeat_penalty=1.0,
        top_k=40, stream=False, seed=None, tfs_z=1.0, mirostat_mode=0, mirostat_tau=5.0, mirostat_eta=0.1,
        model=None, stopping_criteria=None, logits_processor=None, grammar=None, logit_bias=None,
    ) -> dict | Iterator[dict]:
        """Continue a text, or a list of ids. max_tokens None, 0 or less: until the model ends or the context
        is full. suffix: what follows the gap, for models with fill-in tokens. stream: an iterator of chunks.
        What is wrong with the arguments raises at once."""
        given = dict(locals())
        text, tokens = self._prompt(prompt, suffix, echo)
        n_top = None if logprobs is None else checks.whole("logprobs", logprobs)
        request = self._request(tokens, given)
        request = replace(request, top=n_top or 0, score=n_top if echo else None)
        answer = TextAnswer(self._head("cmpl-", model), self._tokenizer, [self._choice()], [(text, tokens)],
                            n_top, echo=echo)
        return self._answer(request, given, answer)

    __call__ = create_completion

    def create_chat_completion(
        self, messages, functions=None, function_call=None, tools=None, tool_choice=None, temperature=0.2,
        top_p=0.95, top_k=40, min_p=0.05, typical_p=1.0, stream=False, stop=(), seed=None,
        response_format=None, max_tokens=None, presence_penalty=0.0, frequency_penalty=0.0,
        repeat_penalty=1.0, tfs_z=1.0, mirostat_mode=0, mirostat_tau=5.0, mirostat_eta=0.1, model=None,
        logits_processor=None, grammar=None, logit_bias=None, logprobs=None, top_logprobs=None,
    ) -> dict | Iterator[dict]:
        """Answer messages, as the model's chat template or chat_format writes them. Where tools or functions
        are offered, the arguments of a call fit their schemas."""
        given = dict(locals())
        if self.chat_handler is not None:
            return self.chat_handler(llama=self,
                                     **{name: value for name, value in given.items() if name != "self"})
        arguments.check_messages(messages)
        if top_logprobs is not None and not logprobs:
            checks.refuse("top_logprobs", "logprobs to be true beside it", top_logprobs)
        n_top = checks.whole("top_logprobs", top_logprobs or 0) if logprobs else None
        offered = tools_of(tools, tool_choice, functions=functions, function_call=function_call)
        turn = Turn(self._live, self._template, messages, offered, split=False, continue_final_message=False,
                    wish=arguments.wish_of(given))
        request = self._request(turn.tokens,
                                given | {"stopping_criteria": None, "grammar": None, "response_format": None})
        request = replace(request, top=n_top or 0, schema=turn.schema(), shown=turn.shown)
        turn.note_ignored()
        choice = replace(self._choice(), reader=turn.reader())
        answer = ChatAnswer(self._head("chatcmpl-", model), self._tokenizer, [choice], n_top,
                            functions=bool(functions))
        return self._answer(request, given, answer)

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self._template_source, self._tokenizer)

    def _prompt(self, prompt, suffix, echo: bool) -> tuple[str, list[int]]:
        """Text and ids of a prompt."""
        if not isinstance(prompt, (str, list, tuple, np.ndarray)):
            checks.refuse("prompt", "a text or a list of token ids", prompt)
        if not suffix:
            tokens = encode_text(self._tokenizer, prompt if isinstance(prompt, str) else list(prompt))
            return (prompt if isinstance(prompt, str) else self._tokenizer.decode(tokens)), tokens
        marks = fill_tokens(self._tokenizer)
        if marks is None:
            raise ArgumentError("suffix: expected a model with fill-in tokens, found none in the vocabulary")
        if echo or not isinstance(prompt, str) or not isinstance(suffix, str):
            raise ArgumentError("suffix: expected a text beside a prompt that is a text, without echo")
        return prompt, fill_prompt(self._tokenizer, marks, prompt, suffix)

    def _request(self, tokens: list[int], given: Mapping) -> Request:
        """A checked request with a call's arguments."""
        arguments.refuse_changes(given, CALL_DEFAULTS)
        self._check_room(tokens)
        most = given["max_tokens"]
        most = inf if most is None else checks.whole("max_tokens", most, -inf, inf)
        schema = schema_of(arguments.grammar_of(given, self._live), self._tokenizer, tokens)
        request = Request(tokens, inf if most <= 0 else most, self._sampler(given, given["seed"]),
                          given["stop"] or (), self._tokenizer.stop_ids, schema=schema)
        return checked(request, self._live)

    def _head(self, prefix: str, model: str | None) -> Head:
        return Head(new_id(prefix), self.model_path if model is None else model, "")

    def _choice(self) -> Choice:
        return Choice(0, stops=self._tokenizer.stop_ids | {STOPPED})

    def _answer(self, request: Request, given: Mapping, answer) -> dict | Iterator[dict]:
        processors = functions("logits_processor", given["logits_processor"], LogitsProcessorList)
        criteria = functions("stopping_criteria", given.get("stopping_criteria"), StoppingCriteriaList)
        stepped = processors or criteria
        updates = self._one_by_one(request, processors, criteria) if stepped else self._written(request)
        chunks = self._chunks(updates, answer)
        if given["stream"]:
            return chunks
        for _ in chunks:
            pass
        return answer.whole()

    def _chunks(self, updates: Generator[Update, None, None], answer) -> Iterator[dict]:
        with closing(updates):
            yield from answer.begin()
            for update in updates:
                yield from answer.take(update)
                if update.done and update.stats and self.verbose:
                    note(update.stats)
            yield from answer.last()

    def _written(self, request: Request) -> Generator[Update, None, None]:
        """What an engine writes, a token at a time."""
        with self._lent(request.tokens) as session:
            engine = Engine(self._live, parallel=1, speculation=self._speculation)
            generation = Generation(engine, replace(request, session=session))
            try:
                for token in generation:
                    yield Update(0, [token], generation.stats, done=bool(token.finish_reason),
                                 scores=generation._sequence.scores)
            except BaseException:
                generation.close()
                raise
            finally:
                if not is_closed(session):
                    self._hold(session.tokens)

    def _one_by_one(self, request: Request, processors, criteria) -> Generator[Update, None, None]:
        """The same with functions that see the logits of each token."""
        scores: Sequence = ()
        if request.score is not None:
            for update in self._written(replace(request, max_tokens=1, top=0, schema=None)):
                scores = update.scores
        stats, started, tokenizer = Stats(len(request.tokens)), time.perf_counter(), self._tokenizer
        room = self.n_ctx() - len(request.tokens) + 1
        ending = Ending(tokenizer.stream(shown=request.shown), request.max_tokens, room,
                        StopStrings(request.stop, tokenizer, request.shown), request.stop_ids | {STOPPED})
        chosen = self._chosen(list(request.tokens), request.sampler, processors, criteria, stats,
                              request.schema)
        with closing(chosen):
            for id, logits in chosen:
                logprobs = log_softmax(logits)
                token = ending.token(id, float(logprobs[id]), top=likeliest(logprobs, request.top))
                note_time(stats, time.perf_counter() - started)
                yield Update(0, [token], stats, done=bool(token.finish_reason), scores=scores)
                if token.finish_reason:
                    return
        yield Update(0, [ending.token(STOPPED, 0.0)], stats, done=True, scores=scores)

    # ---- token by token

    def generate(
        self, tokens, top_k=40, top_p=0.95, min_p=0.05, typical_p=1.0, temp=0.8, repeat_penalty=1.0,
        reset=True, frequency_penalty=0.0, presence_penalty=0.0, tfs_z=1.0, mirostat_mode=0, mirostat_tau=5.0,
        mirostat_eta=0.1, penalize_nl=True, logits_processor=None, stopping_criteria=None, grammar=None,
    ) -> Generator[int, Sequence[int] | None, None]:
        """Ids that follow some tokens (reset=False: and the text before them), without an end: also
        beyond the model's end of text. What is sent to the generator follows the last id. One token
        at a time, without guesses."""
        given = dict(locals())
        arguments.refuse_changes(given, CALL_DEFAULTS)
        text = ([] if reset else list(self._text)) + filled(checks.ids("tokens", tokens, self.n_vocab()))
        self._check_room(text)
        processors = functions("logits_processor", logits_processor, LogitsProcessorList)
        criteria = functions("stopping_criteria", stopping_criteria, StoppingCriteriaList)
        schema = schema_of(arguments.grammar_of(given, self._live), self._tokenizer, text)
        chosen = self._chosen(text, self._sampler(given), processors, criteria, Stats(), schema)
        return sent_through(chosen, self.n_vocab())

    def _chosen(self, text: list[int], sampler: Sampler, processors, criteria, stats: Stats,
                schema: Schema | None = None,
                ) -> Generator[tuple[int, np.ndarray], Sequence[int] | None, None]:
        """Ids that follow a text, with the logits they were chosen from; what is sent follows the last id. It
        ends where a stopping criterion is true."""
        with self._lent(text) as session:
            stats.reused_tokens = session.sync(text[:-1])
            while True:
                logits = read(session, text, 1)[0]
                self._hold(list(text), logits[None])
                if criteria and criteria(np.array(text, np.intc), logits):
                    return
                id = choose(sampler, processors, text, logits, schema)
                more = yield id, logits
                new = [id, *(more or ())]
                text += new
                if schema is not None:
                    for token in new:
                        schema.accept(token)
                self._check_room(text)

    def eval(self, tokens: Sequence[int]) -> None:
        """Read tokens after the text so far."""
        ids = filled(checks.ids("tokens", tokens, self.n_vocab()))
        with self._lock:
            text = self._text + ids
            logits = self._logits(text, len(ids) if self._logits_all else 1)
            self._hold(text, *(self._held if self._logits_all else ()), logits)

    def sample(
        self, top_k=40, top_p=0.95, min_p=0.05, typical_p=1.0, temp=0.8, repeat_penalty=1.0,
        frequency_penalty=0.0, presence_penalty=0.0, tfs_z=1.0, mirostat_mode=0, mirostat_eta=0.1,
        mirostat_tau=5.0, penalize_nl=True, logits_processor=None, grammar=None, idx=None,
    ) -> int:
        """The id that follows the text so far, or its token number idx."""
        given = dict(locals())
        arguments.refuse_changes(given, CALL_DEFAULTS)
        if grammar is not None:
            checks.refuse("grammar",
                          "None, since one token does not tell where in it the text is; generate() takes one",
                          grammar)
        with self._lock:
            if not self._text:
                raise ArgumentError("there is no text yet to continue: expected eval() before sample()")
            n = len(self._text)
            at = n - 1 if idx is None else checks.whole("idx", idx, 0, n - 1)
            logits = self._rows(n - at)[0]
            return choose(self._sampler(given),
                          functions("logits_processor", logits_processor, LogitsProcessorList),
                          self._text[:at + 1], logits)

    def reset(self) -> None:
        """Forget the text."""
        self._hold([])

    def save_state(self) -> LlamaState:
        with self._lock:
            return LlamaState(np.array(self._text, np.intc), len(self._text), self._seed)

    def load_state(self, state: LlamaState) -> None:
        """Go back to a saved text. Its rows are read again where they are needed and not there any more."""
        if not isinstance(state, LlamaState):
            checks.refuse("state", "a LlamaState", state)
        ids = checks.ids("state.input_ids", state.input_ids[:state.n_tokens], self.n_vocab())
        self._check_room(ids)
        self._hold(ids)
        self.set_seed(state.seed)

    def set_cache(self, cache: LlamaRAMCache | None) -> None:
        """Keep rows of ended texts there; None: only those of the last one."""
        if cache is not None and not isinstance(cache, LlamaRAMCache):
            checks.refuse("cache", "a LlamaRAMCache or None", cache)
        self.cache = cache

    def set_seed(self, seed: int) -> None:
        """The seed from which calls without one derive theirs, one after the other."""
        self._seed = checks.whole("seed", seed, -inf, inf)

    @property
    def n_tokens(self) -> int:
        return len(self._text)

    @property
    def input_ids(self) -> np.ndarray:
        return np.array(self._text, np.intc)

    @property
    def eval_tokens(self) -> deque[int]:
        return deque(self._text, maxlen=self.n_ctx())

    @property
    def scores(self) -> np.ndarray:
        """The logits of all tokens of the text, float32 (n_tokens, n_vocab); needs logits_all."""
        if not self._logits_all:
            raise ArgumentError("scores: expected logits_all=True, found False")
        with self._lock:
            return self._rows(len(self._text)) if self._text else np.empty((0, self.n_vocab()), np.float32)

    @property
    def eval_logits(self) -> deque[list[float]]:
        """The logits of all tokens of the text with logits_all, else of the last one."""
        with self._lock:
            n = len(self._text) if self._logits_all else min(len(self._text), 1)
            return deque(self._rows(n).tolist() if n else (), maxlen=self.n_ctx() if self._logits_all else 1)

    def _rows(self, n: int) -> np.ndarray:
        """Logits of the text's last n tokens; they are read again where they are not held."""
        if sum(map(len, self._held)) < n:
            self._held = [self._logits(self._text, n)]
        elif len(self._held[-1]) < n:
            self._held = [np.concatenate(self._held)]
        return self._held[-1][-n:]

    def _logits(self, text: list[int], n: int) -> np.ndarray:
        self._check_room(text)
        with self._lent(text) as session:
            return read(session, text, n)

    # ---- sessions, seeds

    @property
    def _live(self) -> Model:
        if self._model is None:
            raise ArgumentError("the model was opened with vocab_only=True: it has no weights to evaluate")
        self._model._live()
        return self._model

    @contextmanager
    def _lent(self, tokens: Sequence[int]) -> Iterator[Session]:
        """A session for a text, with as much of its beginning as is there."""
        kept = self._last if self.cache is None else self.cache
        session = kept.take(self._live, self.n_ctx(), list(tokens)) or self._live.session(self.n_ctx())
        try:
            yield session
        finally:
            kept.give(session)

    def _hold(self, text: list[int], *logits: np.ndarray) -> None:
        with self._lock:
            self._text, self._held = text, list(logits)

    def _check_room(self, tokens: Sequence[int]) -> None:
        if len(tokens) > self.n_ctx():
            raise ContextFullError(f"the text has {len(tokens)} tokens, "
                                   f"the context has room for {self.n_ctx()}")

    def _sampler(self, given: Mapping, seed: int | None = None) -> Sampler:
        return arguments.sampler_of(given, self.last_n_tokens_size, self._next_seed(given, seed))

    def _next_seed(self, given: Mapping, seed: int | None) -> int:
        """The seed of a call. One that is given stays for later ones;
        of create_*(), each call derives a new one."""
        with self._lock:
            if seed is not None:
                self.set_seed(seed)
            elif "seed" in given and self._seed not in RANDOM_SEEDS:
                self._seed = random.Random(self._seed).randint(0, 1 << 32)
            return int.from_bytes(os.urandom(4), "little") if self._seed in RANDOM_SEEDS else self._seed

    # ---- embeddings

    def create_embedding(self, input, model=None) -> dict:
        """The embedding of a text, or of each of a list."""
        rows, n = self.embed([input] if isinstance(input, str) else input, return_count=True)
        data = [{"object": "embedding", "embedding": row, "index": i} for i, row in enumerate(rows)]
        return {"object": "list", "data": data, "model": self.model_path if model is None else model,
                "usage": {"prompt_tokens": n, "total_tokens": n}}

    def embed(self, input, normalize=False, truncate=True, return_count=False):
        """The embedding of a text as a list of numbers, or a list of them; return_count: and how many tokens
        were read. truncate: what is longer than the context is cut, else refused."""
        model = self._live
        ids = [self._tokenizer.encode(text) for text in checks.strings("input", input)]
        if not truncate:
            for tokens in ids:
                self._check_room(tokens)
        ids = [tokens[:self.n_ctx()] for tokens in ids]
        pooling = arguments.POOLINGS[self._pooling]
        rows = [row.tolist() for row in model.embed(ids, normalize=normalize, pooling=pooling)] if ids else []
        output = rows[0] if isinstance(input, str) else rows
        return (output, sum(map(len, ids))) if return_count else output

    # ---- the vocabulary and the file

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Ids of a text as UTF-8. add_bos: begin and end it as the file asks;
        special: control tokens in it count."""
        if not isinstance(text, (bytes, bytearray)):
            checks.refuse("text", "bytes", text)
        try:
            return self._tokenizer.encode(text.decode(), bos=add_bos, special=special)
        except UnicodeDecodeError as error:
            at = error.start
            raise ArgumentError(f"text: expected UTF-8, found byte {text[at]:#04x} at {at}") from None

    def detokenize(self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None,
                   special: bool = False) -> bytes:
        """The bytes of some ids. special shows control tokens. Where the ids begin with BOS, the space that
        SentencePiece puts before a text is left out."""
        ids = checks.ids("tokens", tokens, self.n_vocab())
        silent = frozenset() if special else self._tokenizer.vocab.silent
        found = b"".join(self._tokenizer.piece(id) for id in ids if id not in silent)
        codec: Any = self._tokenizer._codec
        begins = codec.space_prefix and ids[:1] == [self._tokenizer.bos_id]
        return found.removeprefix(b" ") if begins else found

    def n_ctx(self) -> int:
        """The most tokens of a text."""
        trained = self._number("context_length") if self._model is None else self._model.config.n_ctx
        return self._cap or trained

    def n_embd(self) -> int:
        return self._number("embedding_length")

    def n_vocab(self) -> int:
        return self._tokenizer.vocab_size if self._model is None else self._model.config.vocab_size

    def token_bos(self) -> int:
        return -1 if self._tokenizer.bos_id is None else self._tokenizer.bos_id

    def token_eos(self) -> int:
        return -1 if self._tokenizer.eos_id is None else self._tokenizer.eos_id

    def token_nl(self) -> int:
        id = self._tokenizer.byte_id(ord("\n"))
        return self._tokenizer.encode("\n", bos=False)[-1] if id is None else id

    def pooling_type(self) -> int:
        """llama.cpp's number of how the vectors of a text become one; -1: as the file says."""
        return self._pooling

    @cached_property
    def metadata(self) -> dict[str, str]:
        """What the file says, as texts; without lists."""
        return {key: written(value) for key, value in self._metadata.items()
                if isinstance(value, (bool, int, float, str))}

    def _number(self, key: str) -> int:
        value = self._metadata.get(f"{self._metadata.get('general.architecture')}.{key}", 0)
        return value if isinstance(value, int) else 0

    # ---- the end

    def close(self) -> None:
        """Free the weights and the rows. Twice is fine. Raises BusyError while another thread evaluates."""
        if self._model is not None:
            for kept in (self._last, self.cache):
                if kept is not None:
                    kept.drop(self._model)
            self._model.close()

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def __reduce__(self):
        return partial(type(self), **self._given), ()

    def __repr__(self) -> str:
        return f"<pybmc.Llama {self.model_path}>"


CALL_DEFAULTS = arguments.defaults_of(Llama.create_completion)


def draft_of(draft_model) -> tuple[object, str]:
    """The draft of a Speculation, and who guesses."""
    if isinstance(draft_model, LlamaPromptLookupDecoding):
        return None, "ngram"
    if isinstance(draft_model, Llama):
        return draft_model._live, "auto"
    if draft_model is not None and not isinstance(draft_model, (str, os.PathLike, Model)):
        checks.refuse("draft_model", "a path, a Model, a Llama or LlamaPromptLookupDecoding()", draft_model)
    return draft_model, "auto"


def sent_through(chosen: Generator[tuple, Sequence[int] | None, None],
                 vocab_size: int) -> Generator[int, Sequence[int] | None, None]:
    """The ids alone; what is sent is checked and passed on."""
    with closing(chosen):
        more: Sequence[int] | None = None
        while True:
            try:
                id, _ = chosen.send(more)
            except StopIteration:
                return
            more = yield id
            more = None if more is None else checks.ids("what is sent", more, vocab_size)


def read(session: Session, text: list[int], n: int) -> np.ndarray:
    """Evaluate what a session lacks of a text; the logits of its last n tokens, (n, vocab_size)."""
    end = len(text) - n
    for start in range(session.sync(text[:end]), end, PIECE):
        session.eval(text[start:min(start + PIECE, end)], "none")
    return np.asarray(session.eval(text[end:], "all"))


def choose(sampler: Sampler, processors: Callable | None, text: list[int], logits: np.ndarray,
           schema: Schema | None = None) -> int:
    if processors:
        logits = processors(np.array(text, np.intc), logits.copy())
    mask = None if schema is None else schema.mask(())
    if mask is not None:
        allowed = np.unpackbits(mask.view(np.uint8), count=len(logits), bitorder="little")
        logits = np.where(allowed, logits, np.float32(-inf))
    return sampler.sample(logits, len(text), text)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def likeliest(logprobs: np.ndarray, n: int) -> tuple[tuple[int, float], ...]:
    best = np.argsort(-logprobs, kind="stable")[:n]
    return tuple((int(id), float(logprobs[id])) for id in best)


def note_time(stats: Stats, seconds: float) -> None:
    """Count a token; the first one comes with the prompt."""
    stats.predicted_tokens += 1
    if stats.predicted_tokens == 1:
        stats.prompt_s = seconds
    stats.predicted_s = seconds - stats.prompt_s


def note(stats: Stats) -> None:
    log.info("prompt %d tokens, %d of them were there; answer %d tokens, %.1f tokens/s", stats.prompt_tokens,
             stats.reused_tokens, stats.predicted_tokens, stats.predicted_tok_s)


def matching(repo_id: str, pattern: str, there: Sequence[str]) -> str:
    """The one file that fits a pattern."""
    found = [name for name in there if fnmatch.fnmatch(name, pattern)]
    if len(found) != 1:
        raise ArgumentError(f"{pattern}: expected one file of {repo_id} to fit, "
                            f"found {', '.join(found or there)}")
    return found[0]


def written(value) -> str:
    """A value of the file as llama.cpp writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:f}" if isinstance(value, float) else str(value)
