"""Decoding: what ends a text, what a session keeps, and that the stream is the text."""

import random
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiny
from fakes import END, FakeModel, FakeTokenizer
from hypothesis import given
from hypothesis import strategies as st

import pybmc
from pybmc import ArgumentError, BusyError, ContextFullError, decode
from pybmc import model as model_module
from pybmc.decode import (
    Choice,
    Chooser,
    Ending,
    StopStrings,
    alone,
    common_prefix,
    eval_prompt,
    generate,
    plain_loop,
    rewind_to,
)
from pybmc.sampling import Sampler

texts = st.text(alphabet="abc", max_size=30)
stops = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=4)


def says(script, prompt="?", **model):
    """A model that answers this prompt with the script."""
    fake = FakeModel(script, **model)
    fake.asked = len(prompt.encode())
    return fake


# ---- stop strings ------------------------------------------------------------------------------------------


def pushed(chunks, strings):
    stop = StopStrings(strings)
    out = [stop.push(chunk) for chunk in chunks]
    return "".join(out) + stop.flush(), stop.found


@given(texts, stops, st.lists(st.integers(0, 30), max_size=10))
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(text, strings, cuts):
    cuts = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    chunks = [text[a:b] for a, b in zip(cuts, cuts[1:])]
    expected = (text, None)
    for end in range(1, len(text) + 1):                     # the first string to be complete, the longest of these
        complete = [s for s in strings if text[:end].endswith(s)]
        if complete:
            found = max(complete, key=len)
            expected = text[:end - len(found)], found
            break
    assert pushed(chunks, strings) == pushed([text], strings) == pushed(list(text), strings) == expected


def test_what_may_begin_a_stop_string_is_held_back_and_no_more():
    stop = StopStrings(["</s>", "\nUser:"])
    assert stop.push("hi <") == "hi "
    assert stop.push("/b>") == "</b>"
    assert stop.push("\nUs") == ""
    assert stop.push("er:tail") == "" and stop.found == "\nUser:"
    assert stop.push("more") == "" and stop.flush() == ""


@pytest.mark.parametrize("strings", [[""], [1], [None]])
def test_odd_stop_strings_are_refused(strings):
    with pytest.raises(ArgumentError, match="stop string"):
        StopStrings(strings)


# ---- prompts -----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix(a, b):
    n = common_prefix(a, b)
    assert a[:n] == b[:n] and (n in (len(a), len(b)) or a[n] != b[n])


@given(st.binary(min_size=1, max_size=40), st.binary(min_size=1, max_size=40))
def test_a_session_keeps_what_two_prompts_share(first, second):
    session = FakeModel().session()
    session.eval(list(first))
    kept = rewind_to(session, list(second))
    assert kept == min(common_prefix(first, second), len(second) - 1) == session.position
    assert session.eval(list(second)[kept:]).tolist() == FakeModel().session().eval(list(second)).tolist()


def test_long_prompts_are_evaluated_in_pieces_that_can_be_interrupted():
    model, tokens, calls = FakeModel(), list(range(200)) * 10, []
    session = model.session()
    logits = eval_prompt(session, tokens, lambda *call: calls.append(call), seconds=0)
    assert logits.tolist() == model.logits(tokens).tolist() and session.tokens == tokens
    assert calls[0] == (64, 2000) and calls[-1] == (2000, 2000) and len(calls) > 100

    def interrupt(done, total):
        if done > 1000:
            raise KeyboardInterrupt

    session = model.session()
    with pytest.raises(KeyboardInterrupt):
        list(generate(model, tokens, session=session, progress=interrupt))
    assert 0 < session.position < 2000
    evaluated = session.evaluated
    again = [t.id for t in generate(model, tokens, 5, session=session)]
    assert session.evaluated - evaluated == 2000 - evaluated + 4
    assert again == [t.id for t in generate(model, tokens, 5)]


@pytest.mark.parametrize("prompt", ["", [], ()])
def test_an_empty_prompt_is_refused(prompt):
    with pytest.raises(ArgumentError, match="empty"):
        generate(FakeModel(), prompt)


