"""The rooms of the package: a module uses those below it, never those above,
and no import is hidden in a function."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pybmc"
FLOORS = (
    {"errors", "cache", "_lazy"}, {"_native", "checks"}, {"files"}, {"tokenizers"}, {"models"}, {"spec"},
    {"engine"}, {"chat", "grammar", "show"}, {"hub"}, {"batch"}, {"serve"}, {"cli", "llama"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE
                 or path.stem not in ("__init__", "__main__"))


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """The rooms that a module imports something from, wherever in it."""
    package = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[:len(package) - node.level + 1]
            parts = [*base, *(node.module or "").split(".")] if node.module else [*base]
            yield from [parts[0]] if parts else [alias.name for alias in node.names if alias.name in FLOOR]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_down(path):
    above = [room for room in imported(path) if FLOOR[room] > FLOOR[room_of(path)]]
    assert above == [], f"{path.name} imports from above"


def test_every_room_has_a_floor():
    assert {room_of(path) for path in MODULES} == set(FLOOR)
