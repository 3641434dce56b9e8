"""Tools: what is offered and chosen, prompts with calls and results, what answers have to follow,
and who reads them."""

import json

import pytest
import tiny_tools
from hypothesis import given, settings
from hypothesis import strategies as st

import pybmc
from pybmc.chat.events import CallArguments, CallBegin, Content, Thought
from pybmc.chat.template import ChatTemplate
from pybmc.chat.tools import format_of, tools_of
from pybmc.chat.turn import Turn
from pybmc.errors import ArgumentError, SchemaError
from pybmc.grammar.asked import asked

PAINT = {"type": "function", "function": {"name": "paint", "description": "Paint a wall", "parameters": {
    "type": "object", "properties": {"colour": {"type": "string", "enum": ["red", "light blue"]},
                                     "coats": {"type": "integer", "minimum": 1, "maximum": 9},
                                     "dry": {"type": "boolean"}}, "required": ["colour", "coats"]}}}
STOP = {"type": "function", "function": {"name": "stop"}}
HELLO = [{"role": "user", "content": "Paint it"}]
COLOURS = {"red", "light blue"}


def fits(name, arguments):
    """Whether arguments are what a tool takes."""
    if name == "stop":
        return arguments == {}
    return (name == "paint" and {"colour", "coats"} <= set(arguments) <= {"colour", "coats", "dry"}
            and arguments["colour"] in COLOURS
            and type(arguments["coats"]) is int and 1 <= arguments["coats"] <= 9
            and arguments.get("dry", True) in (True, False))


@pytest.fixture(scope="module")
def models():
    """name -> (model, template); opened when they are first asked for."""
    made = {}

    def get(name):
        if name not in made:
            model = pybmc.Model(tiny_tools.model(name), threads=1)
            made[name] = model, ChatTemplate(None, model.tokenizer)
        return made[name]

    yield get
    for model, _ in made.values():
        model.close()


def turn(models, name, messages=HELLO, tools=(PAINT, STOP), choice=None, **more):
    offered = tools_of(list(tools), choice, more.pop("parallel", True))
    return Turn(*models(name), messages, offered, **more)


def follow(made, text):
    """How much of a text the schema of a turn's answer allows, in the vocabulary's tokens,
    and whether it may end there."""
    tokenizer, schema = made.template.tokenizer, made.schema()
    for n, id in enumerate(tokenizer.encode(text, bos=False, special=True)):
        mask = schema.mask(())
        if mask is not None and not mask[id // 32] >> (id % 32) & 1:
            return tokenizer.decode(tokenizer.encode(text, bos=False, special=True)[:n], special=True,
                                    continued=True), False
        schema.accept(id)
    mask, end = schema.mask(()), tokenizer.eot_id
    return text, mask is None or bool(mask[end // 32] >> (end % 32) & 1)


def read(made, text):
    reader = made.reader()
    return reader.push(text) + reader.flush()


def calls_of(events):
    found = []
    for event in events:
        if isinstance(event, CallBegin):
            found.append([event.name, ""])
        elif isinstance(event, CallArguments):
            found[event.index][1] += event.text
    return [(name, json.loads(text)) for name, text in found]


# ---- what is offered and chosen


def test_formats_are_told_by_their_templates(models):
    assert {name: format_of(models(name)[1]).name for name in tiny_tools.TEMPLATES} == \
        {name: name for name in tiny_tools.TEMPLATES} | {"thinking": "hermes", "opened": "hermes"}


@pytest.mark.parametrize("choice, left, forced", [
    (None, ["paint", "stop"], False),
    ("auto", ["paint", "stop"], False), ("required", ["paint", "stop"], True),
    ("any", ["paint", "stop"], True), ({"type": "function", "function": {"name": "stop"}}, ["stop"], True),
    ({"name": "paint"}, ["paint"], True),
])
def test_choices(choice, left, forced):
    tools = tools_of([PAINT, STOP], choice)
    assert ([tool.name for tool in tools.callable], tools.forced) == (left, forced)


def test_older_names_mean_the_same():
    old = tools_of(None, None, True, [PAINT["function"]], {"name": "paint"})
    assert old.choice == "paint" and old.tools == tools_of([PAINT], None).tools
    assert tools_of([PAINT], "none") is None and tools_of(None, None) is None and tools_of([], "none") is None


@pytest.mark.parametrize("tools, choice, message", [
    ([{"type": "function"}], None, r"tools\[0\]: expected an object"),
    ([{"type": "web_search"}], None, r"tools\[0\]: expected"), ([5], None, r"tools\[0\]"),
    ("x", None, "tools: expected a list"),
    ([{"type": "function", "function": {"name": "a b"}}], None,
     r"tools\[0\].function.name: expected .*found 'a b'"),
    ([{"type": "function", "function": {"name": "a", "parameters": []}}], None,
     "parameters: expected a JSON schema of an object"),
    ([{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}], None,
     "parameters: expected a JSON schema"),
    ([{"type": "function", "function": {"name": "a", "description": 3}}], None,
     "description: expected a text"),
    ([{"type": "function", "function": {"name": "a", "parameters": {"required": 5}}}], None,
     "required: expected a list of names"),
    ([{"type": "function", "function": {"name": "a", "parameters": {"required": [["x"]]}}}], None,
     "required: expected a list of names"),
    ([PAINT, PAINT], None, "paint is there twice"),
    ([PAINT], {"type": "function", "function": {"name": "x"}}, "expected one of paint, found 'x'"),
    ([PAINT], "paint", "expected none, auto, required"), ([], "required", "there are no tools"),
    ([PAINT], 3, "tool_choice"),
    ([PAINT] * 600, None, "at most 512"),
])
def test_what_is_no_tool_is_refused(tools, choice, message):
    with pytest.raises(ArgumentError, match=message):
        tools_of(tools, choice)


# ---- prompts


@pytest.mark.parametrize("name", tiny_tools.TEMPLATES)
def test_prompts_show_the_tools_and_the_history(models, name):
    call = {"id": "call_1", "type": "function",
            "function": {"name": "paint", "arguments": '{"colour": "red", "coats": 2}'}}
    other = {"id": "call_2", "type": "function", "function": {"name": "stop", "arguments": ""}}
    history = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call, other]},
               {"role": "tool", "tool_call_id": "call_1",
                "content": [{"type": "text", "text": "it is "}, {"type": "text", "text": "red"}]},
               {"role": "tool", "tool_call_id": "call_2", "content": "stopped"}]
    made = turn(models, name, history)
    text = made.template.tokenizer.decode(made.tokens, special=True)
    assert "Paint a wall" in text and "it is red" in text and "stopped" in text
    assert text.index("it is red") < text.index("stopped")
    if name == "qwen-coder":
        assert "<parameter=colour>\nred\n" in text
    else:
        assert '{"colour": "red", "coats": 2}' in text and "{}" in text


