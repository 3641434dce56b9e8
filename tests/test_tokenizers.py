"""Tokenizers: ids equal llama.cpp's, texts come back whole, files that lie are told so."""

import lzma

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from places import VOCABULARIES
from raw import Raw

from pybmc.errors import ArgumentError, FormatError
from pybmc.files.gguf import GGUF
from pybmc.tokenizers import Tokenizer
from pybmc.tokenizers.bpe import BYTES, CHARS, LONG, _pre_tokenizer
from pybmc.tokenizers.pre import DEFAULT, PRE

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

TEXTS = [
    "",
    " ",
    "  ",
    "\n",
    " \n\t x",
    "Hello world",
    " Hello, world!",
    "it's 1234 o'clock, they'LL see",
    "Äpfel für 3½ Mäuse",
    "🦙 ¡olé! 東京\u200b",
    "a\0b",
    "\u2581 under \u2581",
    "x" * 300,
    "'s 't",
    "<s>[INST]</s> <0x0A>",
]


def bpe(pre="gpt-2", size=600, **changes):
    return tiny.bpe_vocabulary(size, pre) | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def spm(size=900, **changes):
    return tiny.spm_vocabulary(size) | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def extended(vocabulary, tokens):
    """A vocabulary with more tokens: {text: type}."""
    vocabulary = dict(vocabulary)
    vocabulary["tokenizer.ggml.tokens"] = [*vocabulary["tokenizer.ggml.tokens"], *tokens]
    vocabulary["tokenizer.ggml.token_type"] = [*vocabulary["tokenizer.ggml.token_type"], *tokens.values()]
    if "tokenizer.ggml.scores" in vocabulary:
        vocabulary["tokenizer.ggml.scores"] = [*vocabulary["tokenizer.ggml.scores"], *[-2000.0] * len(tokens)]
    return vocabulary


