"""pybmc.Llama: what code for llama-cpp-python's class relies on,
and that no call changes what another one gives."""

import contextlib
import inspect
import io
import json
import logging
import pickle
import re
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import tiny

import pybmc
from pybmc import (
    ArgumentError,
    BmcError,
    ClosedError,
    ContextFullError,
    Llama,
    LlamaGrammar,
    LlamaPromptLookupDecoding,
    LlamaRAMCache,
    LogitsProcessorList,
    StoppingCriteriaList,
)

PROMPT = "Once upon a time there was a mouse"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell a story"}]
N_CTX = 300

# ---- llama-cpp-python 0.3: names, order and defaults of arguments, as text; "-" is none

_SAMPLING = "mirostat_mode=0 mirostat_tau=5.0 mirostat_eta=0.1"
_COMPLETION = ("prompt=- suffix=None max_tokens=16 temperature=0.8 top_p=0.95 min_p=0.05 "
               "typical_p=1.0 logprobs=None echo=False stop=[] frequency_penalty=0.0 presence_penalty=0.0 "
               "repeat_penalty=1.0 top_k=40 stream=False seed=None tfs_z=1.0 "
               f"{_SAMPLING} model=None stopping_criteria=None logits_processor=None grammar=None "
               "logit_bias=None")
SIGNATURES = {
    "__init__": "model_path=- n_gpu_layers=0 split_mode=1 main_gpu=0 tensor_split=None vocab_only=False "
                "use_mmap=True use_mlock=False kv_overrides=None seed=4294967295 n_ctx=512 n_batch=512 "
                "n_ubatch=512 n_threads=None n_threads_batch=None rope_scaling_type=-1 pooling_type=-1 "
                "attention_type=-1 rope_freq_base=0.0 rope_freq_scale=0.0 yarn_ext_factor=-1.0 "
                "yarn_attn_factor=1.0 yarn_beta_fast=32.0 yarn_beta_slow=1.0 yarn_orig_ctx=0 "
                "logits_all=False embedding=False offload_kqv=True flash_attn=False op_offload=None "
                "swa_full=None no_perf=False last_n_tokens_size=64 lora_base=None lora_scale=1.0 "
                "lora_path=None numa=False chat_format=None chat_handler=None draft_model=None "
                "tokenizer=None type_k=None type_v=None spm_infill=False verbose=True",
    "create_completion": _COMPLETION,
    "__call__": _COMPLETION,
    "create_chat_completion": "messages=- functions=None function_call=None tools=None tool_choice=None "
                              "temperature=0.2 top_p=0.95 top_k=40 min_p=0.05 typical_p=1.0 stream=False "
                              "stop=[] seed=None response_format=None max_tokens=None presence_penalty=0.0 "
                              "frequency_penalty=0.0 repeat_penalty=1.0 tfs_z=1.0 " + _SAMPLING +
                              " model=None logits_processor=None grammar=None logit_bias=None logprobs=None "
                              "top_logprobs=None",
    "generate": "tokens=- top_k=40 top_p=0.95 min_p=0.05 typical_p=1.0 temp=0.8 repeat_penalty=1.0 "
                "reset=True frequency_penalty=0.0 "
                f"presence_penalty=0.0 tfs_z=1.0 {_SAMPLING} penalize_nl=True logits_processor=None "
                "stopping_criteria=None grammar=None",
    "sample": "top_k=40 top_p=0.95 min_p=0.05 typical_p=1.0 temp=0.8 repeat_penalty=1.0 "
              "frequency_penalty=0.0 presence_penalty=0.0 tfs_z=1.0 mirostat_mode=0 mirostat_eta=0.1 "
              "mirostat_tau=5.0 penalize_nl=True logits_processor=None grammar=None idx=None",
    "from_pretrained": "repo_id=- filename=- additional_files=None local_dir=None "
                       "local_dir_use_symlinks='auto' cache_dir=None kwargs=-",
    "embed": "input=- normalize=False truncate=True return_count=False",
    "create_embedding": "input=- model=None",
    "tokenize": "text=- add_bos=True special=False",
    "detokenize": "tokens=- prev_tokens=None special=False",
    "eval": "tokens=-", "set_cache": "cache=-", "set_seed": "seed=-", "load_state": "state=-",
    **dict.fromkeys(("reset", "save_state", "n_ctx", "n_vocab", "n_embd", "token_bos", "token_eos",
                     "token_nl", "close"), ""),
}
MEANT = {"n_ctx=512": "n_ctx=0", "stop=[]": "stop=()"}         # our defaults that differ

# ---- and the shapes of its results

_HEAD = {"id": str, "object": str, "created": int, "model": str}
_USAGE = {"prompt_tokens": int, "completion_tokens": int, "total_tokens": int}
_TEXT = {"text": str, "index": int, "logprobs": type(None), "finish_reason": str}
_LOGPROBS = {"tokens": [str], "text_offset": [int], "token_logprobs": [float], "top_logprobs": [dict]}
_CHAT = {"index": int, "logprobs": type(None), "finish_reason": str}
_CHAT_LOGPROB = {"token": str, "logprob": float}
COMPLETION = {**_HEAD, "choices": [_TEXT], "usage": _USAGE}
COMPLETION_LOGPROBS = {**_HEAD, "choices": [_TEXT | {"logprobs": _LOGPROBS}], "usage": _USAGE}
CHUNK = {**_HEAD, "choices": [_TEXT | {"finish_reason": type(None)}]}
CHAT_ANSWER = {**_HEAD, "choices": [_CHAT | {"message": {"role": str, "content": str}}], "usage": _USAGE}
CHAT_LOGPROBS = {"content": [_CHAT_LOGPROB | {"top_logprobs": [_CHAT_LOGPROB]}], "refusal": type(None)}
CHAT_FIRST = {**_HEAD, "choices": [_CHAT | {"delta": {"role": str}, "finish_reason": type(None)}]}
CHAT_CHUNK = {**_HEAD, "choices": [_CHAT | {"delta": {"content": str}, "finish_reason": type(None)}]}
CHAT_LAST = {**_HEAD, "choices": [_CHAT | {"delta": {}}]}
EMBEDDING = {"object": str, "data": [{"object": str, "embedding": [float], "index": int}], "model": str,
             "usage": {"prompt_tokens": int, "total_tokens": int}}


