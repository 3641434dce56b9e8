"""The official clients of OpenAI and Ollama against a server."""

import asyncio

import numpy as np
import pytest
import tiny
from serving import httpx, served

import pybmc
from pybmc.serve.door import Policy

openai = pytest.importorskip("openai", reason="needs the openai package")
ollama = pytest.importorskip("ollama", reason="needs the ollama package")

HELLO = [{"role": "user", "content": "Once upon a time"}]


@pytest.fixture(scope="module")
def model():
    with pybmc.Model(tiny.model("llama", n_ctx=800), threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def server(model):
    with served(model, Policy(keys=["secret"]), names=["tiny"]) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:
        yield client


def text_of(model, n, **settings):
    return "".join(t.text for t in pybmc.generate(model, HELLO, n, spec="off", temperature=0.8, **settings))


def text_of_prompt(model, prompt, n):
    return "".join(t.text for t in pybmc.generate(model, prompt, n, spec="off", temperature=0))


def test_openai_chat(client, model):
    whole = client.chat.completions.create(model="tiny", messages=HELLO, seed=1, max_tokens=20, logprobs=True,
                                           top_logprobs=2)
    assert whole.choices[0].message.content == text_of(model, 20, seed=1)
    assert whole.choices[0].finish_reason == "length"
    assert len(whole.choices[0].logprobs.content) == 20 and whole.usage.completion_tokens == 20
    chunks = list(client.chat.completions.create(model="tiny", messages=HELLO, seed=1, max_tokens=20, n=2,
                                                 stream=True, stream_options={"include_usage": True}))
    for i in range(2):
        found = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices
                        and c.choices[0].index == i)
        assert found == text_of(model, 20, seed=1 + i)
    assert chunks[-1].usage.total_tokens == 40 + whole.usage.prompt_tokens and not chunks[-1].choices


def test_openai_chat_accumulated_by_its_own_stream_helper(client, model):
    text = text_of(model, 20, seed=1)
    with client.chat.completions.stream(model="tiny", messages=HELLO, seed=1, max_tokens=20,
                                        stop=text[12:15]) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == text[:text.index(text[12:15])]


def test_openai_chunks_have_the_fields_of_the_clients_types(client):
    """Their models keep what they do not know: those are ours, and no others."""
    chunks = client.chat.completions.create(model="tiny", messages=HELLO, seed=1, max_tokens=5, stream=True,
                                            logprobs=True, extra_body={"timings_per_token": True})
    for chunk in chunks:
        type(chunk).model_validate(chunk.model_dump(), strict=True)
        assert set(chunk.model_extra) <= {"timings", "pybmc"}
        for choice in chunk.choices:
            assert not choice.model_extra and not choice.delta.model_extra
    whole = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=5)
    type(whole).model_validate(whole.model_dump(), strict=True)
    assert set(whole.model_extra) == {"timings"} and not whole.choices[0].model_extra
    assert not whole.usage.model_extra


def test_openai_completions(client, model):
    found = client.completions.create(model="tiny", prompt=["Once", "The sea"], max_tokens=6, echo=True,
                                      logprobs=2, seed=2)
    assert [c.text[:4] for c in found.choices] == ["Once", "The "]
    assert found.choices[0].logprobs.token_logprobs[0] is None
    streamed = client.completions.create(model="tiny", prompt="Once", max_tokens=6, seed=2, stream=True)
    assert "Once" + "".join(c.choices[0].text for c in streamed) == found.choices[0].text
    scored = client.completions.create(model="tiny", prompt="Once upon", max_tokens=0, echo=True, logprobs=1)
    assert scored.choices[0].text == "Once upon" and scored.usage.completion_tokens == 0


def test_openai_embeddings_are_the_same_in_base64_and_as_numbers(client, model):
    """The client asks for base64 where it is not told otherwise."""
    texts = ["Once upon a time", "the sea"]
    found, plain = (client.embeddings.create(model="tiny", input=texts, **more)
                    for more in ({}, {"encoding_format": "float"}))
    assert [one.embedding for one in found.data] == [one.embedding for one in plain.data]
    assert np.allclose([one.embedding for one in found.data], model.embed(texts), atol=1e-6)
    assert found.usage.prompt_tokens == sum(len(model.tokenizer.encode(text)) for text in texts)


