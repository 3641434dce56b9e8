"""The command line: words and wires only. Heavy modules are imported where they are used, so that help is instant."""

import json
import os
import re
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import click

from . import __version__
from .errors import ArgumentError, BmcError
from .reasoning import is_open
from .terminal import ReaderLeft, Voice, is_terminal, note, progress, sentence, write

EXIT_FAILED, EXIT_USAGE, EXIT_UNPROVEN, EXIT_INTERRUPTED = 1, 2, 3, 130


# ---- options that several commands share -------------------------------------------------------------------


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
        id, sign, number = re.fullmatch(r"(\d*)([+-]?)(.*)", value, re.DOTALL).groups()
        try:
            return int(id), float((sign or "x") + number)
        except ValueError:
            self.fail(f"{value!r}: expected a token id, + or -, and a number, as in 15043-inf", param, ctx)


class Text(click.ParamType):
    """A text. Bytes of the command line that are not UTF-8 are none."""

    name = "TEXT"

    def convert(self, value, param, ctx):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            self.fail(f"not UTF-8 text (character {error.start})", param, ctx)
        return value


class File(click.Path):
    """A file's name; an empty one (a variable that is not set) is a mistake."""

    def convert(self, value, param, ctx):
        if not value:
            self.fail("the name of the file is empty", param, ctx)
        return super().convert(value, param, ctx)


class Rows(click.IntRange):
    """auto, or rows at a time."""

    name = "auto|N"

    def convert(self, value, param, ctx):
        return value if value == "auto" else super().convert(value, param, ctx)


class TemplateSource(click.ParamType):
    """A chat template's name, source or file."""

    name = "NAME|FILE|SOURCE"

    def convert(self, value, param, ctx):
        from .templates import source_of

        try:
            return source_of(value)
        except ArgumentError as error:
            self.fail(str(error), param, ctx)


class Variables(click.ParamType):
    """A JSON object."""

    name = "JSON"

    def convert(self, value, param, ctx):
        from .chat import checked_variables

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
model_option = click.option("-m", "--model", "model_option", metavar="FILE", type=File(),
                            help="The model, if it is not given as an argument.")


def keep_flag(ctx, param, value):
    """Store a flag where opened() finds it, which every command calls."""
    ctx.meta[param.name] = value


threads_option = options(
    click.option("-t", "--threads", type=click.IntRange(1, 512), metavar="N",
                 help="Threads; by default one for each core this process may use."),
    click.option("--no-repack", is_flag=True, expose_value=False, callback=keep_flag,
                 help="Leave the weights in the file: much slower, hardly any memory."))
context_option = click.option("-c", "--ctx-size", "context", type=click.IntRange(1), metavar="N",
                              help="Cap on the context, in tokens; by default what the model was trained for. "
                                   "More works, and is noted. Memory follows use.")
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
SAMPLING = ("seed", "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty",
            "repeat_last_n", "logit_bias")

draft_options = options(
    click.option("--draft", "-md", "--model-draft", "draft", type=File(), metavar="FILE",
                 help="A small model that guesses ahead, best with the same vocabulary. The answer is the same, sooner. "
                      "The bundled model has one by default."),
    click.option("--draft-max", type=click.IntRange(0), default=16, show_default=True, metavar="N",
                 help="At most N tokens guessed at a time; how many pay is found out."),
    click.option("--draft-min", type=click.IntRange(0), default=0, show_default=True, metavar="N",
                 help="Guess at least N tokens or none."),
    click.option("--spec", type=click.Choice(["auto", "draft", "ngram", "self", "off"]), default="auto", show_default=True,
                 help="Who guesses: the draft model, repetitions in the text (ngram), both (auto, with a draft), or in long texts the "
                      "model itself with less attention (self)."),
    click.option("--tint", is_flag=True, help="Colour the tokens that were guessed, on a terminal."))

