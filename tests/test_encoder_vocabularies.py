"""The vocabularies of embedding models: WordPiece ("bert") and Unigram ("t5")."""

import lzma
from itertools import product

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from places import HERE
from raw import Raw

from pybmc.errors import FormatError
from pybmc.tokenizers import Tokenizer
from pybmc.tokenizers.charsmap import Charsmap

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Metadata -> Tokenizer, through a file."""
    path = tmp_path_factory.mktemp("v") / "v.gguf"

    def load(metadata):
        return Tokenizer(Raw({key: value for key, value in metadata.items() if value is not None}).save(path))
    return load


def packed(name, folder):
    path = folder / "v.gguf"
    path.write_bytes(lzma.decompress((HERE / "vocab" / f"ggml-vocab-{name}.gguf.xz").read_bytes()))
    return Tokenizer(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """{"wordpiece": and "unigram": a tokenizer of 1,500 tokens}"""
    return {name: packed(name, tmp_path_factory.mktemp(name)) for name in ("wordpiece", "unigram")}


def vocabulary(model, tokens, changes):
    """tokens: {text: type}."""
    return {
        "general.architecture": "bert",
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.token_type": list(tokens.values()),
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def spelled(tokenizer, text, **how):
    return [tokenizer.tokens[id] for id in tokenizer.encode(text, **how)]


@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_has_ids(trained, text):
    for tokenizer in trained.values():
        for special in (False, True):
            ids = tokenizer.encode(text, special=special)
            assert all(0 <= id < tokenizer.vocab_size for id in ids)
        assert not set(tokenizer.encode(text, bos=False)) & tokenizer.vocab.control


# -- WordPiece

PIECES = [
    *["▁hello", "▁he", "llo", "▁wor", "ld", "▁,", "▁!", "▁東", "▁京", "▁a", "b", "▁$", "▁½", "▁ab", "cab"],
    *["ç", "▁é", "▁İ", "▁i", "\u0307", "▁ᄒ", "▁[", "▁mask", "▁]", "▁END"],
]


def wordpiece(*more, **changes):
    tokens = dict.fromkeys(["[CLS]", "[SEP]", "[MASK]"], CONTROL) | {"[UNK]": UNKNOWN}
    tokens |= dict.fromkeys([*PIECES, *more], NORMAL)
    ids = {"bos_token_id": 0, "seperator_token_id": 1, "unknown_token_id": 3}
    return vocabulary("bert", tokens, ids | changes)


@pytest.mark.parametrize("text, words", [
    ("Hello,  WORLD!", "▁hello ▁, ▁wor ld ▁!"),
    ("hé\tÀB", "▁he ▁ab"),                              # accents and case
    ("东 東京ab", "[UNK] ▁東 ▁京 ▁ab"),                  # Han characters are words
    ("hexx he", "[UNK] ▁he"),                           # a word that cannot be cut is one unknown token
    ("abcab abb", "▁ab cab ▁ab b"),                     # the longest first, without a way back
    ("he\u00adllo\u200b a\x1cb \0\ufffda", "▁hello ▁ab ▁a"),            # what does not show is dropped
    ("a\u3000b\u2028a", "▁a [UNK] ▁a"),                 # spaces of all kinds
    ("a½$", "[UNK] ▁$"),                                # ASCII symbols are words, other symbols are not
    ("½", "▁½"),
    ("한", "▁ᄒ"),                                       # the first part of a syllable, as llama.cpp has it
    ("", ""),
    (" \n ", ""),
])
def test_wordpiece(load, text, words):
    assert spelled(load(wordpiece()), text, bos=False) == words.split()


@pytest.mark.parametrize("lower, accents, words", [
    (None, None, "▁hello ▁i"),
    (False, None, "[UNK] ▁İ"),
    (False, True, "[UNK] [UNK]"),
    (True, False, "[UNK] ▁i"),
    (None, False, "[UNK] ▁i"),
])
def test_case_and_accents_are_options(load, lower, accents, words):
    options = {"normalizer.lowercase": lower, "normalizer.strip_accents": accents}
    assert spelled(load(wordpiece(**options)), "Héllo İ", bos=False) == words.split()
    cased = load(wordpiece("▁Héllo", **options))
    assert (spelled(cased, "Héllo", bos=False) == ["▁Héllo"]) == (lower is False and not accents)


def test_a_text_stands_between_cls_and_sep(load):
    for changes in ({}, {"add_bos_token": False, "add_eos_token": False},
                    {"bos_token_id": None, "cls_token_id": 0}, {"bos_token_id": 0, "cls_token_id": -1}):
        tokenizer = load(wordpiece(**changes))
        assert spelled(tokenizer, "he") == ["[CLS]", "▁he", "[SEP]"] and tokenizer.encode("") == [0, 1]
        assert ((tokenizer.bos_id, tokenizer.sep_id, tokenizer.add_sep, tokenizer.add_eos)
                == (0, 1, True, False))
    many = load(wordpiece(*map(str, range(200)), bos_token_id=None, seperator_token_id=None,
                          unknown_token_id=None))
    assert (many.bos_id, many.sep_id, many.vocab.unknown_id) == (101, 102, 100)


def test_special_tokens_of_wordpiece(load):
    tokenizer = load(wordpiece())
    assert spelled(tokenizer, "a [MASK]a", bos=False) == ["▁a", "▁[", "▁mask", "▁]", "▁a"]
    assert spelled(tokenizer, "a [MASK]a", bos=False, special=True) == ["▁a", "[MASK]", "▁a"]
    metadata = wordpiece()
    metadata["tokenizer.ggml.token_type"][-1] = CONTROL
    cased = load(metadata | {"tokenizer.ggml.normalizer.lowercase": False})
    assert spelled(cased, "END", bos=False) == ["[UNK]"], "no text spells a control token"


def test_wordpiece_decodes_to_words(load):
    tokenizer = load(wordpiece())
    ids = tokenizer.encode("Hello, WORLD!")
    assert tokenizer.decode(ids) == "hello , world !"
    assert tokenizer.decode(ids, continued=True) == " hello , world !"
    assert tokenizer.decode(ids, special=True) == "[CLS] hello , world ![SEP]"
    assert tokenizer.piece(tokenizer.tokens.index("llo")) == b"llo" and tokenizer.byte_id(65) is None


@given(text=st.text(), other=st.text())
@settings(max_examples=100, deadline=None)
def test_words_are_cut_one_by_one(trained, text, other):
    encode = trained["wordpiece"]._codec.encode
    assert encode(f"{text} {other}") == encode(text) + encode(other)


@given(text=st.text(alphabet="thewolf,.!é東 \n\u0301"))
@settings(max_examples=200, deadline=None)
def test_what_is_decoded_has_the_same_ids(trained, text):
    tokenizer = trained["wordpiece"]
    ids = tokenizer.encode(text)
    if tokenizer.vocab.unknown_id not in ids:
        assert tokenizer.encode(tokenizer.decode(ids)) == ids


@given(word=st.text(alphabet="abcelo", min_size=1, max_size=30))
@settings(max_examples=100, deadline=None)
def test_the_longest_token_is_taken(load_once, word):
    tokenizer, tokens = load_once
    rest, want = "▁" + word, []
    while rest and want != ["[UNK]"]:
        found = max((token for token in tokens if rest.startswith(token)), key=len, default=None)
        want = ["[UNK]"] if found is None else [*want, found]
        rest = rest.removeprefix(found or rest)
    assert spelled(tokenizer, word, bos=False) == want


@pytest.fixture(scope="module")
def load_once(load):
    return load(wordpiece()), PIECES


def test_a_word_without_an_end(load):
    tokenizer = load(wordpiece())
    assert tokenizer.encode("a" + "b" * 100_000, bos=False)[1:] == [tokenizer.tokens.index("b")] * 99_999
    assert spelled(tokenizer, "a" + "b" * 100_000 + "x", bos=False) == ["[UNK]"]


# -- Unigram

def unigram(pieces, **changes):
    """pieces: {text: score}, normal tokens after <pad> </s> <unk>."""
    more = changes.pop("more", {})                      # {text: (type, score)}
    tokens = {"<pad>": CONTROL, "</s>": CONTROL, "<unk>": UNKNOWN}
    tokens |= dict.fromkeys(pieces, NORMAL) | {text: kind for text, (kind, _) in more.items()}
    scores = [0.0] * 3 + [float(score)
                          for score in [*pieces.values(), *(score for _, score in more.values())]]
    return vocabulary("t5", tokens,
                      {"scores": np.array(scores, np.float32), "add_space_prefix": True} | changes)


LETTERS = {"▁": -4, "a": -3, "b": -3.5, "ab": -5, "▁a": -6, "ba": -6.25, "abab": -9, "▁b": -9.5, "xa": -2}


def segmentations(text, scores, unknown):
    """Every (score, tokens); None is an unknown character."""
    if not text:
        yield 0.0, ()
    for end in range(1, len(text) + 1):
        score = scores.get(text[:end], unknown if end == 1 else None)
        if score is not None:
            for rest, tokens in segmentations(text[end:], scores, unknown):
                yield score + rest, (text[:end] if text[:end] in scores else None, *tokens)


@given(text=st.text(alphabet="abx ", max_size=10))
@settings(max_examples=200, deadline=None)
def test_the_best_segmentation(letters, text):
    normalized = letters._codec.normalize(text)
    assert normalized == ("▁" if text.strip() else "") + text.replace(" ", "▁")
    ways = list(segmentations(normalized, LETTERS, min(LETTERS.values()) - 10))
    best, tokens = max(ways, key=lambda way: way[0])
    found = [token if token in LETTERS else None for token in spelled(letters, text, bos=False)]
    want = [token for n, token in enumerate(tokens) if token or n == 0 or tokens[n - 1]]
    tie = sum(score == best for score, _ in ways) > 1
    assert found == want or tie, "unknown characters side by side are one token"


@pytest.fixture(scope="module")
def letters(load):
    return load(unigram(LETTERS))


@pytest.mark.parametrize("prefix, merge, words", [
    (True, True, "▁a▁b"),
    (False, True, "▁a▁b"),
    (True, False, "▁▁▁a▁▁b▁"),
    (False, False, "▁▁a▁▁b▁"),
    (None, None, "▁▁a▁▁b▁"),
])
def test_spaces(load, prefix, merge, words):
    tokenizer = load(unigram(LETTERS, add_space_prefix=prefix, remove_extra_whitespaces=merge))
    assert "".join(spelled(tokenizer, "  a  b ", bos=False)) == words
    assert "".join(spelled(tokenizer, "  ", bos=False)) == ("" if merge else "▁▁")
    assert tokenizer.encode("", bos=False) == []
    text = tokenizer.decode(tokenizer.encode("  a  b "))
    assert text == ("a b" if merge else "  a  b ")


def test_what_begins_and_ends_a_text_of_unigram(load):
    tokenizer = load(unigram(LETTERS))
    assert ((tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos, tokenizer.add_eos)
            == (None, 1, False, True))
    assert spelled(tokenizer, "a") == ["▁a", "</s>"]
    assert spelled(load(unigram(LETTERS, add_eos_token=False)), "a") == ["▁a"]
    both = load(unigram(LETTERS, bos_token_id=0, add_bos_token=True))
    assert spelled(both, "a") == ["<pad>", "▁a", "</s>"] and not both.add_sep


def test_types_of_tokens(load):
    more = {"<x>": (USER, -50), "bb": (UNUSED, -1), "[PAD7]": (UNUSED, -10000)}
    more |= {"<0x41>": (BYTE, 0), "END": (CONTROL, 0)}
    tokenizer = load(unigram(LETTERS, more=more))
    assert spelled(tokenizer, "a<x>b bb", bos=False) == ["▁a", "<x>", "▁", "b", "▁", "bb"]
    assert spelled(tokenizer, "a[PAD7]", bos=False) == ["▁a", "<unk>"]
    assert spelled(tokenizer, "aENDa", bos=False) == ["▁a", "<unk>", "a"]
    assert spelled(tokenizer, "aENDa", bos=False, special=True) == ["▁a", "END", "▁a"]
    assert tokenizer.decode(tokenizer.encode("A <x>a")) == " <x> a", "the unknown has no text"
    assert tokenizer.byte_id(0x41) == tokenizer.tokens.index("<0x41>")
    assert tokenizer.piece(tokenizer.byte_id(0x41)) == b"A"


def test_padding_does_not_make_unknown_characters_expensive(load):
    """It is 10 more than the worst normal token: here -1 - 40 beats -30 - 30."""
    pieces = {"▁": -1, "a": -30, "bx": -30, "ab": -1}
    for more in ({}, {"[PAD]": (UNUSED, -10000)}):
        assert spelled(load(unigram(pieces, more=more)), "abx", bos=False) == ["▁", "ab", "<unk>"]


def test_mask_takes_the_space_before_it(load):
    for arch, words in (("nomic-bert-moe", "▁a <mask> ▁a"), ("bert", "▁a ▁ <mask> ▁a")):
        tokenizer = load(unigram(LETTERS, more={"<mask>": (CONTROL, 0)}) | {"general.architecture": arch})
        assert spelled(tokenizer, "a <mask>a", bos=False, special=True) == words.split()


@given(text=st.text(alphabet="theandofwisr,. \n\t½ﬁÄéＡ①\u00a0", max_size=60))
@settings(max_examples=200, deadline=None)
def test_a_normalized_text_comes_back(trained, text):
    tokenizer = trained["unigram"]
    ids = tokenizer.encode(text)
    if tokenizer.vocab.unknown_id not in ids:
        assert tokenizer.decode(ids) == tokenizer._codec.normalize(text).replace("▁", " ").removeprefix(" ")


# -- the map of characters

def charsmap(table):
    """A map of characters with a block of 256 units for each node of its trie."""
    units, texts, blocks = [0] * 256, b"", 1

    def place(at, keys):
        """The unit at this place, whose children are these keys' next bytes."""
        nonlocal texts, blocks
        base, blocks = 256 * blocks, blocks + 1
        units.extend([0] * 256)
        units[at] |= (at ^ base) << 10
        if b"" in keys:
            units[at] |= 1 << 8
            units[base] = 1 << 31 | len(texts)
            texts += keys[b""].encode() + b"\0"
        for byte in sorted({key[0] for key in keys if key}):
            units[base ^ byte] |= byte
            place(base ^ byte, {key[1:]: text for key, text in keys.items() if key[:1] == bytes([byte])})

    place(0, {key.encode(): text for key, text in table.items()})
    data = np.array(units, "<u4").tobytes()
    return len(data).to_bytes(4, "little") + data + texts


