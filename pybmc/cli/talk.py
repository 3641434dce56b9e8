"""Commands that write text: chat and generate."""

import os
import sys

import click

from . import options
from .terminal import Voice, is_terminal, note, progress, write


@click.command(cls=options.Sectioned)
@options.model_argument
@options.model_option
@click.option("-sys", "--system-prompt", "system", type=options.Text(),
              help="What the model is told before everything else.")
@click.option("-n", "--n-predict", "max_tokens", type=int, default=-1, show_default=True, metavar="N",
              help="At most N tokens an answer; -1: until the model ends.")
@click.option("--session", "session_file", type=options.File(), metavar="FILE",
              help="Go on with the conversation that is saved in FILE, if there is one, without reading it "
                   "again; save it there after each answer.")
@options.template_options
@options.form_options
@options.sampling_options
@options.draft_options
@options.context_option
@options.threads_option
@options.arena_options
@click.option("--no-preread", is_flag=True, help="Read nothing of a message before Enter.")
def chat(model, model_option, system, max_tokens, session_file, chat_template, thoughts, reasoning_budget,
         context, threads, rows, kv_type, tint, no_preread, **flags):
    """Talk with a model; without MODEL the bundled one answers.

    /help lists what can be typed besides messages. A message goes on over several lines after a backslash
    at the end of a line, or between lines of three double quotes; a paste of several lines is one
    message. Ctrl-C ends an answer, Ctrl-D the chat. From a pipe each line is a message. At a terminal the
    words that are certain are read while you type, unless the machine runs on its battery: the answer is
    the same, and begins sooner.
    """
    from ..chat.conversation import Conversation
    from ..grammar.grammar import grammar_of
    from .repl import Repl

    settings = options.sampling_settings(flags) | {"max_tokens": None if max_tokens < 0 else max_tokens}
    settings["reasoning_budget"] = None if reasoning_budget < 0 else reasoning_budget
    form = options.form_settings(flags)
    variables = options.template_variables(flags)
    with options.with_draft(flags, not (model or model_option), threads) as drafting, \
            options.opened(options.find_model(model, model_option), threads) as (loaded, _), \
            open_session(loaded, session_file, context, rows, kv_type) as session:
        written = options.template_of_model(loaded, chat_template, variables)
        talk = Conversation(loaded, session, system, **written, **settings, **drafting,
                            grammar=grammar_of(loaded, **form))
        if session.saved:
            talk.take_up(system)
            note(f"({len(talk.messages)} messages of {session_file})", dim=True)
        elif session_file:
            talk.save_session(session_file)         # so what cannot be written shows before the first message
        repl = Repl(talk, tint=tint, thoughts=thoughts, preread=not no_preread, session_file=session_file)
        return repl.run()


def open_session(model, path, context, rows, kv_type):
    """The session in a file, or a new one where there is none."""
    if path is None or not os.path.lexists(path):
        return model.session(context=context, rows=rows, kv_type=kv_type)
    return model.load_session(path, context=context, rows=rows)


@click.command(cls=options.Sectioned)
@options.model_argument
@options.model_option
@options.text_options
@click.option("-n", "--n-predict", "max_tokens", type=int, default=256, show_default=True, metavar="N",
              help="At most N tokens; -1: until the model ends or the context is full.")
@click.option("--chat/--raw", "as_chat", default=None,
              help="Send the text as a message in the model's chat template, or as it is. "
                   "Without MODEL --chat, else --raw.")
@click.option("-sys", "--system-prompt", "system", type=options.Text(),
              help="With --chat: what the model is told first.")
@click.option("--prefill", type=options.Text(),
              help="With --chat: how the answer begins; what follows it is printed.")
