"""The page of the server: in Chromium against a server that streams canned chunks,
and what can be said of its source alone."""

import base64
import hashlib
import json
import re
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "pybmc" / "serve" / "page.html"
SOURCE = PAGE.read_text("utf-8")


def policy() -> str:
    """The header that the server sends: nothing is loaded,
    one script and one style are known by their sums."""
    def sums(tag):
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", SOURCE, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
                        for text in found)
    return (f"default-src 'none'; script-src {sums('script')}; style-src {sums('style')}; img-src data:; "
            "connect-src 'self'; base-uri 'none'; "
            "form-action 'none'; frame-ancestors 'none'")


# ---- the source --------------------------------------------------------------------------------------------


def test_the_page_is_one_small_file_of_its_own():
    assert len(SOURCE.encode()) < 20_000
    assert not re.search(r"https?://|@import|url\(|<img|\bsrc=", SOURCE)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function",
                         SOURCE)
    assert not re.search(r"\son\w+=|\sstyle=", SOURCE)
    assert len(re.findall(r"<script", SOURCE)) == len(re.findall(r"<style", SOURCE)) == 1


def luminance(colour: str) -> float:
    digits = colour if len(colour) == 6 else "".join(2 * digit for digit in colour)
    parts = [int(digits[i:i + 2], 16) / 255 for i in (0, 2, 4)]
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_contrast(mode):
    block = re.findall(r":root \{(.*?)\}", SOURCE, re.DOTALL)[mode]
    colours = {name: luminance(value) for name, value in re.findall(r"--([\w-]+): #(\w+);", block)}

    def ratio(one, other):
        low, high = sorted((colours[one], colours[other]))
        return (high + 0.05) / (low + 0.05)
    texts = [("text", "back"), ("text", "mine"), ("text", "code"), ("soft", "back"), ("wrong", "back"),
             ("on-act", "act")]
    for pair in texts:
        assert ratio(*pair) >= 4.5, pair
    for mark in ("draft", "ngram", "schema", "line", "act"):
        assert ratio(mark, "back") >= 3, mark


# ---- in a browser ------------------------------------------------------------------------------------------


