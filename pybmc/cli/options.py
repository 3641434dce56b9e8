"""What several commands share: types of arguments, options, texts and models."""

import json
import os
import re
import sys
import time
from contextlib import contextmanager, suppress
from math import isfinite
from pathlib import Path

import click

from ..errors import ArgumentError, BmcError
from .terminal import is_terminal, note, progress, write

UNITS = {"": 1} | {unit + i: base**power for i, base in (("", 1000), ("i", 1024))
                   for power, unit in enumerate("kmgt", 1)}


def options(*decorators):
    def apply(function):
        for decorator in reversed(decorators):
            function = decorator(function)
        return function
    return apply


class Counts(click.ParamType):
    """Whole numbers by comma; nothing at all is an empty list."""

    name = "N,N,.."

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in value.split(",") if part.strip())
        except ValueError:
            self.fail(f"{value!r} is no list of whole numbers", param, ctx)


class Bias(click.ParamType):
    """TOKEN+VALUE or TOKEN-VALUE."""

    name = "TOKEN(+/-)BIAS"

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        parts = re.fullmatch(r"(\d+)([+-].+)", value)
        with suppress(ValueError):
            if parts:
                return int(parts[1]), float(parts[2])
        self.fail(f"{value!r}: expected a token id, + or -, and a number, as in 15043-inf", param, ctx)


class Size(click.ParamType):
    """Bytes, as in 8G or 512Mi."""

    name = "SIZE"

    def convert(self, value, param, ctx):
        if isinstance(value, (int, float)):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", value.strip().lower())
        if not found or found[2] not in UNITS:
            self.fail(f"{value!r} is no size: expected a number and a unit, as in 8G or 512Mi", param, ctx)
        return int(float(found[1]) * UNITS[found[2]])


class Text(click.ParamType):
    """A text of the command line: UTF-8, also where the locale says ASCII."""

    name = "TEXT"

    def convert(self, value, param, ctx):
        try:
            value.encode()
            return value
        except UnicodeEncodeError as error:
            with suppress(UnicodeError):
                return os.fsencode(value).decode()
            self.fail(f"not UTF-8 text (character {error.start})", param, ctx)


class File(click.Path):
    """A file's name; an empty one (a variable that is not set) is a mistake.
    The name of a model may be the hub's."""

    def convert(self, value, param, ctx):
        if not value:
            self.fail("the name of the file is empty", param, ctx)
        return super().convert(value, param, ctx)


class Number(click.FloatRange):
    """A number in a range, neither NaN nor infinite."""

    def convert(self, value, param, ctx):
        found = super().convert(value, param, ctx)
        if not isfinite(found):
            self.fail(f"expected a finite number, found {value}", param, ctx)
        return found


class Rows(click.IntRange):
    """auto, or rows at a time."""

    name = "auto|N"

    def convert(self, value, param, ctx):
        return value if value == "auto" else super().convert(value, param, ctx)


class Layers(click.IntRange):
    """auto, or a number of layers; -1: all."""

    name = "N|auto"

    def convert(self, value, param, ctx):
        return value if value == "auto" else super().convert(value, param, ctx)


class Device(Layers):
    """auto, off, or the number of a GPU."""

    name = "N|auto|off"

    def convert(self, value, param, ctx):
        return value if value == "off" else super().convert(value, param, ctx)


class TemplateSource(click.ParamType):
    """A chat template's name, source or file."""

    name = "NAME|FILE|SOURCE"

    def convert(self, value, param, ctx):
        from ..chat.templates import source_of

        try:
            return source_of(value)
        except ArgumentError as error:
            self.fail(str(error), param, ctx)


class Variables(click.ParamType):
    """A JSON object."""

    name = "JSON"

    def convert(self, value, param, ctx):
        from ..chat.template import checked_variables

        if isinstance(value, dict):
            return value
        try:
            found = json.loads(value)
            if not isinstance(found, dict):
                self.fail(f"expected a JSON object, found {value[:60]!r}", param, ctx)
            return checked_variables(found)
        except ArgumentError as error:
            self.fail(str(error), param, ctx)
        except (ValueError, RecursionError) as error:
            self.fail(f"expected a JSON object, found {value[:60]!r}: {error}", param, ctx)


