"""What runs in which slot, and llama-server's way to save, restore and erase what a slot holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..engine.sequence import Sequence
from ..errors import BmcError
from .errors import Refused, busy, invalid, refusal, wrong
from .fields import Fields
from .http import Json, fields_of, service_of
from .service import Service
from .sessions import checked_name, unreadable, unsaved
from .worker import Slot


async def slots(request: Request) -> Response:
    if not request.scope["pybmc.policy"].slots:
        raise Refused(501, "disabled", "GET /slots is disabled by --no-slots")
    service = service_of(request)
    running = list(service.worker.engine.running)
    n = len(service.worker.slots)
    if len(running) >= n and request.query_params.get("fail_on_no_slot"):
        raise busy("queue_full", f"all {n} slots are busy")
    return Json([{"id": i, "n_ctx": service.context} | _described(slot.sequence, running)
                 for i, slot in enumerate(service.worker.slots)])


def _described(s: Sequence | None, running: list[Sequence]) -> dict:
    if s is None or s not in running:
        return {"is_processing": False, "state": "idle"}
    return {"is_processing": True, "state": "reading" if s.reading else "writing",
            "n_prompt_tokens": len(s.prompt), "n_decoded": s.stats.predicted_tokens,
            "seconds": time.perf_counter() - s.since}


async def change(request: Request) -> Response:
    service = service_of(request)
    if service.sessions is None:
        raise Refused(501, "disabled", "saved sessions are disabled; pybmc serve --sessions DIR enables them")
    action = request.query_params.get("action", "")
    if action not in ACTIONS:
        raise wrong("action", f"is {action!r:.40}; expected one of {', '.join(ACTIONS)}")
    slot, i = _slot(service, request.path_params["id"])
    if slot.sequence in service.worker.engine.running:
        raise busy("slot_busy", f"the slot {i} serves a request")
    try:
        fields = await fields_of(request) if action != "erase" else Fields({})
        told = await ACTIONS[action](service, slot, fields)
    except BmcError as error:
        raise refusal(error) from None
    return Json({"id_slot": i} | told)


def _slot(service: Service, id: str) -> tuple[Slot, int]:
    n = len(service.worker.slots)
    if not (id.isascii() and id.isdecimal() and len(id) < 9 and int(id) < n):
        raise invalid("id", f"the slot is {id!r:.40}; expected 0 to {n - 1}")
    return service.worker.slots[int(id)], int(id)


def _filename(fields: Fields) -> str:
    return checked_name(fields.text("filename", ""), "filename")


async def save(service: Service, slot: Slot, fields: Fields) -> dict:
    name, engine, started = _filename(fields), service.worker.engine, time.perf_counter()
    lease = await service.sessions.lease(name)
    try:
        tokens = np.array(slot.text, np.int32)
        session = await service.worker.call(lambda: engine.lend(tokens, service.context))
        if session is None:
            raise invalid("id", "the slot holds nothing that could be saved")
        n = session.position
        size = await service.sessions.save(name, session)
    except OSError as error:
        raise unsaved(name, error, "filename") from None
    finally:
        lease.close()
    return {"filename": name, "n_saved": n, "n_written": size,
            "timings": {"save_ms": 1e3 * (time.perf_counter() - started)}}


async def restore(service: Service, slot: Slot, fields: Fields) -> dict:
    name, started = _filename(fields), time.perf_counter()
    lease = await service.sessions.lease(name)
    try:
        slot.text, size = await service.sessions.restore(name, "filename")
    except OSError as error:
        raise unreadable(name, error, "filename") from None
    finally:
        lease.close()
    return {"filename": name, "n_restored": len(slot.text), "n_read": size,
            "timings": {"restore_ms": 1e3 * (time.perf_counter() - started)}}


async def erase(service: Service, slot: Slot, fields: Fields) -> dict:
    engine, tokens = service.worker.engine, np.array(slot.text, np.int32)
    slot.text = []
    return {"n_erased": await service.worker.call(lambda: engine.forget(tokens, service.context))}


Action = Callable[[Service, Slot, Fields], Coroutine]
ACTIONS: dict[str, Action] = {"save": save, "restore": restore, "erase": erase}


ROUTES = [Route("/slots", slots), Route("/slots/{id}", change, methods=["POST"])]
