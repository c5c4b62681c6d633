import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.forks import Fork
from vila_ops.config.images import Webp
from vila_ops.data.images import Fit, square
from vila_ops.model import folder as model_folder
from vila_ops.model.features import BATCH, SUFFIX, FeatureCache, tower_digest
from vila_ops.model.pixels import Pixels

HALF = (0.5, 0.5, 0.5)


def to_pixels(mean: tuple[float, ...] = HALF) -> Pixels:
    return Pixels(mean, HALF)


kept_features = partial(FeatureCache, leave_free=0)
"""A cache that stores features on any disk."""


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def squares(tiny: Path) -> list[bytes]:
    paths = sorted((tiny / "pairs").glob("*.png"))
    return [square(path.read_bytes(), size=56, fit=Fit("pad", HALF), encoding=Webp()) for path in paths]


@pytest.mark.parametrize("tower", ["clip", "siglip", "dinov2"])
def test_features_do_not_depend_on_the_batch_an_image_came_in(
    tower: str, squares: list[bytes], make_model: Any, build: Callable[..., Any], tmp_path: Path
) -> None:
    whole, _ = build(make_model(tower))
    together = kept_features(whole, to_pixels(), root=tmp_path / "a")(squares)
    turned = kept_features(whole, to_pixels(), root=tmp_path / "b")(squares[::-1]).flip(0)
    one_by_one = kept_features(whole, to_pixels(), root=tmp_path / "c")
    alone = torch.cat([one_by_one([data]) for data in squares])
    assert torch.equal(together, turned)
    assert torch.equal(together, alone)
    with torch.no_grad():
        direct = whole.tower_features(to_pixels()(squares))
    assert torch.allclose(together, direct, atol=1e-5)


def test_an_image_requested_twice_is_returned_twice_and_computed_once(
    squares: list[bytes], make_model: Any, build: Callable[..., Any], tmp_path: Path
) -> None:
    whole, _ = build(make_model())
    cache = kept_features(whole, to_pixels(), root=tmp_path)
    actual = cache([squares[0], squares[1], squares[0]])
    assert torch.equal(actual[0], actual[2])
    assert not torch.equal(actual[0], actual[1])
    stamps = {path: path.stat().st_mtime_ns for path in files(tmp_path)}
    assert len(stamps) == 2
    assert all(path.suffix == SUFFIX for path in stamps)
    assert torch.equal(kept_features(whole, to_pixels(), root=tmp_path)([squares[1]])[0], actual[1])
    assert {path: path.stat().st_mtime_ns for path in files(tmp_path)} == stamps


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_features_from_disk_are_those_that_the_tower_gave_bit_for_bit(
    precision: Any, squares: list[bytes], make_model: Any, build: Callable[..., Any], tmp_path: Path
) -> None:
    whole, _ = build(make_model())
    batch = squares[:BATCH]
    first, again = (kept_features(whole, to_pixels(), root=tmp_path, precision=precision)(batch) for _ in range(2))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    with torch.no_grad():
        direct = whole.tower_features(to_pixels()(batch)).to(dtype)
    assert first.dtype == dtype
    assert torch.equal(first, direct)
    assert torch.equal(again, direct)
    assert {path.stat().st_size for path in files(tmp_path)} == {16 * 32 * dtype.itemsize + 4}


FILL = """
import sys
from pathlib import Path
from tests.model.test_features import kept_features, to_pixels
from vila_ops.model import folder
model, images, root = map(Path, sys.argv[1:])
squares = [path.read_bytes() for path in sorted(images.iterdir())]
kept_features(folder.load(model), to_pixels(), root=root)(squares)
"""