def fits(value, shape):
    """Whether a result has all keys of a shape, with values of its types."""
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(key in value and fits(value[key], its)
                                               for key, its in shape.items())
    if isinstance(shape, list):
        return isinstance(value, list) and bool(value) and all(fits(item, shape[0]) for item in value)
    return type(value) is shape


@pytest.fixture(scope="module")
def path():
    return tiny.model("llama", n_ctx=N_CTX)


@pytest.fixture(scope="module")
def shared_llm(path):
    with Llama(path, n_threads=1, verbose=False) as llm:
        yield llm


@pytest.fixture
def llm(shared_llm):
    shared_llm.reset()
    shared_llm.set_cache(None)
    shared_llm.set_seed(-1)
    return shared_llm


def text_of(answer):
    return answer["choices"][0]["text"]


def plain(llm, prompt=PROMPT, n=30, **settings):
    """What generate() gives without guesses."""
    return list(pybmc.generate(llm._model, prompt, n, spec="off", **settings))


# ---- arguments and shapes


@pytest.mark.parametrize("name", SIGNATURES)
def test_names_order_and_defaults_of_arguments_are_the_same(name):
    found = [p for p in inspect.signature(getattr(Llama, name)).parameters.values() if p.name != "self"]
    told = [f"{p.name}={'-' if p.default is p.empty else repr(p.default)}" for p in found]
    assert told == [MEANT.get(one, one) for one in SIGNATURES[name].split()]


def test_answers_have_the_keys_and_types(llm):
    settings = {"max_tokens": 6, "temperature": 0}
    assert fits(llm(PROMPT, **settings), COMPLETION)
    assert fits(llm(PROMPT, logprobs=2, **settings), COMPLETION_LOGPROBS)
    *chunks, last = llm(PROMPT, stream=True, **settings)
    assert all(fits(chunk, CHUNK) for chunk in chunks) and fits(last, CHUNK | {"choices": [_TEXT]})
    assert fits(llm.create_chat_completion(CHAT, **settings), CHAT_ANSWER)
    told = llm.create_chat_completion(CHAT, logprobs=True, top_logprobs=2,
                                      **settings)["choices"][0]["logprobs"]
    assert fits(told, CHAT_LOGPROBS) and len(told["content"][0]["top_logprobs"]) == 2
    first, *chunks, last = llm.create_chat_completion(CHAT, stream=True, **settings)
    assert fits(first, CHAT_FIRST) and all(fits(chunk, CHAT_CHUNK) for chunk in chunks)
    assert fits(last, CHAT_LAST)


def test_the_model_is_named_by_its_path_or_as_asked(llm, path):
    assert llm(PROMPT, max_tokens=1)["model"] == str(path)
    assert llm(PROMPT, max_tokens=1, model="mine")["model"] == "mine"
    assert llm.create_chat_completion(CHAT, max_tokens=1, model="mine")["model"] == "mine"


def test_unknown_arguments_raise_a_type_error(llm, path):
    for call in (lambda: Llama(path, n_cxt=5), lambda: llm(PROMPT, temprature=1),
                 lambda: llm.create_chat_completion(CHAT, n=2)):
        with pytest.raises(TypeError):
            call()


def test_arguments_without_effect_are_noted_once(path, caplog):
    with Llama(path, n_gpu_layers=-1, flash_attn=True, use_mmap=False, type_k=8, verbose=True):
        pass
    notes = [record for record in caplog.records if "without effect" in record.message]
    assert ([(n.levelname, n.args[0]) for n in notes]
            == [("WARNING", "n_gpu_layers, use_mmap, flash_attn, type_k")])
    caplog.clear()
    with Llama(path, n_gpu_layers=-1, verbose=False):
        pass
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("name, value", [
    ("kv_overrides", {"a": 1}), ("rope_freq_base", 5e5), ("rope_scaling_type", 2), ("yarn_orig_ctx", 64),
    ("attention_type", 1), ("lora_path", "x"), ("tokenizer", object()), ("spm_infill", True),
    ("pooling_type", 9), ("n_ctx", -1), ("n_threads", "four"), ("chat_format", "no such"), ("chat_format", 5),
    ("draft_model", 5), ("seed", "x"), ("last_n_tokens_size", -2)])
def test_constructor_arguments_that_cannot_be_honoured_are_refused_by_name(path, name, value):
    with pytest.raises(ArgumentError, match="chat template" if value == "no such" else "threads"
                       if name == "n_threads" else name):
        Llama(path, **{name: value})


def test_a_missing_file_is_a_value_error_and_a_broken_one_a_format_error(tmp_path):
    with pytest.raises(ValueError, match="model_path"):
        Llama(str(tmp_path / "none.gguf"))
    (tmp_path / "bad.gguf").write_bytes(b"no model at all")
    with pytest.raises(pybmc.FormatError):
        Llama(str(tmp_path / "bad.gguf"))


# ---- completions


@pytest.mark.parametrize("settings", [
    {"temperature": 0}, {"temperature": 0.9, "seed": 7}, {"seed": 3, "repeat_penalty": 1.3},
    {"seed": 3, "frequency_penalty": 0.5, "presence_penalty": 0.1, "top_k": 5, "logit_bias": {"300": 4}}])
