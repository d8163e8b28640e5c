"""The undocumented names of transformers and PEFT that fedtune uses are there, and do what fedtune relies on."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from fedtune.models import compat

PACKAGE = Path(compat.__file__).parents[1]


@pytest.mark.parametrize("name", compat.__all__)
def test_the_name_is_there(name: str) -> None:
    assert getattr(compat, name) is not None


def test_keys_are_reported_before_the_class_leaves_any_out(llama_folder: Path) -> None:
    parameters = inspect.signature(getattr(PreTrainedModel, compat._ADJUST)).parameters
    assert list(parameters)[:1] == ["self"]
    assert len(parameters) == 2
    seen: list[Any] = []

    def record(info: Any, adjust: Any) -> None:
        seen.append((set(info.missing_keys), set(info.unexpected_keys), set(info.mismatched_keys)))
        adjust()

    with compat.on_adjusted_keys(record):
        AutoModelForCausalLM.from_pretrained(llama_folder)
    assert seen == [(set(), set(), set())]


def test_attention_is_set_back_for_one_part(llama_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    compat.set_attention(model.config, before)
    assert model.config._attn_implementation == before


def test_no_other_module_imports_an_undocumented_name() -> None:
    found = []
    for path in PACKAGE.rglob("*.py"):
        if path == Path(compat.__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if module and module.split(".")[0] in ("transformers", "peft") and "." in module:
                found.append(f"{path.relative_to(PACKAGE)}: {module}")
    assert found == []