def test_older_calls_in_the_history(models):
    old = [*HELLO,
           {"role": "assistant", "content": None, "function_call": {"name": "stop", "arguments": "{}"}},
           {"role": "function", "name": "stop", "content": "done"}]
    text = models("hermes")[1].tokenizer.decode(turn(models, "hermes", old).tokens, special=True)
    assert '<tool_call>\n{"name": "stop", "arguments": {}}' in text
    assert "<tool_response>done</tool_response>" in text


@pytest.mark.parametrize("calls", [[5], [{"function": {}}], [{"id": "x"}], "x", [{"function": {"name": 3}}]])
def test_calls_in_the_history_that_are_none(models, calls):
    with pytest.raises(ArgumentError, match=r"messages\[1\].tool_calls"):
        turn(models, "hermes", [*HELLO, {"role": "assistant", "content": "x", "tool_calls": calls}])


@pytest.mark.parametrize("name", tiny_tools.TEMPLATES)
def test_no_result_and_no_message_spells_a_token_of_the_format(models, name):
    """Every name of a token that is not text, in each place that comes from outside;
    the prompt has the template's own only."""
    names = [*tiny_tools.CONTROLS, *tiny_tools.TAGS, "<|im_start|>", "<|im_end|>"]
    template = models(name)[1]

    def tokens(hostile):
        tool = {"type": "function", "function": {"name": "stop", "description": "d" + hostile, "parameters": {
            "type": "object", "properties": {"a": {"type": "string", "description": hostile}}}}}
        inner = hostile if name != "plain" else ""          # there a call is text of the assistant
        call = {"id": "c", "function": {"name": "stop", "arguments": json.dumps({"a": inner})}}
        history = [{"role": "system", "content": "s" + hostile}, {"role": "user", "content": "u" + hostile},
                   {"role": "assistant", "content": None, "tool_calls": [call]},
                   {"role": "tool", "tool_call_id": "c", "content": "t" + hostile},
                   {"role": "user", "content": hostile + "again"}]
        ids = turn(models, name, history, [tool]).tokens
        known = {template.tokenizer.vocab.ids[n] for n in names}
        return [id for id in ids if id in known]

    assert tokens("".join(names)) == tokens("")


# ---- what answers have to follow


