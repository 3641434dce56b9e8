"""The rooms of the package: a module uses those below it, never those above,
and no import is hidden in a function."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pybmc"
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


C_SOURCES = sorted(path for folder in ("native", "tests") for path in (ROOT / folder).rglob("*")
                   if path.suffix in (".c", ".h", ".cu", ".cpp"))
LONG_LINES = {"tests/cuda/test_ptx.cpp"}            # texts of PTX, a program a line


def test_lines_of_c_are_short():
    found = [f"{name}:{number}: {len(line)} columns" for path in C_SOURCES
             if (name := str(path.relative_to(ROOT))) not in LONG_LINES
             for number, line in enumerate(path.read_text("utf-8").splitlines(), 1) if len(line) > 110]
    assert found == [], "expected at most 110 columns"


def test_every_room_has_a_floor():
    assert {room_of(path) for path in MODULES} == set(FLOOR)
