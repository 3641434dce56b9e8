"""Bring a model of the hub to this machine, or look at it there. Connections are huggingface_hub's."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from .. import cache
from ..errors import ArgumentError, BmcError, needs_packages, printable
from ..show import describe, size
from . import names, store
from .remote import RemoteGGUF

PREFERRED = ("Q4_K_M", "Q4_0", "Q8_0")          # where no quantization is named: the first that is there
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SUM = re.compile(r"[0-9a-f]{64}")
_ETAG = re.compile(r"[A-Za-z0-9_-]{1,128}")


class HubError(BmcError):
    """The hub does not have it, does not give it, or is not there."""


@dataclass(frozen=True)
class Remote:
    """A file of the hub. sum: its sha256, as the hub names it."""

    file: str
    bytes: int
    sum: str | None


@dataclass(frozen=True)
class Found:
    """A model on the hub, one of a repository's: its parts, the first one first, and what its header says."""

    name: str
    repo: str
    revision: str
    parts: list[Remote]
    facts: dict

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True)
class Pulled:
    name: str
    path: Path
    bytes: int
    facts: dict


def pull(text: str, file: str | None = None, revision: str | None = None,
         note: Callable[[str], None] = lambda line: None, bars: bool = False,
         progress: Callable[[Remote, int], None] | None = None) -> Pulled:
    """Bring user/repo[:QUANT] to the cache, unless it is there, and check what came against the hub's sums.

    Without QUANT: Q4_K_M, else Q4_0, else Q8_0, else the smallest that runs. file: this one instead. note is
    called with lines for people, bars shows huggingface_hub's own on stderr; progress is called with a part
    and how many of its bytes are here, and what it raises ends the transfer. Raises a HubError or another
    BmcError, and an OSError where the disk is full.
    """
    name = wanted(text, file, revision)
    with _told(name):
        if here := _offline(name):
            return here
        found = _search(name)
    if not found.facts["runs"]:
        raise HubError(f"{found.name} does not run here: {found.facts['why_not']}")
    note(_said(found))
    _check_room(found)
    with _told(name), _bars(bars):
        paths = [_fetch(found, part, progress) for part in found.parts]
    return Pulled(found.name, paths[0], found.bytes, found.facts | {"path": str(paths[0])})


def _said(found: Found) -> str:
    parts = f" in {len(found.parts)} parts" * (len(found.parts) > 1)
    arch = printable(str(found.facts["architecture"]), 40)
    return f"{found.name}: {size(found.bytes)}{parts}, {arch}, runs here"


def _offline(name: names.Name) -> Pulled | None:
    """The model that is here already, where nothing may be fetched."""
    from huggingface_hub import constants

    here = store.cached(name) if constants.HF_HUB_OFFLINE else None
    if here is None or not here.complete:
        return None
    return Pulled(here.name, here.path, sum(path.stat().st_size for path in here.links), describe(here.path))


def look(text: str) -> dict:
    """What show.describe() tells of a model on the hub, from its header alone."""
    name = wanted(text)
    with _told(name):
        found = _search(name)
    return found.facts


def wanted(text: str, file: str | None = None, revision: str | None = None) -> names.Name:
    name = names.parse(text)
    if name is None:
        raise ArgumentError(f"expected user/repo[:QUANT], found {printable(repr(text), 100)}")
    if file and (name.quant or name.file):
        raise ArgumentError(f"{text} names a file already, --file {printable(file, 100)} another")
    return replace(name, file=file or name.file, revision=revision or name.revision)


# ---- choosing ----------------------------------------------------------------------------------------------


def _search(name: names.Name) -> Found:
    """The model that a name means, with its header read."""
    info = _hub().HfApi().model_info(name.repo, revision=name.revision, files_metadata=True)
    repo = info.id if names.is_repo(info.id) and info.id.lower() == name.repo.lower() else name.repo
    if not _COMMIT.fullmatch(info.sha or ""):
        raise HubError(f"{repo}: expected a commit of 40 hexadecimal digits, "
                       f"found {printable(repr(info.sha), 60)}")
    files = {sibling.rfilename: _remote(sibling)
             for sibling in info.siblings or () if names.is_safe(sibling.rfilename)}
    choices = _choices(name, files)
    found = None
    for file in choices:
        try:
            found = _opened(repo, info.sha, name, files, file)
        except HubError:                # its header is broken
            if found is None and file == choices[-1]:
                raise
        if found is not None and found.facts["runs"]:
            break
    assert found is not None            # else the last one has raised
    return found


