"""The Responses and the Messages API: the answers of the chat route in other words,
for the official clients too."""

import json
import re
import threading

import pytest
import tiny
import tiny_tools
from serving import Gate, Served, httpx, read_to, served, served_by_name, until
from test_tools import PAINT, STOP, fits

import pybmc
from pybmc.serve import http
from pybmc.serve.blocks import sealed, unsealed
from pybmc.serve.door import Policy
from pybmc.serve.errors import TYPES, Refused, error_body
from pybmc.serve.service import Service, Settings

TOOLS = [PAINT, STOP]
FUNCTIONS = [{"type": "function", **tool["function"]} for tool in TOOLS]
SCHEMAS = [{"name": tool["function"]["name"], "description": tool["function"].get("description", ""),
            "input_schema": tool["function"].get("parameters", {"type": "object", "properties": {}})}
           for tool in TOOLS]
BIAS = {"logit_bias": [["<|im_end|>", 30], ["]", 30]]}   # thoughts and calls of random models would never end
HELLO = [{"role": "user", "content": "Paint it"}]
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"


@pytest.fixture(scope="module")
def servers():
    """name -> a server of the model with that template."""
    with served_by_name(lambda name: pybmc.Model(tiny_tools.model(name), threads=1),
                        Policy(max_body=100_000)) as get:
        yield get


@pytest.fixture(scope="module")
def server(servers):
    return servers("hermes")


@pytest.fixture(scope="module")
def model():
    with pybmc.Model(tiny.model("llama", n_ctx=500), threads=1) as model:
        yield model


def respond(server, **fields):
    return server.post(RESPONSES,
                       {"input": "Paint it", "max_output_tokens": 300, "seed": 1, "reasoning_budget": 4}
                       | BIAS | fields)


def message(server, **fields):
    return server.post(MESSAGES, {"messages": HELLO, "max_tokens": 300, "seed": 1,
                                  "thinking": {"type": "enabled", "budget_tokens": 4}} | BIAS | fields)


def events(response):
    """The data of named events, whose names are their types."""
    found = re.findall(r"event: (\S+)\ndata: (.+)\n\n", response.text)
    data = [json.loads(data) for _, data in found]
    assert [name for name, _ in found] == [one["type"] for one in data] and "[DONE]" not in response.text
    assert "".join(f"event: {name}\ndata: {one}\n\n" for name, one in found) == response.text
    return data


def prompt(server, path, body):
    """The prompt that a request comes to."""
    seen, submit = [], server.service.submit
    server.service.submit = lambda requests, *more: seen.append(requests[0].tokens) or submit(requests, *more)
    try:
        response = server.post(path, body | {"max_tokens": 1, "max_output_tokens": 1})
    finally:
        server.service.submit = submit
    assert response.status_code == 200, response.text
    return server.service.tokenizer.decode(seen[0], special=True)


# ---- the same answers


def told_by_chat(found):
    given = found["choices"][0]["message"]
    calls = [(call["function"]["name"], call["function"]["arguments"])
             for call in given.get("tool_calls", ())]
    return given.get("reasoning_content", ""), given["content"] or "", calls


def told_by_response(found):
    items = {kind: [item for item in found["output"] if item["type"] == kind]
             for kind in ("reasoning", "message", "function_call")}
    return ("".join(part["text"] for item in items["reasoning"] for part in item["content"]),
            "".join(part["text"] for item in items["message"] for part in item["content"]),
            [(item["name"], item["arguments"]) for item in items["function_call"]])


def told_by_message(found):
    blocks = {kind: [block for block in found["content"] if block["type"] == kind]
              for kind in ("thinking", "text", "tool_use")}
    return ("".join(block["thinking"] for block in blocks["thinking"]),
            "".join(block["text"] for block in blocks["text"]),
            [(block["name"], block["input"]) for block in blocks["tool_use"]])


@pytest.mark.parametrize("name",
                         ["hermes", "thinking", "opened", "qwen-coder", "mistral", "harmony", "plain"])
def test_all_apis_give_the_same_thoughts_texts_and_calls(servers, name):
    server = servers(name)
    for seed, required in ((1, True), (2, True), (3, False)):
        more = {"seed": seed, "temperature": 1} | ({} if required else {"logit_bias": {}})
        most = 300 if required else 20
        chat = server.post(CHAT,
                           {"messages": HELLO, "tools": TOOLS, "tool_choice": "required" if required
                            else "auto", "max_tokens": most, "reasoning_budget": 4} | BIAS | more).json()
        thought, content, calls = told_by_chat(chat)
        response = respond(server, tools=FUNCTIONS, tool_choice="required" if required else "auto",
                           max_output_tokens=most, **more).json()
        assert told_by_response(response) == (thought, content, calls)
        found = message(server, tools=SCHEMAS, tool_choice={"type": "any" if required else "auto"},
                        max_tokens=most, **more).json()
        assert told_by_message(found) == (thought, content,
                                          [(name, json.loads(arguments)) for name, arguments in calls])
        assert bool(calls) == required and all(fits(name, json.loads(arguments)) for name, arguments in calls)
        assert response["status"] == ("completed" if required else "incomplete")
        assert found["stop_reason"] == ("tool_use" if required else "max_tokens")
        usage, its, other = chat["usage"], response["usage"], found["usage"]
        assert (usage["prompt_tokens"] == its["input_tokens"] == other["input_tokens"]
                + other["cache_read_input_tokens"])
        assert usage["completion_tokens"] == its["output_tokens"] == other["output_tokens"]
        assert usage["completion_tokens_details"] == its["output_tokens_details"]
        assert (other["output_tokens_details"]
                == {"thinking_tokens": its["output_tokens_details"]["reasoning_tokens"]})