template_options = options(
    click.option("--chat-template", type=TemplateSource(),
                 help="How messages are written, instead of the model's own template: a name (chatml, llama2, "
                      "llama3, gemma, mistral, phi3, zephyr, vicuna), a Jinja file, or the source itself."),
    click.option("--chat-template-kwargs", type=Variables(), metavar="JSON",
                 help='More variables for the chat template, as in \'{"reasoning_effort": "low"}\'.'),
    click.option("--think", type=click.Choice(["on", "off"]),
                 help="Whether the model thinks before it answers: enable_thinking for its chat template."),
    click.option("--thoughts", type=click.Choice(["show", "hide"]), default="show", show_default=True,
                 help="Print what stands between <think> and </think> at the beginning of an answer, or leave it "
                      "out; generate --json always has it."))

text_options = options(
    click.option("-p", "--prompt", type=Text(), help="The text; - reads it from stdin."),
    click.option("-f", "--file", "prompt_file", type=File(), metavar="FILE",
                 help="Read it from a file; - is stdin."))


def sampling_settings(flags: dict) -> dict:
    """The Sampler's settings among the flags, checked; a seed of -1 becomes a new one."""
    from .sampling import Sampler

    settings = {name: flags[name] for name in SAMPLING}
    settings["logit_bias"] = dict(settings["logit_bias"])
    if settings["seed"] == -1:
        settings["seed"] = int.from_bytes(os.urandom(4), "little")
    try:
        Sampler(**settings)
    except ArgumentError as error:
        raise click.UsageError(str(error)) from None
    return settings


def template_variables(flags: dict) -> dict:
    """What the flags give the chat template."""
    given = flags.pop("chat_template_kwargs") or {}
    think = flags.pop("think")
    return given | ({} if think is None else {"enable_thinking": think == "on"})


def template_of_model(loaded, source, variables: dict) -> dict:
    """Settings about the chat template; a note where it does not read a variable."""
    if source is None and not variables:
        return {}
    from .chat import ChatTemplate
    from .repl import note_unread

    template = ChatTemplate(source, loaded.tokenizer)
    note_unread(template, variables)
    return {"chat_template": template, "chat_template_kwargs": variables}


def find_model(argument, option=None) -> Path:
    if argument and option:
        raise click.UsageError(f"two models are given: {argument} and -m {option}")
    if argument or option:
        return Path(argument or option)
    from . import demo_model
    return demo_model()


def need_model(argument, option=None) -> Path:
    if not argument and not option:
        raise click.UsageError("no model is given: name a GGUF file")
    return find_model(argument, option)


NO_TEXT = "no text is given: use -p TEXT, -f FILE, or pipe it in"


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


@contextmanager
def opened(path: Path, threads):
    """The model, loaded behind a progress bar, and the seconds it took."""
    from .model import Model

    started = time.perf_counter()
    with progress(f"loading {path.name}") as update:
        repack = not click.get_current_context().meta["no_repack"]
        model = Model(path, threads=threads, progress=update, repack=repack)
    with model:
        yield model, time.perf_counter() - started


@contextmanager
def with_draft(flags: dict, bundled: bool, threads):
    """Settings of generate() about drafting, and the draft model opened. bundled: the model is, so its draft is there too."""
    settings = {name: flags.pop(name) for name in ("draft", "draft_max", "draft_min", "spec")}
    if settings["draft_min"] > settings["draft_max"]:
        raise click.UsageError(f"--draft-min {settings['draft_min']} is more than --draft-max {settings['draft_max']}")
    path = settings["draft"]
    if path is None and bundled and settings["spec"] in ("auto", "draft"):
        from . import demo_model
        path = demo_model(draft=True)
    if path is None and settings["spec"] == "draft":
        raise click.UsageError("--spec draft needs --draft FILE")
    if path is None or settings["spec"] in ("ngram", "self", "off"):
        yield settings | {"draft": None}
        return
    with opened(Path(path), threads) as (draft, _):
        yield settings | {"draft": draft}


def print_json(value: dict) -> None:
    write(json.dumps(value, ensure_ascii=False) + "\n")


