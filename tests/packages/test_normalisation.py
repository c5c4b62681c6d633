import json
from pathlib import Path
from typing import Any

import pytest
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vila_ops.config.model import HubTower
from vila_ops.errors import CorruptArtifact
from vila_ops.packages.normalisation import mean_std

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def tower(folder: Path) -> HubTower:
    return HubTower(name=str(folder), revision="here")


def test_it_is_read_where_transformers_keeps_it(tmp_path: Path) -> None:
    CLIPImageProcessorPil().save_pretrained(tmp_path / "alone")
    assert (tmp_path / "alone/preprocessor_config.json").is_file()
    assert mean_std(tower(tmp_path / "alone")) == CLIP
    stated = json.loads((tmp_path / "alone/preprocessor_config.json").read_text())
    (tmp_path / "part").mkdir()
    (tmp_path / "part/processor_config.json").write_text(json.dumps({"image_processor": stated}))
    assert mean_std(tower(tmp_path / "part")) == CLIP


@pytest.mark.parametrize("mean", [None, 0.5, [0.5, 0.5], [0.5, 0.5, 127], ["0.5", 0.5, 0.5], [0.5, 0.5, float("nan")]])
def test_what_are_no_three_shares_is_refused(mean: Any, tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"image_mean": mean, "image_std": [1, 1, 1]}))
    why = r"preprocessor_config.json(: image_mean is .*, not three numbers from 0 to 1| .*NaN is not a number)"
    with pytest.raises((ValueError, CorruptArtifact), match=why):
        mean_std(tower(tmp_path))


def test_a_tower_that_states_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no preprocessor_config.json"):
        mean_std(tower(tmp_path))