def test_a_completion_is_the_text_of_generate(llm, settings):
    tokens = plain(llm, **({"temperature": 0.8} | settings))
    answer = llm(PROMPT, max_tokens=30, **settings)
    assert text_of(answer) == "".join(token.text for token in tokens)
    assert answer["usage"]["completion_tokens"] == len(tokens)
    streamed = llm(PROMPT, max_tokens=30, stream=True, **settings)
    assert "".join(map(text_of, streamed)) == text_of(answer)
    assert (text_of(llm(PROMPT, max_tokens=30, logits_processor=[lambda ids, logits: logits], **settings))
            == text_of(answer))


def test_a_chat_is_written_by_the_template(llm):
    tokens = list(pybmc.generate(llm._model, CHAT, 20, spec="off", temperature=0.2, seed=5))
    answer = llm.create_chat_completion(CHAT, max_tokens=20, seed=5)
    assert answer["choices"][0]["message"]["content"] == "".join(token.text for token in tokens)
    joined = "".join(chunk["choices"][0]["delta"].get("content", "")
                     for chunk in llm.create_chat_completion(CHAT, max_tokens=20, seed=5, stream=True))
    assert joined == answer["choices"][0]["message"]["content"]


@pytest.mark.parametrize("given, ours",
                         [("chatml", "chatml"), ("llama-2", "llama2"), ("mistral-instruct", "mistral"),
                          ("{{ messages[-1]['content'] }}", "{{ messages[-1]['content'] }}")])
def test_chat_formats_have_their_names(path, given, ours):
    chat = [{"role": "user", "content": "Hello"}]
    with Llama(path, chat_format=given, n_threads=1, verbose=False) as llm:
        tokens = list(pybmc.generate(llm._model, chat, 5, chat_template=ours))
        answer = llm.create_chat_completion(chat, max_tokens=5, temperature=0)
        assert answer["choices"][0]["message"]["content"] == "".join(token.text for token in tokens)


def test_a_template_that_the_file_has_under_a_name_is_found(tmp_path):
    metadata, tensors = tiny.parts("llama", n_ctx=64)
    metadata["tokenizer.chat_template.short"] = "{{ messages[0]['content'] }}"
    with Llama(tiny.save(tmp_path / "m.gguf", metadata, tensors), chat_format="chat_template.short",
               verbose=False) as llm:
        assert (llm.create_chat_completion(CHAT, max_tokens=1)["usage"]["prompt_tokens"]
                == len(llm.tokenize(b"Be brief.")))


def test_a_last_message_of_the_assistant_is_closed_not_continued(llm):
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "And so"}]
    n = len(llm._template.encode(chat, continue_final_message=False))
    assert llm.create_chat_completion(chat, max_tokens=1)["usage"]["prompt_tokens"] == n


def test_a_chat_handler_gets_the_arguments(path):
    with Llama(path, chat_handler=lambda **given: given, verbose=False) as llm:
        given = llm.create_chat_completion(CHAT, top_k=3)
    assert given["llama"] is llm and given["messages"] is CHAT and given["top_k"] == 3 and "self" not in given


def test_echo_puts_the_prompt_before_the_text(llm):
    answer = text_of(llm(PROMPT, max_tokens=5, temperature=0))
    assert text_of(llm(PROMPT, max_tokens=5, temperature=0, echo=True)) == PROMPT + answer
    assert ("".join(map(text_of, llm(PROMPT, max_tokens=5, temperature=0, echo=True, stream=True)))
            == PROMPT + answer)
    ids = llm.tokenize(PROMPT.encode())
    assert text_of(llm(ids, max_tokens=5, temperature=0, echo=True)) == PROMPT + answer


@pytest.mark.parametrize("functions", [{}, {"logits_processor": lambda ids, logits: logits}],
                         ids=["engine", "one by one"])
def test_logprobs_are_the_models_own(llm, functions):
    ids = llm.tokenize(PROMPT.encode())
    with llm._model.session() as session:
        rows = session.eval(ids, "all").astype(np.float64)
    logprobs = rows - np.log(np.exp(rows).sum(1, keepdims=True))
    told = llm(PROMPT, max_tokens=4, temperature=0, repeat_penalty=1.5, logprobs=3, echo=True,
               **functions)["choices"][0]["logprobs"]
    n = len(ids)
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    assert len(told["tokens"]) == n + 4
    assert (told["token_logprobs"][1:n]
            == pytest.approx([logprobs[i, ids[i + 1]] for i in range(n - 1)], abs=1e-4))
    assert max(told["top_logprobs"][n].values()) == pytest.approx(logprobs[-1].max(), abs=1e-4)
    alone = llm(PROMPT, max_tokens=4, temperature=0, repeat_penalty=1.5, logprobs=3,
                **functions)["choices"][0]["logprobs"]
    assert alone["tokens"] == told["tokens"][n:] and alone["token_logprobs"] == told["token_logprobs"][n:]


def test_logprobs_without_any_likeliest_ones(llm):
    told = llm(PROMPT, max_tokens=2, logprobs=0)["choices"][0]["logprobs"]
    assert len(told["token_logprobs"]) == 2 and told["top_logprobs"] == [{}, {}]


@pytest.mark.parametrize("functions", [{}, {"stopping_criteria": lambda ids, logits: False}],
                         ids=["engine", "one by one"])
def test_stop_strings_end_the_text(llm, functions):
    whole = text_of(llm(PROMPT, max_tokens=40, temperature=0))
    stop = whole[10:12]
    for given in (stop, [stop], ["never found", stop]):
        answer = llm(PROMPT, max_tokens=40, temperature=0, stop=given, **functions)
        assert text_of(answer) == whole[:whole.find(stop)] and answer["choices"][0]["finish_reason"] == "stop"
    assert text_of(llm(PROMPT, max_tokens=40, temperature=0, stop=None, **functions)) == whole
    assert llm(PROMPT, max_tokens=4, **functions)["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("functions", [{}, {"stopping_criteria": lambda ids, logits: False}],
                         ids=["engine", "one by one"])