CALLS = {
    "hermes": ['<tool_call>\n{"name": "paint", "arguments": {"colour": "red", "coats": 3}}\n</tool_call>',
               '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>\n<tool_call>\n'
               '{"name": "stop", "arguments": {}}\n</tool_call>'],
    "qwen-coder": ["<tool_call>\n<function=paint>\n<parameter=colour>\nlight blue\n</parameter>\n"
                   "<parameter=coats>\n3\n</parameter>\n"
                   "<parameter=dry>\ntrue\n</parameter>\n</function>\n</tool_call>",
                   "<tool_call>\n<function=stop>\n</function>\n</tool_call>"],
    "mistral": ['[TOOL_CALLS]paint[ARGS]{"colour": "red", "coats": 3}',
                '[TOOL_CALLS]stop[ARGS]{}[TOOL_CALLS]stop[ARGS]{}'],
    "mistral-list": ['[TOOL_CALLS][{"name": "stop", "arguments": {}}, {"name": "paint", "arguments": '
                     '{"colour": "red", "coats": 3}}]'],
    "llama3": ['{"name": "paint", "parameters": {"colour": "red", "coats": 3}}'],
    "harmony": ['<|channel|>commentary to=functions.paint <|constrain|>json<|message|>{"colour": "red", '
                '"coats": 3}',
                '<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary '
                'to=functions.stop<|message|>{}'],
    "plain": ['{"name": "paint", "arguments": {"colour": "red", "coats": 3}}'],
}
WRONG = [('"coats": 3', '"coats": 30'), ('"red"', '"green"'), ("paint", "print"), ("3", "x"),
         ('"colour": "red", ', ""), ("light blue", "blue")]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("choice", ["required", "auto"])
def test_calls_are_allowed_and_fit(models, name, choice):
    made = turn(models, name, choice=choice)
    for text in CALLS[name]:
        assert follow(made, text) == (text, True)
        found = calls_of(read(made, text))
        assert found and all(fits(*call) for call in found)
        for right, wrong in WRONG:
            changed = text.replace(right, wrong)
            # JSON that names no tool
            free = name in ("llama3", "plain") and choice == "auto" and wrong == "print"
            if changed != text and "analysis" not in text and not free:
                assert follow(made, changed) != (changed, True), "what does not fit is not allowed"


@pytest.mark.parametrize("name", CALLS)
def test_without_a_need_an_answer_is_free(models, name):
    made = turn(models, name, choice="auto")
    text = "<|channel|>final<|message|>Hello {there}" if name == "harmony" else 'Hello {"name": there}'
    assert follow(made, text) == (text, True)
    assert follow(turn(models, name, choice="required"), text)[1] is False


@pytest.mark.parametrize("name", ["hermes", "mistral", "qwen-coder"])
def test_text_may_stand_before_a_call_that_is_not_forced(models, name):
    made, text = turn(models, name), "I will.\n" + CALLS[name][0]
    assert follow(made, text) == (text, True)
    events = read(made, text)
    assert "".join(e.text for e in events if isinstance(e, Content)) == "I will."
    assert len(calls_of(events)) == 1


@pytest.mark.parametrize("begin, end", [("```json\n", "\n```"), ("<tools>", "</tools>"), ("", ""),
                                        ("\n```", "```"), ("{", "}")])
def test_calls_without_the_tag(models, begin, end):
    """As Qwen's coders write some, where no call is forced."""
    text = begin + '{\n  "name": "paint",\n  "arguments": {"colour": "red", "coats": 3}\n}' + end
    made = turn(models, "hermes")
    assert follow(made, text) == (text, True)
    assert calls_of(read(made, text)) == [("paint", {"colour": "red", "coats": 3})]
    wrong = text.replace("red", "green")
    assert follow(made, wrong) != (wrong, True)
    assert follow(made, begin + '{"name": "Bob", "age": 3}' + end)[1] is True


@pytest.mark.parametrize("name", ["hermes", "mistral", "mistral-list"])
def test_one_call_where_several_are_not_wanted(models, name):
    text = {"hermes": CALLS["hermes"][1], "mistral": CALLS["mistral"][1],
            "mistral-list": CALLS["mistral-list"][0]}[name]
    assert follow(turn(models, name, choice="required"), text) == (text, True)
    assert follow(turn(models, name, choice="required", parallel=False), text) != (text, True)


def test_a_named_tool_is_the_only_one(models):
    made = turn(models, "hermes", choice={"type": "function", "function": {"name": "stop"}})
    assert follow(made, CALLS["hermes"][0])[1] is False and follow(made, CALLS["hermes"][1])[1] is True


@pytest.mark.parametrize("name, begin",
                         [("thinking", ""), ("thinking", "<think>\nI paint <tool_call> maybe\n</think>\n\n"),
                          ("opened", "I paint\n</think>\n\n")])