@pytest.mark.parametrize("name", ["hermes", "opened", "harmony"])
def test_streams_of_responses_tell_the_same_in_order(servers, name):
    server, asked = servers(name), {"tools": FUNCTIONS, "tool_choice": "required", "seed": 2,
                                    "temperature": 1}
    whole, found = respond(server, **asked).json(), events(respond(server, stream=True, **asked))
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    kinds = [event["type"].removeprefix("response.") for event in found]
    assert kinds[:2] == ["created", "in_progress"] and kinds[-1] == "completed"
    final = found[-1]["response"]
    assert told_by_response(final) == told_by_response(whole) and final["status"] == "completed"
    for index, item in enumerate(final["output"]):
        its = [event for event in found if event.get("output_index") == index]
        order = " ".join(event["type"].removeprefix("response.") for event in its)
        part = "{0}(content_part.added )({1}.delta )*{1}.done content_part.done {2}"
        shapes = {"message": part.format("output_item.added ", "output_text", "output_item.done"),
                  "reasoning": part.format("output_item.added ", "reasoning_text", "output_item.done"),
                  "function_call": "output_item.added (function_call_arguments.delta "
                                   ")+function_call_arguments.done output_item.done"}
        assert re.fullmatch(shapes[item["type"]], order), order
        assert its[-1]["item"] == item and its[0]["item"]["id"] == item["id"]
        assert its[0]["item"]["status"] == "in_progress"
        assert {event["item_id"] for event in its if "item_id" in event} == {item["id"]}
        text = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert "".join(event["delta"] for event in its if "delta" in event) == text
        done = next(event for event in its if event["type"].endswith(("text.done", "arguments.done")))
        assert done.get("text", done.get("arguments")) == text


@pytest.mark.parametrize("name", ["hermes", "opened", "harmony"])
def test_streams_of_messages_tell_the_same_in_order(servers, name):
    server, asked = servers(name), {"tools": SCHEMAS, "tool_choice": {"type": "any"}, "seed": 2,
                                    "temperature": 1}
    whole, found = message(server, **asked).json(), events(message(server, stream=True, **asked))
    first, *middle, delta, last = found
    assert (first["type"], delta["type"], last) == ("message_start", "message_delta",
                                                    {"type": "message_stop"})
    assert first["message"]["content"] == [] and first["message"]["stop_reason"] is None
    used = first["message"]["usage"]
    assert (used["input_tokens"] + used["cache_read_input_tokens"] == whole["usage"]["input_tokens"]
            + whole["usage"]["cache_read_input_tokens"])
    assert delta["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert delta["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    for index, block in enumerate(whole["content"]):
        its = [event for event in middle if event["index"] == index]
        assert its[0]["type"] == "content_block_start" and its[-1]["type"] == "content_block_stop"
        text = "".join(next((event["delta"][key] for key in ("text", "thinking", "partial_json")
                             if key in event["delta"]), "") for event in its[1:-1])
        assert ((json.loads(text) if block["type"] == "tool_use" else text)
                == block.get("input", block.get("text", block.get("thinking"))))
        empty = {"text": {"text": ""}, "thinking": {"thinking": "", "signature": ""},
                 "tool_use": {"input": {}}}[block["type"]]
        assert (its[0]["content_block"]
                == {k: v for k, v in block.items() if k in ("type", "name")} | empty
                | ({"id": its[0]["content_block"]["id"]} if block["type"] == "tool_use" else {}))
    assert [event["index"] for event in middle] == sorted(event["index"] for event in middle)


# ---- what is understood of a request


HISTORY = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Paint it"},
    {"role": "assistant", "content": "Now.", "reasoning_content": "Which?", "tool_calls": [
        {"id": "call_a", "type": "function",
         "function": {"name": "paint", "arguments": '{"colour": "red", "coats": 2}'}},
        {"id": "call_b", "type": "function", "function": {"name": "stop", "arguments": "{}"}}]},
    {"role": "tool", "tool_call_id": "call_a", "content": "done"},
    {"role": "tool", "tool_call_id": "call_b", "content": "stopped"},
    {"role": "user", "content": "Thanks"},
]
ITEMS = [
    {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
    {"type": "message", "role": "user", "content": "Paint it"},
    {"type": "reasoning", "id": "rs_1", "summary": [],
     "content": [{"type": "reasoning_text", "text": "Which?"}]},
    {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
     "content": [{"type": "output_text", "text": "Now.", "annotations": [], "logprobs": []}]},
    {"type": "function_call", "id": "fc_1", "call_id": "call_a", "name": "paint",
     "arguments": '{"colour": "red", "coats": 2}', "status": "completed"},
    {"type": "function_call", "call_id": "call_b", "name": "stop", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "call_a", "output": "done"},
    {"type": "function_call_output", "call_id": "call_b",
     "output": [{"type": "input_text", "text": "stopped"}]},
    {"role": "user", "content": [{"type": "input_text", "text": "Thanks"}]},
]
CACHED = {"cache_control": {"type": "ephemeral"}}
BLOCKS = [
    {"role": "user", "content": [{"type": "text", "text": "Paint it"} | CACHED]},
    {"role": "assistant", "content": [
        {"type": "thinking", "thinking": "Which?", "signature": "x"},
        {"type": "redacted_thinking", "data": "y"}, {"type": "text", "text": "Now."},
        {"type": "tool_use", "id": "call_a", "name": "paint", "input": {"colour": "red", "coats": 2}},
        {"type": "tool_use", "id": "call_b", "name": "stop", "input": {}}]},
    {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "call_a", "content": "done"},
        {"type": "tool_result", "tool_use_id": "call_b", "content": [{"type": "text", "text": "stopped"}]}
        | CACHED,
        {"type": "text", "text": "Thanks"}]},
]
THINKER = tiny_tools.turns("<tool_call> with arguments </tool_call>").replace(
    "{{ m.content or '' }}",
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content or '' }}")


@pytest.fixture(scope="module")
def thinker():
    """A server whose template shows all of a history."""
    with pybmc.Model(tiny_tools.model("hermes"),
                     threads=1) as model, served(model, chat_template=THINKER, names=["tiny"]) as server:
        yield server