def rounded(value, digits: int = 6):
    """Floats with so many significant digits."""
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


# ---- commands ----------------------------------------------------------------------------------------------


class Commands(click.Group):
    """`run` is another name of generate."""

    def get_command(self, ctx, name):
        return super().get_command(ctx, {"run": "generate"}.get(name, name))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="pybmc", message="%(prog)s %(version)s")
def cli():
    """Run GGUF language models on the CPU.

    Exit status: 0 done, 1 failed, 2 wrong usage, 3 a proof did not hold, 130 interrupted.
    """


@cli.command()
@model_argument
@model_option
@click.option("-sys", "--system-prompt", "system", type=Text(),
              help="What the model is told before everything else.")
@click.option("-n", "--n-predict", "max_tokens", type=int, default=-1, show_default=True, metavar="N",
              help="At most N tokens an answer; -1: until the model ends.")
@template_options
@sampling_options
@draft_options
@context_option
@threads_option
@arena_options
def chat(model, model_option, system, max_tokens, chat_template, thoughts, context, threads, rows, kv_type, tint,
         **flags):
    """Talk with a model; without MODEL the bundled one answers.

    /help lists what can be typed besides messages. A message goes on over several lines after a backslash at the
    end of a line, or between lines of three double quotes; a paste of several lines is one message. Ctrl-C ends
    an answer, Ctrl-D the chat. From a pipe each line is a message.
    """
    from .conversation import Conversation
    from .repl import Repl

    settings = sampling_settings(flags) | {"max_tokens": None if max_tokens < 0 else max_tokens}
    variables = template_variables(flags)
    with with_draft(flags, not (model or model_option), threads) as drafting, \
            opened(find_model(model, model_option), threads) as (loaded, _), \
            loaded.session(context=context, rows=rows, kv_type=kv_type) as session:
        written = template_of_model(loaded, chat_template, variables)
        talk = Conversation(loaded, session, system, **written, **settings, **drafting)
        return Repl(talk, tint=tint, thoughts=thoughts).run()


@cli.command()
@model_argument
@model_option
@text_options
@click.option("-n", "--n-predict", "max_tokens", type=int, default=256, show_default=True, metavar="N",
              help="At most N tokens; -1: until the model ends or the context is full.")
@click.option("--chat/--raw", "as_chat", default=None,
              help="Send the text as a message in the model's chat template, or as it is. "
                   "Without MODEL --chat, else --raw.")
@click.option("-sys", "--system-prompt", "system", type=Text(),
              help="With --chat: what the model is told first.")
