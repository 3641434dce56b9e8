"""Common chat templates by name, for files that have none and for --chat-template."""

from __future__ import annotations

from pathlib import Path

from ..errors import ArgumentError

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content']|default('', true) + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LLAMA2 = (
    "{% set ns = namespace(system='') %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{% set ns.system = '<<SYS>>\n' + message['content'] + '\n<</SYS>>\n\n' %}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content']|default('', true)|trim + ' ' + eos_token }}"
    "{% else %}"
    "{{ bos_token + '[INST] ' + ns.system + message['content']|trim + ' [/INST]' }}{% set ns.system = '' %}"
    "{% endif %}{% endfor %}"
)

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content']|trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content']|trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content']|trim + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content']|trim + eos_token }}"
    "{% else %}{{ raise_exception('only messages of user and assistant') }}{% endif %}"
    "{% endfor %}"
)

PHI3 = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content']|trim + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

ZEPHYR = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content']|trim + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

VICUNA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content']|trim + '\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ 'ASSISTANT: ' + message['content']|trim + eos_token + '\n' }}"
    "{% else %}{{ message['content']|trim + '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

NAMED = {
    "chatml": CHATML,
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "phi3": PHI3,
    "zephyr": ZEPHYR,
    "vicuna": VICUNA,
}


def source_of(template: str | Path) -> str:
    """The Jinja source that is meant by a name, a source (a text with {% or {{) or a file."""
    if isinstance(template, str) and ("{%" in template or "{{" in template):
        return template
    if isinstance(template, str) and template in NAMED:
        return NAMED[template]
    try:
        return Path(template).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ArgumentError(f"chat template {template}: the file is not UTF-8 text") from None
    except (OSError, ValueError) as error:
        expected = f"a name ({', '.join(NAMED)}), a Jinja source or a file"
        reason = getattr(error, "strerror", None) or "no such file"
        raise ArgumentError(f"chat template {str(template)!r:.100}: expected {expected}: {reason}") from None
