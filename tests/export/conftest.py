"""What tests of exports share: one real small run, trained and scored, and the submission made of it."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny challenge, two rounds of one step, scored in official mode beside its base; not to be changed."""
    from fedtune.config.load import load_config
    from fedtune.evaluation.driver import evaluate
    from fedtune.evaluation.settings import EvalSettings
    from fedtune.evaluation.subjects import find_subjects
    from fedtune.evaluation.tasks.registry import parse_bench
    from fedtune.federation.train import train

    runs = tmp_path_factory.mktemp("real") / "runs"
    settings = ["federation.rounds=2", "training.max_steps=1", "federation.fraction=0.5"]
    result = train(load_config(challenge="tiny", settings=settings).config, out=runs)
    named = find_subjects([str(result.adapter)], with_base=True, model=None, quantization="fp4", runs=runs)
    evaluate(EvalSettings(named.model, named.subjects, parse_bench("tiny"), named.folder, mode="official"))
    return result.run


@pytest.fixture(scope="session")
def clean_submission(real_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The submission of `real_run`; not to be changed."""
    from fedtune.export.checkpoint import open_run
    from fedtune.export.targets.submission import export_submission

    return export_submission(open_run(str(real_run)), tmp_path_factory.mktemp("clean") / "submission").folder