@click.option("--prefill", type=Text(), help="With --chat: how the answer begins; what follows it is printed.")
@template_options
@click.option("-r", "--stop", type=Text(), multiple=True, help="End before this text; repeatable.")
@click.option("--ignore-eos", is_flag=True, help="Go on where the model would end.")
@click.option("--no-bos", is_flag=True, help="With --raw: no BOS token before the text.")
@sampling_options
@draft_options
@context_option
@threads_option
@arena_options
@json_option
def generate(model, model_option, prompt, prompt_file, max_tokens, as_chat, system, prefill, chat_template, thoughts,
             stop, ignore_eos, no_bos, context, threads, rows, kv_type, as_json, tint, **flags):
    """Continue a text (-p, -f, or stdin) and print what follows it; `run` is the same.

    In a raw text control tokens such as <|im_start|> count; an empty one is continued from the model's BOS token
    alone. Without MODEL the bundled model answers.
    """
    from .engine.generate import generate as start
    from .report import summary

    settings = sampling_settings(flags)
    variables = template_variables(flags)
    text = read_text(prompt, prompt_file)
    as_chat = as_chat if as_chat is not None else not (model or model_option)
    for flag, given in (("-sys", system), ("--prefill", prefill), ("--chat-template", chat_template),
                        ("--chat-template-kwargs and --think", variables)):
        if given and not as_chat:
            raise click.UsageError(f"{flag} needs --chat")
    if no_bos and as_chat:
        raise click.UsageError("--no-bos needs --raw: a chat template says itself what begins a text")
    if as_chat and not text:
        raise click.UsageError("the message is empty")
    if as_chat:
        text = [{"role": role, "content": content}
                for role, content in (("system", system), ("user", text), ("assistant", prefill))
                if content or role == "user"]
    with with_draft(flags, not (model or model_option), threads) as drafting, \
            opened(find_model(model, model_option), threads) as (loaded, load_s), \
            loaded.session(context=context, rows=rows, kv_type=kv_type) as session, progress("prompt") as update:
        if no_bos and loaded.tokenizer:
            text = loaded.tokenizer.encode(text, bos=False, special=True)
        written = template_of_model(loaded, chat_template, variables)
        answer = start(loaded, text, None if max_tokens < 0 else max_tokens, session=session, stop=stop,
                       stop_tokens=() if ignore_eos else None, progress=update,
                       **written, **settings, **drafting)
        voice = Voice(thoughts, is_open(loaded.tokenizer, answer.prompt), tint)
        voice.reasoning.push(prefill or "")
        tokens = []
        for token in answer:
            tokens.append(token)
            if not as_json:
                voice.say(token)
        if not as_json:
            voice.end()
        arena = session.arena_stats()
    if as_json:
        print_json(generation_json(answer, tokens, load_s))
    else:
        write("\n")
        if is_terminal(sys.stderr):
            note(summary(answer.stats, arena, settings["seed"] if settings["temperature"] else None), dim=True)


def generation_json(answer, tokens, load_s: float) -> dict:
    stats = answer.stats
    timings = {"load_s": load_s, "prompt_s": stats.prompt_s, "prompt_tok_s": stats.prompt_tok_s,
               "predicted_s": stats.predicted_s, "predicted_tok_s": stats.predicted_tok_s,
               "draft_n": stats.draft_n, "draft_n_accepted": stats.draft_n_accepted}
    return {"text": "".join(t.text for t in tokens), "tokens": [t.id for t in tokens],
            "prompt_tokens": stats.prompt_tokens,
            "finish_reason": tokens[-1].finish_reason if tokens else "length",
            "timings": {name: rounded(value) for name, value in timings.items()}}


@cli.command()
@model_argument
@model_option
@json_option
def show(model, model_option, as_json):
    """What a file is: architecture, types, sizes, template, and whether it runs."""
    from .show import describe, lines

    info = describe(need_model(model, model_option))
    if as_json:
        print_json(info)
    else:
        write("".join(f"{label:14}{text}\n" for label, text in lines(info)))


@cli.command()
@model_argument
@model_option
@text_options
@click.option("--no-bos", is_flag=True, help="Leave out the tokens that the model wants around a text.")
@click.option("--special/--no-special", default=False, show_default=True,
              help="Let control tokens in the text count.")
@json_option
def tokenize(model, model_option, prompt, prompt_file, no_bos, special, as_json):
    """Token ids and pieces of a text (-p, -f, or stdin). A vocabulary without weights is enough."""
    from . import Tokenizer

    path = need_model(model, model_option)
    text = read_text(prompt, prompt_file)
    tokenizer = Tokenizer(path)
    ids = tokenizer.encode(text, bos=not no_bos, special=special)
    pieces = [tokenizer.piece(id) for id in ids]
    if as_json:
        print_json({"tokens": ids, "pieces": [spelled(piece) for piece in pieces]})
    else:
        shown = [json.dumps(spelled(piece), ensure_ascii=False) for piece in pieces]
        write("".join(f"{id:>7}  {piece}\n" for id, piece in zip(ids, shown)))


