"""What llama-server's clients send and read, on its own routes and as more fields on OpenAI's."""

import math
import re
from types import SimpleNamespace

import numpy as np
import numpy_sampling
import pytest
import tiny
from serving import events, served

import pybmc
from pybmc.engine.request import Stats
from pybmc.serve.fill import fill_tokens
from pybmc.serve.worker import Slot

HELLO = [{"role": "user", "content": "Once upon a time"}]
SETTINGS = {"temperature": 0.8, "min_p": 0.0}


@pytest.fixture(scope="module")
def model():
    with pybmc.Model(tiny.model("llama", n_ctx=600), threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def server(model):
    with served(model, names=["tiny"], sampling={"min_p": 0.0}) as server:
        yield server


def text_of(model, prompt, n, **settings):
    return "".join(t.text for t in pybmc.generate(model, prompt, n, spec="off", **SETTINGS | settings))


def complete(server, prompt="Once upon", **fields):
    response = server.post("/completion", {"prompt": prompt, "n_predict": 8, "seed": 3, **fields})
    assert response.status_code == 200, response.text
    return response.json()


# ---- prompts


def test_prompts_are_texts_ids_objects_and_mixtures(server, model):
    ids = model.tokenizer.encode("Once upon", special=True)
    text = complete(server)["content"]
    for prompt in (ids, {"prompt_string": "Once upon"}, ["Once upon"], [{"prompt_string": "Once upon"}],
                   [*ids[:-1], ids[-1]]):
        assert complete(server, prompt)["content"] == text
    several = complete(server, ["Once upon", ids, {"prompt_string": "Once upon"}])
    assert [found["content"] for found in several] == [text] * 3
    before, behind = model.tokenizer.encode("Once"), model.tokenizer.encode(" upon", bos=False)
    mixed = complete(server, ["Once", *behind], return_tokens=True)
    assert mixed["tokens"] == complete(server, [*before, *behind], return_tokens=True)["tokens"]
    assert complete(server, [*before, " upon"])["content"] == mixed["content"]


@pytest.mark.parametrize("prompt", [{"text": "x"}, {"prompt_string": 5},
                                    {"prompt_string": "x", "multimodal_data": ["aGk="]}, [1, None], [1, True],
                                    [1, [2]], [], [[]], None])
def test_prompts_that_are_none_of_these_are_refused(server, prompt):
    response = server.post("/completion", {"prompt": prompt})
    assert response.status_code == 400 and response.json()["error"]["param"].startswith("prompt")


def test_the_prompt_is_told_with_its_control_tokens(server):
    assert complete(server, "Once")["prompt"] == "<|endoftext|>Once"


# ---- answers


def test_n_completions_of_each_prompt(server, model):
    found = complete(server, ["Once upon", "the sea"], n_cmpl=2)
    wanted = [text_of(model, prompt, 8, seed=seed) for prompt in ("Once upon", "the sea") for seed in (3, 4)]
    assert [one["content"] for one in found] == wanted
    assert [one["prompt"][-7:] for one in found] == ["ce upon"] * 2 + ["the sea"] * 2


def test_settings_of_an_answer_and_single_fields_of_it(server):
    found = complete(server, stop=["zzz"], n_probs=1)
    told = found["generation_settings"]
    assert ((told["n_predict"], told["seed"], told["stop"], told["n_probs"], told["min_p"])
            == (8, 3, ["zzz"], 1, 0.0))
    assert told["logit_bias"] == [] and told["ignore_eos"] is False and told["stream"] is False
    paths = ["content", "generation_settings/n_predict", "timings/predicted_n", "nothing/here",
             "content/further"]
    assert complete(server, response_fields=paths) == {
        "content": found["content"], "generation_settings/n_predict": 8, "timings/predicted_n": 8}
    defaults = server.client.get("/props").json()["default_generation_settings"]["params"]
    assert defaults["seed"] == 2**32 - 1 and defaults["min_p"] == 0.0 and defaults["n_predict"] == -1


@pytest.mark.parametrize("settings", [
    {"temperature": 1.0, "top_k": 5, "min_p": 0},
    {"temperature": 0.7, "top_k": 0, "top_p": 0.3, "min_p": 0.0},
    {"temperature": 1.5, "top_k": 0, "top_p": 1, "min_p": 0.2, "logit_bias": [[50, 3], [60, False]],
     "repeat_penalty": 1.3},
    {"temperature": 0}, {"temperature": 0, "json_schema": {"enum": ["yes", "no"]}},
    {"temperature": 1.0, "top_k": 0, "top_p": 1, "min_p": 0},
], ids=range(6))
def test_probabilities_by_which_tokens_are_drawn(server, model, settings):
    """Of what the filters leave, after the temperature; those of a greedy choice are 1."""
    asked = {"n_probs": 10, "post_sampling_probs": True, "seed": 7, "n_predict": 6,
             "return_tokens": True} | settings
    found = complete(server, **asked)
    assert found["content"] == complete(server, **asked | {"post_sampling_probs": False})["content"]
    ids, before = found["tokens"], model.tokenizer.encode("Once upon", special=True)
    bias = {id: -math.inf if value is False else value for id, value in settings.get("logit_bias", ())}
    names = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty")
    sampler = pybmc.Sampler(**{"top_k": 40, "top_p": 0.95, "min_p": 0.0}
                            | {name: settings[name] for name in names if name in settings}, logit_bias=bias)
    with model.session() as session:
        for i, told in enumerate(found["completion_probabilities"]):
            text = [*before, *ids[:i]]
            logits = numpy_sampling.altered(sampler, session.eval(text[session.position:]), text)
            left = numpy_sampling.kept(sampler, logits)
            assert told["id"] == ids[i] and set(told) == {"id", "token", "bytes", "prob", "top_probs"}
            if settings["temperature"] == 0:
                assert told["prob"] == 1 and [one["id"] for one in told["top_probs"]] == [ids[i]]
                continue
            weights = np.exp((logits[left] - logits[left[0]]).astype(float) / sampler.temperature)
            shares = dict(zip(left.tolist(), weights / weights.sum()))
            assert math.isclose(told["prob"], shares[ids[i]], rel_tol=1e-4)
            assert [one["id"] for one in told["top_probs"]] == left[:10].tolist()
            assert np.allclose([one["prob"] for one in told["top_probs"]],
                               [shares[id] for id in left[:10]], rtol=1e-4)
    streamed = events(server.post("/completion", {"prompt": "Once upon", "stream": True} | asked))
    assert ([one for chunk in streamed for one in chunk.get("completion_probabilities", ())]
            == found["completion_probabilities"])


def test_tokens_that_cannot_be_drawn_are_not_told(server):
    """Where a schema leaves few, and no sampler cuts."""
    found = complete(server, n_probs=20, post_sampling_probs=True, json_schema={"enum": ["yes", "no"]},
                     top_k=0, top_p=1, min_p=0)
    told = [[one["prob"] for one in token["top_probs"]] for token in found["completion_probabilities"]]
    assert all(0 < len(probs) < 20 and min(probs) > 0 and math.isclose(sum(probs), 1, rel_tol=1e-4)
               for probs in told)


def test_streams_tell_ids_timings_and_progress(server):
    whole = complete(server, "a " * 300, return_tokens=True, cache_prompt=False)
    fields = {"prompt": "a " * 300, "n_predict": 8, "seed": 3, "stream": True, "timings_per_token": True,
              "return_progress": True}
    *chunks, last = events(server.post("/completion", fields))
    assert sum((c["tokens"] for c in chunks), []) == whole["tokens"] and last["stop"] and last["tokens"] == []
    told = [c["prompt_progress"] for c in chunks if "prompt_progress" in c]
    assert told[0]["processed"] == told[0]["cache"] > 0 and told[-1]["processed"] == told[-1]["total"]
    reading = [c["timings"] for c in chunks if "prompt_progress" in c]
    assert (reading[0]["prompt_n"], reading[0]["prompt_ms"], told[0]["time_ms"]) == (0, 0, 0)
    assert all("timings" in c for c in chunks)
    assert reading[-1]["prompt_n"] == told[-1]["total"] - told[-1]["cache"]
    assert reading[-1]["prompt_ms"] == told[-1]["time_ms"] > 0
    fields["max_tokens"] = fields.pop("n_predict")
    *chunks, last = events(server.post("/v1/completions", fields))
    assert "".join(c["choices"][0]["text"] for c in [*chunks, last]) == whole["content"]
    assert any("prompt_progress" in c for c in chunks)
    assert all("timings" in c for c in chunks if c["choices"][0]["text"])


def test_progress_begins_before_the_prompt_is_read(server):
    fields = {"messages": [{"role": "user", "content": "b " * 200}], "max_tokens": 2, "stream": True,
              "return_progress": True}
    first, again = ([c["prompt_progress"] for c in events(server.post("/v1/chat/completions", fields))
                     if "prompt_progress" in c]
                    for _ in range(2))
    assert first[0]["processed"] == first[0]["cache"] < first[-1]["processed"] == first[0]["total"]
    assert again[0]["processed"] == again[0]["cache"] == again[0]["total"] - 1


def test_the_usage_at_a_streams_end_comes_with_timings(server):
    for path, body in (("/v1/chat/completions", {"messages": HELLO}),
                       ("/v1/completions", {"prompt": "Once"})):
        found = events(server.post(path, body | {"max_tokens": 3, "stream": True,
                                                 "stream_options": {"include_usage": True}}))
        assert found[-1]["timings"]["predicted_n"] == found[-1]["usage"]["completion_tokens"] == 3


# ---- how tokens are chosen


def test_ignore_eos_bans_the_end_tokens(server, model):
    ends = sorted(model.tokenizer.stop_ids)
    found = complete(server, ignore_eos=True, logit_bias=[[ends[0], 100], [5, -1.5]])
    told = {entry["token"]: entry["bias"] for entry in found["generation_settings"]["logit_bias"]}
    assert told == dict.fromkeys(ends) | {5: -1.5} and found["tokens_predicted"] == 8
    assert found["stop_type"] == "limit"
    wished = {"max_tokens": 40, "seed": 3, "logit_bias": {str(ends[0]): 100}}
    for path, body in (("/v1/chat/completions", {"messages": HELLO}),
                       ("/v1/completions", {"prompt": "Once"})):
        ended, went_on = (server.post(path, body | wished | {"ignore_eos": ignored}).json()
                          for ignored in (False, True))
        assert ended["choices"][0]["finish_reason"] == "stop" and ended["usage"]["completion_tokens"] < 40
        assert went_on["choices"][0]["finish_reason"] == "length"
        assert went_on["usage"]["completion_tokens"] == 40


def test_bans_of_all_that_a_schema_allows_are_the_requests_fault(server):
    pytest.importorskip("llguidance", reason="schemas need llguidance")
    for fields in ({"ignore_eos": True}, {"logit_bias": [["x", False]], "grammar": 'root ::= "x"'}):
        response = server.post("/completion",
                               {"prompt": "Once", "n_predict": 20, "grammar": 'root ::= "no"'} | fields)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "invalid_value")
        assert "all tokens are banned" in error["message"]


