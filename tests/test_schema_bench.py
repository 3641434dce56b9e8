"""tools.schema_bench and tools.schemas: that they run, and that a value that does not fit is found."""

import json
import random

import pytest
from click.testing import CliRunner

from tools import schema_bench
from tools.schemas import draw, fits

pytest.importorskip("llguidance", reason="schemas need llguidance")


def test_it_tells_times_and_faults():
    done = CliRunner().invoke(schema_bench.main, ["-n", "6", "-t", "1", "--max-tokens", "60", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["schemas"] == 6 and found["invalid"] == found["differing"] == found["refused"] == 0
    assert set(found["ways"]) == {"free", "masked", "forced"}
    assert found["ways"]["forced"]["passes"] <= found["ways"]["masked"]["passes"]
    assert found["ways"]["free"]["tokens"] == found["ways"]["forced"]["tokens"] > 0


def test_an_invalid_text_is_a_failure(monkeypatch):
    monkeypatch.setattr(schema_bench, "fits", lambda value, schema: False)
    done = CliRunner().invoke(schema_bench.main, ["-n", "3", "-t", "1"])
    assert done.exit_code == 1 and "compiling" in done.stdout and " 0 invalid" not in done.stdout


@pytest.mark.parametrize("schema, good, bad", [
    ({"type": "integer", "minimum": 3, "multipleOf": 2}, [4, 6.0], [2, 5, True, "4", 4.5]),
    ({"type": "string", "pattern": "^a", "maxLength": 2}, ["a", "ab"], ["ba", "abc", 1]),
    ({"type": "string", "format": "date"}, ["2024-02-29", "0000-01-01"], ["2023-02-29", "x"]),
    ({"type": "string", "format": "time"}, ["10:20:30Z", "10:20:60.5+01:00"], ["25:00:00Z"]),
    ({"const": {"a": [1, True]}}, [{"a": [1, True]}], [{"a": [1, 1]}, {"a": [1]}, {}]),
    ({"enum": [1, None]}, [1, None], [True, "1"]),
    ({"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"],
      "additionalProperties": False}, [{"a": None}], [{}, {"a": 1}, {"a": None, "b": 1}]),
    ({"type": "array", "prefixItems": [{"type": "null"}], "items": False, "minItems": 1}, [[None]],
     [[], [1], [None, None]]),
    ({"anyOf": [{"type": "boolean"}, {"$ref": "#/$defs/a"}], "$defs": {"a": {"const": 1}}}, [True, 1], [2]),
    ({"type": "array", "items": {"type": "number", "exclusiveMaximum": 2}, "maxItems": 2}, [[], [1, 1.5]],
     [[2], [1, 1, 1], {}]),
], ids=repr)
def test_values_are_checked(schema, good, bad):
    assert all(fits(value, schema) for value in good) and not any(fits(value, schema) for value in bad)


def test_drawn_schemas_have_all_features():
    text = json.dumps([draw(random.Random(i)) for i in range(300)])
    assert all(f'"{name}"' in text for name
               in ("$ref", "anyOf", "enum", "const", "pattern", "format", "prefixItems", "minItems",
                   "multipleOf", "exclusiveMinimum", "exclusiveMaximum", "minProperties", "required", "null"))
