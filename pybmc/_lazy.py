"""Names of a package that are loaded when they are first used, so that importing the package is quick."""

from importlib import import_module


def lazy(package: str, homes: dict[str, str]):
    """__getattr__ and __dir__ of a package: homes tells in which of its modules a name is."""
    def __getattr__(name: str):
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f".{homes[name]}", package), name)
        setattr(import_module(package), name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(import_module(package)), *homes})

    return __getattr__, __dir__