def test_answers_that_follow_a_grammar_have_the_other_fields_too(server):
    pytest.importorskip("llguidance", reason="schemas need llguidance")
    fields = {"prompt": ["Once", "The sea"], "n_predict": 20, "n_cmpl": 2, "grammar": 'root ::= "yes" | "no"',
              "samplers": ["top_k"], "id_slot": 0}
    found = server.post("/completion", fields).json()
    assert len(found) == 4
    assert all(one["content"] in ("yes", "no") and one["stop_type"] == "eos" for one in found)
    chunks = events(server.post("/completion", fields
                                | {"prompt": "Once", "n_cmpl": 1, "stream": True, "return_progress": True}))
    assert "prompt_progress" in chunks[0] and "".join(chunk["content"] for chunk in chunks) in ("yes", "no")


@pytest.mark.parametrize("samplers, settings", [
    (["top_k", "top_p", "infill"], {"min_p": 0, "temperature": 1}),
    (["penalties", "dry", "temperature"], {"top_k": 0, "top_p": 1}),
    (["penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"], {}),
    ([], {"top_k": 0, "top_p": 1, "temperature": 1}),
])
def test_samplers_that_are_not_named_are_left_out(server, model, samplers, settings):
    found = complete(server, samplers=samplers, top_k=9, top_p=0.9, n_predict=16)
    assert found["content"] == text_of(model, "Once upon", 16, seed=3,
                                       **{"top_k": 9, "top_p": 0.9} | settings)


