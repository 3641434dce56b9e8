"""Commands that read a file and run nothing: show and tokenize."""

import json

import click

from . import options
from .terminal import write


@click.command()
@options.model_argument
@options.model_option
@click.option("--gpu", "with_gpus", is_flag=True,
              help="Say how many layers fit on each GPU of this machine, and what they take.")
@options.json_option
def show(model, model_option, with_gpus, as_json):
    """What is in a file, and whether it runs.

    Shown are architecture, types, sizes, tokenizer and template, without MODEL those of the bundled model.
    MODEL may be a model of the hub (user/repo[:QUANT]): where it is not here, its header is read there.
    """
    from ..hub.store import NotHere
    from ..show import describe, describe_gpus, gpu_lines, lines

    on_gpus = None
    try:
        path = options.find_model(model, model_option)
        info = describe(path)
        if with_gpus and info["runs"]:
            on_gpus = describe_gpus(path)
    except NotHere:
        from ..hub.transfer import look

        info = look(model or model_option)
    if as_json:
        options.print_json(info if on_gpus is None else info | {"gpus": on_gpus})
    else:
        rows = lines(info) + (gpu_lines(on_gpus) if on_gpus is not None else [])
        write("".join(f"{label:14}{text}\n" for label, text in rows))


@click.command()
@options.model_argument
@options.model_option
@options.text_options
@click.option("--no-bos", is_flag=True, help="Leave out the tokens that the model wants around a text.")
@click.option("--special/--no-special", default=False, show_default=True,
              help="Let control tokens in the text count.")
@options.json_option
def tokenize(model, model_option, prompt, prompt_file, no_bos, special, as_json):
    """Token ids and pieces of a text (-p, -f, or stdin).

    A vocabulary without weights is enough. Without MODEL it is that of the bundled model.
    """
    from ..tokenizers import Tokenizer

    path = options.find_model(model, model_option)
    text = options.read_text(prompt, prompt_file)
    tokenizer = Tokenizer(path)
    ids = tokenizer.encode(text, bos=not no_bos, special=special)
    pieces = [tokenizer.piece(id) for id in ids]
    if as_json:
        options.print_json({"tokens": ids, "pieces": [spelled(piece) for piece in pieces]})
    else:
        shown = [json.dumps(spelled(piece), ensure_ascii=False) for piece in pieces]
        write("".join(f"{id:>7}  {piece}\n" for id, piece in zip(ids, shown)))


def spelled(piece: bytes) -> str | list[int]:
    """A piece as text; the bytes of one that is only a part of a character."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)
