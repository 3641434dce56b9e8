"""Templates from untrusted files, run so that they can only make text, and not too much of it.

jinja2's immutable sandbox keeps a template away from attributes that lead out (CVE-2024-34359 came from a
template that ran without it). It does not keep a template from running forever or from filling memory with
three nested loops or one `"x" * 10**10`; so here every loop step, call, operator and filter is charged to a
budget before it allocates.

Every string of the template's source is an origin.Traced, and so is what it makes of them: the text that
comes out tells which of its characters are the template's own.
"""

from __future__ import annotations

import math
import re
import threading
import time
from functools import cached_property, lru_cache

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.filters import make_attrgetter
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter, SecurityError
from jinja2.utils import Cycler, Namespace
from jinja2.visitor import NodeTransformer

from ..errors import FormatError, printable
from .origin import Traced, conversions, own, own_of

MAX_SOURCE = 1 << 20            # characters of a template
MAX_STEPS = 500_000             # loop steps and calls
# characters of one string, or elements of one structure, on top of what went in
MAX_SIZE = 4 << 20
MAX_TOTAL = 128 << 20           # characters made along the way
MAX_SECONDS = 3.0               # of this thread's processor time
_MAX_WIDTH = 10_000             # of padding, indents, batches
_NODE = 64                      # what a list, a number weighs, in characters

_PADDING = {"center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes", "indent", "batch", "slice",
            "wordwrap", "round", "tojson", "truncate"}
_LONG_WIDTH = re.compile(r"\d{5}|\*")


class Refusal(FormatError):
    """A template does not take what it was given: it raised, or could not work with it."""


class _Meter:
    """What one rendering may still use."""

    def __init__(self, size_in: int):
        self.max_size = MAX_SIZE + 4 * size_in
        self.total = MAX_TOTAL + 32 * size_in
        self.steps = MAX_STEPS
        self.deadline = time.thread_time() + MAX_SECONDS

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise SecurityError(f"it takes more than {MAX_STEPS} steps")
        if time.thread_time() > self.deadline:
            raise SecurityError(f"it takes more than {MAX_SECONDS:g} seconds")

    def room(self, size: int) -> None:
        """Pay for a string or structure of this size, about to be made."""
        self.total -= size
        if size > self.max_size or self.total < 0:
            raise SecurityError(
                f"it makes too much text: more than {self.max_size} characters at once, or too often"
            )

    def weigh(self, value):
        """Pay for a value that was made, everything in it counted as often as it would print."""
        if isinstance(value, (str, bytes, list, tuple, dict, set, frozenset, Namespace, Cycler)):
            self.room(_weight(value, self.max_size))
        return value


def _weight(value, limit: float = math.inf) -> int:
    """About the characters a value has when it is printed; counting ends beyond limit."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, dict):
        inside = [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        inside = value
    elif isinstance(value, Namespace):
        inside = object.__getattribute__(value, "_Namespace__attrs").values()
    elif isinstance(value, Cycler):
        inside = value.items
    else:
        return _NODE
    weight = _NODE
    for item in inside:
        if weight > limit:
            break
        weight += _weight(item, limit - weight)
    return weight


def _multiply(meter: _Meter, left, right) -> None:
    for one, other in ((left, right), (right, left)):
        if isinstance(one, int) and isinstance(other, int):
            meter.room(one.bit_length() + other.bit_length())
            if one.bit_length() + other.bit_length() > 4096:
                raise SecurityError("a number has too many digits")
        elif isinstance(one, int) and hasattr(other, "__len__"):
            meter.room(max(one, 0) * _weight(other, meter.max_size))


def _power(meter: _Meter, left, right) -> None:
    if isinstance(left, int) and isinstance(right, int) and (left.bit_length() > 64 or abs(right) > 64):
        raise SecurityError("a number has too many digits")


def _add(meter: _Meter, left, right) -> None:
    if hasattr(left, "__len__") and hasattr(right, "__len__"):
        meter.room(_weight(left, meter.max_size) + _weight(right, meter.max_size))


def _modulo(meter: _Meter, left, right) -> None:
    if isinstance(left, (str, bytes)):
        _format(meter, left, right)


_OPERATORS = {"*": _multiply, "**": _power, "+": _add, "%": _modulo}


def _format(meter: _Meter, text, *args) -> None:
    """Pay for text % args. Only a width in the format itself makes much out of little."""
    format = text if isinstance(text, str) else text.decode("latin-1")
    if any(_LONG_WIDTH.search(one.width) for one in conversions(format)):
        raise SecurityError("a format is too wide")
    meter.room(len(text) + sum(_weight(arg, meter.max_size) for arg in args))


class _Formatter(SandboxedFormatter):
    """str.format for templates: no wide fields, and it follows what is the template's own."""

    def format_field(self, value, spec):
        if _LONG_WIDTH.search(spec):
            raise SecurityError("a format is too wide")
        return super().format_field(value, spec)

    def format(self, text: str, args, kwargs) -> str:
        plain = self.vformat(text, args, kwargs)
        fields = list(self.parse(text))
        if set(own_of(text)) - {1} or any("{" in (spec or "") for _, _, spec, _ in fields):
            return plain
        pieces, place = [], 0
        for literal, name, spec, conversion in fields:
            pieces.append(own(literal))
            if name == "":
                name, place = str(place), place + 1
            if name is not None:
                value = self.convert_field(self.get_field(name, args, kwargs)[0], conversion)
                whole = isinstance(value, Traced) and not spec
                pieces.append(value if whole else self.format_field(value, spec))
        traced = Traced().join(pieces)
        return traced if str.__eq__(traced, plain) else plain


