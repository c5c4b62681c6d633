"""The tasks with a store on S3 make what they make with a folder."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vila_ops.artifacts.store import read_manifest, verify
from vila_ops.config import Run, load
from vila_ops.eval.report import read_report
from vila_ops.pipeline.stages import evaluate_stage, model_after, prepare_named

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Run]:
    """The tiny recipe, two steps of its first stage, on a store."""
    monkeypatch.chdir(ROOT)

    def make(store: str) -> Run:
        where = [f"resources.storage.{name}={tmp_path / name}" for name in ("data", "cache")]
        settings = [
            "stages.align.num_steps=2",
            "resources.train.threads_per_worker=1",
            f"resources.storage.store={store}",
            *where,
        ]
        resources = ROOT / "configs/resources/inline.yaml"
        return load(ROOT / "configs/recipes/tiny.yaml", resources=resources, overrides=tuple(settings))

    return make


@pytest.mark.slow
def test_prepare_train_and_evaluate_on_s3_as_on_disk(
    run_in: Callable[[str], Run], s3_store: str, tmp_path: Path
) -> None:
    on_s3, on_disk = run_in(s3_store), run_in(str(tmp_path / "store"))
    data, model = prepare_named(on_s3, "tiny_align"), model_after(on_s3, "align")
    for made in (data, model):
        assert made.uri.startswith(f"{s3_store}/")
        verify(made)
    assert data.digest == prepare_named(on_disk, "tiny_align").digest
    assert model.digest == model_after(on_disk, "align").digest
    sealed = read_manifest(model.uri)["execution"]["sealed"]
    shutil.rmtree(tmp_path / "copies")  # as on another machine
    assert model_after(on_s3, "align") == model
    assert read_manifest(model.uri)["execution"]["sealed"] == sealed
    fetched = {path.name for path in (tmp_path / "copies/s3").rglob("*") if path.is_file()}
    assert fetched == {"config.json"}, "of what is found only the model's config is read, to check the recipe"
    there, here = (evaluate_stage(run, "align", run.recipe.stage_suite) for run in (on_s3, on_disk))
    assert read_report(there) == read_report(here)
    assert there.digest == here.digest
