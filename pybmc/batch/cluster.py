"""A batch over Ray Data: an actor with an engine on each node. A task whose worker is killed runs again
elsewhere, and gives the same answers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from ..errors import BmcError, needs_packages
from .lines import Line, written
from .worker import Worker

TASK = 4                                # lines of a task, for each that is written at a time


class Actor:
    """Opens a model once, and answers batches of lines."""

    def __init__(self, path: str, draft: str | None, threads: int | None, options: dict):
        from ..engine.model import Model
        from ..hub.store import find

        opened = [Model(find(name), threads=threads) if name else None for name in (path, draft)]
        self.worker = Worker(opened[0], draft=opened[1], **options)

    def __call__(self, batch: dict) -> dict:
        lines = [Line(int(number), str(key), bytes(data))
                 for number, key, data in zip(batch["number"], batch["key"], batch["data"])]
        return {"answer": [written(answer) for answer in self.worker.answers(lines)]}


def answers(lines: Iterable[Line], address: str, path: str, draft: str | None, threads: int | None,
            options: dict) -> Iterator[dict]:
    """As Worker.answers(), from a Ray cluster. The model and draft are names that each node resolves."""
    try:
        import ray
        import ray.data
    except ImportError:
        raise BmcError(needs_packages("--ray", "ray")) from None
    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, logging_level="ERROR")
        yield from _answers(ray, lines, (path, draft, threads, options))
    except ray.exceptions.RayError as error:
        raise BmcError(f"Ray: {_reason(error)}") from None
    except ConnectionError as error:
        raise BmcError(f"Ray at {address}: {error}") from None


def _reason(error: Exception) -> str:
    """The last line of what a worker says: its exception."""
    return ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1]


def _answers(ray, lines: Iterable[Line], arguments: tuple) -> Iterator[dict]:
    rows = [line._asdict() for line in lines]
    if not rows:
        return
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    size = TASK * arguments[-1]["parallel"]
    cpus = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    cpus = [n for n in cpus if n >= 1]
    data = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // size))
    actors = ray.data.ActorPoolStrategy(size=len(cpus))         # Ray restarts those that die, and their tasks
    done = data.map_batches(Actor, fn_constructor_args=arguments, batch_size=size,
                            compute=actors, num_cpus=min(cpus))
    for row in done.iter_rows():
        yield json.loads(row["answer"])
