"""The hub's cache on this machine, as huggingface_hub lays it out:

    models--USER--REPO/ refs/main                    holds a commit
                        snapshots/COMMIT/FILE        a link to ..
                        blobs/SUM                    .. the bytes

Read here without huggingface_hub: a name costs a look into a folder,
and nothing that could open a connection is loaded.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .. import demo_model
from ..errors import ArgumentError, BmcError, printable
from . import names

BUNDLED = {"demo": False, "demo-draft": True}       # name -> whether it is the draft


@dataclass(frozen=True)
class Cached:
    """A model in the cache: its repository's folder and the links that are its files,
    the first part first."""

    name: str
    folder: Path
    links: tuple[Path, ...]
    complete: bool                      # all parts are there

    @property
    def path(self) -> Path:
        return self.links[0]


def cache_folder() -> Path:
    """Where huggingface_hub keeps what it fetched."""
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(caches, "huggingface")
    return Path(os.path.expandvars(os.path.expanduser(named or os.path.join(home, "hub"))))


def models(repo: str | None = None) -> Iterator[Cached]:
    """The models in the cache, or those of one repository, whatever the case of its letters."""
    for folder in sorted(cache_folder().glob("models--*--*")):
        found = folder.name.removeprefix("models--").replace("--", "/", 1)
        if names.is_repo(found) and repo in (None, found) or repo and repo.lower() == found.lower():
            yield from _models_of(found, folder)


def _models_of(repo: str, folder: Path) -> Iterator[Cached]:
    links = _links(folder)
    firsts = names.first_files(links)
    for file in firsts:
        parts = names.parts_of(file)
        at = links[file].parents[file.count("/")]
        there = tuple(at / part for part in parts if (at / part).is_file())
        yield Cached(names.short(repo, file, firsts), folder, there, len(there) == len(parts))


def _links(folder: Path) -> dict[str, Path]:
    """File -> its link, in the snapshot of main, else in the newest that has it."""
    found: dict[str, Path] = {}
    for snapshot in _snapshots(folder):
        for path in _files(snapshot):
            file = path.relative_to(snapshot).as_posix()
            if names.is_safe(file) and path.is_file():
                found.setdefault(file, path)
    return found


def _snapshots(folder: Path) -> list[Path]:
    try:
        found = [(path.name == _main(folder), path.stat().st_mtime, path)
                 for path in (folder / "snapshots").iterdir()]
    except OSError:
        return []
    return [path for *_, path in sorted(found, reverse=True)]


def _main(folder: Path) -> str | None:
    try:
        return (folder / "refs" / "main").read_text("utf-8", "replace")
    except OSError:
        return None


def _files(snapshot: Path) -> Iterator[Path]:
    for base, _, files in os.walk(snapshot):
        yield from (Path(base, file) for file in files)


# ---- names -------------------------------------------------------------------------------------------------


def cached(name: names.Name) -> Cached | None:
    """The model of the cache that a name means; None where it is not there."""
    found = {model.path: model for model in models(name.repo)}
    files = {str(path): path for path in found}
    if name.file:
        fit = [file for file in files if file.endswith(f"/{name.file}")]
    else:
        fit = names.matching(files, name.quant) if name.quant else list(files)
    return found[files[names.only(fit, name)]] if fit else None


def find(text: str | os.PathLike) -> Path:
    """The file of a model that a user names: a path, user/repo[:QUANT], user/repo/FILE,
    or a name that `pybmc list` shows.

    A file of that name comes first. Raises a BmcError where the name is one of the hub's and the model is not
    here; a path is returned whether it exists or not.
    """
    path, name = Path(text), names.parse(str(text))
    with suppress(OSError, ValueError):
        if path.exists():
            return path
    if str(text) in BUNDLED:
        return demo_model(BUNDLED[str(text)])
    if name is None:
        return path
    model = cached(name)
    if model is None or not model.complete:
        what = "some of its parts are missing" if model else "no such file, and not in the hub's cache"
        raise NotHere(f"{printable(str(text))}: {what}; pybmc pull {name} brings it")
    return model.path


class NotHere(BmcError, FileNotFoundError):
    """A model of the hub that was not fetched."""


# ---- removing ----------------------------------------------------------------------------------------------


def removable(text: str) -> Cached:
    """The model of the cache that a name means. Raises an ArgumentError for what is none."""
    name = names.parse(text)
    if text in BUNDLED or name is None:
        raise ArgumentError(f"{printable(text)}: only models of the hub's cache can be removed; "
                            "pybmc list names them")
    model = cached(name)
    if model is None:
        raise NotHere(f"{printable(text)} is not here: there is nothing to remove")
    return model


def remove(model: Cached) -> int:
    """Remove a model's links, in every snapshot, and the bytes that nothing else in its repository uses;
    how many."""
    snapshots = model.folder / "snapshots"
    files = {path.relative_to(snapshots).as_posix().split("/", 1)[1] for path in model.links}
    every = {path: path.resolve() for snapshot in _snapshots(model.folder) for path in _files(snapshot)}
    gone = {path for path in every if path.relative_to(snapshots).as_posix().split("/", 1)[1] in files}
    kept = {target for path, target in every.items() if path not in gone}
    freed = 0
    for path in gone:
        freed += unlink(path, model.folder, alone=every[path] not in kept)
        _remove_empty(path.parent, snapshots)
    if not any(_files(snapshots)) and not any((model.folder / "blobs").glob("*")):
        shutil.rmtree(model.folder)
    return freed


def unlink(link: Path, folder: Path, alone: bool = True) -> int:
    """Remove a link of a repository's folder and, if no other one is to keep it, what it links to there;
    the bytes."""
    freed, blob = 0, _blob(link, folder) if alone else None
    for file in (blob, link):
        if file is not None and os.path.lexists(file):
            freed += 0 if file.is_symlink() else file.stat().st_size
            file.unlink()
    return freed


def _blob(link: Path, folder: Path) -> Path | None:
    """The file of the repository's blobs that a link names;
    None where it names another, or is the file itself."""
    if not link.is_symlink():
        return None
    target = Path(os.path.normpath(link.parent / os.readlink(link)))
    return target if target.parent == Path(os.path.normpath(folder / "blobs")) else None


def _remove_empty(folder: Path, top: Path) -> None:
    while folder != top:
        try:
            folder.rmdir()
        except OSError:                 # it holds other files
            return
        folder = folder.parent
