"""The command that turns texts into vectors: embed."""

import json
import sys
from contextlib import nullcontext

import click

from .options import (
    File,
    Text,
    json_option,
    model_option,
    need_model,
    opened,
    read_text,
    threads_option,
)
from .terminal import is_terminal, progress, write

FORMATS = ("floats", "json", "npy")


@click.command()
@click.argument("args", nargs=-1, type=Text(), metavar="MODEL [TEXT]...")
@model_option
@click.option("-f", "--file", "text_file", type=File(), metavar="FILE",
              help="Read texts from a file, one a line; - is stdin.")
@click.option("--pooling", type=click.Choice(["mean", "first", "last", "rank", "none"]),
              help="How the vectors of a text's tokens become one; by default what the file says, else the "
                   "mean. rank: the scores of a reranker; none: a vector for each token.")
@click.option("--dimensions", type=click.IntRange(1), metavar="N",
              help="Only the first N values, of models that were trained for that.")
@click.option("--normalize/--no-normalize", default=True, show_default=True,
              help="Make every vector's length 1.")
@click.option("--format", "form", type=click.Choice(FORMATS), metavar="|".join(FORMATS),
              help="floats (default): a line of numbers for each text; json: an object for each text, as "
                   "--json; npy: a file of numpy's.")
@click.option("-o", "--output", type=File(dir_okay=False), metavar="FILE",
              help="Write there instead of to stdout; npy needs it.")
@threads_option
@json_option
def embed(args, model_option, text_file, pooling, dimensions, normalize, form, output, threads, as_json):
    """Embeddings: a vector for each text.

    Texts are each TEXT, or each line of -f FILE or stdin. Those with close meanings have vectors
    with a large dot product. A text gets the tokens that the model wants around it; its vector does
    not depend on the other texts.
    """
    import numpy as np

    if as_json and form not in (None, "json"):
        raise click.UsageError(f"--json and --format {form} are both given")
    form = "json" if as_json else form or "floats"
    if form == "npy" and output is None:
        raise click.UsageError("--format npy needs -o FILE")
    if pooling == "none" and form != "json":
        raise click.UsageError("--pooling none gives a vector for each token: use --format json")
    first = 0 if model_option else 1
    path = need_model("".join(args[:first]), model_option)
    texts = texts_of(args[first:], text_file)
    with open(output, "wb") if output else nullcontext() as file:
        with opened(path, threads, writes=False) as (loaded, _), progress("embedding") as update:
            found = loaded.embed(texts, normalize, pooling, dimensions, update)
        if form == "npy" and file is not None:
            np.save(file, found)
            return
        for i, vectors in enumerate(found):
            line = json_line(i, vectors) if form == "json" else " ".join(map(str, vectors)) + "\n"
            if file:
                file.write(line.encode())
            else:
                write(line)


def texts_of(texts, file) -> list[str]:
    """The texts of the command line, else the lines of the file or of stdin."""
    if texts and file is not None:
        raise click.UsageError("texts and -f are both given")
    if texts:
        return list(texts)
    if file is None and (sys.stdin is None or is_terminal(sys.stdin)):
        raise click.UsageError("no text is given: name texts, use -f FILE, or pipe lines in")
    lines = read_text(None, file).split("\n")
    if not lines[-1]:                   # what follows the last line's end
        lines.pop()
    if not lines:
        raise click.UsageError("there are no lines to read")
    return [line.removesuffix("\r") for line in lines]


def json_line(i: int, vectors) -> str:
    return json.dumps({"index": i, "embedding": shortest(vectors)}) + "\n"


def shortest(vectors):
    """float32 as the shortest numbers that read back the same."""
    if vectors.ndim > 1:
        return [shortest(vector) for vector in vectors]
    return [float(str(value)) for value in vectors]
