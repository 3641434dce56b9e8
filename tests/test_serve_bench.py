"""tools.serve_bench: what it sends, what it makes of answers, and its sums,
against a server that streams canned events."""

import json
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from click.testing import CliRunner

pytest.importorskip("httpx", reason="needs httpx")
from tools import serve_bench  # noqa: E402
from tools.serve_bench import Limits, Plan, Record, arrivals, drawn, main, summary  # noqa: E402


class Stub(ThreadingHTTPServer):
    """answers: what each request in turn gets: "ok", a status, or the lines of a stream."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.requests, self.lock = [], [], threading.Lock()
        self.now = self.most = 0            # requests in work, and the most there were
        self.meet = None                    # a barrier that requests after the first wait at
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((self.path, body, self.headers.get("Authorization")))
            answer = server.answers.pop(0) if server.answers else "ok"
            server.now += 1
            server.most, first = max(server.most, server.now), len(server.requests) == 1
        if server.meet and not first:
            server.meet.wait(20)
        self.send_response(answer if isinstance(answer, int) else 200)
        self.end_headers()
        if isinstance(answer, int):
            self.leave()
            return
        lines = answer if isinstance(answer, list) else stream(4, usage=body["max_tokens"])
        self.leave()
        self.wfile.write("".join(f"{line}\n\n" for line in lines).encode())

    def leave(self):
        with self.server.lock:
            self.server.now -= 1


def stream(n, usage=None, end=True):
    def data(delta, **more):
        return "data: " + json.dumps({"choices": [{"index": 0, "delta": delta}], **more})
    lines = [": ping", data({"role": "assistant", "content": ""}),
             *(data({"content": f"{i}"}) for i in range(n))]
    if usage is not None:
        lines.append("data: "
                     + json.dumps({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": usage}}))
    return lines + ["data: [DONE]"] * end


@pytest.fixture
def stub():
    server = Stub()
    yield server
    server.shutdown()
    server.server_close()


def bench(stub, *args):
    return CliRunner().invoke(main,
                              [f"http://127.0.0.1:{stub.server_port}", "--rates", "500", "-n", "10", *args])


def test_it_sends_streams_and_counts_what_the_server_counted(stub):
    done = bench(stub, "--json", "--rates", "400,800", "--answer-tokens", "9,9", "--api-key", "k",
                 "--model", "m")
    assert done.exit_code == 0, done.output
    first, second = map(json.loads, done.output.splitlines())
    assert (first["rate"], second["rate"]) == (400, 800)
    assert first["requests"] == 10 and first["tokens"] == 90 and first["prompt_tokens"] == 70
    assert first["errors"] == {}
    assert first["first_ms"][0] <= first["first_ms"][1]
    assert first["tokens_per_second"] == pytest.approx(90 / first["seconds"])
    assert len(stub.requests) == 21                     # one of them is to warm up
    path, body, key = stub.requests[3]
    assert path == "/v1/chat/completions" and key == "Bearer k" and body["model"] == "m"
    assert body["stream"] and body["stream_options"] == {"include_usage": True} and body["temperature"] == 0
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert len({body["messages"][0]["content"] for _, body, _ in stub.requests}) == 1
    assert len({body["messages"][1]["content"] for _, body, _ in stub.requests}) == 20


@pytest.mark.parametrize("answer, reason", [
    (503, "status 503"), (stream(3, end=False), "stream ended early"), (["data: {"], "broken event"),
    (["data: [1]"], "broken event"), (['data: {"error": {"message": "x"}}'], "error in the stream"),
    (stream(0), "no text"),
])
def test_what_fails_is_counted_with_its_reason(stub, answer, reason):
    stub.answers = ["ok", "ok", answer, answer]
    done = bench(stub, "--json")
    result = json.loads(done.output)
    assert result["errors"] == {reason: 2} and result["requests"] == 10
    assert 0 < result["good_per_second"] <= 8 / result["seconds"] * 1.001
    stub.answers = [answer]
    done = bench(stub)
    assert done.exit_code == 1 and f"the first request failed: {reason}" in done.output
    assert "Traceback" not in done.output


def test_a_server_without_usage_has_its_events_counted(stub):
    stub.answers = [stream(6)] * 11
    assert json.loads(bench(stub, "--json").output)["tokens"] == 60


def test_a_table_has_a_line_for_each_rate(stub):
    stub.answers = ["ok", 500]
    done = bench(stub, "--rates", "300,600")
    lines = done.output.splitlines()
    assert len(lines) == 3 and "good/s" in lines[0] and lines[1].endswith("1  (status 500)")
    assert lines[2].strip().startswith("600")


def test_prompts_come_from_a_file(stub, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one", "max_tokens": 3}\n\n{"messages": [{"role": "system", "content": "s"}, '
                    '{"role": "user", "content": "two"}]}\n')
    assert bench(stub, "--file", str(path), "--answer-tokens", "5,5").exit_code == 0
    bodies = [body for _, body, _ in stub.requests]
    ones = [body for body in bodies if body["messages"][-1]["content"] == "one"]
    twos = [body for body in bodies if body["messages"][-1]["content"] == "two"]
    assert len(ones) == 6 and len(twos) == 5 and ones[0]["max_tokens"] == 3 and twos[0]["max_tokens"] == 5
    assert [message["role"] for message in ones[0]["messages"]] == ["system", "user"]
    assert twos[0]["messages"][0]["content"] == "s"


def test_users_send_the_next_request_when_the_last_is_answered(stub):
    stub.meet = threading.Barrier(2)
    done = bench(stub, "--json", "--users", "2", "--rates", "0", "--fields", '{"top_k": 5}', "--ignore-eos")
    result = json.loads(done.output)
    assert (result["users"], result["rate"], result["requests"], result["errors"]) == (2, 0, 10, {})
    assert stub.most == 2 and len(stub.requests) == 11
    assert all(body["top_k"] == 5 and body["ignore_eos"] for _, body, _ in stub.requests)
    stub.meet = None
    both = bench(stub, "--users", "3", "--rates", "500").output.splitlines()
    assert [line.split("  ")[0] or line.strip().split("  ")[0] for line in both][1:] == ["3 users", "500"]


def test_a_plan_sends_nothing_after_its_seconds(stub):
    for args in (("--users", "2", "--rates", "0"), ("--rates", "0.01",)):
        done = json.loads(bench(stub, "--json", "--seconds", "1e-3", *args).output)
        assert done["requests"] < 10 and not done["errors"]


def test_prefixes_are_sent_twice_with_another_question(stub):
    done = bench(stub, "--json", "--prefix", "3", "--rates", "0", "--system-words", "30")
    found = json.loads(done.output)
    assert found["prefixes"] == 3 and found["prompt_tokens"] == 7 and found["errors"] == {}
    assert found["new_ms"][0] > 0 < found["known_ms"][0]
    systems, questions = zip(*((body["messages"][0]["content"], body["messages"][1]["content"])
                               for _, body, _ in stub.requests[1:]))
    assert systems[::2] == systems[1::2] and len(set(systems)) == 3 and len(set(questions)) == 6
    stub.answers = ["ok", "ok", 500]
    assert bench(stub, "--prefix", "1", "--rates",
                 "0").output.endswith("prefix known -; failed: status 500\n")


def test_a_share_of_prompts_has_the_system_prompt_which_counts():
    bodies = drawn(random.Random(1), 40, (100, 1500), (64, 256), ["s " * 600], 0.5)
    lengths = [sum(len(message["content"].split()) for message in body["messages"]) for body in bodies]
    shared = [length for body, length in zip(bodies, lengths) if len(body["messages"]) == 2]
    assert len(shared) == 20 and min(shared) > 600 and min(lengths) < 600 and 100 <= min(lengths)
    assert max(lengths) <= 1502
    assert all(64 <= body["max_tokens"] <= 256 for body in bodies)


@pytest.mark.parametrize("args, says", [
    (["--rates", "0"], "nothing to measure"), (["--rates", "0,1"], "above 0"),
    (["--fields", "[]"], "a JSON object"),
    (["--share", "2"], "2.0 is not in the range"),
    (["--rates", "a"], "above 0"), (["--prompt-words", "9,3"], "the lower first"),
    (["--answer-tokens", "1,2,3"], "two counts"), (["-n", "0"], "0 is not in the range"),
])
def test_wrong_options_are_wrong_usage(stub, args, says):
    done = bench(stub, *args)
    assert done.exit_code == 2 and says in done.output


def test_a_broken_file_and_a_server_that_is_not_there_are_sentences(stub, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"promt": 1}\n')
    done = bench(stub, "--file", str(tmp_path / "bad.jsonl"))
    assert done.exit_code == 1 and "line 1: expected an object with messages or prompt" in done.output
    (tmp_path / "bad.jsonl").write_text("\n")
    assert "has no prompts" in bench(stub, "--file", str(tmp_path / "bad.jsonl")).output
    for url in ("http://127.0.0.1:1", "ftp://x", "nonsense"):
        done = CliRunner().invoke(main, [url, "-n", "2"])
        assert done.exit_code == 1 and done.output.splitlines()[-1].startswith("Error: ")


def test_sums_of_known_records():
    records = [Record(0.0, [0.1, 0.2, 0.4], 0.4, 5, 4), Record(1.0, [3.5, 3.6], 4.0, 5, 2),
               Record(2.0, [], 2.5, error="status 500")]
    plan = Plan([], 2.0)
    result = summary(plan, records, Limits(2000, 150))
    assert result.seconds == 4.0 and result.tokens == 6 and result.tokens_per_second == 1.5
    assert result.first_ms == pytest.approx((1300, 2476)) and result.token_ms == pytest.approx((100, 100))
    assert result.gap_ms == pytest.approx((100, 198)) and result.errors == {"status 500": 1}
    assert result.good_per_second == 0.25               # the second waited 2500 ms for its first token
    assert summary(plan, records, Limits(2600, 99)).good_per_second == 0
    nothing = summary(plan, records[2:], Limits(1, 1))
    assert nothing.first_ms is None and nothing.tokens_per_second == 0 and "-" in serve_bench.line(nothing)


def test_arrivals_are_a_poisson_process():
    times = arrivals(random.Random(1), 5.0, 4001)
    gaps = sorted(later - earlier for earlier, later in zip(times, times[1:]))
    assert times[0] == 0 and times == sorted(times)
    assert sum(gaps) / len(gaps) == pytest.approx(0.2, rel=0.05)
    # the median of an exponential distribution
    assert gaps[len(gaps) // 2] == pytest.approx(0.2 * 0.693, rel=0.07)
    assert arrivals(random.Random(1), 5.0, 10) == times[:10]


def test_the_help_says_what_the_columns_are():
    text = CliRunner().invoke(main, ["--help"]).output
    for word in ("Poisson", "goodput", "--rates", "p50 and p99"):
        assert word in text