@pytest.mark.parametrize("tools", [True, False])
def test_histories_come_to_the_prompt_of_a_chat(thinker, tools):
    chat = prompt(thinker, CHAT, {"messages": HISTORY} | ({"tools": TOOLS} if tools else {}))
    assert all(text in chat for text in ("Be brief.", "<think>Which?</think>Now.<tool_call>",
                                         "light blue" if tools else "red", "stopped", "Thanks"))
    functions, schemas = ({"tools": FUNCTIONS}, {"tools": SCHEMAS}) if tools else ({}, {})
    assert prompt(thinker, RESPONSES, {"input": ITEMS} | functions) == chat
    assert prompt(thinker, RESPONSES, {"input": ITEMS[1:], "instructions": "Be brief."} | functions) == chat
    system = [{"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=1f;"},
              {"type": "text", "text": "Be brief."} | CACHED]
    for given in ("Be brief.", system):
        assert prompt(thinker, MESSAGES, {"system": given, "messages": BLOCKS} | schemas) == chat


def test_a_text_is_one_message(server):
    block = {"role": "user", "content": [{"type": "text", "text": "Paint it"}]}
    wanted = prompt(server, CHAT, {"messages": HELLO})
    assert prompt(server, RESPONSES, {"input": "Paint it"}) == wanted
    assert prompt(server, MESSAGES, {"messages": HELLO}) == wanted
    assert prompt(server, MESSAGES, {"messages": [block]}) == wanted


def test_answers_that_have_begun_go_on(server):
    begun = [*HELLO, {"role": "assistant", "content": "I will"}]
    chat = prompt(server, CHAT, {"messages": begun})
    assert chat.endswith("I will")
    assert (prompt(server, MESSAGES, {"messages": begun})
            == prompt(server, RESPONSES, {"input": begun}) == chat)
    assert prompt(server, MESSAGES,
                  {"messages": begun, "continue_final_message": False}).endswith("assistant\n")


def test_blocks_of_text_have_a_blank_line_between_them(server):
    blocks = [{"type": "text", "text": "<system-reminder>Be kind</system-reminder>"},
              {"type": "text", "text": "Hello"}]
    assert "</system-reminder>\n\nHello" in prompt(server, MESSAGES,
                                                   {"messages": [{"role": "user", "content": blocks}]})
    failed = {"type": "tool_result", "tool_use_id": "a", "content": "no such file", "is_error": True}
    assert "Error: no such file" in prompt(server, MESSAGES,
                                           {"messages": [{"role": "user", "content": [failed]}]})


def test_answers_can_be_sent_back(thinker):
    for seed in range(3):
        output = respond(thinker, tools=FUNCTIONS, tool_choice="required", seed=seed).json()["output"]
        results = [{"type": "function_call_output", "call_id": item["call_id"], "output": "done"}
                   for item in output if item["type"] == "function_call"]
        again = prompt(thinker, RESPONSES, {"input": [{"role": "user", "content": "Paint it"}, *output,
                                                      *results], "tools": FUNCTIONS})
        content = message(thinker, tools=SCHEMAS, tool_choice={"type": "any"}, seed=seed).json()["content"]
        results = [{"type": "tool_result", "tool_use_id": block["id"], "content": "done"} for block in content
                   if block["type"] == "tool_use"]
        history = [*HELLO, {"role": "assistant", "content": content}, {"role": "user", "content": results}]
        assert prompt(thinker, MESSAGES, {"messages": history, "tools": SCHEMAS}) == again
        assert "<tool_response>done" in again


def test_thoughts_may_be_sealed_or_left_out(servers, thinker):
    server = servers("opened")
    plain = respond(server, max_output_tokens=10, logit_bias={}).json()["output"][0]
    item = respond(server, max_output_tokens=10, logit_bias={},
                   include=["reasoning.encrypted_content"]).json()["output"][0]
    thought = plain["content"][0]["text"]
    assert thought and "encrypted_content" not in plain and unsealed(item["encrypted_content"]) == thought
    lost = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": sealed("Which?")}
    assert (prompt(thinker, RESPONSES, {"input": [*ITEMS[:2], lost, *ITEMS[3:]]})
            == prompt(thinker, RESPONSES, {"input": ITEMS}))
    summed = respond(server, max_output_tokens=10, logit_bias={},
                     reasoning={"summary": "auto"}).json()["output"][0]
    assert summed["summary"] == [{"type": "summary_text", "text": thought}] and "content" not in summed
    found = events(respond(server, max_output_tokens=10, logit_bias={}, reasoning={"summary": "auto"},
                           stream=True))
    kinds = [event["type"].removeprefix("response.reasoning_summary_") for event in found
             if "summary_index" in event]
    assert (kinds[0], kinds[-2:]) == ("part.added", ["text.done", "part.done"])
    assert set(kinds[1:-2]) == {"text.delta"}
    assert "".join(event["delta"] for event in found
                   if event["type"] == "response.reasoning_summary_text.delta") == thought
    lost = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Which?"}]}
    assert (prompt(thinker, RESPONSES, {"input": [*ITEMS[:2], lost, *ITEMS[3:]]})
            == prompt(thinker, RESPONSES, {"input": ITEMS}))
    hidden = {"type": "enabled", "budget_tokens": 4, "display": "omitted"}
    asked = {"max_tokens": 10, "logit_bias": {}}
    shown, left = (message(server, **more, **asked).json()["content"] for more in ({}, {"thinking": hidden}))
    assert left[0]["thinking"] == "" and unsealed(left[0]["signature"]) == shown[0]["thinking"]
    assert left[1:] == shown[1:]
    streamed = events(message(server, thinking=hidden, stream=True, **asked))
    deltas = [event["delta"] for event in streamed if event["type"] == "content_block_delta"
              and event["index"] == 0]
    assert deltas == [{"type": "signature_delta", "signature": left[0]["signature"]}]
    lost = {"type": "thinking", "thinking": "", "signature": sealed("Which?")}
    history = [BLOCKS[0], {"role": "assistant", "content": [lost, *BLOCKS[1]["content"][2:]]}, BLOCKS[2]]
    assert prompt(thinker, MESSAGES, {"messages": history}) == prompt(thinker, MESSAGES, {"messages": BLOCKS})
    assert unsealed("gAAAAABo") == unsealed("pybmc:?") == unsealed("pybmc:/w==") == ""


