"""The small bases themselves: every type of causal model is there or named, and each is what it says it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from support.families import FAMILIES, NOT_BUILT, NOT_CAUSAL, QUICK, build


def test_every_type_of_causal_model_is_built_or_named() -> None:
    built = {str(options.get("model_type", name)) for name, options in FAMILIES.items()}
    assert not built & set(NOT_BUILT)
    # Another version of transformers may know others.
    if transformers.__version__.startswith("5.23."):
        assert built | set(NOT_BUILT) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in FAMILIES])
def test_a_family_builds_the_same_bits_and_mixes_tokens(name: str, tmp_path: Path) -> None:
    folder = build(name, tmp_path)
    assert folder == tmp_path / name
    state = torch.get_rng_state()
    again = build(name, tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), state)
    weights = [(each / "model.safetensors").read_bytes() for each in (folder, again)]
    assert weights[0] == weights[1]
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    model.eval()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 850, (1, 40), generator=generator)
    first, last = ids.clone(), ids.clone()
    first[0, 0], last[0, -1] = 9, 7
    with torch.no_grad():
        logits, other_first, other_last = (model(input_ids=each, use_cache=False).logits for each in (ids, first, last))
    size = logits.abs().max()
    assert (logits - other_first)[:, 1].abs().max() > 0.01 * size, "the second token looks at the first one"
    moved = (logits - other_last)[:, :-1].abs().max()
    assert moved > 0.01 * size if name in NOT_CAUSAL else moved == 0
