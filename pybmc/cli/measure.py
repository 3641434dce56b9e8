"""Commands that measure a model: bench and perplexity."""

import sys

import click

from ..errors import ArgumentError
from . import options
from .terminal import is_terminal, progress, write


@click.command()
@options.model_argument
@options.model_option
@click.option("-p", "--n-prompt", "prompts", type=options.Counts(), default="512", show_default=True,
              help="Prompt lengths.")
@click.option("-n", "--n-gen", "generated", type=options.Counts(), default="64", show_default=True,
              help="Lengths to generate.")
@click.option("-b", "--widths", type=options.Counts(), default="1,2,4,8,16", show_default=True,
              help="Tokens in a verification pass: logits for all of them, then a rewind.")
@click.option("-d", "--depths", type=options.Counts(), default="0", show_default=True,
              help="Tokens held before the test.")
@click.option("-r", "--reps", type=click.IntRange(1), default=5, show_default=True, metavar="N",
              help="Repetitions of each test.")
@click.option("--breakdown", is_flag=True, help="Tell what the time of each test is spent on.")
@options.threads_option
@options.arena_options
@options.json_option
def bench(model, model_option, prompts, generated, widths, depths, reps, breakdown, threads, rows, kv_type,
          as_json):
    """Measure prompts, generation and verification.

    Without MODEL the bundled model is measured. An empty list skips a test.
    """
    from ..engine import bench as benches

    run = benches.breakdown if breakdown else benches.bench
    with options.opened(options.find_model(model, model_option), threads) as (loaded, _):
        try:
            results = run(loaded, prompts, generated, widths, depths, reps, rows)
        except ArgumentError as error:
            raise click.UsageError(str(error)) from None
        lines = print_breakdowns if breakdown else print_table if is_terminal(sys.stdout) else print_lines
        show_results = print_json_lines if as_json else lines
        show_results(results)


def print_json_lines(results) -> None:
    for result in results:
        options.print_json({name: _rounded(value) for name, value in vars(result).items()})


def _rounded(value):
    if isinstance(value, dict):
        return {key: options.rounded(its) for key, its in value.items()}
    return options.rounded(value)


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


@click.command()
@options.model_argument
@options.model_option
@click.option("-f", "--file", "text_file", required=True, type=options.File(), metavar="FILE",
              help="The text; - is stdin.")
@click.option("-c", "--ctx-size", "window", type=click.IntRange(4), default=512, show_default=True,
              metavar="N", help="Tokens in a window; the second half of each is scored.")
@click.option("--no-bos", is_flag=True, help="No BOS token at the beginning of a window.")
@options.threads_option
@options.json_option
def perplexity(model, model_option, text_file, window, no_bos, threads, as_json):
    """How well a model predicts a text.

    It is counted as llama.cpp counts it. Without MODEL the bundled model is taken.
    """
    from ..engine.perplexity import perplexity as measure

    text = options.read_text(None, text_file)
    path = options.find_model(model, model_option)
    with options.opened(path, threads) as (loaded, _), progress("perplexity") as update:
        found = measure(loaded, text, window, update, not no_bos)
    if as_json:
        options.print_json(vars(found))
    else:
        write(f"perplexity {found.ppl:.4f} +/- {found.stderr:.4f} over {found.tokens} tokens, "
              f"{found.bits_per_byte:.4f} bits a byte\n")
