"""A projector that a third-party package adds by an entry point, in processes with and without the package."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.forks import output_of
from vila_ops.config import Model
from vila_ops.model import folder as model_folder

PLUGIN = '''
from typing import Literal

from vila_ops.config.model import ProjectorConfig

REVISION = 1


class Config(ProjectorConfig):
    kind: Literal["mean_row"] = "mean_row"

    def tokens(self, grid):
        return grid


def build(config, choice):
    from torch import nn

    class MeanRow(nn.Linear):
        """The mean of each row of patches, then one layer."""

        def forward(self, features):
            images, patches, channels = features.shape
            side = round(patches**0.5)
            return super().forward(features.view(images, side, side, channels).mean(2))

    return MeanRow(config.vision_config.hidden_size, config.text_config.hidden_size)
'''
ASSEMBLE = """
import json, sys
from vila_ops.artifacts import store
from vila_ops.config import Model, Resources
from vila_ops.model.assemble import assemble

model = Model.model_validate_json(sys.argv[1])
made = assemble(model, Resources.model_validate_json(sys.argv[2]))
import torch
from transformers import AutoProcessor
from vila_ops.model import folder
whole = folder.load(store.content(made))
processor = AutoProcessor.from_pretrained(store.content(made))
processed = processor(images=[torch.zeros(3, 100, 60, dtype=torch.uint8)], text="<image>", return_tensors="pt")
with torch.no_grad():
    features = whole.tower_features(processed["pixel_values"])
    projected = whole.model.multi_modal_projector(features)
    expected = features.unflatten(1, (4, 4)).mean(2) @ whole.model.multi_modal_projector.weight.T
    expected += whole.model.multi_modal_projector.bias
print(json.dumps({
    "uri": made.uri,
    "folder": str(store.content(made)),
    "image_tokens": model.image_tokens(),
    "text_image_tokens": model.text(max_tokens=64).image_tokens,
    "placeholders": int((processed["input_ids"] == whole.config.image_token_id).sum()),
    "shape": list(projected.shape),
    "error": float((projected - expected).abs().max()),
}))
"""
OTHER_REVISION = """
import json, sys
from pathlib import Path
from vila_ops.config import Model, Resources
from vila_ops.model import folder
from vila_ops.model.assemble import assemble

made = assemble(Model.model_validate_json(sys.argv[1]), Resources.model_validate_json(sys.argv[2]))
try:
    folder.load(Path(sys.argv[3]))
except ValueError as error:
    print(json.dumps({"uri": made.uri, "refusal": str(error)}))
"""


@pytest.fixture
def install(tmp_path: Path) -> Any:
    """Install the plugin in a revision and return the environment of a process that sees it."""

    def write(*, revision: int) -> dict[str, str]:
        site = tmp_path / f"site-{revision}"
        facts = site / f"mean_row-{revision}.0.dist-info"
        facts.mkdir(parents=True)
        (site / "mean_row.py").write_text(PLUGIN.replace("REVISION = 1", f"REVISION = {revision}"))
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mean-row\nVersion: {revision}.0\n")
        (facts / "entry_points.txt").write_text("[vila_ops.projectors]\nmean_row = mean_row\n")
        return {"PYTHONPATH": f"{site}{os.pathsep}{Path.cwd()}"}

    return write


def run(code: str, *arguments: str, env: dict[str, str]) -> dict[str, Any]:
    """What another process prints last, as JSON."""
    printed: dict[str, Any] = json.loads(output_of("-c", code, *arguments, env=env)[-1])
    return printed


@pytest.mark.slow
def test_a_plugin_s_projector_is_assembled_and_its_revision_is_part_of_the_address(
    make_model: Any, make_resources: Any, install: Any, tmp_path: Path
) -> None:
    model = json.dumps(make_model().model_dump(mode="json") | {"projector": {"kind": "mean_row"}})
    resources = make_resources(tmp_path).model_dump_json()
    first = run(ASSEMBLE, model, resources, env=install(revision=1))
    assert first["image_tokens"] == first["text_image_tokens"] == first["placeholders"] == 4, "56 / 14 rows of patches"
    assert first["shape"] == [1, 4, 64]
    assert first["error"] < 1e-5

    folder = Path(first["folder"])
    needed = json.loads((folder / "config.json").read_text())["projector_plugin"]
    assert needed == {"package": "mean-row", "version": "1.0", "revision": 1}
    with pytest.raises(ValueError, match=r"kind 'mean_row', which the package mean-row 1\.0 adds; it is not installed"):
        model_folder.load(folder)

    second = run(OTHER_REVISION, model, resources, str(folder), env=install(revision=2))
    assert second["uri"] != first["uri"]
    assert (
        "needs revision 1 of the projector 'mean_row', as in mean-row 1.0; installed is revision 2" in second["refusal"]
    )


def test_a_kind_that_no_package_adds_is_refused(make_model: Any) -> None:
    model = make_model().model_dump(mode="json") | {"projector": {"kind": "mean_row"}}
    with pytest.raises(ValueError, match=r"no vila_ops\.projectors of kind 'mean_row': ours are"):
        Model.model_validate(model)
