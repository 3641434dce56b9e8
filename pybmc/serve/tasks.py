"""From the fields of a request to requests of the engine: what is asked for, honoured or refused by name."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import inf

from ..chat.events import Reader
from ..chat.reader import Plain
from ..chat.template import checked_variables
from ..chat.tools import Tools, tools_of
from ..chat.turn import Turn, prompt_of
from ..engine.generate import encode_text
from ..engine.request import Request
from ..engine.sampler import Sampler
from ..engine.schema import Schema
from ..errors import ArgumentError, BmcError, NeedsPackageError, SchemaError
from ..grammar.asked import FIELDS, Asked, asked
from ..grammar.grammar import Grammar
from .answers import Choice
from .chain import left_out
from .errors import Refused, invalid, no_model, refusal, unsupported, wrong
from .fields import Fields
from .fill import fill_prompt
from .service import Service
from .sessions import checked_name

ANSWERS = 64                            # of one request, over all its prompts
STOP_CHARACTERS = 256                   # of a stop string: it is looked for behind each token
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "presence_penalty",
            "frequency_penalty", "repeat_last_n")
BOUNDS = {"temperature": (0, 100), "repeat_penalty": (0.01, 100), "presence_penalty": (-100, 100),
          "frequency_penalty": (-100, 100)}
REFUSED = ("images", "audio", "files", "web_search_options", "background", "previous_response_id",
           "conversation", "lora", "post_sampling_probs", "multimodal_data")
TEXT_PARTS = ("text", "input_text", "output_text")
MORE_OF_MESSAGES = ("name", "tool_calls", "function_call", "tool_call_id", "tool_name", "reasoning_content",
                    "thinking")

Prompt = tuple[str, list[int]]          # a text and its ids


@dataclass
class Task:
    """Requests for the engine, n answers to each prompt in turn, and what their answers have to show."""

    requests: list[Request]
    n: int
    seed: int
    prompts: list[Prompt]
    reader: Callable[[], Reader] = Plain        # of each answer
    ignored: tuple[str, ...] = ()               # keywords of its schema without effect
    stops: frozenset[int] = field(default_factory=frozenset)
    session: str | None = None                  # the name of a saved session that it goes on with
    slot: int | None = None                     # where it runs, if it is free

    def choices(self) -> list[Choice]:
        return [Choice(i, self.reader(), self.stops) for i in range(len(self.requests))]


def check_model(service: Service, fields: Fields) -> None:
    name = fields.text("model")
    if service.settings.strict_model and name is not None and name not in service.names:
        raise no_model(name, service.names)


def refuse_common(fields: Fields, but: str = "") -> None:
    """Fields that ask for what is not there. Those that ask for nothing are fine.
    but: one that a route has."""
    fields.refuse(name for name in REFUSED if name != but)
    if any(name != "text" for name in fields.listed("modalities")):
        raise unsupported("modalities", "beyond text are not supported here")
    if "best_of" in fields and fields.whole("best_of") > fields.whole("n", 1):
        raise unsupported("best_of", "beyond n is not supported here")


# ---- how tokens are chosen, and when an answer ends --------------------------------------------------------


def sampler_of(service: Service, fields: Fields) -> Sampler:
    """The request's sampler; its seed is a new one where none is given."""
    for name, bounds in BOUNDS.items():
        fields.number(name, None, *bounds)
    given = dict(service.settings.sampling) | {name: fields[name] for name in SAMPLING if name in fields}
    given |= left_out(fields)
    seed = fields.whole("seed", given.get("seed"), -(1 << 63), (1 << 64) - 1)
    ends = dict.fromkeys(service.tokenizer.stop_ids, -inf) if fields.flag("ignore_eos") else {}
    given |= {"seed": int.from_bytes(os.urandom(4), "little") if seed in (None, -1) else seed,
              "logit_bias": dict(bias_of(service, fields) or given.get("logit_bias", {})) | ends}
    try:
        return Sampler(**{"temperature": 0.8, **given})
    except ArgumentError as error:
        raise refusal(error, fields) from None


def bias_of(service: Service, fields: Fields) -> dict[int, float]:
    """logit_bias: ids or texts, as a mapping or as llama-server's list of pairs, in which false bans."""
    given, found = fields.get("logit_bias", {}), {}
    pairs, size = list(given.items()) if isinstance(given, dict) else given, service.tokenizer.vocab_size
    if not isinstance(pairs, list) \
            or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        fields.bad("logit_bias", "an object of token ids or texts, with numbers from -100 to 100")
    for key, value in pairs:
        if value is False:
            value = -inf
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not -100 <= value <= 100:
            raise wrong("logit_bias", f"of {key!r:.40} is {value!r:.40}; expected a number from -100 to 100")
        for id in _biased(service, key):
            if not 0 <= id < size:
                raise wrong("logit_bias", f"names token {id!r:.40}; expected 0 to {size - 1}")
            found[id] = float(value)
    return found