def test_thinking_reaches_the_template(servers):
    server, off = servers("thinking"), "<think>\n\n</think>\n\n"
    assert prompt(server, MESSAGES, {"messages": HELLO}).endswith(off), "not asked for"
    assert prompt(server, MESSAGES, {"messages": HELLO, "thinking": {"type": "disabled"}}).endswith(off)
    for thinking in ({"type": "enabled", "budget_tokens": 1024}, {"type": "adaptive"}):
        assert not prompt(server, MESSAGES, {"messages": HELLO, "thinking": thinking}).endswith(off)
    assert not prompt(server, RESPONSES, {"input": "Hi"}).endswith(off)
    assert not prompt(server, RESPONSES, {"input": "Hi", "reasoning": {"effort": "low"}}).endswith(off)
    assert prompt(server, RESPONSES, {"input": "Hi", "reasoning": {"effort": "none"}}).endswith(off)


def test_variables_of_the_server_are_those_of_requests_that_say_nothing():
    """Also of those whose prompts are only written or counted."""
    with pybmc.Model(tiny_tools.model("thinking"), threads=1) as model:
        with served(model) as server:
            right = prompt(server, CHAT,
                           {"messages": HELLO, "chat_template_kwargs": {"enable_thinking": False}})
            thinking = prompt(server, CHAT, {"messages": HELLO})
        with served(model, template_variables={"enable_thinking": False}) as server:
            assert (prompt(server, CHAT, {"messages": HELLO})
                    == prompt(server, RESPONSES, {"input": "Paint it"}) == right != thinking)
            assert prompt(server, CHAT,
                          {"messages": HELLO, "chat_template_kwargs": {"enable_thinking": True}}) == thinking
            assert prompt(server, CHAT, {"messages": HELLO, "think": True}) == thinking
            assert server.post("/apply-template", {"messages": HELLO}).json()["prompt"] in right


def test_tools_of_other_kinds_are_left_out_of_responses(server):
    others = [{"type": "web_search"}, {"type": "custom", "name": "apply_patch"}, {"type": "local_shell"}]
    mixed = {"input": "Paint it", "tools": [others[0], FUNCTIONS[0], *others[1:], FUNCTIONS[1]]}
    assert prompt(server, RESPONSES, mixed) == prompt(server, RESPONSES,
                                                      {"input": "Paint it", "tools": FUNCTIONS})
    assert (prompt(server, RESPONSES, {"input": "Paint it", "tools": others, "tool_choice": "auto"})
            == prompt(server, RESPONSES, {"input": "Paint it"}))
    assert respond(server, tools=mixed["tools"], tool_choice="none",
                   max_output_tokens=1).json()["tool_choice"] == "none"


PAINT_ONLY = {"type": "function", "name": "paint"}


@pytest.mark.parametrize("choice", [PAINT_ONLY,
                                    {"type": "allowed_tools", "mode": "required", "tools": [PAINT_ONLY]}])
def test_one_tool_may_be_forced(server, choice):
    for seed in range(3):
        calls = told_by_response(respond(server, tools=FUNCTIONS, tool_choice=choice, seed=seed).json())[2]
        assert {name for name, _ in calls} == {"paint"}
        blocks = message(server, tools=SCHEMAS,
                         seed=seed, tool_choice={"type": "tool", "name": "paint",
                                                 "disable_parallel_tool_use": True}).json()["content"]
        assert [block["name"] for block in blocks] == ["paint"]


def test_schemas_of_answers(server):
    schema = {"type": "object", "properties": {"dry": {"type": "boolean"}}, "required": ["dry"],
              "additionalProperties": False}
    form = {"format": {"type": "json_schema", "name": "wall", "schema": schema, "strict": True}}
    found = respond(server, text=form).json()
    assert set(json.loads(told_by_response(found)[1])) == {"dry"} and found["text"] == form
    asked = {"type": "json_schema", "schema": schema}
    for fields in ({"output_config": {"format": asked}}, {"output_format": asked}):
        assert set(json.loads(told_by_message(message(server, **fields).json())[1])) == {"dry"}


def test_a_thought_that_takes_all_tokens_ends_by_length(servers):
    """There is no JSON then, and every API says why."""
    server, schema = servers("opened"), {"type": "object", "properties": {"dry": {"type": "boolean"}},
                                         "required": ["dry"]}
    form = {"format": {"type": "json_schema", "name": "wall", "schema": schema}}
    body = {"messages": HELLO, "max_tokens": 6, "seed": 1,
            "response_format": {"type": "json_schema", "json_schema": form["format"]}}
    choice, = server.post(CHAT, body).json()["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("length", "")
    assert choice["message"]["reasoning_content"]
    assert '"finish_reason":"length"' in server.post(CHAT, body | {"stream": True}).text
    found = respond(server, text=form, max_output_tokens=6, reasoning_budget=-1, logit_bias={}).json()
    assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert not told_by_response(found)[1]
    found = message(server, output_config=form, max_tokens=6, thinking={"type": "enabled"},
                    logit_bias={}).json()
    assert found["stop_reason"] == "max_tokens" and not told_by_message(found)[1]


def test_reasons(server):
    text = told_by_message(message(server, max_tokens=30, logit_bias={}, thinking=None).json())[1]
    assert message(server, max_tokens=0).json()["content"] == []
    stop = next(text[i:i + 3] for i in range(3, len(text) - 3) if text.find(text[i:i + 3]) == i
                and text[i:i + 3].isprintable())
    found = message(server, max_tokens=30, logit_bias={}, stop_sequences=[stop], thinking=None).json()
    assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", stop)
    assert told_by_message(found)[1] == text[:text.index(stop)]
    last = events(message(server, max_tokens=30, logit_bias={}, stop_sequences=[stop], thinking=None,
                          stream=True))[-2]
    assert last["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": stop}
    ended = message(server, logit_bias=[["<|im_end|>", 100]], thinking=None).json()
    assert (ended["stop_reason"], ended["content"]) == ("end_turn", [{"type": "text", "text": ""}])
    assert told_by_response(respond(server, logit_bias=[["<|im_end|>", 100]]).json()) == ("", "", [])
    cut = respond(server, max_output_tokens=5, logit_bias={}).json()
    assert ((cut["status"], cut["incomplete_details"], cut["output"][-1]["status"])
            == ("incomplete", {"reason": "max_output_tokens"}, "incomplete"))
    assert (events(respond(server, max_output_tokens=5, logit_bias={}, stream=True))[-1]["type"]
            == "response.incomplete")


LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 3, "max_output_tokens": 12,
            "logit_bias": {}}


