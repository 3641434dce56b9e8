"""The server's laws: an answer does not depend on company, and who leaves costs nothing."""

import asyncio
import gc
import random
import threading

import pytest
import tiny
from serving import Gate, events, httpx, read_to, served, until

import pybmc
from pybmc.serve.service import LARGE, THREADS

N_CTX = 1500


@pytest.fixture(scope="module")
def model():
    with pybmc.Model(tiny.model("llama", n_ctx=N_CTX), threads=2) as model:
        yield model


@pytest.fixture(scope="module")
def draft():
    with pybmc.Model(tiny.model("llama", n_ctx=N_CTX, types="Q4_0"), threads=1) as model:
        yield model


# ---- company


def random_request(rng):
    """Fields of a request to /v1/chat/completions; many begin alike."""
    words = ["Once", "upon", "a time", "there was", "a mouse", "1 2 3 1 2 3", "who lived", "in a mill"]
    system = [{"role": "system", "content": "Tell a story. " * rng.choice([1, 15])}] * rng.randint(0, 1)
    user = {"role": "user", "content": " ".join(rng.choice(words) for _ in range(rng.choice([2, 5, 60])))}
    fields = {"messages": [*system, user], "seed": rng.randrange(100),
              "max_tokens": rng.choice([1, 20, 60, 150]), "n": rng.choice([1, 1, 1, 3]),
              "temperature": rng.choice([0, 0.7, 1.5]), "min_p": rng.choice([0, 0.05]), "logprobs": True,
              "top_logprobs": rng.choice([0, 2])}
    more = rng.choice([{}, {"stop": ["e", "zz"]}, {"frequency_penalty": 0.5}, {"spec": "off"},
                       {"logit_bias": {"300": 5}}, {"cache_prompt": False}])
    return fields | more


def alone(model, fields):
    """Texts and reasons of the answers, from the library, without guesses, company or kept rows."""
    settings = {name: fields[name] for name in ("temperature", "min_p", "frequency_penalty", "logit_bias")
                if name in fields}
    found = []
    for i in range(fields["n"]):
        tokens = list(pybmc.generate(model, fields["messages"], fields["max_tokens"], spec="off",
                                     seed=fields["seed"] + i, stop=fields.get("stop", ()), **settings))
        found.append(("".join(t.text for t in tokens), tokens[-1].finish_reason,
                      [t.logprob for t in tokens if t.id not in model.tokenizer.stop_ids]))
    return found


def told(response, streamed, n):
    """The same of an answer."""
    found = [["", None, []] for _ in range(n)]
    for event in events(response) if streamed else [response.json()]:
        for choice in event["choices"]:
            its = found[choice["index"]]
            its[0] += choice["delta" if streamed else "message"].get("content", "")
            its[1] = choice["finish_reason"] or its[1]
            its[2] += [entry["logprob"] for entry in (choice["logprobs"] or {"content": []})["content"]]
    return [tuple(its) for its in found]


async def ask(client, rng_seed, fields, found):
    """Send a request some time; some leave early."""
    rng = random.Random(rng_seed)
    streamed, leaves = rng.random() < 0.5, rng.random() < 0.25
    await asyncio.sleep(rng.choice([0, 0, 0.01, 0.03]))
    body = fields | {"stream": streamed}
    if leaves:
        task = asyncio.ensure_future(client.post("/v1/chat/completions", json=body))
        await asyncio.sleep(rng.choice([0, 0.005, 0.02]))
        task.cancel()
        return
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    found[rng_seed] = told(response, streamed, fields["n"])


@pytest.mark.parametrize("seed, spec, rows",
                         [(1, "auto", 3000), (2, "ngram", 900), (3, "off", 700), (4, "draft", 1200)])
