"""deepspan eval: the score, and what counts as right."""

import json

import pytest

from deepspan.scripts.tasks import TASKS


def test_the_demo_model_is_right_about_held_out_sums(deepspan):
    result = deepspan("eval", "demo_reference", "--task", "sums", "--limit", 60, "--json")
    assert result.code == 0
    assert json.loads(result.out) == {"task": "sums", "accuracy": 1.0, "n": 60}


def test_everyday_prompts_are_answered_word_for_word(deepspan):
    result = deepspan("eval", "demo_reference", "--task", "everyday", "--limit", 20)
    assert json.loads(result.out) == {"task": "everyday", "accuracy": 1.0, "n": 20}
    assert result.err == ""


def test_the_score_is_greedy_whatever_the_run_says(deepspan):
    result = deepspan("eval", "demo_reference", "--task", "sums", "--limit", 5, "--set", "sampling.temperature=50")
    assert json.loads(result.out)["accuracy"] == 1.0


def test_mistakes_count_and_the_first_ones_are_shown(deepspan):
    """Cut after one token, only sums with a one-digit result can be right."""
    cut = ("eval", "demo_reference", "--task", "sums", "--limit", 40, "--set", "sampling.max_new_tokens=1")
    right = sum(len(answer) == 1 for _, answer in TASKS["sums"].questions()[:40])
    result = deepspan(*cut)
    assert json.loads(result.out)["accuracy"] == right / 40 < 1
    assert result.err.count("wrong: ") == 3
    assert deepspan(*cut, "--json").err == ""


@pytest.mark.parametrize(
    ("task", "text", "answer", "right"),
    [
        ("sums", "42", "42", True),
        ("sums", "12 + 30 = 42.", "42", True),
        ("sums", "The result is −7", "-7", True),
        ("sums", "142", "42", False),
        ("sums", "-42", "42", False),
        ("sums", "I do not know.", "42", False),
        ("everyday", " A week has seven days.\n", "A week has seven days.", True),
        ("everyday", "A week has seven days!", "A week has seven days.", False),
    ],
)
def test_what_counts_as_right(task, text, answer, right):
    assert TASKS[task].is_right(text, answer) is right


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--task", "sum"), "did you mean sums?"), (("--task", "sums", "--limit", "0"), "limit is 0"), ((), "--task")],
)
def test_bad_options_are_refused(deepspan, options, message):
    result = deepspan("eval", "demo_reference", *options)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
