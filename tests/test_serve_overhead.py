"""tools.serve_overhead: the same answer from a server and from generate, and sums of known times."""

import json
from contextlib import nullcontext

import pytest
import tiny
from click.testing import CliRunner

pytest.importorskip("httpx", reason="needs httpx")
pytest.importorskip("uvicorn", reason="needs pybmc[serve]")
from tools import serve_overhead  # noqa: E402
from tools.serve_overhead import Answer, compare, main, summary, told  # noqa: E402


def test_both_write_the_same_answer(tmp_path):
    done = CliRunner().invoke(main, [str(tiny.model("llama")), "-n", "12", "-p", "5", "--reps", "2", "-t",
                                     "1", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["tokens"] == 12 and found["smallest"] <= found["ratio"] <= found["largest"]
    assert all(0 < found[name]["first_ms"] <= found[name]["total_ms"] for name in ("http", "generate"))


def test_sums_of_known_times():
    pairs = [(Answer(0.1, 1.1, 11, "a"), Answer(0.1, 1.0, 11, "a")),
             (Answer(0.2, 2.2, 11, "a"), Answer(0.1, 2.0, 11, "a")),
             (Answer(0.3, 1.3, 11, "a"), Answer(0.2, 1.0, 11, "a"))]
    found = summary(pairs)
    assert (found["ratio"], found["smallest"], found["largest"]) == pytest.approx((1.1, 1.1, 1.3))
    assert found["http"]["tokens_per_second"] == pytest.approx(10)
    assert found["http"]["first_ms"] == pytest.approx(200)
    assert "ratio 1.100 (1.100 to 1.300)" in told(found) and Answer(1.0, 1.0, 1, "").rate == 0


def test_each_repetition_is_in_the_other_order():
    asked = []
    pairs = compare(lambda: asked.append("http") or "http", lambda: asked.append("local") or "local", 3)
    assert pairs == [("http", "local")] * 3
    assert asked == ["http", "local", "local", "http", "http", "local", "local", "http"]


@pytest.mark.parametrize("text, within, says", [("other", "50", "the texts differ"),
                                                ("a", "10", "HTTP took 20.0% more; expected at most 10%")])
def test_what_differs_fails(monkeypatch, text, within, says):
    monkeypatch.setattr(serve_overhead, "compare",
                        lambda *args: [(Answer(0.1, 1.2, 9, "a"), Answer(0.1, 1.0, 9, text))])
    monkeypatch.setattr(serve_overhead, "server", lambda *args: nullcontext("http://127.0.0.1:1"))
    done = CliRunner().invoke(main, [str(tiny.model("llama")), "--within", within])
    assert done.exit_code == 1 and says in done.output and "Traceback" not in done.output


def test_a_file_that_cannot_be_served_is_a_sentence(tmp_path):
    path = tmp_path / "none.gguf"
    path.write_bytes(b"GGUF")
    done = CliRunner().invoke(main, [str(path)])
    assert done.exit_code == 1 and "ended with status 1" in done.output and "Traceback" not in done.output
