"""generate(): what ends a text, what a session keeps, and that the stream is the text."""

import random
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

import pybmc
from pybmc import ArgumentError, BusyError, ContextFullError
from pybmc.chat.generate import generate
from pybmc.engine.text import Ending, StopStrings
from pybmc.spec.speculation import Speculation

texts = st.text(alphabet="abc", max_size=30)
stops = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=4)


@pytest.fixture(scope="module")
def model():
    with pybmc.Model(tiny.model("llama"), threads=1) as model:
        yield model


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
    for end in range(1, len(text) + 1):    # the first string to be complete, the longest of these
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


# ---- the end of a text -------------------------------------------------------------------------------------


def said(model, data, stop=(), max_tokens=99, room=99, stop_ids=None):
    """What tokens of one byte each become: their texts, and the reasons for the end."""
    tokenizer = model.tokenizer
    bytes_of = {tokenizer.piece(id): id for id in range(tokenizer.vocab_size) if not tokenizer.is_control(id)}
    ids = [bytes_of[bytes([b])] for b in data] + [tokenizer.eos_id]
    stop_ids = tokenizer.stop_ids if stop_ids is None else stop_ids
    ending = Ending(tokenizer.stream(), max_tokens, room, StopStrings(stop, tokenizer), stop_ids)
    found = []
    for id in ids:
        found.append(ending.token(id, -1.0))
        if found[-1].finish_reason:
            break
    return [t.text for t in found], [t.finish_reason for t in found if t.finish_reason]


def test_the_models_end_token_ends_the_text_and_is_not_part_of_it(model):
    assert said(model, b"done") == (["d", "o", "n", "e", ""], ["stop"])
    assert said(model, b"done", stop_ids=frozenset())[1] == []
    n = model.tokenizer.encode("n", bos=False)
    assert said(model, b"done", stop_ids=frozenset(n)) == (["d", "o", ""], ["stop"])


def test_a_stop_string_ends_the_text_before_it(model):
    for stop, text, n in (("two", "one ", 7), ("two three", "one ", 13), ("xyz", "one two three", 14)):
        found, reasons = said(model, b"one two three", [stop])
        assert "".join(found) == text and reasons == ["stop"] and len(found) == n
    found, reasons = said(model, b"one two", ["two"], 6)
    assert "".join(found) == "one tw" and reasons == ["length"]


def test_the_first_bound_that_is_reached_gives_the_reason(model):
    assert said(model, b"abc", max_tokens=2) == (["a", "b"], ["length"])
    assert said(model, b"abc", room=2) == (["a", "b"], ["context"])
    assert said(model, b"abc", max_tokens=2, room=2)[1] == ["length"]


def test_text_never_holds_half_a_character(model):
    text = "f\u00fcr 5 \u20ac \U0001f642"
    found, _ = said(model, text.encode())
    assert "".join(found) == text and not any("\ufffd" in part for part in found)
    assert said(model, "\u20ac".encode(), max_tokens=2)[0] == ["", "\ufffd"]


# ---- prompts and sessions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [[], ()])
def test_an_empty_prompt_is_refused(model, prompt):
    with pytest.raises(ArgumentError, match="empty"):
        generate(model, prompt)


def test_a_prompt_longer_than_the_context_is_refused_before_any_work(model):
    with model.session(8) as session, pytest.raises(ContextFullError, match="9 tokens.*8"):
        next(generate(model, list(range(9)), session=session))
    assert session.uses == 0


def test_a_full_context_ends_the_text(model):
    with model.session(10) as session:
        tokens = list(generate(model, [1, 2, 3, 4, 5, 6], None, session=session, stop_tokens=()))
    assert len(tokens) == 5 and tokens[-1].finish_reason == "context"       # the last one needs no row
    assert [t.id for t in tokens] == [t.id for t in generate(model, [1, 2, 3, 4, 5, 6], 5, stop_tokens=())]


def test_a_session_keeps_what_two_prompts_share(model):
    rng = random.Random(0)
    with model.session() as session:
        for _ in range(30):
            held = session.tokens
            prompt = held[:rng.randint(0, len(held))] + [rng.randrange(401) for _ in range(rng.randint(1, 9))]
            shared = next((i for i, (a, b) in enumerate(zip(held, prompt)) if a != b),
                          min(len(held), len(prompt)))
            settings = {"temperature": rng.choice([0.0, 0.9]), "repeat_penalty": 1.2, "seed": 3,
                        "stop_tokens": ()}
            stream = generate(model, prompt, 8, session=session, **settings)
            found = list(stream)
            assert stream.stats.reused_tokens == min(shared, len(prompt) - 1)
            plain = generate(model, prompt, 8, spec="off", **settings)
            assert [t[:3] for t in found] == [t[:3] for t in plain]
            assert session.tokens == [*prompt, *(t.id for t in found[:-1])]


def test_a_long_prompt_that_was_interrupted_goes_on_where_it_was(model):
    def interrupt(done, total):
        calls.append((done, total))
        raise KeyboardInterrupt

    prompt, calls = list(range(300)), []
    with model.session() as session:
        with pytest.raises(KeyboardInterrupt):
            list(generate(model, prompt, session=session, progress=interrupt))
        held = session.position
        assert calls == [(held, 300)] and held == 64
        again = generate(model, prompt, 5, session=session)
        assert [t.id for t in again] == [t.id for t in generate(model, prompt, 5)]
        assert again.stats.reused_tokens == held


