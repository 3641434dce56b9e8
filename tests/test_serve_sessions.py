"""Saved sessions of a server: by name in requests, and by slots."""

import os
import re
import stat
import threading

import pytest
import tiny
import tiny_encoders
import tiny_tools
from serving import Gate, events, served, until

import pybmc
from pybmc.engine import session_file

SETTINGS = {"max_tokens": 8, "seed": 3, "logit_bias": {"398": -100, "400": -100}}


@pytest.fixture(scope="module", params=["llama", "qwen35"])
def model(request):
    with pybmc.Model(tiny.model(request.param, n_ctx=2000), threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def llama():
    with pybmc.Model(tiny.model("llama", n_ctx=2000), threads=1) as model:
        yield model


def ask(server, messages, session="talk", **more):
    response = server.post("/v1/chat/completions",
                           {"messages": messages, "session": session} | SETTINGS | more)
    assert response.status_code == 200, response.text
    if more.get("stream"):
        chunks = events(response)
        return ("".join(c["choices"][0]["delta"].get("content", "") for c in chunks),
                chunks[-1]["timings"]["cache_n"])
    answer = response.json()
    return (answer["choices"][0]["message"]["content"],
            answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def turns(ask, n=3):
    """What is said in a conversation of some turns, and how many tokens of each prompt were there already."""
    messages, told = [], []
    for i in range(n):
        messages.append({"role": "user", "content": f"turn {i}, and then"})
        told.append(ask(messages, i))
        messages.append({"role": "assistant", "content": told[-1][0]})
    return told


def errors(response):
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


def test_a_session_goes_on_in_another_server(model, tmp_path):
    """The same answers as in one server; and as many tokens need not be read again."""
    with served(model) as server:
        right = turns(lambda messages, i: ask(server, messages, None))
    assert all(cached for _, cached in right[1:])

    def in_a_new_server(messages, i):
        with served(model, sessions=str(tmp_path / "kept")) as server:
            return ask(server, messages, stream=bool(i % 2))

    assert turns(in_a_new_server) == right
    assert os.listdir(tmp_path / "kept") == ["talk"]
    assert stat.S_IMODE(os.stat(tmp_path / "kept" / "talk").st_mode) == 0o600
    assert stat.S_IMODE(os.stat(tmp_path / "kept").st_mode) == 0o700


ROUTES = {
    "/v1/completions": {"prompt": "Once upon a time", "max_tokens": 8},
    "/completion": {"prompt": "Once upon a time", "n_predict": 8},
    "/v1/responses": {"input": "one", "max_output_tokens": 8},
    "/v1/messages": {"messages": [{"role": "user", "content": "one"}], "max_tokens": 8},
    "/api/chat": {"model": "tiny", "messages": [{"role": "user", "content": "one"}], "stream": False,
                  "options": {"num_predict": 8}},
    "/api/generate": {"model": "tiny", "prompt": "one", "stream": False, "options": {"num_predict": 8}},
}


@pytest.mark.parametrize("path", ROUTES)
def test_every_route_that_writes_goes_on_with_a_session(llama, tmp_path, path):
    """What it saves is read by the next server, which reads less of the same prompt."""
    found = []
    for _ in range(2):
        with served(llama, names=["tiny"], sessions=str(tmp_path)) as server:
            response = server.post(path, ROUTES[path] | {"session": "talk"})
            assert response.status_code == 200, response.text
            text = server.client.get("/metrics").text
            found.append(int(re.search(r"^llamacpp:prompt_tokens_cached\S* (\d+)", text, re.M)[1]))
    assert os.listdir(tmp_path) == ["talk"] and found[0] == 0 and found[1] > 0


def test_rows_in_memory_are_used_and_appended(llama, tmp_path, monkeypatch):
    """One file that grows, and is never read."""
    path, sizes, inodes = tmp_path / "talk", [], set()
    monkeypatch.setattr("pybmc.serve.sessions.load", lambda *args: pytest.fail("the file is read"))

    def turn(messages, i):
        answer = ask(server, messages)
        inodes.add(path.stat().st_ino)
        sizes.append(path.stat().st_size)
        return answer

    with served(llama, sessions=str(tmp_path)) as server:
        turns(turn)
        assert len(inodes) == 1 and sizes == sorted(set(sizes)) and not server.engine.lent


def test_a_file_that_another_program_changed_is_read(llama, tmp_path):
    with served(llama, sessions=str(tmp_path)) as server:
        messages = [{"role": "user", "content": "one"}]
        answer, _ = ask(server, messages)
        with llama.load_session(tmp_path / "talk") as session:
            position = session.position
            session.rewind(position // 2)
            session.save(tmp_path / "talk")
        server.service.worker.engine.prefixes.close()
        assert ask(server, messages) == (answer, position // 2)


def test_requests_with_one_name_take_turns(llama, tmp_path):
    messages, found = [{"role": "user", "content": "one"}], []
    with served(llama, sessions=str(tmp_path)) as server:
        gate = Gate(server)

        def one(seed):
            found.append(ask(server, messages, seed=seed))

        threads = [threading.Thread(target=one, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: len(server.service.worker.runs) == 1)
        gate.let(1)
        assert len(server.service.worker.runs) == 1
        assert len(server.engine.running) + len(server.engine.waiting) <= 1
        gate.open()
        for thread in threads:
            thread.join(30)
        assert len(found) == 3 and sum(cached > 0 for _, cached in found) == 2
    with served(llama, sessions=str(tmp_path), queue_seconds=0.05) as server:
        gate = Gate(server)
        first = server.begin("/v1/chat/completions", {"messages": messages, "session": "talk", "stream": True}
                             | SETTINGS | {"max_tokens": 500})
        until(lambda: server.service.worker.runs)
        response = server.post("/v1/chat/completions", {"messages": messages, "session": "talk"})
        assert errors(response) == (503, "queue_timeout", None)
        assert server.post("/slots/0?action=restore", {"filename": "talk"}).status_code == 503
        gate.open()
        first.close()


def test_a_client_that_leaves_saves_nothing_and_frees_the_name(llama, tmp_path):
    messages = [{"role": "user", "content": "one"}]
    with served(llama, sessions=str(tmp_path)) as server:
        answer = ask(server, messages)[0]
        data = (tmp_path / "talk").read_bytes()
        gate = Gate(server, 1)
        connection = server.begin("/v1/chat/completions",
                                  {"messages": messages, "session": "talk"} | SETTINGS | {"max_tokens": 1000})
        until(lambda: server.engine.running)
        connection.close()
        until(lambda: not server.service.worker.runs)
        gate.open()
        until(lambda: not server.engine.running)
        assert ask(server, messages)[0] == answer
        assert (tmp_path / "talk").read_bytes()[:len(data)] == data
        assert not server.engine.lent


def test_a_client_that_leaves_waits_for_no_name(llama, tmp_path):
    """Else some hundred of them would be more connections than a server has."""
    body = {"messages": [{"role": "user", "content": "one"}], "session": "talk"} | SETTINGS
    with served(llama, sessions=str(tmp_path)) as server:
        gate, tasks = Gate(server), server.server.server_state.tasks
        first = server.begin("/v1/chat/completions", body)
        until(lambda: server.service.worker.runs)
        others = [server.begin("/v1/chat/completions", body) for _ in range(3)]
        until(lambda: len(tasks) == 4)
        for other in others[:2]:
            other.close()
        until(lambda: len(tasks) == 2)
        gate.open()
        assert b"200 OK" in first.recv(1000) and b"200 OK" in others[2].recv(1000)
        assert ask(server, body["messages"])[1]


def test_a_session_that_cannot_be_saved_is_an_error(llama, tmp_path, monkeypatch):
    messages = [{"role": "user", "content": "one"}]
    with served(llama, sessions=str(tmp_path)) as server:
        with monkeypatch.context() as patch:
            def fail(*args):
                raise OSError(28, "No space left on device")

            patch.setattr(session_file, "_write", fail)
            response = server.post("/v1/chat/completions",
                                   {"messages": messages, "session": "talk"} | SETTINGS)
            assert errors(response) == (500, "session_not_saved", "session")
            assert "No space left" in response.text
            assert "/" not in response.json()["error"]["message"]
            response = server.post("/v1/chat/completions",
                                   {"messages": messages, "session": "talk", "stream": True} | SETTINGS)
            assert events(response)[-1]["error"]["code"] == "session_not_saved"
            assert "[DONE]" not in response.text
        assert os.listdir(tmp_path) == [] and not server.engine.lent
        assert ask(server, messages) and os.listdir(tmp_path) == ["talk"]


@pytest.mark.parametrize("name", ["../talk", "/etc/passwd", ".hidden", "-x", "a/b", "a" * 65, "a b", "ä",
                                  "a\n", "a\0", "."])
def test_names_stay_in_the_folder(llama, tmp_path, name):
    with served(llama, sessions=str(tmp_path / "kept")) as server:
        messages = [{"role": "user", "content": "one"}]
        assert errors(server.post("/v1/chat/completions", {"messages": messages, "session": name}
                                  | SETTINGS)) == (400, "invalid_value", "session")
        for action in ("save", "restore"):
            response = server.post(f"/slots/0?action={action}", {"filename": name})
            assert errors(response) == (400, "invalid_value", "filename")
        assert os.listdir(tmp_path) == ["kept"] and os.listdir(tmp_path / "kept") == []


def test_links_foreign_files_and_other_models_are_refused(llama, tmp_path):
    messages, folder = [{"role": "user", "content": "one"}], tmp_path / "kept"
    folder.mkdir()
    (tmp_path / "secret").write_text("secret")
    os.symlink(tmp_path / "secret", folder / "link")
    (folder / "text").write_text("text")
    (folder / "folder").mkdir()
    with pybmc.Model(tiny.model("qwen3"), threads=1) as other, other.session() as session:
        session.eval([1, 2], "none")
        session.save(folder / "other")
    with served(llama, sessions=str(folder)) as server:
        for name, says in (("link", "cannot be read"), ("text", "text is no saved session"),
                           ("folder", "no regular file"), ("other", "expected a session of")):
            response = server.post("/v1/chat/completions", {"messages": messages, "session": name} | SETTINGS)
            assert errors(response) == (400, "invalid_session", "session") and says in response.text
            assert str(tmp_path) not in response.text
            response = server.post("/slots/0?action=restore", {"filename": name})
            assert errors(response) == (400, "invalid_session", "filename") and says in response.text
        assert server.post("/slots/0?action=restore", {"filename": "none"}).status_code == 400
        assert ask(server, messages, "fine")
        assert server.post("/slots/0?action=save", {"filename": "link"}).status_code in (400, 500)
        assert server.post("/slots/0?action=save", {"filename": "text"}).status_code == 400
    assert (tmp_path / "secret").read_text() == "secret" and (folder / "text").read_text() == "text"


def test_what_a_session_cannot_be_joined_with(llama, tmp_path):
    messages = [{"role": "user", "content": "one"}]
    with served(llama, sessions=str(tmp_path)) as server:
        for more in ({"n": 2}, {"cache_prompt": False}):
            response = server.post("/v1/chat/completions",
                                   {"messages": messages, "session": "a"} | SETTINGS | more)
            assert errors(response) == (400, "unsupported_parameter", "session")
        for path, body in (("/v1/completions", {"prompt": ["a", "b"]}),
                           ("/completion", {"prompt": "a", "n_cmpl": 2})):
            assert (errors(server.post(path, body | {"session": "a"}))
                    == (400, "unsupported_parameter", "session"))
    with served(llama) as server:
        response = server.post("/v1/chat/completions", {"messages": messages, "session": "a"})
        assert errors(response) == (400, "unsupported_parameter", "session")
        assert "--sessions DIR" in response.text
        assert errors(server.post("/slots/0?action=save", {"filename": "a"})) == (501, "disabled", None)


def test_a_session_that_does_not_fit_the_memory_is_read_anew(llama, tmp_path):
    messages = [{"role": "user", "content": "one " * 200}]
    with served(llama, sessions=str(tmp_path)) as server:
        answer, _ = ask(server, messages)
    with served(llama, sessions=str(tmp_path)) as server:
        server.engine.make_way = lambda size: size != os.path.getsize(tmp_path / "talk")
        assert (errors(server.post("/slots/0?action=restore", {"filename": "talk"}))
                == (503, "out_of_memory", None))
        assert ask(server, messages) == (answer, 0)


def test_kept_rows_make_way_and_lent_ones_count(llama):
    from engines import events as steps

    from pybmc import Engine, Request

    with Engine(llama, memory=8e6, keep=True, spec="off") as engine:
        texts = [list(range(10 * i, 10 * i + 40)) for i in range(3)]
        for text in texts:
            engine.add(Request(text, 4))
            list(steps(engine))
        kept, used = [k.tokens for k in engine.prefixes._kept], engine.used
        session = engine.lend(kept[1], llama.config.n_ctx)
        assert session.tokens == kept[1].tolist() and engine.used == used and len(engine.prefixes) == 2
        assert engine.lend(kept[1], llama.config.n_ctx) is None
        own = session.arena_stats().bytes_reserved
        assert engine.make_way(8e6 - own) and len(engine.prefixes) == 0
        assert not engine.make_way(8e6 - own + 1)
        engine.give_back(session)
        assert engine.used == own and engine.forget(kept[1][:5], llama.config.n_ctx) == 0
        assert engine.forget(kept[1], llama.config.n_ctx) == len(kept[1]) and engine.used == 0


def test_a_folder_that_is_none_ends_the_server(tmp_path, capfd):
    from pybmc.cli import run

    (tmp_path / "file").touch()
    for path, model, says in ((tmp_path / "file", tiny.model("llama"), "file"),
                              (tmp_path / "new", tiny_encoders.model("bert"), "is an encoder")):
        assert run(["serve", str(model), "-t", "1", "--port", "0", "--sessions", str(path)]) == 1
        out, err = capfd.readouterr()
        assert not out and says in err and err.count("\n") == 1 and "Traceback" not in err
    assert os.listdir(tmp_path) == ["file"]


# ---- slots -------------------------------------------------------------------------------------------------


def complete(server, prompt, **more):
    return server.post("/completion",
                       {"prompt": prompt, "n_predict": 8, "seed": 3, "return_tokens": True} | more).json()


def test_slots_are_saved_restored_and_erased(model, tmp_path):
    """As llama-server's clients do it."""
    with served(model, sessions=str(tmp_path)) as server:
        first = complete(server, "Once upon a time there was")
        saved = server.post("/slots/0?action=save", {"filename": "slot0.bin"}).json()
        n = first["tokens_evaluated"] + first["tokens_predicted"] - 1
        assert (saved["id_slot"], saved["filename"], saved["n_saved"]) == (0, "slot0.bin", n)
        assert saved["n_written"] == os.path.getsize(tmp_path / "slot0.bin")
        assert saved["timings"]["save_ms"] > 0
        assert server.post("/slots/0?action=erase").json() == {"id_slot": 0, "n_erased": n}
        assert server.post("/slots/0?action=erase").json() == {"id_slot": 0, "n_erased": 0}
        assert errors(server.post("/slots/0?action=save", {"filename": "x"})) == (400, "invalid_value", "id")
        assert len(server.engine.prefixes) == 0
    with served(model, sessions=str(tmp_path)) as server:
        restored = server.post("/slots/3?action=restore", {"filename": "slot0.bin"}).json()
        assert (restored["id_slot"], restored["n_restored"], restored["n_read"]) == (3, n, saved["n_written"])
        prompt = "Once upon a time there was" + first["content"]
        second = complete(server, prompt)
        lost = 48 if model.config.arch == "qwen35" else 0
        assert second["timings"]["cache_n"] >= first["tokens_evaluated"] - lost
        with served(model) as plain:
            assert complete(plain, prompt)["tokens"] == second["tokens"]


def test_a_request_runs_in_the_slot_that_it_asks_for(llama, tmp_path):
    with served(llama, sessions=str(tmp_path), parallel=3) as server:
        complete(server, "Once upon", id_slot=2)
        assert errors(server.post("/slots/0?action=save", {"filename": "x"})) == (400, "invalid_value", "id")
        assert server.post("/slots/2?action=save", {"filename": "x"}).json()["n_saved"]
        gate = Gate(server)
        first = server.begin("/completion", SETTINGS | {"prompt": "Once", "id_slot": 1, "n_predict": 1000})
        until(lambda: server.service.worker.runs)
        gate.let(2)
        until(lambda: [slot["is_processing"] for slot in server.client.get("/slots").json()]
              == [False, True, False])
        assert errors(server.post("/slots/1?action=erase")) == (503, "slot_busy", None)
        first.close()
        gate.open()
        for fields in ({"id_slot": 3}, {"id_slot": -2}, {"id_slot": "a"}):
            assert server.post("/completion", {"prompt": "Once", "n_predict": 1} | fields).status_code == 400


@pytest.mark.parametrize("path", ["/slots/8?action=save", "/slots/x?action=save", "/slots/-1?action=erase",
                                  "/slots/0?action=burn", "/slots/0"])
def test_actions_that_are_none(llama, tmp_path, path):
    with served(llama, sessions=str(tmp_path)) as server:
        assert server.post(path, {"filename": "a"}).status_code == 400
        assert server.client.get("/slots/0").status_code == 405


def test_calls_and_schemas_go_on_in_another_server(tmp_path):
    """With a session, what follows a call of a tool is what it is without one."""
    pytest.importorskip("llguidance", reason="schemas need llguidance")
    stop = {"type": "function",
            "function": {"name": "stop", "parameters": {"type": "object", "additionalProperties": False}}}

    def post(server, session, fields):
        body = SETTINGS | {"max_tokens": 100, "tools": [stop], "session": session} | fields
        choice, = server.post("/v1/chat/completions", body).json()["choices"]
        return choice["message"]

    def call_and_answer(server_of, session):
        messages = [{"role": "user", "content": "Stop it"}]
        with server_of() as server:
            called = post(server, session,
                          {"messages": messages, "tool_choice": "required", "parallel_tool_calls": False})
        call, = called["tool_calls"]
        assert call["function"] == {"name": "stop", "arguments": "{}"}
        call["id"] = "call_1"
        messages += [called, {"role": "tool", "tool_call_id": "call_1", "content": "done"}]
        with server_of() as server:
            said = post(server, session, {"messages": messages, "tool_choice": "none", "response_format": {
                "type": "json_schema", "json_schema": {"name": "said", "schema": {"enum": ["yes", "no"]}}}})
        return called, said["content"]

    with pybmc.Model(tiny_tools.model("hermes"), threads=1) as model:
        right = call_and_answer(lambda: served(model), None)
        assert right[1] in ('"yes"', '"no"')
        assert call_and_answer(lambda: served(model, sessions=str(tmp_path)), "talk") == right
        assert os.listdir(tmp_path) == ["talk"]