@pytest.mark.parametrize("fields, code, param", [
    ({"samplers": ["top_p", "top_k"]}, "unsupported_parameter", "samplers"),
    ({"samplers": ["top_k", "top_k"]}, "unsupported_parameter", "samplers"),
    ({"samplers": ["best"]}, "invalid_value", "samplers"), ({"samplers": "kpt"}, "invalid_value", "samplers"),
    ({"samplers": [["top_k"]]}, "invalid_value", "samplers"),
    ({"mirostat": 2}, "unsupported_parameter", "mirostat"),
    ({"typical_p": 0.5}, "unsupported_parameter", "typical_p"),
    ({"dry_multiplier": 0.8}, "unsupported_parameter", "dry_multiplier"),
    ({"xtc_probability": 0.5}, "unsupported_parameter", "xtc_probability"),
    ({"dynatemp_range": 0.5}, "unsupported_parameter", "dynatemp_range"),
    ({"top_n_sigma": 1}, "unsupported_parameter", "top_n_sigma"),
    ({"mirostat": "x"}, "invalid_value", "mirostat"),
    ({"lora": [{"id": 0, "scale": 1}]}, "unsupported_parameter", "lora"),
    ({"post_sampling_probs": 1}, "invalid_value", "post_sampling_probs"),
    ({"n_cmpl": 0}, "invalid_value", "n_cmpl"), ({"ignore_eos": 1}, "invalid_value", "ignore_eos"),
    ({"response_fields": [1]}, "invalid_value", "response_fields"),
])
def test_what_would_change_a_text_and_is_not_here_is_refused(server, fields, code, param):
    response = server.post("/completion", {"prompt": "x", "n_predict": 1} | fields)
    assert response.status_code == 400
    assert (response.json()["error"]["code"], response.json()["error"]["param"]) == (code, param)