TABLE = {"a": "x", "ab": "yy", "é": "e", "e\u0301": "e", "!": "", "東京": "Tokyo"}


@pytest.mark.parametrize("text, replaced", [
    ("a", "x"), ("ab", "yy"), ("abab", "yyyy"), ("acab", "xcyy"), ("é e\u0301 e", "e e e"), ("x!y", "xy"),
    ("東京東b", "Tokyo東b"), ("🦙\0a", "🦙\0x"), ("", ""), ("zzz", "zzz"),
])
def test_the_longest_sequence_is_replaced(text, replaced):
    assert Charsmap(charsmap(TABLE)).replace(text) == replaced
    assert Charsmap().replace(text) == text


@given(text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
@settings(max_examples=300, deadline=None)
def test_sentencepiece_replaces_the_same(trained, text):
    rules = sentencepiece.SentencePieceNormalizer(
        rule_name="nmt_nfkc", add_dummy_prefix=False, escape_whitespaces=False, remove_extra_whitespaces=False
    )
    assert trained["unigram"]._codec._charsmap.replace(text) == rules.normalize(text)


def test_a_map_cut_at_every_length():
    data = charsmap({"a": "x", "é": "e"})
    for length in range(len(data)):
        with pytest.raises(ValueError, match="expected .* found"):
            Charsmap(data[:length])


@given(flips=st.dictionaries(st.integers(0, 10_000), st.integers(1, 255), min_size=1, max_size=8),
       text=st.text())
@settings(max_examples=200, deadline=None)
def test_a_broken_map_is_an_error_or_a_map(flips, text):
    data = bytearray(charsmap(TABLE))
    for at, flip in flips.items():
        data[at % len(data)] ^= flip
    try:
        found = Charsmap(bytes(data))
    except ValueError:
        return
    for text in (text, "abé東京!", "東京" * 5):
        assert isinstance(found.replace(text), str)


def test_a_map_with_a_circle_ends():
    units = np.zeros(512, "<u4")
    units[0] = 256 << 10
    units[256 ^ 97] = 97                                # a leads back to the children it is one of
    units[256 ^ 97] |= 97 << 10
    found = Charsmap((4 * 512).to_bytes(4, "little") + units.tobytes() + b"\0")
    assert found.replace("aaaa") == "aaaa"


def damaged(at, value, table=TABLE):
    data = bytearray(charsmap(table))
    data[at:at + 4] = int(value).to_bytes(4, "little")
    return np.frombuffer(bytes(data), np.uint8)


# -- files that are wrong

@pytest.mark.parametrize("metadata, message", [
    (wordpiece(unknown_token_id=None), "unknown_token_id: expected one of 29 tokens, found none"),
    (wordpiece(bos_token_id=None), "bos_token_id: expected one of 29 tokens, found none"),
    (wordpiece(seperator_token_id=99), "seperator_token_id: expected one of 29 tokens, found none"),
    (wordpiece(**{"normalizer.lowercase": 1}), "normalizer.lowercase: expected bool, found int"),
    (wordpiece(**{"normalizer.strip_accents": "x"}), "normalizer.strip_accents: expected bool, found str"),
    (wordpiece(tokens=[]), "the vocabulary is empty"),
    (wordpiece(token_type=[1]), "token_type: expected 29 values, one for each token, found 1"),
    (vocabulary("t5", {"a": NORMAL}, {}), "unknown_token_id: expected one of 1 tokens, found none"),
    (unigram(LETTERS, scores=[0.0] * 3), "scores: expected 12 values, one for each token, found 3"),
    (unigram(LETTERS, scores=[0.0, float("nan")] * 6), "scores: value 1 is not a number"),
    (unigram(LETTERS, scores=[0.0] * 11 + [float("-inf")]),
     "scores: value 11: expected a finite number, found -inf"),
    (unigram(LETTERS, scores="x"), "scores: expected an array of numbers, found str"),
    (unigram(LETTERS, add_space_prefix=1), "add_space_prefix: expected bool, found int"),
    (unigram(LETTERS, remove_extra_whitespaces=1), "remove_extra_whitespaces: expected bool, found int"),
    (unigram(LETTERS, precompiled_charsmap="x"),
     "precompiled_charsmap: expected an array of bytes, found str"),
    (unigram(LETTERS, precompiled_charsmap=[1, 2]),
     "precompiled_charsmap: expected an array of bytes, found int32"),
    (unigram(LETTERS, precompiled_charsmap=np.zeros(3, np.uint8)),
     "expected a trie and replacements, found 3 bytes"),
    (unigram(LETTERS, precompiled_charsmap=damaged(0, 1 << 31)), "with a trie of 2147483648"),
    (unigram(LETTERS, precompiled_charsmap=damaged(4, 0x7FFFFC00)),
     "expected children within the trie's .* units"),
    (unigram(LETTERS, precompiled_charsmap=damaged(4 + 4 * 512, 1 << 31 | 99)),
     "expected a replacement with a zero byte after it, found none"),
    (unigram(LETTERS, precompiled_charsmap=np.frombuffer(charsmap({"a": "é"})[:-3] + b"\xc3\0", np.uint8)),
     "expected UTF-8, found the replacement"),
])
def test_wrong_vocabularies(load, metadata, message):
    with pytest.raises(FormatError, match=f"v.gguf: .*{message}"):
        load(metadata)


@given(st.data(), st.lists(st.text("ab▁ é\0", max_size=3), min_size=1, max_size=12), st.text("ab éÉ,"))
@settings(max_examples=40, deadline=None)
def test_random_vocabularies(load, data, tokens, text):
    """An error with a sentence, or ids in range and no control token."""
    types = [data.draw(st.integers(0, 7)) for _ in tokens]
    scores = [data.draw(st.floats(width=32)) for _ in tokens]
    ids = {f"{name}_token_id": data.draw(st.integers(0, 13)) for name in ("unknown", "bos", "seperator")}
    for model in ("bert", "t5"):
        metadata = vocabulary(model, dict.fromkeys(tokens, NORMAL), {"scores": scores} | ids)
        metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
        try:
            tokenizer = load(metadata)
        except FormatError as error:
            assert "v.gguf: " in str(error)
            continue
        found = tokenizer.encode(text, bos=False)
        assert all(0 <= id < len(tokens) for id in found)
        assert not set(found) & tokenizer.vocab.control - {tokenizer.vocab.unknown_id}


@pytest.mark.parametrize("scores", [None, [0.0] * 12, [3.4e38] * 12, np.arange(12)])
def test_scores_of_all_kinds(load, scores):
    tokenizer = load(unigram(LETTERS, scores=scores))
    for text in map("".join, product("ab c", repeat=3)):
        assert not text.strip() or tokenizer.decode(tokenizer.encode(text)) in (text, text.replace("c", ""))


def test_empty_tokens(load):
    for metadata in (wordpiece(), unigram(LETTERS)):
        metadata["tokenizer.ggml.tokens"][-1] = metadata["tokenizer.ggml.tokens"][-2] = ""
        tokenizer = load(metadata)
        assert tokenizer.decode(tokenizer.encode("a")) == "a"


def test_small_bytes_are_a_map_too(load):
    data = np.frombuffer(charsmap(TABLE), np.int8)
    assert (spelled(load(unigram(LETTERS, precompiled_charsmap=data)), "!a b", bos=False)
            == ["▁", "<unk>", "▁", "b"])
