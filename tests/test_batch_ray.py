"""pybmc batch --ray on a local cluster: the same answers in the same order, whatever happens to a worker."""

import json
import os
import signal

import pytest
import tiny

from pybmc.batch.lines import read_lines
from pybmc.cli import run

ray = pytest.importorskip("ray", reason="needs ray")
pytest.importorskip("ray.data", reason="needs ray[data]")
PROMPTS = ["Once upon a time", "The cat", "She said", "The mill"]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Ray's workers find pybmc where this process found it."""
    import pybmc

    root = os.path.dirname(os.path.dirname(pybmc.__file__))
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "id": number, "max_tokens": 10}) + "\n"
                            for number, prompt in enumerate(PROMPTS * 8)) + "{\n")
    return path


def test_a_cluster_gives_the_same_answers(source, tmp_path):
    files = [tmp_path / "local.jsonl", tmp_path / "ray.jsonl"]
    common = ["-m", str(tiny.model("llama")), "-t", "1", "-np", "2", "--temp", "0.8", "-s", "3"]
    assert run(["batch", str(source), str(files[0]), *common]) == 1
    # its last line is broken
    assert run(["batch", str(source), str(files[1]), *common, "--ray", "auto"]) == 1
    assert files[0].read_bytes() == files[1].read_bytes()
    done = files[1].read_bytes()
    files[1].write_bytes(done[:len(done) // 2])
    assert run(["batch", str(source), str(files[1]), *common, "--ray", "auto"]) == 1
    assert files[1].read_bytes() == done


def test_a_killed_worker_loses_no_line(source, tmp_path, monkeypatch):
    from pybmc.batch import cluster

    marker, real = str(tmp_path / "killed"), cluster.Actor

    class Dying(real):
        """The third task kills its process, after its work is done."""

        def __call__(self, batch):
            answers = super().__call__(batch)
            if 8 in batch["number"] and not os.path.exists(marker):
                os.close(os.open(marker, os.O_CREAT))
                os.kill(os.getpid(), signal.SIGKILL)
            return answers

    monkeypatch.setattr(cluster, "Actor", Dying)
    options = {"settings": {"temperature": 0.0, "seed": 0, "max_tokens": 10}, "parallel": 1, "context": None}
    found = list(cluster.answers(read_lines(source, {}), "auto", str(tiny.model("llama")), None, 1, options))
    assert os.path.exists(marker)
    assert [answer["index"] for answer in found] == list(range(33))
    assert [answer["id"] for answer in found[:-1]] == list(range(32)) and "error" in found[-1]
    assert len({answer["text"] for answer in found[::4][:-1]}) == 1         # each fourth prompt is the same


def test_a_model_that_is_not_there_is_a_sentence(source, tmp_path, capsys):
    from pybmc.batch import cluster
    from pybmc.errors import BmcError

    options = {"settings": {"temperature": 0.0}, "parallel": 1, "context": None}
    with pytest.raises(BmcError, match="no such file"):
        list(cluster.answers(read_lines(source, {}), "auto", str(tmp_path / "none.gguf"), None, 1, options))