def test_the_context_ends_a_text_without_max_tokens(llm, functions):
    n = len(llm.tokenize(PROMPT.encode()))
    for most in (None, 0, -1):
        answer = llm(PROMPT, max_tokens=most, temperature=0,
                     logit_bias={id: -100 for id in llm._tokenizer.stop_ids}, **functions)
        assert answer["usage"]["completion_tokens"] == N_CTX - n + 1
        assert answer["choices"][0]["finish_reason"] == "length"


def test_n_ctx_caps_a_text(path):
    with Llama(path, n_ctx=20, n_threads=1, verbose=False) as llm:
        assert llm.n_ctx() == 20
        assert llm([5] * 20, max_tokens=None)["usage"]["completion_tokens"] == 1
        for call in (lambda: llm([5] * 21), lambda: llm([5] * 21, stream=True), lambda: llm.eval([5] * 21),
                     lambda: llm.generate([5] * 21), lambda: llm.create_chat_completion(CHAT)):
            with pytest.raises(ContextFullError, match="room for 20"):
                call()
        assert llm.n_tokens in (20, 0)


def test_a_prompt_is_a_text_or_ids(llm):
    ids = llm.tokenize(PROMPT.encode())
    wanted = text_of(llm(PROMPT, temperature=0))
    assert ([text_of(llm(prompt, temperature=0)) for prompt in (ids, tuple(ids), np.array(ids))]
            == [wanted] * 3)
    assert llm("", max_tokens=1)["usage"]["prompt_tokens"] == 1         # BOS
    for bad in ([], [1, "a"], [-1], [10 ** 6], None, 5, b"x", {"a": 1}):
        with pytest.raises(ArgumentError):
            llm(bad)


@pytest.mark.parametrize("given", [
    {"max_tokens": "x"}, {"temperature": -1}, {"top_k": -3}, {"stop": [""]}, {"stop": 5}, {"logprobs": -1},
    {"logprobs": 1.5}, {"seed": "x"}, {"logit_bias": {10 ** 6: 1}}, {"logit_bias": [1]}, {"typical_p": 0.5},
    {"mirostat_mode": 2}, {"grammar": "root ::= x"}, {"suffix": "x"}, {"logits_processor": 5},
    {"logits_processor": [5]}, {"stopping_criteria": "x"}])
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_with_a_call_is_said_at_once(llm, given, stream):
    with pytest.raises(BmcError, match=next(iter(given))):
        llm(PROMPT, stream=stream, **given)


@pytest.mark.parametrize("given", [
    {"tools": [{"type": "function"}]}, {"functions": [{"name": ""}]},
    {"tool_choice": "required"}, {"function_call": {"name": "f"}}, {"response_format": {"type": "yaml"}},
    {"response_format": "json"}, {"top_logprobs": 2}, {"messages": []}, {"messages": "Hello"},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, {"messages": [5]},
    {"typical_p": 0.5}])
def test_a_chat_refuses_what_it_does_not_honour(llm, given):
    with pytest.raises(ArgumentError, match="message" if "messages" in given else next(iter(given))):
        llm.create_chat_completion(**({"messages": CHAT} | given))


def test_asking_for_nothing_is_fine(llm):
    llm.create_chat_completion(CHAT, max_tokens=1, tools=[], functions=None, tool_choice="none",
                               response_format={"type": "text"}, stop=None, logprobs=False)
    parts = [{"role": "user",
              "content": [{"type": "text", "text": "Tell a "}, {"type": "text", "text": "story"}]}]
    joined = [{"role": "user", "content": "Tell a story"}]
    one, other = (llm.create_chat_completion(chat, max_tokens=5, temperature=0) for chat in (parts, joined))
    assert one["choices"] == other["choices"]


