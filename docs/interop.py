"""Makes the table of docs/interop.md: `make interop`. Builds a tiny model of every choice, asks and measures."""

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from vila_ops.artifacts.store import content
from vila_ops.config import Model, Resources
from vila_ops.model import folder as model_folder
from vila_ops.model.assemble import assemble
from vila_ops.model.export import CHECKED_WITH, TARGETS, check

PAGE = Path(__file__).with_name("interop.md")
START, END = "<!-- made by docs/interop.py -->", "<!-- end -->"
TOKENIZER = Path(__file__).parents[1] / "tests/tiny/tokenizer"
TOWERS = ("clip", "siglip", "dinov2")
PROJECTORS: tuple[dict[str, Any], ...] = (
    {"kind": "mlp_gelu"},
    {"kind": "linear"},
    {"kind": "mlp_downsample", "factor": 2},
)


def main() -> None:
    """Write the table between its marks."""
    with tempfile.TemporaryDirectory() as root:
        lines = [f"{row} {difference(folder)} |" for row, folder in rows(Path(root))]
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text("\n".join([before + START, *head(), *lines, END]) + rest.partition(END)[2])


def head() -> list[str]:
    """The first two lines of the table."""
    names = [f"{target} ({CHECKED_WITH[target]})" for target in TARGETS]
    return [f"| model | {' | '.join(names)} | logits, stock against ours |", f"|{' --- |' * (len(TARGETS) + 2)}"]


def rows(root: Path) -> Iterator[tuple[str, Path]]:
    """Each model's line without what is measured, and its folder."""
    for tower in TOWERS:
        for projector in PROJECTORS:
            folder = built(tower, projector, root)
            name = f"{tower}, {' '.join(str(value) for value in projector.values())}"
            yield row(name, folder), folder
    expert = root / "expert"
    shutil.copytree(built("clip", {"kind": "mlp_gelu"}, root), expert)
    stated = json.loads((expert / "config.json").read_text())
    stated |= {"model_type": "vila_llava", "projector": {"kind": "mlp_gelu", "depth": 2}, "visual_expert": True}
    (expert / "config.json").write_text(json.dumps(stated))
    yield row("clip, mlp_gelu, visual expert", expert), expert


def row(name: str, folder: Path) -> str:
    """What each program does with a folder."""
    found = [check(folder, target) for target in TARGETS]
    cells = ["yes" if one.loads else f"no: {'; '.join(one.reasons)}" for one in found]
    return f"| {name} | {' | '.join(cells)} |"


def built(tower: str, projector: dict[str, Any], root: Path) -> Path:
    """The folder of a random model, as a recipe's first step makes it."""
    model = Model.model_validate(
        {
            "vision_tower": {"kind": "random", "architecture": tower},
            "projector": projector,
            "language_model": {"kind": "random", "tokenizer": str(TOKENIZER)},
            "image_size": 56,
            "patch_size": 14,
        }
    )
    places = {name: str(root / name) for name in ("store", "data", "cache")}
    return content(assemble(model, Resources.model_validate({"launch": "inline", **places})))


def difference(folder: Path) -> str:
    """Largest difference of logits of stock transformers and ours, fp32, one picture; a dash where stock cannot."""
    if not check(folder, "transformers").loads:
        return "-"
    stock = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    ours = model_folder.load(folder)
    ids = torch.tensor([[1, 40, *[3] * ours.config.image_seq_length, 41, 2]])
    values = torch.rand(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = ours.hidden(ours.embed(ids, ours.tower_features(values)), use_cache=False).last_hidden_state
        gap = (stock(input_ids=ids, pixel_values=values).logits - ours.lm_head(hidden)).abs().max()
    return f"{float(gap):.0e}"


if __name__ == "__main__":
    sys.exit(main())