def test_a_prompt_longer_than_the_context_is_refused_before_any_work():
    model = FakeModel(context=8)
    with pytest.raises(ContextFullError, match="9 tokens.*8"):
        next(generate(model, list(range(9))))
    assert model.sessions[0].evaluated == 0 and model.sessions[0].closed


# ---- generation --------------------------------------------------------------------------------------------


def naive(model, prompt, n):
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(model.logits(tokens).argmax()))
    return tokens[len(prompt):]


@given(st.binary(min_size=1, max_size=20), st.integers(0, 12))
def test_greedy_text_is_what_a_naive_loop_finds(prompt, n):
    model = FakeModel()
    tokens = list(generate(model, list(prompt), n, stop_tokens=()))
    assert [t.id for t in tokens] == naive(model, prompt, n)
    assert "".join(t.text for t in tokens) == FakeTokenizer().decode(t.id for t in tokens)
    assert [t.finish_reason for t in tokens] == [None] * (n - 1) + ["length"] * (n > 0)
    assert model.sessions[0].closed


@given(st.binary(min_size=1, max_size=20), st.binary(min_size=1, max_size=20), st.floats(0.1, 2), st.integers())
def test_a_session_with_a_past_gives_the_same_text(before, prompt, temperature, seed):
    model = FakeModel()
    session = model.session()
    settings = {"temperature": temperature, "seed": seed, "repeat_penalty": 1.2, "stop_tokens": ()}
    list(generate(model, list(before), 3, session=session))
    used = list(generate(model, list(prompt), 8, session=session, **settings))
    assert used == list(generate(model, list(prompt), 8, **settings))
    assert not session.closed


def test_a_second_turn_evaluates_only_what_is_new():
    model = FakeModel()
    session = model.session()
    first = list(generate(model, "first question", 10, session=session, stop_tokens=()))
    before = session.evaluated
    turn = generate(model, [*b"first question", *(t.id for t in first), *b"next"], 1, session=session)
    list(turn)
    assert session.evaluated - before == 1 + len(b"next")       # the last choice had not been evaluated
    assert turn.stats.reused_tokens == turn.stats.prompt_tokens - 5


def test_the_models_end_token_ends_the_text_and_is_not_part_of_it():
    tokens = list(generate(says("done"), "?"))
    assert "".join(t.text for t in tokens) == "done"
    assert tokens[-1].id == END and tokens[-1].text == "" and tokens[-1].finish_reason == "stop"
    assert len(list(generate(says("done"), "?", 9, stop_tokens=()))) == 9
    assert "".join(t.text for t in generate(says("done"), "?", stop_tokens=[ord("n")])) == "do"


def test_a_stop_string_ends_the_text_before_it():
    tokens = list(generate(says("one two three"), "?", stop=["two"]))
    assert "".join(t.text for t in tokens) == "one " and tokens[-1].finish_reason == "stop"
    assert len(tokens) == len("one two")
    held = list(generate(says("one tw"), "?", stop="two"))
    assert "".join(t.text for t in held) == "one tw" and held[-1].finish_reason == "stop"
    cut = list(generate(says("one two"), "?", 6, stop="two"))
    assert "".join(t.text for t in cut) == "one tw" and cut[-1].finish_reason == "length"


def test_text_never_holds_half_a_character():
    tokens = list(generate(says("für 5 € 🙂"), "?"))
    assert "".join(t.text for t in tokens) == "für 5 € 🙂"
    assert "\ufffd" not in "".join(t.text for t in tokens)
    cut = list(generate(says("€"), "?", 2))
    assert [t.text for t in cut] == ["", "\ufffd"]


def test_a_full_context_ends_the_text():
    model = FakeModel(context=10)
    tokens = list(generate(model, "123456", None, stop_tokens=()))
    assert len(tokens) == 5 and tokens[-1].finish_reason == "context"       # the last one needs no row
    assert [t.id for t in tokens] == naive(model, b"123456", 5)


