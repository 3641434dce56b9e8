"""The command that serves a model over HTTP."""

import logging
import os
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import click

from ..errors import BmcError, needs_packages
from .options import (
    File,
    Number,
    Size,
    TemplateSource,
    Text,
    context_option,
    draft_options,
    find_model,
    json_option,
    model_argument,
    model_option,
    opened,
    options,
    print_json,
    sampling_options,
    sampling_settings,
    template_variables,
    threads_option,
    variable_options,
    with_draft,
)
from .terminal import write

place_options = options(
    click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS",
                 help="Where to listen; several with commas between them, as 127.0.0.1,::1."),
    click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, metavar="N",
                 help="0: a free one."),
    click.option("--unix", type=File(), metavar="PATH", help="Listen on a Unix socket instead."),
    click.option("--alias", "names", type=Text(), multiple=True, metavar="NAME",
                 help="The model's id; repeatable, the first one is reported. Default: the file's name "
                      "without .gguf."),
    click.option("--strict-model", is_flag=True, help="Refuse requests under /v1 that name another model."))
door_options = options(
    click.option("--api-key", "keys", type=Text(), multiple=True, metavar="KEY",
                 help="A key that requests have to bring; repeatable. "
                      "Needed where the host is not loopback."),
    click.option("--api-key-file", "key_file", type=File(), metavar="FILE", help="Keys, one a line."),
    click.option("--insecure", is_flag=True, help="Listen on other addresses than loopback without a key."),
    click.option("--allow-host", "hosts", type=Text(), multiple=True, metavar="NAME",
                 help="A name by which the server may be addressed, besides addresses and local names; "
                      "repeatable."),
    click.option("--allow-origin", "origins", type=Text(), multiple=True, metavar="ORIGIN",
                 help="An origin whose pages may use the server, besides local ones; repeatable."),
    click.option("--max-body", type=Size(), default="8M", show_default=True,
                 help="Largest body of a request."))
work_options = options(
    click.option("--parallel", type=click.IntRange(1, 256), default=8, show_default=True, metavar="N",
                 help="Sequences that are written at a time."),
    click.option("--queue", type=click.IntRange(1), default=64, show_default=True, metavar="N",
                 help="Requests that may wait; more are refused with 429."),
    click.option("--queue-seconds", type=Number(0, min_open=True), default=600, show_default=True,
                 metavar="S", help="How long a request may wait."),
    click.option("--max-tokens", type=click.IntRange(1), default=8192, show_default=True, metavar="N",
                 help="Length of an answer where a chat names none."),
    click.option("--memory", type=Size(),
                 help="For keys and values of all sequences, and of earlier ones whose beginnings are used "
                      "again. Default: half of what is free once the model is loaded, "
                      "of a GPU's memory four fifths."),
    click.option("--pass-ms", type=Number(1), default=100, show_default=True, metavar="MS",
                 help="How long a pass that reads prompts may take while answers are written."),
    click.option("--pooling", type=click.Choice(["mean", "first", "last", "none", "rank"]),
                 help="How embeddings are made; default: as the file says. none: one for each token; rank: "
                      "scores, for /rerank."),
    click.option("--sessions", type=File(), metavar="DIR",
                 help="A folder of saved sessions, for requests and slots that name one; it is made where "
                      "there is none."),
    click.option("--chat-template", type=TemplateSource(),
                 help="How messages are written, instead of the model's own template."),
    click.option("--reasoning-budget", type=click.IntRange(-1), default=-1, show_default=True, metavar="N",
                 help="Tokens that a thought may have where a request names none, behind which its end is "
                      "forced; -1: any number."))
server_options = options(
    click.option("--grace", type=Number(0), default=5, show_default=True, metavar="S",
                 help="How long running answers may go on after SIGTERM or Ctrl-C."),
    click.option("--no-page", is_flag=True, help="No page at /."),
    click.option("--no-slots", is_flag=True, help="No list of slots: GET /slots."),
    click.option("--no-metrics", is_flag=True, help="No /metrics."),
    click.option("--allow-pull", is_flag=True, help="/api/pull may bring models of the hub to this machine."),
    click.option("--log-texts", type=File(), metavar="FILE", help="Append prompts and answers to a file."))


