"""Tools and reasoning over HTTP: forced calls of every format, streamed and not,
through the official clients too."""

import json

import pytest
import tiny_tools
from serving import events, served_by_name
from test_tools import PAINT, STOP, fits, turn

import pybmc
from pybmc.chat.conversation import Conversation
from pybmc.chat.template import ChatTemplate
from pybmc.cli import run
from pybmc.engine.engine import Engine
from pybmc.engine.request import Request
from pybmc.spec.speculation import Speculation

HELLO = [{"role": "user", "content": "Paint it"}]
TOOLS = [PAINT, STOP]
NAMED = {"type": "function", "function": {"name": "paint"}}
FORMATS = ("hermes", "thinking", "qwen-coder", "mistral", "mistral-list", "llama3", "harmony", "plain")


@pytest.fixture(scope="module")
def servers():
    """name -> a server of the model with that template."""
    with served_by_name(lambda name: pybmc.Model(tiny_tools.model(name), threads=1)) as get:
        yield get


def ask(server, **fields):
    """Thoughts are kept short, and calls are few, since random models would never end."""
    return server.post("/v1/chat/completions",
                       {"messages": HELLO, "tools": TOOLS, "max_tokens": 300, "reasoning_budget": 4,
                        "logit_bias": [["<|im_end|>", 30], ["<|end|>", 30], ["]", 30]]} | fields)