@pytest.mark.parametrize("name", ["hermes", "thinking"])
def test_log_probabilities_of_a_response_are_those_of_its_text(servers, name):
    """Whole and streamed; of thoughts there are none. They are the chat's."""
    server, ends = servers(name), {"logit_bias": [["</think>", 100]] if name == "thinking" else {}}
    told = {"reasoning_budget": 2, "seed": 3, "temperature": 1} | ends
    whole = respond(server, **LOGPROBS | told).json()
    part, = next(item for item in whole["output"] if item["type"] == "message")["content"]
    assert whole["top_logprobs"] == 3 and part["text"] and len(part["logprobs"]) > 1
    pieces = b"".join(bytes(one["bytes"]) for one in part["logprobs"]).decode(errors="replace")
    assert pieces.rstrip("\ufffd").startswith(part["text"].rstrip("\ufffd"))
    for one in part["logprobs"]:
        assert one["logprob"] <= 0 and len(one["top_logprobs"]) == 3
        assert set(one) == {"token", "logprob", "bytes", "top_logprobs"}
    chat = server.post(CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 3, "max_tokens": 12}
                       | told).json()
    assert chat["choices"][0]["logprobs"]["content"][-len(part["logprobs"]):] == part["logprobs"]
    found = events(respond(server, stream=True, **LOGPROBS | told))
    deltas = [event for event in found if event["type"] == "response.output_text.delta"]
    assert [one for event in deltas for one in event["logprobs"]] == part["logprobs"]
    done, = (event for event in found if event["type"] == "response.output_text.done")
    assert done["logprobs"] == part["logprobs"] and found[-1]["response"]["output"][-1]["content"] == [part]
    plain = respond(server, **LOGPROBS | told | {"include": [], "top_logprobs": 0}).json()
    assert plain["output"][-1]["content"][0]["logprobs"] == []


def test_responses_tell_progress_and_timings(server):
    found = events(respond(server, stream=True, return_progress=True, timings_per_token=True,
                           max_output_tokens=8, logit_bias={}))
    told = [event for event in found if "prompt_progress" in event]
    assert told and {event["type"] for event in told} == {"response.in_progress"}
    assert told[-1]["prompt_progress"]["processed"] == told[-1]["prompt_progress"]["total"] > 0
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    assert all("predicted_per_second" in event["timings"] for event in found
               if event["type"] == "response.output_text.delta")
    assert found[-1]["timings"]["predicted_n"] == 8
    assert not any("timings" in event
                   for event in events(respond(server, stream=True, max_output_tokens=8, logit_bias={})))


def test_calls_that_are_cut(server):
    """A response has what there is of the arguments; a message has an object or nothing."""
    cut = respond(server, tools=FUNCTIONS, tool_choice={"type": "function", "name": "paint"},
                  max_output_tokens=45).json()
    assert cut["status"] == "incomplete" and cut["output"][-1]["type"] == "function_call"
    assert cut["output"][-1]["status"] == "incomplete"
    given = {"tools": SCHEMAS, "tool_choice": {"type": "tool", "name": "paint"}, "max_tokens": 45,
             "thinking": None}
    found = message(server, **given).json()
    assert found["stop_reason"] == "max_tokens" and found["content"] == []
    starts = [event for event in events(message(server, stream=True, **given))
              if event["type"] == "content_block_start"]
    assert starts and starts[-1]["content_block"]["type"] == "tool_use"


def test_counts_are_those_of_the_answer(thinker):
    body = {"system": "Be brief.", "messages": BLOCKS, "tools": SCHEMAS}
    for path in ("/v1/messages/count_tokens", "/messages/count_tokens",
                 "/v1/messages/count_tokens/?beta=true"):
        ids = thinker.service.tokenizer.encode(prompt(thinker, MESSAGES, body), special=True, bos=False)
        assert thinker.post(path, body).json() == {"input_tokens": len(ids)}


def test_prompts_of_one_beginning_share_it(server):
    """A block that changes each time is left out, else nothing would be read again."""
    system = "You are a painter. " * 20
    def ask(n):
        block = {"type": "text", "text": f"x-anthropic-billing-header: cch={n};"}
        return message(server, system=[block, {"type": "text", "text": system}], max_tokens=1,
                       thinking=None).json()["usage"]
    assert ask(1)["cache_read_input_tokens"] < ask(2)["cache_read_input_tokens"]
    assert ask(3)["input_tokens"] < 5


# ---- refusals


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "x"}}