def test_samplers_that_are_switched_off_are_fine(server, model):
    off = {"mirostat": 0, "mirostat_tau": 5, "typical_p": 1.0, "dry_multiplier": 0, "dry_base": 1.75,
           "xtc_probability": 0, "top_n_sigma": -1, "dynatemp_range": 0, "tfs_z": 1, "adaptive_target": -1,
           "lora": [], "t_max_predict_ms": 500, "id_slot": 0, "n_keep": 4}
    assert complete(server, **off)["content"] == text_of(model, "Once upon", 8, seed=3)


@pytest.mark.parametrize("path, body, names", [
    ("/v1/chat/completions", {"messages": HELLO}, ("max_completion_tokens", "max_tokens", "n_predict")),
    ("/v1/completions", {"prompt": "Once"}, ("max_tokens", "n_predict")),
])
def test_a_length_of_minus_one_is_what_the_context_has_room_for(server, path, body, names):
    for name in names:
        found = server.post(path, body | {name: -1, "ignore_eos": True}).json()
        assert found["usage"]["total_tokens"] == 601 and found["choices"][0]["finish_reason"] == "length"
        assert server.post(path,
                           body | {name: 3, "ignore_eos": True}).json()["usage"]["completion_tokens"] == 3


# ---- chats


def test_where_an_answer_begins(server):
    said = [*HELLO, {"role": "assistant", "content": "there was"}]
    render = lambda messages, **more: server.post("/apply-template",
                                                  {"messages": messages, **more}).json().get("prompt")
    assert render(HELLO).endswith("assistant\n")
    assert not render(HELLO, add_generation_prompt=False).endswith("assistant\n")
    begun = render(said)
    assert begun.endswith("there was")
    assert render(said, add_generation_prompt=False, continue_final_message=True) == begun
    assert render(said, continue_final_message=False).endswith("assistant\n")
    assert not render(said, continue_final_message=False, add_generation_prompt=False).endswith("assistant\n")
    both = {"messages": said, "add_generation_prompt": True, "continue_final_message": True}
    for path in ("/apply-template", "/v1/chat/completions"):
        assert server.post(path, both).json()["error"]["param"] == "continue_final_message"