def collected(chunks):
    """The message that deltas make: content, thoughts, and calls; with the rules that deltas keep."""
    message, calls = {"content": "", "reasoning_content": ""}, []
    for chunk in chunks:
        for choice in chunk["choices"]:
            for name in message:
                message[name] += choice["delta"].get(name) or ""
            for call in choice["delta"].get("tool_calls", ()):
                assert call["index"] in (len(calls), len(calls) - 1), "the index counts up"
                if call["index"] == len(calls):
                    assert call["type"] == "function" and call["id"].startswith("call_")
                    assert call["function"]["arguments"] == ""
                    calls.append(call["function"] | {"id": call["id"]})
                else:
                    assert set(call) == {"index", "function"} and set(call["function"]) == {"arguments"}
                    assert call["function"]["arguments"]
                    calls[-1]["arguments"] += call["function"]["arguments"]
            assert choice["delta"] != {} or choice["finish_reason"]
    return message, calls


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("name", FORMATS)
def test_forced_calls_fit_and_streams_tell_the_same(servers, name, choice):
    server = servers(name)
    for seed in range(4):
        whole = ask(server, tool_choice=choice, seed=seed, temperature=1).json()["choices"][0]
        message = whole["message"]
        calls = [(call["function"]["name"], json.loads(call["function"]["arguments"]))
                 for call in message["tool_calls"]]
        assert whole["finish_reason"] == "tool_calls" and message["content"] is None
        assert all(fits(*call) for call in calls)
        assert choice == "required" or {name for name, _ in calls} == {"paint"}
        chunks = events(ask(server, tool_choice=choice, seed=seed, temperature=1, stream=True))
        streamed, told = collected(chunks)
        assert [(call["name"], call["arguments"]) for call in told] == [
            (call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]
        assert streamed["content"] == ""
        assert streamed["reasoning_content"] == message.get("reasoning_content", "")
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
        assert sum("role" in c["delta"] for chunk in chunks for c in chunk["choices"]) == 1


@pytest.mark.parametrize("kind, low, high", [("integer", -2 ** 63, 2 ** 63 - 1),
                                             ("number", -1.7e308, 1.7e308)])
def test_tools_may_take_all_numbers_of_64_bits(servers, kind, low, high):
    parameters = {"type": "object", "required": ["n"],
                  "properties": {"n": {"type": kind, "minimum": low, "maximum": high}}}
    tools = [{"type": "function", "function": {"name": "count", "parameters": parameters}}]
    answer = ask(servers("hermes"), tools=tools, tool_choice="required", max_tokens=4, seed=1)
    assert answer.status_code == 200


def test_one_call_at_most_where_no_more_are_wanted(servers):
    for seed in range(6):
        calls = ask(servers("hermes"), tool_choice="required", parallel_tool_calls=False,
                    seed=seed).json()["choices"][0]["message"]["tool_calls"]
        assert len(calls) == 1


def test_a_call_that_is_cut_ends_by_length(servers):
    found = ask(servers("hermes"), tool_choice=NAMED, max_tokens=10, seed=1).json()["choices"][0]
    assert found["finish_reason"] == "length"


def test_several_answers_have_calls_of_their_own(servers):
    choices = ask(servers("hermes"), tool_choice="required", n=3, seed=1).json()["choices"]
    ids = [call["id"] for choice in choices for call in choice["message"]["tool_calls"]]
    assert len(choices) == 3 and len(set(ids)) == len(ids)
    alone = ask(servers("hermes"), tool_choice="required",
                seed=2).json()["choices"][0]["message"]["tool_calls"]
    assert [c["function"] for c in alone] == [c["function"] for c in choices[1]["message"]["tool_calls"]]


def test_free_answers_are_those_without_a_grammar(servers):
    server = servers("hermes")
    free = ask(server, tool_choice="auto", max_tokens=20, seed=3,
               logit_bias=None).json()["choices"][0]["message"]
    assert free["content"] and "tool_calls" not in free
    none = ask(server, tool_choice="none", max_tokens=20, seed=3, logit_bias=None).json()
    alone = ask(server, tools=None, max_tokens=20, seed=3, logit_bias=None).json()
    assert none["choices"][0]["message"] == alone["choices"][0]["message"]
    assert none["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"]


@pytest.mark.parametrize("name, mark", [("hermes", "<tool_call>"), ("qwen-coder", "<tool_call>"),
                                        ("mistral", "[TOOL_CALLS]"), ("mistral-list", "[TOOL_CALLS]"),
                                        ("llama3", "<|python_tag|>")])
def test_calls_that_are_not_forced_fit_too(servers, name, mark):
    """A bias makes the model begin a call."""
    for seed in range(3):
        found = ask(servers(name), tool_choice="auto", seed=seed, parallel_tool_calls=False,
                    logit_bias=[[mark, 100]]).json()["choices"][0]
        (call,) = found["message"]["tool_calls"]
        assert fits(call["function"]["name"], json.loads(call["function"]["arguments"]))
        assert found["finish_reason"] == "tool_calls"


def test_older_names(servers):
    server = servers("hermes")
    body = {"messages": HELLO, "functions": [PAINT["function"]], "function_call": {"name": "paint"},
            "max_tokens": 200, "seed": 1}
    found = server.post("/v1/chat/completions", body).json()["choices"][0]
    assert found["finish_reason"] == "function_call"
    assert fits("paint", json.loads(found["message"]["function_call"]["arguments"]))
    assert "tool_calls" not in found["message"]
    chunks = events(server.post("/v1/chat/completions", body | {"stream": True}))
    told = [c["choices"][0]["delta"]["function_call"] for c in chunks
            if "function_call" in c["choices"][0]["delta"]]
    assert told[0] == {"name": "paint", "arguments": ""}
    assert chunks[-1]["choices"][0]["finish_reason"] == "function_call"
    assert "".join(one["arguments"] for one in told) == found["message"]["function_call"]["arguments"]


@pytest.mark.parametrize("fields, code, param", [
    ({"tools": [{"type": "web_search"}]}, "invalid_value", "tools"),
    ({"tool_choice": "sometimes"}, "invalid_value", "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "invalid_value", "tool_choice"),
    ({"functions": [STOP["function"]]}, "invalid_value", "tools"),
    ({"parallel_tool_calls": 1}, "invalid_value", "parallel_tool_calls"),
    ({"messages": [*HELLO, {"role": "assistant", "tool_calls": [{}]}]}, "invalid_value",
     "messages[1].tool_calls[0]"),
    ({"messages": [*HELLO, {"role": "assistant", "tool_calls": [5]}]}, "invalid_value",
     "messages[1].tool_calls[0]"),
    ({"tools": [{"type": "function",
                 "function": {"name": "f", "parameters": {"properties": {"a": {"type": "x"}}}}}]},
     "unsupported_schema", "tools"),
    ({"grammar": 'root ::= "a"'}, "invalid_value", "grammar"),
    ({"reasoning_budget": -2}, "invalid_value", "reasoning_budget"),
    ({"thinking": {"budget_tokens": "x"}, "reasoning_budget": None}, "invalid_value",
     "thinking.budget_tokens"),
    ({"thinking": {"type": "maybe"}}, "invalid_value", "thinking.type"),
    ({"think": 3}, "invalid_value", "think"),
    ({"tools": [{"type": "function",
                 "function": {"name": "f", "strict": True, "parameters": {"type": "object", "properties": {
                     "a": {"type": "array", "uniqueItems": True}}}}}]}, "unsupported_schema", "tools"),
], ids=range(14))
def test_what_cannot_be_honoured_is_refused_by_name(servers, fields, code, param):
    response = ask(servers("hermes"), **fields)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, code, param) and error["message"]


def test_keywords_of_tools_without_effect_are_told(servers):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {
        "a": {"type": "boolean", "contentEncoding": "x"},
        "b": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2, "uniqueItems": True}}}}}
    response = ask(servers("hermes"), tools=[tool], tool_choice="required")
    assert response.status_code == 200 and "uniqueItems" in response.headers["x-pybmc-schema-ignored"]


