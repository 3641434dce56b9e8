"""The official clients of OpenAI and Ollama against a server."""

import pytest
import tiny
from serving import served

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


def test_openai_chat(client, model):
    whole = client.chat.completions.create(model="tiny", messages=HELLO, seed=1, max_tokens=20, logprobs=True, top_logprobs=2)
    assert whole.choices[0].message.content == text_of(model, 20, seed=1) and whole.choices[0].finish_reason == "length"
    assert len(whole.choices[0].logprobs.content) == 20 and whole.usage.completion_tokens == 20
    chunks = list(client.chat.completions.create(model="tiny", messages=HELLO, seed=1, max_tokens=20, n=2, stream=True,
                                                 stream_options={"include_usage": True}))
    for i in range(2):
        found = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices and c.choices[0].index == i)
        assert found == text_of(model, 20, seed=1 + i)
    assert chunks[-1].usage.total_tokens == 40 + whole.usage.prompt_tokens and not chunks[-1].choices


def test_openai_chat_accumulated_by_its_own_stream_helper(client, model):
    text = text_of(model, 20, seed=1)
    with client.chat.completions.stream(model="tiny", messages=HELLO, seed=1, max_tokens=20, stop=text[12:15]) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == text[:text.index(text[12:15])]


def test_openai_chunks_have_the_fields_of_the_clients_types(client):
    """Their models keep what they do not know: those are ours, and no others."""
    chunks = client.chat.completions.create(model="tiny", messages=HELLO, seed=1, max_tokens=5, stream=True, logprobs=True,
                                            extra_body={"timings_per_token": True})
    for chunk in chunks:
        type(chunk).model_validate(chunk.model_dump(), strict=True)
        assert set(chunk.model_extra) <= {"timings", "pybmc"}
        for choice in chunk.choices:
            assert not choice.model_extra and not choice.delta.model_extra
    whole = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=5)
    type(whole).model_validate(whole.model_dump(), strict=True)
    assert set(whole.model_extra) == {"timings"} and not whole.choices[0].model_extra and not whole.usage.model_extra


def test_openai_completions(client, model):
    found = client.completions.create(model="tiny", prompt=["Once", "The sea"], max_tokens=6, echo=True, logprobs=2, seed=2)
    assert [c.text[:4] for c in found.choices] == ["Once", "The "] and found.choices[0].logprobs.token_logprobs[0] is None
    streamed = client.completions.create(model="tiny", prompt="Once", max_tokens=6, seed=2, stream=True)
    assert "Once" + "".join(c.choices[0].text for c in streamed) == found.choices[0].text
    scored = client.completions.create(model="tiny", prompt="Once upon", max_tokens=0, echo=True, logprobs=1)
    assert scored.choices[0].text == "Once upon" and scored.usage.completion_tokens == 0


def test_openai_models(client):
    assert [m.id for m in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").owned_by == "pybmc"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_openai_errors_are_the_clients_classes(client, server):
    with pytest.raises(openai.BadRequestError) as told:
        client.chat.completions.create(model="tiny", messages=HELLO, temperature=-1)
    assert told.value.param == "temperature" and told.value.code == "invalid_value"
    with pytest.raises(openai.BadRequestError, match="context"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a " * 2000}])
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


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
    assert "".join(p.response for p in llama.generate("tiny", "Once upon a time", options=options, stream=True)) == found.response


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
