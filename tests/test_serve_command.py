"""The command: its flags, its ready line, signals and exit statuses."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import tiny
from serving import httpx

from pybmc.cli import run


def start(*args, **env):
    return subprocess.Popen([sys.executable, "-m", "pybmc", "serve", *map(str, args)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=os.environ | env)


def test_a_server_from_start_to_end():
    """A ready line, flags by variables, an answer, one line of log, and status 0 after SIGTERM."""
    server = start(tiny.model("llama"), "--json", "--alias", "mine", "-t", "1", PYBMC_PORT="0",
                   PYBMC_SEED="7", PYBMC_MAX_TOKENS="5", PYBMC_API_KEY="one two", PYBMC_TEMP="0.5")
    try:
        ready = json.loads(server.stdout.readline())
        assert ready["model"] == "mine" and ready["pid"] == server.pid
        with httpx.Client(base_url=ready["url"], timeout=20, headers={"x-api-key": "two"}) as client:
            assert client.get("/props").json()["default_generation_settings"]["params"]["temperature"] == 0.5
            found = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})
            assert found.json()["usage"]["completion_tokens"] <= 5 and found.headers["x-pybmc-seed"] == "7"
        server.send_signal(signal.SIGTERM)
        out, log = server.communicate(timeout=20)
        assert server.returncode == 0 and not out and "POST /v1/chat/completions 200" in log
    finally:
        server.kill()


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_ctrl_c_or_a_closed_terminal_ends_a_server_on_a_unix_socket(tmp_path, name):
    path = tmp_path / "socket"
    code = ("import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"         # nohup ignores it
            "from pybmc.cli import main; main(['serve', *sys.argv[1:]])")
    server = subprocess.Popen([sys.executable, "-c", code, str(tiny.model("llama")), "--unix",
                               str(path), "-t", "1"],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stdout.readline().endswith(f" at unix:{path}\n")
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)),
                          base_url="http://localhost") as client:
            assert client.get("/health").json() == {"status": "ok"}
        server.send_signal(getattr(signal, name))
        assert server.wait(20) == 0 and not path.exists()
    finally:
        server.kill()
        server.communicate()


def status(capfd, *args):
    found = run(["serve", *map(str, args)])
    return found, capfd.readouterr().err


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
        return True
    except OSError:
        return False


@pytest.mark.skipif(not has_ipv6(), reason="needs IPv6's loopback")
def test_a_server_on_several_addresses():
    """They have one port; a free one is free on all."""
    server = start(tiny.model("llama"), "--host", "127.0.0.1, ::1", "--port", "0", "--json", "-t", "1")
    try:
        url = json.loads(server.stdout.readline())["url"]
        assert url.startswith("http://127.0.0.1:")
        for base in (url, url.replace("127.0.0.1", "[::1]")):
            assert httpx.get(base + "/health").json() == {"status": "ok"}
    finally:
        server.kill()
        server.communicate()


def test_a_port_that_is_taken_is_status_1(capfd):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert (status(capfd, tiny.model("llama"), "--port", port)
                == (1, f"pybmc: 127.0.0.1:{port}: Address " "already in use\n"))


def test_a_file_that_is_no_model_is_status_1(capfd, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"nothing")
    found, told = status(capfd, tmp_path / "x.gguf", "--port", 0)
    assert found == 1 and "x.gguf" in told and "Traceback" not in told


@pytest.mark.parametrize("args, words", [
    (["--host", "0.0.0.0"], "--api-key"), (["--host", "example.org"], "--api-key"),
    (["--host", "127.0.0.1,0.0.0.0"], "0.0.0.0 can"), (["--api-key", ""], "empty"),
    (["--port", "70000"], "70000"), (["--memory", "much"], "8G"), (["--temp", "-1"], "temperature"),
    (["--parallel", "0"], "parallel"), (["--draft-min", "9", "--draft-max", "3"], "draft-min"),
    (["--tint"], "tint"), (["--chat-template-kwargs", "[1]"], "JSON object"), (["--think", "maybe"], "off"),
    (["--grace", "nan"], "finite"), (["--grace", "inf"], "finite"), (["--queue-seconds", "nan"], "finite"),
    (["--pass-ms", "inf"], "finite"), (["--host", ""], "found ''"),
    (["--host", "127.0.0.1,"], "found '127.0.0.1,'"), (["--alias", ""], "alias is empty"),
])
def test_wrong_flags_are_status_2(capfd, args, words):
    found, told = status(capfd, tiny.model("llama"), "--port", 0, *args)
    assert found == 2 and words in told


def test_a_log_that_cannot_be_written_is_status_1(capfd, tmp_path):
    found = status(capfd, tiny.model("llama"), "--port", 0, "--log-texts", tmp_path)
    assert found == (1, f"pybmc: {tmp_path}: Is a directory\n")


def test_keys_come_from_a_file(capfd, tmp_path):
    from pybmc.cli.serve import read_keys

    (tmp_path / "keys").write_text("one\n\n two \n")
    assert read_keys(tmp_path / "keys") == ["one", "two"]
    (tmp_path / "empty").write_text("\n")
    assert status(capfd, tiny.model("llama"), "--api-key-file", tmp_path / "empty")[0] == 2
    assert status(capfd, tiny.model("llama"), "--api-key-file", tmp_path / "none")[0] == 1


@pytest.mark.parametrize("missing", ["starlette", "uvicorn", "prometheus_client"])
def test_a_missing_package_is_one_sentence(missing):
    code = (f"import sys; sys.modules[{missing!r}] = None\n"
            f"from pybmc.cli import main; main(['serve', {str(tiny.model('llama'))!r}])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
                          check=False)
    assert done.returncode == 1 and "pip install starlette uvicorn prometheus-client" in done.stderr
    assert done.stderr.count("\n") == 1 and missing in done.stderr


@pytest.mark.parametrize("text, size", [("8G", 8e9), ("512Mi", 512 << 20), ("1.5 gb", 1.5e9), ("100", 100),
                                        ("64kib", 64 << 10)])
def test_sizes(text, size):
    from pybmc.cli.options import Size

    assert Size().convert(text, None, None) == size