def test_logprobs_are_the_models_own():
    model = FakeModel()
    token = next(generate(model, "x", temperature=1.5, seed=4, repeat_penalty=3.0))
    logits = model.logits(list(b"x")).astype(float)
    assert token.logprob == pytest.approx(logits[token.id] - np.log(np.exp(logits).sum()), abs=1e-5)


def test_leaving_early_closes_the_session():
    model = FakeModel()
    stream = generate(model, "x", stop_tokens=())
    next(stream)
    stream.close()
    assert model.sessions[0].closed and stream.stats.predicted_tokens == 1


def test_stats_count():
    stream = generate(says("abc"), "?")
    list(stream)
    stats = stream.stats
    assert (stats.prompt_tokens, stats.reused_tokens, stats.predicted_tokens) == (1, 0, 4)
    assert stats.prompt_s > 0 and stats.predicted_s > 0 and stats.predicted_tok_s > 0


@pytest.mark.parametrize("settings", [{"heat": 1}, {"max_tokens": -1}, {"temperature": -1}, {"stop": [""]}])
def test_wrong_settings_are_refused_at_once(settings):
    with pytest.raises(ArgumentError):
        generate(FakeModel(), "x", **settings)


# ---- a real session ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    with pybmc.Model(tiny.model("llama"), threads=1) as model:
        yield model


@pytest.mark.long
def test_interrupts_anywhere_leave_a_session_that_works(model):
    """Ctrl-C mostly comes while the library computes, and is heard right after it."""
    def interrupt(*_):
        raise KeyboardInterrupt

    prompt, rng = "Once upon a time", random.Random(0)
    want = [t.id for t in generate(model, prompt, 40, stop_tokens=())]
    before = signal.signal(signal.SIGALRM, interrupt)
    heard = 0
    try:
        with model.session() as session:
            for _ in range(300):
                try:
                    signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 3e-3))
                    got = [t.id for t in generate(model, prompt, 40, session=session, stop_tokens=())]
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    assert got == want
                except KeyboardInterrupt:
                    heard += 1
                assert len(session.tokens) == session.position
                session.rewind(rng.randrange(session.position + 1))
            assert heard > 30
            assert [t.id for t in generate(model, prompt, 40, session=session, stop_tokens=())] == want
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("left", [1, 2, 7, 40, 60])
def test_the_librarys_plain_tokens_are_those_of_one_pass_after_the_other(model, temperature, left, monkeypatch):
    """Text, logprobs, and what the session holds when the reader leaves, or the context or the count ends the text."""
    calls, chooser, prompt = [], Chooser(Sampler(temperature=temperature, seed=3)), model.tokenizer.encode("the mouse")
    monkeypatch.setattr(decode, "BULK_SECONDS", 60)
    monkeypatch.setattr(decode, "speculate", lambda *args, **more: calls.append(found := model_module.speculate(*args, **more)) or found)
    with model.session(len(prompt) + 50) as one, model.session(len(prompt) + 50) as other:
        loop = alone(plain_loop(list(prompt), eval_prompt(one, prompt), chooser), one)
        expected = [next(loop) for _ in range(min(left, 51))]
        text = generate(model, prompt, 60, session=other, temperature=temperature, seed=3, stop_tokens=())
        found = [token for _, token in zip(range(left), text)]
        text.close()
        assert [(t.id, t.logprob) for t in found] == [(c.id, c.logprob) for c in expected]
        assert found[-1].finish_reason == ("context" if left == 60 else None)
        assert other.tokens == one.tokens == [*prompt, *(t.id for t in found[:-1])]
    assert len(calls) == (left > 1) and all(not round.n_checked for call in calls for round in call)


def test_a_session_serves_one_thread_at_a_time(model):
    with model.session() as session:
        with session._claimed(), ThreadPoolExecutor(1) as other:
            with pytest.raises(BusyError, match="another thread"):
                other.submit(session.eval, [1]).result()
        with pytest.raises(BusyError, match="twice"):
            pybmc.eval_batch([(session, [1], "none"), (session, [2], "none")])
        assert session.position == 0 and session.eval([1]) is not None


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_chat_messages_are_written_with_the_models_template(model, temperature):
    from pybmc.chat import ChatTemplate

    messages = [{"role": "user", "content": "hello"}]
    stream = generate(model, messages, 6, temperature=temperature, seed=3)
    assert stream.prompt == ChatTemplate(None, model.tokenizer).encode(messages)
    assert [t.id for t in stream] == [t.id for t in generate(model, stream.prompt, 6, temperature=temperature, seed=3)]