def _biased(service: Service, key) -> list[int]:
    if isinstance(key, int) and not isinstance(key, bool):
        return [key]
    if not isinstance(key, str):
        raise wrong("logit_bias", f"names {key!r:.40}; expected a token id or a text")
    if key.isascii() and key.isdecimal() and len(key) < 10:
        return [int(key)]
    return service.tokenizer.encode(key, bos=False, special=True)


def speculates(service: Service, fields: Fields) -> bool:
    """Whether guesses are made. A request can do without;
    which kind of guesses there are is the server's choice."""
    ours, most = service.settings.spec, service.settings.draft_max
    fields.choice("spec", tuple(dict.fromkeys(("off", "auto", ours))))
    if 0 < fields.whole("draft_max", most) < most:
        raise unsupported("draft_max",
                          f"other than 0, and less than the server's {most}, is not supported here")
    return fields.get("spec") != "off" and fields.get("draft_max") != 0


def prediction_of(service: Service, fields: Fields) -> list[int]:
    """Ids of a text that the answer may repeat."""
    if "prediction" not in fields:
        return []
    prediction = fields.object("prediction")
    prediction.choice("type", ("content",))
    content = content_of(prediction, "prediction")
    text = content if isinstance(content, str) else "".join(part["text"] for part in content or ())
    return service.tokenizer.encode(text, bos=False)


def template_request(service: Service, fields: Fields, client: Hashable, max_tokens: float,
                     stops: str = "stop") -> Request:
    """A request with everything but the prompt. stops: the field with texts that end an answer."""
    stop = fields.texts(stops, 16)
    if any(len(text) > STOP_CHARACTERS for text in stop):
        longest = max(map(len, stop))
        raise fields.wrong(stops, f"has a text of {longest} characters; expected at most {STOP_CHARACTERS}")
    most, ends = min(max_tokens, service.context + 1), service.tokenizer.stop_ids
    return Request((), most, sampler_of(service, fields), stop, ends,
                   context=service.settings.context, speculate=speculates(service, fields), client=client,
                   reuse=fields.flag("cache_prompt", True),
                   progress=(lambda done, total: None) if fields.flag("return_progress") else None)


def wish_of(fields: Fields, names: Sequence[str] = FIELDS) -> Asked | None:
    """What the answers have to follow. names: of the fields that may say so."""
    with blaming():
        return asked(fields, names)


@contextmanager
def blaming() -> Iterator[None]:
    """Errors that begin with the name of a field, or with a place in the messages, are refusals of these."""
    try:
        yield
    except ArgumentError as error:
        place = re.match(r"(?:messages|input)\[[\w.\[\]]+|text\.[\w.]+|\w+", str(error))
        raise Refused(400, "invalid_value", str(error), place[0] if place else None) from None


def compiled(field: str, make: Callable):
    """What make() gives, which compiles a grammar that a field asks for."""
    try:
        return make()
    except SchemaError as error:
        refused = refusal(error)
        raise Refused(400, refused.code, refused.message, field) from None
    except NeedsPackageError as error:
        raise unsupported(field, f"is not supported here: {error}") from None


def grammar_of(service: Service, fields: Fields, names: Sequence[str] = FIELDS) -> Grammar | None:
    wish = wish_of(fields, names)
    return compiled(wish.field, lambda: wish.compiled(service.model)) if wish else None


def text_task_of(service: Service, fields: Fields, base: Request, prompts: list[Prompt], n: int = 1,
                 names: Sequence[str] = FIELDS) -> Task:
    """n answers to each prompt that is a text. names: of the fields that may say what the answers follow."""
    grammar = grammar_of(service, fields, names)
    return _task_of(service, fields, base, prompts, n, grammar.start if grammar else lambda: None,
                    ignored=grammar.ignored if grammar else ())


def chat_task_of(service: Service, fields: Fields, base: Request, turn: Turn, n: int = 1) -> Task:
    """n answers to a turn of a chat."""
    return _task_of(service, fields, replace(base, shown=turn.shown), [("", turn.tokens)], n, turn.schema,
                    reader=turn.reader, ignored=turn.ignored)