@pytest.mark.parametrize("fields, code, param", [
    ({"input": None}, "invalid_value", "input"), ({"input": []}, "invalid_value", "input"),
    ({"input": 3}, "invalid_value", "input"), ({"input": ["x"]}, "unsupported_parameter", "input[0]"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "unsupported_parameter", "input[0]"),
    ({"input": [{"content": "x"}]}, "invalid_value", "input[0].role"),
    ({"input": [{"role": "tool", "content": "x"}]}, "invalid_value", "input[0].role"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "unsupported_parameter",
     "input[0].content[0]"),
    ({"input": [{"type": "function_call", "name": "x"}]}, "invalid_value", "input[0].call_id"),
    ({"input": [{"type": "function_call_output", "call_id": "x", "output": [{"type": "input_file"}]}]},
     "unsupported_parameter", "input[0].output[0]"),
    ({"input": [{"type": "reasoning", "content": ["x"]}]}, "invalid_value", "input[0].content"),
    ({"input": [{"type": ["x"]}]}, "unsupported_parameter", "input[0]"),
    ({"input": [{"type": "reasoning", "summary": []}]}, "invalid_value", "input"),
    ({"instructions": 3}, "invalid_value", "instructions"),
    ({"max_output_tokens": -1}, "invalid_value", "max_output_tokens"),
    ({"previous_response_id": "resp_1"}, "unsupported_parameter", "previous_response_id"),
    ({"conversation": "c"}, "unsupported_parameter", "conversation"),
    ({"background": True}, "unsupported_parameter", "background"),
    ({"prompt": {"id": "x"}}, "unsupported_parameter", "prompt"),
    ({"include": "message.output_text.logprobs"}, "invalid_value", "include"),
    ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
    ({"include": ["message.output_text.logprobs"], "top_logprobs": 21}, "invalid_value", "top_logprobs"),
    ({"tools": [3]}, "invalid_value", "tools[0]"),
    ({"tools": [{"type": "web_search"}, {"type": "function"}]}, "invalid_value", "tools"),
    ({"tools": FUNCTIONS, "tool_choice": {"type": "web_search"}}, "invalid_value", "tool_choice.type"),
    ({"tools": FUNCTIONS, "tool_choice": {"type": "function", "name": "x"}}, "invalid_value", "tool_choice"),
    ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
    ({"text": {"format": {"type": "xml"}}}, "invalid_value", "text.format.type"),
    ({"text": {"format": {"type": "json_schema"}}}, "invalid_value", "text.format.schema"),
    ({"text": {"format": {"type": "json_schema", "schema": {"type": "colour"}}}}, "unsupported_schema",
     "text.format"),
    ({"tools": [{"type": "function", "name": "f", "parameters": {"properties": {"a": {"type": "x"}}}}]},
     "unsupported_schema", "tools"),
    ({"reasoning": {"effort": 3}}, "invalid_value", "reasoning.effort"),
    ({"reasoning": {"summary": "long"}}, "invalid_value", "reasoning.summary"),
    ({"temperature": -1}, "invalid_value", "temperature"),
    ({"stream": "x"}, "invalid_value", "stream"), ({"truncation": "x"}, "invalid_value", "truncation"),
    ({"input": "a " * 5000}, "context_length_exceeded", None),
], ids=range(37))
def test_what_responses_refuse(server, fields, code, param):
    response = respond(server, **fields)
    error = response.json()["error"]
    assert ((response.status_code, error["type"], error["code"], error["param"])
            == (400, "invalid_request_error", code, param))


