"""A chat's memory: which tokens are evaluated again, what is forgotten, and what a file keeps."""

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

import pybmc
from pybmc import ArgumentError, ContextFullError, FormatError
from pybmc.chat.conversation import Conversation, resume


@pytest.fixture(scope="module")
def model():
    with pybmc.Model(tiny.model("llama"), threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def letters(model):
    """A bias to whole letters: random weights would also write halves of characters,
    which no text can repeat."""
    tokenizer = model.tokenizer
    return {i: float("-inf") for i in range(tokenizer.vocab_size)
            if tokenizer.is_control(i) or not tokenizer.piece(i).strip().isalpha()}


@pytest.fixture
def talk(model, letters):
    with model.session(context=600) as session:
        yield Conversation(model, session, "Be brief.", max_tokens=12, temperature=1.0, seed=5,
                           logit_bias=letters)


def said(stream):
    return "".join(token.text for token in stream)


def test_messages_are_remembered_in_order(talk):
    answer = said(talk.ask("Who are you?"))
    assert talk.messages == [{"role": "system", "content": "Be brief."},
                             {"role": "user", "content": "Who are you?"},
                             {"role": "assistant", "content": answer}]


def test_a_turn_evaluates_only_what_is_new(talk):
    """Random weights write words in tokens that the tokenizer would not choose:
    they must be kept all the same."""
    for turn in range(4):
        held = talk.session.position
        answer = said(talk.ask(f"question {turn}"))
        assert answer
        kept = talk.stats.reused_tokens
        assert kept == held, "rows of the conversation were evaluated again"
        new = talk.stats.prompt_tokens - kept
        assert new < 60    # the message, the marks around it, the answer's last token


def test_what_a_session_held_does_not_change_the_answer(model, talk):
    said(talk.ask("first"))
    before = [dict(m) for m in talk.messages]
    answer = said(talk.ask("second"))
    prompt = talk._ids[:talk.stats.prompt_tokens]
    fresh = said(pybmc.generate(model, prompt, **talk.settings))
    assert answer == fresh and before == talk.messages[:3]


def test_again_answers_with_another_seed_and_undo_forgets(talk):
    first = said(talk.ask("tell"))
    n = len(talk.messages)
    assert said(talk.again()) != first and len(talk.messages) == n
    assert talk.undo() == "tell" and [m["role"] for m in talk.messages] == ["system"]
    for command in (talk.undo, lambda: said(talk.again())):
        with pytest.raises(ArgumentError, match="nothing"):
            command()


def test_an_answer_that_is_interrupted_stays_as_far_as_it_came(talk):
    stream = talk.ask("tell")
    text = next(stream).text + next(stream).text
    stream.close()
    assert talk.messages[-1] == {"role": "assistant", "content": text}
    assert said(talk.ask("go on"))


@pytest.mark.parametrize("ask", ["ask", "again"])
def test_an_interrupt_before_the_first_token_leaves_things_as_they_were(talk, ask):
    def interrupt(done, total):
        raise KeyboardInterrupt

    said(talk.ask("before"))
    messages = [dict(m) for m in talk.messages]
    with pytest.raises(KeyboardInterrupt):
        said(talk.ask("never", interrupt) if ask == "ask" else talk.again(interrupt))
    assert talk.messages == messages


def test_the_oldest_turns_make_room(model):
    with model.session(context=300) as session:
        talk = Conversation(model, session, "Be brief.", max_tokens=20)
        dropped = 0
        for turn in range(20):
            said(talk.ask(f"question {turn}"))
            dropped += talk.dropped
            assert talk.messages[0]["role"] == "system" and talk.messages[-2]["content"] == f"question {turn}"
        assert dropped >= 2 and len(talk.messages) == 1 + 40 - dropped
        with pytest.raises(ContextFullError, match="room for 300"):
            said(talk.ask("word " * 400))
        assert said(talk.ask("short again"))


def test_a_conversation_can_be_saved_and_taken_up(talk, tmp_path):
    said(talk.ask("für später 🙂"))
    talk.save(tmp_path / "chat.json")
    messages = list(talk.messages)
    talk.clear()
    assert [m["role"] for m in talk.messages] == ["system"]
    talk.load(tmp_path / "chat.json")
    assert talk.messages == messages


STRANGE = ["", "[]", "{}", '{"messages": 3}', '{"messages": [{"role": "user"}]}', "\0",
           "[" * 10**5, "GGUF\3\0\0\0", '{"messages": {}}', '{"messages": ["a"]}', '{"messages": [[]]}',
           '{"messages": null}', "caf\udce9", '{"messages": [{"role": "user", "content": 5}]}',
           '{"messages": [{"role": "user", "content": null}]}',
           '{"messages": [{"role": "tool", "content": "a"}]}',
           '{"messages": [{"role": ["user"], "content": "a"}]}', '{"messages": ' + "[" * 10**5,
           '{"messages": [' + "9" * 5000 + "]}", '{"messages": [{"role": 1e999}]}']


@pytest.mark.parametrize("content", STRANGE)
def test_a_file_that_is_no_conversation_is_refused(talk, tmp_path, content):
    """.. by load(), and it stays as it is where save() is to write over it."""
    path = tmp_path / "bad"
    path.write_bytes(data := content.encode("utf-8", "surrogateescape"))
    before = list(talk.messages)
    for command in (talk.load, talk.save):
        with pytest.raises(FormatError, match="bad is not a saved conversation"):
            command(str(path))
    assert talk.messages == before and path.read_bytes() == data and len(list(tmp_path.iterdir())) == 1


def test_a_conversation_that_the_template_refuses_is_not_taken_up(model, tmp_path):
    path = tmp_path / "chat.json"
    path.write_text('{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}')
    source = ("{% if messages[0].role == 'assistant' %}{{ raise_exception('a user begins') }}{% endif %}"
              "{{ messages[0].content }}")
    with model.session() as session:
        talk = Conversation(model, session, chat_template=source)
        with pytest.raises(FormatError, match="a user begins"):
            talk.load(path)
        assert talk.messages == []


def test_save_replaces_only_what_it_wrote(talk, tmp_path):
    path, link = tmp_path / "chat.json", tmp_path / "link.json"
    talk.save(path)
    path.chmod(0o600)
    link.symlink_to(path)
    said(talk.ask("more"))
    talk.save(link)
    assert link.is_symlink() and '"more"' in path.read_text() and path.stat().st_mode & 0o777 == 0o600
    for other in (tmp_path, "/dev/null"):
        with pytest.raises(FormatError, match="no regular file: it stays as it is"):
            talk.save(other)
    with pytest.raises(OSError):
        talk.save(tmp_path / "no folder" / "chat.json")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["chat.json", "link.json"]


def test_a_save_that_fails_leaves_the_old_file(talk, tmp_path, monkeypatch):
    path = tmp_path / "chat.json"
    talk.save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    said(talk.ask("more"))
    with pytest.raises(OSError, match="No space"):
        talk.save(path)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["chat.json"]


def test_halves_of_surrogate_pairs_in_a_file_are_replaced(talk, tmp_path):
    path = tmp_path / "chat.json"
    path.write_text('\ufeff{"messages": [{"role": "user", "content": "a\\ud83d b\\ud83d\\ude42"}]}')
    talk.load(path)
    assert talk.messages == [{"role": "user", "content": "a\ufffd b\U0001f642"}]
    assert said(talk.again())


def test_a_message_that_is_no_text_leaves_the_conversation(talk):
    said(talk.ask("before"))
    messages = list(talk.messages)
    with pytest.raises(ArgumentError, match="half a surrogate pair"):
        said(talk.ask("caf\udce9"))
    assert talk.messages == messages and said(talk.ask("after"))


def test_a_conversation_takes_a_template_and_its_variables(model):
    with model.session() as session:
        talk = Conversation(model, session, chat_template="{{ messages[0].content }}{{ word }}",
                            chat_template_kwargs={"word": "b"}, max_tokens=2)
        said(talk.ask("a "))
        assert talk.prompt == model.tokenizer.encode("a b")
        talk.variables["word"] = "c"
        said(talk.again())
        assert talk.prompt == model.tokenizer.encode("a c")


class Letters:
    """Tokens are strings of a and b; 100 is a control token that is spelled "b"."""

    pieces = {i: p.encode() for i, p in enumerate(["a", "b", "aa", "ab", "ba", "bb", "aba"])} | {100: b"b"}

    def piece(self, id):
        return self.pieces[id]

    def is_control(self, id):
        return id == 100


ids = st.lists(st.sampled_from(list(Letters.pieces)), max_size=8)


def spelling(tokens):
    return "".join("*" if t == 100 else Letters.pieces[t].decode() for t in tokens)


@given(ids, ids)
def test_resume_keeps_what_is_held_and_never_changes_the_text(held, new):
    result = resume(Letters(), held, new)
    assert spelling(result) == spelling(new)
    cuts = {spelling(new[:n]) for n in range(len(new) + 1)}
    assert (result[:len(held)] == held) if spelling(held) in cuts else (result == new)
