"""Routes and fields of the server: what is honoured, what is refused and how, on the wires of OpenAI,
Ollama and llama-server."""

import json
import os
import re

import numpy as np
import numpy_sampling
import pytest
import tiny
import tiny_encoders
from serving import Gate, events, httpx, read_to, served, until

import pybmc
from pybmc.serve import http
from pybmc.serve.fields import parse
from pybmc.serve.service import Service

HELLO = [{"role": "user", "content": "Once upon a time"}]


def thoughtful(path):
    """A model whose chat template opens a thought, and refuses what is no user's or assistant's."""
    metadata, tensors = tiny.parts("llama", n_ctx=2000)
    metadata["tokenizer.chat_template"] = (
        "{% for m in messages %}{% if m.role == 'critic' %}{{ raise_exception('no critics here') }}"
        "{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if enable_thinking is not defined or enable_thinking %}{{ '<think>\n' }}{% endif %}{% endif %}")
    return tiny.save(path, metadata, tensors)


@pytest.fixture(scope="module")
def model():
    with pybmc.Model(tiny.model("llama", n_ctx=2000), threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def server(model):
    with served(model, names=["tiny", "other"], sampling={"min_p": 0.0}) as server:
        yield server


def text_of(model, prompt, n, **settings):
    return "".join(t.text for t in pybmc.generate(model, prompt, n, spec="off", **settings))


def chat(server, messages=HELLO, **fields):
    response = server.post("/v1/chat/completions",
                           {"messages": messages, "max_tokens": 8, "seed": 3, **fields})
    assert response.status_code == 200, response.text
    return response


# ---- chat


def test_a_chat_answer_is_what_the_library_writes(server, model):
    found = chat(server, max_tokens=20, temperature=0.7, seed=5).json()
    choice, = found["choices"]
    assert choice["message"] == {"role": "assistant", "refusal": None,
                                 "content": text_of(model, HELLO, 20, temperature=0.7, seed=5, min_p=0.0)}
    assert choice["finish_reason"] == "length" and choice["logprobs"] is None
    assert found["object"] == "chat.completion" and re.fullmatch("chatcmpl-[A-Za-z0-9]{24}", found["id"])
    assert found["model"] == "tiny" and re.fullmatch(r"b[\d.]+-[0-9a-f]{12}", found["system_fingerprint"])
    usage = found["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] == 20
    assert {"prompt_n", "predicted_n", "predicted_per_second", "draft_n_accepted"} <= set(found["timings"])


def test_a_stream_is_the_same_text_in_chunks_without_empty_keys(server):
    whole = chat(server, max_tokens=30).json()
    response = chat(server, max_tokens=30, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("data: [DONE]\n\n")
    assert response.headers["cache-control"] == "no-store" and response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-pybmc-seed"] == "3"
    *chunks, usage = events(response)
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 30
    assert all(c["usage"] is None for c in chunks)
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert all(delta["content"] for delta in deltas[1:-1])
    assert "".join(d.get("content", "") for d in deltas) == whole["choices"][0]["message"]["content"]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert "timings" in chunks[-1] and len({c["id"] for c in chunks}) == 1


def test_answer_i_samples_with_seed_plus_i(server, model):
    found = chat(server, n=3, seed=10, temperature=1.0).json()
    texts = [c["message"]["content"] for c in found["choices"]]
    assert texts == [text_of(model, HELLO, 8, seed=10 + i, temperature=1.0, min_p=0.0) for i in range(3)]
    assert len(set(texts)) == 3
    single = chat(server, n=1).json()["usage"]
    assert found["usage"]["prompt_tokens"] == single["prompt_tokens"]
    assert found["usage"]["completion_tokens"] == 24
    streamed = events(chat(server, n=3, seed=10, temperature=1.0, stream=True))
    merged = ["".join(e["choices"][0]["delta"].get("content", "") for e in streamed
                      if e["choices"][0]["index"] == i) for i in range(3)]
    assert merged == texts


def test_a_seed_that_is_not_given_is_told(server):
    first, second = (server.post("/v1/chat/completions", {"messages": HELLO, "max_tokens": 12})
                     for _ in range(2))
    seed = first.headers["x-pybmc-seed"]
    assert seed != second.headers["x-pybmc-seed"]
    again = chat(server, max_tokens=12, seed=int(seed)).json()
    assert again["choices"][0]["message"] == first.json()["choices"][0]["message"]


def test_stop_strings_end_an_answer(server, model):
    text = text_of(model, HELLO, 40, seed=3, temperature=0.8, min_p=0.0)
    stop = text[10:14]
    for stream in (False, True):
        response = chat(server, max_tokens=40, stop=[stop, "zzz"], stream=stream)
        if stream:
            found = events(response)
            shown, why = ("".join(e["choices"][0]["delta"].get("content", "") for e in found),
                          found[-1]["choices"][0]["finish_reason"])
        else:
            choice, = response.json()["choices"]
            shown, why = choice["message"]["content"], choice["finish_reason"]
        assert (shown, why) == (text[:text.index(stop)], "stop")


def test_log_probabilities_of_a_chat(server, model):
    found = chat(server, logprobs=True, top_logprobs=3, temperature=0).json()["choices"][0]
    ids = model.tokenizer.encode
    streamed = events(chat(server, logprobs=True, top_logprobs=3, temperature=0, stream=True))
    entries = [entry for e in streamed
               for entry in (e["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert entries == found["logprobs"]["content"] and len(entries) == 8
    assert (bytes(sum((e["bytes"] for e in entries), [])).decode("utf-8", "replace")
            == found["message"]["content"])
    for entry in entries:
        assert len(entry["top_logprobs"]) == 3 and entry["top_logprobs"][0]["logprob"] == entry["logprob"]
        assert ids
        assert entry["token"].startswith("bytes:\\x") or entry["token"].encode() == bytes(entry["bytes"])


def test_a_last_message_of_the_assistant_is_continued(server, model):
    messages = [*HELLO, {"role": "assistant", "content": "there was"}]
    template = pybmc.chat.ChatTemplate(None, model.tokenizer)
    for more, ids in (({}, template.encode(messages)),
                      ({"continue_final_message": False},
                       template.encode(messages, continue_final_message=False))):
        content = chat(server, messages, **more).json()["choices"][0]["message"]["content"]
        assert content == text_of(model, ids, 8, seed=3, temperature=0.8, min_p=0.0)


def test_contents_may_be_parts_and_developers_are_the_system(server):
    plain = chat(server,
                 [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "ab"}]).json()
    parts = chat(server, [{"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
                          {"role": "user",
                           "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]).json()
    assert plain["choices"] == parts["choices"]


def test_what_is_null_is_absent(server):
    nothing = dict.fromkeys(("tools", "stop", "n", "logit_bias", "response_format", "user",
                             "stream", "top_p"))
    assert chat(server, **nothing).json()["choices"] == chat(server).json()["choices"]
    empty = {"tools": [], "stop": [], "response_format": {"type": "text"}, "tool_choice": "auto",
             "metadata": {"a": "b"}, "store": False, "frequency_penalty": 0, "keep_alive": 5,
             "never_heard_of": 1}
    assert chat(server, **empty).json()["choices"] == chat(server).json()["choices"]


def test_max_tokens_of_0_only_reads(server):
    for stream in (False, True):
        response = chat(server, max_tokens=0, stream=stream)
        choice = events(response)[-1]["choices"][0] if stream else response.json()["choices"][0]
        assert choice["finish_reason"] == "length"


def test_answers_end_where_the_context_does(server):
    found = chat(server, [{"role": "user", "content": "a " * 960}], max_tokens=None, temperature=0).json()
    assert found["usage"]["total_tokens"] == 2001 and found["choices"][0]["finish_reason"] == "length"


def test_logit_bias_takes_ids_and_texts(server, model):
    id = model.tokenizer.encode(" the", bos=False)
    for bias in ({str(id[0]): 100}, {" the": 100}, [[" the", 100]], [[id[0], 100]]):
        assert chat(server, logit_bias=bias).json()["choices"][0]["message"]["content"] == " the" * 8
    assert " the" not in chat(server, logit_bias=[[" the", False]]).json()["choices"][0]["message"]["content"]


def test_pieces_tell_who_guessed(model):
    with served(model, names=["tiny"], draft_max=8) as server:
        found = events(chat(server, [{"role": "user", "content": "a b c d " * 20}], temperature=0,
                            stream=True, max_tokens=60, timings_per_token=True))
    pieces = [piece for e in found for piece in e.get("pybmc", {}).get("pieces", [])]
    assert ("".join(p["text"] for p in pieces)
            == "".join(e["choices"][0]["delta"].get("content", "") for e in found))
    assert {p["by"] for p in pieces} <= {None, "ngram"}
    assert all("timings" in e for e in found if "pybmc" in e)


def test_a_prediction_changes_the_time_and_not_the_text(model):
    with served(model, names=["tiny"]) as server:
        server.engine.speculation.fixed = 4         # so that guesses are made whatever they cost
        plain = chat(server, temperature=0, max_tokens=60, spec="off").json()
        text = plain["choices"][0]["message"]["content"]
        for content in (text, [{"type": "text", "text": text}], "something else"):
            found = chat(server, temperature=0, max_tokens=60,
                         prediction={"type": "content", "content": content}).json()
            assert found["choices"] == plain["choices"]
            details = found["usage"]["completion_tokens_details"]
            assert (details["accepted_prediction_tokens"] + details["rejected_prediction_tokens"] > 0
                    or content == "something else")
        assert "accepted_prediction_tokens" not in plain["usage"]["completion_tokens_details"]
        assert server.post("/v1/chat/completions",
                           {"messages": HELLO, "prediction": {"type": "other"}}).status_code == 400


def test_progress_of_a_prompt_is_told(model):
    with served(model, names=["tiny"]) as server:
        server.engine._prompt_rate = 1e-9
        found = events(chat(server, [{"role": "user", "content": "a " * 400}], stream=True,
                            return_progress=True))
    told = [e["prompt_progress"] for e in found if "prompt_progress" in e]
    assert len(told) > 1 and told[-1]["processed"] == told[-1]["total"] > 400
    assert [t["processed"] for t in told] == sorted(t["processed"] for t in told)


# ---- thoughts


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    with pybmc.Model(thoughtful(tmp_path_factory.mktemp("t") / "thinker.gguf"), threads=1) as model, \
            served(model, names=["thinker"]) as server:
        yield server


def end_of_thought(server, n):
    """A bias that makes the model write </think> again and again."""
    ids = server.service.tokenizer.encode("</think>", bos=False)
    return {str(id): 30 for id in ids}


def test_thoughts_are_told_apart(thinker):
    found = chat(thinker).json()["choices"][0]["message"]
    assert found["content"] == "" and found["reasoning_content"]
    plain = chat(thinker, reasoning_format="none").json()["choices"][0]["message"]
    assert plain["content"].strip() == found["reasoning_content"].strip() and "reasoning_content" not in plain
    off = chat(thinker, chat_template_kwargs={"enable_thinking": False}).json()["choices"][0]["message"]
    assert off == chat(thinker, reasoning_effort="none").json()["choices"][0]["message"]
    assert off["content"] and "reasoning_content" not in off
    streamed = events(chat(thinker, stream=True))
    assert ("".join(e["choices"][0]["delta"].get("reasoning_content", "") for e in streamed)
            == found["reasoning_content"])
    lines = thinker.post("/api/chat", {"model": "thinker", "messages": HELLO,
                                       "options": {"seed": 3, "num_predict": 8}}).text.splitlines()
    assert ("".join(json.loads(line)["message"].get("thinking", "") for line in lines)
            == found["reasoning_content"])
    assert thinker.service.capabilities == ["completion", "thinking"]


@pytest.mark.parametrize("pieces",
                         [["<think>", "\nhm ", "so\n</th", "ink>\n\nYes"],
                          list("<think>\nhm so\n</think>\n\nYes"), ["<think>\nhm so\n</think>\n\nYes"]])
@pytest.mark.parametrize("inside", [False, True])
def test_split_leaves_tags_and_space_out(pieces, inside):
    from pybmc.chat.events import Content, Thought
    from pybmc.chat.reader import Split

    split = Split(inside)
    if inside:
        pieces = ["\n", "hm so", "\n</think>", "\n\nYes"]
    found = [piece for text in pieces for piece in split.push(text)] + split.flush()
    assert "".join(event.text for event in found if isinstance(event, Thought)) == "hm so"
    assert "".join(event.text for event in found if isinstance(event, Content)) == "Yes"


def test_what_a_template_refuses_is_told_in_its_words(thinker):
    response = thinker.post("/v1/chat/completions", {"messages": [{"role": "critic", "content": "x"}]})
    assert response.status_code == 400 and response.json()["error"]["code"] == "template_error"
    assert "no critics here" in response.json()["error"]["message"]


# ---- completions


def completion(server, **fields):
    response = server.post("/v1/completions", {"prompt": "Once upon", "seed": 3, **fields})
    assert response.status_code == 200, response.text
    return response


def test_completions_take_texts_and_ids(server, model):
    ids = model.tokenizer.encode("Once upon", special=True)
    expected = text_of(model, "Once upon", 16, seed=3, temperature=0.8, min_p=0.0)
    assert completion(server).json()["choices"][0]["text"] == expected
    found = completion(server, prompt=["Once upon", "the sea"], n=2).json()["choices"]
    assert [c["index"] for c in found] == [0, 1, 2, 3] and found[0]["text"] == expected
    assert found[2]["text"] == text_of(model, "the sea", 16, seed=3, temperature=0.8, min_p=0.0)
    assert found[3]["text"] == text_of(model, "the sea", 16, seed=4, temperature=0.8, min_p=0.0)
    assert completion(server, prompt=[ids, ids]).json()["choices"][1]["text"] == expected
    assert completion(server, prompt=ids).json()["choices"][0]["text"] == expected


@pytest.mark.parametrize("n_top", [0, 1, 4])
@pytest.mark.parametrize("most", [0, 1, 5])
def test_echo_with_logprobs_gives_the_prompts(server, model, n_top, most):
    prompt = "Once upon a time there was"
    found = completion(server, prompt=prompt, echo=True, logprobs=n_top, max_tokens=most,
                       temperature=0).json()["choices"][0]
    told, ids = found["logprobs"], model.tokenizer.encode(prompt)
    with model.session() as session:
        logprobs = np.array([numpy_sampling.logprobs(row) for row in session.eval(ids, "all")])
    assert found["text"].startswith(prompt)
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    assert told["text_offset"][:2] == [0, 0]
    assert len({len(values) for values in told.values()}) == 1 and len(told["tokens"]) == len(ids) + most
    for i, id in enumerate(ids[1:], 1):
        assert told["token_logprobs"][i] == pytest.approx(logprobs[i - 1][id], abs=1e-4)
        top = told["top_logprobs"][i]
        assert len(top) <= n_top + 1 and told["token_logprobs"][i] in top.values() or not n_top
        greedy = logprobs[i - 1].argmax() == id
        # how lm-eval looks for it
        assert not n_top or (told["token_logprobs"][i] == max(top.values())) == greedy
    assert "".join(told["tokens"][1:len(ids)]) == prompt
    assert ([prompt.find(t, at) for t, at in zip(told["tokens"][1:len(ids)], told["text_offset"][1:])]
            == told["text_offset"][1:len(ids)])
    streamed = events(completion(server, prompt=prompt, echo=True, logprobs=n_top, max_tokens=most,
                                 temperature=0, stream=True))
    merged = {name: sum((e["choices"][0]["logprobs"][name] for e in streamed), []) for name in told}
    assert merged == told and "".join(e["choices"][0]["text"] for e in streamed) == found["text"]


def test_echo_without_logprobs(server):
    found = completion(server, echo=True).json()["choices"][0]
    assert found["text"] == "Once upon" + completion(server).json()["choices"][0]["text"]
    assert found["logprobs"] is None
    streamed = events(completion(server, echo=True, stream=True))
    assert "".join(e["choices"][0]["text"] for e in streamed) == found["text"]


def test_a_suffix_needs_fill_in_tokens(server, tmp_path):
    metadata, tensors = tiny.parts("llama", n_ctx=200)
    names = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
    for id, name in zip((300, 301, 302), names):
        metadata["tokenizer.ggml.tokens"][id] = name
    merges = metadata["tokenizer.ggml.merges"]
    known = set(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.merges"] = [m for m in merges if m.replace(" ", "") in known]
    path = tiny.save(tmp_path / "filler.gguf", metadata, tensors)
    with pybmc.Model(path, threads=1) as model, served(model) as filler:
        ids = ([model.tokenizer.bos_id] * model.tokenizer.add_bos
               + [300, *model.tokenizer.encode("ab", bos=False), 301,
                   *model.tokenizer.encode("yz", bos=False), 302])
        expected = text_of(model, ids, 6, seed=1, temperature=0.8)
        assert completion(filler, prompt="ab", suffix="yz", max_tokens=6,
                          seed=1).json()["choices"][0]["text"] == expected
        body = {"input_prefix": "ab", "input_suffix": "yz", "n_predict": 6, "seed": 1}
        assert filler.post("/infill", body).json()["content"] == expected
        body = {"model": "filler", "prompt": "ab", "suffix": "yz", "stream": False,
                "options": {"num_predict": 6, "seed": 1}}
        assert filler.post("/api/generate", body).json()["response"] == expected
        assert "insert" in filler.post("/api/show", {"model": "filler"}).json()["capabilities"]
    assert server.post("/infill", {"input_suffix": "yz"}).status_code == 400


# ---- embeddings


def test_embeddings_are_the_models(model):
    with served(model) as server:
        texts = ["one", "one and two"]
        found = server.post("/v1/embeddings", {"input": texts, "model": "x"}).json()
        rows = np.array([entry["embedding"] for entry in found["data"]])
        assert np.allclose(rows, model.embed(texts), atol=1e-6) and found["usage"]["prompt_tokens"] > 4
        coded = server.post("/v1/embeddings",
                            {"input": texts, "encoding_format": "base64", "dimensions": 2}).json()
        import base64
        short = np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), "<f4")
        assert np.allclose(short, rows[0, :2] / np.linalg.norm(rows[0, :2]), atol=1e-6)
        told = server.post("/v1/embeddings", {"input": [[1, 2, 3]]}).json()["error"]["message"]
        assert "check_embedding_ctx_length=False" in told
        long = server.post("/v1/embeddings", {"input": ["x " * 3000]}).json()["error"]
        assert long["code"] == "context_length_exceeded" and "6001" in long["message"]
        assert "2000" in long["message"]
        ollama = server.post("/api/embed", {"model": server.service.name, "input": texts}).json()
        assert np.allclose(ollama["embeddings"], rows, atol=1e-6)
        one = server.post("/api/embeddings", {"model": server.service.name, "prompt": "one"}).json()
        assert np.allclose(one["embedding"], rows[0], atol=1e-6)
        cut = server.post("/api/embed",
                          {"model": server.service.name, "input": "x " * 3000, "truncate": True})
        assert cut.status_code == 200
        native = server.post("/embedding", {"content": texts}).json()
        assert np.allclose([entry["embedding"][0] for entry in native], rows, atol=1e-6)


@pytest.fixture(scope="module")
def encoder():
    with pybmc.Model(tiny_encoders.model("bert", n_ctx=512), threads=1) as model:
        yield model


def test_an_encoder_is_served_alone(encoder):
    with served(encoder) as server:
        texts = ["the mouse", "a mill"]
        found = server.post("/v1/embeddings", {"input": texts}).json()
        assert np.allclose([entry["embedding"] for entry in found["data"]], encoder.embed(texts), atol=1e-6)
        assert server.service.capabilities == ["embedding"]
        assert server.client.get("/v1/models").status_code == 200
        name = server.service.name
        for path, body in (("/v1/chat/completions", {"messages": HELLO}),
                           ("/v1/completions", {"prompt": "a"}),
                           ("/api/chat", {"model": name, "messages": HELLO}),
                           ("/api/generate", {"model": name, "prompt": "a"}),
                           ("/completion", {"prompt": "a"}), ("/infill", {}),
                           ("/apply-template", {"messages": HELLO})):
            response = server.post(path, body)
            assert response.status_code == 400 and "is an encoder: it writes no text" in response.text
        for path in ("/props", "/slots", "/metrics", "/tokenizer_info", "/api/tags"):
            assert server.client.get(path).status_code == 200
        assert server.post("/tokenize", {"content": "the mill"}).json()["tokens"]


def test_long_texts_of_an_encoder_are_refused_or_cut(encoder):
    with served(encoder, names=["e"]) as server:
        response = server.post("/v1/embeddings", {"input": ["a", "a" * 600]})
        assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"
        assert "text 2 of 2 has 602 tokens, the model takes up to 512" in response.text
        rows = server.post("/api/embed",
                           {"model": "e", "input": "a" * 600, "truncate": True}).json()["embeddings"]
        assert np.allclose(rows, encoder.embed("a" * 510), atol=1e-6)          # with [CLS] and [SEP]


def test_the_pooling_of_a_server(encoder):
    with served(encoder, pooling="first") as server:
        rows = [entry["embedding"]
                for entry in server.post("/v1/embeddings", {"input": "the mill"}).json()["data"]]
        assert np.allclose(rows, encoder.embed("the mill", pooling="first"), atol=1e-6)
        assert not np.allclose(rows, encoder.embed("the mill"), atol=1e-3)
    with served(encoder, pooling="rank") as server:
        response = server.post("/v1/embeddings", {"input": "the mill"})
        assert response.status_code == 400 and "is a reranker" in response.text
        assert server.client.get("/api/tags").json()["models"][0]["capabilities"] == []
    with served(encoder, pooling="none") as server:
        one, = server.post("/embedding", {"content": "the mill"}).json()
        rows, = encoder.embed("the mill", normalize=False, pooling="none")
        assert np.allclose(one["embedding"], rows, atol=1e-5)
        assert len(rows) == len(encoder.tokenizer.encode("the mill"))
        unit = server.post("/embedding", {"content": "the mill", "embd_normalize": 2}).json()[0]["embedding"]
        assert np.allclose(np.square(unit).sum(axis=1), 1)
        for path in ("/v1/embeddings", "/api/embed"):
            response = server.post(path, {"input": "the mill", "model": server.service.name})
            assert response.status_code == 400 and "/embedding gives these" in response.text


def test_inputs_of_embeddings_may_be_objects(encoder):
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "mill"}]
    with served(encoder) as server:
        for path, name in (("/v1/embeddings", "input"), ("/embedding", "content")):
            same = ["the mill", {"prompt_string": "the mill"}, {"content": parts}]
            found = server.post(path, {name: same}).json()
            found = found["data"] if isinstance(found, dict) else found
            assert len(found) == 3 and found[0]["embedding"] == found[1]["embedding"] == found[2]["embedding"]
            assert server.post(path, {name: same[2]}).status_code == 200
            for wrong in ({"content": "the mill"},
                          {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, {"content": [3]},
                          {"prompt_string": 3}, {}):
                response = server.post(path, {name: ["a", wrong]})
                assert response.status_code == 400, (path, wrong, response.text)


# ---- scores


SCORES = ["the mill", "a mouse", "the mouse lives", ""]


@pytest.fixture(scope="module")
def reranker(tmp_path_factory):
    metadata, tensors = tiny_encoders.parts("bert", pooling=4)
    score = np.random.default_rng(1).standard_normal((1, 64)).astype(np.float32)
    path = tiny.save(tmp_path_factory.mktemp("rank") / "ranker.gguf", metadata,
                     tensors | {"cls.output.weight": ("F32", score.view(np.uint8))})
    with pybmc.Model(path, threads=1) as model, served(model) as server:
        yield server


def test_documents_are_scored_for_a_query(reranker):
    model, query = reranker.service.model, "where is the mouse?"
    encode = model.tokenizer.encode
    ids = [[*encode(query), *encode(text)[1:]] for text in SCORES]
    wanted = model.embed(ids)[:, 0]
    order = np.argsort(-wanted).tolist()
    for path in ("/rerank", "/v1/rerank", "/reranking", "/v1/reranking"):
        found = reranker.post(path, {"query": query, "documents": SCORES}).json()
        assert [one["index"] for one in found["results"]] == order and found["object"] == "list"
        assert found["model"] == "ranker"
        assert np.allclose([one["relevance_score"] for one in found["results"]], wanted[order], atol=1e-6)
        assert found["usage"] == {"prompt_tokens": sum(map(len, ids)), "total_tokens": sum(map(len, ids))}
    objects = [{"text": text} for text in SCORES]
    found = reranker.post("/rerank", {"query": query, "documents": objects, "top_n": 2,
                                      "return_documents": True}).json()["results"]
    assert [one["document"]["text"] for one in found] == [SCORES[i] for i in order[:2]]
    found = reranker.post("/rerank",
                          {"query": query, "texts": SCORES, "top_n": 99, "return_text": True}).json()
    assert [(one["index"], one["text"]) for one in found] == [(i, SCORES[i]) for i in order]
    assert np.allclose([one["score"] for one in found], wanted[order], atol=1e-6)
    assert set(found[0]) == {"index", "score", "text"}


@pytest.mark.parametrize("fields, param", [
    ({"documents": []}, "documents"), ({"documents": None}, "documents"), ({"documents": 123}, "documents"),
    ({"documents": [1, 2]}, "documents"), ({"documents": [{"title": "a"}]}, "documents"),
    ({"query": None}, "query"), ({"query": 3}, "query"), ({"top_n": 0}, "top_n"),
    ({"documents": ["a"] * 2049}, "documents"), ({"return_documents": "x"}, "return_documents"),
    ({"documents": None, "texts": "a"}, "texts"),
])
def test_what_cannot_be_scored_is_refused(reranker, fields, param):
    response = reranker.post("/rerank", {"query": "a", "documents": ["b"]} | fields)
    assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text


def test_only_rerankers_score(reranker, server):
    response = server.post("/rerank", {"query": "a", "documents": ["b"]})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "unsupported_model")
    response = reranker.post("/rerank", {"query": "a" * 300, "documents": ["b", "c" * 2000]})
    assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"


def test_a_draft_model_of_an_encoder_is_refused(encoder, model):
    with pytest.raises(pybmc.ArgumentError, match="writes no text"):
        Service(encoder, model)


# ---- models and names


def test_models_are_listed(server):
    found = server.client.get("/v1/models").json()
    assert [m["id"] for m in found["data"]] == ["tiny", "other"] and found["data"][0]["owned_by"] == "pybmc"
    assert server.client.get("/v1/models/other").json()["id"] == "other"
    assert server.client.get("/v1/models/none").json()["error"]["code"] == "model_not_found"
    assert chat(server, model="gpt-4o").json()["model"] == "tiny"


def test_a_strict_server_knows_its_models_alone(model):
    with served(model, names=["tiny"], strict_model=True) as server:
        response = server.post("/v1/chat/completions",
                               {"messages": HELLO, "model": "gpt-4o", "max_tokens": 1})
        assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"
        assert chat(server, model="tiny").status_code == 200


@pytest.mark.parametrize("path", ["/chat/completions", "/v1/chat/completions/", "/v1/chat/completions"])
def test_paths_without_v1_and_with_a_slash(server, path):
    assert server.post(path, {"messages": HELLO, "max_tokens": 1}).status_code == 200


def test_head_is_where_get_is(server):
    for path in ("/health", "/v1/models", "/", "/props"):
        response = server.client.head(path)
        assert response.status_code == 200 and not response.content


# ---- Ollama


def lines(response):
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


DURATIONS = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration", "prompt_eval_count",
             "eval_count")


def test_ollama_chat_streams_lines(server, model):
    body = {"model": "tiny:latest", "messages": HELLO,
            "options": {"seed": 3, "num_predict": 8, "num_ctx": 7, "stop": ["zzz"]}}
    *found, last = lines(server.post("/api/chat", body))
    text = text_of(model, HELLO, 8, seed=3, temperature=0.8, min_p=0.0)
    assert "".join(line["message"]["content"] for line in found) == text
    assert not any(line["done"] for line in found)
    assert last["done"] and last["done_reason"] == "length" and all(last[name] > 0 for name in DURATIONS)
    assert all(line["model"] == "tiny:latest" and line["created_at"].endswith("Z") for line in [*found, last])
    whole = server.post("/api/chat", body | {"stream": False}).json()
    assert whole["message"]["content"] == text and whole["done"]
    assert all(whole[name] > 0 for name in DURATIONS)


def test_ollama_generate_goes_on_from_its_context(server, model):
    body = {"model": "tiny", "prompt": "Once", "stream": False, "options": {"seed": 3, "num_predict": 5}}
    raw = server.post("/api/generate", body | {"raw": True}).json()
    assert raw["response"] == text_of(model, "Once", 5, seed=3, temperature=0.8, min_p=0.0)
    found = server.post("/api/generate", body | {"system": "Be brief."}).json()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Once"}]
    assert found["response"] == text_of(model, messages, 5, seed=3, temperature=0.8, min_p=0.0)
    again = server.post("/api/generate", body | {"context": found["context"], "prompt": "more"}).json()
    assert again["context"][:len(found["context"])] == found["context"]
    assert again["prompt_eval_count"] > len(found["context"])


def test_ollama_loads_without_messages(server):
    assert server.post("/api/chat", {"model": "tiny"}).json()["done_reason"] == "load"
    assert server.post("/api/generate", {"model": "tiny", "keep_alive": 0}).json()["done_reason"] == "load"


@pytest.mark.parametrize("stop, why", [(["a"] * 17, "has 17 texts"),
                                       (["a" * 257], "has a text of 257 characters")])
def test_an_option_that_is_refused_is_named_with_its_place(server, stop, why):
    response = server.post("/api/chat", {"model": "tiny", "messages": HELLO, "options": {"stop": stop}})
    assert response.status_code == 400
    assert response.json()["error"].startswith(f"options.stop {why}; expected at most")


def test_ollama_tells_logprobs(server):
    body = {"model": "tiny", "messages": HELLO, "logprobs": True, "top_logprobs": 2,
            "options": {"num_predict": 4, "temperature": 0}}
    found = [entry for line in lines(server.post("/api/chat", body)) for entry in line.get("logprobs", [])]
    assert found == server.post("/api/chat", body | {"stream": False}).json()["logprobs"]
    assert len(found) == 4 and all(len(entry["top_logprobs"]) == 2 for entry in found)


def test_ollama_knows_its_models_alone(server):
    response = server.post("/api/chat", {"model": "gpt-4o", "messages": HELLO})
    assert response.status_code == 404 and "not found" in response.json()["error"]
    assert list(response.json()) == ["error"]
    tags = server.client.get("/api/tags").json()["models"]
    assert [m["name"] for m in tags] == ["tiny:latest", "other:latest"]
    assert re.fullmatch("[0-9a-f]{64}", tags[0]["digest"])
    assert server.client.get("/api/ps").json()["models"][0]["context_length"] == 2000
    assert re.fullmatch(r"\d+\.\d+\.\d+", server.client.get("/api/version").json()["version"])


def test_ollama_shows_a_model(server):
    found = server.post("/api/show", {"name": "tiny"}).json()
    assert found["model_info"]["llama.context_length"] == 2000 and found["details"]["family"] == "llama"
    assert "tokenizer.ggml.tokens" not in found["model_info"] and found["capabilities"] == ["completion"]
    verbose = server.post("/api/show", {"model": "tiny", "verbose": True}).json()["model_info"]
    assert len(verbose["tokenizer.ggml.tokens"]) == 401
    assert all(value is not None for value in verbose.values())


@pytest.mark.parametrize("name", ["create", "copy", "delete", "push"])
def test_ollama_routes_that_change_models_are_disabled(server, name):
    response = server.client.request("DELETE" if name == "delete" else "POST", f"/api/{name}",
                                     json={"model": "x"})
    assert response.status_code == 403 and "disabled" in response.json()["error"]


# ---- llama-server's


def test_native_completion(server, model):
    body = {"prompt": "Once upon", "n_predict": 10, "seed": 3, "return_tokens": True, "n_probs": 2}
    found = server.post("/completion", body).json()
    assert found["content"] == text_of(model, "Once upon", 10, seed=3, temperature=0.8, min_p=0.0)
    assert len(found["tokens"]) == 10 and found["stop_type"] == "limit" and found["truncated"] is False
    assert [len(p["top_logprobs"]) for p in found["completion_probabilities"]] == [2] * 10
    assert found["generation_settings"]["seed"] == 3
    assert found["tokens_evaluated"] == found["timings"]["prompt_n"] + found["timings"]["cache_n"]
    *chunks, last = events(server.post("/completion", body | {"stream": True}))
    assert "".join(c["content"] for c in chunks) == found["content"] and last["stop"]
    assert not any(c["stop"] for c in chunks)
    assert sum((c["tokens"] for c in chunks), []) == found["tokens"]
    stopped = server.post("/completion", body | {"stop": [found["content"][4:7]]}).json()
    assert stopped["stop_type"] == "word" and stopped["stopping_word"] == found["content"][4:7]
    assert server.post("/completion",
                       body | {"response_fields": ["content"]}).json() == {"content": found["content"]}
    both = server.post("/completions", body | {"prompt": ["Once upon", "the sea"]}).json()
    assert both[0]["content"] == found["content"] and len(both) == 2


def test_tokens_and_texts(server, model):
    text = "Once <|im_end|> é"
    ids = server.post("/tokenize", {"content": text}).json()["tokens"]
    assert ids == model.tokenizer.encode(text, bos=False, special=True)
    pieces = server.post("/tokenize",
                         {"content": text, "with_pieces": True, "parse_special": False}).json()["tokens"]
    assert b"".join(bytes(p["piece"]) if isinstance(p["piece"], list) else p["piece"].encode()
                    for p in pieces) == text.encode()
    assert server.post("/detokenize", {"tokens": ids}).json() == {"content": text, "prompt": text}
    remote = server.post("/tokenize", {"prompt": text, "add_special_tokens": True}).json()
    assert remote == {"tokens": model.tokenizer.encode(text, special=True), "count": len(remote["tokens"]),
                      "max_model_len": 2000}
    info = server.client.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|endoftext|>" and "im_start" in info["chat_template"]
    template = server.post("/apply-template", {"messages": HELLO}).json()["prompt"]
    assert template == pybmc.chat.ChatTemplate(None, model.tokenizer).render(HELLO)


def test_the_server_describes_itself(server):
    assert server.client.get("/health").json() == {"status": "ok"} == server.client.get("/v1/health").json()
    props = server.client.get("/props").json()
    assert props["total_slots"] == 8 and props["default_generation_settings"]["n_ctx"] == 2000
    assert "/" not in props["model_path"]
    assert len(server.client.get("/slots").json()) == 8
    assert server.client.get("/").text == "pybmc is running"


def test_metrics_count(model):
    with served(model, names=["tiny"]) as server:
        for _ in range(2):
            chat(server, max_tokens=6)
        server.client.get("/nowhere")
        text = server.client.get("/metrics").text
    value = lambda name: float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])
    assert value('pybmc_requests_total{route="/v1/chat/completions",status="200"}') == 2
    assert value('pybmc_requests_total{route="other",status="404"}') == 1
    assert value("pybmc_written_tokens_total") == 12 == value("llamacpp:tokens_predicted_total")
    assert value('pybmc_prompt_tokens_total{how="cached"}') > 0
    assert value("pybmc_first_token_seconds_count") == 2
    assert value("pybmc_running") == 0 and value("pybmc_steps_total") > 0


# ---- what is refused


@pytest.mark.parametrize("fields, code, param", [
    ({"temperature": -1}, "invalid_value", "temperature"),
    ({"temperature": 101}, "invalid_value", "temperature"),
    ({"temperature": "hot"}, "invalid_value", "temperature"), ({"top_p": 2}, "invalid_value", "top_p"),
    ({"n": 0}, "invalid_value", "n"), ({"n": 17}, "invalid_value", "n"), ({"n": True}, "invalid_value", "n"),
    ({"max_tokens": -2}, "invalid_value", "max_tokens"), ({"stop": [""]}, "invalid_value", "stop"),
    ({"stop": ["a"] * 17}, "invalid_value", "stop"),
    ({"seed": 1.5}, "invalid_value", "seed"), ({"stream": "yes"}, "invalid_value", "stream"),
    ({"logit_bias": {"5000": 1}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {"5": 101}}, "invalid_value", "logit_bias"),
    ({"logit_bias": 5}, "invalid_value", "logit_bias"),
    ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
    ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
    ({"stream_options": {"include_usage": 1}}, "invalid_value", "stream_options.include_usage"),
    ({"messages": []}, "invalid_value", "messages"), ({"messages": None}, "invalid_value", "messages"),
    ({"messages": HELLO * 4097}, "invalid_value", "messages"),
    ({"messages": "hi"}, "invalid_value", "messages"), ({"messages": ["hi"]}, "invalid_value", "messages[0]"),
    ({"messages": [{"content": "x"}]}, "invalid_value", "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "invalid_value", "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "unsupported_parameter", "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": "x", "images": ["abc"]}]}, "unsupported_parameter",
     "messages[0].images"),
    ({"chat_template_kwargs": {"messages": 1}}, "invalid_value", "chat_template_kwargs"),
    ({"tools": [{"type": "function"}]}, "invalid_value", "tools"),
    ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
    ({"response_format": {"type": "yaml"}}, "invalid_value", "response_format"),
    ({"response_format": "json"}, "invalid_value", "response_format"),
    ({"grammar": 5}, "invalid_value", "grammar"), ({"json_schema": [1]}, "invalid_value", "json_schema"),
    ({"modalities": ["text", "audio"]}, "unsupported_parameter", "modalities"),
    ({"modalities": [{"type": "text"}]}, "unsupported_parameter", "modalities"),
    ({"audio": {"voice": "x"}}, "unsupported_parameter", "audio"),
    ({"functions": 5}, "invalid_value", "functions"),
    ({"messages": [{"role": "tool", "tool_call_id": ["a"], "content": "x"}]}, "invalid_value",
     "messages[0].tool_call_id"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": {}, "function": {"name": "f"}}]}]},
     "invalid_value", "messages[0].tool_calls[0].id"),
    ({"json_schema": {"type": "integer", "minimum": -2 ** 63, "maximum": -2 ** 63}},
     "unsupported_schema", "json_schema"),
    ({"web_search_options": {"x": 1}}, "unsupported_parameter", "web_search_options"),
    ({"session": "a"}, "unsupported_parameter", "session"),
    ({"best_of": 2}, "unsupported_parameter", "best_of"),
    ({"draft_max": 3}, "unsupported_parameter", "draft_max"),
    ({"spec": "draft"}, "invalid_value", "spec"), ({"repeat_penalty": 0}, "invalid_value", "repeat_penalty"),
    ({"presence_penalty": 1e39}, "invalid_value", "presence_penalty"),
    ({"repeat_penalty": 1e-50}, "invalid_value", "repeat_penalty"),
    ({"seed": 10 ** 30}, "invalid_value", "seed"), ({"stop": "a" * 257}, "invalid_value", "stop"),
    ({"min_p": -1}, "invalid_value", "min_p"),
    ({"top_k": 1.5}, "invalid_value", "top_k"),
    ({"messages": [{"role": "user", "content": "a " * 3000}]}, "context_length_exceeded", None),
], ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None)
def test_fields_that_cannot_be_honoured_are_refused_by_name(server, fields, code, param):
    response = server.post("/v1/chat/completions", {"messages": HELLO, "max_tokens": 2} | fields)
    error = response.json()["error"]
    counts = {"n_prompt_tokens", "n_ctx"} if code == "context_length_exceeded" else set()
    assert response.status_code == 400 and set(error) == {"message", "type", "param", "code"} | counts
    assert (error["code"], error["param"], error["type"]) == (code, param, "invalid_request_error")
    assert error["message"]