@pytest.mark.parametrize("fields, told", [
    ({"max_tokens": None}, "max_tokens is missing"),
    ({"max_tokens": -1}, "max_tokens is -1"), ({"messages": []}, "messages is empty"),
    ({"messages": ["x"]}, "messages[0] is no object"), ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0] is of type 'image'"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "x", "content": [IMAGE]}]}]},
     "messages[0].content[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_use_id"),
    ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "name": "x"}]}]}, "content[0].id"),
    ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "x",
                                                      "input": "y"}]}]}, "content[0].input"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "of type 'tool_use'"),
    ({"system": 3}, "system is 3"), ({"system": [IMAGE]}, "system[0]"),
    ({"stop_sequences": [""]}, "stop_sequences is"),
    ({"stop_sequences": ["x" * 300]}, "stop_sequences has a text of 300"),
    ({"tools": [{"name": "x"}]}, "tools[0].input_schema is missing"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
     "tools[0] is of type 'web_search_20250305'"), ({"tools": ["x"]}, "tools[0]"),
    ({"tools": [{"name": "f", "input_schema": {"properties": {"a": {"type": "x"}}}}]},
     "tools[0].input_schema"),
    ({"tools": SCHEMAS, "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
    ({"tools": SCHEMAS, "tool_choice": {"type": "x"}}, "tool_choice.type"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"), ({"thinking": {"type": "x"}}, "thinking.type"),
    ({"thinking": {"type": "enabled", "budget_tokens": "x"}}, "thinking.budget_tokens"),
    ({"temperature": -1}, "temperature is -1"),
    ({"output_config": {"format": {"type": "x"}}}, "output_config.format.type"),
    ({"output_format": {"type": "json_schema"}}, "output_format.schema"),
    ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"), ({"container": "x"}, "container"),
    ({"messages": [{"role": "user", "content": "a " * 5000}]}, "context size of 4000"),
    ({"stream": 1}, "stream is 1"),
], ids=range(35))
def test_what_messages_refuse(server, fields, told):
    response = message(server, **fields)
    found = response.json()
    assert ((response.status_code, found["type"], found["error"]["type"])
            == (400, "error", "invalid_request_error") and told in found["error"]["message"]), found


def shape_of(response, path):
    """(status, type) of an error, which has the shape of its path and nothing more."""
    found = response.json()
    if path != MESSAGES:
        assert found.keys() == {"error"} and found["error"].keys() == {"message", "type", "param", "code"}
    else:
        assert found.keys() == {"type", "error"} and found["type"] == "error"
        assert found["error"].keys() == {"type", "message"}
    assert found["error"]["message"] and "Traceback" not in response.text
    return response.status_code, found["error"]["type"]


PATHS = [(RESPONSES, {"input": "Paint it", "max_output_tokens": 100}),
         (MESSAGES, {"messages": HELLO, "max_tokens": 100})]


@pytest.mark.parametrize("path, body", PATHS, ids=["responses", "messages"])
def test_every_row_of_the_table_of_errors(model, monkeypatch, path, body):
    ours = path == RESPONSES
    with served(model, Policy(keys=["key"], max_body=5000), names=["tiny"], strict_model=True, parallel=1,
                queue=1, queue_seconds=0.3) as server:
        server.client.headers["x-api-key"] = "key"
        post = lambda body=body, **more: shape_of(server.client.post(path, **({"json": body} | more)), path)
        assert shape_of(server.client.post(path, content=b"{"), path) == (400, "invalid_request_error")
        assert post(headers={"x-api-key": "wrong"}) == (401, "authentication_error")
        assert (post(headers={"host": "evil.com"}) == post(headers={"origin": "https://evil.com"})
                == (403, "permission_error"))
        assert post(body | {"model": "other"}) == (404, "not_found_error")
        assert shape_of(server.client.get(path), path) == (405, "invalid_request_error")
        assert post(body | {"user": "x" * 6000}) == (413,
                                                     "invalid_request_error" if ours else "request_too_large")
        with monkeypatch.context() as patch:
            patch.setattr(http, "BODY_SECONDS", 0.1)
            with server.connect() as connection:
                connection.sendall(b"POST %s HTTP/1.1\r\nHost: localhost\r\nX-Api-Key: key\r\n"
                                   b"Content-Length: 9\r\n\r\n{" % path.encode())
                told = read_to(connection, b"}}")
            assert b"408" in told.split(b"\r\n")[0] and b'"timeout_error"' in told
            assert (b'"type":"error"' in told) != ours
        with monkeypatch.context() as patch:
            patch.setattr(server.service.metrics, "clock", lambda *_: 1 / 0)
            assert post() == (500, "server_error" if ours else "api_error")
        until(lambda: not server.service.worker.runs)
        gate, unavailable = Gate(server), (503, "unavailable_error" if ours else "overloaded_error")
        server.service.settings.queue_seconds = 0.1
        assert post() == unavailable, "it waited too long"
        until(lambda: not server.service.worker.runs)
        server.service.worker.queue = 0
        assert post() == (429, "rate_limit_error")
        server.service.closing = True
        gate.open()
        assert post() == unavailable


@pytest.mark.parametrize("path, body", PATHS, ids=["responses", "messages"])
def test_while_the_model_loads(model, path, body):
    go = threading.Event()
    starting = Served(lambda: go.wait(20) and Service(model, settings=Settings()))
    try:
        assert shape_of(starting.post(path, body), path)[0] == 503
    finally:
        go.set()
        starting.ready().close()


@pytest.mark.parametrize("path", ["/v1/messages", "/messages", "/v1/messages/count_tokens"])
def test_every_status_has_a_type_of_the_clients(path):
    error_type = pytest.importorskip("anthropic.types.shared.error_type",
                                     reason="needs the anthropic package").ErrorType
    known = {*error_type.__args__, "request_too_large"}
    assert {error_body(path, Refused(status, "x", "y"))["error"]["type"] for status in TYPES} <= known
    assert error_body("/v1/responses", Refused(503, "x", "y"))["error"]["type"] == "unavailable_error"


@pytest.mark.parametrize("path, body", PATHS, ids=["responses", "messages"])
def test_what_fails_later_is_the_last_event(model, path, body):
    with served(model, memory=50 * model.config.kv_row_bytes) as server:
        assert shape_of(server.post(path, body | {"temperature": 0}), path)[0] == 503
        found = events(server.post(path, body | {"temperature": 0, "stream": True}))
    if path == MESSAGES:
        assert found[0]["type"] == "message_start" and found[-1]["type"] == "error"
        assert found[-1]["error"]["type"] == "overloaded_error"
    else:
        assert found[-1]["type"] == "response.failed" and found[-1]["sequence_number"] == len(found) - 1
        failed = found[-1]["response"]
        assert failed["status"] == "failed" and failed["error"]["code"] == "out_of_memory"
        assert failed["output"][0]["status"] == "incomplete"


@pytest.mark.parametrize("path, body", PATHS, ids=["responses", "messages"])
def test_a_stream_tells_that_it_is_alive(model, monkeypatch, path, body):
    monkeypatch.setattr(http, "SILENCE", 0.05)
    sign = 'event: ping\ndata: {"type":"ping"}\n\n' if path == MESSAGES else "event: response.in_progress\n"
    with served(model) as server:
        gate, found = Gate(server, 1), ""
        with httpx.stream("POST", server.url + path,
                          json=body | {"stream": True, "temperature": 0}) as response:
            for text in response.iter_text():
                found += text
                if found.count(sign) >= 2:
                    gate.open()
        assert found.count(sign) >= 2
        numbers = [int(number) for number in re.findall(r'"sequence_number":(\d+)', found)]
        assert numbers == list(range(len(numbers))) and bool(numbers) == (path == RESPONSES)
        assert found.count("event: message_stop" if path == MESSAGES else "event: response.incomplete") == 1


@pytest.mark.parametrize("path, body", PATHS, ids=["responses", "messages"])
def test_who_leaves_costs_nothing(model, path, body):
    with served(model) as server:
        gate = Gate(server, 2)
        connection = server.begin(path, body | {"stream": True})
        until(lambda: gate.steps == 2)
        connection.close()
        until(lambda: not server.service.worker.runs)
        gate.open()
        until(lambda: not server.engine.running and not server.engine.waiting)


def test_paths_without_a_version(server):
    for path, body in PATHS:
        assert server.post(path.removeprefix("/v1"),
                           body | {"max_tokens": 1, "max_output_tokens": 1}).status_code == 200
    assert server.post("/messages", {"messages": []}).json()["type"] == "error"
    assert shape_of(server.post("/v1/messages/batches", {}), MESSAGES) == (404, "not_found_error")


WHOLE = {
    CHAT: {"messages": HISTORY,
           "tools": TOOLS[:1], "tool_choice": {"type": "function", "function": {"name": "paint"}},
           "stop": ["x"], "response_format": {"type": "json_schema",
                                              "json_schema": {"name": "x", "schema": {"type": "object"}}}},
    RESPONSES: {"input": ITEMS, "tools": FUNCTIONS[:1], "tool_choice": {"type": "function", "name": "paint"},
                "instructions": "x", "include": ["x"], "reasoning": {"effort": "low", "summary": "auto"},
                "text": {"format": {"type": "json_schema", "schema": {}}}, "metadata": {"a": "b"}},
    MESSAGES: {"system": [{"type": "text", "text": "x"}],
               "messages": BLOCKS, "tools": SCHEMAS[:1], "tool_choice": {"type": "tool", "name": "paint"},
               "thinking": {"type": "enabled", "budget_tokens": 3}, "output_config": {"effort": "low"},
               "stop_sequences": ["x"]},
}


def spoiled(value, other):
    """Copies of a value in each of which one part is another."""
    yield other
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        for one in spoiled(value[key], other):
            copy = value.copy()
            copy[key] = one
            yield copy


@pytest.mark.parametrize("path", WHOLE)
def test_no_value_of_another_type_is_an_internal_error(server, path):
    most = {RESPONSES: "max_output_tokens"}.get(path, "max_tokens")
    assert server.post(path, WHOLE[path] | {most: 0}).status_code == 200
    for other in (3, "x", [[]], {"x": ["y"]}):
        for body in spoiled(WHOLE[path], other):
            if isinstance(body, dict) and body != other:
                response = server.post(path, body | {most: 0})
                assert response.status_code in (200, 400), (body, response.text)
                assert (response.status_code == 200
                        or shape_of(response, path) == (400, "invalid_request_error"))


# ---- the official clients


@pytest.fixture(scope="module")
def openai(server):
    package = pytest.importorskip("openai", reason="needs the openai package")
    with package.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def checked(value):
    """A value of a client's type, with all that this has to have and nothing else."""
    type(value).model_validate(value.model_dump(), strict=True)
    assert not value.model_extra, value.model_extra
    return value


def test_openai_client(servers):
    package = pytest.importorskip("openai", reason="needs the openai package")
    for name in ("hermes", "opened"):
        with package.OpenAI(base_url=f"{servers(name).url}/v1", api_key="none", max_retries=0) as client:
            given = {"model": "tiny", "input": "Paint it", "tools": FUNCTIONS, "tool_choice": "required",
                     "max_output_tokens": 300, "extra_body": {"seed": 1, "reasoning_budget": 4} | BIAS}
            whole = checked(client.responses.create(**given))
            assert whole.output[-1].type == "function_call" and whole.status == "completed"
            for reasoning in ({}, {"summary": "auto"}):
                for event in client.responses.create(stream=True, reasoning=reasoning, **given):
                    checked(event)
            with client.responses.stream(**given) as stream:
                kinds = {event.type for event in stream}
                final = stream.get_final_response()
            assert "response.function_call_arguments.delta" in kinds
            calls = [(item.name, item.arguments) for item in whole.output if item.type == "function_call"]
            assert [(item.name, item.arguments) for item in final.output
                    if item.type == "function_call"] == calls
            output = [{"type": "function_call_output", "call_id": item.call_id, "output": "done"}
                      for item in whole.output if item.type == "function_call"]
            given |= {"input": [{"role": "user", "content": "Paint it"}, *whole.output, *output],
                      "tool_choice": "none", "max_output_tokens": 20}
            given["extra_body"] = {"seed": 1, "reasoning_budget": 4}
            answer = checked(client.responses.create(**given))
            assert answer.output_text and answer.incomplete_details.reason == "max_output_tokens"
            with client.responses.stream(**given) as stream:
                assert ("".join(event.delta for event in stream if event.type == "response.output_text.delta")
                        == answer.output_text)


def test_openai_client_parses_answers(openai):
    pydantic = pytest.importorskip("pydantic")

    class Wall(pydantic.BaseModel):
        dry: bool

    given = {"model": "tiny", "input": "Paint it", "text_format": Wall, "extra_body": BIAS}
    assert isinstance(openai.responses.parse(**given).output_parsed, Wall)
    with openai.responses.stream(**given) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Wall)


