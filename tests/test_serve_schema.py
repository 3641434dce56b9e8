"""Schemas and grammars over HTTP: what is honoured on each wire, what is refused,
and that no answer goes without its mask."""

import json

import pytest
import tiny
from serving import events, served

import pybmc
from pybmc.spec.speculation import Speculation

pytest.importorskip("llguidance", reason="schemas need llguidance")

HELLO = [{"role": "user", "content": "Once upon a time"}]
PERSON = {"type": "object", "properties": {"name": {"enum": ["Ann", "Bob"]},
                                           "age": {"type": "integer", "minimum": 0, "maximum": 99}},
          "required": ["name", "age"], "additionalProperties": False}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}


@pytest.fixture(scope="module")
def model():
    with pybmc.Model(pybmc.demo_model(), threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def server(model):
    with served(model) as server:
        yield server


def is_person(text):
    found = json.loads(text)
    return set(found) == {"name", "age"} and found["name"] in ("Ann", "Bob") and 0 <= found["age"] <= 99


# ---- what is honoured --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"response_format": FORMAT}, {"json_schema": PERSON},
                                    {"response_format": {"type": "json_schema", "schema": PERSON}},
                                    {"response_format": {"type": "json_object", "schema": PERSON}}], ids=repr)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/completion"])
def test_answers_follow_their_schema(server, path, fields):
    body = {"messages": HELLO, "prompt": "Once", "max_tokens": 60, "temperature": 1.5} | fields
    found = server.post(path, body).json()
    text = found["content"] if path == "/completion" else \
        found["choices"][0]["message"]["content"] if "chat" in path else found["choices"][0]["text"]
    assert is_person(text), found


@pytest.mark.parametrize("path, key", [("/api/chat", "message"), ("/api/generate", "response")])
def test_ollamas_format_is_a_schema(server, path, key):
    body = {"model": server.service.name, "messages": HELLO, "prompt": "Once", "stream": False,
            "format": PERSON, "options": {"num_predict": 60, "seed": 4}}
    found = server.post(path, body).json()[key]
    assert is_person(found["content"] if key == "message" else found)


def test_json_alone_is_an_object(server):
    for fields in ({"response_format": {"type": "json_object"}}, {"json_schema": {"type": "object"}}):
        body = {"messages": HELLO, "max_tokens": 3, "temperature": 0, **fields}
        assert server.post("/v1/chat/completions",
                           body).json()["choices"][0]["message"]["content"].startswith("{")
    body = {"model": server.service.name, "prompt": "Once", "stream": False, "format": "json",
            "options": {"num_predict": 3}}
    assert server.post("/api/generate", body).json()["response"].startswith("{")


@pytest.mark.parametrize("grammar", ['root ::= "yes" | "no"', '%llguidance {}\nstart: "yes" | "no"'])
def test_answers_follow_their_grammar(server, grammar):
    for path in ("/v1/chat/completions", "/completion"):
        found = server.post(path, {"messages": HELLO, "prompt": "Once", "grammar": grammar, "seed": 1}).json()
        text = found["content"] if path == "/completion" else found["choices"][0]["message"]["content"]
        assert text in ("yes", "no")


def test_each_of_n_answers_has_its_own_state(server):
    body = {"messages": HELLO, "n": 4, "max_tokens": 60, "temperature": 2, "seed": 1,
            "response_format": FORMAT}
    texts = [choice["message"]["content"]
             for choice in server.post("/v1/chat/completions", body).json()["choices"]]
    assert all(map(is_person, texts)) and len(set(texts)) > 1


def test_streams_tell_what_the_schema_gave(model, monkeypatch):
    # checks all guesses
    monkeypatch.setattr("pybmc.serve.service.Speculation", lambda *args: Speculation(*args, fixed=8))
    body = {"messages": HELLO, "max_tokens": 60, "stream": True, "timings_per_token": True,
            "response_format": FORMAT}
    with served(model) as server:
        chunks = events(server.post("/v1/chat/completions", body))
    pieces = [piece for chunk in chunks for piece in chunk.get("pybmc", {}).get("pieces", [])]
    assert is_person("".join(piece["text"] for piece in pieces))
    assert "schema" in {piece["by"] for piece in pieces}


def test_what_asks_for_nothing_is_fine(server):
    body = {"messages": HELLO, "max_tokens": 4, "temperature": 0}
    nothing = {"grammar": "", "json_schema": None, "response_format": {"type": "text"}, "format": "wav"}
    plain = server.post("/v1/chat/completions", body).json()["choices"]
    assert server.post("/v1/chat/completions", body | nothing).json()["choices"] == plain