def test_thoughts_come_before_a_forced_call(models, name, begin):
    made, text = turn(models, name, choice="required"), begin + CALLS["hermes"][0]
    assert follow(made, text) == (text, True)
    events = read(made, text)
    assert calls_of(events) == [("paint", {"colour": "red", "coats": 3})]
    assert not any(isinstance(e, Content) for e in events)
    assert bool(begin) == any(isinstance(e, Thought) for e in events)


def test_a_call_or_an_answer_of_a_schema(models):
    wish = asked({"json_schema": {"type": "object", "properties": {"n": {"type": "integer"}},
                                  "required": ["n"], "additionalProperties": False}})
    for name in CALLS:
        made = turn(models, name, wish=wish)
        final = "<|channel|>final<|message|>" * (name == "harmony") + '{"n":3}'
        call = CALLS[name][0]
        for text in (final,
                     call if name not in ("llama3", "plain") else call.replace(": ", ":").replace(", ", ",")):
            assert follow(made, text) == (text, True)
        assert follow(made, final.replace("3", '"3"'))[1] is False
    wish = asked({"json_schema": {"type": "object", "properties": {"name": {"type": "string"}},
                                  "required": ["name"], "additionalProperties": False}})
    for name in ("hermes", "llama3", "plain"):          # an answer that looks like the beginning of a call
        made = turn(models, name, wish=wish)
        assert follow(made, '{"name":"stop"}')[1] is True
        assert [e.text for e in read(made, '{"name":"stop"}')] == ['{"name":"stop"}']
    with pytest.raises(ArgumentError, match="grammar: expected no tools"):
        turn(models, "hermes", wish=asked({"grammar": 'root ::= "a"'}))


SCHEMAS = [
    ({"type": "object",
      "properties": {"at": {"$ref": "#/$defs/at"}, "note": {"type": "string"}}, "required": ["at", "note"],
      "$defs": {"at": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}}},
     {"at": [1, 2.5], "note": "a\nb </x> \"q\""}),
    ({"type": "object", "properties": {"code": {"type": "string", "pattern": "^[A-Z]{3}$"}},
      "required": ["code"]}, {"code": "ABC"}),
    ({"type": "object", "properties": {"kind": {"type": ["string", "null"]}, "tags": {
        "type": "object", "additionalProperties": {"type": "integer"}}}},
     {"kind": None, "tags": {"a": 1}}),
    ({"type": "object", "anyOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]}]}, {"a": 1}),
    ({"type": "object"}, {}),
]


def written(name, tool, arguments):
    """A call of a tool as a format writes it."""
    if name == "qwen-coder" and "anyOf" not in str(tool):
        values = {k: v if isinstance(v, str) and "pattern" not in str(tool) else json.dumps(v)
                  for k, v in arguments.items()}
        inner = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in values.items())
        return f"<tool_call>\n<function=f>\n{inner}</function>\n</tool_call>"
    return f'<tool_call>\n{{"name": "f", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


@pytest.mark.parametrize("name", ["hermes", "qwen-coder"])
@pytest.mark.parametrize("schema, arguments", SCHEMAS, ids=range(len(SCHEMAS)))
def test_schemas_of_arguments(models, name, schema, arguments):
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    made, text = turn(models, name, tools=[tool], choice="required"), written(name, tool, arguments)
    assert follow(made, text) == (text, True)
    assert calls_of(read(made, text)) == [("f", arguments)]


def test_schemas_that_cannot_be_followed_are_refused(models):
    for parameters in ({"type": "object", "properties": {"a": {"type": "colour"}}},
                       {"type": "object", "properties": {"a": {"$ref": "http://x/y"}}}):
        with pytest.raises(SchemaError, match=r"tools\[1\].function.parameters: "):
            turn(models, "hermes",
                 tools=[STOP, {"type": "function", "function": {"name": "f", "parameters": parameters}}])


def test_names_of_tools_may_have_signs(models):
    tool = {"type": "function", "function": {"name": "aS.b/c:d-e_1"}}
    for name in CALLS:
        text = '```json\n{"name": "aS.b/c:d-e_1", "arguments": {}}'
        assert name != "hermes" or follow(turn(models, name, tools=[tool]), text) == (text, True)
        made = turn(models, name, tools=[tool], choice="required", parallel=False)
        generated = pybmc.Request(made.tokens, 80, schema=made.schema(), shown=made.shown,
                                  stop_ids=made.template.tokenizer.stop_ids)
        with pybmc.Engine(made.model) as engine:
            engine.add(generated)
            text = ""
            while engine.running or engine.waiting:
                text += "".join(token.text for _, token in engine.step())
        assert calls_of(read(made, text)) == [("aS.b/c:d-e_1", {})]


