"""The documentation runs as it is written, and what it lists is what there is."""

import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from longlive_jax.inference.pipeline import Pipeline
from longlive_jax.verify import COMPONENTS

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"


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


@pytest.mark.slow
def test_every_stage_of_the_training_page_runs_after_the_one_before(tmp_path, monkeypatch):
    """The block with smoke=true, as a new user would paste it into a shell."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    blocks = re.findall(r"```\n(.*?)```", (DOCS / "training.md").read_text(), flags=re.DOTALL)
    [block] = [block for block in blocks if "smoke=true" in block]
    subprocess.run(["bash", "-euc", block], env=os.environ | {"PATH": path}, check=True)
    stages = {file.parent.name for file in (tmp_path / "runs/smoke").glob("*/report.json")}
    assert stages == {folder.stem for folder in (ROOT / "configs/toy").glob("*.py")} - {"causal_ode"}
    pipe = Pipeline.load("runs/smoke/reward/export")
    video = pipe("a red square moves left on a dark background", frames=pipe.config.window.block_frames)
    assert np.isfinite(video.latents).all()


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
