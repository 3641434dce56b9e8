"""Tiny models whose chat templates know tools, each in the way of a family of models."""

from functools import lru_cache

import tiny

CONTROLS = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<|start|>", "<|channel|>",
            "<|message|>", "<|end|>", "<|constrain|>", "<|call|>", "<|return|>")
TAGS = ("<tool_call>", "</tool_call>", "<think>", "</think>")

TURNS = """\
{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user
<tool_response>{{ m.content }}</tool_response><|im_end|>
{% else %}<|im_start|>{{ m.role }}
{{ m.content or '' }}CALLS<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
THOUGHT{% endif %}"""
OFFER = ("{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t|tojson }}\n{% endfor %}HOW<|im_end|>\n"
         "{% endif %}")
CALL = ("{% for c in m.tool_calls or [] %}<tool_call>\n"
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments|tojson }}}\n'
        '</tool_call>{% endfor %}')
SWITCH = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"


def turns(how, calls=CALL, thought=""):
    return OFFER.replace("HOW", how) + TURNS.replace("CALLS", calls).replace("THOUGHT", thought)


TEMPLATES = {
    "hermes": turns("<tool_call> with arguments </tool_call>"),
    "thinking": turns("<tool_call> with arguments </tool_call>", thought=SWITCH),
    "opened": turns("<tool_call> with arguments </tool_call>", thought="<think>\n"),
    "qwen-coder": turns("<tool_call><function=NAME><parameter=NAME>",
                        calls="{% for c in m.tool_calls or [] %}<tool_call>\n"
                              "<function={{ c.function.name }}>\n"
                              "{% for k, v in c.function.arguments|items %}<parameter={{ k }}>\n"
                              "{{ v }}\n</parameter>\n{% endfor %}</function>\n</tool_call>{% endfor %}"),
    "mistral": turns("[TOOL_CALLS]",
                     calls="{% for c in m.tool_calls or [] %}{% if c.id|length != 9 %}"
                           "{{ raise_exception('nine letters') }}{% endif %}[TOOL_CALLS]"
                           "{{ c.function.name }}[ARGS]{{ c.function.arguments|tojson }}{% endfor %}"),
    "mistral-list": turns("[TOOL_CALLS]", calls="{% for c in m.tool_calls or [] %}[TOOL_CALLS] ["
                                                "{{ c.function|tojson }}]{% endfor %}"),
    "llama3": turns('{"name": .., "parameters": ..} <|python_tag|>',
                    calls="{% if m.tool_calls %}{% if m.tool_calls|length > 1 %}"
                          "{{ raise_exception('one call at a time') }}{% endif %}"
                          "{% set c = m.tool_calls[0].function %}"
                          '{"name": "{{ c.name }}", "parameters": {{ c.arguments|tojson }}}{% endif %}'),
    "harmony": "{% for t in tools or [] %}{{ t|tojson }}{% endfor %}{% for m in messages %}"
               "{% if m.role == 'tool' %}<|start|>tool<|message|>{{ m.content }}<|end|>"
               "{% elif m.tool_calls %}<|start|>assistant<|channel|>commentary to=functions."
               "{{ m.tool_calls[0].function.name }} <|constrain|>json<|message|>"
               "{{ m.tool_calls[0].function.arguments|tojson }}<|call|>{% elif m.role == 'assistant' %}"
               "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% else %}<|start|>"
               "{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
               "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
    "plain": "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}"
             "{{ raise_exception('no such role') }}{% endif %}<|im_start|>{{ m.role }}\n"
             "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
             "{% endif %}",
}


@lru_cache
def model(name, n_ctx=4000, **shape):
    """A file of a model with the template of that name."""
    metadata, tensors = tiny.parts("llama", n_ctx=n_ctx, **shape)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    first = len(tokens) - len(tiny.SPECIAL) - len(CONTROLS) - len(TAGS)
    gone = set(tokens[first:first + len(CONTROLS) + len(TAGS)])
    for i, (text, kind) in enumerate([*((c, 3) for c in CONTROLS), *((t, 4) for t in TAGS)], first):
        tokens[i], types[i] = text, kind
    merges = metadata["tokenizer.ggml.merges"]
    metadata["tokenizer.ggml.merges"] = [m for m in merges
                                         if not ({m.replace(" ", ""), *m.split(" ")} & gone)]
    metadata["tokenizer.chat_template"] = TEMPLATES[name]
    return tiny.save(tiny.folder() / f"tools-{name}.gguf", metadata, tensors)
