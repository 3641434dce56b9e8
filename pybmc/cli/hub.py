"""Commands about models of the hub: pull, list and rm."""

import sys

import click

from ..errors import BmcError, printable
from .options import File, Text, json_option, print_json
from .terminal import is_terminal, note, write


@click.command()
@click.argument("name", metavar="USER/REPO[:QUANT]", type=Text())
@click.option("--file", type=Text(), metavar="FILE", help="This file of the repository.")
@click.option("--revision", type=Text(), metavar="NAME", help="A branch, a tag or a commit; by default main.")
@click.option("--draft", type=Text(), metavar="USER/REPO[:QUANT]", help="Bring a draft model too.")
@json_option
def pull(name, file, revision, draft, as_json):
    """Bring a model of the Hugging Face hub to this machine.

    Prints where the file is. Without QUANT it is Q4_K_M, else Q4_0, else Q8_0, else the smallest that runs.
    Its header is read first: a model that pybmc does not run, or for which the disk has no room, is not
    fetched. It goes into the cache that the hub's own tools use (HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT
    and HF_HUB_OFFLINE are honoured), and is checked against the hub's sha256.
    """
    from ..hub.transfer import pull as bring

    bars = not as_json and is_terminal(sys.stderr)
    for wanted, its_file, its_revision in [(name, file, revision), *([(draft, None, None)] if draft else [])]:
        pulled = bring(wanted, its_file, its_revision, lambda line: note(line, dim=True), bars)
        if as_json:
            print_json({"name": pulled.name, "path": str(pulled.path), "bytes": pulled.bytes,
                        "architecture": pulled.facts["architecture"]})
        else:
            write(f"{pulled.path}\n")
            note(f"pybmc chat {pulled.name}", dim=True)


@click.command("list")
@json_option
def list_models(as_json):
    """The models that are on this machine.

    They are those of the hub's cache, and the bundled pair. Their names stand for them in every command.
    """
    from ..hub.listing import entries

    found = entries()
    if as_json:
        for entry in found:
            print_json(entry)
        return
    columns = (("name", ""), ("size", ""), ("quantization", "-"), ("architecture", "-"), ("why_not", "yes"))
    rows = [[printable(str(entry[name] or other), 200) for name, other in columns] for entry in found]
    rows = [["name", "size", "type", "architecture", "runs"], *rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    write("".join("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths)).rstrip() + "\n"
                  for row in rows))


@click.command()
@click.argument("name", type=File())
@click.option("-y", "--yes", is_flag=True, help="Without asking.")
def rm(name, yes):
    """Remove a model from the hub's cache.

    Its links go, and the bytes that nothing else uses.
    """
    from ..hub.store import removable, remove
    from ..show import size

    model = removable(name)
    if not yes:
        if not is_terminal(sys.stdin):
            raise click.UsageError("rm asks before it removes: use -y where nobody can answer")
        if not click.confirm(f"Remove {model.name}?", err=True):
            raise BmcError(f"{model.name} stays")
    note(f"{model.name} is removed, {size(remove(model))} are free")
