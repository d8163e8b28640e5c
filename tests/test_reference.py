"""The reference in docs/ says what the code does, and what docs and README point at is there."""

import re
import runpy
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
GENERATE = runpy.run_path(str(PROJECT / "docs" / "reference" / "generate.py"))


@pytest.mark.parametrize("name", sorted(GENERATE["PAGES"]))
def test_generated_pages_are_current(name: str) -> None:
    current = (PROJECT / "docs" / "reference" / name).read_text(encoding="utf-8")
    assert current == GENERATE["PAGES"][name](), "run: make docs"


@pytest.mark.parametrize(
    "page", [PROJECT / "README.md", *sorted((PROJECT / "docs").rglob("*.md"))], ids=lambda p: p.stem
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} points at {target}"


def test_the_public_surface() -> None:
    import fedtune

    assert fedtune.__all__ == sorted(fedtune.__all__)
    for name in fedtune.__all__:
        assert getattr(fedtune, name) is not None
    with pytest.raises(AttributeError):
        _ = fedtune.nothing


def test_pins_hold_every_dependency() -> None:
    import tomllib

    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.split(r"[\[<>=]", dependency)[0].replace("_", "-").lower() for dependency in wanted}
    pinned = {
        line.split("==")[0].replace("_", "-").lower()
        for line in (PROJECT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    }
    assert names <= pinned
