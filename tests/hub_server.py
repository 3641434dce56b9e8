"""A hub on loopback: enough of Hugging Face's wire for huggingface_hub, and faults on demand."""

import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """files: repository -> {name: bytes}. sums: name -> a sum that is not the file's.
    log: (method, path, range) of each request.

    breaks: how often an answer ends in the middle; pace: seconds between pieces;
    status: of every answer, if set.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.sums, self.etags, self.log = {}, {}, {}, []
        self.breaks, self.pace, self.status, self.commit, self.gated = 0, 0.0, None, COMMIT, False
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def bytes_sent(self) -> int:
        return sum(n for *_, n in self.log)

    def use(self, monkeypatch, folder, files):
        """Serve these files and nothing else; huggingface_hub and pybmc of this process come here,
        and keep what they fetch in the folder."""
        from huggingface_hub import constants

        self.__dict__.update(files=files, sums={}, etags={}, log=[], breaks=0, pace=0.0, status=None,
                             commit=COMMIT, gated=False)
        for name, value in (("ENDPOINT", self.url),
                            ("HUGGINGFACE_CO_URL_TEMPLATE",
                             self.url + "/{repo_id}/resolve/{revision}/{filename}"),
                            ("HF_HUB_OFFLINE", False)):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_HUB_CACHE", str(folder / "hub"))
        monkeypatch.setenv("HF_TOKEN", "")
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda seconds: None))

    def handle_error(self, request, client_address):
        """Clients may leave in the middle."""

    def close(self):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        hub, path = self.server, unquote(self.path.partition("?")[0])
        self.entry = [self.command, path, self.headers.get("Range"), 0]
        hub.log.append(self.entry)
        if hub.status:
            return self.give(hub.status, b"no", {}, body)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self.model(match[1], match[2], body)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.file(match[1], match[3], body)
        return self.give(404, b"", {}, body)

    def model(self, repo, revision, body):
        hub = self.server
        if repo not in hub.files:
            return self.give(401, b"", {"X-Error-Code": "RepoNotFound"}, body)
        if revision not in (None, "main", hub.commit):
            return self.give(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
        siblings = [{"rfilename": name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest(),
                     "lfs": {"sha256": self.sum(name, data), "size": len(data), "pointerSize": 134}}
                    for name, data in hub.files[repo].items()]
        return self.give(200,
                         json.dumps({"id": repo, "modelId": repo, "sha": hub.commit, "siblings": siblings,
                                     "tags": [], "private": False, "downloads": 0}).encode(), {}, body)

    def sum(self, name, data):
        return self.server.sums.get(name) or hashlib.sha256(data).hexdigest()

    def file(self, repo, name, body):
        hub = self.server
        data = hub.files.get(repo, {}).get(name)
        if hub.gated:
            return self.give(403, b"", {"X-Error-Code": "GatedRepo"}, body)
        if data is None:
            return self.give(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": hub.commit}, body)
        headers = {"ETag": f'"{hub.etags.get(name) or self.sum(name, data)}"', "X-Repo-Commit": hub.commit,
                   "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not wanted:
            return self.give(200, data, headers, body)
        begin, end = int(wanted[1]), min(int(wanted[2] or len(data)) + 1, len(data))
        if begin >= len(data):
            return self.give(416, b"", headers, body)
        return self.give(206, data[begin:end],
                         headers | {"Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"}, body)

    def give(self, status, data, headers, body):
        hub = self.server
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if not body:
            return
        breaks = hub.breaks > 0 and "resolve" in self.path and len(data) > 1000 and bool(hub.files)
        step = max(1, len(data) // 8)
        for start in range(0, len(data), step):
            if breaks and start >= len(data) // 2:
                hub.breaks -= 1
                self.close_connection = True
                return
            try:
                self.wfile.write(data[start:start + step])
            except OSError:             # the client has left
                self.close_connection = True
                return
            self.entry[3] += len(data[start:start + step])
            time.sleep(hub.pace)
