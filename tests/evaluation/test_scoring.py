"""The official scoring, rule by rule and on any output."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import UsageError
from fedtune.evaluation.scoring import Score, score_answers
from fedtune.evaluation.tasks.base import Answer, Question, Task
from fedtune.evaluation.tasks.registry import all_tasks

TASKS: dict[str, Task] = {task.answer_type: task for task in all_tasks().values()}
"""One of each answer type."""


def predict(output: str, answer_type: str) -> tuple[str, bool]:
    prediction = TASKS[answer_type].score(Question("x/0", "prompt", "A"), output)
    return prediction.value, prediction.parsed


def score(given_answers: list[Answer], answer_type: str, *, mapped: bool = False) -> Score:
    return score_answers(TASKS[answer_type], given_answers, mapped=mapped)


@pytest.mark.parametrize(
    ("output", "value", "parsed"),
    [
        ("A", "a", True),
        (" b.", "b", True),
        ("E", "e", True),
        ("F", "f", False),
        ("The answer", "the answer", False),
        ("Bet", "b", True),  # the first character is all that counts
        ("(C)", "c", True),
        ("**D**", "d", True),
        ("", "", False),
        (" \n", " \n", False),
        ("4", "4", False),
        ("x\n## B is it\nC", "b", True),  # the first line after the first "\n##"
        ("x\n##\nC", "x\n##\nc", False),  # which may be empty
        ("x\n## B\n## C", "b", True),
        ("## B", "b", True),  # no line break before: not special
        ("Ä", "ä", False),
        ("éa", "a", True),
    ],
)
def test_choice(output: str, value: str, parsed: bool) -> None:
    assert predict(output, "choice") == (value, parsed)


@pytest.mark.parametrize(
    ("output", "value", "parsed"),
    [
        ("Yes", "yes", True),
        ("no.", "no", True),
        ("yesyes", "yes", True),
        ("nono", "no", True),
        ("yesno", "yes", True),
        ("noyes", "no", True),
        ("yesyesyes", "yesyesyes", False),  # becomes "yesyes", which is not accepted
        ("noyesno", "noyesno", False),  # "yesno" is looked for before "noyes": "noyes" is left
        ("yes it is", "yes it is", False),
        ("maybe", "maybe", True),
        ("Maybe", "maybe", True),  # outputs are lower-cased before anything else
        ("maybe.", "maybe.", False),
        (" maybe", " maybe", False),
        ("b", "b", True),  # the accepted set is the same for both kinds
    ],
)
def test_yes_no(output: str, value: str, parsed: bool) -> None:
    assert predict(output, "yes-no") == (value, parsed)


@pytest.mark.parametrize(
    ("output", "value", "parsed"),
    [
        ("positive", "positive", True),
        ("Positive!", "positive", True),
        ("negative or positive", "positive", True),
        ("Negative", "negative", True),
        ("neutral", "neutral", True),
        ("POSITIVE", "neutral", False),
        ("None", "neutral", False),
        ("", "neutral", False),
    ],
)
def test_sentiment(output: str, value: str, parsed: bool) -> None:
    assert predict(output, "sentiment") == (value, parsed)


def answers(*pairs: tuple[str, str], subset: str | None = None) -> list[Answer]:
    return [Answer(Question("x", f"prompt {n}", gold, subset), output) for n, (gold, output) in enumerate(pairs)]


def test_score_by_hand() -> None:
    given_answers = answers(("A", "A"), ("B", "A"), ("C", "The"), subset="one")
    given_answers += answers(("D", "d."), ("A", "The"), ("A", "To"), ("A", "a"), subset="two")
    result = score(given_answers, "choice")
    assert (result.n, result.k, result.accuracy) == (7, 3, 3 / 7)
    assert (result.unparsed, result.unparsed_share) == (3, 3 / 7)
    assert result.unparsed_outputs == (("The", 2), ("To", 1))
    assert (result.k_parsed, result.accuracy_parsed) == (3, 3 / 4)
    assert (result.majority, result.majority_count, result.majority_share) == ("a", 3, 3 / 7)
    assert [(each.name, each.n, each.k, each.unparsed) for each in result.subsets] == [
        ("one", 3, 1, 1),
        ("two", 4, 2, 2),
    ]
    assert result.subsets[1].accuracy == 0.5
    assert result.correct == (True, False, False, True, False, False, True)


def test_maybe_counts_only_as_the_whole_output() -> None:
    result = score(answers(("maybe", "Maybe"), ("maybe", "maybe so"), ("yes", "Yes")), "yes-no")
    assert (result.k, result.unparsed) == (2, 1)


def test_mapped_outputs_hide_what_was_unparsed() -> None:
    result = score(answers(("neutral", "neutral"), ("positive", "neutral")), "sentiment", mapped=True)
    assert (result.k, result.unparsed, result.unparsed_share, result.accuracy_parsed) == (1, None, None, None)


def test_nothing_parsed_has_no_parsed_accuracy() -> None:
    assert score(answers(("A", "The")), "choice").accuracy_parsed is None


def test_nothing_to_score() -> None:
    with pytest.raises(UsageError, match="no answers"):
        score([], "choice")


@settings(deadline=None)
@given(output=st.text(), answer_type=st.sampled_from(sorted(TASKS)))
def test_any_output_gets_a_prediction(output: str, answer_type: str) -> None:
    value, parsed = predict(output, answer_type)
    if answer_type == "sentiment":
        assert value in ("positive", "negative", "neutral")
    elif not parsed:
        assert value == output.lower()
    if parsed and answer_type != "sentiment":
        assert predict(value, answer_type) == (value, parsed)


@settings(deadline=None)
@given(letter=st.sampled_from("abcdeABCDE"), before=st.text(" .*(\n", max_size=3), after=st.text(" .)\n", max_size=3))
def test_a_letter_among_marks_is_that_letter(letter: str, before: str, after: str) -> None:
    assert predict(before + letter + after, "choice") == (letter.lower(), True)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ABCD"), st.text(max_size=8), st.sampled_from([None, "s", "t"])), min_size=1))
def test_counts_add_up(rows: list[tuple[str, str, str | None]]) -> None:
    result = score([Answer(Question("x", "p", gold, subset), output) for gold, output, subset in rows], "choice")
    assert result.k == sum(result.correct) == result.k_parsed
    assert result.unparsed is not None
    assert 0 <= result.k <= result.n - result.unparsed <= result.n == len(rows)
    assert sum(each.n for each in result.subsets) == sum(subset is not None for _, _, subset in rows)
    assert 1 <= result.majority_count <= result.n
