"""/api/pull: what it brings, what it tells, and what it refuses."""

import json
import threading

import pytest
import tiny
from serving import served, until

import pybmc
from pybmc.cli import run
from pybmc.hub import store
from pybmc.hub.names import parse
from pybmc.serve import pull
from pybmc.serve.door import Policy

pytest.importorskip("huggingface_hub", reason="needs huggingface-hub")
from hub_server import Hub  # noqa: E402

REPO, FILE = "user/Tiny-GGUF", "tiny.Q4_K_M.gguf"
NAME = f"{REPO}:Q4_K_M"


@pytest.fixture(scope="module")
def model():
    with pybmc.Model(tiny.model("llama"), threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def server(model):
    with served(model, Policy(pull=True), names=["tiny"]) as server:
        yield server


@pytest.fixture(scope="module")
def its_hub():
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture
def hub(its_hub, monkeypatch, tmp_path, server):
    its_hub.use(monkeypatch, tmp_path, {REPO: {FILE: tiny.model("llama").read_bytes()}})
    monkeypatch.setattr(pull, "EVERY", 0.0)
    yield its_hub
    until(lambda: server.service.pulling is None)


def lines(response):
    assert (response.status_code == 200
            and response.headers["content-type"] == "application/x-ndjson"), response.text
    return [json.loads(line) for line in response.text.splitlines()]


def here():
    found = store.cached(parse(NAME))
    return found is not None and found.complete


@pytest.mark.parametrize("name, field",
                         [(NAME, "model"), (NAME, "name"), (REPO, "model"), (f"{REPO}:latest", "model"),
                          (f"hf.co/{NAME}", "model"), (f"{REPO}/{FILE}", "model")])
def test_a_model_is_brought_and_checked(server, hub, name, field):
    told = lines(server.post("/api/pull", {field: name, "insecure": False}))
    size = len(hub.files[REPO][FILE])
    assert told[0] == {"status": "pulling manifest"}
    assert told[-2:] == [{"status": "verifying sha256 digest"}, {"status": "success"}]
    steps = told[1:-2]
    assert steps and all(line["total"] == size and line["digest"].startswith("sha256:") for line in steps)
    done = [line["completed"] for line in steps]
    assert done == sorted(done) and done[-1] == size and here()
    with pybmc.Model(store.find(NAME)):
        pass
    assert ([line["status"] for line in lines(server.post("/api/pull", {field: name}))]
            == ["pulling manifest", "success"])


def test_without_a_stream_the_end_alone_is_told(server, hub):
    response = server.post("/api/pull", {"model": NAME, "stream": False})
    assert response.status_code == 200 and response.json() == {"status": "success"} and here()


@pytest.mark.parametrize("name",
                         ["", "llama3.2", "llama3.2:1b", "library/../x", "/etc/passwd", "../user/repo.gguf",
                          "user/repo/../../x.gguf", "https://example.org/user/repo", "user/repo:Q4:Q5",
                          "a/b\x1b[31m", "--help/x"])
def test_only_names_of_the_hub_are_taken(server, hub, name):
    for field in ("model", "name"):
        response = server.post("/api/pull", {field: name})
        assert response.status_code == 400 and "user/repo" in response.json()["error"]
    assert hub.log == []


@pytest.mark.parametrize("body, word", [({}, "model"), ({"model": 5}, "model"),
                                        ({"model": NAME, "insecure": True}, "insecure"),
                                        ({"model": NAME, "stream": 3}, "stream"), ([], "object")])
def test_wrong_fields_are_400(server, hub, body, word):
    response = server.post("/api/pull", body)
    assert response.status_code == 400 and word in response.json()["error"] and hub.log == []


@pytest.mark.parametrize("fault, words", [
    (lambda hub: hub.files.clear(), "no repository"),
    (lambda hub: hub.sums.update({FILE: "0" * 64}), "expected sha256"),
    (lambda hub: setattr(hub, "status", 500), "status 500"),
    (lambda hub: hub.files.update({REPO: {FILE: b"no model"}}), FILE[:4]),
])
def test_what_the_hub_does_not_give_is_a_sentence(server, hub, fault, words):
    fault(hub)
    told = lines(server.post("/api/pull", {"model": NAME}))
    assert words in told[-1]["error"] and "/" + "tmp" not in told[-1]["error"] and not here()
    response = server.post("/api/pull", {"model": NAME, "stream": False})
    assert response.status_code == 404 and words in response.json()["error"]


@pytest.mark.parametrize("error, status, words", [
    (OSError(28, "No space left on device", "/secret/path"), 500, "No space left on device"),
    (ValueError("/secret/path"), 500, "internal error"),
])
def test_other_failures_tell_no_path(server, hub, monkeypatch, error, status, words):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("pybmc.hub.transfer.pull", fail)
    response = server.post("/api/pull", {"model": NAME, "stream": False})
    assert response.status_code == status and words in response.json()["error"]
    assert "secret" not in response.text
    assert words in lines(server.post("/api/pull", {"model": NAME}))[-1]["error"]


@pytest.fixture
def held(monkeypatch):
    """The first bytes come, and no more before somebody ends the pull. Its notes."""
    note, notes = pull.Pull._note, []

    def wait(self, part, done):
        notes.append(done)
        until(lambda: self._left)
        note(self, part, done)

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 10)
        patch.setattr(pull.Pull, "_note", wait)
        yield notes


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_ends_it(server, hub, held, stream):
    connection = server.begin("/api/pull", {"model": NAME, "stream": stream})
    until(lambda: held)
    connection.close()
    until(lambda: server.service.pulling is None)
    assert held == [1 << 10] and not here()