def test_tokens_of_a_chat_are_counted(server):
    for path in ("/v1/chat/completions/input_tokens", "/chat/completions/input_tokens"):
        counted = server.post(path, {"messages": HELLO}).json()
        told = server.post("/v1/chat/completions",
                           {"messages": HELLO, "max_tokens": 0}).json()["usage"]["prompt_tokens"]
        assert counted == {"object": "response.input_tokens", "input_tokens": told}
    assert server.post("/v1/chat/completions/input_tokens", {}).status_code == 400


def test_a_prompt_that_is_too_long_is_told_in_numbers(server):
    for stream in (False, True):
        error = server.post("/completion", {"prompt": "a " * 2000, "stream": stream}).json()["error"]
        assert error["code"] == "context_length_exceeded" and error["n_ctx"] == 600 < error["n_prompt_tokens"]
        assert all(str(error[name]) in error["message"] for name in ("n_ctx", "n_prompt_tokens"))
        assert "exceeds the available context size" in error["message"]     # what litellm looks for


# ---- fill in the middle


FIM = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]


@pytest.fixture(scope="module", params=[[], ["<|repo_name|>", "<|file_sep|>"]], ids=["plain", "repository"])
def filling(request, tmp_path_factory):
    metadata, tensors = tiny.parts("llama", n_ctx=600)
    tokens = list(metadata["tokenizer.ggml.tokens"])
    kinds = list(metadata["tokenizer.ggml.token_type"])
    for i, name in enumerate([*FIM, *request.param]):
        tokens[200 + i], kinds[200 + i] = name, 3
    metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds,
                 "tokenizer.ggml.merges": ["a b"]}
    path = tiny.save(tmp_path_factory.mktemp("fim") / "fim.gguf", metadata, tensors)
    with pybmc.Model(path, threads=1) as model, served(model, sampling={"min_p": 0.0}) as server:
        yield server, model, bool(request.param)


def test_a_gap_is_filled_by_what_is_around_it_and_by_other_files(filling):
    server, model, repository = filling
    tokenizer, marks = model.tokenizer, fill_tokens(model.tokenizer)
    assert marks[:3] == (200, 201, 202) and (marks.repo is not None) == repository
    body = {"input_prefix": "int a", "input_suffix": "}", "prompt": "x = ", "n_predict": 4, "seed": 3,
            "cache_prompt": False}
    extra = [{"filename": "b.h", "text": "int b;"}, {"text": "int c;"}]
    plain = tokenizer.encode("int b;\nint c;\n", bos=False)
    names = [203, *tokenizer.encode("myproject\n", bos=False),
             204, *tokenizer.encode("b.h\nint b;\n", bos=False), 204,
             *tokenizer.encode("file\nint c;\n", bos=False), 204, *tokenizer.encode("filename\n", bos=False)]
    for more, begins in ((None, []), (extra, names if repository else plain)):
        ids = [tokenizer.bos_id, *begins, 200, *tokenizer.encode("int a", bos=False), 201,
               *tokenizer.encode("}", bos=False), 202, *tokenizer.encode("x = ", bos=False)]
        found = server.post("/infill", body | {"input_extra": more}).json()
        assert found["prompt"] == tokenizer.decode(ids, special=True)
        assert found["tokens_evaluated"] == len(ids)
        assert found["content"] == text_of(model, ids, 4, seed=3)


@pytest.mark.parametrize("extra", [[{}], [{"filename": "a"}], [{"filename": 1, "text": "x"}], [{"text": 1}],
                                   ["x"], {"text": "x"}])
def test_files_that_are_none_are_refused(filling, extra):
    response = filling[0].post("/infill", {"input_prefix": "a", "input_extra": extra})
    assert response.status_code == 400 and response.json()["error"]["param"].startswith("input_extra")