def test_openai_async_streams_beside_each_other(server, model):
    async def ask(client, seed):
        stream = await client.chat.completions.create(model="tiny", messages=HELLO, seed=seed, max_tokens=12,
                                                      stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def both():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:
            return await asyncio.gather(ask(client, 1), ask(client, 2))

    assert asyncio.run(both()) == [text_of(model, 12, seed=1), text_of(model, 12, seed=2)]


def test_lm_eval_scores_continuations(server, model):
    """What its local-completions sends and reads: ids of context and continuation, echoed with a
    log-probability each, and one token more; where all of a continuation's are the likeliest, greedy decoding
    would have written it."""
    encode = lambda text: model.tokenizer.encode(text)
    likely = encode("Once upon a") + model.tokenizer.encode(text_of_prompt(model, "Once upon a", 3),
                                                            bos=False)
    pairs = [(len(encode("Once upon a")), likely), (len(encode("the")), encode("the quarter"))]
    body = {"model": "tiny", "prompt": [ids for _, ids in pairs], "temperature": 0, "max_tokens": 1,
            "logprobs": 1, "seed": 1234, "echo": True}
    found = httpx.post(f"{server.url}/v1/completions", json=body,
                       headers={"Authorization": "Bearer secret"}).json()
    for choice, (n, ids) in zip(found["choices"], pairs):
        logprobs = choice["logprobs"]["token_logprobs"][n:-1]
        tops = choice["logprobs"]["top_logprobs"][n:-1]
        assert len(logprobs) == len(ids) - n and choice["logprobs"]["token_logprobs"][0] is None
        with model.session() as session:
            rows = session.eval(ids[:-1], logits="all")[n - 1:].astype(np.float64)
        exact = [row[id] - np.log(np.exp(row).sum()) for row, id in zip(rows, ids[n:])]
        assert np.allclose(logprobs, exact, atol=1e-4)
        greedy = all(max(top.values()) == logprob for top, logprob in zip(tops, logprobs))
        assert greedy == all(int(np.argmax(row)) == id for row, id in zip(rows, ids[n:]))
    info = httpx.get(f"{server.url}/tokenizer_info", headers={"Authorization": "Bearer secret"}).json()
    remote = httpx.post(f"{server.url}/tokenize", json={"prompt": "Once upon a", "add_special_tokens": False},
                        headers={"Authorization": "Bearer secret"}).json()
    assert remote["tokens"] == model.tokenizer.encode("Once upon a", bos=False, special=True)
    assert info["eos_token"]


def test_openai_models(client):
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "pybmc"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_openai_errors_are_the_clients_classes(client, server):
    with pytest.raises(openai.BadRequestError) as told:
        client.chat.completions.create(model="tiny", messages=HELLO, temperature=-1)
    assert told.value.param == "temperature" and told.value.code == "invalid_value"
    with pytest.raises(openai.BadRequestError, match="context"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a " * 2000}])
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong",
                       max_retries=0) as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_ollama_embeds_and_takes_options_that_ask_for_nothing(llama, model):
    found = llama.embed("tiny", ["Once upon a time", "the sea"])
    assert np.allclose(found.embeddings, model.embed(["Once upon a time", "the sea"]), atol=1e-6)
    options = {"seed": 1, "num_predict": 5, "num_ctx": 2048, "num_gpu": 0, "mirostat": 0, "tfs_z": 1.0,
               "typical_p": 1.0, "num_keep": 5}
    assert llama.chat("tiny", messages=HELLO, options=options,
                      keep_alive="5m").message.content == text_of(model, 5, seed=1)
    with pytest.raises(ollama.ResponseError, match="mirostat is not supported here; expected 0"):
        llama.chat("tiny", messages=HELLO, options=options | {"mirostat": 2})


@pytest.fixture(scope="module")
def llama(server):
    return ollama.Client(host=server.url, headers={"Authorization": "Bearer secret"})


def test_ollama_chat_and_generate(llama, model):
    options = {"seed": 1, "num_predict": 15, "num_ctx": 4096}
    assert llama.chat("tiny", messages=HELLO, options=options).message.content == text_of(model, 15, seed=1)
    parts = list(llama.chat("tiny:latest", messages=HELLO, options=options, stream=True))
    assert "".join(p.message.content for p in parts) == text_of(model, 15, seed=1)
    assert parts[-1].done and parts[-1].eval_count == 15 and parts[-1].done_reason == "length"
    found = llama.generate("tiny", "Once upon a time", options=options)
    assert found.response == text_of(model, 15, seed=1) and found.context
    assert "".join(p.response for p in llama.generate("tiny", "Once upon a time", options=options,
                                                      stream=True)) == found.response


def test_ollama_lists_and_shows(llama):
    assert llama.list().models[0].model == "tiny:latest" and llama.ps().models[0].size > 0
    shown = llama.show("tiny")
    assert shown.modelinfo["llama.context_length"] == 800 and "completion" in shown.capabilities


def test_ollama_errors(llama):
    with pytest.raises(ollama.ResponseError, match="not found") as told:
        llama.chat("other", messages=HELLO)
    assert told.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="disabled"):
        llama.pull("other")
