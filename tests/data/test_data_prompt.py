"""The training text and the templates."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.data.prompt import fields_of, fill, render_prompt, render_text
from fedtune.errors import ConfigError, UsageError

NO_BRACES = st.text().filter(lambda text: "{" not in text and "}" not in text)


def test_text_is_the_leaderboards() -> None:
    assert render_text("Why?", "So.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
        "### Instruction:\n"
        "Why?\n"
        "### Response: So."
    )
    assert render_text("Why?", "So.") == render_prompt("Why?") + " So."


def test_fill_replaces_the_templates_fields_only() -> None:
    assert fill("{instruction} {input}", {"instruction": "use {input}", "input": "{x}"}) == "use {input} {x}"
    assert fill('{{"a": 1}} {b}', {"b": "2"}) == '{"a": 1} 2'
    assert fill("no field, a lone { brace", {"b": "2"}) == "no field, a lone { brace"
    assert fill("{name: !r}", {"name: !r": "odd"}) == "odd"


def test_fill_turns_other_values_into_text() -> None:
    row = {"none": None, "int": 7, "float": 1.5, "yes": True, "list": ["é", 1]}
    assert fill("[{none}] {int} {float} {yes} {list}", row) == '[] 7 1.5 true ["é", 1]'


@given(NO_BRACES, NO_BRACES, st.text(), st.text())
def test_fill_keeps_every_value_as_it_is(before: str, after: str, first: str, second: str) -> None:
    filled = fill(f"{before}{{a}}{after}{{b}}", {"a": first, "b": second})
    assert filled == before + first + after + second


def test_missing_column_is_named_with_those_that_exist() -> None:
    with pytest.raises(ConfigError) as caught:
        fill("{ouput}", {"instruction": "", "output": ""}, "data.response")
    problem = caught.value.problems[0]
    assert problem.path == "data.response"
    assert problem.nearest == "output"
    assert "'ouput'" in problem.message
    assert "'instruction', 'output'" in problem.message


def test_the_columns_of_a_template_are_found() -> None:
    assert fields_of("{a} {{b}} {c}{a}") == ["a", "c"]
    assert fields_of("none") == []


def test_a_value_without_a_text_is_refused_with_its_column() -> None:
    with pytest.raises(UsageError, match="column 'output' is bytes that are no UTF-8"):
        fill("{output}", {"output": b"\xff"})