def test_what_an_editor_sends_is_taken(filling):
    body = {"id_slot": 0, "input_prefix": "int a", "input_suffix": "}",
            "input_extra": [], "prompt": "x", "n_predict": 3, "stop": [], "n_indent": 2, "top_k": 40,
            "top_p": 0.9, "samplers": ["top_k", "top_p", "infill"], "cache_prompt": True, "stream": False,
            "t_max_prompt_ms": 500, "t_max_predict_ms": 1000,
            "response_fields": ["content", "timings/prompt_n", "timings/predicted_per_second", "truncated",
                                "tokens_cached"]}
    assert set(filling[0].post("/infill", body).json()) == set(body["response_fields"])


# ---- embeddings, slots and counts


def test_embeddings_of_ids_and_by_other_norms(server, model):
    ids = model.tokenizer.encode("Once upon")
    rows = lambda **body: np.array([one["embedding"][0] for one in server.post("/embedding", body).json()])
    text = rows(content="Once upon")
    assert np.array_equal(rows(content=ids), text)
    assert np.array_equal(rows(content=[ids, {"prompt_string": "Once upon"}]), [text[0]] * 2)
    raw = rows(content="Once upon", embd_normalize=-1)
    assert np.allclose(raw, model.embed(["Once upon"], normalize=False), atol=1e-6)
    for norm, length in ((0, np.abs(raw).max() / 32760), (1, np.abs(raw).sum()), (2, np.sqrt((raw**2).sum())),
                         (3, (np.abs(raw)**3).sum()**(1 / 3))):
        assert np.allclose(rows(content="Once upon", embd_normalize=norm), raw / length, rtol=1e-5)
    for body in ({"content": [401]}, {"content": [1.5]}, {"content": {"text": "x"}},
                 {"content": "x", "embd_normalize": -2}, {"content": [[]]}):
        assert server.post("/embedding", body).status_code == 400, body


def test_there_are_no_adapters(server):
    assert server.client.get("/lora-adapters").json() == []
    assert server.post("/lora-adapters", []).json() == {"success": True}
    response = server.post("/lora-adapters", [{"id": 0, "scale": 0.5}])
    assert response.status_code == 400 and response.json()["error"]["code"] == "unsupported_parameter"


def test_slots_can_be_asked_for_a_free_one(server, monkeypatch):
    assert server.client.get("/slots?fail_on_no_slot=1").status_code == 200
    sequence = SimpleNamespace(reading=False, prompt=[1], stats=Stats(), since=0.0)
    monkeypatch.setattr(server.engine, "running", [sequence] * 8)
    monkeypatch.setattr(server.service.worker, "slots", [Slot(sequence)] * 8)
    response = server.client.get("/slots?fail_on_no_slot=1")
    assert response.status_code == 503 and "8 slots" in response.json()["error"]["message"]
    assert [slot["is_processing"] for slot in server.client.get("/slots").json()] == [True] * 8


def test_counts_under_llama_servers_names(model):
    with served(model) as server:
        first, second = (complete(server, "the sea and the ship and the sea and the ship",
                                  temperature=0)["timings"] for _ in range(2))
        server.post("/v1/embeddings", {"input": "Once upon"})
        response = server.client.get("/metrics")
    value = lambda name: float(re.search(rf"^llamacpp:{name} (\S+)$", response.text, re.MULTILINE)[1])
    n = len(model.tokenizer.encode("Once upon"))
    assert int(response.headers["process-start-time-unix"]) > 0
    assert value("prompt_tokens_total") == first["prompt_n"] + second["prompt_n"] + n
    assert value("prompt_tokens_cached_total") == second["cache_n"] > 0
    assert value("n_tokens_max") == first["prompt_n"] + 8
    assert value("n_decode_total") > 2 and 0 < value("n_busy_slots_per_decode") <= 1
    assert value("spec_decode_num_draft_tokens_total") == first["draft_n"] + second["draft_n"]
    assert (value("spec_decode_num_accepted_tokens_total") == first["draft_n_accepted"]
            + second["draft_n_accepted"])
    assert value("spec_decode_num_drafts_total") <= value("n_decode_total")