def test_a_suffix_goes_behind_the_gap_where_there_are_fill_in_tokens(tmp_path, llm):
    metadata, tensors = tiny.parts("llama", n_ctx=64)
    ids = range(300, 303)
    for id, name in zip(ids, ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")):
        metadata["tokenizer.ggml.tokens"][id] = name
    with Llama(tiny.save(tmp_path / "m.gguf", metadata, tensors), n_threads=1, verbose=False) as fills:
        encode = lambda text: fills.tokenize(text, add_bos=False)
        tokens = [fills.token_bos(), ids[0], *encode(b"def f"), ids[1], *encode(b"return"), ids[2]]
        wanted = text_of(fills(tokens, max_tokens=5, temperature=0))
        assert text_of(fills("def f", suffix="return", max_tokens=5, temperature=0)) == wanted
        for given in ({"suffix": "x", "echo": True}, {"suffix": 5}, {"suffix": "x", "prompt": [5]}):
            with pytest.raises(ArgumentError, match="suffix"):
                fills(**({"prompt": "a"} | given))
    assert text_of(llm(PROMPT, suffix="", temperature=0)) == text_of(llm(PROMPT, temperature=0))


# ---- seeds


def test_a_seed_gives_the_same_texts_in_the_same_order(path):
    def texts(seed):
        with Llama(path, seed=seed, n_threads=1, verbose=False) as llm:
            return [text_of(llm(PROMPT, temperature=2.0)) for _ in range(3)]

    first = texts(5)
    assert texts(5) == first and len(set(first)) == 3
    assert len({tuple(texts(-1)) for _ in range(2)}) == 2


def test_a_seed_of_a_call_and_set_seed_begin_anew(llm):
    one = text_of(llm(PROMPT, temperature=2.0, seed=9))
    then = text_of(llm(PROMPT, temperature=2.0))
    assert one != then
    assert ([text_of(llm(PROMPT, temperature=2.0, seed=9)), text_of(llm(PROMPT, temperature=2.0))]
            == [one, then])
    llm.set_seed(9)
    assert text_of(llm(PROMPT, temperature=2.0)) == then
    assert text_of(llm(PROMPT, temperature=2.0, seed=-1)) != text_of(llm(PROMPT, temperature=2.0, seed=-1))


# ---- functions


def test_a_processor_sees_ids_and_logits_and_bans_tokens(llm):
    seen, ids = [], llm.tokenize(PROMPT.encode())
    first = llm._model.tokenizer.encode(text_of(llm(PROMPT, max_tokens=1, temperature=0)), bos=False)

    def ban(ids, logits):
        seen.append((list(ids), ids.dtype, logits.dtype, logits.shape))
        logits[first] = -np.inf
        return logits

    answer = llm(PROMPT, max_tokens=5, temperature=0, logits_processor=LogitsProcessorList([ban]))
    assert text_of(answer) == text_of(llm(PROMPT, max_tokens=5, temperature=0,
                                          logit_bias={id: -100 for id in first}))
    assert seen[0] == (ids, np.int32, np.float32, (llm.n_vocab(),))
    assert [len(s[0]) for s in seen] == [len(ids) + i for i in range(5)]


def test_processors_follow_one_another_and_streams_have_them_too(llm):
    plus, calls = lambda ids, logits: logits + (np.arange(len(logits)) == 301) * np.float32(1000), []
    second = lambda ids, logits: calls.append(int(logits.argmax())) or logits
    text = llm.detokenize([301]).decode() * 3
    assert text_of(llm(PROMPT, max_tokens=3, temperature=0, logits_processor=[plus, second])) == text
    assert calls == [301] * 3
    assert "".join(map(text_of, llm(PROMPT, max_tokens=3, temperature=0, logits_processor=[plus],
                                    stream=True))) == text
    chat = llm.create_chat_completion(CHAT, max_tokens=3, temperature=0,
                                      logits_processor=LogitsProcessorList([plus]))
    assert chat["choices"][0]["message"]["content"] == text


@pytest.mark.parametrize("broken, why", [(lambda i, l: l[:5], "logits_processor"),
                                         (lambda i, l: l * np.nan, "nan"), (lambda i, l: l - np.inf, "-inf")])
def test_a_processor_that_gives_no_logits_is_an_error_and_the_next_call_is_fine(llm, broken, why):
    with pytest.raises(ArgumentError, match=why):
        llm(PROMPT, logits_processor=broken)
    with pytest.raises(ZeroDivisionError):
        llm(PROMPT, logits_processor=lambda ids, logits: 1 / 0)
    assert text_of(llm(PROMPT, max_tokens=30, temperature=0)) == "".join(token.text for token in plain(llm))


def test_a_stopping_criterion_ends_the_text_before_the_next_token(llm):
    n, seen = len(llm.tokenize(PROMPT.encode())), []

    def long_enough(ids, logits):
        seen.append((len(ids), logits.shape))
        return len(ids) >= n + 3

    answer = llm(PROMPT, max_tokens=10, temperature=0,
                 stopping_criteria=StoppingCriteriaList([long_enough]), logprobs=1)
    assert answer["usage"]["completion_tokens"] == 3 and answer["choices"][0]["finish_reason"] == "stop"
    assert text_of(answer) == "".join(token.text for token in plain(llm, n=3))
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == 3
    assert seen == [(n + i, (llm.n_vocab(),)) for i in range(4)]
    nothing = llm(PROMPT, stopping_criteria=lambda ids, logits: True)
    assert text_of(nothing) == "" and nothing["choices"][0]["finish_reason"] == "stop"


# ---- token by token


def test_generate_gives_the_ids_of_a_completion_and_goes_on_beyond_its_end(llm):
    ids = llm.tokenize(PROMPT.encode())
    llm.set_seed(4)
    wanted = list(pybmc.generate(llm._model, ids, 40, spec="off", temperature=0.8, seed=4, stop_tokens=()))
    found = []
    for id in llm.generate(ids):
        assert llm.n_tokens == len(ids) + len(found)
        found.append(id)
        if len(found) == 40:
            break
    assert found == [token.id for token in wanted]
    eos = lambda ids, logits: np.where(np.arange(len(logits)) == llm.token_eos(), np.float32(100), logits)
    ends = llm.generate(ids, logits_processor=eos,
                        stopping_criteria=lambda text, logits: len(text) == len(ids) + 4)
    assert list(ends) == [llm.token_eos()] * 4


def test_what_is_sent_to_generate_follows_the_last_id(llm):
    ids = llm.tokenize(PROMPT.encode())
    chosen = llm.generate(ids, temp=0)
    first = next(chosen)
    second = chosen.send([7, 8, 9])
    assert llm.eval_tokens == llm.eval_tokens.__class__([*ids, first, 7, 8, 9], maxlen=N_CTX)
    assert second == plain(llm, [*ids, first, 7, 8, 9], 1)[0].id
    with pytest.raises(ArgumentError, match="sent"):
        chosen.send([10 ** 6])


def test_generate_without_reset_goes_on_from_the_text(llm):
    ids = llm.tokenize(PROMPT.encode())
    llm.eval(ids[:4])
    assert next(llm.generate(ids[4:], temp=0, reset=False)) == plain(llm, ids, 1)[0].id
    assert llm.input_ids.tolist() == ids


def test_eval_and_sample_make_a_loop(llm):
    ids = llm.tokenize(PROMPT.encode())
    with pytest.raises(ArgumentError, match="eval"):
        llm.sample()
    llm.eval(ids[:3])
    llm.eval(ids[3:])
    found = []
    for _ in range(6):
        found.append(llm.sample(temp=0))
        llm.eval([found[-1]])
    assert found == [token.id for token in plain(llm, n=6)] and llm.n_tokens == len(ids) + 6
    assert llm.sample(temp=0, idx=len(ids) - 1) == found[0]
    assert llm.sample(temp=0, logits_processor=[lambda ids, logits: -logits]) != llm.sample(temp=0)
    for bad in (lambda: llm.eval([]), lambda: llm.eval([10 ** 6]), lambda: llm.eval("abc"),
                lambda: llm.sample(idx=400), lambda: llm.sample(temp=-1), lambda: llm.generate([]),
                lambda: llm.generate(ids, typical_p=0.3)):
        with pytest.raises(ArgumentError):
            bad()
    assert llm.n_tokens == len(ids) + 6


def test_an_eval_that_does_not_fit_changes_nothing(llm):
    llm.eval([5] * 290)
    with pytest.raises(ContextFullError):
        llm.eval([5] * 11)
    assert llm.n_tokens == 290
    llm.eval([5] * 10)


def test_scores_are_the_logits_of_all_tokens(path, llm):
    ids = llm.tokenize(PROMPT.encode())
    with pytest.raises(ArgumentError, match="logits_all"):
        llm.scores
    with Llama(path, logits_all=True, n_threads=1, verbose=False) as all_of_them:
        assert all_of_them.scores.shape == (0, llm.n_vocab())
        with all_of_them._model.session() as session:
            rows = session.eval(ids, "all")
        all_of_them.eval(ids[:4])
        all_of_them.eval(ids[4:])
        assert np.array_equal(all_of_them.scores, rows)
        assert np.array_equal(np.array(all_of_them.eval_logits, np.float32), rows)
        all_of_them(PROMPT, max_tokens=1)
        assert np.array_equal(all_of_them.scores, rows)
    llm.eval(ids)
    assert np.array_equal(np.array(llm.eval_logits, np.float32), rows[-1:])


def test_a_state_is_a_place_to_come_back_to(llm):
    ids = llm.tokenize(PROMPT.encode())
    llm.set_seed(12)
    llm.eval(ids)
    state = pickle.loads(pickle.dumps(llm.save_state()))
    llm.eval([3, 4, 5])
    llm.set_seed(1)
    llm.load_state(state)
    assert llm.n_tokens == len(ids) and llm.sample() == plain(llm, ids, 1, temperature=0.8, seed=12)[0].id
    llm(PROMPT, max_tokens=5)
    # what a completion has read
    assert llm.input_ids[:len(ids)].tolist() == ids and llm.n_tokens == len(ids) + 4
    state.input_ids[0] = 10 ** 6
    for bad in (state, None, ids):
        with pytest.raises(ArgumentError):
            llm.load_state(bad)


# ---- rows that are used again, threads, streams


def reused(answer):
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_the_rows_of_the_last_text_are_used_again(llm):
    n = len(llm.tokenize(PROMPT.encode()))
    llm([9] * 50, max_tokens=1)
    assert reused(llm(PROMPT, max_tokens=3)) == 0
    assert reused(llm(PROMPT + " and a cat", max_tokens=3)) >= n - 2
    assert len(llm._last) == 1


def test_a_cache_keeps_more_texts_up_to_its_capacity(path):
    cache = LlamaRAMCache()
    prompts = [[i] * 100 for i in (5, 6, 7)]
    with Llama(path, n_threads=1, verbose=False) as llm:
        llm.set_cache(cache)
        assert [reused(llm(prompt, max_tokens=1)) for prompt in prompts * 2] == [0, 0, 0, 99, 99, 99]
        assert len(cache) == 3 and cache.cache_size > 0
        cache.capacity_bytes = 0
        llm(prompts[0], max_tokens=1)
        assert len(cache) == 1 and reused(llm(prompts[1], max_tokens=1)) == 0
        with Llama(path, n_threads=1, verbose=False) as other:    # another model's rows are none of its own
            other.set_cache(cache)
            assert reused(other(prompts[1], max_tokens=1)) == 0
        with pytest.raises(ArgumentError, match="cache"):
            llm.set_cache({})
    assert len(cache) == 0 and cache.cache_size == 0
    with pytest.raises(ArgumentError, match="capacity_bytes"):
        LlamaRAMCache(-1)


def test_streams_beside_each_other_do_not_change_one_another(llm):
    wanted = [text_of(llm(PROMPT, max_tokens=20, seed=i)) for i in range(3)]
    streams = [llm(PROMPT, max_tokens=20, seed=i, stream=True) for i in range(3)]
    found = [""] * 3
    for _ in range(25):
        for i, stream in enumerate(streams):
            found[i] += text_of(next(stream, {"choices": [{"text": ""}]}))
        llm.eval([5])
    assert found == wanted


def test_a_stream_that_is_left_gives_its_rows_back(llm):
    stream = llm(PROMPT, max_tokens=None, stream=True)
    for _ in range(3):
        next(stream)
    stream.close()
    assert len(llm._last) == 1
    assert not [s for s in llm._model._sessions if s.position and s is not llm._last._kept[0][0]]
    assert reused(llm(PROMPT, max_tokens=1)) == len(llm.tokenize(PROMPT.encode())) - 1
    llm(PROMPT, stream=True)                                     # never begun


def test_threads_that_share_an_object_get_what_they_would_get_alone(llm):
    calls = [lambda i=i: text_of(llm(f"{PROMPT} {i % 3}", max_tokens=25, seed=i)) for i in range(4)]
    calls += [lambda i=i: text_of(llm(PROMPT, max_tokens=25, seed=i,
                                      logits_processor=lambda ids, logits: -logits)) for i in range(2)]
    wanted, found = [call() for call in calls], [None] * len(calls)

    def work(i):
        found[i] = calls[i]()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == wanted


# ---- drafts


def test_draft_models_do_not_change_the_text(path, llm):
    small = tiny.model("llama", n_ctx=N_CTX, types="Q4_0")
    wanted = text_of(llm(PROMPT, max_tokens=60, temperature=0))
    with pybmc.Model(small, threads=1) as model, Llama(small, n_threads=1, verbose=False) as other:
        for draft in (small, str(small), model, other, LlamaPromptLookupDecoding(),
                      LlamaPromptLookupDecoding(num_pred_tokens=3)):
            with Llama(path, draft_model=draft, n_threads=1, verbose=False) as guided:
                has_model = not isinstance(draft, LlamaPromptLookupDecoding)
                assert (guided._speculation.draft is not None) is has_model and guided.draft_model is draft
                assert text_of(guided(PROMPT, max_tokens=60, temperature=0)) == wanted
        assert not model.closed and not other._model.closed


# ---- the vocabulary, the file, embeddings


@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_tokens_are_bytes_and_back(arch):
    with Llama(tiny.model(arch, n_ctx=64), n_threads=1, verbose=False) as llm:
        tokenizer = llm._tokenizer
        for text in ("Once upon a time", "  spaces ", "naïve 😀\n", ""):
            ids = llm.tokenize(text.encode())
            assert ids == tokenizer.encode(text) and llm.detokenize(ids).decode() == text
            assert llm.tokenize(text.encode(), False) == tokenizer.encode(text, bos=False)
        assert (llm.tokenize(b"<|im_end|>", False, True)
                == tokenizer.encode("<|im_end|>", bos=False, special=True))
        bos = tokenizer.piece(llm.token_bos())
        assert llm.detokenize([llm.token_bos()]) == b""
        assert llm.detokenize([llm.token_bos()], special=True) == bos
        assert llm.detokenize([llm.token_nl()]) == b"\n"
        assert llm.detokenize([tokenizer.byte_id(0xf0)]) == b"\xf0"
        assert llm.detokenize([], prev_tokens=[1, 2]) == b""
        for bad in (lambda: llm.tokenize("text"), lambda: llm.tokenize(b"a\xff"),
                    lambda: llm.detokenize([10 ** 6]), lambda: llm.detokenize("ab")):
            with pytest.raises(ArgumentError):
                bad()


def test_numbers_and_metadata_of_the_file(llm, path):
    config = llm._model.config
    assert (llm.n_ctx(), llm.n_vocab(), llm.n_embd()) == (N_CTX, config.vocab_size, config.dim)
    assert (llm.token_bos(), llm.token_eos()) == (llm._tokenizer.bos_id, llm._tokenizer.eos_id)
    assert llm.pooling_type() == -1
    assert llm.metadata["llama.context_length"] == str(N_CTX)
    assert llm.metadata["llama.rope.freq_base"] == "10000.000000"
    assert all(isinstance(value, str) for value in llm.metadata.values())
    assert "tokenizer.ggml.tokens" not in llm.metadata
    assert llm.model_path == str(path) and str(path) in repr(llm)


def test_vocab_only_reads_no_weights(path, llm):
    with Llama(path, vocab_only=True, verbose=False) as small:
        assert small.tokenize(PROMPT.encode()) == llm.tokenize(PROMPT.encode())
        assert (small.n_vocab(), small.n_embd(), small.n_ctx()) == (llm.n_vocab(), llm.n_embd(), llm.n_ctx())
        for call in (lambda: small(PROMPT), lambda: small.eval([1]), lambda: small.embed("x"),
                     lambda: small.create_chat_completion(CHAT)):
            with pytest.raises(ArgumentError, match="vocab_only"):
                call()


def test_embeddings_come_from_the_model(path, monkeypatch):
    def embed(self, inputs, normalize=True, pooling=None):
        asked.append((inputs, normalize, pooling))
        return np.array([[len(ids), 2.0] for ids in inputs], np.float32)

    asked = []
    monkeypatch.setattr(pybmc.Model, "embed", embed)
    with Llama(path, embedding=True, n_ctx=20, pooling_type=3, n_threads=1, verbose=False) as llm:
        a, b = (llm.tokenize(text.encode()) for text in ("one", "two words"))
        answer = llm.create_embedding(["one", "two words"])
        assert fits(answer, EMBEDDING) and [row["embedding"][0] for row in answer["data"]] == [len(a), len(b)]
        assert [row["index"] for row in answer["data"]] == [0, 1]
        assert answer["usage"] == {"prompt_tokens": len(a) + len(b), "total_tokens": len(a) + len(b)}
        assert answer["model"] == str(path)
        assert asked == [([a, b], False, "last")]
        assert fits(llm.create_embedding("one", model="mine"), EMBEDDING)
        assert llm.embed("one", normalize=True, return_count=True) == ([len(a), 2.0], len(a)) and asked[-1][1]
        assert llm.embed([]) == [] and llm.embed("word " * 50)[0] == 20
        with pytest.raises(ContextFullError, match="room for 20"):
            llm.embed("word " * 50, truncate=False)
        with pytest.raises(ArgumentError, match="input"):
            llm.embed(5)


SCHEMA = ('{"type": "object", "properties": {"a": {"enum": ["xx", "yy"]}}, "required": ["a"], '
          '"additionalProperties": false}')
OBJECTS = ('{"a":"xx"}', '{"a":"yy"}')


@pytest.fixture
def grammar(tmp_path):
    pytest.importorskip("llguidance", reason="grammars need llguidance")
    (tmp_path / "yes.gbnf").write_text('root ::= "yes" | "no"')
    return {"string": LlamaGrammar.from_string('root ::= "yes" | "no"'),
            "file": LlamaGrammar.from_file(tmp_path / "yes.gbnf", verbose=False),
            "schema": LlamaGrammar.from_json_schema(SCHEMA)}


@pytest.mark.parametrize("name", ["string", "file", "schema"])
@pytest.mark.parametrize("plain", [True, False])
def test_texts_follow_a_grammar(llm, grammar, name, plain):
    """Also where functions see each token's logits, which may not allow more."""
    allowed = OBJECTS if name == "schema" else ("yes", "no")
    more = {} if plain else {"logits_processor": lambda ids, logits: logits * 0 + 5}
    for seed in range(3):
        assert (text_of(llm(PROMPT, grammar=grammar[name], seed=seed, max_tokens=40, temperature=2.0, **more))
                in allowed)
        found = llm.create_chat_completion(CHAT, grammar=grammar[name], seed=seed, max_tokens=40,
                                           temperature=2.0, **more)
        assert found["choices"][0]["message"]["content"] in allowed
        assert found["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("asked", [
    {"type": "json_object", "schema": json.loads(SCHEMA)},
    {"type": "json_schema", "json_schema": {"schema": json.loads(SCHEMA)}}], ids=repr)
