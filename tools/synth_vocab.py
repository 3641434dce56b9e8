"""Vocabularies for synthetic models: bytes, then strings of letters that merge from shorter ones.

They have the size and the control tokens of real ones; common English words come out as a few tokens each.
"""

from dataclasses import dataclass

import numpy as np

CHATML = ("{% for m in messages %}"
          "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA3 = ("{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
          "'<|end_header_id|>\n\n' + m['content'] + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
          "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
LLAMA3_SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
                  "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>",
                  "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>")
BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CHATML_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class Vocab:
    model: str                  # tokenizer.ggml.model
    pre: str
    size: int
    special: tuple = ()         # control tokens, behind all others
    n_special: int = 0          # filled up with reserved ones
    bos: str = ""
    eos: str = ""
    add_bos: bool = False
    template: str = ""


VOCABS = {
    "llama3": Vocab("gpt2", "llama-bpe", 128256, LLAMA3_SPECIAL, 256, "<|begin_of_text|>", "<|eot_id|>",
                    True, LLAMA3),
    "qwen":   Vocab("gpt2", "qwen2", 151936, CHATML_SPECIAL, 293, "<|endoftext|>", "<|im_end|>",
                    False, CHATML),
    "smollm": Vocab("gpt2", "smollm", 49152, CHATML_SPECIAL, 17, "<|im_start|>", "<|im_end|>", False, CHATML),
    "gpt2":   Vocab("gpt2", "gpt-2", 50257, ("<|endoftext|>",), 1, "<|endoftext|>", "<|endoftext|>"),
    "tiny":   Vocab("gpt2", "gpt-2", 1024, CHATML_SPECIAL, 3, "<|endoftext|>", "<|im_end|>", False, CHATML),
    "o200k":  Vocab("gpt2", "gpt-4o", 201088, ("<|startoftext|>", "<|return|>", "<|endoftext|>"), 1090,
                    "<|startoftext|>", "<|return|>"),
    "qwen3.5": Vocab("gpt2", "qwen2", 248320, CHATML_SPECIAL, 293, "<|endoftext|>", "<|im_end|>",
                     False, CHATML),
    "lfm2":   Vocab("gpt2", "lfm2", 65536, ("<|startoftext|>", "<|im_start|>", "<|im_end|>"), 1000,
                    "<|startoftext|>", "<|im_end|>", True, CHATML),
    "granite": Vocab("gpt2", "dbrx", 100352, CHATML_SPECIAL, 96, "<|endoftext|>", "<|endoftext|>"),
    "nemotron": Vocab("gpt2", "tekken", 131072, ("<s>", "</s>", "<|im_end|>"), 1000, "<s>",
                      "<|im_end|>", True),
    "deepseek": Vocab("gpt2", "deepseek-llm", 102400, ("<|begin|>", "<|end|>"), 400, "<|begin|>",
                      "<|end|>", True),
    "llama2": Vocab("llama", "default", 32000, (), 0, "<s>", "</s>", True),
    "phi3":   Vocab("llama", "default", 32064, ("<|endoftext|>", "<|end|>"), 64, "<s>", "<|endoftext|>",
                    True),
    "gemma":  Vocab("llama", "default", 262144, (), 0, "<bos>", "<eos>", True),
    "bert":   Vocab("bert", "jina-v2-en", 30522, BERT_SPECIAL, len(BERT_SPECIAL), "[CLS]", "[SEP]", True),
    "tiny-bert": Vocab("bert", "jina-v2-en", 1024, BERT_SPECIAL, len(BERT_SPECIAL), "[CLS]", "[SEP]", True),
}
LETTERS = "etaoinshrdlucmfwypvbgkqjxz"
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


def byte_letters():
    """GPT-2's printable letter for each of the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


def strings(n, space):
    """n strings of two and more letters, some behind a space, each after its prefix; common ones first."""
    rank = {letter: i for i, letter in enumerate(LETTERS)} | {space: 0}
    found, level = [], [space, *LETTERS]
    while len(found) < n:
        level = [head + letter for head in level for letter in LETTERS]
        level.sort(key=lambda text: sum(rank[c] for c in text))
        found += level[:n - len(found)]
    return found


def merges_of(texts, known):
    """The pairs that make each text, cut after the first and before the last letter."""
    for text in texts:
        for cut in {1, len(text) - 1}:
            if text[:cut] in known and text[cut:] in known:
                yield f"{text[:cut]} {text[cut:]}"


def special_tokens(vocab):
    return [*vocab.special, *(f"<|reserved_{i}|>" for i in range(vocab.n_special - len(vocab.special)))]


def bpe_vocabulary(vocab):
    """(tokens, types, merges)"""
    letters, special = byte_letters(), special_tokens(vocab)
    texts = strings(vocab.size - len(letters) - len(special), letters[32])
    types = [NORMAL] * (vocab.size - len(special)) + [CONTROL] * len(special)
    return letters + texts + special, types, list(merges_of(texts, set(letters) | set(texts)))


def spm_vocabulary(vocab):
    """(tokens, types, scores); a higher score merges first."""
    head, special = ["<unk>", vocab.bos, vocab.eos if not vocab.special else "</s>"], special_tokens(vocab)
    head += [f"<0x{b:02X}>" for b in range(256)]
    single = ["\u2581"] + [chr(c) for c in range(33, 127)]
    texts = strings(vocab.size - len(head) - len(single) - len(special), "\u2581")
    tokens = head + single + texts + special
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(single + texts)
    types += [CONTROL] * len(special)
    scores = np.zeros(len(tokens), np.float32)
    scores[len(head):len(head + single)] = -1e6
    scores[len(head + single):][:len(texts)] = -np.arange(len(texts))
    return tokens, types, scores.tolist()


def wordpiece_vocabulary(vocab):
    """(tokens, types): characters in both places, and words"""
    single = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    first = ["\u2581" + c for c in single if c not in LETTERS]
    tokens = [*vocab.special, *single, *first,
              *strings(vocab.size - len(vocab.special) - len(single) - len(first), "\u2581")]
    return tokens, [CONTROL] * len(vocab.special) + [NORMAL] * (vocab.size - len(vocab.special))


def add_vocabulary(writer, vocab):
    writer.add_tokenizer_model(vocab.model)
    writer.add_tokenizer_pre(vocab.pre)
    if vocab.model == "gpt2":
        tokens, types, merges = bpe_vocabulary(vocab)
        writer.add_token_merges(merges)
    elif vocab.model == "bert":
        tokens, types = wordpiece_vocabulary(vocab)
        writer.add_token_type_count(2)
        for name, text in (("unk", "[UNK]"), ("sep", "[SEP]"), ("pad", "[PAD]"), ("mask", "[MASK]")):
            getattr(writer, f"add_{name}_token_id")(tokens.index(text))
    else:
        tokens, types, scores = spm_vocabulary(vocab)
        writer.add_token_scores(scores)
        writer.add_unk_token_id(0)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_bos_token_id(tokens.index(vocab.bos))
    writer.add_eos_token_id(tokens.index(vocab.eos))
    writer.add_add_bos_token(vocab.add_bos)
    if vocab.template:
        writer.add_chat_template(vocab.template)