def test_the_template_route_shows_tools(servers):
    prompt = servers("hermes").post("/apply-template", {"messages": HELLO, "tools": TOOLS}).json()["prompt"]
    assert "Paint a wall" in prompt


# ---- reasoning


def test_a_budget_ends_a_thought(servers):
    server = servers("opened")
    usage = {}
    for budget in (0, 3, 10):
        found = ask(server, tools=None, reasoning_budget=budget, max_tokens=40, seed=1, logit_bias=None,
                    stream=False).json()
        usage[budget] = found["usage"]["completion_tokens_details"]["reasoning_tokens"]
        assert found["choices"][0]["message"]["content"]
    assert usage[0] == 0 and usage[3] <= 4 and usage[3] < usage[10] <= 11, "a mark may end a character"
    unlimited = ask(server, tools=None, reasoning_budget=-1, max_tokens=40, seed=1,
                    logit_bias=None).json()["choices"][0]["message"]
    limited = ask(server, tools=None, reasoning_budget=10, max_tokens=40, seed=1,
                  logit_bias=None).json()["choices"][0]["message"]
    assert unlimited["reasoning_content"].startswith(limited["reasoning_content"].rstrip("\ufffd"))
    assert unlimited["content"] == ""
    same = ask(server, tools=None, reasoning_budget=None, thinking={"type": "enabled", "budget_tokens": 10},
               max_tokens=40, seed=1, logit_bias=None).json()
    assert same["choices"][0]["message"] == limited


def test_a_thought_may_be_left_in_the_text(servers):
    found = ask(servers("opened"), tools=None, reasoning_budget=3, reasoning_format="none", max_tokens=40,
                seed=1, logit_bias=None).json()["choices"][0]["message"]
    assert "reasoning_content" not in found and "</think>" in found["content"]


@pytest.mark.parametrize("fields", [{"reasoning_effort": "none"}, {"think": False},
                                    {"enable_thinking": False}, {"thinking": {"type": "disabled"}},
                                    {"chat_template_kwargs": {"enable_thinking": False}}])
def test_thinking_is_switched_off_in_any_words(servers, fields):
    server = servers("thinking")
    prompt = server.post("/apply-template", {"messages": HELLO} | fields).json()["prompt"]
    assert prompt.endswith("<think>\n\n</think>\n\n")
    assert not server.post("/apply-template", {"messages": HELLO}).json()["prompt"].endswith("</think>\n\n")


# ---- clients


def test_openai_client(servers):
    openai = pytest.importorskip("openai", reason="needs the openai package")
    with openai.OpenAI(base_url=f"{servers('hermes').url}/v1", api_key="none", max_retries=0) as client:
        given = {"model": "tiny", "messages": HELLO, "tools": TOOLS, "tool_choice": "required", "seed": 1,
                 "max_tokens": 300}
        whole = client.chat.completions.create(**given)
        type(whole).model_validate(whole.model_dump(), strict=True)
        assert not whole.choices[0].model_extra and not whole.choices[0].message.model_extra
        for chunk in client.chat.completions.create(stream=True, **given):
            type(chunk).model_validate(chunk.model_dump(), strict=True)
            assert set(chunk.model_extra) <= {"timings"}
            assert not any(choice.model_extra or choice.delta.model_extra for choice in chunk.choices)
        with client.chat.completions.stream(**given) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_completion().choices[0]
        assert "tool_calls.function.arguments.done" in kinds and final.finish_reason == "tool_calls"
        assert ([c.function.arguments for c in final.message.tool_calls]
                == [c.function.arguments for c in whole.choices[0].message.tool_calls])
        call = whole.choices[0].message.tool_calls[0]
        again = [*HELLO, whole.choices[0].message,
                 {"role": "tool", "tool_call_id": call.id, "content": "done"}]
        assert client.chat.completions.create(**given | {"messages": again,
                                                         "tool_choice": "none"}).choices[0].message.content


