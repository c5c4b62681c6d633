"""Settings of unknown shape: whatever a config.json says, a folder is read or refused in words, never with a traceback.

VILA_FUZZ sets how many configs are drawn for each kind of folder (`make faults`), VILA_SEED which.
"""

import copy
import json
import os
import random
import shutil
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.model.nvlabs_layout import NVILA
from tests.model.nvlabs_layout import write as write_nvlabs
from tests.model.test_language_models import hub
from tests.model.test_language_models import write as write_language_model
from tests.model.test_llava_hf import write as write_llava
from tests.seed import SEED
from vila_ops.errors import VilaError
from vila_ops.model import export
from vila_ops.model import folder as model_folder
from vila_ops.model.count import count
from vila_ops.model.importing.checkpoint import import_checkpoint

DRAWS = int(os.environ.get("VILA_FUZZ", "25"))
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 1.5, 10**6, 10**30, "", "x", "llama", "../x", [], [1], [[]], ["x", None], {},
    {"a": 1}, {"model_type": "llama"}, {"model_type": []},
)  # fmt: skip
"""What takes the place of a setting."""


@dataclass(frozen=True)
class Kind:
    """A valid folder, its files of settings, and what reads such a folder."""

    folder: Path
    files: tuple[str, ...]
    read: Callable[[Path, Path], object]
    """Takes the folder and a folder for what it writes."""


@pytest.fixture(scope="module")
def kinds(make_model: Any, build: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    root = tmp_path_factory.mktemp("seeds")
    write_nvlabs(root / "nvlabs", NVILA, projector="mlp_downsample_2x2_fix", tower="clip")
    write_nvlabs(root / "internvit", NVILA, projector="linear", tower="internvit", llm="qwen2")
    write_llava(root / "llava")
    write_language_model(root / "words", "qwen3")
    whole, processor = build(make_model("clip", "mlp_downsample"))
    (root / "ours").mkdir()
    model_folder.save(whole, root / "ours", processor=processor)
    parts = ("config.json", "llm/config.json", "vision_tower/config.json", "mm_projector/config.json")

    def imported(folder: Path, out: Path) -> None:
        import_checkpoint(folder, out / "made", chat_template="chatml")

    def fetched(folder: Path, _: Path) -> None:
        model = make_model(language_model=hub(folder))
        count(model, cache=folder)
        build(model)

    def loaded(folder: Path, _: Path) -> None:
        for target in export.TARGETS:
            export.check(folder, target)
        model_folder.load(folder)

    return {
        "nvlabs": Kind(root / "nvlabs", parts, imported),
        "internvit": Kind(root / "internvit", parts, imported),
        "llava": Kind(root / "llava", ("config.json", "preprocessor_config.json"), imported),
        "words": Kind(root / "words", ("config.json",), fetched),
        "ours": Kind(root / "ours", ("config.json", "processor_config.json"), loaded),
    }


def places(settings: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of settings with each of its keys or indices."""
    for key in settings if isinstance(settings, dict) else range(len(settings) if isinstance(settings, list) else 0):
        yield settings, key
        yield from places(settings[key])


def mutated(settings: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """The settings with one to three of them removed, or replaced by a value of another shape."""
    out = copy.deepcopy(settings)
    for _ in range(draw.randint(1, 3)):
        container, key = draw.choice(list(places(out)) or [(out, "x")])
        if isinstance(container, dict) and draw.random() < 0.2:
            container.pop(key, None)
        else:
            container[key] = copy.deepcopy(draw.choice(VALUES))
    return out


def outcome(read: Callable[[], object], given: str) -> str:
    """Whether a folder was read or refused by our own words; any other error fails."""
    try:
        read()
    except Exception as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if isinstance(error, ValueError | VilaError) and "/vila_ops/" in raised_in:
            return "refused"
        raise AssertionError(given) from error
    return "read"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nvlabs", "internvit", "llava", "words", "ours"])
def test_settings_of_any_shape_are_read_or_refused_in_words(name: str, kinds: dict[str, Kind], tmp_path: Path) -> None:
    kind, draw = kinds[name], random.Random(f"{SEED} {name}")
    outcomes: Counter[str] = Counter()
    for number in range(DRAWS):
        at, out = tmp_path / str(number), tmp_path / f"{number}-out"
        shutil.copytree(kind.folder, at, copy_function=os.link)
        out.mkdir()
        path = at / draw.choice(kind.files)
        settings = mutated(json.loads(path.read_text()), draw)
        path.unlink()
        path.write_text(json.dumps(settings))
        outcomes[outcome(lambda a=at, o=out: kind.read(a, o), f"{path.relative_to(at)} is {json.dumps(settings)}")] += 1
        shutil.rmtree(at)
        shutil.rmtree(out)
    assert outcomes["refused"] > DRAWS / 10