@pytest.fixture
def load(tmp_path):
    """Metadata -> Tokenizer, through a file."""
    def load(metadata):
        return Tokenizer(
            Raw({key: value for key, value in metadata.items() if value is not None}).save(
                tmp_path / "v.gguf"
            )
        )
    return load


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A byte-level tokenizer and a SentencePiece one."""
    folder = tmp_path_factory.mktemp("v")
    return [Tokenizer(Raw(metadata).save(folder / "v.gguf")) for metadata in (bpe(), spm())]


@pytest.fixture(scope="module", params=VOCABULARIES)
def real(request, tmp_path_factory):
    """(tokenizer, [(text, ids of llama.cpp)]) of a real vocabulary."""
    packed = VOCABULARIES[request.param]
    path = tmp_path_factory.mktemp("real") / packed.stem
    path.write_bytes(lzma.decompress(packed.read_bytes()))
    tokenizer = Tokenizer(path)
    texts = packed.with_suffix(".inp").read_text().split("\n__ggml_vocab_test__\n")
    lines = packed.with_suffix(".out").read_text().split("\n")
    return tokenizer, [(text, [int(id) for id in line.split()]) for text, line in zip(texts, lines)]


# -- against llama.cpp

def test_ids_of_llama_cpp(real):
    tokenizer, cases = real
    assert len(cases) > 40
    for text, ids in cases:
        assert tokenizer.encode(text, bos=False) == ids, text


@pytest.fixture(scope="module")
def lossless(real):
    if real[0].vocab.metadata["tokenizer.ggml.model"] in ("bert", "t5"):
        pytest.skip("normalizes texts")
    return real


def test_real_texts_come_back(lossless):
    tokenizer, cases = lossless
    for text, ids in cases:
        assert tokenizer.decode(ids) == text
        assert streamed(tokenizer, ids, continued=False) == text


@given(text=st.text())
@settings(max_examples=60, deadline=None)
def test_any_text_comes_back_from_real_vocabularies(lossless, text):
    tokenizer, _ = lossless
    if "\u2581" not in text or tokenizer.vocab.get("tokenizer.ggml.model", str) == "gpt2":
        assert tokenizer.decode(tokenizer.encode(text)) == text


def llama_cpp_spm(tokens, scores, text):
    """llama.cpp's algorithm, slow and plain: of all neighbours that make a token join the pair with the best
    score, the left one first.
    """
    ids = {token: id for id, token in enumerate(tokens)}
    parts = list((" " + text).replace(" ", "\u2581"))
    while True:
        pairs = [(-scores[ids[a + b]], n) for n, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ids]
        if not pairs:
            break
        n = min(pairs)[1]
        parts[n:n + 2] = [parts[n] + parts[n + 1]]
    return [
        id
        for part in parts
        for id in ([ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()])
    ]


@given(text=st.text(alphabet="thewinrasdo ou,\n½", min_size=1, max_size=40))
@settings(max_examples=100, deadline=None)
def test_spm_joins_as_llama_cpp_does(both, text):
    metadata = spm()
    want = llama_cpp_spm(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"], text)
    assert both[1].encode(text, bos=False) == want


def plain_bpe(tokens, merges, word):
    """Byte-pair encoding of one word, the best merge first."""
    ids = {token: id for id, token in enumerate(tokens)}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    parts = [CHARS[byte] for byte in word.encode()]
    while True:
        pairs = [(ranks[pair], n) for n, pair in enumerate(zip(parts, parts[1:])) if pair in ranks]
        if not pairs:
            return [ids[part] for part in parts]
        n = min(pairs)[1]
        parts[n:n + 2] = [parts[n] + parts[n + 1]]


@given(words=st.lists(st.text(alphabet="thewinrasdoumk", min_size=1, max_size=12), max_size=5))
@settings(max_examples=100, deadline=None)
def test_bpe_merges_words(both, words):
    metadata = bpe()
    want = [id for word in words for id in
            plain_bpe(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"], " " + word)]
    assert both[0].encode("".join(" " + word for word in words), bos=False) == want


# -- there and back

def streamed(tokenizer, ids, **how):
    stream = tokenizer.stream(**how)
    return "".join([stream.push(id) for id in ids]) + stream.flush()


@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back(both, text):
    for tokenizer in both:
        if tokenizer is both[1] and "\u2581" in text:
            continue                        # SentencePiece's own space: comes back as one
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
def test_long_texts_have_the_ids_of_short_ones(load, monkeypatch, pre):
    """.. though another function of the package encodes them."""
    tokenizer, text = load(bpe(pre)), tiny.TEXT + "".join(TEXTS)
    ids = tokenizer.encode(text)
    assert len(text) < LONG
    monkeypatch.setattr("pybmc.tokenizers.bpe.LONG", 1)
    assert tokenizer.encode(text) == ids and tokenizer.encode("", bos=False) == []
    long = "\n".join([text] * (LONG // len(text) + 1))
    monkeypatch.setattr("pybmc.tokenizers.bpe.LONG", LONG)
    found = tokenizer.encode(long)
    monkeypatch.setattr("pybmc.tokenizers.bpe.LONG", len(long) + 1)
    assert tokenizer.encode(long) == found and tokenizer.decode(tokenizer.encode(long, bos=False)) == long


@pytest.mark.parametrize("text", TEXTS)
def test_these_texts_come_back(both, text):
    assert both[0].decode(both[0].encode(text)) == text
    assert both[1].decode(both[1].encode(text)) == text.replace("\u2581", " ")


@given(ids=st.lists(st.integers(0, 599), max_size=30))
@settings(max_examples=200, deadline=None)
def test_stream_says_what_decode_says(both, ids):
    for tokenizer in both:
        for special in (False, True):
            for continued in (False, True):
                whole = tokenizer.decode(ids, special=special, continued=continued)
                assert streamed(tokenizer, ids, special=special, continued=continued) == whole


@given(text=st.text(alphabet="a½🦙東é\u0301\U0010ffff", min_size=1))
@settings(max_examples=100, deadline=None)
def test_stream_gives_whole_characters(both, text):
    for tokenizer in both:
        stream = tokenizer.stream(continued=False)
        pieces = [stream.push(id) for id in tokenizer.encode(text)]
        assert "\ufffd" not in "".join(pieces) and stream.flush() == ""
        assert "".join(pieces) == text


def test_stream_of_broken_bytes(both):
    for tokenizer in both:
        half = [tokenizer.byte_id(byte) for byte in "½".encode()]
        stream = tokenizer.stream()
        assert [stream.push(half[0]), stream.push(half[1]), stream.push(half[0]), stream.flush()] == [
            "",
            "½",
            "",
            "\ufffd",
        ]
        stream = tokenizer.stream()
        assert stream.push(half[1]) == "\ufffd", "cannot become a character any more"
        assert stream.push(tokenizer.byte_id(0x41)) == "A"


def test_first_space_of_spm(both):
    tokenizer = both[1]
    ids = tokenizer.encode("the mill", bos=False)
    assert tokenizer.decode(ids) == tokenizer.decode([tokenizer.bos_id, *ids]) == "the mill"
    assert tokenizer.decode(ids, continued=True) == streamed(tokenizer, ids) == " the mill"
    assert tokenizer.decode(tokenizer.encode("  the")) == "  the"


def test_no_space_prefix(load):
    tokenizer = load(spm(add_space_prefix=False))
    assert tokenizer.decode(tokenizer.encode("the mill")) == "the mill"
    assert tokenizer.decode(tokenizer.encode(" the mill")) == " the mill"
    assert tokenizer.encode("the", bos=False) != tokenizer.encode(" the", bos=False)


def test_pieces(both):
    tokenizer = both[0]
    assert tokenizer.piece(tokenizer.encode("½", bos=False)[0]) == b"\xc2"
    assert tokenizer.piece(tokenizer.bos_id) == b"<|endoftext|>"
    spm_tokenizer = both[1]
    assert b"".join(map(spm_tokenizer.piece, spm_tokenizer.encode("the ½", bos=False))) == " the ½".encode()
    for tokenizer in both:
        assert len(tokenizer.tokens) == tokenizer.vocab_size
        assert [tokenizer.piece(tokenizer.byte_id(byte)) for byte in range(256)] == [
            bytes([byte]) for byte in range(256)
        ]


def test_byte_alphabet():
    assert len(BYTES) == 256 and sorted(BYTES.values()) == list(range(256))
    assert (CHARS[0x20], CHARS[0x0A], CHARS[0x41], CHARS[0xAD], CHARS[0xFF]) == ("Ġ", "Ċ", "A", "Ń", "ÿ")


# -- special tokens

def test_control_tokens_in_text(both):
    for tokenizer, name in zip(both, ("<|im_start|>", "</s>")):
        id = tokenizer.tokens.index(name)
        text = f"a{name} {name}b"
        assert id not in tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
        ids = tokenizer.encode(text, special=True)
        assert ids.count(id) == 2 and tokenizer.is_control(id) and not tokenizer.is_control(ids[-1])
        assert name not in tokenizer.decode(ids) and tokenizer.decode(ids, special=True).count(name) == 2


def test_user_defined_tokens_always_count(load):
    for vocabulary in (bpe(), spm()):
        tokenizer = load(extended(vocabulary, {"<b>": USER, "<b><b>": USER, "</b>": CONTROL}))
        one, two = tokenizer.tokens.index("<b>"), tokenizer.tokens.index("<b><b>")
        ids = tokenizer.encode("x<b>y<b><b><b></b>", bos=False)
        assert [id for id in ids if id in (one, two)] == [one, two, one], "longest first"
        assert tokenizer.tokens.index("</b>") not in ids
        assert tokenizer.tokens.index("</b>") in tokenizer.encode("</b>", special=True)
        assert tokenizer.decode(ids).replace(" ", "") == "x<b>y<b><b><b></b>"


def test_spm_puts_a_space_after_special_tokens(load):
    tokenizer = load(extended(spm(), {"<b>": USER}))
    b = tokenizer.tokens.index("<b>")
    the = tokenizer.encode("the", bos=False)
    assert tokenizer.encode("the<b>the", bos=False) == [*the, b, *the]


def test_phi3_tokens_swallow_space(load):
    vocabulary = extended(spm(), {"<|user|>": CONTROL}) | {"general.name": "Phi-3 mini"}
    assert load(vocabulary).encode("<|user|>\n the", special=True) == load(vocabulary).encode(
        "<|user|>the", special=True
    )
    del vocabulary["general.name"]
    assert load(vocabulary).encode("<|user|>\n the", special=True) != load(vocabulary).encode(
        "<|user|>the", special=True
    )


def test_ordinary_text_is_never_control(load):
    """Even where merges, or a word that is a token, would make it so."""
    merges = [*bpe()["tokenizer.ggml.merges"], "E N", "EN D"]
    for pre in ("gpt-2", "llama-bpe"):
        tokenizer = load(
            extended(bpe(pre), {"EN": NORMAL, "END": CONTROL}) | {"tokenizer.ggml.merges": merges}
        )
        assert tokenizer.tokens.index("END") not in tokenizer.encode("END")
        assert tokenizer.decode(tokenizer.encode("END")) == "END"
        assert tokenizer.tokens.index("END") in tokenizer.encode("END", special=True)


# -- what begins and ends a text

@pytest.mark.parametrize("vocabulary, begins, ends", [
    (bpe("gpt-2"), False, False),
    (bpe("qwen2"), False, False),
    (bpe("llama-bpe"), True, False),
    (bpe("tekken"), True, False),
    (bpe("llama-bpe", add_bos_token=False), False, False),
    (bpe("gpt-2", add_bos_token=True, add_eos_token=True), True, True),
    (spm(), True, False),
    (spm(add_bos_token=False, add_eos_token=True), False, True),
    (spm(bos_token_id=None, eos_token_id=None), True, False),           # 1 and 2 by default
])
def test_bos_and_eos(load, vocabulary, begins, ends):
    tokenizer = load(vocabulary)
    assert (tokenizer.add_bos, tokenizer.add_eos) == (begins, ends)
    for text in ("", "the mill"):
        plain = tokenizer.encode(text, bos=False)
        assert tokenizer.encode(text) == [tokenizer.bos_id] * begins + plain + [tokenizer.eos_id] * ends


def test_special_ids_out_of_range(load, caplog):
    tokenizer = load(spm(bos_token_id=1 << 20))
    assert tokenizer.bos_id == 1 and "bos_token_id is 1048576" in caplog.text
    small = bpe(
        tokens=["a"], token_type=[1], merges=[], bos_token_id=None, eos_token_id=None, eot_token_id=None
    )
    tokenizer = load(small)                         # 11 by default, which is not there
    assert tokenizer.bos_id is None and tokenizer.encode("a") == [0] and tokenizer.stop_ids == frozenset()
    with pytest.raises(FormatError, match="add_bos_token is true, but there is no such token"):
        load(small | {"tokenizer.ggml.add_bos_token": True})


def test_stop_ids(load):
    metadata = bpe()
    names = [metadata["tokenizer.ggml.tokens"][id] for id in sorted(load(metadata).stop_ids)]
    assert names == ["<|endoftext|>", "<|im_end|>"]
    tokenizer = load(
        extended(
            bpe(eot_token_id=None),
            {"<end_of_turn>": USER, "<|eom_id|>": CONTROL, "<|file_sep|>": CONTROL, "<x>": CONTROL},
        )
    )
    names = {tokenizer.tokens[id] for id in tokenizer.stop_ids}
    assert names == {"<|endoftext|>", "<|im_end|>", "<end_of_turn>", "<|eom_id|>", "<|file_sep|>"}
    assert tokenizer.tokens[tokenizer.eot_id] == "<|im_end|>"
    turn = tokenizer.tokens.index("<end_of_turn>")
    assert tokenizer.is_control(turn) and turn not in tokenizer.encode(
        "<end_of_turn>"
    ), "whatever the file calls it"


def test_end_of_message_is_not_the_end(load):
    tokens = {"<|end|>": CONTROL, "<|return|>": CONTROL, "<|call|>": CONTROL}
    tokenizer = load(extended(bpe(), tokens))
    assert {tokenizer.tokens[id] for id in tokenizer.stop_ids} >= {"<|return|>", "<|call|>"}
    assert tokenizer.tokens.index("<|end|>") not in tokenizer.stop_ids


# -- pre-tokenizers

@pytest.mark.parametrize("name", sorted(PRE))
def test_every_pre_tokenizer_keeps_the_text(name):
    """Patterns compile, and cutting loses nothing: the words, put together, are the text."""
    cutter = _pre_tokenizer(PRE[name])
    more = ["price: $5 + 7~ ٣٤ 三百 한글", "\r\n\r\n  end   ", "getUserName HTMLParser 漢字かな"]
    for text in TEXTS[1:] + more:
        words = "".join(word for word, _ in cutter.pre_tokenize_str(text))
        if PRE[name].byte_level:
            words = bytes(BYTES[char] for char in words).decode()
        assert words == ("".join(text.split()) if PRE[name].drops_space else text), name


@pytest.mark.parametrize("name, text, words", [
    ("default", "it's $12345!", "it|'|s| |$|123|45|!"),
    ("gpt-2", "it's 12345  x\n\ny", "it|'s| 12345| | x|\n|\n|y"),
    ("smollm", "a 123", "a| |1|2|3"),
    ("llama-bpe", "IT'S 12345  x\n\ny...\n", "IT|'S| |123|45| | x|\n\n|y|...\n"),
    ("qwen2", "IT'S 123 (x)", "IT|'S| |1|2|3| (|x|)"),
    ("ufakzeka", "it's", "it|'s"),
    ("tekken", "getUserName it's", "get|User|Name| it|'s"),
    ("gpt-4o", "getUserName it's 1234", "get|User|Name| it's| |123|4"),
    ("deepseek-v3", "12345 東京x", "123|45| |東京|x"),
    ("deepseek-llm", "abc 12 Äö東", "abc| |12| Äö|東"),
    ("deepseek-coder", "ab 12", "ab| |1|2"),
    ("afmoe", "1234567", "1|234|567"),
    ("superbpe", "a 1234567 b", "a |1|234|567| b"),
    ("kimi-k2", "東京abc iPhone", "東京|abc| i|Phone"),
    ("viking", "ab, 12", "ab|,| |1|2"),
    ("jais-2", "a" + " " * 5 + "b", "a|    | b"),
    ("falcon", "a`b 1234", "a|`|b| |123|4"),
    ("chameleon", "a  b.1", "a|  |b|.|1"),
    ("gemma4", "a b\n\nc", "a b|\n\n|c"),
    ("whitespace", "a b\n\u3000c\x1cd ", "a|b|c\x1cd"),
])
def test_words(name, text, words):
    found = [word for word, _ in _pre_tokenizer(PRE[name]).pre_tokenize_str(text)]
    if PRE[name].byte_level:
        found = [bytes(BYTES[char] for char in word).decode() for word in found]
    assert found == words.split("|")


def test_unknown_pre_tokenizer(load, caplog):
    tokenizer = load(bpe("brand-new"))
    assert "unknown pre-tokenizer 'brand-new'" in caplog.text
    assert tokenizer._codec.pre is DEFAULT
    assert load(bpe(pre=None)).encode("the mill") == tokenizer.encode("the mill")


def test_gemma4_is_bpe_without_byte_letters(load):
    tokens = [
        "<pad>",
        "<eos>",
        "<bos>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "▁a",
        "\n",
    ]
    types = [CONTROL] * 3 + [BYTE] * 256 + [NORMAL] * 5
    tokenizer = load(
        {
            "tokenizer.ggml.model": "gemma4",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": ["▁ a"],
            "tokenizer.ggml.bos_token_id": 2,
            "tokenizer.ggml.add_bos_token": False,
        }
    )
    ids = tokenizer.encode(" ab½\n", bos=False)
    assert [tokens[id] for id in ids] == ["▁a", "b", "<0xC2>", "<0xBD>", "\n"]
    assert tokenizer.encode("a") == [2, tokens.index("a")], "begins with bos, whatever the file says"
    assert tokenizer.decode(ids) == " ab½\n"


def characters(**changes):
    """BPE over characters, without tokens for bytes."""
    return {
        "tokenizer.ggml.model": "whitespace",
        "tokenizer.ggml.pre": "whitespace",
        "tokenizer.ggml.tokens": ["<s>", "</s>", "a", "b", "ä", "中", "文", "ab", "中文"],
        "tokenizer.ggml.token_type": [CONTROL] * 2 + [NORMAL] * 7,
        "tokenizer.ggml.merges": ["a b", "中 文"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def test_whitespace_only_separates_words(load):
    tokenizer = load(characters())
    assert tokenizer.encode("ab  a\nb\u3000中文") == [7, 2, 3, 8]
    assert tokenizer.encode("a🦙b Ab") == [2, 3, 3], ("what has no token is dropped, and its neighbours "
                                                     "stay apart")
    lower = load(characters(**{"normalizer.lowercase": True}))
    assert lower.encode("AB Ä") == [7, 4]


def test_missing_bytes_keep_their_neighbours_apart(load):
    vocabulary = bpe()
    tokens = vocabulary["tokenizer.ggml.tokens"]
    merge = next(merge for merge in vocabulary["tokenizer.ggml.merges"] if len(merge) == 3
                 and merge.isascii())
    a, b = merge.split(" ")
    tokens = ["?" if token == "Ã" else "?!" if token == "?" else token for token in tokens]
    tokenizer = load(vocabulary | {"tokenizer.ggml.tokens": tokens})
    assert tokenizer.encode(a + b, bos=False) == [tokens.index(a + b)]
    assert [tokens[id] for id in tokenizer.encode(f"{a}\u00e9{b}", bos=False)] == [a, "©", b]


# -- arguments and files that are wrong

def test_wrong_arguments(both):
    for tokenizer in both:
        for id in (-1, tokenizer.vocab_size, 1 << 40):
            for function in (
                tokenizer.piece,
                tokenizer.is_control,
                lambda id: tokenizer.decode([0, id]),
                tokenizer.stream().push,
            ):
                with pytest.raises(
                    ArgumentError,
                    match=f"token {id} is out of range: the vocabulary has {tokenizer.vocab_size} tokens",
                ):
                    function(id)
        with pytest.raises(ArgumentError, match="half a surrogate pair"):
            tokenizer.encode("a\ud800b")
        with pytest.raises(ArgumentError, match="expected a str"):
            tokenizer.encode(b"bytes")
        assert tokenizer.decode(np.array([5, 6])) == tokenizer.decode([5, 6])


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({}, "no vocabulary .* found none"),
        (
            {"tokenizer.ggml.model": "rwkv"},
            "expected a tokenizer.ggml.model of gpt2, gemma4, whitespace, llama, t5, bert, found 'rwkv'",
        ),
        ({"tokenizer.ggml.model": 7}, "found 7"),
        (bpe(tokens=None), "tokenizer.ggml.tokens: expected an array of strings, found nothing"),
        (bpe(tokens=[]), "the vocabulary is empty"),
        (bpe(tokens="abc"), "tokenizer.ggml.tokens: expected list, found str"),
        (bpe(tokens=np.arange(4)), "tokenizer.ggml.tokens: expected list, found ndarray"),
        (bpe(token_type=[1, 1]), "token_type: expected 600 values, one for each token, found 2"),
        (bpe(token_type=[0.5] * 600), "token_type: expected an array of numbers, found float32"),
        (bpe(token_type=3), "token_type: expected an array of numbers, found int"),
        (bpe(merges=None), "tokenizer.ggml.merges: expected an array of strings, found nothing"),
        (characters(bos_token_id=None, pre="gemma4", tokens=["a"], token_type=[1]),
         "bos_token_id: expected one of 1"),
        (bpe(bos_token_id="x"), "bos_token_id: expected int, found str"),
        (bpe(add_bos_token=1), "add_bos_token: expected bool, found int"),
        (
            extended(bpe(), {"dup": 1}) | {"tokenizer.ggml.tokens": [*bpe()["tokenizer.ggml.tokens"], "!"]},
            "'!' is there twice, as 0 and 600",
        ),
        (bpe() | {"tokenizer.chat_template": 5}, "tokenizer.chat_template: expected str, found int"),
        (spm(scores=[0.0]), "scores: expected 900 values, one for each token, found 1"),
        (spm(scores=[float("nan")] * 900), "scores: value 0 is not a number"),
        (spm(scores=["a"]), "scores: expected an array of numbers, found list"),
        (spm(add_space_prefix=3), "add_space_prefix: expected bool, found int"),
    ],
)
def test_wrong_vocabularies(load, metadata, message):
    with pytest.raises(FormatError, match=f"v.gguf: .*{message}"):
        load(metadata)


@pytest.mark.parametrize("id", [-1, -600, -601, 600, 1 << 40])
def test_ids_beyond_a_vocabulary_without_types_mark_no_token(load, caplog, id):
    tokenizer = load(bpe(token_type=None, bos_token_id=id))
    assert not tokenizer.is_control(599) and not tokenizer.is_control(0)
    assert f"bos_token_id is {id}, the vocabulary has 600 tokens" in caplog.text


def test_vocabularies_that_lack_something(load, caplog):
    """What llama.cpp takes, with its meaning."""
    text = "the mill ½"
    for vocabulary in (
        spm(scores=None),
        spm(token_type=None),
        spm(unknown_token_id=None),
        bpe(token_type=None),
        bpe(eos_token_id=None),
        bpe(merges=[]),
        spm(token_type=[*spm()["tokenizer.ggml.token_type"], 1, 1]),
    ):
        tokenizer = load(vocabulary)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    tokens = ["", *bpe()["tokenizer.ggml.tokens"][1:], ""]
    tokenizer = load(bpe(tokens=tokens, token_type=[1] * 601))
    assert tokenizer.tokens == tokens and tokenizer.decode([0, 600]) == ""
    first, second = bpe()["tokenizer.ggml.merges"][:2]
    tokenizer = load(bpe(merges=[first, "nonsense", "q zzz", second]))
    assert "2 of 4 merges name tokens that do not exist" in caplog.text
    for merge in (first, second):
        token = merge.replace(" ", "")
        assert (
            tokenizer.tokens[
                tokenizer.encode(tokenizer.decode([tokenizer.tokens.index(token)]), bos=False)[0]
            ]
            == token
        )


def test_spm_without_byte_tokens(load):
    tokenizer = load(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "▁", "a", "▁a"],
            "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -1.0, -2.0, -0.5],
            "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1],
        }
    )
    assert tokenizer.encode("aé", bos=False) == [5, 0], "unknown"
    no_unknown = load(
        {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["x", "<s>", "</s>", "▁", "a", "▁a"]}
    )
    assert no_unknown.encode("aé", bos=False) == [5]
    assert load(spm(token_type=[2] * 4 + spm()["tokenizer.ggml.token_type"][4:])).encode("the")


def test_from_an_open_file(tmp_path):
    with GGUF(Raw(bpe()).save(tmp_path / "v.gguf")) as file:
        tokenizer = Tokenizer(file)
        assert not file.closed
    assert tokenizer.decode(tokenizer.encode("the mill")) == "the mill"
    assert tokenizer.chat_template == tiny.CHATML
    with pytest.raises(FileNotFoundError):
        Tokenizer(tmp_path / "none.gguf")