def test_a_response_format_is_followed(llm, grammar, asked):
    for stream in (False, True):
        found = llm.create_chat_completion(CHAT, response_format=asked, max_tokens=40, stream=stream)
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in found) if stream \
            else found["choices"][0]["message"]["content"]
        assert text in OBJECTS


def test_ids_follow_a_grammar(llm, grammar):
    found = []
    for id in llm.generate(llm.tokenize(b"Once"), grammar=grammar["string"], temp=1.5):
        if id in llm._tokenizer.stop_ids:
            break
        found.append(id)
    assert llm.detokenize(found) in (b"yes", b"no")


def test_bad_grammars_are_refused(llm, grammar):
    for make in (lambda: LlamaGrammar.from_string(""), lambda: LlamaGrammar.from_json_schema(5),
                 lambda: llm(PROMPT, grammar=LlamaGrammar.from_string("root ::= (")),
                 lambda: llm(PROMPT, grammar=LlamaGrammar.from_json_schema("{")),
                 lambda: llm.create_chat_completion(CHAT, grammar=grammar["string"],
                                                    response_format={"type": "json_object"})):
        with pytest.raises(ArgumentError):
            make()
    llm.eval([1, 2])
    with pytest.raises(ArgumentError, match="grammar"):
        llm.sample(grammar=grammar["string"])


