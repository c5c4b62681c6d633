"""Hostile and damaged image files: each becomes a square or is refused with a reason, within limits.

All are decoded in one other process (hostile_images.py), so that a crash or a hang is found and named.
VILA_FUZZ sets how many damaged files (`make faults`: 10 000).
"""

import os
import re
import resource
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest

from vila_ops.data.containers import Reason
from vila_ops.data.images import BYTES_PER_PIXEL

FUZZED = int(os.environ.get("VILA_FUZZ", "1000"))
SCRIPT = Path(__file__).with_name("hostile_images.py")
ADDRESS_SPACE = 4 * 2**30
SLACK = 64 * 2**20
LIBTIFF = re.compile(r"[\w.]+: .+")
"""An error of libtiff, which writes it to the standard error: "LZWDecode: Corrupted LZW table at scanline 0."."""
EXPECTED = {
    "empty": "empty",
    "one_pixel": "image",
    "one_pixel_os2_bmp": "image",
    "narrow_jpeg": "too_narrow",
    "narrow_png": "too_many_pixels",
    "no_width": "corrupt",
    "huge_png": "too_many_pixels",
    "huge_jpeg": "too_many_pixels",
    "huge_webp": "too_many_pixels",
    "huge_gif": "too_many_pixels",
    "huge_gif_frame": "too_many_pixels",
    "huge_bmp": "too_many_pixels",
    "large_png_without_data": "truncated",
    "large_webp": "image",
    "large_jpeg_turned": "image",
    "text_bomb_ztxt": "image",
    "text_bomb_itxt": "image",
    "icc_bomb": "image",
    "exif_bomb_png": "image",
    "exif_bomb_jpeg": "image",
    "exif_bomb_webp": "image",
    "exif_broken": "image",
    "icc_broken": "image",
    "metadata_of_58_mb": "image",
    "segments_without_end": "too_complex",
    "chunks_without_end": "too_complex",
    "data_in_crumbs": "too_complex",
    "comments_without_end": "too_complex",
    "stray_bytes": "too_complex",
    "sixty_five_mb": "too_many_bytes",
    "scans_1000_small": "image",
    "scans_1000_large": "too_complex",
    "scans_1000_largest": "too_complex",
    "runs_without_end": "corrupt",
    "runs_of_many_pixels": "too_complex",
    "arithmetic_jpeg": "unsupported",
    "lossless_jpeg": "unsupported",
    "half_with_end": "truncated",
    "followed_by_zip": "image",
    "png_without_data": "corrupt",
    "png_wrong_checksum": "corrupt",
    "huge_tiff": "too_many_pixels",
    "tiff_tile_bomb": "too_complex",
    "tiff_strips_without_end": "too_complex",
    "tiff_table_of_itself": "image",
    "tiff_of_another_coding": "unsupported",
    "exif_bomb_tiff": "too_complex",
    "huge_avif": "too_many_pixels",
    "avif_without_image": "unsupported",
    "phone_jpeg_turned": "image",
    "tall_png": "image",
    **dict.fromkeys(("big_tiff", "ico", "svg", "pdf", "eps", "html", "zip", "zero_bytes"), "not_an_image"),
}
"""What becomes of each named file. A whole seed (one of every format and mode that is read) becomes an image."""


@dataclass(frozen=True)
class Outcome:
    """What the other process said of one file."""

    name: str
    outcome: str
    cpu_seconds: float
    memory_bytes: int
    """Growth of resident memory at its peak."""


def run(*arguments: str) -> list[Outcome]:
    """The outcomes; fails with the file's name when the process ends inside one."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE)),
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"ended with {done.returncode} at {lines[-1:]}: {done.stderr[-2000:]}"
    written = [line for line in done.stderr.splitlines() if not LIBTIFF.fullmatch(line)]
    assert not written, "a decoder wrote something"
    found = [(name, said.split()) for name, said in zip(lines[::2], lines[1::2], strict=True)]
    return [Outcome(name, said[1], float(said[2]), int(said[3])) for name, said in found]


@pytest.mark.slow
def test_every_named_attack_ends_as_it_should() -> None:
    outcomes = run("named")
    whole = len(outcomes) - len(EXPECTED)
    found = {outcome.name: outcome.outcome for outcome in outcomes}
    assert whole == 40
    assert found == {**dict.fromkeys(list(found)[:whole], "image"), **EXPECTED}
    for outcome in outcomes:
        pixels = {"large": 10_000_000, "phone": 50_000_000}.get(outcome.name.partition("_")[0], 1_000_000)
        assert outcome.memory_bytes < BYTES_PER_PIXEL * pixels + SLACK, outcome


@pytest.mark.slow
@pytest.mark.timeout(1200 + FUZZED // 10)
def test_damaged_files_become_squares_or_are_refused_with_a_reason() -> None:
    outcomes = run("fuzzed", str(FUZZED))
    counts = Counter(outcome.outcome for outcome in outcomes)
    assert sum(counts.values()) == FUZZED
    assert set(counts) <= {"image", *get_args(Reason)}, [o for o in outcomes if ":" in o.outcome][:5]
    assert counts["image"] > FUZZED / 10, "the damage is so great that no decoder was reached"
    worst = max(outcomes, key=lambda outcome: outcome.memory_bytes)
    assert worst.memory_bytes < BYTES_PER_PIXEL * 1_000_000 + SLACK, worst
