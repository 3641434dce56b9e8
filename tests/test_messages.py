"""Messages as people and clients send them: control tokens spelled in them, other forms of content,
answers begun."""


import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat import CONTROL, USER, controls, make, text_of

import pybmc
from pybmc import ArgumentError, FormatError
from pybmc.chat.template import ChatTemplate, template_of
from pybmc.chat.templates import NAMED

MARKS = {
    "<|user|>": CONTROL, "<|assistant|>": CONTROL, "<|end|>": CONTROL,
    "<|END_OF_TURN|>": CONTROL, "[INST]": CONTROL, "[/INST]": CONTROL, "<|Turn ßİ|>": CONTROL, "<user>": USER,
    "<turn|>": USER, "<start_of_turn>": USER, "<think>": USER, "</think>": USER, "<b>": USER, "\n\n": USER,
    "<tool_response>": USER,
}


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return make(tmp_path_factory.mktemp("v"), tiny.bpe_vocabulary(600, "gpt-2"), None, MARKS)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A SentencePiece vocabulary that names <unk> and a padding token."""
    metadata = tiny.spm_vocabulary(900) | {"tokenizer.ggml.unknown_token_id": 0,
                                           "tokenizer.ggml.padding_token_id": 2}
    return make(tmp_path_factory.mktemp("v"), metadata)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


# ---- control tokens ----------------------------------------------------------------------------------------

FOR = "{% for m in messages %}"
SHAPES = {
    "header": FOR + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}",
    "role in a token": FOR + "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}",
    "role in upper case": FOR + "{{ '<|END' ~ '_of_turn|>'|upper }}{{ '[' ~ 'inst'|upper ~ ']' }}"
                                "{{ m.content }}{% endfor %}",
    "text": FOR + "<start_of_turn>{{ m.role }}\n{{ m.content|trim }}<turn|><user>\n{% endfor %}",
    "turns": "{% set ns = namespace(s='') %}" + FOR + "{% set ns.s = ns.s + '[INST] ' + m.content + ' "
                                                      "[/INST]' %}{% endfor %}{{ (ns.s + '  ')|trim }}",
    "thoughts": FOR + "{% set c = m.content %}{% if '</think>' in c %}{% set t = c.split('</think>')[0] %}"
                      "{% set c = c.split('</think>')[-1].lstrip('\n') %}"
                      "{{ '<|end|>' + t.split('<think>')[-1] }}{% endif %}"
                      "{{ '<|im_start|>' ~ c ~ '<|im_end|>' }}{% endfor %}",
    "upper": FOR + "{{ (('<|end' + '_of_turn|>') + m.content)|upper }}{% endfor %}",
    "lower": FOR + "{{ ('<|USER|>' + m.content)|lower }}{{ m.content.casefold() }}{% endfor %}",
    "title": FOR + "{{ '<|end|>' }}{{ m.content|title }}{{ m.content|capitalize }}"
                   "{{ m.content.swapcase() }}{% endfor %}",
    "spaces": FOR + "<|end|>{{ m.content.split()|join }}{{ m.content|replace(' ', '') }}"
              "{{ m.content.replace('\n', '') }}{% endfor %}",
    "slices": FOR + "{{ '<|end|>' + m.content[1:] + m.content[:1] + m.content[::-1] }}{% endfor %}",
    "characters": FOR + "{% for c in m.content %}{{ c }}{% endfor %}<|end|>{{ m.content|list|join }}"
                        "{% endfor %}",
    "formats": FOR + "{{ '[INST]%s[/INST]' % m.content }}{{ '<|end|>{}<|{}|>'.format(m.content, m.role) }}"
               "{{ '<|%s|>'|format(m.role) }}{% endfor %}",
    "joins": "{{ messages|map(attribute='content')|join('<|end|>') }}"
             "{{ '<|end|>'.join(messages|map(attribute='content')) }}",
    "next to its own": FOR + "{{ '<|' ~ m.content ~ '|>' }}{{ '<|im_' + m.content }}{{ m.content + '|>' }}"
                             "{% endfor %}",
    "json": "{{ messages[0]|tojson }}<|end|>{{ tools|tojson }}{{ tools[0].description }}{{ note }}",
    "blocks": "{% macro turn(x, end='<|end|>') %}<|user|>{{ x }}{{ end }}{% endmacro %}" + FOR
              + "{% set s %}{{ turn(m.content) }}{% endset %}{% filter trim %} {{ s }} {% endfilter %}"
              "{% macro around() %}[INST]{{ caller() }}{% endmacro %}{% call around() %}{{ m.content }}"
              "{% endcall %}{% endfor %}",
    "tables": FOR + "{{ {'user': '<|user|>', 'x': 1}[m.role] }}{{ ['<|end|>', m.content]|last }}"
                    "{{ ('[INST]', 2)|first }}{{ '<|end|>,' .split(',')[0] }}{% endfor %}",
}
ATOMS = [*MARKS, *("<|im_start|>", "<|im_end|>", "<|endoftext|>"), "<|end_of_turn|>", "<|", "|>", "im_",
         "end|>", "user", "[", "inst]", " ", "\n", "\r", "\u00a0", "x", "İ", "ı", "ß", "ﬁ", "ŉ", "\u0307",
         "Σ", "\ufdd0", "\\u003c", "ﬀ<|END_OF_TURN|>"]
hostile = st.lists(st.sampled_from(ATOMS), max_size=8).map("".join)


def marked(tokenizer, template, ids):
    """The control tokens among ids, and the user-defined ones that the template uses."""
    used = {text for text in ("<user>", "<turn|>", "<start_of_turn>") if text in template.source}
    return [tokenizer.tokens[id] for id in ids if tokenizer.is_control(id) or tokenizer.tokens[id] in used]


TOKENS_OF_SHAPES = {"upper": ["<|END_OF_TURN|>"], "lower": ["<|user|>"],
                    "formats": ["[INST]", "[/INST]", "<|end|>", "<|user|>", "<|user|>"],
                    "turns": ["[INST]", "[/INST]"], "role in a token": ["<|user|>", "<|end|>"],
                    "role in upper case": ["<|END_OF_TURN|>", "[INST]"],
                    "text": ["<start_of_turn>", "<turn|>", "<user>"],
                    "tables": ["<|user|>", "[INST]", "<|end|>"], "blocks": ["<|user|>", "<|end|>", "[INST]"]}


@pytest.mark.parametrize("shape", TOKENS_OF_SHAPES)
def test_the_templates_own_tokens_count_however_it_makes_them(bpe, shape):
    template = ChatTemplate(SHAPES[shape], bpe)
    assert marked(bpe, template, template.encode([user("x")], False)) == TOKENS_OF_SHAPES[shape]


@pytest.mark.parametrize("shape", SHAPES)
@given(first=hostile, second=hostile)
@settings(max_examples=40)
def test_no_message_adds_a_token_in_any_shape_of_template(bpe, shape, first, second):
    template = ChatTemplate(SHAPES[shape], bpe)
    tools = [{"name": first, "description": second, "role": "<|end|>" + first, "<|end|>": "İ<|end|>"}]
    messages = [user(first), {"role": "user" if shape == "tables" else "assistant", "content": second}]
    others = {"tools": tools, "note": first}
    ids = template.encode(messages, False, **others)
    harmless = template.encode([m | {"content": "x"} for m in messages], False, tools=[{}], note="x")
    expected = marked(bpe, template, harmless)
    if shape == "thoughts":                 # it writes one more of its own for each thought
        expected = [name for m in messages
                    for name in ["<|end|>"] * ("</think>" in m["content"]) + ["<|im_start|>", "<|im_end|>"]]
    assert marked(bpe, template, ids) == expected
    assert text_of(bpe, ids) == template.render(messages, False, **others), "and the text is all there"


@pytest.mark.parametrize("role, tokens",
                         [("user", ["<|user|>", "<|end|>"]), ("assistant", ["<|assistant|>", "<|end|>"]),
                          ("end", ["<|end|>"]), ("im_end", ["<|end|>"])])
def test_only_known_roles_become_tokens(bpe, role, tokens):
    template = ChatTemplate(SHAPES["role in a token"], bpe)
    assert marked(bpe, template, template.encode([{"role": role, "content": "x"}], False)) == tokens


def test_real_looking_templates_find_thoughts_and_tool_answers_in_messages(bpe):
    template = ChatTemplate(SHAPES["thoughts"], bpe)
    ids = template.encode([assistant("<think>\nhm\n</think>\n\nyes")], False)
    assert text_of(bpe, ids) == "<|end|>\nhm\n<|im_start|>yes<|im_end|>"
    asks = ChatTemplate("{{ messages[0].content.startswith('<tool_response>') }}|"
                        "{{ messages[0].content|length }}", bpe)
    assert asks.render([user("<tool_response>x")], False) == "True|16"


def test_control_tokens_that_a_file_calls_normal(tmp_path):
    """Known by their text: a message that spells one must not end the turn."""
    tokenizer = make(tmp_path, tiny.bpe_vocabulary(600, "gpt-2"), None, {"<end_of_turn>": 1, "<EOT>": 1})
    template = ChatTemplate("{{ messages[0].content }}<end_of_turn>", tokenizer)
    assert controls(tokenizer, template.encode([user("<end_of_turn> <EOT>")], False)) == ["<end_of_turn>"]


def test_user_defined_tokens_that_may_stand_in_messages(bpe):
    template = ChatTemplate("<think>\n\n{{ messages[0].content }}<b>", bpe)
    names = [bpe.tokens[id] for id in template.encode([user("<think>\n\n<b><user>")], False)]
    assert names.count("<think>") == 1 and names.count("\n\n") == 2 and names.count("<user>") == 1
    assert names.count("<b>") == 1, "the template's own"


def test_a_strings_subclass_cannot_pretend_to_be_the_templates(bpe):
    from pybmc.chat.origin import own

    ids = ChatTemplate("{{ messages[0].content }}", bpe).encode([user(own("<|end|>"))], False)
    assert controls(bpe, ids) == []


# ---- formats -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source, text", [
    ("{{ '**%s**: %s' % ('a', 12345) }}", "**a**: 12345"),
    ("{{ 'PO box 12345 %s *' % 'x' }}", "PO box 12345 x *"),
    ("{{ 'no. 12345: {} *'.format('x') }}", "no. 12345: x *"),
    ("{{ '%-5d|%5.1f|%%' % (7, 2.5) }}", "7    |  2.5|%"),
    ("{{ '{:>{}}|{a}|{0!r}'.format('x', 3, a=1) }}", "  x|1|'x'"),
    ("{{ '{a}'.format_map({'a': 1}) }}{{ ''.format() }}", "1"),
])
def test_formats_that_are_fine(bpe, source, text):
    if "{0!r}" in source:
        source = source.replace("{:>{}}", "{0:>{1}}")
    assert ChatTemplate(source, bpe).render([]) == text


@pytest.mark.parametrize("source", [
    "{{ '{:{}}'.format('x', 99999999) }}", "{{ '{0:>{1}}'.format('x', 99999999) }}",
    "{{ '%(((x)))99999d' % {'((x))': 1} }}", "{{ '%.99999f' % 1 }}", "{{ '%.*f' % (99999, 1) }}",
    "{{ '{:>99999}'.format_map({}) }}", "{{ messages[0].content % 1 }}",
])
def test_formats_that_make_much_of_little(bpe, source):
    with pytest.raises(FormatError, match="too wide|failed"):
        ChatTemplate(source, bpe).render([user("%99999d")])


# ---- what clients send -------------------------------------------------------------------------------------

PLAIN = FOR + "[{{ m.role }}]{{ m.content }}{% endfor %}"
ADDS = FOR + "{{ '[' + m.role + ']' + m.content }}{% endfor %}"
TURNS = (FOR + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
               "{{ raise_exception('roles must alternate') }}{% endif %}{{ '[' + m.role + ']' + m.content }}"
               "{% endfor %}")
CALLS = [user("Rain?"),
         {"role": "assistant", "tool_calls": [{"function": {"name": "forecast", "arguments": {}}}]}]


@pytest.mark.parametrize("content", [{}, {"content": None}])
@pytest.mark.parametrize("source, text", [
    (PLAIN, "[user]Rain?[assistant]"),
    (ADDS, "[user]Rain?[assistant]"),
    (FOR + "[{{ m.content is defined }}{{ m.content is none }}{{ 'content' in m }}]{% endfor %}",
     "[TrueFalseTrue][FalseFalseFalse]"),
    (FOR + "{{ m.content|trim + '.' }}{% endfor %}", "Rain?.."),
    (FOR + "{{ m.content.split('a')[0] }}|{% endfor %}", "R||"),
])
def test_a_message_without_content(bpe, source, text, content):
    messages = [CALLS[0], CALLS[1] | content]
    assert ChatTemplate(source, bpe).render(messages) == text


def test_keys_that_are_none_are_not_there(bpe):
    source = (FOR + "{% if m.tool_calls is defined %}{{ m.tool_calls|length }}{% endif %}{{ m.content }}"
                    "{% endfor %}")
    assert ChatTemplate(source, bpe).render([user("a") | {"tool_calls": None, "name": None}]) == "a"


PARTS = [user([{"type": "text", "text": "Good "}, {"type": "text", "text": "day"}])]
TOOLS = "{% for t in tools or [] %}{{ t.type }}{% endfor %}"
BY_TYPE = (FOR + "{% for p in m.content %}{% if p['type'] == 'text' %}({{ p['text'] }}){% endif %}"
                 "{% endfor %}{% endfor %}")
EITHER = FOR + "{% if m.content is string %}{{ m.content }}{% else %}" + BY_TYPE.removeprefix(FOR)
EITHER = EITHER.replace("{% endfor %}{% endfor %}", "{% endfor %}{% endif %}{% endfor %}")


@pytest.mark.parametrize("source, text", [
    (TOOLS + ADDS, "[user]Good day"),
    (TOOLS + PLAIN, "[user]Good day"),
    (FOR + "{{ m|tojson }}{# type #}{% endfor %}", '{"role": "user", "content": "Good day"}'),
    (BY_TYPE, "(Good )(day)"),
    (EITHER, "(Good )(day)"),
])
def test_parts_are_joined_where_a_template_knows_only_text(bpe, source, text):
    assert ChatTemplate(source, bpe).render(PARTS) == text


def test_a_text_becomes_a_part_where_a_template_knows_only_parts(bpe):
    assert ChatTemplate(BY_TYPE, bpe).render([user("Good day")]) == "(Good day)"
    assert ChatTemplate(BY_TYPE, bpe).render([user("Hi"), assistant("Ho"), *PARTS]) == "(Hi)(Ho)(Good )(day)"
    assert ChatTemplate(EITHER, bpe).render([user("Good day")]) == "Good day"


BE_BRIEF = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("source, messages, text", [
    (TURNS, [BE_BRIEF, user("hi")], "[user]Be brief.\n\nhi"),
    (TURNS, [BE_BRIEF], "[user]Be brief."),
    (TURNS, [user("a"), user("b"), assistant("c"), assistant("d"), user("e")],
     "[user]a\n\nb[assistant]c\n\nd[user]e"),
    (TURNS, [BE_BRIEF, user("a"), user("b")], "[user]Be brief.\n\na\n\nb"),
    (TURNS, [BE_BRIEF, user([{"type": "text", "text": "hi"}])], "[user]Be brief.\n\nhi"),
    ("{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}" + TURNS,
     [BE_BRIEF, user("hi")], "[user]Be brief.\n\nhi"),
    (FOR + "{% if m.role == 'user' %}[user]{{ m.content }}{% endif %}{% endfor %}",
     [BE_BRIEF, user("hi"), user("ho")], "[user]Be brief.\n\nhi[user]ho"),
    (ADDS, [BE_BRIEF, user("a"), user("b")], "[system]Be brief.[user]a[user]b"),
    (ADDS.replace("{{ '['", "{% if loop.previtem and loop.previtem.role == m.role %}"
                            "{{ raise_exception('twice') }}{% endif %}"
                            "{{ '['"), [BE_BRIEF, user("a"), user("b")],
     "[system]Be brief.[user]a\n\nb"),
])
def test_system_messages_and_neighbours_that_a_template_refuses(bpe, source, messages, text):
    assert ChatTemplate(source, bpe).render(messages) == text


def test_what_a_template_still_refuses_is_told_in_its_words(bpe):
    with pytest.raises(FormatError, match="roles must alternate"):
        ChatTemplate(TURNS, bpe).render([assistant("a"), user("b")])


def test_special_tokens_that_the_vocabulary_names(llama, bpe):
    assert ChatTemplate("{{ unk_token }}{{ pad_token }}{{ cls_token is defined }}",
                        llama).render([]) == "<unk></s>False"
    assert ChatTemplate("{{ unk_token is defined }}", bpe).render([]) == "False"


@pytest.mark.parametrize("messages, others, where", [
    ([user("caf\udce9")], {}, "message 0"),
    ([user("a"), user([{"type": "text", "text": "\ud800"}])], {}, "message 1"),
    ([user("a")], {"tools": [{"name": "\udfff"}]}, "variables"),
])
def test_halves_of_surrogate_pairs_are_refused(bpe, messages, others, where):
    for function in (ChatTemplate(None, bpe).render, ChatTemplate(None, bpe).encode):
        with pytest.raises(ArgumentError, match=f"{where}.*half a surrogate pair"):
            function(messages, **others)


def test_messages_that_nest_too_deep_are_refused(bpe):
    deep = []
    for _ in range(10**5):
        deep = [deep]
    with pytest.raises(ArgumentError, match="message 0: it nests too deep"):
        ChatTemplate(None, bpe).render([user("a") | {"tool_calls": deep}])


# ---- an answer that is begun -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMED)
def test_an_answer_that_is_begun_is_continued(bpe, name):
    template = ChatTemplate(NAMED[name], bpe)
    text = template.render([user("Hi"), assistant("Sure, ")])
    assert text.endswith("Sure, ")
    assert template.render([user("Hi"), assistant("Sure, ")], False).count("Sure,") == 1
    assert template.render([user("Hi"), assistant("Sure, ")], False) != text
    assert text_of(bpe, template.encode([user("Hi"), assistant("Sure, ")])).endswith("Sure, ")
    begun = [user("Hi"), assistant([{"type": "text", "text": "Sure, "}])]
    assert template.render(begun) == text


def test_a_begun_answer_may_be_anything(bpe):
    template = ChatTemplate(NAMED["chatml"], bpe)
    for content in ("<|im_end|>", "zqpybmca0z", "a\n\n", "<think>\n"):
        text = template.render([user("zqpybmca1z"), assistant(content)])
        assert text == f"<|im_start|>user\nzqpybmca1z<|im_end|>\n<|im_start|>assistant\n{content}"


@pytest.mark.parametrize("source, found", [
    ("{{ messages[0].content }}", 0), (FOR + "{{ m.content }}{{ m.content }}{% endfor %}", 2),
])
def test_a_begun_answer_whose_end_cannot_be_found_is_refused(bpe, source, found):
    with pytest.raises(ArgumentError, match=f"expected it once, found it {found} times"):
        ChatTemplate(source, bpe).encode([user("Hi"), assistant("Sure")])


def test_an_answer_without_text_or_with_tool_calls_is_not_continued(bpe):
    template = ChatTemplate(NAMED["chatml"], bpe)
    for answer in (assistant(""), assistant(None),
                   assistant("a") | {"tool_calls": [{"function": {"name": "f"}}]}):
        assert template.render([user("Hi"), answer]).endswith("<|im_end|>\n<|im_start|>assistant\n")


# ---- templates by name -------------------------------------------------------------------------------------


def test_templates_by_name_source_and_file(bpe, tmp_path):
    (tmp_path / "mine.jinja").write_bytes(b"\xef\xbb\xbfmine {{ messages|length }}")
    (tmp_path / "bad.jinja").write_bytes(b"\xff\xfe{{")
    for template in ("mine {{ messages|length }}", str(tmp_path / "mine.jinja"), tmp_path / "mine.jinja"):
        assert template_of(template, bpe).render([user("a")]) == "mine 1"
    assert template_of("chatml", bpe).source == NAMED["chatml"]
    own = ChatTemplate(None, bpe)
    assert template_of(own, bpe) is own and template_of(None, bpe).source == own.source
    with pytest.raises(ArgumentError, match="'chatnl'.*expected a name .chatml, .*or a file: No such file"):
        template_of("chatnl", bpe)
    with pytest.raises(ArgumentError, match="not UTF-8"):
        template_of(tmp_path / "bad.jinja", bpe)
    with pytest.raises(ArgumentError):
        template_of("nul\0", bpe)


def test_which_variables_a_template_reads(bpe):
    template = ChatTemplate("{% if enable_thinking is defined %}{{ x.enable }}{% endif %}{% set y = 1 %}"
                            "{{ y }}", bpe)
    assert template.reads("enable_thinking") and template.reads("x")
    assert not template.reads("enable") and not template.reads("y")


def test_generate_takes_a_template_and_its_variables():
    with pybmc.Model(tiny.model("llama"), threads=1) as model:
        source = "{{ messages[0].content }}{{ word }}"
        with_word = pybmc.generate(model, [user("a ")], 1, chat_template=source,
                                   chat_template_kwargs={"word": "b"})
        assert with_word.prompt == model.tokenizer.encode("a b")
        batch = pybmc.generate_batch(model, [[user("a ")]], 2, chat_template=source,
                                     chat_template_kwargs={"word": "b"})
        alone = [token.id for token in pybmc.generate(model, "a b", 2)]
        assert [token.id for _, token in batch] == alone
        for wrong in ({"chat_template": "chatml"}, {"chat_template_kwargs": {"a": 1}}):
            with pytest.raises(ArgumentError, match="needs messages"):
                pybmc.generate(model, "text", **wrong)
        with pytest.raises(ArgumentError, match="messages is set by pybmc"):
            pybmc.generate(model, [user("a")], chat_template_kwargs={"messages": []})
