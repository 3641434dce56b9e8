"""What can go wrong. Every exception of pybmc is a BmcError and, where Python has one,
the natural builtin."""


class BmcError(Exception):
    """Anything that pybmc reports."""


class FormatError(BmcError, ValueError):
    """A file is not what it should be."""


class ArgumentError(BmcError, ValueError):
    """An argument is out of range or of the wrong kind."""


class SchemaError(ArgumentError):
    """A schema or a grammar is not what it should be."""


class UnsupportedSchemaError(SchemaError):
    """A schema or a grammar asks for what the engine of grammars refuses."""


class NeedsPackageError(BmcError):
    """What is asked for needs a package that is not installed."""


class ContextFullError(BmcError, ValueError):
    """The session's cap on rows would be passed."""


class BusyError(BmcError, RuntimeError):
    """A session or a generation is in use elsewhere, or was taken over."""


class ClosedError(BmcError, RuntimeError):
    """The model or session was closed."""


class OutOfMemoryError(BmcError, MemoryError):
    """The system has no memory left."""


class DeviceError(BmcError, RuntimeError):
    """The GPU or its driver is missing, or failed."""


# What pip installs for each extra of pyproject.toml. It is not "pybmc[..]": on PyPI that is another project.
EXTRAS = {
    "chat": "prompt_toolkit",
    "hub": "huggingface-hub",
    "plot": "matplotlib",
    "ray": "'ray[data,serve]'",
    "schema": "llguidance",
    "serve": "starlette uvicorn prometheus-client",
}


def needs_packages(what: str, extra: str) -> str:
    """The sentence where packages of an extra are not installed."""
    return f"{what} needs packages that are not installed: pip install {EXTRAS[extra]}"


def printable(text: str, limit: int = 400) -> str:
    """What a file says, fit for a terminal: no control characters, no end of lines, not endless."""
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:limit])
    return shown if len(text) <= limit else f"{shown}..."
