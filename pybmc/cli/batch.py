"""The command batch."""

import os
from pathlib import Path

import click

from ..errors import BmcError
from .options import (
    SAMPLING,
    File,
    asks_for_gpu,
    context_option,
    draft_options,
    find_model,
    gpu_settings,
    model_option,
    opened,
    sampling_options,
    sampling_settings,
    threads_option,
    with_draft,
)
from .terminal import note, progress


@click.command()
@click.argument("source", metavar="IN.jsonl", type=File())
@click.argument("target", metavar="OUT.jsonl", type=File())
@model_option
@click.option("-n", "--n-predict", "max_tokens", type=int, default=256, show_default=True, metavar="N",
              help="At most N tokens a line; -1: until the model ends or the context is full.")
@click.option("-np", "--parallel", type=click.IntRange(1, 1024), default=8, show_default=True, metavar="N",
              help="Lines that are written at a time.")
@click.option("--ray", metavar="ADDRESS",
              help="Answer on a Ray cluster, with an engine on each node; local starts one here. "
                   "Each node needs the model under the same name.")
@sampling_options
@draft_options
@context_option
@threads_option
def batch(source, target, model_option, max_tokens, parallel, ray, context, threads, tint, **flags):
    """Answer a file of prompts, one JSON object a line.

    Line n of OUT.jsonl answers line n of IN.jsonl. A line has "prompt" (a text as it is, or token ids)
    or "messages" (for the chat template), and may have "id", which its answer repeats, "max_tokens",
    "stop", "chat_template_kwargs", "tools" and one of "response_format", "json_schema" and "grammar"
    as the server takes them, and the settings of sampling by their names in Python, such as
    "temperature" and "seed"; what it does not have, the options say. A line that fails gets an answer
    with "error", and the exit status is 1.

    OUT.jsonl grows in the order of IN.jsonl.
    The same command goes on where an earlier one ended, however that ended.
    """
    from ..batch.lines import Output, count_lines, read_lines

    source, target = Path(source), Path(target)
    name = str(find_model(model_option))
    asked = sampling_settings(dict(flags)) | {"seed": None if flags["seed"] == -1 else flags["seed"]}
    settings = asked | {"max_tokens": None if max_tokens < 0 else max_tokens}
    options = {"settings": settings, "parallel": parallel, "context": context}
    identity = {**settings, "context": context, "model": os.path.basename(name),
                "size": os.stat(name).st_size}
    total = count_lines(source)
    with Output(target, source, identity) as output, progress("batch") as update:
        if output.done:
            note(f"{target} has {output.done} of {total} answers", dim=True)
        lines = read_lines(source, identity, output.done)
        left = output.done < total
        answers = _answers(lines, ray, name, model_option, threads, options, flags) if left else ()
        for answer in answers:
            output.write(answer)
            if update:
                update(output.done, total)
    if output.failed:
        raise BmcError(f"{output.failed} of {total} lines failed: their answers in {target} say why")


def _answers(lines, ray, name, model_option, threads, options, flags):
    flags = {key: value for key, value in flags.items() if key not in SAMPLING}
    if ray:
        from ..batch.cluster import answers

        if asks_for_gpu() or asks_for_gpu(draft=True) or "prompts" in gpu_settings():
            raise click.UsageError("--ray: the nodes compute on their CPUs; "
                                   "--gpu, -ngl, -ngld and --prompts have no effect there")

        drafting = {key: flags[key] for key in ("spec", "draft_max", "draft_min")}
        yield from answers(lines, ray, model_option or "demo", flags["draft"], threads,
                           {**options, **drafting})
        return
    from ..batch.worker import Worker

    with with_draft(flags, not model_option, threads) as drafting, \
            opened(Path(name), threads) as (model, _), \
            Worker(model, **options, **drafting) as worker:
        yield from worker.answers(lines)