@click.command()
@model_argument
@model_option
@place_options
@door_options
@work_options
@variable_options
@context_option
@sampling_options
@draft_options
@threads_option
@server_options
@json_option
def serve(model, model_option, host, port, unix, key_file, insecure, grace, no_page, as_json, threads,
          **flags):
    """Serve a model over HTTP.

    Clients of OpenAI, Anthropic, Ollama and llama-server can use it. Without MODEL it is the bundled model.
    Sampling flags are what requests get that name nothing else. Every flag can also be set by a variable, as
    PYBMC_PORT for --port. Ctrl-C ends the server; docs/server.md lists the routes.
    """
    try:
        from ..serve import run
        from ..serve.door import is_loopback
        from ..serve.http import append_private
        from ..serve.service import Service
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("pybmc"):
            raise
        raise BmcError(needs_packages("pybmc serve", "serve") + f" ({error.name} is missing)") from None
    import asyncio

    from .repl import note_unread

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")    # texts come one by one, and need no threads
    if flags["allow_pull"] and not find_spec("huggingface_hub"):
        raise BmcError(needs_packages("--allow-pull", "hub"))
    keys = [*flags.pop("keys"), *(read_keys(key_file) if key_file else [])]
    if not all(keys):
        raise click.UsageError("an API key is empty")
    if not all(flags["names"]):
        raise click.UsageError("an alias is empty")
    place = run.Place(host, port, unix)
    if not all(place.hosts):
        raise click.UsageError(f"--host: expected addresses with commas between them, found {host!r}")
    open_hosts = [host for host in place.hosts if not is_loopback(host)]
    if open_hosts and not keys and not insecure and not unix:
        raise click.UsageError(f"--host {open_hosts[0]} can be reached from elsewhere: "
                               "give --api-key, or --insecure")
    policy = make_policy(flags, keys, place.hosts)
    settings = make_settings(flags)
    path, context, models = find_model(model, model_option), click.get_current_context(), ExitStack()
    if settings.log_texts:
        append_private(settings.log_texts, b"")
    place.bind()
    services = []

    def load():
        started = time.perf_counter()
        with context.scope(cleanup=False):
            drafting = models.enter_context(with_draft(flags, not (model or model_option), threads))
            loaded, _ = models.enter_context(opened(path, threads, writes=False))
        made = replace(settings, **{name: drafting[name] for name in ("spec", "draft_max", "draft_min")})
        services.append(Service(loaded, drafting["draft"], made, time.perf_counter() - started))
        note_unread(services[0].template, settings.template_variables)
        return services[0]

    def ready(service):
        if as_json:
            print_json({"url": place.url, "model": service.name, "pid": os.getpid()})
        else:
            write(f"pybmc serves {service.name} at {place.url}\n")

    with logged():
        asyncio.run(run.serve(place, policy, load, ready, grace, not no_page))
    if unix:
        Path(unix).unlink(missing_ok=True)
    if not services:                        # ended while the model was loading: nobody waits for that
        sys.stdout.flush()
        os._exit(0)
    models.close()


serve.params = [param for param in serve.params if param.name != "tint"]    # there is no terminal to colour
for param in serve.params:
    if isinstance(param, click.Option):
        flag = next(name for name in param.opts if name.startswith("--"))
        param.envvar = "PYBMC_" + flag[2:].replace("-", "_").upper()


def read_keys(path) -> list[str]:
    keys = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    keys = [key for key in keys if key]
    if not keys:
        raise click.UsageError(f"{path} has no key")
    return keys


def make_policy(flags: dict, keys: list[str], hosts: list[str]):
    from ..serve.door import Policy

    return Policy(keys, [*flags.pop("hosts"), *hosts], flags.pop("origins"), flags.pop("max_body"),
                  not flags.pop("no_slots"), not flags.pop("no_metrics"), flags.pop("allow_pull"))


def make_settings(flags: dict):
    """Settings of the service; what is left in flags is about drafting."""
    from ..serve.service import Settings

    sampling = sampling_settings(flags)
    if flags["seed"] == -1:
        del sampling["seed"]
    same = ("names", "parallel", "queue", "queue_seconds", "context", "max_tokens", "memory", "pooling",
            "chat_template", "strict_model", "log_texts", "reasoning_budget", "sessions")
    return Settings(sampling=sampling, template_variables=template_variables(flags),
                    pass_seconds=flags.pop("pass_ms") / 1e3, **{name: flags.pop(name) for name in same})


@contextmanager
def logged():
    """A line a request on stderr."""
    handler, log = logging.StreamHandler(), logging.getLogger("pybmc")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
