"""pybmc batch: answers in order, errors a line, and runs that go on where one ended."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny

import pybmc
from pybmc.batch.lines import Output, read_lines
from pybmc.batch.worker import Worker
from pybmc.cli import run

PROMPTS = ["Once upon a time", "The cat", "She said", "The mill", "In spring", "12 boats", "and one for",
           "The great wheel"]


@pytest.fixture(scope="module")
def path():
    return str(tiny.model("llama"))


@pytest.fixture
def files(tmp_path):
    """Writes IN.jsonl; gives both names."""
    def make(*lines):
        data = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        (tmp_path / "in.jsonl").write_bytes(b"".join(line + b"\n" for line in data))
        return str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")
    return make


def answers(target):
    with open(target, "rb") as file:
        return [json.loads(line) for line in file]


def batch(path, names, *args):
    return run(["batch", *names, "-m", path, "-t", "2", "--temp", "0", "-n", "12", *args])


def test_lines_follow_their_schemas(path, files):
    pytest.importorskip("llguidance", reason="schemas need llguidance")
    schema = {"type": "object", "properties": {"a": {"enum": ["xx", "yy"]}}, "required": ["a"],
              "additionalProperties": False}
    asked = [{"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}},
             {"json_schema": schema},
             {"grammar": 'root ::= "yes" | "no"'}, {"response_format": {"type": "text"}},
             {"response_format": {"type": "yaml"}}, {"json_schema": {"type": "wurst"}},
             {"messages": [{"role": "user", "content": "hello"}], "json_schema": schema},
             {"json_schema": schema | {"if": {}}}]
    names = files(*[({} if "messages" in fields else {"prompt": "Once"})
                    | {"temperature": 1.5, "max_tokens": 30} | fields for fields in asked])
    assert batch(path, names) == 1
    found = answers(names[1])
    objects = ('{"a":"xx"}', '{"a":"yy"}')
    assert all(found[i]["text"] in objects for i in (0, 1, 6)) and found[2]["text"] in ("yes", "no")
    assert found[3]["text"]
    assert "yaml" in found[4]["error"] and "wurst" in found[5]["error"]
    assert found[7]["schema_ignored"] == ["if"] and "schema_ignored" not in found[0]


def test_each_line_is_what_generate_writes(path, files, capsys):
    names = files(*[{"prompt": prompt, "id": number * 10} for number, prompt in enumerate(PROMPTS)],
                  {"messages": [{"role": "user", "content": "hello"}], "temperature": 0.9, "seed": 4,
                   "max_tokens": 5, "id": "chat"},
                  {"prompt": [5, 6, 7], "stop": None, "logit_bias": {"9": -1.5}})
    assert batch(path, names, "-np", "3") == 0
    found = answers(names[1])
    with pybmc.Model(path) as model:
        def alone(prompt, n=12, **settings):
            return "".join(token.text for token in pybmc.generate(model, prompt, n, **settings))
        expected = [alone(prompt) for prompt in PROMPTS]
        expected += [alone([{"role": "user", "content": "hello"}], 5, temperature=0.9, seed=4),
                     alone([5, 6, 7], logit_bias={9: -1.5})]
    assert [answer["text"] for answer in found] == expected
    assert [answer["index"] for answer in found] == list(range(10))
    assert [answer.get("id") for answer in found] == [*(number * 10 for number in range(8)), "chat", None]
    assert found[8]["seed"] == 4 and found[8]["completion_tokens"] <= 5
    assert found[8]["finish_reason"] in ("stop", "length")
    assert capsys.readouterr().out == ""


def test_a_seed_is_told_and_gives_the_same_text(path, files):
    names = files({"prompt": "Once"}, {"prompt": "Once"})
    assert run(["batch", *names, "-m", path, "-n", "16", "--temp", "2"]) == 0
    first, second = answers(names[1])
    assert first["seed"] != second["seed"]
    with pybmc.Model(path) as model:
        again = pybmc.generate(model, "Once", 16, temperature=2, seed=first["seed"])
        assert "".join(token.text for token in again) == first["text"]


BAD = [
    (b"{", "expected a JSON object"), (b"[1]", "expected a JSON object, found [1]"),
    (b"\xff\xfe{}", "not UTF-8"), (b"[" * 10**5, "JSON object"),
    ({}, "expected prompt or messages, found neither"),
    ({"prompt": "a", "messages": []}, "found both"),
    ({"prompt": "a", "temprature": 1}, "did you mean temperature?"),
    ({"prompt": "a", "temperature": -1}, "temperature: expected a number from 0 up, found -1"),
    (b'{"prompt": "a", "temperature": NaN}', "found NaN"),
    ({"prompt": "a", "max_tokens": "many"}, "max_tokens"), ({"prompt": 3}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": [10**9]}, "token ids"), ({"messages": "hello"}, "messages"),
    ({"messages": [{"role": 3}]}, ""), ({"prompt": "a", "stop": [""]}, "stop"),
    ({"prompt": "a " * 3000}, "context"), ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
    ({"prompt": "a\ud800"}, "surrogate"), ({"prompt": "a", "chat_template_kwargs": {"b": 1}}, "template"),
]


def test_a_line_that_fails_says_why_and_the_others_go_on(path, files, capsys):
    lines = [line for bad, _ in BAD for line in (bad, {"prompt": "The cat"})]
    names = files(*lines)
    assert batch(path, names) == 1
    assert f"{len(BAD)} of {len(lines)} lines failed" in capsys.readouterr().err
    found = answers(names[1])
    assert [answer["index"] for answer in found] == list(range(len(lines)))
    assert len({answer["text"] for answer in found[1::2]}) == 1
    for answer, (bad, says) in zip(found[::2], BAD):
        assert says in answer["error"] and "\n" not in answer["error"], bad


def test_an_answer_repeats_any_id(path, files):
    ids = ["\ud800", {"a": [1, None]}, 0, "", "é\u2028"]
    names = files(*({"id": id, "prompt": "a", "max_tokens": 1} for id in ids), {"id": 7}, b"\n")
    batch(path, names)
    assert [answer["id"] for answer in answers(names[1])] == [*ids, 7]


def test_a_run_goes_on_after_any_part_of_its_output(path, files):
    names = files(*({"prompt": prompt} for prompt in PROMPTS), b"{")
    assert batch(path, names) == 1
    with open(names[1], "rb") as file:
        whole = file.read()
    ends = [0, *(i + 1 for i, byte in enumerate(whole) if byte == 10)]
    for cut in sorted({*ends, ends[2] + 1, ends[3] - 1, len(whole) - 1}):
        with open(names[1], "wb") as file:
            file.write(whole[:cut])
        assert batch(path, names) == 1
        with open(names[1], "rb") as file:
            assert file.read() == whole, cut


def test_a_killed_run_goes_on_and_writes_the_same(path, files):
    names = files(*({"prompt": prompt, "max_tokens": 40 * (1 + number % 3)}
                    for number, prompt in enumerate(PROMPTS * 12)))
    command = [sys.executable, "-m", "pybmc", "batch", *names, "-m", path, "-t", "1", "--temp",
               "0", "-np", "2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    for _ in range(3000):
        if os.path.exists(names[1]) and os.path.getsize(names[1]) > 500 or process.poll() is not None:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open(names[1], "rb") as file:
        before = file.read()
    before = before[:before.rfind(b"\n") + 1]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    with open(names[1], "rb") as file:
        assert file.read().startswith(before)
    found = answers(names[1])
    assert [answer["index"] for answer in found] == list(range(len(PROMPTS) * 12))
    with pybmc.Model(path) as model:
        for number in (0, 50, 95):
            text = pybmc.generate(model, PROMPTS[number % 8], 40 * (1 + number % 3))
            assert found[number]["text"] == "".join(token.text for token in text)


@pytest.mark.parametrize("change, says", [
    ("input", "was changed"), ("settings", "was changed"), ("shorter", "no such line"),
    ("foreign", "expected an answer of pybmc batch"),
])
def test_an_output_that_belongs_to_something_else_is_kept(path, files, capsys, change, says):
    names = files({"prompt": "a"}, {"prompt": "b"})
    assert batch(path, names) == 0
    if change == "input":
        files({"prompt": "c"}, {"prompt": "b"})
    elif change == "shorter":
        files({"prompt": "a"})
    elif change == "foreign":
        with open(names[1], "w") as file:
            file.write("my diary\n")
    with open(names[1], "rb") as file:
        before = file.read()
    assert batch(path, names, *(["--top-k", "3"] if change == "settings" else [])) == 1
    assert says in capsys.readouterr().err
    with open(names[1], "rb") as file:
        assert file.read() == before


def test_what_tells_a_run_from_another_is_not_how_fast_it_is(path, files):
    names = files({"prompt": "a"})
    assert batch(path, names) == 0
    assert batch(path, names, "-np", "3", "--spec", "off", "-t", "1") == 0


def test_wrong_files_are_a_sentence(path, files, capsys, tmp_path):
    source, target = files({"prompt": "a"})
    assert batch(path, (source, source)) == 1 and "is the input too" in capsys.readouterr().err
    assert batch(path, (str(tmp_path / "none"), target)) == 1 and "No such file" in capsys.readouterr().err
    assert batch(path, (source, str(tmp_path))) == 1 and "directory" in capsys.readouterr().err
    with Output(target, source, {}):
        assert batch(path, (source, target)) == 1 and "another process" in capsys.readouterr().err
    assert batch(path, (source, target), "--ray", "x") in (0, 1)


def test_an_empty_input_has_an_empty_output(path, files):
    names = files(b"", b"  ")
    assert batch(path, names) == 0 and answers(names[1]) == []


def test_a_slow_line_holds_back_a_bounded_number(path, tmp_path):
    """Lines are read as they are needed, not all at once."""
    read = []
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"prompt": "a", "max_tokens": 300 if number == 0 else 1}) + "\n"
                              for number in range(200)))

    def lines():
        for line in read_lines(source, {}):
            read.append(line.number)
            yield line

    with pybmc.Model(path) as model, Worker(model, {"seed": 0}, parallel=2) as worker:
        found = worker.answers(lines())
        assert next(found)["index"] == 0 and len(read) <= 2 * 16 + 1
        assert [answer["index"] for answer in found] == list(range(1, 200))