@pytest.mark.parametrize("name", ["hermes", "opened", "harmony"])
def test_ollama_client(servers, name):
    ollama = pytest.importorskip("ollama", reason="needs the ollama package")
    client = ollama.Client(host=servers(name).url)
    shown = client.show("tiny").capabilities
    assert "tools" in shown and ("thinking" in shown) == (name != "hermes")

    def paint(colour: str, coats: int) -> str:
        """Paint a wall."""

    options = {"seed": 1, "num_predict": 60}
    found = client.chat("tiny", messages=HELLO, tools=[paint], options=options)
    parts = list(client.chat("tiny", messages=HELLO, tools=[paint], options=options, stream=True))
    assert "".join(p.message.content or "" for p in parts) == (found.message.content or "")
    assert "".join(p.message.thinking or "" for p in parts) == (found.message.thinking or "")
    assert parts[-1].done


def test_ollama_calls_are_objects_and_whole(servers):
    """Forced by a field of ours, since Ollama has no choice of tools."""
    for name in ("hermes", "harmony"):
        body = {"model": "tiny", "messages": HELLO, "tools": TOOLS, "tool_choice": "required",
                "options": {"seed": 1, "num_predict": 300}, "reasoning_budget": 4}
        found = servers(name).post("/api/chat", body | {"stream": False}).json()
        assert found["message"]["tool_calls"] and found["done_reason"] == "stop"
        lines = [json.loads(line) for line in servers(name).post("/api/chat", body).text.splitlines()]
        streamed = [call for line in lines for call in line["message"].get("tool_calls", ())]
        assert [c["function"] for c in streamed] == [c["function"] for c in found["message"]["tool_calls"]]
        for i, call in enumerate(streamed):
            assert call["id"] and call["function"]["index"] == i
            assert fits(call["function"]["name"], call["function"]["arguments"])
        history = [*HELLO, found["message"], {"role": "tool", "tool_name": "paint", "content": "done"}]
        assert servers(name).post("/api/chat",
                                  body | {"messages": history, "stream": False}).status_code == 200


def test_plain_templates_do_not_claim_tools(servers):
    assert "tools" not in servers("plain").post("/api/show", {"model": "tiny"}).json()["capabilities"]


# ---- without a server


def test_llama_class(servers):
    with pybmc.Llama(str(tiny_tools.model("hermes")), verbose=False) as llama:
        given = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 300, "seed": 1}
        whole = llama.create_chat_completion(HELLO, **given)["choices"][0]
        assert whole["finish_reason"] == "tool_calls"
        assert all(fits(c["function"]["name"], json.loads(c["function"]["arguments"]))
                   for c in whole["message"]["tool_calls"])
        _, told = collected(llama.create_chat_completion(HELLO, stream=True, **given))
        assert [c["arguments"] for c in told] == [c["function"]["arguments"]
                                                  for c in whole["message"]["tool_calls"]]
        slow = llama.create_chat_completion(HELLO, logits_processor=lambda ids, logits: logits,
                                            **given)["choices"][0]
        assert ([c["function"] for c in slow["message"]["tool_calls"]]
                == [c["function"] for c in whole["message"]["tool_calls"]])
        old = llama.create_chat_completion(HELLO, functions=[PAINT["function"]],
                                           function_call={"name": "paint"}, max_tokens=300,
                                           seed=1)["choices"][0]
        assert fits("paint", json.loads(old["message"]["function_call"]["arguments"]))
        assert old["finish_reason"] == "function_call"