@options.template_options
@click.option("-r", "--stop", type=options.Text(), multiple=True, help="End before this text; repeatable.")
@click.option("--ignore-eos", is_flag=True, help="Go on where the model would end.")
@click.option("--no-bos", is_flag=True, help="With --raw: no BOS token before the text.")
@options.form_options
@options.sampling_options
@options.draft_options
@options.context_option
@options.threads_option
@options.arena_options
@options.json_option
def generate(model, model_option, prompt, prompt_file, max_tokens, as_chat, system, prefill, chat_template,
             thoughts, reasoning_budget, stop, ignore_eos, no_bos, context, threads, rows, kv_type, as_json,
             tint, **flags):
    """Continue a text (-p, -f, or stdin).

    What follows the text is printed; `pybmc run` is the same command. In a raw text control tokens
    such as <|im_start|> count; an empty one is continued from the model's BOS token alone. Without
    MODEL the bundled model answers.
    """
    from ..chat.generate import generate as start
    from ..chat.reader import splitter_of
    from .report import summary

    settings, form = options.sampling_settings(flags), options.form_settings(flags)
    variables = options.template_variables(flags)
    text = options.read_text(prompt, prompt_file)
    as_chat = as_chat if as_chat is not None else not (model or model_option)
    for flag, given in (("-sys", system), ("--prefill", prefill), ("--chat-template", chat_template),
                        ("--chat-template-kwargs or --think", variables)):
        if given and not as_chat:
            raise click.UsageError(f"{flag} needs --chat")
    if no_bos and as_chat:
        raise click.UsageError("--no-bos needs --raw: a chat template says itself what begins a text")
    if as_chat and not text:
        raise click.UsageError(f"the message is empty; {options.HOW_TO_GIVE_TEXT}")
    prompt = text
    if as_chat:
        prompt = [{"role": role, "content": content}
                for role, content in (("system", system), ("user", text), ("assistant", prefill))
                if content or role == "user"]
    with options.with_draft(flags, not (model or model_option), threads) as drafting, \
            options.opened(options.find_model(model, model_option), threads) as (loaded, load_s), \
            loaded.session(context=context, rows=rows, kv_type=kv_type) as session, \
            progress("prompt") as update:
        if no_bos and loaded.tokenizer:
            prompt = loaded.tokenizer.encode(text, bos=False, special=True)
        written = options.template_of_model(loaded, chat_template, variables) if as_chat else {}
        answer = start(loaded, prompt, None if max_tokens < 0 else max_tokens, session=session, stop=stop,
                       stop_tokens=() if ignore_eos else None, progress=update,
                       reasoning_budget=None if reasoning_budget < 0 else reasoning_budget,
                       **written, **settings, **drafting, **form)
        splitter = splitter_of(written.get("chat_template"), loaded.tokenizer, answer.prompt)
        voice = Voice(thoughts, splitter, tint)
        voice.reasoning.push(prefill or "")
        tokens = []
        for token in answer:
            tokens.append(token)
            if not as_json:
                voice.say(token)
        if not as_json:
            voice.end()
            if form and tokens and tokens[-1].finish_reason == "length":
                note(f"(cut off after {len(tokens)} tokens: the answer is not whole)", dim=True)
        arena = session.arena_stats()
    if as_json:
        options.print_json(generation_json(answer, tokens, load_s))
    else:
        write("\n")
        if is_terminal(sys.stderr):
            seed = settings["seed"] if settings["temperature"] else None
            note(summary(answer.stats, arena, seed), dim=True)


def generation_json(answer, tokens, load_s: float) -> dict:
    stats = answer.stats
    timings = {"load_s": load_s, "prompt_s": stats.prompt_s, "prompt_tok_s": stats.prompt_tok_s,
               "predicted_s": stats.predicted_s, "predicted_tok_s": stats.predicted_tok_s,
               "draft_n": stats.draft_n, "draft_n_accepted": stats.draft_n_accepted}
    return {"text": "".join(t.text for t in tokens), "tokens": [t.id for t in tokens],
            "prompt_tokens": stats.prompt_tokens,
            "finish_reason": tokens[-1].finish_reason if tokens else "length",
            "timings": {name: options.rounded(value) for name, value in timings.items()}}