model_argument = click.argument("model", required=False, type=File())
model_option = click.option("-m", "--model", "model_option", metavar="MODEL", type=File(),
                            help="The model, if it is not given as an argument: a GGUF file, or a name that "
                                 "pybmc list shows, such as user/repo:Q4_K_M.")


def keep_flag(ctx, param, value):
    """Store a flag where opened() finds it, which every command calls."""
    ctx.meta[param.name] = value


threads_option = options(
    click.option("-t", "--threads", type=click.IntRange(1, 512), metavar="N",
                 help="Threads; by default one for each core this process may use."),
    click.option("--no-repack", is_flag=True, expose_value=False, callback=keep_flag,
                 help="Leave the weights in the file: much slower, hardly any memory."),
    click.option("--weights-memory", type=Size(), expose_value=False, callback=keep_flag,
                 help="Memory for the weights, as in 12G; by default what is free. Experts that do not fit "
                      "are read from the file when a text needs them."),
    click.option("--gpu", type=Device(0), metavar="N|auto|off", expose_value=False, callback=keep_flag,
                 help="Compute on GPU N as many layers as fit, or as -ngl says; auto: on one where there is "
                      "one. The answer is the same."),
    click.option("-ngl", "--gpu-layers", "--n-gpu-layers", "gpu_layers", type=Layers(-1), metavar="N|auto",
                 expose_value=False, callback=keep_flag,
                 help="Compute the last N layers and the head on a GPU; -1: all, auto: as many as fit, "
                      "0 (default): none."),
    click.option("--stream-tokens", type=click.IntRange(0), metavar="N", expose_value=False,
                 callback=keep_flag,
                 help="Where a GPU is used, send the weights of layers on the CPU through it for prompts of "
                      "N tokens and more; by default from 64 on, where that is sooner; 0: never. --gpu N "
                      "-ngl 0 does that for all layers."),
    click.option("--prompts", "prompts_by", type=click.Choice(["exact", "cublas"]), default="exact",
                 show_default=True, expose_value=False, callback=keep_flag,
                 help="cublas: layers on a GPU read whole chunks of 512 tokens of a prompt with NVIDIA's "
                      "cuBLAS, in f16. Drafts still change nothing, but the answer is not the CPU's any "
                      "more, and it depends on how a prompt was cut and on what of it was known before."))
context_option = click.option("-c", "--ctx-size", "context", type=click.IntRange(1), metavar="N",
                              help="Cap on the context, in tokens; by default what the model was trained "
                                   "for. More works, and is noted. Memory follows use.")
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object a line on stdout.")
arena_options = options(
    click.option("--rows", type=Rows(1, 1 << 30), default="auto", show_default=True, metavar="auto|N",
                 help="Rows by which the KV cache grows at a time; auto: about 4 MB."),
    click.option("--kv-type", type=click.Choice(["f16"]), default="f16", show_default=True,
                 help="Type of the KV cache."))