def test_guesses_do_not_change_a_call():
    with pybmc.Model(tiny_tools.model("opened"), threads=1) as model:
        texts = []
        for spec in ("off", "ngram"):
            made = turn(lambda _: (model, ChatTemplate(None, model.tokenizer)), "opened",
                        choice="required", budget=30)
            with Engine(model, parallel=1, speculation=Speculation(model, None, spec, 16, 0)) as engine:
                engine.add(Request(made.tokens, 200, pybmc.Sampler(temperature=0.7, seed=3),
                                   stop_ids=model.tokenizer.stop_ids, schema=made.schema(), shown=made.shown,
                                   hint=made.tokens))
                texts.append("".join(token.text for _ in range(400) if engine.running or engine.waiting
                                     for _, token in engine.step()))
        assert texts[0] == texts[1] and "</think>" in texts[0] and "<tool_call>" in texts[0]


def test_batch_lines(tmp_path):
    lines = [{"messages": HELLO, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False,
              "max_tokens": 300, "seed": 1},
             {"messages": HELLO, "tools": TOOLS, "max_tokens": 5}, {"messages": HELLO, "max_tokens": 5},
             {"prompt": "x", "tools": TOOLS}, {"messages": HELLO, "tools": [{"type": "x"}]},
             {"messages": HELLO, "functions": [STOP["function"]], "function_call": {"name": "stop"}},
             {"messages": [*HELLO, {"role": "assistant", "tool_calls": [{}]}]}]
    (tmp_path / "in").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(["batch", str(tmp_path / "in"), str(tmp_path / "out"), "-m", str(tiny_tools.model("hermes")),
                "-t", "1", "--temp", "0"]) == 1
    found = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert all(fits(c["function"]["name"], json.loads(c["function"]["arguments"]))
               for c in found[0]["tool_calls"])
    assert found[0]["text"] == "" and found[0]["finish_reason"] == "tool_calls"
    assert "tool_calls" not in found[1] and found[2]["text"]
    assert "expected messages beside it" in found[3]["error"]
    assert "tools[0]" in found[4]["error"] and found[5]["tool_calls"][0]["function"]["name"] == "stop"
    assert "tool_calls[0]" in found[6]["error"]


@pytest.mark.parametrize("name, closes", [("opened", "</think>"), ("harmony", "<|end|>")])
def test_generate_limits_a_thought(name, closes):
    with pybmc.Model(tiny_tools.model(name), threads=1) as model:
        template = ChatTemplate(None, model.tokenizer)
        tokens = template.encode(HELLO)
        if name == "harmony":
            tokens += model.tokenizer.encode("<|channel|>analysis<|message|>", bos=False, special=True)
        text = "".join(t.text
                       for t in pybmc.generate(model, tokens, 30, reasoning_budget=5, chat_template=template))
        assert 0 < text.find(closes) < 60
        batch = "".join(token.text
                        for _, token in pybmc.generate_batch(model, [HELLO], 30, reasoning_budget=5))
        assert name == "harmony" or batch == text
        with pytest.raises(pybmc.ArgumentError, match="reasoning_budget"):
            pybmc.generate(model, HELLO, 3, reasoning_budget=-1)


@pytest.mark.parametrize("thoughts", ["show", "hide"])
def test_commands_limit_and_hide_thoughts(capsys, thoughts):
    args = ["generate", str(tiny_tools.model("opened")), "--chat", "-p", "x", "-n", "20", "-t", "1", "--temp",
            "0", "--thoughts", thoughts, "--reasoning-budget"]
    assert run([*args, "4"]) == 0
    out = capsys.readouterr().out
    assert ("</think>" in out) == (thoughts == "show") and out.strip()
    assert run([*args, "-2"]) == 2 and "-2" in capsys.readouterr().err


def test_a_conversation_in_channels_keeps_the_content(capsys):
    with pybmc.Model(tiny_tools.model("harmony"), threads=1) as model, model.session() as session:
        talk = Conversation(model, session, max_tokens=4)
        talk.prompt = model.tokenizer.encode("<|start|>assistant", special=True)
        said = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Yes."
        assert talk._message(said) == {"role": "assistant", "content": "Yes."}
        assert list(talk.ask("Hello")) and talk.messages[-1]["role"] == "assistant"
        assert "<|" not in talk.messages[-1]["content"]