# ---- budgets of thoughts


def budget_of(models, name, most, **more):
    made = turn(models, name, tools=(), budget=most, **more)
    return made, made.schema(), made.template.tokenizer


@pytest.mark.parametrize("name, begin, end",
                         [("opened", "", "</think>"),
                          ("thinking", "<think>", "</think>"), ("thinking", "\n<think>", "</think>"),
                          ("harmony", "<|channel|>analysis<|message|>", "<|end|><|start|>assistant")])
@pytest.mark.parametrize("most", [0, 1, 5])
def test_the_end_of_a_thought_is_forced(models, name, begin, end, most):
    _, schema, tokenizer = budget_of(models, name, most)
    ids, forced = (tokenizer.encode(begin + "a b c d e f", bos=False, special=True),
                   tokenizer.encode(end, bos=False, special=True))
    first = len(tokenizer.encode(begin, bos=False, special=True))
    for id in ids[:first + most]:
        assert schema.mask(()) is None and schema.forced() == []
        schema.accept(id)
    for i, id in enumerate(forced):
        assert list(schema.forced()) == forced[i:]
        allowed = [n for n in range(tokenizer.vocab_size) if schema.mask(())[n // 32] >> (n % 32) & 1]
        assert allowed == [id]
        schema.accept(id)
    assert schema.mask(()) is None


def test_a_thought_that_ends_in_time_and_one_that_never_begins(models):
    _, schema, tokenizer = budget_of(models, "opened", 8)
    for id in tokenizer.encode("a</think>b c d e f g h i j k l m", bos=False, special=True):
        assert schema.mask(()) is None
        schema.accept(id)
    _, schema, tokenizer = budget_of(models, "thinking", 0)
    for id in tokenizer.encode("No <think> here, and more", bos=False, special=True):
        assert schema.mask(()) is None
        schema.accept(id)


@given(st.data())
def test_guesses_are_masked_as_the_tokens_they_become(models, data):
    """mask() of tokens that are read ahead gives what it gives once they are accepted."""
    name = data.draw(st.sampled_from(["opened", "thinking", "harmony"]))
    most, choice = data.draw(st.integers(0, 6)), data.draw(st.sampled_from([None, "required"]))
    made = turn(models, name, tools=(PAINT,) if choice else (), choice=choice, budget=most)
    ahead, plain, size = made.schema(), made.schema(), made.template.tokenizer.vocab_size
    tokens = []
    for _ in range(data.draw(st.integers(1, 20))):
        mask = ahead.mask(tuple(tokens))
        expected = plain.mask(())
        assert (mask is None) == (expected is None) and (mask is None or (mask == expected).all())
        allowed = [id for id in range(size) if expected is None or expected[id // 32] >> (id % 32) & 1]
        special = [id for id in allowed if id >= size - 20]
        tokens.append(data.draw(st.sampled_from(special or allowed)))
        plain.accept(tokens[-1])
        if tokens[-1] in made.template.tokenizer.stop_ids:
            break


# ---- hostile schemas


KEYWORDS = ["type", "properties", "required", "enum", "const", "$ref", "$defs", "items", "anyOf",
            "additionalProperties", "pattern", "a", "b", "<x>"]
JUNK = st.recursive(st.none() | st.booleans() | st.integers(-2, 3)
                    | st.sampled_from(["", "a", "string", "object", "</parameter>", "#/$defs/a"]),
                    lambda inner: st.lists(inner, max_size=2)
                    | st.dictionaries(st.sampled_from(KEYWORDS), inner, max_size=3), max_leaves=6)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["hermes", "qwen-coder"]),
       st.dictionaries(st.sampled_from(KEYWORDS), JUNK, max_size=4))
def test_any_schema_is_followed_or_refused(models, name, parameters):
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    try:
        made = turn(models, name, tools=[tool], choice="required")
    except ArgumentError:
        return
    assert made.schema().mask(()) is not None


def test_json_that_holds_a_call_is_no_call(models):
    wish = asked({"json_schema": {"type": "object"}})
    call = "<tool_call><function=stop></function></tool_call>[TOOL_CALLS]stop[ARGS]{}<|python_tag|>"
    for name in ("hermes", "qwen-coder", "mistral", "mistral-list", "llama3", "plain"):
        text = json.dumps({"n": call + '{"name": "stop", "arguments": {}}'})
        assert [type(event) for event in read(turn(models, name, wish=wish), text)] == [Content]