def test_one_model_is_pulled_at_a_time_while_others_are_served(server, hub, held):
    connection = server.begin("/api/pull", {"model": NAME})
    until(lambda: held)
    response = server.post("/api/pull", {"model": "user/other"})
    assert response.status_code == 429 and NAME in response.json()["error"]
    assert "retry-after" in response.headers
    assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 2}).status_code == 200
    connection.close()


def test_after_a_pull_that_was_ended_the_next_one_is_whole(server, hub, monkeypatch):
    data, tell = hub.files[REPO][FILE], pull.Pull._tell

    def leave(self, line):
        tell(self, line)
        self._left = self._left or line.get("completed", 0) > len(data) // 2

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 10)
        patch.setattr(pull.Pull, "_tell", leave)
        assert "waits" in lines(server.post("/api/pull", {"model": NAME}))[-1]["error"] and not here()
    assert lines(server.post("/api/pull", {"model": NAME}))[-1] == {"status": "success"} and here()


def test_the_end_of_the_server_ends_a_pull(model, hub, held):
    with served(model, Policy(pull=True), grace=0.0) as server:
        answers = []
        client = threading.Thread(target=lambda: answers.append(server.post("/api/pull", {"model": NAME})))
        client.start()
        until(lambda: held)
        server.stop()
        client.join(20)
        assert "shutting down" in lines(answers[0])[-1]["error"]
        until(lambda: "pybmc-pull" not in [thread.name for thread in threading.enumerate()])


def test_it_is_403_without_the_flag_and_401_without_the_key(model, hub):
    with served(model) as server:
        response = server.post("/api/pull", {"model": NAME})
        assert response.status_code == 403 and "--allow-pull" in response.json()["error"]
        assert "pybmc pull" in response.json()["error"]
    with served(model, Policy(pull=True, keys=["secret"])) as server:
        assert server.post("/api/pull", {"model": NAME}).status_code == 401
    assert hub.log == []


def test_ollamas_client_pulls(server, hub):
    ollama = pytest.importorskip("ollama", reason="needs the ollama package")
    client = ollama.Client(host=server.url)
    assert [part.status for part in client.pull(NAME, stream=True)][-1] == "success" and here()
    assert client.pull(NAME).status == "success"
    with pytest.raises(ollama.ResponseError, match="no repository"):
        list(client.pull("user/none", stream=True))


def test_a_missing_package_is_told_at_the_start(monkeypatch, capfd):
    monkeypatch.setattr("pybmc.cli.serve.find_spec", lambda name: None)
    assert run(["serve", str(tiny.model("llama")), "--port", "0", "--allow-pull"]) == 1
    assert (capfd.readouterr().err == "pybmc: --allow-pull needs packages that are not installed: pip "
                                      "install huggingface-hub\n")
