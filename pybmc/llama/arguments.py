"""The arguments of llama-cpp-python's class: what has an effect here, what has none, and what is refused."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Collection, Mapping, Sequence

from .. import checks
from ..chat.templates import source_of
from ..engine.model import Model
from ..engine.sampler import Sampler
from ..errors import ArgumentError
from ..grammar.asked import Asked, asked
from ..grammar.grammar import Grammar
from .parts import LlamaGrammar

log = logging.getLogger(__name__)

RANDOM_SEEDS = (0xFFFFFFFF, -1)         # these stand for a new one each time
POOLINGS = {-1: None, 0: "none", 1: "mean", 2: "first", 3: "last", 4: "rank"}       # llama.cpp's numbers

# Of GPUs, mapping, passes and the type of rows, which are float16.
WITHOUT_EFFECT = ("n_gpu_layers", "split_mode", "main_gpu", "tensor_split", "use_mmap", "use_mlock",
                  "n_batch", "n_ubatch", "n_threads_batch", "offload_kqv", "flash_attn", "op_offload",
                  "swa_full", "numa", "type_k", "type_v")
# These would change the text.
UNCHANGED = ("kv_overrides", "rope_scaling_type", "attention_type", "rope_freq_base", "rope_freq_scale",
             "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx",
             "lora_base", "lora_path", "tokenizer", "spm_infill", "typical_p", "mirostat_mode")

# pybmc's names of these.
CHAT_FORMATS = {"llama-2": "llama2", "llama-3": "llama3", "mistral-instruct": "mistral"}


def defaults_of(function: Callable) -> dict:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def refuse_changes(given: Mapping, defaults: Mapping) -> None:
    """Raise an ArgumentError for a value that would change the text and is not supported."""
    for name in UNCHANGED:
        if name in given and given[name] not in (None, defaults[name]):
            checks.refuse(name, f"{defaults[name]!r}, since nothing else is supported", given[name])


def note_without_effect(given: Mapping, defaults: Mapping, level: int,
                        effective: Collection[str] = ()) -> None:
    """Log the names of arguments that are given for nothing; effective: those that had an effect for once."""
    names = [name for name in WITHOUT_EFFECT if given[name] != defaults[name] and name not in effective]
    if names:
        log.log(level, "without effect in pybmc: %s", ", ".join(names))


def sampler_of(given: Mapping, repeat_last_n: int, seed: int) -> Sampler:
    """The sampler of a call's arguments."""
    names = ("top_k", "top_p", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty")
    temperature = given["temp"] if "temp" in given else given["temperature"]
    return Sampler(temperature, repeat_last_n=repeat_last_n, seed=seed,
                   logit_bias=given.get("logit_bias") or {}, **{name: given[name] for name in names})


def source_of_format(chat_format: str | None, metadata: Mapping) -> str | None:
    """The Jinja source of a chat format: one of llama-cpp-python's or of pybmc's names, one that the file has
    under that name, a source, or a file. None: the file's own."""
    if chat_format in (None, "chat_template.default"):
        return None
    if not isinstance(chat_format, str):
        checks.refuse("chat_format", "the name of a chat template", chat_format)
    name = chat_format.removeprefix("chat_template.")
    named = metadata.get(f"tokenizer.chat_template.{name}") if name != chat_format else None
    return named if isinstance(named, str) else source_of(CHAT_FORMATS.get(chat_format, chat_format))


def wish_of(given: Mapping) -> Asked | None:
    """What an answer has to follow: a call's grammar, or its response_format."""
    grammar, wish = given["grammar"], asked({"response_format": given.get("response_format")})
    if grammar is not None and not isinstance(grammar, LlamaGrammar):
        checks.refuse("grammar", "a LlamaGrammar", grammar)
    if grammar is not None and wish:
        raise ArgumentError("grammar: expected one of grammar and response_format, found both")
    return wish if grammar is None else grammar.asked()


def grammar_of(given: Mapping, model: Model) -> Grammar | None:
    """The same, compiled."""
    wish = wish_of(given)
    found = wish.compiled(model) if wish else None
    if found:
        found.note_ignored()
    return found


def check_messages(messages: Sequence) -> None:
    """Raise an ArgumentError for no messages, and for parts that are not text."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        checks.refuse("messages", "a list of mappings with role and content", messages)
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        for j, part in enumerate(content if isinstance(content, (list, tuple)) else ()):
            if not isinstance(part, Mapping) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, Mapping) else part
                checks.refuse(f"messages[{i}].content[{j}]", "a part of the type text", kind)