def _remote(sibling) -> Remote:
    named = sibling.lfs.sha256 if sibling.lfs else None
    if named is not None and not _SUM.fullmatch(named):
        raise HubError(f"{printable(sibling.rfilename, 100)}: expected a sha256, "
                       f"found {printable(repr(named), 80)}")
    return Remote(sibling.rfilename, sibling.size or 0, named)


def _choices(name: names.Name, files: dict[str, Remote]) -> list[str]:
    """The files that could be meant, in the order in which they are tried."""
    if name.file:
        fit = [file for file in files
               if name.file in (file, os.path.basename(file)) and file.lower().endswith(".gguf")]
        fit = list({names.parts_of(file)[0]: None for file in fit})
    else:
        firsts = names.first_files(files)
        fit = names.matching(firsts, name.quant) if name.quant else firsts
    if not fit:
        quants = {names.quant_of(file) or printable(file, 60) for file in names.first_files(files)}
        there = ", ".join(sorted(quants)) or "no GGUF file"
        raise HubError(f"{name} is not on the hub: {name.repo} has {there}")
    if name.file or name.quant:
        return [names.only(fit, name)]
    for quant in PREFERRED:
        if preferred := names.matching(fit, quant):
            return [names.only(preferred, replace(name, quant=quant))]
    return sorted(fit, key=lambda file: sum(files[part].bytes
                                            for part in names.parts_of(file) if part in files))


def _opened(repo: str, commit: str, name: names.Name, files: dict[str, Remote], file: str) -> Found:
    wanted = names.parts_of(file)
    missing = [part for part in wanted if part not in files]
    if missing:
        raise HubError(f"{repo}: expected {len(wanted)} parts, {printable(missing[0], 100)} is missing")
    parts = [files[part] for part in wanted]
    shown = names.short(repo, file, names.first_files(files))
    return Found(shown, repo, name.revision or "main", parts, _facts(repo, commit, parts, shown))


def _facts(repo: str, commit: str, parts: list[Remote], shown: str) -> dict:
    hub = _hub()
    sources = [(part.file, part.bytes, _reader(hub.hf_hub_url(repo, part.file, revision=commit)))
               for part in parts]
    try:
        return describe(RemoteGGUF(sources)) | {"path": shown}
    except BmcError as error:
        raise HubError(f"{shown}: {_without_folder(error)}") from None


def _without_folder(error: BmcError) -> str:
    """A sentence about a file without the name of the temporary one that stood for it."""
    return re.sub(r"^/\S*/pybmc-\w+/", "", str(error))


