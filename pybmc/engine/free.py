"""How much memory the system could give now, to this process."""

from __future__ import annotations

import os
from pathlib import Path

# Of a control group, v2 and v1: its limit, what it has, and how its memory.stat calls pages of files, which
# make way.
GROUPS = (("", "memory.max", "memory.current", ("active_file", "inactive_file")),
          ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
           ("total_active_file", "total_inactive_file")))


def free_memory() -> float:
    """Bytes; where the system does not tell, half of all."""
    known = known_free_memory()
    return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if known is None else known


def known_free_memory(proc: str = "/proc", mount: str = "/sys/fs/cgroup") -> float | None:
    """Bytes that the system and each control group above this process could give; None where the system does
    not tell."""
    found = _numbers(Path(proc, "meminfo")).get("MemAvailable:")
    if found is None:
        return None
    return min([1024.0 * found, *_of_groups(Path(proc, "self", "cgroup"), Path(mount))])


def _of_groups(groups: Path, mount: Path) -> list[float]:
    """What each group has left. In a container the paths may be the host's: then only the root is there."""
    paths = [line.partition(":")[2].partition(":")[2] for line in _text(groups).splitlines()]
    folders = {folder for path in ["/", *paths] for at in [Path(path.lstrip("/"))]
               for folder in (at, *at.parents)}
    found = [_left(mount / kind / folder, limit, used, files)
             for folder in folders for kind, limit, used, files in GROUPS]
    return [left for left in found if left is not None]


def _left(folder: Path, limit: str, used: str, files: tuple[str, ...]) -> float | None:
    most, now = _text(folder / limit).strip(), _text(folder / used).strip()
    if not (most.isdecimal() and now.isdecimal()):              # "max", or no such file
        return None
    stat = _numbers(folder / "memory.stat")
    return max(0.0, float(int(most) - int(now) + sum(stat.get(name, 0) for name in files)))


def _numbers(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    fields = (line.split() for line in _text(path).splitlines())
    return {field[0]: int(field[1]) for field in fields if len(field) > 1 and field[1].isdecimal()}


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
