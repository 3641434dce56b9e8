"""What a request may be refused with: a status, a code and a sentence;
and how each family of routes writes it."""

from __future__ import annotations

from ..errors import (
    ArgumentError,
    BmcError,
    ContextFullError,
    DeviceError,
    FormatError,
    OutOfMemoryError,
    SchemaError,
    UnsupportedSchemaError,
)

TYPES = {                               # of errors, by their status
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
    404: "not_found_error", 405: "invalid_request_error", 408: "timeout_error", 413: "invalid_request_error",
    415: "invalid_request_error", 429: "rate_limit_error", 500: "server_error", 501: "not_supported_error",
    503: "unavailable_error",
}
ANTHROPIC_TYPES = {                     # .. where they differ
    413: "request_too_large", 500: "api_error", 501: "api_error", 503: "overloaded_error",
}
MESSAGES = ("/v1/messages", "/messages")


class Refused(Exception):
    """A request, or the rest of an answer, is refused. param: the field that is to blame. headers: more of
    the answer's. counts: the numbers in the message, for programs."""

    def __init__(self, status: int, code: str | None, message: str, param: str | None = None,
                 headers: dict | None = None, counts: dict | None = None):
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers, self.counts = headers or {}, counts or {}

    @property
    def type(self) -> str:
        return TYPES[self.status]


def invalid(param: str, message: str) -> Refused:
    """A value that is not what it has to be."""
    return Refused(400, "invalid_value", message, param)


def wrong(param: str, why: str) -> Refused:
    """The same; why: what is said behind its name."""
    return invalid(param, f"{param} {why}")


def no_model(name: str, names) -> Refused:
    return Refused(404, "model_not_found", f"model '{name:.80}' not found; expected {', '.join(names)}",
                   "model")


def unsupported(param: str, why: str = "is not supported here") -> Refused:
    return Refused(400, "unsupported_parameter", f"{param} {why}", param)


def busy(code: str, message: str, seconds: int = 1, status: int = 503) -> Refused:
    """What may be asked for again in some seconds."""
    return Refused(status, code, message, headers={"Retry-After": str(seconds)})


def shutting_down() -> Refused:
    return Refused(503, "shutting_down", "the server is shutting down")


def refusal(error: BmcError, fields=()) -> Refused:
    """What an error of the library means for a request; fields: its names, one of which may be to blame."""
    message = str(error)
    if isinstance(error, OutOfMemoryError):
        return busy("out_of_memory", message, 5)
    if isinstance(error, DeviceError):
        return Refused(500, "device_failed", message)
    if isinstance(error, ContextFullError):
        return Refused(400, "context_length_exceeded", message)
    if isinstance(error, SchemaError):
        unknown = isinstance(error, UnsupportedSchemaError)
        return Refused(400, "unsupported_schema" if unknown else "invalid_schema", message)
    if isinstance(error, ArgumentError):
        words = message.replace(":", " ").split()
        return Refused(400, "invalid_value", message, words[0] if words and words[0] in fields else None)
    if isinstance(error, FormatError):
        return Refused(400, "template_error", message)
    return Refused(500, "internal", "internal error")


def openai_error(refused: Refused) -> dict:
    told = {"message": refused.message, "type": refused.type, "param": refused.param, "code": refused.code}
    return {"error": told | refused.counts}


def ollama_error(refused: Refused) -> dict:
    return {"error": refused.message}


def anthropic_error(refused: Refused) -> dict:
    type = ANTHROPIC_TYPES.get(refused.status, refused.type)
    return {"type": "error", "error": {"type": type, "message": refused.message}}


def error_body(path: str, refused: Refused) -> dict:
    """The body of an error, as clients of a path expect it."""
    if path.startswith(MESSAGES):
        return anthropic_error(refused)
    return ollama_error(refused) if path.startswith("/api/") else openai_error(refused)