def _reader(url: str):
    """A function that gives a range of the file's bytes."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    def fetch(begin: int, end: int) -> bytes:
        headers = build_hf_headers() | {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        data = bytearray()
        with get_session().stream("GET", url, headers=headers, follow_redirects=True,
                                  timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
            hf_raise_for_status(response)
            if response.status_code != 206 and begin:
                raise HubError(f"expected bytes from {begin} on (206), "
                               f"found an answer of status {response.status_code}")
            for piece in response.iter_raw():
                data += piece
                if len(data) >= end - begin:
                    break
        return bytes(data[:end - begin])

    return fetch


# ---- fetching ----------------------------------------------------------------------------------------------


def _check_room(found: Found) -> None:
    """Raise where the disk has no room for what is to be fetched."""
    blobs = store.cache_folder() / f"models--{found.repo.replace('/', '--')}" / "blobs"
    missing = sum(part.bytes for part in found.parts if not (part.sum and (blobs / part.sum).is_file()))
    there = next(path for path in (blobs, *blobs.parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if missing > free:
        raise HubError(f"{found.name} needs {size(missing)}, "
                       f"the disk of the hub's cache has {size(free)} left")


def _fetch(found: Found, part: Remote, progress: Callable[[Remote, int], None] | None = None) -> Path:
    """The file in the cache: fetched unless it is there, and checked once."""
    hub = _hub()
    url = hub.hf_hub_url(found.repo, part.file, revision=found.revision)
    _check_headers(hub.get_hf_file_metadata(url), part)
    with _counted(part, progress) as counting:
        path = Path(hub.hf_hub_download(found.repo, part.file, revision=found.revision,
                                        cache_dir=store.cache_folder(), **counting))
    checked = cache.path_of("sums", _identity(path, part.sum)) if part.sum else None
    if part.sum and not (checked and checked.is_file()):
        _check_sum(path, found, part)
        cache.replace(checked, part.sum)
    return path


def _check_headers(metadata, part: Remote) -> None:
    """Both become names in the cache: refuse what could lead out of it."""
    etag, commit = metadata.etag, metadata.commit_hash
    if not _ETAG.fullmatch(etag or "") or not _COMMIT.fullmatch(commit or ""):
        raise HubError(f"{part.file}: expected an etag and a commit of hexadecimal digits, "
                       f"found {printable(repr(etag), 60)} and {printable(repr(commit), 60)}")


def _identity(path: Path, named: str) -> dict:
    status = path.stat()
    return {"sha256": named, "size": status.st_size, "mtime": status.st_mtime_ns, "file": str(path.resolve())}


def _check_sum(path: Path, found: Found, part: Remote) -> None:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    if digest.hexdigest() != part.sum:
        store.unlink(path, path.parents[part.file.count("/") + 2])
        raise HubError(f"{found.name}: expected sha256 {part.sum}, found {digest.hexdigest()} "
                       f"in {part.file}; it was removed")


# ---- huggingface_hub ---------------------------------------------------------------------------------------


def _hub():
    try:
        import huggingface_hub
    except ImportError:
        raise HubError(needs_packages("the Hugging Face hub", "hub")) from None
    return huggingface_hub


class _Counter:
    """What huggingface_hub takes for a bar: tells how many bytes are here."""

    def __init__(self, tell: Callable[[int], None], initial: int = 0, **_: object):
        self._tell, self._n = tell, initial

    def __enter__(self) -> _Counter:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, n: int) -> None:
        self._n += n
        self._tell(self._n)


@contextmanager
def _counted(part: Remote, progress: Callable[[Remote, int], None] | None):
    """Arguments of a download that tells its progress, which Xet's threads cannot: it goes over HTTP."""
    from huggingface_hub import constants

    if progress is None:
        yield {}
        return
    before, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True
    counting: dict[str, Any] = {"tqdm_class": partial(_Counter, partial(progress, part))}
    try:
        yield counting
    finally:
        constants.HF_HUB_DISABLE_XET = before


@contextmanager
def _bars(shown: bool):
    from huggingface_hub import utils

    before = utils.are_progress_bars_disabled()
    if not shown:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            utils.enable_progress_bars()


@contextmanager
def _told(name: names.Name):
    """What goes wrong with the hub, in a sentence."""
    _hub()
    from huggingface_hub import constants, errors

    try:
        yield
    except BmcError:
        raise
    except errors.GatedRepoError:
        raise HubError(f"{name.repo} is gated: accept its terms at {constants.ENDPOINT}/{name.repo}, "
                       "and set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise HubError(f"the hub has no repository {name.repo}, or HF_TOKEN does not open it") from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{name.repo} has no revision {printable(str(name.revision), 100)}") from None
    except errors.OfflineModeIsEnabled:
        raise HubError(f"{name} cannot be fetched: HF_HUB_OFFLINE is set") from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "unknown")
        raise HubError(f"{constants.ENDPOINT} answered with status {status} about {name}") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise                       # the disk is full, or may not be written
        first, kind = next(iter(str(error).splitlines()), ""), type(error).__name__
        what = "cannot be reached" if "Connect" in kind or "Timeout" in kind else kind
        raise HubError(f"{constants.ENDPOINT} {what}: {printable(first, 200)}") from error
