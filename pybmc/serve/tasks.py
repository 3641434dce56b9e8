"""From the fields of a request to requests of the engine: what is asked for, honoured or refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from math import inf

from ..chat.reasoning import is_open
from ..chat.template import checked_variables
from ..engine.generate import encode_text
from ..engine.request import Request
from ..engine.sampler import Sampler
from ..errors import ArgumentError, BmcError
from .answers import Choice, Split
from .errors import Refused, invalid, refusal, unsupported
from .fields import Fields
from .fill import fill_prompt
from .service import Service

ANSWERS = 64                            # of one request, over all its prompts
STOP_CHARACTERS = 256                   # of a stop string: it is looked for behind each token
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty",
            "repeat_last_n")
BOUNDS = {"temperature": (0, 100), "repeat_penalty": (0.01, 100), "presence_penalty": (-100, 100),
          "frequency_penalty": (-100, 100)}
REFUSED = ("images", "audio", "files", "web_search_options", "background", "previous_response_id", "conversation",
           "tools", "functions", "json_schema", "grammar", "session")
TEXT_PARTS = ("text", "input_text", "output_text")
MORE_OF_MESSAGES = ("name", "tool_call_id", "tool_name", "reasoning_content", "thinking")     # that templates may read


@dataclass
class Task:
    """Requests for the engine, n answers to each prompt in turn, and what their answers have to show."""

    requests: list[Request]
    n: int
    seed: int
    prompts: list[tuple[str, list[int]]]        # text and ids of each
    reasoning: bool = False                     # thoughts are told apart
    begun: str = ""                             # the answer's beginning, which the prompt ends with
    stops: frozenset[int] = field(default_factory=frozenset)
    session: str | None = None                  # the name of a saved session that it goes on with
    slot: int | None = None                     # where it runs, if it is free

    def choices(self, service: Service) -> list[Choice]:
        return [Choice(i, self._split(service, request), self.stops) for i, request in enumerate(self.requests)]

    def _split(self, service: Service, request: Request) -> Split | None:
        return Split(is_open(service.tokenizer, list(request.tokens)), self.begun) if self.reasoning else None


def refuse_common(fields: Fields, but: tuple[str, ...] = ()) -> None:
    """Fields that ask for what is not there. Those that ask for nothing are fine. but: what a route has."""
    fields.refuse([name for name in REFUSED if name not in but])
    for name in ("tool_choice", "function_call"):
        if fields.get(name, "auto") not in ("auto", "none"):
            raise unsupported(name)
    if fields.object("response_format").get("type", "text") != "text":
        raise unsupported("response_format", "of another type than text is not supported here")
    if set(fields.listed("modalities")) - {"text"}:
        raise unsupported("modalities", "beyond text are not supported here")
    if "best_of" in fields and fields.whole("best_of") > fields.whole("n", 1):
        raise unsupported("best_of", "beyond n is not supported here")


# ---- how tokens are chosen, and when an answer ends --------------------------------------------------------


def sampler_of(service: Service, fields: Fields) -> Sampler:
    """The request's sampler; its seed is a new one where none is given."""
    for name, bounds in BOUNDS.items():
        fields.number(name, None, *bounds)
    given = dict(service.settings.sampling) | {name: fields[name] for name in SAMPLING if name in fields}
    seed = fields.whole("seed", given.get("seed"), -(1 << 63), (1 << 64) - 1)
    given |= {"seed": int.from_bytes(os.urandom(4), "little") if seed in (None, -1) else seed,
              "logit_bias": bias_of(service, fields) or given.get("logit_bias", {})}
    try:
        return Sampler(**{"temperature": 0.8, **given})
    except ArgumentError as error:
        raise refusal(error, fields) from None


