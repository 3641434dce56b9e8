"""The command line: words and wires only.
Heavy modules are imported where they are used, so that help is instant."""

import os
import sys

import click

from .. import __version__
from . import batch, files, hub, measure, proof, serve, talk, vectors
from .terminal import ReaderLeft, note, sentence

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130


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


for command in (talk.chat, talk.generate, serve.serve, vectors.embed, files.show, files.tokenize,
                measure.bench, measure.perplexity, proof.prove, batch.batch,
                hub.pull, hub.list_models, hub.rm):
    cli.add_command(command)


# ---- the door ----------------------------------------------------------------------------------------------


def main(args=None) -> None:
    """Run a command and exit with its status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    status = run(args)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:                     # a full disk: at exit Python would try again, and complain
        leave_quietly()
        status = status or EXIT_FAILED
    sys.exit(status)


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
    """The reader of our output has left with what it wanted: nothing more is written, not even at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