def test_openai_errors(openai):
    package = pytest.importorskip("openai", reason="needs the openai package")
    with pytest.raises(package.BadRequestError) as told:
        openai.responses.create(model="tiny", input="x", previous_response_id="resp_1")
    assert told.value.param == "previous_response_id" and told.value.code == "unsupported_parameter"


@pytest.fixture(scope="module")
def anthropic(servers):
    package = pytest.importorskip("anthropic", reason="needs the anthropic package")
    with package.Anthropic(base_url=servers("opened").url, api_key="none", max_retries=0) as client:
        yield client


def test_anthropic_client(anthropic):
    given = {"model": "tiny", "messages": HELLO, "tools": SCHEMAS, "tool_choice": {"type": "any"},
             "max_tokens": 300, "thinking": {"type": "enabled", "budget_tokens": 4},
             "extra_body": {"seed": 1} | BIAS}
    whole = checked(anthropic.messages.create(**given))
    assert whole.stop_reason == "tool_use" and [block.type for block in whole.content][0] == "thinking"
    for event in anthropic.messages.create(stream=True, **given):
        checked(event)
    with anthropic.messages.stream(**given) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_message()
    assert {"thinking", "input_json", "content_block_stop", "message_stop"} <= kinds
    strip = lambda found: [block.model_dump(exclude={"id", "parsed_output"}) for block in found.content]
    assert strip(final) == strip(whole) and final.stop_reason == "tool_use"
    results = [{"type": "tool_result", "tool_use_id": block.id, "content": "done"} for block in whole.content
               if block.type == "tool_use"]
    history = [*HELLO, {"role": "assistant", "content": whole.content}, {"role": "user", "content": results}]
    more = {"messages": history, "tool_choice": {"type": "none"}, "max_tokens": 20, "extra_body": {"seed": 1}}
    answer = checked(anthropic.messages.create(**given | more))
    assert answer.stop_reason == "max_tokens" and answer.content[-1].text
    with anthropic.messages.stream(**given | more) as stream:
        assert "".join(stream.text_stream) == answer.content[-1].text


def test_anthropic_client_counts(anthropic):
    given = {"model": "tiny", "messages": HELLO, "system": "Be brief.", "tools": SCHEMAS}
    usage = anthropic.messages.create(max_tokens=1, **given).usage
    assert (checked(anthropic.messages.count_tokens(**given)).input_tokens == usage.input_tokens
            + usage.cache_read_input_tokens)


def test_anthropic_errors(model):
    package = pytest.importorskip("anthropic", reason="needs the anthropic package")
    with served(model, Policy(keys=["secret"]), names=["tiny"], strict_model=True,
                memory=50 * model.config.kv_row_bytes) as server:
        given = {"model": "tiny", "messages": HELLO, "max_tokens": 100, "extra_body": {"temperature": 0}}
        with package.Anthropic(base_url=server.url, api_key="wrong",
                               max_retries=0) as stranger, pytest.raises(package.AuthenticationError):
            stranger.messages.create(**given)
        with package.Anthropic(base_url=server.url, api_key="secret", max_retries=0) as client:
            with pytest.raises(package.BadRequestError, match="max_tokens is -1"):
                client.messages.create(**given | {"max_tokens": -1})
            with pytest.raises(package.NotFoundError):
                client.messages.create(**given | {"model": "other"})
            with pytest.raises(package.APIStatusError,
                               match="overloaded_error"), client.messages.stream(**given) as stream:
                list(stream)