# ---- the hub, the end


def test_from_pretrained_takes_the_one_file_that_fits(path, monkeypatch):
    there, asked = ["README.md", "m-Q4_K_M.gguf", "sub/m-Q8_0.gguf", "m-f16-00001-of-00002.gguf",
                    "m-f16-00002-of-00002.gguf"], []

    def download(repo_id, name, **more):
        asked.append((repo_id, name, more))
        return str(path)

    hub = types.SimpleNamespace(HfApi=lambda: types.SimpleNamespace(list_repo_files=lambda repo_id: there),
                                hf_hub_download=download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    more = {"local_dir": None, "cache_dir": "/c"}
    with Llama.from_pretrained("user/repo", "*Q8_0.gguf", cache_dir="/c", n_ctx=30, verbose=False) as llm:
        assert asked == [("user/repo", "sub/m-Q8_0.gguf", more)] and llm.n_ctx() == 30
    asked.clear()
    Llama.from_pretrained("user/repo", "*-00001-of*", additional_files=["*-00002-of*"], cache_dir="/c",
                          verbose=False).close()
    assert [name for _, name, _ in asked] == there[3:]
    for pattern, found in (("*Q3*", "README.md"), ("*.gguf", "m-Q4_K_M.gguf, sub/")):
        with pytest.raises(ArgumentError, match=re.escape(found)):
            Llama.from_pretrained("user/repo", pattern)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BmcError, match="pip install huggingface-hub"):
        Llama.from_pretrained("user/repo", "m.gguf")


