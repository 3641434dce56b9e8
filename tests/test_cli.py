"""The command line: what goes to stdout, what to stderr, and the exit status."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import pybmc
from pybmc.cli import cli, options, run
from pybmc.cli.terminal import sentence
from pybmc.errors import EXTRAS

TEXT = tiny.TEXT


@pytest.fixture(scope="module")
def path():
    return str(tiny.model("llama"))


@pytest.fixture
def pipe(monkeypatch):
    """Sets what stdin holds; it is no terminal."""
    def set_stdin(data: bytes):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    set_stdin(b"")
    return set_stdin


def pybmc_process(*args, **options):
    return subprocess.Popen([sys.executable, "-m", "pybmc", *args], stderr=subprocess.PIPE, **options)


# ---- generate ----------------------------------------------------------------------------------------------


def test_generate_prints_the_answer_alone(path, capsys):
    assert run(["generate", path, "-p", "Once upon", "-n", "8", "--temp", "0", "-t", "1"]) == 0
    out, err = capsys.readouterr()
    with pybmc.Model(path, threads=1) as model:
        assert out == "".join(t.text for t in pybmc.generate(model, "Once upon", 8)) + "\n"
    assert err == ""


def test_generate_json_has_the_documented_keys(path, capsys):
    assert run(["run", "-m", path, "-p", "Once upon", "-n", "5", "-s", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result) == ["text", "tokens", "prompt_tokens", "finish_reason", "timings"]
    assert list(result["timings"]) == ["load_s", "prompt_s", "prompt_tok_s", "predicted_s", "predicted_tok_s",
                                       "draft_n", "draft_n_accepted"]
    assert len(result["tokens"]) == 5 and result["finish_reason"] == "length" and result["prompt_tokens"] > 1


def test_a_seed_names_a_text(path, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        run(["generate", path, "-p", "Once", "-n", "12", "-s", seed, "--temp", "1.5"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


GRAMMAR, YES = 'root ::= "yes" | "no"', ("yes\n", "no\n")
SCHEMA, ONE = ('{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], '
               '"additionalProperties": false}', ('{"a":1}\n', '{"a":2}\n'))


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize("flag, text, allowed", [
    ("--grammar", GRAMMAR, YES), ("--grammar-file", GRAMMAR, YES), ("-j", SCHEMA, ONE), ("-jf", SCHEMA, ONE)])
def test_answers_follow_a_schema_or_a_grammar(path, pipe, capsys, tmp_path, command, flag, text, allowed):
    pytest.importorskip("llguidance", reason="grammars need llguidance")
    (tmp_path / "form").write_text(text)
    pipe(b"Once upon")
    given = str(tmp_path / "form") if flag in ("--grammar-file", "-jf") else text
    assert run([command, path, "-n", "30", "-t", "1", "--temp", "2", flag, given]) == 0
    assert capsys.readouterr().out in allowed


@pytest.mark.parametrize("tokens, whole", [("2", False), ("40", True)])
def test_an_answer_that_is_cut_before_its_schema_ends_is_noted(path, capsys, tokens, whole):
    pytest.importorskip("llguidance", reason="schemas need llguidance")
    assert run(["generate", path, "-p", "a", "-n", tokens, "-j", '{"const": "one two three"}']) == 0
    out, err = capsys.readouterr()
    assert ("the answer is not whole" in err) != whole
    assert (out == '"one two three"\n') == whole


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize("flags, status, word", [
    (["--grammar", "x"], 1, "grammar"), (["-j", "x"], 1, "schema"),
    (["-j", "{}", "--grammar", GRAMMAR], 2, "-j and --grammar"), (["-jf", "/nonexistent"], 1, "nonexistent"),
    (["-j", '{"type": "wurst"}'], 1, "wurst")])
def test_bad_forms_are_one_sentence(path, pipe, capsys, command, flags, status, word):
    pytest.importorskip("llguidance", reason="grammars need llguidance")
    pipe(b"Once upon")
    assert run([command, path, "-t", "1", *flags]) == status
    out, err = capsys.readouterr()
    assert out == "" and word in err and (status == 2 or err.count("\n") == 1)


def test_the_prompt_comes_from_a_flag_a_file_or_stdin(path, pipe, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("Once upon")
    outs = []
    for args in (["-p", "Once upon"], ["-f", str(tmp_path / "prompt.txt")], [], ["-p", "-"], ["-f", "-"]):
        pipe(b"Once upon")
        assert run(["generate", path, "-n", "6", "--temp", "0", *args]) == 0
        outs.append(capsys.readouterr().out)
    assert len(set(outs)) == 1


def test_chat_form_and_raw_form_are_different_prompts(path, capsys):
    counts = []
    for form in ("--raw", "--chat"):
        run(["generate", path, "-p", "hello", "-n", "1", "--json", form])
        counts.append(json.loads(capsys.readouterr().out)["prompt_tokens"])
    assert counts[1] > counts[0] + 3


def test_stop_strings_and_biases_reach_the_sampler(path, capsys):
    run(["generate", path, "-p", "Once", "-n", "20", "--temp", "0", "--json", "--ignore-eos"])
    free = json.loads(capsys.readouterr().out)
    assert len(free["tokens"]) == 20
    stop = free["text"][3:5]
    run(["generate", path, "-p", "Once", "-n", "20", "--temp", "0", "--json", "--ignore-eos", "-r", stop])
    stopped = json.loads(capsys.readouterr().out)
    assert stopped["text"] == free["text"][:free["text"].index(stop)] and stopped["finish_reason"] == "stop"
    run(["generate", path, "-p", "Once", "-n", "20", "--temp", "0", "--json", "-l",
         f"{free['tokens'][0]}-inf"])
    assert free["tokens"][0] not in json.loads(capsys.readouterr().out)["tokens"]


def prompt_tokens(args, capsys):
    assert run(["generate", *args, "-n", "0", "--json"]) == 0
    return json.loads(capsys.readouterr().out)["prompt_tokens"]


def test_a_chat_template_by_name_file_or_source(path, capsys, tmp_path):
    tokenizer = pybmc.Tokenizer(path)
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }} and {{ word }}")
    for template in (str(tmp_path / "mine.jinja"), "{{ messages[0].content }} and {{ word }}"):
        args = [path, "--chat", "-p", "one", "--chat-template", template, "--chat-template-kwargs",
                '{"word": "two"}']
        assert prompt_tokens(args, capsys) == len(tokenizer.encode("one and two"))
    counts = {name: prompt_tokens([path, "--chat", "-p", "one", "--chat-template", name], capsys)
              for name in ("chatml", "gemma", "vicuna")}
    assert len(set(counts.values())) == 3


def test_the_help_names_every_chat_template(capsys):
    from pybmc.chat.templates import NAMED

    run(["chat", "--help"])
    words = set(capsys.readouterr().out.replace(",", " ").replace("(", " ").replace(")", " ").split())
    assert set(NAMED) <= words


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_the_help_lists_options_by_section(command, capsys):
    run([command, "--help"])
    help = capsys.readouterr().out
    sections = re.findall(r"^(\w+):\n((?:  .*\n?)+)", help, re.MULTILINE)
    assert [name for name, _ in sections][:7] == ["Model", "Text", "Form", "End", "Sampling",
                                                  "Speculation", "Output"]
    assert re.findall("^  (?=-)", dict(sections)["Other"],
                      re.MULTILINE) == ["  "], "an option without a section"
    options = {option for param in cli.commands[command].params for option in param.opts if option[0] == "-"}
    assert options <= set(re.split(r"[\s,]+", help))


@pytest.mark.parametrize("args, says", [
    (["--chat", "--chat-template", "chatnl"], "expected a name (chatml, "),
    (["--chat", "--chat-template-kwargs", "[1]"], "expected a JSON object"),
    (["--chat", "--chat-template-kwargs", "{a"], "expected a JSON object"),
    (["--chat", "--chat-template-kwargs", "[" * 10**5], "expected a JSON object"),
    (["--chat", "--chat-template-kwargs", '{"messages": 1}'], "messages is set by pybmc"),
    (["--chat", "--think", "maybe"], "'on', 'off'"),
    (["--raw", "--prefill", "a"], "--prefill needs --chat"),
    (["--raw", "--chat-template", "chatml"], "--chat-template needs --chat"),
    (["--raw", "--think", "off"], "--think needs --chat"),
])
def test_wrong_options_of_a_chat_are_wrong_usage(path, capsys, args, says):
    assert run(["generate", path, "-p", "a", *args]) == 2
    assert says in capsys.readouterr().err


def test_thinking_is_a_variable_of_the_template(path, capsys):
    source = "{{ messages[0].content }}{% if enable_thinking is false %} at once{% endif %}"
    args = [path, "--chat", "-p", "one", "--chat-template", source]
    assert prompt_tokens([*args, "--think", "off"], capsys) > prompt_tokens([*args, "--think", "on"], capsys)
    assert run(["generate", path, "--chat", "-p", "one", "-n", "1", "--think", "off"]) == 0
    assert "does not read enable_thinking" in capsys.readouterr().err


def test_a_prefilled_answer_is_continued(path, capsys):
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}.\n{% endfor %}"
    assert run(["generate", path, "--chat", "-p", "one", "--prefill", "two", "--chat-template", source, "-n",
                "8", "--temp", "0"]) == 0
    out = capsys.readouterr().out
    with pybmc.Model(path, threads=1) as model:
        assert out == "".join(t.text for t in pybmc.generate(model, "user: one.\nassistant: two", 8)) + "\n"


def test_thoughts_of_a_prefilled_answer_are_hidden(path, capsys):
    args = ["generate", path, "--chat", "-p", "one", "-n", "8", "--temp", "0", "--ignore-eos"]
    assert run([*args, "--prefill", "<think> hm", "--thoughts", "hide"]) == 0
    out, err = capsys.readouterr()
    assert out == "\n" and "within its thoughts" in err
    assert run([*args, "--prefill", "<think> hm"]) == 0
    assert len(capsys.readouterr().out) > 1


# ---- the other commands ------------------------------------------------------------------------------------


def test_chat_from_a_pipe_answers_line_by_line(path, pipe, capsys):
    pipe(b"hello\nand you?\n/exit\n")
    assert run(["chat", path, "-n", "3", "-l", "1-inf", "-t", "1"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") >= 2 and "Ctrl-D" not in err


def test_tokenize_gives_ids_and_pieces(path, capsys):
    assert run(["tokenize", path, "-p", "one für two", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    tokenizer = pybmc.Tokenizer(path)
    assert result["tokens"] == tokenizer.encode("one für two")
    pieces = [bytes(p) if isinstance(p, list) else p.encode() for p in result["pieces"]]
    assert pieces == [tokenizer.piece(id) for id in result["tokens"]]
    assert run(["tokenize", path, "-p", "one", "--no-bos"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[0]) for line in lines] == tokenizer.encode("one", bos=False)


def test_show_tells_what_a_file_is(path, capsys):
    assert run(["show", path, "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    with pybmc.Model(path) as model:
        assert info["layers"] == model.config.n_layers
        assert info["kv_bytes_per_token"] == model.config.kv_row_bytes
    assert info["architecture"] == "llama" and info["runs"] and info["why_not"] is None
    assert info["bytes"] == os.path.getsize(path)
    assert sum(t["share"] for t in info["types"].values()) == pytest.approx(1, abs=1e-3)
    assert run(["show", path]) == 0
    out = capsys.readouterr().out
    for label in ("architecture", "parameters", "types", "tokenizer", "context", "chat template",
                  "KV cache", "runs"):
        assert label in out


@pytest.mark.parametrize("args", [["show"], ["tokenize", "-p", "Once"]])
def test_without_a_model_the_bundled_one_is_shown(args, capsys):
    assert run([*args, "--json"]) == 0
    mine = capsys.readouterr().out
    assert run([*args, "--json", "-m", str(pybmc.demo_model())]) == 0
    assert capsys.readouterr().out == mine


def test_show_says_why_a_model_does_not_run(tmp_path, capsys):
    metadata, tensors = tiny.parts("llama")
    tensors["blk.0.ffn_up.weight"], tensors["blk.0.ffn_down.weight"] = (
        tensors["blk.0.ffn_down.weight"], tensors["blk.0.ffn_up.weight"])
    tiny.save(tmp_path / "bent.gguf", metadata, tensors)
    assert run(["show", str(tmp_path / "bent.gguf"), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert not info["runs"] and "ffn_up" in info["why_not"] and str(tmp_path) not in info["why_not"]
    assert run(["generate", str(tmp_path / "bent.gguf"), "-p", "x"]) == 1
    assert info["why_not"] in capsys.readouterr().err

    metadata["general.architecture"] = "mamba"
    tiny.save(tmp_path / "other.gguf", metadata, tensors)
    assert run(["show", str(tmp_path / "other.gguf"), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert not info["runs"] and "mamba" in info["why_not"] and "docs/architectures.md" in info["why_not"]
    assert run(["generate", str(tmp_path / "other.gguf"), "-p", "x"]) == 1
    assert "mamba" in capsys.readouterr().err


def test_bench_prints_a_json_line_for_each_test(path, capsys):
    assert run(["bench", path, "-p", "8", "-n", "4", "-b", "1,3", "-d", "0,5", "-r", "2", "-t", "1",
                "--json"]) == 0
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert list(results[0]) == ["test", "n", "depth", "threads", "gpu_layers", "tok_s", "tok_s_min",
                                "tok_s_max", "reps", "gb_s"]
    assert [(r["test"], r["n"], r["depth"]) for r in results] == [
        (test, n, depth) for depth in (0, 5)
        for test, n in (("pp", 8), ("tg", 4), ("verify", 1), ("verify", 3))]
    for r in results:
        assert 0 < r["tok_s_min"] <= r["tok_s"] <= r["tok_s_max"] and r["gb_s"] > 0
        assert r["reps"] == 2 and r["threads"] == 1
    assert run(["bench", path, "-p", "", "-n", "2", "-b", "", "-r", "1"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2 and out[1].startswith("tg 2")


def test_no_repack_says_the_same(path, capsys):
    said = []
    for flags in ([], ["--no-repack"]):
        assert run(["generate", path, "-p", "Once", "-n", "8", "--temp", "0", *flags]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""


def test_a_breakdown_sums_to_the_whole_time(path, capsys):
    args = ["bench", path, "-p", "64", "-n", "4", "-b", "3", "-d", "0,5", "-r", "3", "-t", "2", "--breakdown"]
    assert run([*args, "--json"]) == 0
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["test"], r["passes"]) for r in results] == [("pp", 3), ("tg", 12), ("verify", 12)] * 2
    assert min(abs(sum(r["steps"].values()) / r["wall_s"] - 1) for r in results) < 0.03
    for r in results:
        assert len(r["steps"]) == 12 and all(seconds > 0 for seconds in r["steps"].values())
    assert run(args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 15 and lines[0].split() == "pp 64 tg 4 verify 3 pp 64 @5 tg 4 @5 verify 3 @5".split()
    assert lines[-1].startswith("sum ")


def test_perplexity_json(path, capsys, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    assert run(["perplexity", path, "-f", str(tmp_path / "text"), "-c", "32", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result) == ["ppl", "stderr", "tokens", "bits_per_byte"]
    assert result["ppl"] > 1 and result["stderr"] > 0 and result["tokens"] % 15 == 0


def test_a_draft_changes_nothing_but_the_counts(path, capsys):
    results = []
    draft = str(tiny.model("llama", seed=1))
    for flags in ([], ["--draft", path], ["-md", draft, "--draft-max", "3", "--draft-min", "2"],
                  ["--spec", "ngram"], ["--draft", path, "--spec", "draft", "--tint"],
                  ["--draft", path, "--spec", "off"]):
        assert run(["generate", path, "-p", "Once upon", "-n", "40", "-s", "5", "-t", "1", "--ignore-eos",
                    "--json", *flags]) == 0
        results.append(json.loads(capsys.readouterr().out))
    for result in results:
        assert result["tokens"] == results[0]["tokens"] and result["text"] == results[0]["text"]
        assert result["timings"]["draft_n"] >= result["timings"]["draft_n_accepted"] >= 0
    assert results[-1]["timings"]["draft_n"] == 0


def test_a_draft_of_another_vocabulary_is_named_and_left_out(path, capsys, caplog):
    other = str(tiny.model("phi3", vocab_size=900))
    assert run(["generate", path, "--draft", other, "-p", "Once", "-n", "4", "-t", "1"]) == 0
    assert "another vocabulary: token 0" in capsys.readouterr().err + caplog.text


def test_the_bundled_pair_answers_with_its_draft(capsys):
    texts = []
    for flags in ([], ["--spec", "off"]):
        assert run(["run", "-p", "Tell me of a fox.", "-n", "12", "-s", "1", *flags]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != "\n"


# ---- failures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args, status, says", [
    (["generate", "/no/such.gguf", "-p", "x"], 1, "/no/such.gguf"),
    (["generate", "/", "-p", "x"], 1, "director"),
    (["show", __file__], 1, "GGUF"),
    (["tokenize", __file__, "-p", "x"], 1, "GGUF"),
    (["generate", "MODEL", "-f", "/no/such.txt"], 1, "/no/such.txt"),
    (["generate", "MODEL", "-p", "x", "-f", "y"], 2, "both"),
    (["generate", "MODEL", "-m", "MODEL", "-p", "x"], 2, "two models"),
    (["generate", "MODEL", "-p", "x", "--temp", "-1"], 2, "temperature"),
    (["generate", "MODEL", "-p", "x", "--frobnicate"], 2, "frobnicate"),
    (["generate", "MODEL", "-p", "x", "-l", "five"], 2, "token id"),
    (["generate", "MODEL", "-p", "x", "-l", "99999999+1"], 1, "99999999"),
    (["generate", "MODEL", "-p", "x", "--rows", "some"], 2, "rows"),
    (["generate", "MODEL", "-p", "x", "-sys", "y"], 2, "--chat"),
    (["generate", "MODEL", "-p", "word " * 50, "-c", "10"], 1, "room for 10"),
    (["generate", "MODEL", "-p", "x", "--draft", "/no/such.gguf"], 1, "/no/such.gguf"),
    (["generate", "MODEL", "-p", "x", "--spec", "draft"], 2, "--draft FILE"),
    (["generate", "MODEL", "-p", "x", "--spec", "best"], 2, "spec"),
    (["generate", "MODEL", "-p", "x", "--draft-min", "3", "--draft-max", "2"], 2, "--draft-min 3"),
    (["prove", "MODEL", "-p", "x", "--draft", "/no/such.gguf"], 1, "/no/such.gguf"),
    (["prove", "MODEL", "-n", "0"], 2, "0"),
    (["bench", "MODEL", "-p", "a"], 2, "whole numbers"),
    (["bench", "MODEL", "-p", "", "-n", "", "-b", ""], 2, "nothing to measure"),
    (["bench", "MODEL", "-p", "0"], 2, "prompt length"),
    (["perplexity", "MODEL", "-f", "/dev/null"], 1, "one window"),
    (["perplexity", "MODEL", "-f", sys.executable], 1, "UTF-8"),
    (["nonsense"], 2, "nonsense"),
    (["generate", "", "-p", "x"], 2, "name of the file is empty"),
    (["generate", "-m", "", "-p", "x"], 2, "name of the file is empty"),
    (["generate", "MODEL", "--draft", "", "-p", "x"], 2, "name of the file is empty"),
    (["generate", "MODEL", "-f", ""], 2, "name of the file is empty"),
    (["show", ""], 2, "name of the file is empty"),
    (["generate", "-p", ""], 2, "the message is empty; use -p TEXT"),
    (["generate", "MODEL", "-p", "x", "--no-bos", "--chat"], 2, "--no-bos needs --raw"),
    (["generate", "MODEL", "-p", "x", "--top-k", "-2"], 2, "top_k"),
    (["generate", "MODEL", "-p", "x", "-l", "5+"], 2, "token id"),
    (["generate", "MODEL", "-p", "x", "-l", "+1"], 2, "token id"),
    (["generate", "MODEL", "-p", "x", "-l", "5+1+1"], 2, "token id"),
    (["generate", "MODEL", "-p", "x", "-l", "51"], 2, "token id"),
    (["generate", "MODEL", "-p", "a\udcffb"], 2, "not UTF-8 text (character 1)"),
    (["generate", "MODEL", "-p", "x", "-r", "\udcff"], 2, "not UTF-8 text"),
    (["generate", "-p", "x", "-sys", "\udcff"], 2, "not UTF-8 text"),
])
def test_a_failure_is_a_sentence_and_a_status(path, capsys, pipe, args, status, says):
    assert run([path if a == "MODEL" else a for a in args]) == status
    out, err = capsys.readouterr()
    assert out == "" and says in err and "Traceback" not in err and "internal" not in err
    if status == 1:
        assert err.startswith("pybmc: ") and err.count("\n") == 1


@pytest.mark.parametrize("data, status, says", [
    (b"\xef\xbb\xbfOnce upon", 0, ""),
    ("Once".encode("utf-16"), 1, "expected UTF-8 text, found UTF-16"),
    ("Once".encode("utf-16-be").join([b"\xfe\xff", b""]), 1, "expected UTF-8 text, found UTF-16"),
    (b"Once\xe9", 1, "is not UTF-8 text (byte 4)"),
])
@pytest.mark.parametrize("source", ["file", "stdin"])
def test_the_encoding_of_a_text(path, pipe, capsys, tmp_path, data, status, says, source):
    pipe(data)
    (tmp_path / "p.txt").write_bytes(data)
    name = str(tmp_path / "p.txt") if source == "file" else "-"
    assert run(["tokenize", path, "-f", name, "--json"]) == status
    out, err = capsys.readouterr()
    assert says in err and err.count("\n") == bool(status)
    if not status:
        assert json.loads(out)["tokens"] == pybmc.Tokenizer(path).encode("Once upon")


@pytest.mark.parametrize("bias, value",
                         [("300+1e-1", 0.1), ("300-1e+2", -100), ("300-inf", -float("inf")), ("300+.5", 0.5)])
def test_a_bias_is_any_number(bias, value):
    assert options.Bias().convert(bias, None, None) == (300, value)


def test_no_bos_leaves_it_out(capsys, tmp_path):
    path = str(tiny.model("phi3"))
    tokenizer = pybmc.Tokenizer(path)
    (tmp_path / "text").write_text(TEXT)
    counts, values = [], []
    for flags in ([], ["--no-bos"]):
        assert run(["generate", path, "-p", "Once", "-n", "1", "--json", *flags]) == 0
        counts.append(json.loads(capsys.readouterr().out)["prompt_tokens"])
        assert run(["perplexity", path, "-f", str(tmp_path / "text"), "-c", "32", "--json", *flags]) == 0
        values.append(json.loads(capsys.readouterr().out)["ppl"])
    assert tokenizer.add_bos and counts[0] == counts[1] + 1 and values[0] != values[1]


def test_a_text_is_utf8_where_the_locale_is_ascii(path):
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = pybmc_process("tokenize", path, "-p", "M\u00fcller".encode(), "--json", env=environment,
                         stdout=subprocess.PIPE)
    assert json.loads(done.communicate()[0])["pieces"] and done.returncode == 0


def test_top_k_of_minus_one_is_all(path, capsys):
    texts = []
    for k in ("0", "-1", "1"):
        assert run(["generate", path, "-p", "Once", "-n", "12", "-s", "3", "--temp", "1.5", "--top-p", "1",
                    "--min-p", "0", "--top-k", k]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_every_exception_has_a_sentence():
    assert (sentence(FileNotFoundError(2, "No such file or directory", "a.gguf"))
            == "a.gguf: No such file or directory")
    assert sentence(MemoryError()) == "there is not enough memory"
    assert sentence(ZeroDivisionError("oh\nno")).startswith("internal error: ZeroDivisionError: oh no")


def test_a_missing_bundled_model_is_explained(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(pybmc, "__file__", str(tmp_path / "__init__.py"))
    assert run(["generate", "-p", "x"]) == 1
    assert "bundled model is missing" in capsys.readouterr().err


# ---- a process ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["generate", "--help"]])
def test_help_loads_nothing_heavy(args):
    """Of what pip installs only click."""
    code = ("import sys\nbefore = set(sys.modules)\nfrom pybmc.cli import run\n"
            "assert run(sys.argv[1:]) == 0\n"
            "new = set(sys.modules) - before\n"
            "foreign = {name.split('.')[0] for name in new} - sys.stdlib_module_names\n"
            "assert foreign == {'click', 'pybmc'}, foreign\n"
            "print(*foreign, *(name for name in new if name.startswith('pybmc.')), file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
    own = {"options", "batch", "files", "hub", "measure", "proof", "serve", "talk", "terminal", "vectors"}
    assert set(done.stderr.split()) <= {"click", "pybmc", "pybmc._lazy",
                                        "pybmc.errors", "pybmc.chat", "pybmc.chat.reasoning", "pybmc.cli",
                                        *(f"pybmc.cli.{name}" for name in own)}


def test_a_reader_that_leaves_ends_it_quietly(path):
    process = pybmc_process("generate", path, "-p", "x", "-n", "-1", "--ignore-eos", "-t", "1",
                            stdout=subprocess.PIPE)
    process.stdout.read(3)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_a_failure(path):
    with open("/dev/full", "w") as full:
        process = pybmc_process("generate", path, "-p", "x", "-n", "2", stdout=full)
    assert b"space" in process.stderr.read() and process.wait(60) == 1


def test_a_closed_stdout_is_a_failure(path):
    process = pybmc_process("generate", path, "-p", "x", "-n", "2", preexec_fn=lambda: os.close(1))
    assert b"standard output is closed" in process.stderr.read() and process.wait(60) == 1


@pytest.mark.parametrize("args, closed, status, says", [
    (["generate", "MODEL", "-n", "2"], 0, 2, b"stdin is closed"),
    (["generate", "MODEL", "-f", "-", "-n", "2"], 0, 2, b"stdin is closed"),
    (["chat", "MODEL", "-n", "2"], 0, 1, b"standard input is closed"),
    (["perplexity", "MODEL", "-f", "-"], 0, 2, b"stdin is closed"),
    (["generate", "MODEL", "-p", "x", "-n", "2"], 0, 0, b""),
    (["show", "MODEL"], 1, 1, b"standard output is closed"),
    (["show", "/no/such"], 2, 1, b""),
    (["generate", "MODEL", "--frobnicate"], 2, 2, b""),
    (["generate", "MODEL", "-p", "x", "-n", "2", "-c", "100000"], 2, 0, b""),
])
def test_a_closed_stream_is_no_internal_error(path, args, closed, status, says):
    process = pybmc_process(*(path if a == "MODEL" else a for a in args), stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, preexec_fn=lambda: os.close(closed))
    out, err = process.communicate(timeout=60)
    assert process.returncode == status and says in err
    for stream in (out, err):
        assert b"internal error" not in stream and b"Traceback" not in stream
    assert bool(out) == (status == 0)


@pytest.mark.parametrize("args", [["generate", "-p", "Hello", "-n", "2"], ["show", "MODEL"],
                                  ["generate", "MODEL", "-p", "x", "-n", "20", "--spec", "ngram"]])
def test_nobody_needs_a_home_directory(path, args):
    """A user without an entry in the password file, and no HOME."""
    code = ("import pwd, sys\ndef nobody(uid): raise KeyError('uid not found')\npwd.getpwuid = nobody\n"
            "from pybmc.cli import main\nmain(sys.argv[1:])")
    env = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME")}
    args = [path if a == "MODEL" else a for a in args]
    done = subprocess.run([sys.executable, "-c", code, *args], env=env, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 0 and done.stdout and done.stderr == ""


def test_without_a_home_nothing_is_kept(monkeypatch):
    from pathlib import Path

    from pybmc import cache
    from pybmc.cli import repl

    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache.folder() is None and repl.history_file() is None
    assert cache.path_of("pairs", {"a": 1}) is None and not cache.replace(None, "")


def test_what_cannot_be_kept_is_no_failure(monkeypatch, tmp_path):
    from pybmc import cache

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert not cache.replace(cache.path_of("pairs", {}), "kept")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    path = cache.path_of("pairs", {})
    assert cache.replace(path, "kept") and path.is_relative_to(tmp_path) and path.read_text() == "kept"


def test_what_cannot_be_kept_leaves_no_file(monkeypatch, tmp_path):
    from pybmc import cache

    def full(self, text, encoding):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    assert not cache.replace(tmp_path / "pair.json", "kept") and not list(tmp_path.iterdir())


def test_ctrl_c_exits_with_130(path):
    process = pybmc_process("bench", path, "-p", "64", "-n", "", "-b", "", "-r", "1000000", "-t", "1",
                            stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline().startswith(b"test")
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130 and b"Traceback" not in process.stderr.read()


def test_no_module_but_pull_opens_a_socket():
    """Everything but a download works without a network."""
    code = ("import socket, pybmc.cli\ndef no(*a, **k): raise AssertionError('a socket')\n"
            "socket.socket = no\n"
            "raise SystemExit(pybmc.cli.run(['show', '/dev/null']))")
    assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == 1


def test_flags_of_sampling_are_settings_of_the_sampler():
    from pybmc.engine.sampler import Sampler

    assert set(options.SAMPLING) == set(Sampler.__dataclass_fields__)


def test_the_list_of_commands_cuts_no_sentence(capsys):
    run(["--help"])
    listed = capsys.readouterr().out.partition("Commands:")[2].strip().splitlines()
    assert len(listed) == len(cli.commands) and not [line for line in listed if "..." in line]


def test_packages_to_install_are_those_of_the_extras():
    """By their own names: "pip install pybmc[..]" would bring another project."""
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    wanted = {extra: [re.match(r"[\w.,\[\]-]+", package)[0] for package in packages]
              for extra, packages in project["optional-dependencies"].items()
              if extra not in ("test", "train")}
    assert {extra: shlex.split(packages) for extra, packages in EXTRAS.items()} == wanted


@pytest.mark.parametrize("folder", ["pybmc", "docs", "examples"])
def test_no_text_tells_to_install_another_project(folder):
    for file in (Path(__file__).parents[1] / folder).rglob("*.*"):
        if file.suffix in (".py", ".md", ".html"):
            assert not re.search(r"pip install ('|\")?pybmc", file.read_text("utf-8")), file
