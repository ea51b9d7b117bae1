"""The documentation runs as it is written, and what it lists is what there is."""

import pathlib
import re

import pytest

from longlive_jax.verify import COMPONENTS

DOCS = pathlib.Path(__file__).parent.parent / "docs"


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)


def test_the_quickstart_runs(tiny_checkpoint, tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/longlive-1.3b").symlink_to(tiny_checkpoint)
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks("quickstart.md")
    assert len(blocks) >= 6
    names: dict = {}
    for block in blocks:
        exec(compile(block, "docs/quickstart.md", "exec"), names)
    assert {path.name for path in tmp_path.glob("*.mp4")} == {"fox.mp4", "pair-0.mp4", "pair-1.mp4"}


def test_the_verify_page_names_every_component_and_array():
    page = (DOCS / "verify.md").read_text()
    for name, component in COMPONENTS.items():
        assert f"`{name}`" in page
        for array in (*component.required, *component.optional):
            assert f"`{array}`" in page, f"{name}/{array} is not documented"


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_links_between_pages_lead_somewhere(page):
    text = (DOCS / page).read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (DOCS / target).exists(), f"{page} links to {target}"
