"""The vocabulary both models share, and documents as rows of token ids."""

import json
import random

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT, TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL = (END_OF_TEXT, TURN, END_OF_TURN)
TEMPLATE = (
    ("{% for message in messages %}"
     "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
)


def byte_level(model):
    """A tokenizer of byte-level BPE with GPT-2's pre-tokenizer."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(texts, vocab_size):
    """A byte-level BPE; the control tokens come first, then the 256 bytes."""
    tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(CONTROL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == vocab_size, "the text is too short for this vocabulary"
    return tokenizer


def merges(tokenizer):
    """The merge rules, best first, as GGUF writes them: "left right"."""
    return [pair if isinstance(pair, str) else " ".join(pair)
            for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def ask(request):
    """The text before an answer, as the template makes it."""
    return f"{TURN}user\n{request}{END_OF_TURN}\n{TURN}assistant\n"


def encode_documents(tokenizer, documents, chunk=2000):
    """For each document its ids and a mask of the tokens to learn:
    the answers with their end of turn, not the requests."""
    for i in range(0, len(documents), chunk):
        turns = [turn for d in documents[i : i + chunk] for turn in d.turns]
        asked = tokenizer.encode_batch_fast([ask(request) for request, _ in turns])
        told = tokenizer.encode_batch_fast([f"{passage}{END_OF_TURN}\n" for _, passage in turns])
        pieces = iter(zip(asked, told))
        for document in documents[i : i + chunk]:
            ids, learn = [], []
            for a, t in (next(pieces) for _ in document.turns):
                ids += a.ids + t.ids
                learn += [0] * len(a.ids) + [1] * (len(t.ids) - 1) + [0]
            yield np.array(ids, np.uint16), np.array(learn, np.int8)


def pack(encoded, length, rng, look_ahead=200):
    """Rows (n, length) of whole documents: the first that waits and, of those in sight, always the longest
    that still fits; in any order, since short ones would all stand last otherwise, and a chat begins where a
    row does.

    A document of several turns that is longer than a row is cut at its end. Returns ids and mask;
    the filling is masked.
    """
    rows, masks, waiting, source = [], [], [], iter(encoded)
    while True:
        while len(waiting) < look_ahead and (item := next(source, None)) is not None:
            waiting.append(item)
        if not waiting:
            return np.stack(rows), np.stack(masks)
        chosen, left, choice = [], length, 0
        while choice is not None:
            chosen.append(waiting.pop(choice))
            left -= len(chosen[-1][0])
            fitting = [(len(w[0]), i) for i, w in enumerate(waiting) if len(w[0]) <= left]
            choice = max(fitting)[1] if fitting else None
        rng.shuffle(chosen)
        ids, learn = (np.concatenate(part)[:length] for part in zip(*chosen))
        rows.append(np.pad(ids, (0, length - len(ids))))
        masks.append(np.pad(learn, (0, length - len(ids))))


def running_rows(streams, length, n, rng):
    """n rows (n, length) cut anywhere from the books' ids, each book as often as its (weighted) share says.
    streams: [(ids, weight)]."""
    sizes = [len(ids) * w if len(ids) > length else 0.0 for ids, w in streams]
    rows = []
    for book in rng.choices(range(len(streams)), sizes, k=n):
        ids = streams[book][0]
        start = rng.randrange(len(ids) - length)
        rows.append(ids[start : start + length])
    return np.array(rows, np.uint16).reshape(n, length)


def make_rows(encoded, streams, length, raw_share, seed):
    """All rows of a phase, shuffled: packed documents (encode_documents) and running text. Returns ids (n,
    length) uint16 and mask (n, length) int8: 1 a token to learn, 0 one that is only read, -1 one to
    unlearn."""
    rng = random.Random(seed)
    ids, learn = pack(encoded, length, rng)
    n_raw = int(len(ids) * raw_share / (1 - raw_share))
    raw = running_rows(streams, length, n_raw, rng)
    ids, learn = np.concatenate([ids, raw]), np.concatenate([learn, np.ones_like(raw, np.int8)])
    order = np.random.default_rng(seed).permutation(len(ids))
    return ids[order], learn[order]
