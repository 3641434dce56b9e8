"""Models of the hub: names, choosing, fetching what breaks and what lies, the cache,
and what removes from it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import tiny

import pybmc
from pybmc.cli import run
from pybmc.errors import BmcError
from pybmc.hub import names, store, transfer
from pybmc.hub.names import Name, parse
from pybmc.hub.remote import RemoteGGUF
from pybmc.show import describe

pytest.importorskip("huggingface_hub", reason="needs huggingface-hub")
from hub_server import COMMIT, Hub  # noqa: E402
from huggingface_hub import constants  # noqa: E402

REPO = "user/Tiny-GGUF"


@pytest.fixture(scope="module")
def model():
    """The bytes of a model that runs."""
    return tiny.model("llama").read_bytes()


@pytest.fixture(scope="module")
def server():
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture
def hub(server, model, tmp_path, monkeypatch):
    server.use(monkeypatch, tmp_path, {REPO: {"tiny.Q4_K_M.gguf": model, "README.md": b"hello"}})
    return server


def command(capsys, *args):
    status = run([*args])
    return status, *capsys.readouterr()


# ---- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, name", [
    ("user/repo", Name("user/repo")),
    ("user/repo:Q4_K_M", Name("user/repo", "Q4_K_M")),
    ("hf.co/user/repo:q8_0", Name("user/repo", "q8_0")),
    ("https://huggingface.co/user/repo/", Name("user/repo")),
    ("https://huggingface.co/user/repo/blob/main/sub/a.gguf", Name("user/repo", None, "sub/a.gguf", "main")),
    ("https://huggingface.co/user/repo/resolve/v1/a.gguf?download=true",
     Name("user/repo", None, "a.gguf", "v1")),
    ("user/repo/a.gguf", Name("user/repo", None, "a.gguf")),
    ("hf://user/repo.gguf", Name("user/repo.gguf")),
])
def test_a_name_is_read(text, name):
    assert parse(text) == name


@pytest.mark.parametrize("text", [
    "model.gguf", "folder/model.gguf", "./user/repo", "/user/repo", "~/user/repo", "../user/repo",
    "user/../repo", "user/..", "a/b/c", "user/repo/../../x.gguf", "user/repo:", "user/repo:a/b",
    "user/re--po", "user/repo\n", "", "/", "user/", "user/repo:Q4\x1b[0m", "user/repo/a\x1b.gguf",
    "user/repo/a\\b.gguf", "hf.co/user",
])
def test_what_is_no_name_of_the_hub(text):
    assert parse(text) is None


@pytest.mark.parametrize("file, quant", [
    ("Qwen2.5-7B-Instruct-Q4_K_M.gguf", "Q4_K_M"), ("qwen2.5-0.5b-instruct-q4_k_m.gguf", "Q4_K_M"),
    ("model.Q8_0.gguf", "Q8_0"), ("BF16/m-BF16-00001-of-00003.gguf", "BF16"),
    ("m-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"), ("IQ2_XXS.gguf", "IQ2_XXS"), ("m-fp16.gguf", "FP16"),
    ("gpt-oss-MXFP4.gguf", "MXFP4"), ("model.gguf", None), ("q4-thoughts.gguf", None),
])
def test_the_quantization_is_in_a_files_name(file, quant):
    assert names.quant_of(file) == quant


def test_a_quantization_is_matched_whatever_its_case_and_the_exact_one_first():
    files = ["m-Q4_K_M.gguf", "m-UD-Q4_K_M.gguf", "m-IQ4_K_M.gguf", "other-tag.gguf"]
    assert names.matching(files, "q4_k_m") == ["m-Q4_K_M.gguf"]
    assert names.matching(files, "UD-q4_k_m") == ["m-UD-Q4_K_M.gguf"]
    assert names.matching(files, "tag") == ["other-tag.gguf"]
    assert names.matching(files, "4_K_M") == names.matching(files, ".*") == []


# ---- pull --------------------------------------------------------------------------------------------------


def test_pull_brings_a_model_whose_name_stands_for_it_everywhere(hub, model, capsys):
    status, out, err = command(capsys, "pull", REPO)
    path = out.strip()
    assert status == 0 and open(path, "rb").read() == model
    assert f"{REPO}:Q4_K_M" in err and "llama, runs here" in err
    for name in (REPO, f"{REPO}:q4_k_m", REPO.lower(), f"hf.co/{REPO}", f"{REPO}/tiny.Q4_K_M.gguf",
                 f"hf://{REPO}"):
        assert store.find(name) == store.find(path), name
    hub.status = 500                    # from here on everything is local
    for args in (["show", REPO],
                 ["tokenize", REPO, "-p", "Once"], ["generate", REPO, "-p", "Once", "-n", "2"],
                 ["generate", path, "--draft", f"{REPO}:Q4_K_M", "-p", "Once", "-n", "2"]):
        assert command(capsys, *args)[0] == 0, args


def test_pull_reads_the_header_before_it_fetches(hub, capsys):
    metadata, tensors = tiny.parts("llama")
    metadata["general.architecture"] = "mamba9"
    unknown = tiny.save(tiny.folder() / "unknown.gguf", metadata, tensors).read_bytes()
    hub.files[REPO] = {"tiny.Q4_K_M.gguf": unknown}
    status, out, err = command(capsys, "pull", REPO)
    assert status == 1 and out == "" and "does not run here" in err and "mamba9" in err
    assert "pybmc-" not in err
    assert not any(method == "GET" and asked is None and "resolve" in path
                   for method, path, asked, _ in hub.log)
    assert list(store.models()) == []


def test_pull_json_is_one_object_a_model(hub, model, capsys):
    hub.files["user/draft"] = {"d-Q8_0.gguf": model}
    status, out, err = command(capsys, "pull", REPO, "--draft", "user/draft", "--json")
    objects = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [o["name"] for o in objects] == [f"{REPO}:Q4_K_M", "user/draft:Q8_0"]
    assert all(set(o) == {"name", "path", "bytes", "architecture"} and o["bytes"] == len(model)
               for o in objects)


@pytest.mark.parametrize("files, chosen", [
    (["a-Q8_0.gguf", "a-q4_k_m.gguf", "a-Q4_0.gguf"], "a-q4_k_m.gguf"),
    (["a-Q8_0.gguf", "a-Q4_0.gguf", "a-Q2_K.gguf"], "a-Q4_0.gguf"),
    (["a-F16.gguf", "a-Q8_0.gguf", "mmproj-a-Q4_K_M.gguf"], "a-Q8_0.gguf"),
])
def test_without_a_quantization_the_usual_ones_come_first(hub, model, files, chosen):
    hub.files[REPO] = dict.fromkeys(files, model)
    assert transfer.pull(REPO).path.name == chosen


def test_else_it_is_the_smallest_that_runs(hub, model):
    metadata, tensors = tiny.parts("llama")
    broken = tiny.save(tiny.folder() / "small.gguf", metadata,
                       {k: v for k, v in tensors.items() if "attn_q" not in k}).read_bytes()
    assert len(broken) < len(model)
    hub.files[REPO] = {"a-F32.gguf": model + bytes(4096), "a-IQ3_M.gguf": broken, "a-F16.gguf": model,
                       "a-IQ1_S.gguf": b"<html>"}
    assert transfer.pull(REPO).path.name == "a-F16.gguf"


def test_a_split_file_comes_with_all_its_parts(hub, capsys, tmp_path):
    parts = split_model(tmp_path)
    hub.files[REPO] = parts
    status, out, err = command(capsys, "pull", f"{REPO}:q4_0")
    assert status == 0 and "in 2 parts" in err
    assert out.strip().endswith("a-Q4_0-00001-of-00002.gguf")
    assert {path.name for path in (store.find(REPO).parent).iterdir()} == set(parts)
    assert command(capsys, "generate", REPO, "-p", "Once", "-n", "2")[0] == 0
    assert describe(store.find(REPO))["files"] == 2
    store.find(REPO).with_name("a-Q4_0-00002-of-00002.gguf").unlink()
    with pytest.raises(store.NotHere, match="some of its parts are missing"):
        store.find(REPO)
    assert "some of its parts are missing" in command(capsys, "list")[1]


def split_model(folder):
    """A model in two parts."""
    metadata, tensors = tiny.parts("llama")
    found = {}
    half = len(tensors) // 2
    for number, some in enumerate((dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:]))):
        extra = {"split.no": number, "split.count": 2, "split.tensors.count": len(tensors)}
        base = metadata if number == 0 else {"general.architecture": "llama"}
        name = f"a-Q4_0-{number + 1:05d}-of-00002.gguf"
        found[name] = tiny.save(folder / name, base | extra, some).read_bytes()
    return found


def test_a_part_that_the_hub_lacks_is_named(hub, capsys, tmp_path):
    hub.files[REPO] = split_model(tmp_path)
    del hub.files[REPO]["a-Q4_0-00002-of-00002.gguf"]
    status, _, err = command(capsys, "pull", REPO)
    assert status == 1 and "expected 2 parts, a-Q4_0-00002-of-00002.gguf is missing" in err


@pytest.mark.parametrize("args, says", [
    (["nobody/nothing"], "no repository nobody/nothing"),
    ([f"{REPO}:Q3_K_S"], "has Q4_K_M"),
    ([REPO, "--file", "other.gguf"], "other.gguf is not on the hub"),
    ([REPO, "--file", "../README.md"], "is not on the hub"),
    ([f"{REPO}:Q8_0", "--file", "a.gguf"], "names a file already"),
    ([REPO, "--revision", "v9"], "no revision v9"),
    (["not-a-name"], "expected user/repo"),
    (["../x"], "expected user/repo"),
])
def test_what_pull_cannot_find_is_a_sentence(hub, capsys, args, says):
    status, out, err = command(capsys, "pull", *args)
    assert status == 1 and out == "" and says in err and err.count("\n") == 1


def test_a_quantization_that_several_files_have_is_asked_for(hub, model, capsys):
    hub.files[REPO] = {"small-Q4_K_M.gguf": model, "large-Q4_K_M.gguf": model + b"\0"}
    status, _, err = command(capsys, "pull", REPO)
    assert status == 1 and "found 2: large-Q4_K_M.gguf, small-Q4_K_M.gguf" in err
    assert command(capsys, "pull", REPO, "--file", "small-Q4_K_M.gguf")[0] == 0
    assert command(capsys, "pull", f"{REPO}/large-Q4_K_M.gguf")[0] == 0
    assert ({model.name for model in store.models()}
            == {f"{REPO}/small-Q4_K_M.gguf", f"{REPO}/large-Q4_K_M.gguf"})


@pytest.mark.parametrize("fault, says", [
    ({"status": 503}, "status 503"), ({"gated": True}, "is gated: accept its terms"),
    ({"commit": "../../../evil"}, "expected a commit"),
])
def test_a_hub_that_refuses_or_lies(hub, capsys, fault, says):
    hub.__dict__.update(fault)
    status, out, err = command(capsys, "pull", REPO)
    assert status == 1 and out == "" and says in err and err.strip().count("\n") == 0


def test_a_hub_that_is_not_there(hub, capsys, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    status, out, err = command(capsys, "pull", REPO)
    assert status == 1 and "cannot be reached" in err and "http://127.0.0.1" in err and "Traceback" not in err


# ---- transfers ---------------------------------------------------------------------------------------------


def cached_files():
    """Links and blobs; not what a transfer that broke left for its next try."""
    return [path for path in store.cache_folder().rglob("*")
            if path.is_symlink() or path.is_file() and "blobs" in path.parts and path.suffix != ".incomplete"]


def test_after_broken_transfers_the_file_is_whole(hub, model, capsys):
    found = transfer._search(names.parse(REPO))
    hub.breaks = 2
    # an older huggingface_hub does not try again by itself
    with suppress(BmcError), transfer._told(names.parse(REPO)):
        transfer._fetch(found, found.parts[0])
    assert hub.breaks < 2 and all(path.read_bytes() == model for path in cached_files())
    hub.breaks = 0
    assert command(capsys, "pull", REPO)[0] == 0 and store.find(REPO).read_bytes() == model


def test_a_header_whose_transfer_breaks_is_a_sentence(hub, capsys):
    hub.breaks = 1
    status, _, err = command(capsys, "show", REPO)
    assert status == 1 and hub.url in err and "internal" not in err


def test_a_transfer_that_stays_broken_leaves_nothing(hub, model, capsys):
    found = transfer._search(names.parse(REPO))
    hub.files[REPO]["tiny.Q4_K_M.gguf"] = model[:len(model) // 2]       # shorter than its listing says
    hub.sums["tiny.Q4_K_M.gguf"] = found.parts[0].sum
    with pytest.raises(BmcError, match="expected sha256"), transfer._told(names.parse(REPO)):
        transfer._fetch(found, found.parts[0])
    assert cached_files() == [] and list(store.models()) == []


def test_what_does_not_match_its_sum_is_removed(hub, capsys):
    hub.sums["tiny.Q4_K_M.gguf"] = "ab" * 32
    status, out, err = command(capsys, "pull", REPO)
    assert status == 1 and out == "" and f"expected sha256 {'ab' * 32}, found " in err and "removed" in err
    assert cached_files() == [] and list(store.models()) == []


def test_a_cache_behind_a_link_is_cleaned_too(hub, capsys, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "link" / "hub"))
    hub.sums["tiny.Q4_K_M.gguf"] = "ab" * 32
    assert command(capsys, "pull", REPO)[0] == 1 and cached_files() == []
    hub.sums.clear()
    assert command(capsys, "pull", REPO)[0] == 0 and command(capsys, "rm", REPO, "-y")[0] == 0
    assert cached_files() == []


def test_a_sum_is_checked_once(hub, capsys, monkeypatch):
    checks = []
    real = transfer._check_sum
    monkeypatch.setattr(transfer, "_check_sum", lambda *args: (checks.append(args), real(*args)))
    for _ in range(2):
        assert command(capsys, "pull", REPO)[0] == 0
    assert len(checks) == 1
    os.utime(store.find(REPO).resolve())        # another file: again
    assert command(capsys, "pull", REPO)[0] == 0
    assert len(checks) == 2


def test_a_disk_without_room_is_told_before_anything_is_fetched(hub, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 1000})())
    status, _, err = command(capsys, "pull", REPO)
    assert status == 1 and "needs 237 kB, the disk of the hub's cache has 1 kB left" in err
    assert cached_files() == []


def test_a_disk_that_fills_is_a_sentence(hub, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "/cache/blob")
    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    status, out, err = command(capsys, "pull", REPO)
    assert status == 1 and "No space left on device" in err and "internal" not in err
    assert list(store.models()) == [] and cached_files() == []


@pytest.mark.parametrize("name", ["../../evil-Q4_K_M.gguf", "/etc/evil-Q4_K_M.gguf",
                                  "a/../../evil-Q4_K_M.gguf", "evil\x1b[2J-Q4_K_M.gguf",
                                  "a\\..\\evil-Q4_K_M.gguf", "evil\u202e-Q4_K_M.gguf", "./evil-Q4_K_M.gguf"])
def test_a_hostile_name_is_never_fetched_nor_printed(hub, model, capsys, tmp_path, name):
    hub.files[REPO] = {name: model}
    status, out, err = command(capsys, "pull", REPO)
    assert status == 1 and "no GGUF file" in err and err.strip().isprintable()
    assert not any("evil" in path.name for path in tmp_path.rglob("*"))
    hub.files[REPO]["fine-Q8_0.gguf"] = model
    assert command(capsys, "pull", REPO)[1].strip().endswith("fine-Q8_0.gguf")


def test_an_etag_that_leads_out_of_the_cache_is_refused(hub, capsys, tmp_path):
    hub.etags["tiny.Q4_K_M.gguf"] = "../../../../evil"
    status, _, err = command(capsys, "pull", REPO)
    assert status == 1 and "expected an etag" in err
    assert not any("evil" in path.name for path in tmp_path.rglob("*"))


def test_an_interrupt_leaves_no_half_file_under_a_good_name(hub, model, tmp_path):
    hub.files[REPO]["tiny.Q4_K_M.gguf"] = model + bytes(1 << 22)
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"),
                   "HF_HUB_CACHE": ""}
    hub.pace = 0.2
    process = subprocess.Popen([sys.executable, "-m", "pybmc", "pull", REPO], env=environment,
                               stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    for _ in range(600):
        if any(method == "GET" and asked is None and "resolve" in path for method, path, asked, _ in hub.log):
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == b"" and b"Traceback" not in err, err
    assert not any(path.suffix == ".gguf" for path in (tmp_path / "home").rglob("*"))
    hub.pace = 0
    done = subprocess.run([sys.executable, "-m", "pybmc", "pull", REPO, "--json"], env=environment,
                          capture_output=True, timeout=60)
    assert (done.returncode == 0
            and json.loads(done.stdout)["path"].startswith(str(tmp_path / "home" / "hub"))), done.stderr


def test_offline_only_what_is_here_is_found(hub, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    status, _, err = command(capsys, "pull", REPO)
    assert status == 1 and "HF_HUB_OFFLINE is set" in err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    path = command(capsys, "pull", REPO)[1]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert command(capsys, "pull", REPO)[:2] == (0, path)


def test_without_the_extra_pull_says_so(hub, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    status, _, err = command(capsys, "pull", REPO)
    assert status == 1 and "pip install huggingface-hub" in err


# ---- headers by range --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [64, 1000, 1 << 20])
@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_a_header_by_range_says_what_the_file_says(arch, chunk, monkeypatch):
    monkeypatch.setattr("pybmc.hub.remote.CHUNK", chunk)
    path = tiny.model(arch, rope_factors=True)
    data, asked = path.read_bytes(), []

    def fetch(begin, end):
        asked.append((begin, end))
        return data[begin:end]

    found = describe(RemoteGGUF([("sub/x.gguf", len(data), fetch)]))
    assert found | {"path": ""} == describe(path) | {"path": ""}
    if chunk < 1 << 20:
        assert sum(end - begin for begin, end in asked) < len(data) / 2
        ends = [end for _, end in asked[:-2]]
        assert ends == sorted(ends)


def test_show_of_a_model_that_is_not_here_reads_its_header(hub, model, capsys):
    status, out, _ = command(capsys, "show", REPO, "--json")
    info = json.loads(out)
    assert status == 0 and info["runs"] and info["path"] == f"{REPO}:Q4_K_M" and info["bytes"] == len(model)
    assert list(store.models()) == []


@pytest.mark.parametrize("cut", [0, 3, 20, 300, 5000])
def test_a_header_that_is_broken_is_a_sentence(hub, model, capsys, cut):
    hub.files[REPO]["tiny.Q4_K_M.gguf"] = model[:cut]
    status, _, err = command(capsys, "show", REPO)
    assert status == 1 and f"{REPO}:Q4_K_M: " in err and "internal" not in err and "/pybmc-" not in err


# ---- list and rm -------------------------------------------------------------------------------------------


def test_list_shows_what_is_here_and_whether_it_runs(hub, model, capsys):
    command(capsys, "pull", REPO)
    store.find(REPO).with_name("bad-Q8_0.gguf").write_bytes(b"<html>")
    status, out, _ = command(capsys, "list", "--json")
    found = {entry["name"]: entry for entry in map(json.loads, out.splitlines())}
    assert status == 0 and set(found) == {f"{REPO}:Q4_K_M", f"{REPO}:Q8_0", "demo", "demo-draft"}
    good = found[f"{REPO}:Q4_K_M"]
    assert ((good["bytes"], good["quantization"], good["architecture"], good["runs"])
            == (len(model), "Q4_K_M", "llama", True))
    assert not found[f"{REPO}:Q8_0"]["runs"] and "web page" in found[f"{REPO}:Q8_0"]["why_not"]
    lines = command(capsys, "list")[1].splitlines()
    assert len(lines) == 5 and re.match(rf"{REPO}:Q4_K_M +\d.* Q4_K_M +llama +yes", lines[2])
    for name in found:
        assert store.find(name).is_file()
    assert store.find("demo") == pybmc.demo_model()


def test_rm_removes_a_model_and_only_what_it_used(hub, model, capsys):
    hub.files[REPO]["other-Q8_0.gguf"] = model                  # the same bytes under another name
    hub.files[REPO]["third-Q4_0.gguf"] = model + bytes(32)
    for quant in ("Q4_K_M", "Q8_0", "Q4_0"):
        assert command(capsys, "pull", f"{REPO}:{quant}")[0] == 0
    blob = store.find(f"{REPO}:Q8_0").resolve()
    assert command(capsys, "rm", f"{REPO}:Q4_K_M", "-y")[0] == 0
    assert blob.is_file() and store.find(f"{REPO}:Q8_0").is_file()
    assert {model.name for model in store.models()} == {f"{REPO}:Q8_0", f"{REPO}:Q4_0"}
    assert command(capsys, "rm", f"{REPO}:Q8_0", "-y")[0] == 0
    assert not blob.exists() and store.find(REPO).is_file()
    assert command(capsys, "rm", REPO, "-y")[0] == 0
    assert list(store.cache_folder().glob("models--*")) == []


def test_rm_leaves_what_a_link_out_of_the_cache_leads_to(hub, model, capsys, tmp_path):
    (tmp_path / "mine.gguf").write_bytes(model)
    snapshot = store.cache_folder() / "models--me--mine" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "mine-Q8_0.gguf").symlink_to(tmp_path / "mine.gguf")
    assert command(capsys, "rm", "me/mine", "-y")[0] == 0
    assert (tmp_path / "mine.gguf").is_file() and list(store.models()) == []


@pytest.mark.parametrize("name, status, says", [
    ("demo", 1, "only models of the hub's cache"), ("user/none", 1, "nothing to remove"),
    ("/etc/passwd", 1, "only models"), ("../x", 1, "only models"), ("user/none:Q4_0", 1, "not here"),
])
def test_rm_of_what_is_not_in_the_cache(hub, capsys, name, status, says):
    found, _, err = command(capsys, "rm", name, "-y")
    assert found == status and says in err


def test_rm_asks_unless_nobody_can_answer(hub, capsys):
    command(capsys, "pull", REPO)
    status, _, err = command(capsys, "rm", REPO)
    assert status == 2 and "-y" in err and store.find(REPO).is_file()


# ---- no connection -----------------------------------------------------------------------------------------


def test_no_other_command_opens_a_connection(hub, capsys, monkeypatch, tmp_path):
    command(capsys, "pull", REPO)

    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for args in (["list"], ["show", REPO], ["tokenize", REPO, "-p", "a"],
                 ["generate", REPO, "-p", "a", "-n", "1"], ["perplexity", REPO, "-f", __file__, "-c", "32"],
                 ["rm", REPO, "-y"]):
        assert command(capsys, *args)[0] == 0, args
    for args in (["chat", REPO], ["generate", REPO, "-p", "a"], ["bench", REPO],
                 ["prove", REPO], ["tokenize", REPO, "-p", "a"], ["generate", "-p", "a", "--draft", REPO],
                 ["perplexity", REPO, "-f", __file__], ["rm", REPO, "-y"]):
        status, _, err = command(capsys, *args)
        assert status == 1 and ("pybmc pull" in err or "nothing to remove" in err), args


def test_a_file_comes_before_a_name(hub, model, capsys, monkeypatch, tmp_path):
    command(capsys, "pull", REPO)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user").mkdir()
    (tmp_path / REPO).write_bytes(model)
    (tmp_path / "demo").write_bytes(model)
    assert str(store.find(REPO)) == REPO and str(store.find("demo")) == "demo"


def test_a_newer_snapshot_of_main_is_what_a_name_means(hub, model, capsys):
    command(capsys, "pull", REPO)
    hub.commit, hub.files[REPO] = "f" * 40, {"tiny.Q4_K_M.gguf": model + bytes(32)}
    command(capsys, "pull", REPO)
    assert "f" * 40 in str(store.find(REPO)) and len(list(store.models())) == 1
    command(capsys, "rm", REPO, "-y")
    assert list(store.models()) == [] and cached_files() == []


def test_the_packages_names_are_functions_whatever_was_imported_before(hub, model):
    from pybmc import hub as package

    assert package.pull(REPO).path == package.find(REPO) and package.look(REPO)["runs"]
    assert [found.name for found in package.models()] == [f"{REPO}:Q4_K_M"]
