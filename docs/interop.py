"""Writes the table of docs/interop.md: `make interop`. Builds, checks and measures a tiny model of every choice."""

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
from vila_ops.model.modify import Modifications

PAGE = Path(__file__).with_name("interop.md")
START, END = "<!-- made by docs/interop.py -->", "<!-- end -->"
TOKENIZER = Path(__file__).parents[1] / "tests/tiny/tokenizer"
TOWERS = ("clip", "siglip", "dinov2")
PROJECTORS: tuple[dict[str, Any], ...] = ({"kind": "mlp_gelu"}, {"kind": "linear"})
OWN_PROJECTORS: tuple[dict[str, Any], ...] = (
    {"kind": "mlp_gelu", "depth": 3},
    {"kind": "transformer", "num_heads": 4},
    {"kind": "mlp_downsample", "factor": 2},
    {"kind": "mlp_downsample", "factor": 3, "depth": 3},
)
"""Projectors that LLaVA's format cannot hold."""
Row = tuple[str, Path]


def main() -> None:
    """Write the table between its marks."""
    with tempfile.TemporaryDirectory() as root:
        models = list(rows(Path(root)))
        lines = table(models, [difference(folder) for _, folder in models])
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text("\n".join([before + START, *lines, END]) + rest.partition(END)[2])


def table(models: list[Row], differences: list[str]) -> list[str]:
    """The lines of the table, then each reason once, under the number by which cells refer to it."""
    names = [f"{target} ({CHECKED_WITH[target]})" for target in TARGETS]
    reasons: dict[str, int] = {}
    lines = [f"| model | {' | '.join(names)} | logits, stock against ours |", f"|{' --- |' * (len(TARGETS) + 2)}"]
    for (name, folder), gap in zip(models, differences, strict=True):
        answers = [check(folder, target) for target in TARGETS]
        numbers = [[reasons.setdefault(reason, len(reasons) + 1) for reason in one.reasons] for one in answers]
        cells = [
            "yes" if one.loads else f"no ({', '.join(map(str, no))})" for one, no in zip(answers, numbers, strict=True)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {gap} |")
    return [*lines, "", *(f"{number}. {reason}" for reason, number in reasons.items())]


def rows(root: Path) -> Iterator[Row]:
    """The name and folder of each model."""
    for tower in TOWERS:
        for projector in PROJECTORS:
            yield f"{tower}, {projector['kind']}", built(tower, projector, root)
    for projector in OWN_PROJECTORS:
        kind, *values = projector.items()
        yield f"clip, {kind[1]}, {', '.join(f'{key} {value}' for key, value in values)}", built("clip", projector, root)
    yield "clip, mlp_gelu, visual expert", with_expert(built("clip", {"kind": "mlp_gelu"}, root), root / "expert")


def with_expert(folder: Path, out: Path) -> Path:
    """The model of a folder as a stage with a visual expert saves it."""
    out.mkdir()
    model_folder.save_trained({}, out, init=folder, modifications=Modifications(visual_expert=True))
    return out


def built(tower: str, projector: dict[str, Any], root: Path) -> Path:
    """The folder of an assembled random model."""
    model = Model.model_validate(
        {
            "vision_tower": {"kind": "random", "architecture": tower},
            "projector": projector,
            "language_model": {"kind": "random", "tokenizer": str(TOKENIZER)},
            "image_size": 56,
            "patch_size": 14,
        }
    )
    storage = {name: str(root / name) for name in ("store", "data", "cache")}
    return content(assemble(model, Resources.model_validate({"launch": "inline", "storage": storage})))


def difference(folder: Path) -> str:
    """Largest difference of logits of stock transformers and ours, fp32, one image; a dash if stock cannot load."""
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
