"""Models to GGUF and back: Q8_0 matrices, F32 norms, the vocabulary and the chat template in the metadata."""

import gguf
import numpy as np
import torch
from tokenizers import models

from .model import Config, Llama
from .tokens import CONTROL, END_OF_TEXT, END_OF_TURN, TEMPLATE, byte_level, merges

Q8_0 = gguf.GGMLQuantizationType.Q8_0
NAMES = {       # ours -> GGUF's; a block's names follow its number
    "embed.weight": "token_embd.weight", "norm.weight": "output_norm.weight",
    "attn_norm.weight": "attn_norm.weight", "ffn_norm.weight": "ffn_norm.weight",
    "attn.q.weight": "attn_q.weight", "attn.k.weight": "attn_k.weight", "attn.v.weight": "attn_v.weight",
    "attn.o.weight": "attn_output.weight", "gate.weight": "ffn_gate.weight", "up.weight": "ffn_up.weight",
    "down.weight": "ffn_down.weight",
}


def gguf_name(name):
    if name.startswith("blocks."):
        _, i, role = name.split(".", 2)
        return f"blk.{i}.{NAMES[role]}"
    return NAMES[name]


def write_config(writer, c):
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.n_ctx)
    writer.add_embedding_length(c.dim)
    writer.add_feed_forward_length(c.hidden_dim)
    writer.add_block_count(c.n_layers)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(c.n_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_base)
    writer.add_layer_norm_rms_eps(c.norm_eps)


def write_vocabulary(writer, tokenizer):
    ids = tokenizer.get_vocab()
    vocabulary = sorted(ids, key=ids.get)
    kinds = [gguf.TokenType.CONTROL if t in CONTROL else gguf.TokenType.NORMAL for t in vocabulary]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges(tokenizer))
    writer.add_bos_token_id(ids[END_OF_TEXT])
    writer.add_eos_token_id(ids[END_OF_TURN])
    writer.add_eot_token_id(ids[END_OF_TURN])
    writer.add_pad_token_id(ids[END_OF_TEXT])
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def write_gguf(model, tokenizer, path, name, description):
    """Matrices as Q8_0 (32 weights a scale), norms as F32. No output.weight: the head is the embedding."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_description(description)
    writer.add_license("mit")
    writer.add_languages(["en"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_config(writer, model.config)
    write_vocabulary(writer, tokenizer)
    for ours, tensor in model.state_dict().items():
        weights = tensor.float().cpu().numpy()
        if weights.ndim == 2:
            writer.add_tensor(gguf_name(ours), gguf.quantize(weights, Q8_0), raw_dtype=Q8_0)
        else:
            writer.add_tensor(gguf_name(ours), weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_config(reader):
    get = lambda key: reader.get_field(f"llama.{key}").contents()
    return Config(
        vocab_size=get("vocab_size"), dim=get("embedding_length"), hidden_dim=get("feed_forward_length"),
        head_dim=get("attention.key_length"), n_layers=get("block_count"),
        n_heads=get("attention.head_count"), n_kv_heads=get("attention.head_count_kv"),
        n_ctx=get("context_length"), rope_base=get("rope.freq_base"),
        norm_eps=get("attention.layer_norm_rms_epsilon"),
    )


def read_tokenizer(path):
    """The tokenizer of a file we wrote, as tokens.train_tokenizer made it."""
    reader = gguf.GGUFReader(path)
    get = lambda key: reader.get_field(f"tokenizer.ggml.{key}").contents()
    ids = {token: i for i, token in enumerate(get("tokens"))}
    tokenizer = byte_level(models.BPE(ids, [tuple(pair.split(" ")) for pair in get("merges")]))
    tokenizer.add_special_tokens(list(CONTROL))
    return tokenizer


def read_gguf(path):
    """The model of a file we wrote, its weights dequantized: what an engine computes with."""
    reader = gguf.GGUFReader(path)
    model = Llama(read_config(reader))
    stored = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    model.load_state_dict({ours: torch.from_numpy(np.array(stored[gguf_name(ours)]))
                           for ours in model.state_dict()})
    return model.eval()