def _replace(meter: _Meter, text, old="", new="", *rest) -> None:
    text, old, new = (part if isinstance(part, bytes) else str(part) for part in (text, old, new))
    meter.room(len(text) + text.count(old) * len(new))


def _join(meter: _Meter, items, separator="") -> list:
    items = list(items)
    meter.room(sum(_weight(item, meter.max_size) for item in items) + len(items) * len(str(separator)))
    return items


def _check_method(meter: _Meter, function, args, kwargs) -> tuple:
    """Arguments of a builtin's method that could make much out of little."""
    name, self = getattr(function, "__name__", ""), getattr(function, "__self__", None)
    if isinstance(self, (str, bytes, int)) and not isinstance(self, type):
        _check_width(name, args, kwargs)
        if name == "replace":
            _replace(meter, self, *args)
        elif name == "join" and args:
            args = (_join(meter, args[0], self), *args[1:])
        elif name in ("translate", "maketrans"):
            raise SecurityError(f"{name}() is not available to templates")
    return args


def _check_width(name: str, args, kwargs) -> None:
    if name in _PADDING and any(
        isinstance(arg, int) and abs(arg) > _MAX_WIDTH for arg in (*args, *kwargs.values())
    ):
        raise SecurityError(f"{name} is asked for more than {_MAX_WIDTH}")


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(_OPERATORS)

    def __init__(self):
        extensions = ["jinja2.ext.loopcontrols", _Generation]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False)
        self.local = threading.local()              # .meter while a thread renders
        self.globals = {key: self.globals[key] for key in ("range", "dict", "namespace", "joiner", "cycler")}
        for name in ("urlize", "pprint", "random", "xmlattr"):
            del self.filters[name]
        self.filters |= {"tojson": _tojson, "join": _join_filter}
        self.filters = {name: self._metered(name, function) for name, function in self.filters.items()}
        self.filters["_each"] = _in_context(self._each)
        self.filters["_made"] = _in_context(lambda value: self.local.meter.weigh(value))
        self.filters["_concat"] = _in_context(self._concat)
        self.filters["_own"] = _in_context(own)

    def call(__self, __context, __obj, *args, **kwargs):        # noqa: B902  jinja2's signature
        meter = __self.local.meter
        meter.step()
        text = _formatted_by(__obj)
        if text is not None:
            meter.room(len(text) + _weight((args, kwargs), meter.max_size))
            if __obj.__name__ == "format_map":
                args, kwargs = (), *args
            return meter.weigh(_Formatter(__self).format(text, args, kwargs))
        args = _check_method(meter, __obj, args, kwargs)
        return meter.weigh(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context, operator, left, right):
        self.local.meter.step()
        _OPERATORS[operator](self.local.meter, left, right)
        return super().call_binop(context, operator, left, right)

    def concat(self, pieces) -> str:
        """Every buffer of a template ends here: blocks, macros, the text itself."""
        pieces = list(pieces)
        self.local.meter.room(sum(map(len, pieces)))
        return Traced().join(pieces)

    def _each(self, items):
        step = self.local.meter.step
        for item in items:
            step()
            yield item

    def _concat(self, items) -> str:
        return Traced().join(map(str, _join(self.local.meter, items)))

    def _metered(self, name: str, function):
        """A filter that pays. It takes the context: such filters never run while a template compiles."""
        wants = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

        @jinja2.pass_context
        def metered(context, value, *args, **kwargs):
            meter = self.local.meter
            meter.step()
            _check_width(name, args, kwargs)
            if name == "replace":
                _replace(meter, value, *args, *kwargs.values())
            elif name == "join":
                value = _join(meter, value, *args[:1], *kwargs.values())
            elif name == "format":
                _format(meter, str(value), args, kwargs)
            elif name in ("string", "tojson", "list"):
                meter.weigh(value)
            first = {"context": context, "eval_context": context.eval_ctx, "environment": self}
            given = (first[wants], value) if wants else (value,)
            return meter.weigh(function(*given, *args, **kwargs))

        return metered