def spelled(piece: bytes) -> str | list[int]:
    """A piece as text; the bytes of one that is only a part of a character."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)


@cli.command()
@model_argument
@model_option
@click.option("-p", "--n-prompt", "prompts", type=Counts(), default="512", show_default=True,
              help="Prompt lengths.")
@click.option("-n", "--n-gen", "generated", type=Counts(), default="64", show_default=True,
              help="Lengths to generate.")
@click.option("-b", "--widths", type=Counts(), default="1,2,4,8,16", show_default=True,
              help="Tokens in a verification pass: logits for all of them, then a rewind.")
@click.option("-d", "--depths", type=Counts(), default="0", show_default=True,
              help="Tokens held before the test.")
@click.option("-r", "--reps", type=click.IntRange(1), default=5, show_default=True, metavar="N",
              help="Repetitions of each test.")
@click.option("--breakdown", is_flag=True, help="Tell what the time of each test is spent on.")
@threads_option
@arena_options
@json_option
def bench(model, model_option, prompts, generated, widths, depths, reps, breakdown, threads, rows, kv_type, as_json):
    """Measure prompts, generation and verification; without MODEL the bundled model. An empty list skips a test."""
    from . import bench as benches

    run = benches.breakdown if breakdown else benches.bench
    with opened(find_model(model, model_option), threads) as (loaded, _):
        try:
            results = run(loaded, prompts, generated, widths, depths, reps, rows)
        except ArgumentError as error:
            raise click.UsageError(str(error)) from None
        lines = print_breakdowns if breakdown else print_table if is_terminal(sys.stdout) else print_lines
        show_results = print_json_lines if as_json else lines
        show_results(results)


def print_json_lines(results) -> None:
    for result in results:
        print_json({name: {k: rounded(v) for k, v in value.items()} if isinstance(value, dict) else rounded(value)
                    for name, value in vars(result).items()})


def print_lines(results) -> None:
    write(f"{'test':14}" + "".join(f"{header:>10}" for header in BENCH_COLUMNS) + "\n")
    for r in results:
        write(f"{test_name(r):14}" + "".join(f"{cell:>10}" for cell in bench_cells(r)) + "\n")


def print_table(results) -> None:
    """The lines as a table that fills while tests finish."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    table = Table("test")
    for header in BENCH_COLUMNS:
        table.add_column(header, justify="right")
    with Live(table, console=Console(), auto_refresh=False) as live:
        for r in results:
            table.add_row(test_name(r), *bench_cells(r))
            live.refresh()


def print_breakdowns(results) -> None:
    """A column of shares for each test; the last line is their sum."""
    results = list(results)
    lines = [["", *map(test_name, results)],
             ["ms a pass", *(f"{1e3 * r.wall_s / max(r.passes, 1):.2f}" for r in results)]]
    for step in results[0].steps:
        lines.append([step, *(f"{r.steps[step] / r.wall_s:.1%}" for r in results)])
    lines.append(["sum", *(f"{sum(r.steps.values()) / r.wall_s:.1%}" for r in results)])
    for name, *cells in lines:
        write(f"{name:20}" + "".join(f"{cell:>16}" for cell in cells) + "\n")


BENCH_COLUMNS = ("tok/s", "min", "max", "GB/s")


def bench_cells(r) -> list[str]:
    return [f"{v:.1f}" for v in (r.tok_s, r.tok_s_min, r.tok_s_max, r.gb_s)]


def test_name(r) -> str:
    return f"{r.test} {r.n}" + (f" @{r.depth}" if r.depth else "")


@cli.command()
@model_argument
@model_option
@click.option("-f", "--file", "text_file", required=True, type=File(), metavar="FILE",
              help="The text; - is stdin.")
@click.option("-c", "--ctx-size", "window", type=click.IntRange(4), default=512, show_default=True, metavar="N",
              help="Tokens in a window; the second half of each is scored.")
@click.option("--no-bos", is_flag=True, help="No BOS token at the beginning of a window.")
@threads_option
@json_option
def perplexity(model, model_option, text_file, window, no_bos, threads, as_json):
    """How well a model foretells a text, counted as llama.cpp counts it; without MODEL the bundled model."""
    from .perplexity import perplexity as measure

    text = read_text(None, text_file)
    with opened(find_model(model, model_option), threads) as (loaded, _), progress("perplexity") as update:
        found = measure(loaded, text, window, update, not no_bos)
    if as_json:
        print_json(vars(found))
    else:
        write(f"perplexity {found.ppl:.4f} +/- {found.stderr:.4f} over {found.tokens} tokens, "
              f"{found.bits_per_byte:.4f} bits a byte\n")


