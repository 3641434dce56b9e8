"""Names of models on the hub: user/repo[:QUANT], or user/repo/FILE.gguf.
Nothing here opens a file or a connection."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..errors import BmcError, printable
from ..files.gguf import SPLIT_NAME

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_-])?"
REPO = re.compile(rf"{_PART}/{_PART}")
_QUANT = re.compile(r"(?:UD-|i1-)?(?:(?:I?Q|TQ|MXFP|NVFP)\d+(?:_[0-9A-Z]+)*|BF16|FP?16|FP?32)", re.IGNORECASE)
_HOSTS = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://", re.IGNORECASE)
_BESIDE = ("mmproj", "imatrix")         # files that belong to a model and are none


@dataclass(frozen=True)
class Name:
    """A model of a repository: by its quantization, by its file, or whichever the repository has."""

    repo: str
    quant: str | None = None
    file: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo + (f"/{self.file}" if self.file else f":{self.quant}" if self.quant else "")


def parse(text: str) -> Name | None:
    """The name that a text spells, also as the address of a page of the hub;
    None where it spells a path or nothing."""
    host = _HOSTS.match(text)
    parts = text[host.end():].partition("?")[0].rstrip("/").split("/") if host else text.split("/")
    revision = None
    if host and len(parts) > 3 and parts[2] in ("blob", "resolve", "tree"):
        revision = parts[3]
        del parts[2:4]
    if len(parts) < 2:
        return None
    last, colon, quant = parts[1].partition(":")
    repo, file = f"{parts[0]}/{last}", "/".join(parts[2:]) or None
    if not is_repo(repo) or (colon and (file or not _is_tag(quant))) or (file and not is_safe(file)):
        return None
    if not host and (repo if file is None else "").lower().endswith(".gguf"):
        return None                     # folder/model.gguf
    if file and not file.lower().endswith(".gguf"):
        return None
    return Name(repo, quant or None, file, revision)


def is_repo(text: str) -> bool:
    return bool(REPO.fullmatch(text)) and "--" not in text and ".." not in text


def _is_tag(text: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", text))


def is_safe(file: str) -> bool:
    """Whether a file's name stays in its folder and can be shown:
    no .., no control characters, no backslashes."""
    return (file.isprintable() and "\\" not in file and ":" not in file
            and all(part not in ("", ".", "..") for part in file.split("/")))


def stem(file: str) -> str:
    """A file's name without its folder, .gguf, and the number of a part."""
    base = os.path.basename(file)
    split = SPLIT_NAME.fullmatch(base)
    return split[1] if split else base[:-len(".gguf")]


def quant_of(file: str) -> str | None:
    """The quantization at the end of a file's name, in capitals."""
    name = stem(file)
    starts = [0, *(match.end() for match in re.finditer(r"[-._]", name))]
    found = next((name[start:] for start in starts if _QUANT.fullmatch(name, start)), None)
    return found and found.upper()


def parts_of(file: str) -> list[str]:
    """All files of a model, the given one of which is the first."""
    split = SPLIT_NAME.fullmatch(file)
    if not split:
        return [file]
    return [f"{split[1]}-{number:05d}-of-{split[3]}.gguf" for number in range(1, int(split[3]) + 1)]


def first_files(files: Iterable[str]) -> list[str]:
    """The models among files: of a split one its first part, without what only belongs to a model."""
    firsts = []
    for file in sorted(files):
        split = SPLIT_NAME.fullmatch(file)
        if file.lower().endswith(".gguf") and (not split or int(split[2]) == 1 <= int(split[3]) <= 9999):
            firsts.append(file)
    return [file for file in firsts if not any(word in os.path.basename(file).lower() for word in _BESIDE)]


def matching(files: Iterable[str], quant: str) -> list[str]:
    """The files of a quantization: those that are named after it, else those whose names end with it."""
    files, quant = list(files), quant.upper()
    exact = [file for file in files if quant_of(file) == quant]
    ending = re.compile(rf"(?:.*[-._])?{re.escape(quant)}", re.DOTALL | re.IGNORECASE)
    return exact or [file for file in files if ending.fullmatch(stem(file))]


def only(files: list[str], name: Name) -> str:
    """The one file that a name means. Raises a BmcError that lists them where there are several."""
    if len(files) != 1:
        shown = ", ".join(printable(file, 80) for file in files[:8]) + ", .." * (len(files) > 8)
        raise BmcError(f"{name} names one file, found {len(files)}: {shown}; name one as {name.repo}/FILE")
    return files[0]


def short(repo: str, file: str, files: Iterable[str]) -> str:
    """The shortest name of a file among a repository's."""
    quant = quant_of(file)
    if quant and matching(files, quant) == [file]:
        return str(Name(repo, quant))
    return str(replace(Name(repo), file=file))