sampling_options = options(
    click.option("-s", "--seed", type=int, default=-1, metavar="N",
                 help="Seed of the choices; -1 (default) takes a new one."),
    click.option("--temp", "temperature", type=float, default=0.8, show_default=True, metavar="T",
                 help="Temperature; 0 always takes the likeliest token."),
    click.option("--top-k", type=int, default=40, show_default=True, metavar="K",
                 help="Only the K likeliest tokens; 0 or -1: all."),
    click.option("--top-p", type=float, default=0.95, show_default=True, metavar="P",
                 help="Only the likeliest tokens that make up P together; 1: all."),
    click.option("--min-p", type=float, default=0.05, show_default=True, metavar="P",
                 help="Only tokens at least P times as likely as the likeliest; 0: all."),
    click.option("--repeat-penalty", type=float, default=1.0, show_default=True, metavar="X",
                 help="Divide the logits of recent tokens by X; 1: off."),
    click.option("--presence-penalty", type=float, default=0.0, show_default=True, metavar="X",
                 help="Take X off the logits of recent tokens."),
    click.option("--frequency-penalty", type=float, default=0.0, show_default=True, metavar="X",
                 help="Take X off for each time a recent token occurs."),
    click.option("--repeat-last-n", type=int, default=64, show_default=True, metavar="N",
                 help="How many last tokens are recent; -1: all."),
    click.option("-l", "--logit-bias", type=Bias(), multiple=True,
                 help="Make a token likelier or less likely; repeatable."))
SAMPLING = ("seed", "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "presence_penalty",
            "frequency_penalty", "repeat_last_n", "logit_bias")

draft_options = options(
    click.option("--draft", "-md", "--model-draft", "draft", type=File(), metavar="MODEL",
                 help="A small model that guesses ahead, best with the same vocabulary. The answer is the "
                      "same, sooner. The bundled model has one by default."),
    click.option("--draft-max", type=click.IntRange(0), default=16, show_default=True, metavar="N",
                 help="At most N tokens guessed at a time; how many pay is found out."),
    click.option("--draft-min", type=click.IntRange(0), default=0, show_default=True, metavar="N",
                 help="Guess at least N tokens or none."),
    click.option("--spec", type=click.Choice(["auto", "draft", "mtp", "ngram", "self", "off"]),
                 default="auto", show_default=True,
                 help="Who guesses: the draft model, the draft head in the model's file (mtp), repetitions "
                      "in the text (ngram), repetitions and the draft model or head that there is (auto), or "
                      "in long texts the model itself with less attention (self)."),
    click.option("-ngld", "--gpu-layers-draft", "draft_gpu_layers", type=Layers(-1), metavar="N|auto",
                 expose_value=False, callback=keep_flag,
                 help="The same as -ngl for the draft model; by default as many layers as fit where the "
                      "model is on a GPU."),
    click.option("--tint", is_flag=True, help="Colour the tokens that were guessed, on a terminal."))

variable_options = options(
    click.option("--chat-template-kwargs", type=Variables(), metavar="JSON",
                 help='More variables for the chat template, as in \'{"reasoning_effort": "low"}\'.'),
    click.option("--think", type=click.Choice(["on", "off"]),
                 help="Whether the model thinks before it answers: enable_thinking for its chat template."))
template_options = options(
    click.option("--chat-template", type=TemplateSource(),
                 help="How messages are written, instead of the model's own template: a name (chatml, "
                      "llama2, llama3, gemma, mistral, phi3, zephyr, vicuna), a Jinja file, "
                      "or the source itself."),
    variable_options,
    click.option("--reasoning-budget", type=click.IntRange(-1), default=-1, show_default=True, metavar="N",
                 help="At most N tokens of a thought, behind which its end is forced; -1: any number."),
    click.option("--thoughts", type=click.Choice(["show", "hide"]), default="show", show_default=True,
                 help="Print what stands between <think> and </think> at the beginning of an answer, or "
                      "leave it out; generate --json always has it."))

form_options = options(
    click.option("-j", "--json-schema", type=Text(), metavar="JSON",
                 help="The answer is compact JSON of this schema; {} is any JSON. "
                      "A thought before it is free."),
    click.option("-jf", "--json-schema-file", type=File(), metavar="FILE", help="The same, from a file."),
    click.option("--grammar", type=Text(), metavar="TEXT",
                 help="The answer follows this grammar: GBNF with a rule root, or Lark with a rule start "
                      "after %llguidance."),
    click.option("--grammar-file", type=File(), metavar="FILE", help="The same, from a file."))