def test_company_changes_no_answer(model, draft, seed, spec, rows, monkeypatch):
    """Random requests together, in little memory, with kept rows, guesses, several answers,
    and clients that leave."""
    monkeypatch.setattr("pybmc.engine.engine.CALL_SECONDS", 0.001)
    rng = random.Random(seed)
    asked = {f"{seed}.{i}": random_request(rng) for i in range(14)}
    found = {}

    async def all_at_once(url):
        limits = httpx.Limits(max_connections=50)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
            await asyncio.gather(*(ask(client, key, fields, found) for key, fields in asked.items()))

    with served(model, draft=draft if spec in ("auto", "draft") else None, spec=spec, parallel=4,
                memory=rows * model.config.kv_row_bytes, pass_seconds=0.005) as server:
        asyncio.run(all_at_once(server.url))
        until(lambda: not server.engine.running and not server.engine.waiting)
        assert not server.service.worker._sequences and not server.service.worker.runs
        reused = server.client.get("/metrics").text
    assert len(found) >= 7
    for key, answers in found.items():
        pairs = zip(answers, alone(model, asked[key]))
        for (text, why, logprobs), (text_alone, why_alone, logprobs_alone) in pairs:
            assert (text, why) == (text_alone, {"context": "length"}.get(why_alone, why_alone)), asked[key]
            assert logprobs == logprobs_alone
    assert 'pybmc_prompt_tokens_total{how="cached"}' in reused


# ---- who leaves


def live_sessions(model):
    gc.collect()
    return sum(bool(session._handle) for session in model._sessions)


LONG = {"messages": [{"role": "user", "content": "a " * 500}], "max_tokens": 900, "temperature": 0,
        "logit_bias": {}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("where", ["waiting", "reading", "writing"])
def test_a_closed_connection_frees_its_rows_within_one_pass(model, where, stream, monkeypatch):
    monkeypatch.setattr("pybmc.engine.engine.CALL_SECONDS", 0.0)
    before = live_sessions(model)
    with served(model, spec="off", parallel=1) as server:
        engine, worker = server.engine, server.service.worker
        gate = Gate(server)
        if where == "waiting":
            first = server.begin("/v1/chat/completions", LONG | {"stream": True})
            until(lambda: engine.waiting)
            gate.let(2)
        if where != "writing":
            engine._prompt_rate = 1e-9          # 16 tokens a pass
        connection = server.begin("/v1/chat/completions", LONG | {"stream": stream, "n": 2})
        until(lambda: len(worker.runs) == 1 + (where == "waiting"))
        gate.let(3 if where != "writing" else 6)
        ours = [s for s in (*engine.running, *engine.waiting)
                if s.request.max_tokens == 900][-1 if where == "waiting" else 0]
        assert {"waiting": not ours.started, "reading": ours.started and ours.reading,
                "writing": ours.started and not ours.reading}[where]
        connection.close()
        until(lambda: len(worker.runs) == (where == "waiting"))
        steps = gate.steps
        gate.allow()
        until(lambda: ours.done)
        assert gate.steps <= steps + 1
        until(lambda: ours not in (*engine.running, *engine.waiting))      # it leaves them after it is done
        if where == "waiting":
            assert len(engine.running) == 1
            first.close()
            until(lambda: not worker.runs)
            gate.allow()
        until(lambda: not worker._sequences)
        assert not engine.running and not engine.waiting and not engine.prefixes.rows
        assert live_sessions(model) == before
        assert server.client.get("/metrics").text.count("pybmc_cancelled_total 1.0") == (where != "waiting")


def test_a_body_that_is_cut_short_leaves_nothing(model):
    with served(model) as server:
        connection = server.connect()
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n"
                           b"\r\n{\"mess")
        connection.close()
        assert server.client.get("/health").status_code == 200
        until(lambda: not server.server.server_state.tasks)
        assert not server.service.worker.runs