@cli.command()
@model_argument
@model_option
@click.option("--draft", "-md", "--model-draft", "draft", type=File(), metavar="FILE",
              help="A draft model, whose drafts are compared too.")
@click.option("-p", "--prompt", type=Text(), help="The text to go on with, instead of a few of its own.")
@click.option("-f", "--file", "prompt_file", type=File(), metavar="FILE", help="Read it from a file.")
@click.option("-n", "--n-predict", "max_tokens", type=click.IntRange(2), default=64, show_default=True, metavar="N",
              help="Tokens to write after each text.")
@click.option("--temp", "temperatures", type=float, multiple=True, default=(0.0, 0.8), show_default=True, metavar="T",
              help="Temperature; repeatable.")
@click.option("-s", "--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of the choices.")
@threads_option
@json_option
def prove(model, model_option, draft, prompt, prompt_file, max_tokens, temperatures, seed, threads, as_json):
    """Show that drafting changes nothing: decode plain and speculatively, and compare tokens and logits bit by bit.

    Drafts of every length, right and wrong on purpose, are checked. Without MODEL the bundled pair is taken. Exit
    status 3 if anything differs.
    """
    from .prove import PROMPTS
    from .prove import prove as run

    texts = PROMPTS if prompt is None and prompt_file is None else [read_text(prompt, prompt_file)]
    flags = {"draft": draft, "draft_max": 16, "draft_min": 0, "spec": "auto"}
    results = []
    with with_draft(flags, not (model or model_option), threads) as drafting, \
            opened(find_model(model, model_option), threads) as (loaded, _):
        for found in run(loaded, texts, max_tokens, drafting["draft"], temperatures, seed):
            results.append(found)
            if as_json:
                print_json(asdict(found) | {"equal": found.difference is None})
            else:
                write(compared(found) + "\n")
    differ = [found for found in results if found.difference]
    if not as_json:
        write(verdict(results, differ) + "\n")
    return EXIT_UNPROVEN if differ else 0


def compared(found) -> str:
    line = (f"prompt {found.prompt + 1}, temperature {found.temperature:g}, {found.drafts}: {found.tokens} tokens, "
            f"{found.passes} passes, {found.accepted} of {found.drafted} drafted tokens accepted, "
            f"{found.rows} rows of logits")
    if found.difference is None:
        return f"{line}: equal"
    d = found.difference
    return (f"{line}: {d.what} differs at position {d.position}, plain {d.plain}, drafted {d.drafted}; the two best plain "
            f"logits are {d.gap:.6g} apart, logits differ by up to {d.largest:.6g}")


def verdict(results, differ) -> str:
    tokens, rows = sum(r.tokens for r in results), sum(r.rows for r in results)
    if differ:
        return f"not proven: {len(differ)} of {len(results)} comparisons differ"
    return f"proven: {tokens} tokens and {rows} rows of logits are equal bit by bit"


# ---- the door ----------------------------------------------------------------------------------------------


def main(args=None) -> None:
    """Run a command and exit with its status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    sys.exit(run(args))


def run(args=None) -> int:
    """Run a command; its exit status. Failures are a sentence on stderr."""
    try:
        status = cli.main(args, prog_name="pybmc", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except click.ClickException as error:
        if sys.stderr is not None:
            error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return EXIT_INTERRUPTED
    except ReaderLeft:
        return leave_quietly()
    except Exception as error:
        if os.environ.get("PYBMC_DEBUG"):
            raise
        note(f"pybmc: {sentence(error)}")
        return EXIT_FAILED


def leave_quietly() -> int:
    """The reader of our output has left, and has what it wanted: nothing more is written, not even at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