def _in_context(function):
    return jinja2.pass_context(lambda context, value: function(value))


def _formatted_by(function) -> str | None:
    """The text whose format or format_map method this is."""
    method = getattr(function, "__wrapped__", function)         # jinja2 wraps it
    text = getattr(method, "__self__", None)
    ours = isinstance(text, str) and not hasattr(text, "__html__")
    return text if ours and method.__name__ in ("format", "format_map") else None


@jinja2.pass_environment
def _join_filter(environment, value, d="", attribute=None) -> str:
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    return Traced(d, own_of(d)).join(map(str, value))


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """As Hugging Face gives it: no escaping for HTML, characters as they are."""
    import json

    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _Generation(Extension):
    """{% generation %} .. {% endgeneration %}: marks for training; the text between them is text."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Metering(NodeTransformer):
    """Charges what Python does without asking: loops, literals, ~. Marks strings as the template's own."""

    def visit_For(self, node):
        self.generic_visit(node)
        node.iter = _filter(node.iter, "_each")
        return node

    def visit_Concat(self, node):
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "_concat")

    def visit_List(self, node):
        self.generic_visit(node)
        return _filter(node, "_made")

    visit_Dict = visit_List

    def visit_Tuple(self, node):
        return self.visit_List(node) if node.ctx == "load" else node

    def visit_Const(self, node):
        return _filter(node, "_own") if isinstance(node.value, str) else node

    def visit_TemplateData(self, node):
        return _filter(nodes.Const(node.data, lineno=node.lineno), "_own")


def _filter(node, name: str):
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class Template:
    """A template's source, checked and compiled. May be shared between threads."""

    def __init__(self, source: str):
        if len(source) > MAX_SOURCE:
            raise FormatError(
                f"the chat template is too long: {len(source)} characters, expected at most {MAX_SOURCE}"
            )
        environment = _environment()
        self._source = source
        try:
            tree = _Metering().visit(environment.parse(source))
            code = environment.compile(tree)
            self._template = jinja2.Template.from_code(environment, code, dict(environment.globals))
        except jinja2.TemplateSyntaxError as error:
            line = error.lineno
            raise FormatError(f"the chat template is wrong, line {line}: {_sentence(error)}") from None
        except Exception as error:          # nesting that is too deep for the parser, the compiler, Python
            raise FormatError(f"the chat template does not compile: {_sentence(error)}") from None

    @cached_property
    def variables(self) -> frozenset[str]:
        """What it reads of what it is given. jinja2 folds constants as it looks, so it gets another tree."""
        return frozenset(meta.find_undeclared_variables(_environment().parse(self._source)))

    def render(self, variables: dict[str, object]) -> Traced:
        """Its text, which may be four times what goes in, and MAX_SIZE more. A Refusal is about these
        variables, any other FormatError about the template.
        """
        environment = self._template.environment
        environment.local.meter = _Meter(_weight(variables))
        try:
            return self._run(variables)
        except Exception as error:
            spent = isinstance(error, (SecurityError, MemoryError, RecursionError))
            kind = FormatError if spent else Refusal
            raise kind(f"the chat template failed: {_sentence(error)}") from None
        finally:
            del environment.local.meter

    def _run(self, variables: dict[str, object]) -> Traced:
        meter = self._template.environment.local.meter
        pieces, size = [], 0
        for piece in self._template.generate(**variables):
            size += len(piece)
            meter.room(len(piece))
            if size > meter.max_size:
                meter.room(size)
            pieces.append(piece)
        return Traced().join(pieces)


@lru_cache(maxsize=1)
def _environment() -> _Environment:
    return _Environment()


def _sentence(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it nests too deep"
    text = error.message if isinstance(error, jinja2.TemplateSyntaxError) else str(error)
    return printable((text or type(error).__name__).splitlines()[0])
