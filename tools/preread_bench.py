"""Measure what reading ahead brings in a chat: the time from Enter to the first token of an answer,
with and without.

\b
    python -m tools.preread_bench model.gguf
    python -m tools.preread_bench model.gguf --answer 1000 --wpm 40 --runs 3 --json

The model writes an answer of --answer tokens. Then a message is typed, key by key, at --wpm words a minute (a
word is five keys), and the first token of its answer is waited for; with and without reading ahead in turns,
each time from the same conversation. The battery is not looked at.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import click

from pybmc import Model
from pybmc.chat.conversation import Conversation
from pybmc.chat.preread import Preread, Reader
from pybmc.cli.options import find, print_json
from pybmc.cli.terminal import note

KEYS_A_WORD = 5
QUESTION = "Explain how a mill grinds grain, step by step and in detail."
MESSAGE = ("Thank you, that helps. Now tell me please which part of it wears out first, how often the miller "
           "has to repair it, and what would happen if nobody did so for a whole year.")


@dataclass(frozen=True)
class Turn:
    """From Enter to the first token, and the tokens of the prompt that were read in that time."""

    seconds: float
    read: int
    prompt: int


def turn(talk: Conversation, message: str, key_seconds: float, preread: bool,
         sleep: Callable[[float], None] = time.sleep) -> Turn:
    """Type a message that follows a conversation, which stays as it is."""
    talk = copy.copy(talk)
    talk.messages = list(talk.messages)
    with talk.session.fork() as talk.session:
        ahead = Preread(Reader(talk, on_battery=lambda: False)) if preread else None
        with ahead or nullcontext():
            for n in range(1, len(message) + 1):
                sleep(key_seconds)
                if ahead:
                    ahead.note(message[:n])
            entered = time.perf_counter()
        answer = talk.ask(message)
        next(answer)
        seconds = time.perf_counter() - entered
        answer.close()
    return Turn(seconds, talk.stats.prompt_tokens - talk.stats.reused_tokens, talk.stats.prompt_tokens)


def measured(talk: Conversation, message: str, key_seconds: float, runs: int) -> dict[str, list[Turn]]:
    turns: dict[str, list[Turn]] = {"without": [], "with": []}
    for run in range(runs):
        for name, found in turns.items():
            found.append(turn(talk, message, key_seconds, name == "with"))
            note(f"{name} reading ahead, {run + 1} of {runs}: {1e3 * found[-1].seconds:.0f} ms", dim=True)
    return turns


def answered(model: Model, session, tokens: int) -> Conversation:
    """A conversation with one answer of this number of tokens."""
    talk = Conversation(model, session, max_tokens=tokens, stop_tokens=(), temperature=0.8, seed=1)
    for _ in talk.ask(QUESTION):
        pass
    return talk


@click.command(help=__doc__)
@click.argument("model")
@click.option("--answer", type=click.IntRange(1), default=1000, show_default=True, metavar="N",
              help="Tokens of the answer before.")
@click.option("--message", default=MESSAGE, help="What is typed.")
@click.option("--wpm", type=click.FloatRange(0, min_open=True), default=40, show_default=True,
              help="Words a minute.")
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, metavar="N",
              help="Messages typed, each way.")
@click.option("-t", "--threads", type=click.IntRange(1, 512), metavar="N", help="Threads of the model.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def main(model, answer, message, wpm, runs, threads, as_json):
    if not message.strip():
        raise click.UsageError("the message is empty")
    with Model(find(model), threads=threads) as loaded, loaded.session() as session:
        loaded.check_writes()
        turns = measured(answered(loaded, session, answer), message, 60 / (wpm * KEYS_A_WORD), runs)
    medians = {name: statistics.median(turn.seconds for turn in found) for name, found in turns.items()}
    ratio = medians["with"] / medians["without"]
    if as_json:
        print_json({name: [asdict(turn) for turn in found] for name, found in turns.items()}
                   | {"ratio": ratio})
        return
    for name, found in turns.items():
        click.echo(f"{name:8} reading ahead: {1e3 * medians[name]:7.0f} ms to the first token, "
                   f"{found[-1].read} of {found[-1].prompt} "
                   "tokens read after Enter")
    click.echo(f"ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