def test_ignored_keywords_are_in_a_header(server):
    schema = PERSON | {"if": {}, "then": {"unknown": "\n\xe9"}, "properties": PERSON["properties"]
                       | {"when": {"type": "string", "format": "w\xfcrst\n"}}}
    for stream in (False, True):
        response = server.post("/v1/chat/completions",
                               {"messages": HELLO, "max_tokens": 60, "json_schema": schema, "stream": stream})
        assert (response.status_code == 200
                and "if" in response.headers["x-pybmc-schema-ignored"]), response.text
    response = server.post("/v1/chat/completions",
                           {"messages": HELLO, "max_tokens": 60, "json_schema": PERSON})
    assert "x-pybmc-schema-ignored" not in response.headers


# ---- thoughts ----------------------------------------------------------------------------------------------


def thoughtful(path, opens):
    """A tiny model whose template opens a thought, or leaves that to the model."""
    metadata, tensors = tiny.parts("llama", n_ctx=600)
    metadata["tokenizer.chat_template"] = (
        ("{% for m in messages %}{{ m.content }}{% endfor %}"
         "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}"
        "{% elif " + str(opens).lower() + " %}{{ '<think>' }}{% endif %}"))
    return tiny.save(path, metadata, tensors)


@pytest.mark.parametrize("opens", [True, False])
def test_a_thought_is_free_and_the_answer_is_not(tmp_path, opens):
    with pybmc.Model(thoughtful(tmp_path / "thinks.gguf", opens),
                     threads=1) as model, served(model) as server:
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 60, "temperature": 3,
                "top_k": 0, "min_p": 0, "top_p": 1, "seed": 2, "grammar": 'root ::= "yes" | "no"'}
        thoughts = set()
        for seed in range(4):
            message = server.post("/v1/chat/completions",
                                  body | {"seed": seed}).json()["choices"][0]["message"]
            thoughts.add(message.get("reasoning_content"))
            assert message["content"] in ("yes", "no", "", None)
        if opens:                       # no mark comes by chance: such an answer never begins
            assert all(thoughts) and len(thoughts) == 4
        off = body | {"chat_template_kwargs": {"enable_thinking": False}}
        assert server.post("/v1/chat/completions",
                           off).json()["choices"][0]["message"]["content"] in ("yes", "no")


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields, code, param, word", [
    ({"json_schema": {"type": "wurst"}}, "unsupported_schema", "json_schema", "wurst"),
    ({"response_format": {"type": "json_schema",
                          "json_schema": {"name": "x", "schema": {"not": {}}, "strict": True}}},
     "unsupported_schema", "response_format", "not"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "invalid_value",
     "response_format", "schema"),
    ({"json_schema": {"$ref": "http://127.0.0.1:1/x"}}, "unsupported_schema", "json_schema", "127.0.0.1"),
    ({"json_schema": {"$ref": "file:///etc/passwd"}}, "unsupported_schema", "json_schema", "passwd"),
    ({"json_schema": {"const": "x" * 270_000}}, "invalid_schema", "json_schema", "262144"),
    ({"json_schema": {"minimum": 3, "maximum": 1, "type": "integer"}}, "unsupported_schema",
     "json_schema", "minimum"),
    ({"grammar": "root ::= ("}, "invalid_schema", "grammar", "grammar"),
    ({"grammar": "root ::= missing"}, "invalid_schema", "grammar", "missing"),
    ({"grammar": "%llguidance {}\nstart: missing"}, "unsupported_schema", "grammar", "missing"),
    ({"grammar": 'root ::= "a"', "json_schema": {}}, "invalid_value", "grammar", "both"),
], ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else None)
def test_what_is_not_understood_is_refused(server, fields, code, param, word):
    for path in ("/v1/chat/completions", "/completion"):
        response = server.post(path, {"messages": HELLO, "prompt": "x", "max_tokens": 2} | fields)
        error = response.json()["error"]
        assert response.status_code == 400 and (error["code"], error["param"]) == (code, param), error
        assert word in error["message"] and "\n" not in error["message"]


def test_a_grammar_that_passes_the_limits_later_ends_with_an_error(server, monkeypatch):
    from pybmc.grammar.state import State

    real = State.mask

    def mask(self, tokens):
        if len(tokens) == 0 and self._seen > 3:
            # no token of the text: the matcher fails, as where a limit is passed
            self._matcher.consume_token(0)
        self._seen += 1
        return real(self, tokens)

    monkeypatch.setattr(State, "mask", mask)
    monkeypatch.setattr(State, "_seen", 0, raising=False)
    response = server.post("/completion", {"prompt": "x", "n_predict": 30,
                                           "json_schema": {"type": "string", "minLength": 20}})
    assert (response.status_code == 400
            and response.json()["error"]["code"] == "unsupported_schema"), response.text


def test_without_llguidance_the_sentence_says_so(server, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    response = server.post("/v1/chat/completions",
                           {"messages": HELLO, "grammar": 'root ::= "never seen before"'})
    assert response.status_code == 400 and "pip install llguidance" in response.json()["error"]["message"]