def _task_of(service: Service, fields: Fields, base: Request, prompts: list[Prompt], n: int,
             schema: Callable[[], Schema | None], **more) -> Task:
    """n answers to each prompt: the i-th samples with seed + i.
    schema: makes the state of what an answer follows."""
    slot, session = slot_of(service, fields), session_of(service, fields)
    if session and n * len(prompts) > 1:
        raise unsupported("session", "with several answers is not supported here")
    if n * len(prompts) > ANSWERS:
        raise wrong("n", f"is {n} and there are {len(prompts)} prompts; expected at most {ANSWERS} answers")
    for _, ids in prompts:
        if len(ids) > service.context:
            raise Refused(400, "context_length_exceeded",       # clients look for some of these words
                          f"the prompt has {len(ids)} tokens, which exceeds the available context size of "
                          f"{service.context} tokens",
                          counts={"n_prompt_tokens": len(ids), "n_ctx": service.context})
    samplers = [replace(base.sampler, seed=base.sampler.seed + i) for i in range(n)]
    requests = [replace(base, tokens=ids, sampler=sampler, schema=schema())
                for _, ids in prompts for sampler in samplers]
    return Task(requests, n, base.sampler.seed, prompts, stops=service.tokenizer.stop_ids,
                session=session, slot=slot, **more)


def slot_of(service: Service, fields: Fields) -> int | None:
    """The slot that a request asks for."""
    slot = fields.whole("id_slot", -1, -1, len(service.worker.slots) - 1)
    return None if slot < 0 else slot


def session_of(service: Service, fields: Fields) -> str | None:
    """The saved session that a request goes on with."""
    name = fields.text("session")
    if not name:
        return None
    if service.sessions is None:
        raise unsupported("session", "needs a server with a folder for sessions: pybmc serve --sessions DIR")
    if not fields.flag("cache_prompt", True):
        raise unsupported("session", "without cache_prompt is not supported here")
    return checked_name(name, "session")


# ---- prompts -----------------------------------------------------------------------------------------------


def text_prompts(service: Service, fields: Fields, name: str = "prompt") -> list[Prompt]:
    """Up to 64 prompts, with their ids: each a text, ids, both mixed in a list, or llama-server's
    {"prompt_string": text}."""
    given = fields.get(name)
    if given is None:
        raise fields.missing(name, "a text, a list of token ids, or a list of either")
    found = several(given)
    if len(found) > ANSWERS:
        raise wrong(name, f"has {len(found)} prompts; expected at most {ANSWERS}")
    return [_text_prompt(service, one, name) for one in found]


def several(given) -> list:
    """The prompts in a field: a list with a number in it is one of them."""
    one = not isinstance(given, list) or not given or any(type(item) in (int, float) for item in given)
    return [given] if one else given


def plain_prompt(prompt, name: str):
    """The text of a prompt that is an object."""
    if not isinstance(prompt, dict):
        return prompt
    parts = Fields(prompt, f"{name}.")
    parts.refuse(("multimodal_data",))
    return parts.text("prompt_string")


def _text_prompt(service: Service, given, name: str) -> Prompt:
    prompt = plain_prompt(given, name)
    if not isinstance(prompt, (str, list)):
        raise wrong(name, f"has {json.dumps(given)[:60]}; expected a text or a list of token ids")
    try:
        ids = encode_text(service.tokenizer, _ids_of(service, prompt) if isinstance(prompt, list) else prompt)
    except ArgumentError as error:
        raise invalid(name, str(error)) from None
    return prompt if isinstance(prompt, str) else service.tokenizer.decode(ids), ids


def _ids_of(service: Service, prompt: list) -> list:
    """A list of ids with the ids of the texts in it; one at the beginning gets the BOS of a prompt."""
    found: list = []
    for part in prompt:
        if isinstance(part, str):
            found += service.tokenizer.encode(part, bos=not found, special=True)
        else:
            found.append(part)
    return found


def gap_prompt(service: Service, before: str, behind: str, name: str, begun: str = "", extra=()) -> Prompt:
    if service.fill is None:
        raise unsupported(name, "needs a model with fill-in tokens, which this one does not have")
    return before, fill_prompt(service.tokenizer, service.fill, before, behind, begun, extra)


def turn_of(service: Service, fields: Fields, names: Sequence[str] = FIELDS, split: bool = True) -> Turn:
    """The turn of a chat that is asked for. names: of the fields that may say what the answer follows."""
    messages, tools, wish = messages_of(fields), tools_asked(fields), wish_of(fields, names)
    return turn_from(service, fields, messages, tools, wish, variables_of(service, fields), split)


def turn_from(service: Service, fields: Fields, messages: list[dict], tools: Tools | None, wish: Asked | None,
              variables: dict, split: bool = True) -> Turn:
    """The turn of messages and tools that are read from fields, with what else these say of it."""
    budget, turns = budget_of(service, fields), turns_of(fields, messages)
    with blaming():
        return compiled(wish.field if wish else "tools", lambda: Turn(
            service.model, service.template, messages, tools, variables, split, budget, wish=wish, **turns))