class Stub(ThreadingHTTPServer):
    """chunks: what an answer streams; hold: it then stays open until the client leaves;
    key: wanted, if set; requests: bodies."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.reset()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def reset(self):
        self.chunks, self.hold, self.key = [], False, None
        self.requests, self.left, self.status = [], threading.Event(), 200


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def give(self, status, kind, data=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Type": kind, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        if self.path == "/":
            self.give(200, "text/html; charset=utf-8", PAGE.read_bytes(), Content_Security_Policy=policy(),
                      X_Content_Type_Options="nosniff", Referrer_Policy="no-referrer")
        elif self.path == "/v1/models":
            self.give(200, "application/json", json.dumps({"data": [{"id": "tiny-model"}]}).encode())
        else:
            self.give(404, "text/plain")

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
            return self.give(401, "application/json", b'{"error": {"message": "wrong key"}}')
        server.requests.append(body)
        if server.status != 200:
            return self.give(server.status, "application/json",
                             b'{"error": {"message": "the prompt is too long"}}')
        self.give(200, "text/event-stream", b": ping\n\n")
        for chunk in server.chunks:
            self.wfile.write(f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode())
        self.wfile.flush()
        try:
            while server.hold:
                self.wfile.write(b": ping\n\n")
                self.wfile.flush()
                time.sleep(0.01)
        except OSError:
            return server.left.set()
        self.wfile.write(b"data: [DONE]\n\n")


def chunk(*pieces, kind="content", **more):
    """A chunk of pieces (text, by)."""
    delta = {kind: "".join(text for text, _ in pieces)} if pieces else {}
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}],
            "pybmc": {"pieces": [{"text": text, "by": by} for text, by in pieces]}, **more}


TIMINGS = {"predicted_per_second": 41.27, "plain_per_second": 20.5, "draft_n": 8, "draft_n_accepted": 6,
           "predicted_n": 12, "prompt_n": 34, "cache_n": 5}


@pytest.fixture(scope="module")
def stub():
    server = Stub()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("needs Chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, stub):
    """The page, opened. Fails where it went to another host, or an error was in its console."""
    stub.reset()
    context = browser.new_context(viewport={"width": 320, "height": 560})
    page = context.new_page()
    page.set_default_timeout(5000)
    page.errors, hosts = [], set()
    page.on("console", lambda message: page.errors.append(message.text)
            if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    page.goto(stub.url)
    expect(page.get_by_label("Message", exact=True)).to_be_focused()    # a moment after the page is loaded
    yield page
    stub.hold = False
    context.close()
    assert hosts == {stub.url.split("/")[2]}
    assert page.errors == []


def expect(locator):
    from playwright.sync_api import expect

    return expect(locator)


def send(page, text):
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send").click()


def test_a_message_is_sent_and_its_answer_is_tinted(page, stub):
    stub.chunks = [chunk(), chunk(("Hello", None), (" big", "draft"), (" wide", "draft")),
                   chunk((" <b>world</b> ", "ngram")), chunk(("é!", "schema")), chunk(timings=TIMINGS)]
    expect(page.get_by_role("heading", name="tiny-model")).to_be_visible()
    send(page, "hi <i>there</i>")
    log = page.get_by_role("log")
    expect(log.locator("article.user")).to_contain_text("hi <i>there</i>")
    expect(log.locator("article.assistant")).to_contain_text("Hello big wide <b>world</b> é!")
    expect(log.locator(".draft")).to_have_text(" big wide")
    expect(log.locator(".ngram")).to_have_text(" <b>world</b> ")
    expect(log.locator(".schema")).to_have_text("é!")
    expect(log.locator(".draft")).to_have_css("text-decoration-style", "solid")
    expect(log.locator(".ngram")).to_have_css("text-decoration-style", "dotted")
    expect(page.locator("#stats")).to_have_text("41.3 tokens/s, plain about 20.5, 75% of 8 guesses accepted, "
                                                "12 written, 34 read, 5 cached")
    expect(page.get_by_role("status")).to_have_text("Answer complete, 12 tokens.")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.get_by_label("Show guesses").uncheck()
    expect(log.locator(".draft")).to_have_css("text-decoration-line", "none")
    body = stub.requests[0]
    assert body["messages"] == [{"role": "user", "content": "hi <i>there</i>"}] and body["stream"]
    assert body["timings_per_token"]
    send(page, "more")
    expect(log.locator("article.assistant")).to_have_count(2)
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    assert [message["role"] for message in stub.requests[1]["messages"]] == ["user", "assistant", "user"]
    assert stub.requests[1]["messages"][1]["content"] == "Hello big wide <b>world</b> é!"


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_ends_the_request_and_keeps_what_came(page, stub, how):
    stub.chunks, stub.hold = [chunk(("Once upon", None))], True
    send(page, "tell")
    expect(page.locator("article.assistant")).to_contain_text("Once upon")
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(page.get_by_role("status")).to_have_text("Stopped.")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    assert stub.left.wait(5)
    stub.hold, stub.chunks = False, [chunk(("fine", None))]
    send(page, "and")
    expect(page.locator("article.assistant").nth(1)).to_contain_text("fine")
    assert stub.requests[1]["messages"][1] == {"role": "assistant", "content": "Once upon"}


def test_the_keyboard_alone_is_enough(page, stub):
    stub.chunks = [chunk(("yes", None))]
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(page.locator("article.assistant")).to_contain_text("yes")
    assert stub.requests[0]["messages"][0]["content"] == "one\ntwo"
    page.keyboard.press("Enter")                        # an empty box sends nothing
    for _ in range(2):                                  # from the box back to Settings
        page.keyboard.press("Shift+Tab")
    expect(page.get_by_role("button", name="Settings")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="Settings")).to_be_visible()
    page.get_by_label("System message").press_sequentially("be brief")
    page.keyboard.press("Tab")
    page.keyboard.type("0.5")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="Settings")).to_be_hidden()
    page.get_by_label("Message", exact=True).focus()
    page.keyboard.type("three")
    page.keyboard.press("Enter")
    expect(page.locator("article.assistant")).to_have_count(2)
    body = stub.requests[1]
    assert body["messages"][0] == {"role": "system", "content": "be brief"} and body["temperature"] == 0.5
    assert "seed" not in body and "max_tokens" not in body and len(stub.requests) == 2


def test_a_key_is_asked_for_and_kept(page, stub):
    stub.key, stub.chunks = "secret", [chunk(("open", None))]
    send(page, "knock")
    dialog = page.get_by_role("dialog", name="This server needs an API key")
    expect(dialog).to_be_visible()
    page.get_by_label("API key", exact=True).fill("secret")
    page.keyboard.press("Enter")
    expect(page.locator("article.assistant")).to_contain_text("open")
    send(page, "again")
    expect(page.locator("article.assistant")).to_have_count(2)
    assert len(page.errors) == 1 and "401" in page.errors.pop()         # the browser's own note


def test_a_key_that_is_not_given_is_an_error_in_the_conversation(page, stub):
    stub.key = "secret"
    send(page, "knock")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("article.wrong")).to_contain_text("wrong key")
    expect(page.get_by_label("Message", exact=True)).to_have_value("knock")
    page.errors.clear()


@pytest.mark.parametrize("status, chunks, says", [
    (400, [], "Error: the prompt is too long"),
    (200, [chunk(("part", None)), {"error": {"message": "out of memory"}}], "Error: out of memory"),
])
def test_an_error_is_shown_and_the_chat_goes_on(page, stub, status, chunks, says):
    stub.status, stub.chunks = status, chunks
    send(page, "first")
    expect(page.locator("article.wrong")).to_contain_text(says)
    stub.status, stub.chunks = 200, [chunk(("well", None))]
    send(page, "second")
    expect(page.locator("article.assistant").last).to_contain_text("well")
    roles = [message["role"] for message in stub.requests[-1]["messages"]]
    assert roles == (["user"] if status == 400 else ["user", "assistant", "user"])
    page.errors.clear()


def test_code_and_thoughts_have_their_own_blocks(page, stub):
    text = "Look:\n```python\nprint('`hi`')\n  ```\nThat `is` all. ``` no\n```\nopen"
    stub.chunks = [chunk(("Let me think", None), kind="reasoning_content"),
                   *(chunk((character, "draft")) for character in text)]
    send(page, "code")
    expect(page.get_by_role("status")).to_contain_text("complete")
    answer = page.locator("article.assistant")
    expect(answer.locator("details")).to_contain_text("Let me think")
    expect(answer.locator("pre")).to_have_count(2)
    expect(answer.locator("pre").first).to_have_text("print('`hi`')\n")
    expect(answer.locator("pre").nth(1)).to_have_text("open")
    expect(answer.locator("div").last).to_contain_text("That `is` all. ``` no")


def test_the_log_is_not_read_out_and_the_page_fits_a_narrow_window(page, stub):
    stub.chunks = [chunk(("word" * 200, "draft"))]
    expect(page.get_by_role("log")).to_have_attribute("aria-live", "off")
    send(page, "x" * 300)
    expect(page.get_by_role("status")).to_contain_text("complete")
    for locator in (page.locator("article"), page.locator("button"), page.locator("textarea"),
                    page.locator("footer p")):
        for box in (item.bounding_box() for item in locator.all() if item.is_visible()):
            assert box["x"] >= 0 and box["x"] + box["width"] <= 320


def test_a_new_chat_forgets_the_old_one_while_it_still_answers(page, stub):
    stub.chunks, stub.hold = [chunk(("old", None))], True
    send(page, "first")
    expect(page.locator("article.assistant")).to_contain_text("old")
    page.get_by_role("button", name="New chat").click()
    assert stub.left.wait(5)
    expect(page.locator("article")).to_have_count(0)
    stub.hold, stub.chunks = False, [chunk(("new", None))]
    send(page, "second")
    expect(page.locator("article.assistant")).to_contain_text("new")
    assert stub.requests[1]["messages"] == [{"role": "user", "content": "second"}]
