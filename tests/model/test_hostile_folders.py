"""Hostile and damaged model folders: each is refused with its reason, and nothing of it is run, written or kept.

All are read in one other process (hostile_folders.py) under a limit of memory and an audit hook.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from vila_ops.model import folder as model_folder

SCRIPT = Path(__file__).with_name("hostile_folders.py")
sys.path.insert(0, str(SCRIPT.parent))
from hostile_folders import attacks  # noqa: E402 the path comes first


@pytest.fixture(scope="module")
def outcomes(
    make_model: Any, build: Callable[..., Any], tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[str]]:
    """The lines that the other process printed for each folder, and the canary's file if there is one."""
    seeds, root = tmp_path_factory.mktemp("seeds"), tmp_path_factory.mktemp("attacked")
    for name, projector in {"plain": "mlp_gelu", "merging": "mlp_downsample"}.items():
        whole, processor = build(make_model("clip", projector))
        (seeds / name).mkdir()
        model_folder.save(whole, seeds / name, processor=processor)
    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower = CLIPVisionConfig(**shape, intermediate_size=64, image_size=56, patch_size=14)
    CLIPVisionModel(tower).save_pretrained(seeds / "tower")
    words = LlamaConfig(**shape, intermediate_size=64, vocab_size=300, num_key_value_heads=2)
    LlamaForCausalLM(words).save_pretrained(seeds / "words")
    canary = root / "canary"
    process = subprocess.run(
        [sys.executable, str(SCRIPT), str(seeds), str(root)],
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
        env={**os.environ, "canary": str(canary), "HF_HUB_OFFLINE": "1"},
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    lines: dict[str, list[str]] = {}
    name = ""
    for line in process.stdout.splitlines():
        if line.startswith(("= ", "! ")):
            lines[name].append(line)
        else:
            lines[name := line] = []
    lines["canary"] = [str(canary)] if canary.exists() else []
    return lines


@pytest.mark.slow
def test_each_of_more_than_200_folders_is_refused_with_its_reason(outcomes: dict[str, list[str]]) -> None:
    expected = {attack.name: attack.reason for attack in attacks()}
    assert len(expected) == len(list(attacks()))
    assert len(expected) >= 200
    wrong = {}
    for name, reason in expected.items():
        outcome = next((line[2:] for line in outcomes[name] if line.startswith("= ")), "nothing")
        right = outcome == "loaded" if reason == "^loaded$" else outcome.startswith("refused ")
        if not right or not re.search(reason, outcome):
            wrong[name] = outcome[:300]
    assert wrong == {}


@pytest.mark.slow
def test_nothing_of_a_hostile_folder_runs_or_writes(outcomes: dict[str, list[str]]) -> None:
    assert outcomes["canary"] == []
    assert {name: lines for name, lines in outcomes.items() if any(line.startswith("! ") for line in lines)} == {}