def test_a_special_token_in_a_raw_prompt_counts(model):
    text = model.tokenizer.tokens[model.tokenizer.eos_id]
    assert model.tokenizer.eos_id in generate(model, f"a{text}b", 0).prompt


# ---- who has the session -----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "seed": 2}, {"spec": "ngram"}, {"logit_bias": {5: -1.0}}], ids=repr)
@pytest.mark.parametrize("read", [1, 5])
def test_the_next_generation_in_a_session_ends_the_one_before(model, settings, read):
    prompts = ["Once upon a time", "Once upon a mouse"]
    want = [[t.id for t in generate(model, p, 12, stop_tokens=(), **settings)] for p in prompts]
    for second in (0, 1):
        with model.session() as session:
            one = generate(model, prompts[0], 12, session=session, stop_tokens=(), **settings)
            assert [next(one).id for _ in range(read)] == want[0][:read]
            other = generate(model, prompts[second], 12, session=session, stop_tokens=(), **settings)
            found = [next(other).id]
            for _ in range(2):
                with pytest.raises(BusyError, match="another one began in its session"):
                    next(one)
            one.close()
            assert found + [t.id for t in other] == want[second]
            assert session.tokens == [*other.prompt, *want[second][:-1]]


def test_a_generation_that_was_left_is_in_nobodys_way(model):
    with model.session() as session:
        text = [t.id for t in generate(model, "Once", 8, session=session, stop_tokens=())]
        stream = generate(model, "Once", 8, session=session, stop_tokens=())
        for token in stream:
            break
        stream = generate(model, "Once", 8, session=session, stop_tokens=())      # the one before goes now
        assert [t.id for t in stream] == text and list(stream) == []
        ended = generate(model, "Once", 8, session=session, stop_tokens=())
        list(ended)
        list(generate(model, "Twice", 8, session=session))
        assert list(ended) == []


@pytest.mark.parametrize("use", [lambda s: s.eval([5]), lambda s: s.rewind(0), lambda s: s.draft([5], 2),
                                 lambda s: (s.rewind(s.position - 1), s.eval([5]))])
def test_a_generation_does_not_go_on_after_other_calls(model, use):
    with model.session() as session:
        stream = generate(model, "Once upon", 8, session=session, stop_tokens=())
        next(stream), session.reserve(4), session.tokens, session.arena_stats(), next(stream)
        use(session)
        with pytest.raises(BusyError, match="cannot go on: the session was used by other calls"):
            next(stream)


def test_a_generation_serves_one_thread_at_a_time(model):
    with model.session() as session, ThreadPoolExecutor(1) as other:
        def progress(*_):
            for call in (lambda: next(stream), stream.close, lambda: next(generate(model, "x", 2, session=session))):
                with pytest.raises(BusyError, match="in use by another thread"):
                    other.submit(call).result()
            calls.append(1)

        calls = []
        stream = generate(model, "Once upon", 3, session=session, progress=progress, stop_tokens=())
        assert len(list(stream)) == 3 and calls


def test_closed_models_and_sessions_say_so():
    model = pybmc.Model(tiny.model("llama"), threads=1)
    session = model.session()
    stream = generate(model, "Once", 8, session=session, stop_tokens=())
    next(stream)
    session.close()
    with pytest.raises(pybmc.ClosedError, match="session is closed"):
        next(stream)
    model.close()
    for call in (lambda: next(generate(model, "x")), lambda: next(pybmc.generate_batch(model, ["x"]))):
        with pytest.raises(pybmc.ClosedError, match="is closed"):
            call()


# ---- BOS ---------------------------------------------------------------------------------------------------