def test_leaving_early_closes_the_session(model):
    before = sum(bool(s._handle) for s in model._sessions)
    stream = generate(model, "x", stop_tokens=())
    next(stream)
    stream.close()
    stream.close()
    assert sum(bool(s._handle) for s in model._sessions) == before and list(stream) == []


@pytest.mark.parametrize("spec", ["off", "ngram", "auto"])
@pytest.mark.parametrize("leaves", [1, 2, 7, 40])
def test_a_reader_may_leave_at_any_token(model, spec, leaves):
    """The session holds what was read, without its last token."""
    want = [t.id for t in generate(model, "the mouse", 60, stop_tokens=())]
    with model.session() as session:
        draft = model if spec == "auto" else None
        stream = generate(model, "the mouse", 60, session=session, spec=spec, draft=draft, stop_tokens=())
        found = [token.id for _, token in zip(range(leaves), stream)]
        stream.close()
        assert found == want[:leaves]
        assert session.tokens == [*stream.prompt, *found[:-1]]
        more = generate(model, [*stream.prompt, *found], 9, session=session, stop_tokens=())
        assert [t.id for t in more] == want[leaves:leaves + 9]


def test_stats_count(model):
    stream = generate(model, [1, 2, 3], 4, spec="off", stop_tokens=())
    tokens, stats = list(stream), stream.stats
    assert (stats.prompt_tokens, stats.reused_tokens, stats.predicted_tokens, stats.rounds) == (3, 0, 4, 3)
    assert stats.prompt_s > 0 and stats.predicted_s > 0 and stats.predicted_tok_s > 0 and len(tokens) == 4


@pytest.mark.long
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("guesses", [0, 5])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupts_anywhere_leave_a_session_that_works(model, temperature, guesses):
    """Ctrl-C mostly comes while the library computes, and is heard right after it."""
    def interrupt(*_):
        raise KeyboardInterrupt

    prompt, rng = "Once upon a time", random.Random(0)
    settings = {"stop_tokens": (), "temperature": temperature}
    want = [t.id for t in generate(model, prompt, 40, **settings)]
    draft = Speculation(model, model, "draft", fixed=guesses) if guesses else None
    before = signal.signal(signal.SIGALRM, interrupt)
    heard = 0
    try:
        with model.session() as session:
            for _ in range(150):
                try:
                    signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 3e-3))
                    got = [t.id for t in generate(model, prompt, 40, session=session, draft=draft,
                                                  **settings)]
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    assert got == want
                except KeyboardInterrupt:
                    heard += 1
                assert len(session.tokens) == session.position
                session.rewind(rng.randrange(session.position + 1))
            assert heard > 15
            assert [t.id for t in generate(model, prompt, 40, session=session, draft=draft,
                                           **settings)] == want
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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
    from pybmc.chat.template import ChatTemplate

    messages = [{"role": "user", "content": "hello"}]
    stream = generate(model, messages, 6, temperature=temperature, seed=3)
    assert stream.prompt == ChatTemplate(None, model.tokenizer).encode(messages)
    assert [t.id for t in stream] == [t.id for t in generate(model, stream.prompt, 6, temperature=temperature,
                                                             seed=3)]


def test_a_special_token_in_a_raw_prompt_counts(model):
    text = model.tokenizer.tokens[model.tokenizer.eos_id]
    assert model.tokenizer.eos_id in generate(model, f"a{text}b", 0).prompt


# ---- who has the session -----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "seed": 2}, {"spec": "ngram"},
                                      {"logit_bias": {5: -1.0}}], ids=repr)
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


@pytest.mark.parametrize("use", [lambda s: s.eval([5]), lambda s: s.rewind(0), lambda s: s.sync([5]),
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
            for call in (lambda: next(stream), stream.close):
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
    for call in (lambda: generate(model, "x"), lambda: pybmc.generate_batch(model, ["x"])):
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
@pytest.mark.parametrize("stop, text", [("<|im_start|>", "ab"), (["b<|im_start|>"], "a"),
                                        ("<|im_end|>", "ab")])
def test_a_control_token_that_a_stop_string_names_ends_the_text(model, stop, text, stop_tokens):
    name = "<|im_end|>" if stop == "<|im_end|>" else "<|im_start|>"
    tokenizer = model.tokenizer
    ids = [*tokenizer.encode("ab", bos=False), tokenizer.vocab.ids[name], *tokenizer.encode("c", bos=False)]
    stops = tokenizer.stop_ids if stop_tokens is None else frozenset()
    ending, tokens = Ending(tokenizer.stream(), 99, 99, StopStrings(stop, tokenizer), stops), []
    while not tokens or not tokens[-1].finish_reason:
        tokens.append(ending.token(ids[len(tokens)], -1.0))
    assert "".join(token.text for token in tokens) == text and tokens[-1].finish_reason == "stop"
    assert tokens[-1].id == tokenizer.vocab.ids[name]


def test_generate_stops_at_a_control_token_by_its_name(model):
    id = next(id for id in sorted(model.tokenizer.vocab.control) if id not in model.tokenizer.stop_ids)
    settings = {"stop": [model.tokenizer.tokens[id]], "logit_bias": {id: 1e6}}
    assert [token.finish_reason for token in generate(model, "Once", 8, **settings)] == ["stop"]
    batch = pybmc.generate_batch(model, ["Once"], 8, **settings)
    assert [token.finish_reason for _, token in batch] == ["stop"]