def test_close_twice_and_calls_after_it(path):
    llm = Llama(path, n_threads=1, verbose=False)
    stream = llm(PROMPT, max_tokens=None, stream=True)
    next(stream)
    llm.close()
    llm.close()
    for call in (lambda: llm(PROMPT), lambda: llm.eval([1]), lambda: next(llm.generate([1])),
                 lambda: list(stream)):
        with pytest.raises(ClosedError):
            call()
    assert llm.detokenize(llm.tokenize(b"still there")) == b"still there"


def test_an_object_is_pickled_by_its_arguments(path):
    with Llama(path, n_ctx=40, seed=3, n_threads=1,
               verbose=False) as llm, pickle.loads(pickle.dumps(llm)) as other:
        assert other.n_ctx() == 40 and text_of(other(PROMPT)) == text_of(llm(PROMPT))


def test_verbose_tells_counts_in_the_log(path, caplog):
    caplog.set_level(logging.INFO)
    with Llama(path, n_threads=1, verbose=True) as llm:
        llm(PROMPT, max_tokens=3)
        list(llm(PROMPT, max_tokens=3, stream=True, logits_processor=lambda ids, logits: logits))
    assert sum("answer 3 tokens" in record.message for record in caplog.records) == 2


def test_the_class_needs_no_server_packages():
    code = ("import sys\nfor name in ('starlette', 'uvicorn', 'prometheus_client', 'huggingface_hub'): "
            "sys.modules[name] = None\n"
            "import pybmc; print(pybmc.Llama.__name__, pybmc.llama.LlamaState.__name__)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
                          check=False)
    assert done.stdout.split() == ["Llama", "LlamaState"], done.stderr


# ---- the page

PAGE = (Path(__file__).parents[1] / "docs" / "llama.md").read_text("utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_of_the_page_runs(path, code):
    code = code.replace('"model.gguf"',
                        repr(str(path))).replace('"small.gguf"',
                                                 repr(str(tiny.model("llama", n_ctx=N_CTX, types="Q4_0"))))
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(compile(code, "docs/llama.md", "exec"), {})
    assert shown.getvalue().strip()


def test_the_page_names_what_has_no_effect_and_what_is_refused():
    from pybmc.llama.arguments import CHAT_FORMATS, UNCHANGED, WITHOUT_EFFECT

    words = set(re.findall(r"[\w.-]+", PAGE))
    assert set(WITHOUT_EFFECT) | set(CHAT_FORMATS) <= words
    assert all(name in words or name.startswith(("rope_", "yarn_")) for name in UNCHANGED)