text_options = options(
    click.option("-p", "--prompt", type=Text(), help="The text; - reads it from stdin."),
    click.option("-f", "--file", "prompt_file", type=File(), metavar="FILE",
                 help="Read it from a file; - is stdin."))


SECTIONS = {                            # of the help of chat and generate
    "Model": ("model_option", "context", "threads", "no_repack", "weights_memory", "gpu", "gpu_layers",
              "stream_tokens", "prompts_by", "rows", "kv_type", "no_preread"),
    "Text": ("prompt", "prompt_file", "session_file", "system", "as_chat", "prefill", "no_bos",
             "chat_template", "chat_template_kwargs", "think", "reasoning_budget"),
    "Form": ("json_schema", "json_schema_file", "grammar", "grammar_file"),
    "End": ("max_tokens", "stop", "ignore_eos"),
    "Sampling": SAMPLING,
    "Speculation": ("draft", "draft_max", "draft_min", "spec", "draft_gpu_layers", "tint"),
    "Output": ("thoughts", "as_json"),
}


class Sectioned(click.Command):
    """A command whose help lists its options by section."""

    def format_options(self, ctx, formatter):
        rows: dict[str, list] = {section: [] for section in (*SECTIONS, "Other")}
        for param in [param for param in self.get_params(ctx) if isinstance(param, click.Option)]:
            section = next((section for section, names in SECTIONS.items() if param.name in names), "Other")
            rows[section] += filter(None, [param.get_help_record(ctx)])
        for section, found in rows.items():
            if found:
                with formatter.section(section):
                    formatter.write_dl(found)


def sampling_settings(flags: dict) -> dict:
    """The Sampler's settings among the flags, checked; a seed of -1 becomes a new one."""
    from ..engine.sampler import Sampler

    settings = {name: flags[name] for name in SAMPLING}
    settings["logit_bias"] = dict(settings["logit_bias"])
    if settings["seed"] == -1:
        settings["seed"] = int.from_bytes(os.urandom(4), "little")
    try:
        Sampler(**settings)
    except ArgumentError as error:
        raise click.UsageError(str(error)) from None
    return settings


FORMS = {                               # by flag: the argument of generate(), and how the flag is spelled
    "json_schema": ("schema", "-j"), "json_schema_file": ("schema", "-jf"),
    "grammar": ("grammar", "--grammar"), "grammar_file": ("grammar", "--grammar-file"),
}


def form_settings(flags: dict) -> dict:
    """What the answer has to follow, as an argument of generate()."""
    given = [(name, value) for name in FORMS if (value := flags.pop(name)) is not None]
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(FORMS[name][1] for name, _ in given)} are both given")
    return {FORMS[name][0]: decoded(Path(value).read_bytes(), value) if name.endswith("_file") else value
            for name, value in given}


def template_variables(flags: dict) -> dict:
    """What the flags give the chat template."""
    given = flags.pop("chat_template_kwargs") or {}
    think = flags.pop("think")
    return given | ({} if think is None else {"enable_thinking": think == "on"})


def template_of_model(loaded, source, variables: dict) -> dict:
    """Settings about the chat template; a note where it does not read a variable."""
    if loaded.tokenizer is None:
        return {}
    from ..chat.template import ChatTemplate
    from .repl import note_unread

    template = ChatTemplate(source, loaded.tokenizer)
    if template.guessed:
        note(f"(the file has no chat template: messages are written as for {template.guessed}; "
             "--chat-template takes another)", dim=True)
    note_unread(template, variables)
    return {"chat_template": template, "chat_template_kwargs": variables}


def find_model(argument, option=None) -> Path:
    if argument and option:
        raise click.UsageError(f"two models are given: {argument} and -m {option}")
    if argument or option:
        return find(argument or option)
    from .. import demo_model
    return demo_model()


def find(name: str) -> Path:
    """The file of a model: a path, or a name of the hub."""
    from ..hub.store import find

    return find(name)