@pytest.mark.parametrize("fields, param", [
    ({"prompt": None}, "prompt"), ({"prompt": 5}, "prompt"), ({"prompt": []}, "prompt"),
    ({"prompt": [401]}, "prompt"), ({"prompt": [1.5]}, "prompt"), ({"prompt": ["a"] * 65}, "prompt"),
    ({"prompt": ["a"] * 5, "n": 16}, "n"), ({"logprobs": 21}, "logprobs"), ({"logprobs": True}, "logprobs"),
    ({"suffix": "x"}, "suffix"), ({"best_of": 3, "n": 2}, "best_of"), ({"prompt": [[1], "a"]}, None),
], ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None)
def test_completions_that_cannot_be_honoured_are_refused(server, fields, param):
    response = server.post("/v1/completions", {"prompt": "x", "max_tokens": 1} | fields)
    if param is None:
        assert response.status_code == 200
        return
    assert response.status_code == 400 and response.json()["error"]["param"] == param


@pytest.mark.parametrize("body, word", [
    (b"", "JSON"), (b"{", "JSON"), (b"[]", "object"),
    (b'"x"', "object"), (b'{"a": NaN}', "NaN"), (b'{"a": -Infinity}', "Infinity"), (b'{"a": 1e999}', "large"),
    (b'{"a": "\xff"}', "UTF-8"), (b'{"a": "\\ud800"}', "surrogate"), (b'{"\\udc00": 1}', "surrogate"),
    (b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", "nested"), (b"[" * 100_000, "nested"),
    (b'{"a":' * 5000 + b"1" + b"}" * 5000, "nested"), (b'{"a": ' + b"9" * 10_000 + b"}", "too many digits"),
    (b"\xef\xbb\xbf{", "JSON"), (b"{}\xef\xbb\xbf", "JSON"),
], ids=lambda value: repr(value)[:24])
def test_hostile_json_is_refused(server, body, word):
    response = server.client.post("/v1/chat/completions", content=body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["code"] == "invalid_json" and word in error["message"]
    assert "error" in server.client.post("/api/chat", content=body).json()


def test_a_body_may_nest_64_deep_and_say_any_type(server):
    deep = b'{"a":' + b"[" * 63 + b"]" * 63 + b"}"
    assert parse(deep)
    body = json.dumps({"messages": HELLO, "max_tokens": 1}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", None):
        headers = {"content-type": kind} if kind else {}
        assert server.client.post("/v1/chat/completions", content=body, headers=headers).status_code == 200


def error_of(response):
    return response.status_code, response.json()["error"]["type"], response.json()["error"]["code"]


def test_statuses_of_routes(server):
    assert error_of(server.client.get("/nowhere")) == (404, "not_found_error", "no_such_route")
    response = server.client.get("/v1/chat/completions")
    assert error_of(response) == (405, "invalid_request_error", "method_not_allowed")
    assert response.headers["allow"] == "POST"
    assert server.client.get("/api/chat").json() == {"error": "GET is not allowed here; expected POST"}
    assert server.post("/props", {}).status_code == 400


def test_a_full_queue_is_429_and_a_long_wait_503(model):
    with served(model, parallel=1, queue=1, queue_seconds=0.3) as server:
        gate = Gate(server)
        running = server.begin("/v1/chat/completions",
                               {"messages": HELLO, "max_tokens": 1500, "stream": True})
        until(lambda: server.engine.waiting)
        gate.let()
        waiting = server.begin("/v1/chat/completions", {"messages": HELLO})
        until(lambda: len(server.service.worker.waiting) == 1)
        response = server.post("/v1/chat/completions", {"messages": HELLO})
        assert error_of(response) == (429, "rate_limit_error", "queue_full")
        assert response.headers["retry-after"]
        told = read_to(waiting, b"}}")
        assert b"503" in told.split(b"\r\n")[0] and b"queue_timeout" in told and b"unavailable_error" in told
        running.close()
        waiting.close()


def test_what_does_not_fit_the_memory_is_503(model):

    with served(model, memory=50 * model.config.kv_row_bytes) as server:
        response = server.post("/v1/completions", {"prompt": "a " * 100})
        assert error_of(response) == (503, "unavailable_error", "out_of_memory")
        whole = server.post("/v1/completions", {"prompt": "a b", "max_tokens": 100, "temperature": 0})
        assert error_of(whole) == (503, "unavailable_error", "out_of_memory")
        streamed = server.post("/v1/completions",
                               {"prompt": "a b", "max_tokens": 100, "temperature": 0, "stream": True})
        assert streamed.status_code == 200 and events(streamed)[-1]["error"]["code"] == "out_of_memory"
        assert "[DONE]" not in streamed.text
        ndjson = server.post("/api/generate", {"model": server.service.name, "prompt": "a", "raw": True,
                                               "options": {"temperature": 0}})
        assert list(json.loads(ndjson.text.splitlines()[-1])) == ["error"]
        assert server.post("/v1/completions", {"prompt": "a b", "max_tokens": 10}).status_code == 200


@pytest.mark.parametrize("broken", ["the engine", "a route"])
def test_internal_errors_are_500_without_details(model, monkeypatch, caplog, broken):
    def fail(*_):
        raise RuntimeError("secret detail")

    with served(model, names=["tiny"]) as server:
        if broken == "the engine":
            monkeypatch.setattr(server.engine, "step", fail)
        else:
            monkeypatch.setattr(server.service.metrics, "clock", fail)
        response = server.post("/v1/chat/completions", {"messages": HELLO}, headers={"x-request-id": "abc.1"})
        assert error_of(response) == (500, "server_error", "internal") and "secret" not in response.text
        assert response.headers["x-request-id"] == "abc.1"
        monkeypatch.undo()
        assert chat(server).status_code == 200
    assert "secret detail" in caplog.text


def test_request_ids_are_the_clients_or_new(server):
    for given, kept in (("a-b_c.9", True), ("x" * 64, True), ("x" * 65, False), ("a b", False)):
        told = server.client.get("/health", headers={"x-request-id": given}).headers["x-request-id"]
        assert (told == given) == kept and told


def test_a_stream_tells_that_it_is_alive(model, monkeypatch):
    monkeypatch.setattr(http, "SILENCE", 0.05)
    with served(model) as server:
        gate, body = Gate(server, 1), {"messages": HELLO, "max_tokens": 4, "stream": True}
        with httpx.stream("POST", server.url + "/v1/chat/completions", json=body) as response:
            found = ""
            for text in response.iter_text():
                found += text
                if ": ping\n\n" in found:
                    gate.open()
        assert ": ping\n\n" in found and found.endswith("data: [DONE]\n\n")


def test_texts_are_logged_only_where_that_is_asked_for(model, tmp_path, caplog):
    caplog.set_level("INFO")
    with served(model, log_texts=str(tmp_path / "texts")) as server:
        response = server.post("/v1/completions", {"prompt": "a secret word", "max_tokens": 3, "seed": 1})
    told = json.loads((tmp_path / "texts").read_text())
    assert (tmp_path / "texts").stat().st_mode & 0o777 == 0o600
    assert told["prompts"] == ["a secret word"]
    assert told["answers"][0]["content"] == response.json()["choices"][0]["text"]
    assert "secret" not in caplog.text and "POST /v1/completions 200" in caplog.text
    assert told["id"] == response.headers["x-request-id"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_texts_that_cannot_be_logged_are_told_in_the_log(model, caplog):
    """The disk is full; answers go on."""
    with served(model, log_texts="/dev/full") as server:
        assert server.post("/v1/completions", {"prompt": "a secret word", "max_tokens": 3}).status_code == 200
    assert "the texts are not logged: No space left on device" in caplog.text and "secret" not in caplog.text