def test_a_prompt_that_spells_the_bos_gets_no_second_one(caplog):
    with pybmc.Model(tiny.model("phi3"), threads=1) as model:
        bos = model.tokenizer.bos_id
        text = model.tokenizer.tokens[bos]
        plain = generate(model, "hi", 0).prompt
        assert plain[0] == bos and not caplog.records
        spelled = generate(model, f"{text}hi", 0).prompt
        assert spelled == [bos, *model.tokenizer.encode(f"{text}hi", bos=False, special=True)[1:]]
        assert f"begins with the BOS token {text!r}" in caplog.text
        assert generate(model, [bos, bos, 5], 0).prompt == [bos, bos, 5]          # ids are taken as they are


# ---- stop strings that name control tokens -----------------------------------------------------------------


class Names:
    """A tokenizer of which only the names of tokens that are not shown are asked."""

    def silent_names(self):
        return {7: "<end>", 8: "<turn>", 9: "<other>"}


def heard(pieces, strings):
    """pieces: shown texts, and ids of tokens that are not shown."""
    stop, out = StopStrings(strings, Names()), ""
    for piece in pieces:
        if isinstance(piece, str):
            out += stop.push(piece)
        elif piece in stop.names:
            out += stop.push(stop.names[piece], hidden=True)
    return out + stop.flush(), stop.found


@pytest.mark.parametrize("pieces, strings, text, found", [
    (["ab", 7, "c"], ["<end>"], "ab", "<end>"),
    (["ab", 8, "c"], ["<end>"], "abc", None),
    (["ab\n", 7, "\n", 8, "user", "x"], ["\n<end>\n<turn>user"], "ab", "\n<end>\n<turn>user"),
    (["ab\n", 7, "\n", 8, "tool", "x"], ["\n<end>\n<turn>user"], "ab\n\ntoolx", None),
    (["a", 7, "b", "c"], ["ab", "x<end>"], "", "ab"),
    (["a", 7, "b", "c"], ["bc", "a<end>b"], "", "a<end>b"),
    (["<end>", "c"], ["<end>"], "", "<end>"),
    (["a<", "e"], ["<end>", "<turn>"], "a<e", None),
    (["ab", 7], [], "ab", None),
])
def test_stop_strings_may_name_tokens_that_are_not_shown(pieces, strings, text, found):
    assert heard(pieces, strings) == (text, found)
    letters = [c for piece in pieces for c in (piece if isinstance(piece, str) else [piece])]
    assert heard(letters, strings) == (text, found)


@pytest.mark.parametrize("stop_tokens", [None, ()])
@pytest.mark.parametrize("stop, text", [("<|im_start|>", "ab"), (["b<|im_start|>"], "a"), ("<|im_end|>", "ab")])
def test_a_control_token_that_a_stop_string_names_ends_the_text(model, stop, text, stop_tokens):
    name = "<|im_end|>" if stop == "<|im_end|>" else "<|im_start|>"
    tokenizer = model.tokenizer
    ids = [*tokenizer.encode("ab", bos=False), tokenizer.vocab.ids[name], *tokenizer.encode("c", bos=False)]
    stops = tokenizer.stop_ids if stop_tokens is None else frozenset()
    ending = Ending(0, None, tokenizer.stream(), 99, StopStrings(stop, tokenizer), stops)
    tokens = list(ending.tokens(Choice(id, -1.0) for id in ids))
    assert "".join(token.text for token in tokens) == text and tokens[-1].finish_reason == "stop"
    assert tokens[-1].id == tokenizer.vocab.ids[name]


def test_generate_stops_at_a_control_token_by_its_name(model):
    id = next(id for id in sorted(model.tokenizer.vocab.control) if id not in model.tokenizer.stop_ids)
    settings = {"stop": [model.tokenizer.tokens[id]], "logit_bias": {id: 1e6}}
    assert [token.finish_reason for token in generate(model, "Once", 8, **settings)] == ["stop"]
    batch = pybmc.generate_batch(model, ["Once"], 8, **settings)
    assert [token.finish_reason for _, token in batch] == ["stop"]