def bias_of(service: Service, fields: Fields) -> dict[int, float]:
    """logit_bias: ids or texts, as a mapping or as llama-server's list of pairs, in which false bans."""
    given, found = fields.get("logit_bias", {}), {}
    pairs = list(given.items()) if isinstance(given, dict) else given
    if not isinstance(pairs, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        fields.bad("logit_bias", "an object of token ids or texts, with numbers from -100 to 100")
    for key, value in pairs:
        if value is False:
            value = -inf
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not -100 <= value <= 100:
            raise invalid("logit_bias",
                          f"logit_bias of {key!r:.40} is {value!r:.40}; expected a number from -100 to 100")
        for id in _biased(service, key):
            if not 0 <= id < service.tokenizer.vocab_size:
                raise invalid("logit_bias",
                              f"logit_bias names token {id}; expected 0 to {service.tokenizer.vocab_size - 1}")
            found[id] = float(value)
    return found


def _biased(service: Service, key) -> list[int]:
    if isinstance(key, int) and not isinstance(key, bool):
        return [key]
    if not isinstance(key, str):
        raise invalid("logit_bias", f"logit_bias names {key!r:.40}; expected a token id or a text")
    if key.isascii() and key.isdecimal() and len(key) < 10:
        return [int(key)]
    return service.tokenizer.encode(key, bos=False, special=True)


def speculates(service: Service, fields: Fields) -> bool:
    """Whether guesses are made. A request can do without; which kind of guesses there are is the server's choice."""
    ours, most = service.settings.spec, service.settings.draft_max
    fields.choice("spec", tuple(dict.fromkeys(("off", "auto", ours))))
    if 0 < fields.whole("draft_max", most) < most:
        raise unsupported("draft_max", f"other than 0, and less than the server's {most}, is not supported here")
    return fields.get("spec") != "off" and fields.get("draft_max") != 0


def prediction_of(service: Service, fields: Fields) -> list[int]:
    """Ids of a text that the answer may repeat."""
    if "prediction" not in fields:
        return []
    prediction = fields.object("prediction")
    prediction.choice("type", ("content",))
    content = _content(prediction, "prediction")
    text = content if isinstance(content, str) else "".join(part["text"] for part in content or ())
    return service.tokenizer.encode(text, bos=False)


def template_request(service: Service, fields: Fields, client: Hashable, max_tokens: float) -> Request:
    """A request with everything but the prompt."""
    stop = fields.texts("stop", 16)
    if any(len(text) > STOP_CHARACTERS for text in stop):
        longest = max(map(len, stop))
        raise invalid("stop", f"stop has a text of {longest} characters; expected at most {STOP_CHARACTERS}")
    most, ends = min(max_tokens, service.context + 1), service.tokenizer.stop_ids
    return Request((), most, sampler_of(service, fields), stop, ends,
                   context=service.settings.context, speculate=speculates(service, fields), client=client,
                   reuse=fields.flag("cache_prompt", True))


def task_of(service: Service, base: Request, prompts: list[tuple[str, list[int]]], n: int = 1, **more) -> Task:
    """n answers to each prompt: the i-th samples with seed + i."""
    if n * len(prompts) > ANSWERS:
        raise invalid("n", f"n is {n} and there are {len(prompts)} prompts; expected at most {ANSWERS} answers")
    for _, ids in prompts:
        if len(ids) > service.context:
            raise Refused(400, "context_length_exceeded", f"the prompt has {len(ids)} tokens; "
                          f"expected at most {service.context}, the length of the context")
    samplers = [replace(base.sampler, seed=base.sampler.seed + i) for i in range(n)]
    requests = [replace(base, tokens=ids, sampler=sampler) for _, ids in prompts for sampler in samplers]
    return Task(requests, n, base.sampler.seed, prompts, stops=service.tokenizer.stop_ids, **more)


# ---- prompts -----------------------------------------------------------------------------------------------


def text_prompts(service: Service, fields: Fields, name: str = "prompt") -> list[tuple[str, list[int]]]:
    """A text, ids, or up to 64 of either; with their ids."""
    given = fields.get(name)
    if given is None:
        raise invalid(name, f"{name} is missing; expected a text, a list of token ids, or a list of either")
    several = isinstance(given, list) and bool(given) and isinstance(given[0], (str, list))
    found = given if several else [given]
    if len(found) > ANSWERS:
        raise invalid(name, f"{name} has {len(found)} prompts; expected at most {ANSWERS}")
    return [_text_prompt(service, one, name) for one in found]


def _text_prompt(service: Service, prompt, name: str) -> tuple[str, list[int]]:
    if not isinstance(prompt, (str, list)):
        raise invalid(name, f"{name} has {json.dumps(prompt)[:60]}; expected a text or a list of token ids")
    try:
        ids = encode_text(service.tokenizer, prompt)
    except ArgumentError as error:
        raise Refused(400, "invalid_value", str(error), name) from None
    return prompt if isinstance(prompt, str) else service.tokenizer.decode(ids), ids


def gap_prompt(service: Service, before: str, behind: str, name: str) -> tuple[str, list[int]]:
    if service.fill is None:
        raise unsupported(name, "needs a model with fill-in tokens, which this one does not have")
    return before, fill_prompt(service.tokenizer, service.fill, before, behind)


def chat_prompt(service: Service, fields: Fields, variables: Mapping | None = None) -> tuple[list[int], str]:
    """Ids of a conversation, and the beginning of the answer where it has one."""
    messages = messages_of(fields)
    continued = fields.flag("continue_final_message", True)
    last = messages[-1]
    begun = last["content"] if continued and last["role"] == "assistant" else ""
    ids = service.template.encode(messages, continue_final_message=continued, **variables_of(fields, variables))
    if not ids:
        raise invalid("messages", "the prompt that the messages make is empty; expected some text")
    return ids, begun if isinstance(begun, str) else ""


def variables_of(fields: Fields, more: Mapping | None = None) -> dict:
    """What the chat template is given besides the messages."""
    given = dict(fields.object("chat_template_kwargs"))
    try:
        given = checked_variables(given)
    except BmcError as error:
        raise invalid("chat_template_kwargs", str(error)) from None
    effort = fields.text("reasoning_effort")
    if effort is not None:
        given = {"reasoning_effort": effort} | ({"enable_thinking": False} if effort == "none" else {}) | given
    return given | dict(more or {})


def messages_of(fields: Fields, name: str = "messages") -> list[dict]:
    """Messages as chat templates know them: text alone, arguments of calls as objects."""
    given = fields.listed(name, 4096)
    if not given:
        raise invalid(name, f"{name} is empty; expected at least one message")
    return [_message(message, f"{name}[{i}]") for i, message in enumerate(given)]


def _message(given, where: str) -> dict:
    if not isinstance(given, dict):
        raise invalid(where, f"{where} is {json.dumps(given)[:40]}; expected an object with role and content")
    message = Fields(given, f"{where}.")
    role = message.text("role")
    if not role:
        raise invalid(f"{where}.role", f"{where} has no role; expected system, user, assistant or tool")
    message.refuse(("images", "audio"))
    told = {name: message[name] for name in MORE_OF_MESSAGES if name in message}
    calls = [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(message.listed("tool_calls"))]
    return {"role": {"developer": "system"}.get(role, role), "content": _content(message, where)} | told \
        | ({"tool_calls": calls} if calls else {})


def _content(message: Fields, where: str) -> str | list | None:
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        message.bad("content", "a text or a list of parts")
    for i, part in enumerate(content):
        if isinstance(part, str):
            continue
        if not isinstance(part, dict) or part.get("type") not in TEXT_PARTS or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            place = f"{where}.content[{i}]"
            raise Refused(400, "unsupported_parameter",
                          f"{place} is of type {json.dumps(kind)[:40]}; expected text", place)
    return [{"type": "text", "text": part if isinstance(part, str) else part["text"]} for part in content]


def _call(call, where: str) -> dict:
    """An earlier call of a tool; arguments that are JSON become an object."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise invalid(where, f"{where} is no call; expected a function with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            pass
    return call | {"function": function | {"arguments": arguments}}