def tools_asked(fields: Fields) -> Tools | None:
    parallel = fields.flag("parallel_tool_calls", True)
    with blaming():
        return tools_of(fields.get("tools"), fields.get("tool_choice"), parallel,
                        fields.get("functions"), fields.get("function_call"))


def budget_of(service: Service, fields: Fields) -> int | None:
    """How many tokens a thought may have; None: any number."""
    given = fields.whole("reasoning_budget", None, -1)
    if given is None:
        given = fields.object("thinking").whole("budget_tokens", service.settings.reasoning_budget, -1)
    return None if given == -1 else given


def turns_of(fields: Fields, messages: list[dict]) -> dict:
    """Whether the last message goes on, and whether an answer begins after it."""
    begins = fields.flag("add_generation_prompt", True)
    continued = fields.flag("continue_final_message", True)
    if fields.get("add_generation_prompt") and fields.get("continue_final_message"):
        raise invalid("continue_final_message",
                      "add_generation_prompt and continue_final_message are both true; "
                      "expected one of them at most")
    goes_on = continued and messages[-1]["role"] == "assistant"
    return {"add_generation_prompt": begins or goes_on, "continue_final_message": continued}


def variables_of(service: Service, fields: Fields, **others) -> dict:
    """What the chat template is given besides the messages. others: what a route's own fields come to, under
    the names of the common ones; None: nothing."""
    fields = Fields(fields | Fields(others))
    given = dict(fields.object("chat_template_kwargs"))
    try:
        given = checked_variables(given)
    except BmcError as error:
        raise invalid("chat_template_kwargs", str(error)) from None
    return {**service.settings.template_variables} | reasoning_of(fields) | given


def reasoning_of(fields: Fields) -> dict:
    """What the fields about thinking say to a chat template: whether to, and with which effort."""
    think = fields.get("think")
    effort = think if isinstance(think, str) else fields.text("reasoning_effort")
    if not isinstance(think, (str, bool, type(None))):
        fields.bad("think", "true, false or an effort")
    switch = think if isinstance(think, bool) else fields.flag("enable_thinking", None)
    kind = fields.object("thinking").choice("type", ("enabled", "disabled", "adaptive"))
    if effort == "none" or kind == "disabled":
        switch = False
    elif switch is None and (kind == "enabled" or isinstance(think, str)):
        switch = True
    return ({} if effort is None else {"reasoning_effort": effort}) \
        | ({} if switch is None else {"enable_thinking": switch, "thinking": switch})


def count_of(service: Service, fields: Fields, messages: list[dict], tools: Tools | None,
             variables: dict) -> int:
    """How many tokens the prompt of messages and tools has."""
    return len(prompt_of(service.template, messages, tools, variables, **turns_of(fields, messages)))


def messages_of(fields: Fields, name: str = "messages") -> list[dict]:
    """Messages with text alone."""
    given = fields.listed(name, 4096)
    if not given:
        raise wrong(name, "is empty; expected at least one message")
    return [_message(message, f"{name}[{i}]") for i, message in enumerate(given)]


def _message(given, where: str) -> dict:
    if not isinstance(given, dict):
        raise wrong(where, f"is {json.dumps(given)[:40]}; expected an object with role and content")
    message = Fields(given, f"{where}.")
    role = message.text("role")
    if not role:
        raise invalid(f"{where}.role", f"{where} has no role; expected system, user, assistant or tool")
    message.refuse(("images", "audio"))
    for name in ("reasoning_content", "thinking"):
        message.text(name)
    told = {name: message[name] for name in MORE_OF_MESSAGES if name in message}
    for i, call in enumerate(message.listed("tool_calls")):
        if not isinstance(call, dict):
            raise wrong(f"{where}.tool_calls[{i}]", f"is {json.dumps(call)[:40]}; expected a call")
    return {"role": {"developer": "system"}.get(role, role), "content": content_of(message, where)} | told


def content_of(message: Fields, where: str, name: str = "content") -> str | list | None:
    """A text, or parts of type text. name: of the field; where: the place of what it belongs to."""
    content = message.get(name)
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        message.bad(name, "a text or a list of parts")
    for i, part in enumerate(content):
        if isinstance(part, str):
            continue
        kind = part.get("type") if isinstance(part, dict) else part
        if not isinstance(part, dict) or kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
            place = f"{where}.{name}[{i}]"
            raise unsupported(place, f"is of type {json.dumps(kind)[:40]}; expected text")
    return [{"type": "text", "text": part if isinstance(part, str) else part["text"]} for part in content]
