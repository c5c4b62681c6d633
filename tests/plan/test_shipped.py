"""Every recipe of this repository plans without an error on the resources that docs/recipes.md names beside it."""

import re
from pathlib import Path

import pytest

from vila_ops.config import load
from vila_ops.config.lengths import load_lengths
from vila_ops.plan import lengths as drawn
from vila_ops.plan.plan import plan_run, refusals

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
ROW = re.compile(r"^\| `([\w.-]+)` \| ((?:`[\w.-]+`(?:, )?)+) \| `([\w.-]+)` \|$", flags=re.MULTILINE)
TOGETHER = [
    (recipe, resources.strip("`"), lengths)
    for recipe, several, lengths in ROW.findall((ROOT / "docs/recipes.md").read_text())
    for resources in several.split(", ")
]
CLUSTERS = {
    "cluster_128", "cluster_128_job", "compose", "slurm",
    "kubernetes", "kubernetes_job", "kubernetes_small", "kubernetes_small_job",
}  # fmt: skip
"""Resources that say where a cluster is: they name no micro-batches and no accelerator."""


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "resources", "lengths"), TOGETHER, ids=["-".join(row) for row in TOGETHER])
def test_it_plans_and_fits(
    recipe: str, resources: str, lengths: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the configs alone: with an empty cache, and without a network or hardware."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(drawn, "MOST_SAMPLES", 2**12)  # as good a sample for this, in a tenth of the time
    run = load(
        CONFIGS / f"recipes/{recipe}.yaml",
        resources=CONFIGS / f"resources/{resources}.yaml",
        overrides=(f"resources.storage.cache={tmp_path}",),
    )
    plan = plan_run(run, load_lengths(CONFIGS / f"lengths/{lengths}.yaml"))
    assert refusals(plan) == []
    assert [one.stage for one in plan.stages] == list(run.recipe.stages)
    if run.resources.train.accelerator:
        assert all(one.fits for one in plan.stages)


def test_the_page_pairs_every_recipe_and_every_resources_file() -> None:
    assert {recipe for recipe, _, _ in TOGETHER} == {path.stem for path in (CONFIGS / "recipes").glob("*.yaml")}
    assert {one for _, one, _ in TOGETHER} | CLUSTERS == {path.stem for path in (CONFIGS / "resources").glob("*.yaml")}
    assert {one for _, _, one in TOGETHER} == {path.stem for path in (CONFIGS / "lengths").glob("*.yaml")}
