"""Embeddings beside llama.cpp: the worker's vectors are Model.embed's;
what cannot be compared is a sentence."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

import pybmc
from tools import versus_embed

DEMO = next(path for path in sorted(os.listdir(os.path.join(os.path.dirname(pybmc.__file__), "demo")))
            if path.endswith(".gguf"))
PATH = os.path.join(os.path.dirname(pybmc.__file__), "demo", DEMO)


def worker(name, *arguments):
    command = [sys.executable, "-m", "tools.versus_embed", "--worker", name, PATH, "-n", "5", "-b", "3", "-t",
               "1", *arguments]
    return subprocess.run(command, input="\n\n", capture_output=True, text=True)


def test_the_workers_vectors_are_the_models():
    answers = [json.loads(line) for line in worker("pybmc").stdout.splitlines()]
    with pybmc.Model(PATH) as model:
        expected = model.embed(versus_embed.texts_of(model.config.vocab_size, 5, 3).tolist())
    assert len(answers) == 2 and all(len(answer["seconds"]) == 1 for answer in answers)
    assert np.array_equal(np.asarray(answers[0]["vectors"], np.float32), expected)


def test_a_peer_that_does_not_start_is_a_sentence():
    done = CliRunner().invoke(versus_embed.main,
                              [PATH, "-n", "5", "-b", "2", "-r", "1", "--peer-python", "/bin/false"])
    assert done.exit_code == 1 and "its process ended with status 1" in done.output


def test_against_the_real_peer():
    python = os.environ.get("PYBMC_PEER_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode:
        pytest.skip(f"{python} has no llama_cpp")
    done = CliRunner().invoke(versus_embed.main,
                              [PATH, "-n", "8", "-b", "2", "-r", "1", "--peer-python", python])
    assert done.exit_code == 0 and "2 of 8 tokens" in done.output, done.output