def test_writers_at_once_and_a_killed_one_leave_whole_files(
    squares: list[bytes], make_model: Any, build: Callable[..., Any], tmp_path: Path
) -> None:
    """One of two is killed as soon as there is a file, or half of them, whole or not."""
    whole, processor = build(make_model())
    expected = kept_features(whole, to_pixels(), root=tmp_path / "alone")(squares)
    model, images = tmp_path / "model", tmp_path / "images"
    model_folder.save(whole, model, processor=processor)
    images.mkdir()
    for number, one in enumerate(squares):
        (images / f"{number:03}").write_bytes(one)
    for most in (1, len(squares) // 2):
        root = tmp_path / f"killed-at-{most}"
        with Fork("-c", FILL, model, images, root) as one, Fork("-c", FILL, model, images, root) as other:
            while one.poll() is None and len(files(root)) < most:
                time.sleep(0.001)
            one.kill()
            assert other.wait() == 0
        assert torch.equal(kept_features(whole, to_pixels(), root=root)(squares), expected)


def test_what_changes_features_changes_their_place(
    squares: list[bytes], make_model: Any, build: Callable[..., Any], tmp_path: Path
) -> None:
    """The number of heads and the normalisation of pixels change features but not weights."""
    variants = [
        (make_model(), HALF),
        (make_model(feature_layer=-1), HALF),
        (make_model(seed=1), HALF),
        (make_model(vision_tower={"kind": "random", "num_heads": 4}), HALF),
        (make_model(), (0.1, 0.2, 0.3)),
    ]
    for model, mean in variants:
        whole, _ = build(model)
        actual = kept_features(whole, to_pixels(mean), root=tmp_path)(squares[:1])
        with torch.no_grad():
            direct = whole.tower_features(to_pixels(mean)(squares[:1]))
        assert torch.allclose(actual, direct, atol=1e-5)


def test_a_saved_model_finds_the_features_of_the_model_it_came_from(
    make_model: Any, build: Callable[..., Any], tmp_path: Path
) -> None:
    whole, processor = build(make_model())
    model_folder.save(whole, tmp_path, processor=processor)
    assert tower_digest(model_folder.load(tmp_path)) == tower_digest(whole)


def test_a_damaged_file_is_computed_again(
    squares: list[bytes], make_model: Any, build: Callable[..., Any], tmp_path: Path
) -> None:
    whole, _ = build(make_model())
    cache = kept_features(whole, to_pixels(), root=tmp_path)
    actual = cache(squares[:1])
    (path,) = files(tmp_path)
    whole_bytes = path.read_bytes()
    flipped = bytearray(whole_bytes)
    flipped[len(flipped) // 2] ^= 1
    for damaged in (b"", whole_bytes[:50], whole_bytes[:-1], whole_bytes + b"0", bytes(flipped)):
        path.write_bytes(damaged)
        assert torch.equal(cache(squares[:1]), actual)
        assert path.read_bytes() == whole_bytes


def test_a_disk_without_room_keeps_no_features_and_gives_the_same(
    squares: list[bytes],
    make_model: Any,
    build: Callable[..., Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole, _ = build(make_model())
    expected = kept_features(whole, to_pixels(), root=tmp_path / "kept")(squares)
    assert len(files(tmp_path / "kept")) == len(squares)
    assert not caplog.records
    full = FeatureCache(whole, to_pixels(), root=tmp_path / "full", leave_free=1)  # no disk is free as a whole
    for times in (1, 2):
        assert torch.equal(full(squares), expected)
        assert full.num_computed == times * len(squares)
    assert files(tmp_path / "full") == []
    assert [record.message for record in caplog.records if "features_leave_free" not in record.message] == []
    assert len(caplog.records) == 1


@pytest.mark.parametrize("projector", ["linear", "mlp_gelu", "mlp_downsample", "transformer"])
def test_every_projector_takes_features_in_16_bits(projector: str, make_model: Any, build: Callable[..., Any]) -> None:
    """Features of a tower that trains are accepted too; autocast leaves sums in them in 32 bits."""
    more = {"num_layers": 1, "num_heads": 4} if projector == "transformer" else {}
    model = make_model()
    whole, _ = build(model.model_validate({**model.model_dump(), "projector": {"kind": projector, **more}}))
    features = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide, narrow = (whole.model.multi_modal_projector(f).float() for f in (features, features.bfloat16()))
    assert (narrow - wide).norm() <= 2**-6 * wide.norm()
