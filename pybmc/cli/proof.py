"""The command prove."""

from contextlib import contextmanager
from dataclasses import asdict

import click

from ..errors import DeviceError
from . import options
from .terminal import write

EXIT_UNPROVEN = 3


@click.command()
@options.model_argument
@options.model_option
@click.option("--draft", "-md", "--model-draft", "draft", type=options.File(), metavar="MODEL",
              help="A draft model, whose drafts are compared too.")
@click.option("-p", "--prompt", type=options.Text(),
              help="The text to go on with, instead of a few of its own.")
@click.option("-f", "--file", "prompt_file", type=options.File(), metavar="FILE", help="Read it from a file.")
@click.option("-n", "--n-predict", "max_tokens", type=click.IntRange(2), default=64, show_default=True,
              metavar="N", help="Tokens to write after each text.")
@click.option("--temp", "temperatures", type=float, multiple=True, default=(0.0, 0.8), show_default=True,
              metavar="T", help="Temperature; repeatable.")
@click.option("-s", "--seed", type=int, default=0, show_default=True, metavar="N",
              help="Seed of the choices.")
@options.threads_option
@options.json_option
def prove(model, model_option, draft, prompt, prompt_file, max_tokens, temperatures, seed, threads, as_json):
    """Show that drafting changes no token and no logit.

    Texts are decoded plainly and speculatively, and compared bit by bit. Drafts of every length, right and
    wrong on purpose, are checked. With --gpu or -ngl the model is loaded twice, and what the GPU computes is
    compared with the CPU. With --prompts cublas tokens and logits with drafts and without are compared on the
    GPU, after prompts of more than 512 tokens, and the distance of its logits from the exact ones is told.
    Without MODEL the bundled pair is taken. Exit status 3 if anything differs.
    """
    from ..engine.prove import PROMPTS
    from ..engine.prove import prove as run

    texts = PROMPTS if prompt is None and prompt_file is None else [options.read_text(prompt, prompt_file)]
    flags = {"draft": draft, "draft_max": 16, "draft_min": 0, "spec": "auto"}
    results = []
    path = options.find_model(model, model_option)
    with options.with_draft(flags, not (model or model_option), threads) as drafting, \
            options.opened(path, threads, gpu={}) as (loaded, _), on_gpu(path, threads) as gpu:
        for found in run(loaded, texts, max_tokens, drafting["draft"], temperatures, seed, gpu):
            results.append(found)
            if as_json:
                options.print_json(asdict(found) | {"equal": found.difference is None})
            else:
                write(compared(found) + "\n")
    differ = [found for found in results if found.difference]
    if not as_json:
        write(verdict(results, differ) + "\n")
    return EXIT_UNPROVEN if differ else 0


@contextmanager
def on_gpu(path, threads):
    """The model with layers on a GPU, where the flags ask for one; else None."""
    from ..engine.prove import STREAMED

    settings = options.gpu_settings()
    if not options.asks_for_gpu():
        yield None
        return
    if settings["stream_tokens"] is None:
        settings["stream_tokens"] = STREAMED
    with options.opened(path, threads, gpu=settings) as (loaded, _):
        if not loaded.gpu_layers and not loaded.streams:
            raise DeviceError(f"no layer of {path} runs on a GPU: there is nothing to compare")
        yield loaded


def compared(found) -> str:
    away = ""
    if found.distance is not None:
        away = f"; prompt by cuBLAS: logits up to {found.distance:.3g} from the exact ones"
    line = (f"prompt {found.prompt + 1}, temperature {found.temperature:g}, {found.drafts}: "
            f"{found.tokens} tokens, {found.passes} passes, "
            f"{found.accepted} of {found.drafted} drafted tokens accepted, {found.rows} rows of logits")
    if found.difference is None:
        return f"{line}: equal{away}"
    d = found.difference
    return (f"{line}: {d.what} differs at position {d.position}, plain {d.plain}, drafted {d.drafted}; "
            f"the two best plain logits are {d.gap:.6g} apart, "
            f"logits differ by up to {d.largest:.6g}{away}")


def verdict(results, differ) -> str:
    tokens, rows = sum(r.tokens for r in results), sum(r.rows for r in results)
    if differ:
        return f"not proven: {len(differ)} of {len(results)} comparisons differ"
    return f"proven: {tokens} tokens and {rows} rows of logits are equal bit by bit{by_cublas(results)}"


def by_cublas(results) -> str:
    """What that means where prompts are by cuBLAS."""
    far = [r.distance for r in results if r.distance is not None]
    if not far:
        return ""
    return (", with drafts and without; prompts by cuBLAS are not the CPU's: "
            f"logits differ by up to {max(far):.3g}")
