"""Prepare streams: its memory does not grow with the data."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
SIDE, IMAGES = 2400, 60
PROGRAM = """
import json, sys
from pathlib import Path
from vila_ops.config import Mixture, Resources, TextFormat
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.artifacts.store import content
asked = json.loads(sys.argv[1])
made = prepare(
    Mixture.model_validate(asked["mixture"]), TextFormat.model_validate(asked["text"]),
    Resources.model_validate(asked["resources"]),
)
# not getrusage's peak, which a process inherits from the one that started it: here pytest with all that it has loaded
(peak,) = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(json.dumps({"samples": made.num_samples, "peak": int(peak) * 1024}))
"""


@pytest.mark.slow
def test_ten_times_the_images_need_no_more_memory(tmp_path: Path, tiny: Path) -> None:
    """The ratio of 20 GB of images under 2 GB: IMAGES files of 17 MB in steps of a tenth and all."""
    noise = np.random.default_rng(0)
    raw = tmp_path / "raw"
    raw.mkdir()
    lines = []
    for number in range(IMAGES):
        pixels = noise.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(raw / f"{number}.bmp")
        record = {
            "id": str(number),
            "object": f"thing {number}",
            "category": "",
            "licence": "CC0-1.0",
            "provenance": "here",
        }
        parts = [{"image": f"{number}.bmp"}, {"text": f"Noise number {number}."}]
        lines.append(json.dumps({**record, "turns": [{"role": "document", "parts": parts}]}))
    total = sum(path.stat().st_size for path in raw.glob("*.bmp"))
    assert total > 10**9
    peaks = {}
    for count in (IMAGES // 10, IMAGES):
        (raw / "records.jsonl").write_text("\n".join(lines[:count]) + "\n")
        asked = {
            "mixture": {
                "name": f"m{count}", "sources": {"p": {"kind": "jsonl", "path": str(raw), "render": "caption"}},
            },
            "text": {
                "language_model": {"kind": "random", "tokenizer": str(tiny / "tokenizer")}, "chat_template": "chatml",
                "vision_tower": {"kind": "random"}, "image_size": 336, "image_tokens": 16, "max_tokens": 64,
            },
            "resources": {
                "launch": "inline", "storage": {name: str(tmp_path / name) for name in ("store", "data", "cache")},
            },
        }  # fmt: skip
        run = [sys.executable, "-c", PROGRAM, json.dumps(asked)]
        done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout.splitlines()[-1])
        assert said["samples"] == count
        peaks[count] = said["peak"]
    growth = peaks[IMAGES] - peaks[IMAGES // 10]
    assert growth < total / 20, f"{growth / 2**20:.0f} MiB more for {total / 2**20:.0f} MiB of images"
    assert peaks[IMAGES] < total / 2, "about 200 MiB, most of which are imports"
