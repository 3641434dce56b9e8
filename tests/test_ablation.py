"""The simulation that weighs the constants of speculative decoding:
the library's own decisions, repeatable."""

import shutil

import pytest

from tools import ablation

pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")


@pytest.fixture(scope="module")
def simulator(tmp_path_factory):
    return ablation.Simulator(tmp_path_factory.mktemp("simulator") / "usual")


def seconds(simulator, name, **sources):
    task = next(task for task in ablation.TASKS if task.name == name)
    return sum(simulator.run(task, ablation.arrays(task, seed), **sources).seconds for seed in range(8))


PLAIN = {"ngrams": False, "drafts": False}


EDITS = [edit for constant in ablation.CONSTANTS for edit in constant.edits().values()]


@pytest.mark.parametrize("edit", [*EDITS, *ablation.MECHANISMS.values()], ids=lambda edit: edit.text)
def test_each_edit_changes_one_place(edit):
    source = (ablation.ROOT / "native" / edit.file).read_text()
    assert ablation.edited(source, edit) != source


def test_an_edit_that_fits_nowhere_is_refused():
    with pytest.raises(ValueError, match="expected it once in policy.c, found it 0 times"):
        ablation.edited("int x;", ablation.Edit("policy.c", "LATENCY", "y"))


@pytest.mark.parametrize("name, gain", [("write code", 1.4), ("rewrite", 3.5), ("narrow passes pay", 2.0),
                                        ("batch of 4", 1.08)])
def test_guesses_pay_where_they_come_true(simulator, name, gain):
    assert seconds(simulator, name) * gain < seconds(simulator, name, **PLAIN)


def test_a_draft_models_first_guess_is_not_priced_out(simulator):
    """Its wide passes, those that read, cost much: that says little of a guess."""
    name = "wide draft passes cost"
    assert seconds(simulator, name, ngrams=False) * 1.3 < seconds(simulator, name, **PLAIN)


@pytest.mark.parametrize("name", ["random draft", "random draft, sure of itself", "batch of 8",
                                  "learned elsewhere"])
def test_losses_are_bounded(simulator, name):
    """By the grant of 4 plain tokens and 1% of the time."""
    assert seconds(simulator, name) < 1.045 * seconds(simulator, name, **PLAIN)


def test_a_simulation_repeats(simulator):
    task = ablation.TASKS[0]
    runs = [simulator.run(task, ablation.arrays(task, 3)) for _ in range(2)]
    assert runs[0].seconds == runs[1].seconds and runs[0].longest_gap == runs[1].longest_gap
    assert seconds(simulator, task.name, **PLAIN) == pytest.approx(8 * ablation.CURVES["1.5B"][0], rel=0.02)


def test_a_constant_matters(simulator, tmp_path):
    """With no time to lose a draft model is never asked."""
    grant = next(constant for constant in ablation.CONSTANTS if constant.name == "GRANT")
    stingy = ablation.Simulator(tmp_path / "stingy", grant.edits()["removed"])
    assert seconds(stingy, "write code") > 1.1 * seconds(simulator, "write code")