def need_model(argument, option=None) -> Path:
    if not argument and not option:
        raise click.UsageError("no model is given: name a GGUF file, or a model that pybmc list shows")
    return find_model(argument, option)


HOW_TO_GIVE_TEXT = "use -p TEXT, -f FILE, or pipe it in"
NO_TEXT = f"no text is given: {HOW_TO_GIVE_TEXT}"


def read_text(prompt, file) -> str:
    """The text of -p or -f, or of stdin where it is piped."""
    if prompt is not None and file is not None:
        raise click.UsageError("-p and -f are both given")
    if file is None and prompt is None and is_terminal(sys.stdin):
        raise click.UsageError(NO_TEXT)
    if prompt is not None and prompt != "-":
        return prompt
    if file not in ("-", None):
        return decoded(Path(file).read_bytes(), file)
    if sys.stdin is None:
        raise click.UsageError(f"{NO_TEXT}; stdin is closed")
    return decoded(sys.stdin.buffer.read(), "stdin")


def decoded(data: bytes, name) -> str:
    """UTF-8 text, without the byte order mark that some editors put before it."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BmcError(f"{name}: expected UTF-8 text, found UTF-16 (iconv -f UTF-16 -t UTF-8 converts it)")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BmcError(f"{name} is not UTF-8 text (byte {error.start})") from None


def gpu_settings(draft: bool = False) -> dict:
    """Model's settings about GPUs, by the command's flags."""
    meta = click.get_current_context().meta
    gpu, layers = meta["gpu"], meta["gpu_layers"]
    if draft and meta.get("draft_gpu_layers") is not None:
        layers = meta["draft_gpu_layers"]
    elif draft and layers:
        layers = "auto"
    prompts = {} if draft or meta["prompts_by"] == "exact" else {"prompts": meta["prompts_by"]}
    return {"gpu": gpu, "n_gpu_layers": layers, "stream_tokens": meta["stream_tokens"]} | prompts


def asks_for_gpu(draft: bool = False) -> bool:
    """Whether the flags ask for a GPU."""
    from ..engine.gpu import asks

    settings = gpu_settings(draft)
    return asks(settings["gpu"], settings["n_gpu_layers"])


@contextmanager
def opened(path: Path, threads, writes: bool = True, gpu: dict | None = None):
    """The model, loaded behind a progress bar, and the seconds it took.
    writes: an encoder is refused. gpu: settings about GPUs instead of those of the flags."""
    from ..engine.model import Model

    started = time.perf_counter()
    with progress(f"loading {path.name}") as update:
        flags = click.get_current_context().meta
        model = Model(path, threads=threads, progress=update, repack=not flags["no_repack"],
                      memory=flags["weights_memory"], **(gpu_settings() if gpu is None else gpu))
    with model:
        if writes:
            model.check_writes()
        yield model, time.perf_counter() - started


@contextmanager
def with_draft(flags: dict, bundled: bool, threads):
    """Settings of generate() about drafting, and the draft model opened.
    bundled: the model is, so its draft is there too."""
    settings = {name: flags.pop(name) for name in ("draft", "draft_max", "draft_min", "spec")}
    if settings["draft_min"] > settings["draft_max"]:
        raise click.UsageError(f"--draft-min {settings['draft_min']} is more than "
                               f"--draft-max {settings['draft_max']}")
    path = settings["draft"]
    if path is None and bundled and settings["spec"] in ("auto", "draft"):
        from .. import demo_model
        path = demo_model(draft=True)
    if path is None and settings["spec"] == "draft":
        raise click.UsageError("--spec draft needs --draft FILE")
    if path is None or settings["spec"] not in ("auto", "draft"):
        yield settings | {"draft": None}
        return
    with opened(find(path), threads, gpu=gpu_settings(draft=True)) as (draft, _):
        yield settings | {"draft": draft}


def print_json(value: dict) -> None:
    write(json.dumps(value, ensure_ascii=False) + "\n")


def rounded(value, digits: int = 6):
    """Floats with this many significant digits."""
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value