@pytest.mark.parametrize("path, fields", [
    ("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": LONG["messages"]}),
    ("/api/chat", {"messages": LONG["messages"]}), ("/tokenize", {"content": "a"}),
    ("/v1/embeddings", {"input": "a"}),
])
def test_a_text_whose_client_has_left_is_not_tokenized(model, path, fields):
    with served(model, names=["tiny"]) as server:
        free, entered = threading.Event(), []
        for _ in range(THREADS):                # nobody is free for it
            server.loop.call_soon_threadsafe(server.service._small.submit,
                                             lambda: (entered.append(1), free.wait(20)))
        until(lambda: len(entered) == THREADS)
        queue = server.service._small._work_queue
        connection = server.begin(path, fields | {"model": "tiny"})
        until(queue.qsize)
        work = queue.get()
        connection.close()
        until(lambda: not server.server.server_state.tasks)
        assert work.future.cancelled()
        free.set()
        assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 200


def test_a_client_that_leaves_ends_its_embeddings(model):
    with served(model) as server:
        embed, free, passes = model.embed, threading.Event(), []

        def slow(ids, *rest):
            passes.append(len(ids))
            free.wait(20)
            return embed(ids, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "embed", slow)
            connection = server.begin("/v1/embeddings", {"input": ["a b c " * 60] * 40})
            until(lambda: passes)
            connection.close()
            until(lambda: not server.server.server_state.tasks)
            free.set()
            assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 200
            assert len(passes) == 1 and passes[0] < 40


def test_small_texts_do_not_wait_for_large_ones(model):
    with served(model) as server:
        free, entered = threading.Event(), threading.Event()
        encode = server.service.tokenizer.encode

        def slow(text, *args, **more):
            if len(text) > LARGE:
                entered.set()
                free.wait(20)
            return encode(text, *args, **more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(server.service.tokenizer, "encode", slow)
            waiting = [server.begin("/v1/completions", {"prompt": "a " * LARGE}) for _ in range(THREADS + 2)]
            assert entered.wait(20)
            assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 200
            free.set()
            for connection in waiting:
                assert b"context_length_exceeded" in read_to(connection, b"}}")
                connection.close()


def test_a_reader_that_is_slow_gets_everything(model):
    with served(model) as server:
        connection = server.begin("/v1/chat/completions", {"messages": LONG["messages"], "max_tokens": 300,
                                                           "stream": True, "temperature": 0})
        data = b""
        connection.settimeout(20)
        while b"[DONE]" not in data:
            part = connection.recv(200)
            assert part, data[-300:]
            data += part
        connection.close()
        text = b'"finish_reason":"length"' in data
        assert text


def test_an_idle_server_makes_no_steps(model):
    with served(model) as server:
        server.post("/v1/completions", {"prompt": "a", "max_tokens": 3})
        until(lambda: not server.engine.running)
        steps = server.service.worker.steps
        assert server.client.get("/health").status_code == 200 and server.service.worker.steps == steps
        assert server.service.worker._calls.empty()


# ---- the end


def test_the_end_gives_running_answers_some_time_then_an_error(model):
    for grace, ends in ((20, b"[DONE]"), (0.1, b"shutting_down")):
        with served(model, grace=grace) as server:
            gate = Gate(server, 2)
            connection = server.begin("/v1/chat/completions", LONG | {"stream": True, "max_tokens": 50})
            until(lambda: gate.steps == 2)
            server.stop()
            until(lambda: server.service.closing)
            if grace > 1:
                gate.open()
            connection.settimeout(20)
            data = read_to(connection, b"0\r\n\r\n")
            assert ends in data and (b"[DONE]" in data) == (ends == b"[DONE]")
            gate.open()
            server._thread.join(20)


def test_a_second_stop_ends_at_once(model):
    with served(model, grace=1000) as server:
        gate = Gate(server, 2)
        connection = server.begin("/v1/chat/completions", LONG | {"stream": True})
        until(lambda: gate.steps == 2)
        server.stop()
        server.stop()
        gate.open()
        server._thread.join(20)
        assert not server._thread.is_alive()
        connection.close()


def test_new_work_is_refused_while_ending(model):
    with served(model, grace=1000) as server:
        server.service.closing = True
        response = server.post("/v1/completions", {"prompt": "a"})
        assert response.status_code == 503 and response.json()["error"]["code"] == "shutting_down"
