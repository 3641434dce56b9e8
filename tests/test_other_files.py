"""Files that people have: what is no language model, and models whose metadata is not as usual."""

import numpy as np
import pytest
import raw
import tiny

from pybmc.cli import run
from pybmc.errors import FormatError
from pybmc.files.gguf import GGUF
from pybmc.models.config import read_config
from pybmc.show import describe


def without(metadata: dict, *prefixes: str) -> dict:
    return {key: value for key, value in metadata.items() if not key.startswith(prefixes)}


def written(path, change=lambda metadata, tensors: (metadata, tensors)) -> str:
    """A tiny model after a change of its metadata and tensors."""
    return str(tiny.save(path / "m.gguf", *change(*tiny.parts("llama", **tiny.SMALL))))


@pytest.mark.parametrize("pairs, says", [
    ({"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"},
     "found a LoRA adapter"),
    ({"general.type": "imatrix"}, "found an importance matrix"),
    ({"general.type": "mmproj", "general.architecture": "clip"}, "found an encoder of images or sound"),
    ({"general.architecture": "clip"}, "take the model's own file"),
    ({"general.architecture": "flux"}, "makes images"),
    ({"general.architecture": "controlvector"}, "found a control vector"),
])
def test_what_is_no_language_model_is_told_apart(tmp_path, pairs, says):
    file = raw.Raw(pairs=pairs,
                   tensors=[raw.Entry("blk.0.attn_q.weight", (4,), data=bytes(16))]).save(tmp_path / "m.gguf")
    with GGUF(file) as opened, pytest.raises(FormatError, match=says):
        read_config(opened)
    assert says in describe(file)["why_not"]


def test_an_encoder_in_the_file_is_named(tmp_path):
    vision = "F32", np.zeros((4, 64), np.uint8)
    path = written(tmp_path, lambda metadata, tensors: (metadata | {"llama.vision.block_count": 1},
                                                        tensors | {"v.patch_embd.weight": vision}))
    assert describe(path)["why_not"].startswith("v.patch_embd.weight: an encoder of images or sound is part "
                                                "of the file")


@pytest.mark.parametrize("kind", [None, "none", "no_vocab"])
def test_a_model_without_a_vocabulary_cannot_chat(tmp_path, capsys, kind):
    path = written(tmp_path, lambda metadata, tensors: (without(metadata, "tokenizer.")
                                                        | {"tokenizer.ggml.model": kind}, tensors))
    assert describe(path)["runs"]
    assert run(["chat", path]) == 1 and "has no vocabulary: it cannot chat" in capsys.readouterr().err
    assert run(["generate", path, "-p", "a"]) == 1 and "has no vocabulary" in capsys.readouterr().err


def test_show_says_that_a_vocabulary_of_an_unknown_kind_does_not_run(tmp_path):
    path = written(tmp_path, lambda metadata, tensors: (metadata | {"tokenizer.ggml.model": "rwkv"}, tensors))
    assert "expected a tokenizer.ggml.model of" in describe(path)["why_not"]


@pytest.mark.parametrize("marks, name", [(True, "chatml"), (False, "llama2")])
def test_a_missing_chat_template_is_told(tmp_path, capsys, marks, name):
    def change(metadata, tensors):
        metadata = without(metadata, "tokenizer.chat_template")
        if not marks:
            metadata["tokenizer.ggml.tokens"] = [f"<{i}>" if token == "<|im_start|>" else token
                                                 for i, token in enumerate(metadata["tokenizer.ggml.tokens"])]
        return metadata, tensors
    path = written(tmp_path, change)
    assert run(["generate", path, "--chat", "-p", "a", "-n", "1"]) == 0
    assert f"no chat template: messages are written as for {name}" in capsys.readouterr().err
    assert run(["generate", path, "--chat", "-p", "a", "-n", "1", "--chat-template", "zephyr"]) == 0
    assert "no chat template" not in capsys.readouterr().err


@pytest.mark.parametrize("pairs", [
    {"quantize.imatrix.file": "a.dat", "quantize.imatrix.entries_count": 3},
    {"general.sampling.temp": 0.6}, {"llama.expert_count": 0, "llama.expert_used_count": 0},
    {"llama.tensor_data_layout": "Meta AI original pth"},
    {"llama.rope.scaling.type": "none", "llama.rope.scaling.finetuned": False},
    {"tokenizer.ggml.padding_token_id": 4294967295},
])
def test_keys_that_change_no_text_are_read_over(tmp_path, pairs):
    assert describe(written(tmp_path, lambda metadata, tensors: (metadata | pairs, tensors)))["runs"]
