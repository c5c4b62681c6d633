import functools
import itertools
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vila_ops.config import Mixture, Stage
from vila_ops.data.loading import arrays, order
from vila_ops.data.loading.loader import RowLoader, stack
from vila_ops.data.loading.packing import PackedRow
from vila_ops.data.shards import Sample, ShardWriter, read_index, read_sample, write_index

COUNTS = {"a": 60, "b": 30, "c": 10}
DIGEST = "0123456789abcdef" * 4
IMAGE = 501
"""Stands for an image's placeholder."""
MakeRows = Callable[..., RowLoader]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources of samples with lengths of their own; a third of them starts with an image of four tokens."""
    root: Path = tmp_path_factory.mktemp("rows")
    draw = np.random.default_rng(0)
    rows = []
    for name, count in COUNTS.items():
        path = root / f"{name}-{name}.tar"
        writer = ShardWriter(path, name=path.name, suffix="png")
        for number in range(count + 5):
            shows = number % 3 == 0
            ids = [IMAGE] * 4 * shows + draw.integers(4, 500, draw.integers(5, 30)).tolist()
            targets = [False, *(draw.random(len(ids) - 1) < 0.6).tolist()]
            targets[-1] = True
            made = Sample(
                id=f"{name}-{number}", source=name, object=str(number), category="", text="", licence="",
                provenance="", input_ids=ids, is_target=targets, images=(f"{name}{number}".encode(),) * shows,
            )  # fmt: skip
            writer.add(made, split="train" if number < count else "validation")
        rows += writer.close()
    write_index(rows, root)
    return root


@pytest.fixture(params=["planned", "kept"])
def make_rows(request: Any, folder: Path, make_stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRows:
    """Rows of the folder, whose epochs are too small to be kept, and the same with all of them kept."""
    if request.param == "kept":
        monkeypatch.setattr(order, "CACHED_FROM", 0)

    def make(
        weights: dict[str, float] | None = None, *, digest: str = DIGEST, cache: str = "cache", **more: Any
    ) -> RowLoader:
        sources = {
            name: {"kind": "jsonl", "path": "x", "render": "caption", "weight": weight}
            for name, weight in (weights or {"a": 1, "b": 1, "c": 1}).items()
        }
        mixture = Mixture.model_validate({"name": "m", "sources": sources})
        stage: Stage = make_stage(mixture, **{"sequence_length": 64, "global_batch_size": 8, **more})
        return RowLoader(folder.joinpath, digest=digest, stage=stage, cache=tmp_path / cache)

    return make


def same(left: Any, right: Any) -> bool:
    return (left.keys, left.images) == (right.keys, right.images) and all(
        (getattr(left, name) == getattr(right, name)).all() for name in ("input_ids", "labels", "segment_ids")
    )


@pytest.mark.slow
@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_global_batches_are_the_same_for_any_world_size(world_size: int, pack: bool, make_rows: MakeRows) -> None:
    rows = make_rows(pack=pack)
    for step in (0, 1, 5, 9):
        whole, targets = rows.batch(step)
        ranks = [make_rows(pack=pack) for _ in range(world_size)]
        shares = [own.batch(step, rank=rank, world_size=world_size) for rank, own in enumerate(ranks)]
        assert all(same(x, y) for x, y in zip(whole, [row for share, _ in shares for row in share], strict=True))
        assert {number for _, number in shares} == {targets}
        assert targets == sum(int((row.labels >= 0).sum()) for row in whole)
        assert any(row.images for row in whole)


@pytest.mark.slow
@pytest.mark.parametrize("pack", [True, False])
def test_any_step_is_reached_at_once_and_the_order_is_a_pure_function(pack: bool, make_rows: MakeRows) -> None:
    make_rows = functools.partial(make_rows, pack=pack)
    sequential = make_rows()
    keys = [[row.keys for row in sequential.batch(step)[0]] for step in range(40)]  # several epochs
    for step in (39, 0, 17, 18, 3):
        assert [row.keys for row in make_rows(cache=f"cold-{step}").batch(step)[0]] == keys[step]
        assert [row.keys for row in sequential.batch(step)[0]] == keys[step]
    assert len({str(batch) for batch in keys}) == 40, "epochs differ"
    first = make_rows(seed=1).batch(0)[0]
    assert [row.keys for row in first] != keys[0]
    assert [row.keys for row in make_rows(digest="f" * 64).batch(0)[0]] != keys[0]
    turned = make_rows({"c": 1, "b": 1, "a": 1}).batch(3)[0]
    assert [row.keys for row in turned] == keys[3]


def test_samples_come_whole_and_as_they_were_written(folder: Path, make_rows: MakeRows) -> None:
    """So an image is never split: its tokens stand together in one row, and the row has its bytes."""
    written = {row["key"]: row for row in read_index(folder).to_pylist()}
    seen = 0
    for step in range(10):
        for row in make_rows().batch(step)[0]:
            images: list[bytes] = []
            for number, key in enumerate(row.keys, start=1):
                place = {name: written[key][name] for name in ("shard", "offset", "key")}
                sample = read_sample(folder, **place)
                assert row.input_ids[row.segment_ids == number].tolist() == sample.input_ids
                images += sample.images
            assert row.images == tuple(images)
            assert int((row.input_ids == IMAGE).sum()) == 4 * len(images)
            seen += len(images)
    assert seen > 50


def validation(rows: RowLoader) -> list[PackedRow]:
    return rows.read(rows.held_out().rows)


def epoch_of(rows: RowLoader) -> Counter[str]:
    """How often an epoch, the first one, has each sample; read row by row."""
    whole = sum(share.samples_per_epoch for share in rows.composition.shares.values())
    seen: Counter[str] = Counter()
    for step in itertools.count():
        if seen.total() == whole:
            return seen
        seen.update(rows.batch(step)[0][0].keys)
    raise AssertionError


def test_without_packing_a_row_is_a_sample_and_an_epoch_has_the_same_samples(folder: Path, make_rows: MakeRows) -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 1.0}
    packed, single = (make_rows(weights, pack=pack, global_batch_size=1) for pack in (True, False))
    assert epoch_of(single) == epoch_of(packed)
    lengths = {row["key"]: row["num_tokens"] for row in read_index(folder).to_pylist()}
    for row in [single.batch(step)[0][0] for step in range(100)] + validation(single):
        assert [len(row.input_ids)] == [lengths[key] for key in row.keys]
        assert (row.segment_ids == 1).all()
    held_out = validation(make_rows(pack=False, validation_rows=100))
    assert len({row.keys for row in held_out}) == 15
    with pytest.raises(ValueError, match=r"tokens do not fit into a row of 4"):
        make_rows(pack=False, sequence_length=4).batch(0)


@pytest.mark.parametrize(
    ("epochs", "batch", "steps"),
    [(1, 8, 8), (1, 60, 1), (2, 60, 2), (1.5, 8, 12), (0.5, 60, 1), (0.001, 8, 1), (1.1, 66, 1), (2.2, 4, 33)],
)
def test_epochs_without_packing_are_counted_by_hand(
    epochs: float, batch: int, steps: int, make_rows: MakeRows, tmp_path: Path
) -> None:
    """Of 60 samples; 1.1 passes are 66 of them, though the float is a little more than eleven tenths."""
    rows = make_rows({"a": 1}, pack=False, num_steps=None, epochs=epochs, global_batch_size=batch)
    assert rows.num_steps() == steps
    assert not list(tmp_path.glob("cache/plan-*")), "it takes no plan to know"


def test_an_epoch_that_does_not_fill_a_batch_is_said_to_be_repeated(make_rows: MakeRows) -> None:
    asked = {"pack": False, "num_steps": None, "epochs": 1}
    (note,) = make_rows({"a": 1}, **asked, global_batch_size=240).notes()
    assert "an epoch has 60 rows, fewer than the global batch of 240: each row is read about 4 times a step" in note
    assert make_rows({"a": 1}, **asked, global_batch_size=60).notes() == ()
    assert make_rows({"a": 1}, global_batch_size=240).notes() == ()


@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_the_steps_of_packed_epochs_read_every_sample_so_often(epochs: int, make_rows: MakeRows) -> None:
    rows = make_rows({"a": 1}, num_steps=None, epochs=epochs, global_batch_size=1)
    seen: Counter[str] = Counter()
    for step in range(rows.num_steps()):
        seen.update(rows.batch(step)[0][0].keys)
    assert set(seen.values()) == {epochs}
    assert len(seen) == 60
    assert rows.num_steps() == make_rows({"a": 1}, num_steps=None, epochs=epochs, global_batch_size=1).num_steps()


def test_the_last_step_of_an_epoch_is_filled_with_the_first_rows_of_the_next(make_rows: MakeRows) -> None:
    rows = make_rows({"a": 1}, pack=False, num_steps=None, epochs=1)
    keys = [row.keys for step in range(rows.num_steps()) for row in rows.batch(step)[0]]
    one_by_one = make_rows({"a": 1}, pack=False, global_batch_size=1)
    assert keys == [one_by_one.batch(step)[0][0].keys for step in range(64)]
    assert len(set(keys[:60])) == 60
    assert len(set(keys[60:])) == 4


def test_a_kept_plan_is_made_once_for_counting_and_for_reading(make_rows: MakeRows, tmp_path: Path) -> None:
    rows = make_rows(num_steps=None, epochs=2)
    steps = rows.num_steps()
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/plan-*")}
    assert len(made) == (2 if order.CACHED_FROM == 0 else 0)
    again = make_rows(num_steps=None, epochs=2)
    assert again.num_steps() == steps
    for step in range(steps - 1):
        again.batch(step)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/plan-*")} == made


@pytest.mark.slow
def test_weights_give_the_shares_asked_for(make_rows: MakeRows) -> None:
    rows = make_rows({"a": 1, "b": 2, "c": 1})
    seen: Counter[str] = Counter()
    keys: Counter[str] = Counter()
    for step in range(100):
        for row in rows.batch(step)[0]:
            seen.update(key[0] for key in row.keys)
            keys.update(row.keys)
    total = seen.total()
    for name, share in (("a", 0.25), ("b", 0.5), ("c", 0.25)):
        assert seen[name] / total == pytest.approx(share, abs=0.02)
        assert rows.composition.shares[name].sample_share == pytest.approx(share, abs=0.01)
    # And inside a source nothing is favoured: whole epochs differ by one sight, and the last is not over.
    for name, sights in {"a": 1, "b": 2, "c": 3}.items():  # 25 of 60, 50 of 30, 25 of 10 samples an epoch
        drawn = [keys[f"{name}-{number:06d}"] for number in range(COUNTS[name])]
        assert max(drawn) - min(drawn) <= 1 + sights
    assert not any(int(key.rsplit("-", 1)[1]) >= COUNTS[key[0]] for key in keys), "a held-out sample was trained on"
    assert "source 'c' has 10 samples, too few for 25.0% of the samples" in rows.composition.notes[1]


def test_one_epoch_shows_everything_of_a_single_source_once(make_rows: MakeRows) -> None:
    rows = make_rows({"a": 1}, global_batch_size=1)
    for _ in range(3):
        seen: Counter[str] = Counter()
        steps = itertools.count()
        while seen.total() < 60:
            seen.update(rows.batch(next(steps))[0][0].keys)
        assert set(seen.values()) == {1}
        assert len(seen) == 60


def test_validation_reads_held_out_samples_and_always_the_same(make_rows: MakeRows) -> None:
    one, again = validation(make_rows()), validation(make_rows(seed=3))
    assert [row.keys for row in one] == [row.keys for row in again]
    assert len(one) == 2
    assert all(int(key.rsplit("-", 1)[1]) >= COUNTS[key[0]] for row in one for key in row.keys)
    every = validation(make_rows(validation_rows=100))
    assert len(every) < 100
    assert len([key for row in every for key in row.keys]) == 15


def test_an_empty_source_is_named(make_rows: MakeRows) -> None:
    with pytest.raises(ValueError, match=r"\['nothing'\] have no training sample"):
        make_rows({"a": 1, "nothing": 1})


def test_a_dataset_without_validation_samples_is_named(make_stage: Any, folder: Path, tmp_path: Path) -> None:
    rows = [row for row in read_index(folder).to_pylist() if row["split"] == "train"]
    write_index(rows, tmp_path)
    source = {"kind": "jsonl", "path": "x", "render": "caption"}
    stage = make_stage(Mixture.model_validate({"name": "m", "sources": {"a": source}}))
    with pytest.raises(ValueError, match="mixture 'm' has no validation sample"):
        RowLoader(tmp_path.joinpath, digest=DIGEST, stage=stage, cache=tmp_path / "cache")


@pytest.mark.parametrize("array", ["members", "starts", "num_targets", "keys", "numbers"])
def test_a_damaged_cache_is_rebuilt(
    array: str, make_rows: MakeRows, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = make_rows(cache="other").batch(2)
    make_rows().batch(2)
    damaged = list((tmp_path / "cache").glob(f"*/{array}.npy"))
    for path in damaged:
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    rows, targets = make_rows().batch(2)
    assert targets == expected[1]
    assert all(same(x, y) for x, y in zip(rows, expected[0], strict=True))
    assert ("it is rebuilt" in caplog.text) == bool(damaged)


def test_two_caches_whose_damage_shows_when_they_are_read_are_both_rebuilt(
    make_rows: MakeRows, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "PIECE", 256)  # so that the first piece is not the only one
    expected = make_rows(cache="other").batch(2)
    make_rows().batch(2)
    for path in (tmp_path / "cache").glob("*/*.npy"):
        whole = path.read_bytes()
        path.write_bytes(whole[:256] + bytes(byte ^ 1 for byte in whole[256:]))
    rows, targets = make_rows().batch(2)
    assert targets == expected[1]
    assert all(same(x, y) for x, y in zip(rows, expected[0], strict=True))
    assert caplog.text.count("it is rebuilt") == len(list((tmp_path / "cache").iterdir()))


def test_rows_are_stacked(make_rows: MakeRows) -> None:
    rows, _ = make_rows().batch(0)
    arrays = stack(rows)
    assert [array.shape for array in arrays] == [(8, 64)] * 4
    assert (arrays[3][2] == rows[2].labels).all()


def test_rows_of_different_lengths_are_padded_to_the_longest(make_rows: MakeRows) -> None:
    rows, _ = make_rows(pack=False).batch(0)
    lengths = [len(row.input_ids) for row in rows]
    assert len(set(lengths)) > 1
    for array, name, padding in zip(
        stack(rows), ("input_ids", "position_ids", "segment_ids", "labels"), (0, 0, 0, -100), strict=True
    ):
        assert array.shape == (8, max(lengths))
        for row, padded in zip(rows, array.tolist(), strict=True):
            own = getattr(row, name).tolist()
            assert padded == own + [padding] * (max(lengths) - len(own))


@pytest.mark.parametrize("pack", [True, False])
def test_a_global_batch_says_what_its_samples_have(pack: bool, make_rows: MakeRows) -> None:
    rows = make_rows(pack=pack)
    for step in range(3):
        whole, (read, num_targets) = rows.global_batch(step), rows.batch(step)
        assert whole.num_images == [len(row.images) for row in read]
        assert [row.num_images for row in read] == [
            tuple(key_images.count(key) for key in row.keys) for row in read for key_images in [row.keys_of_images()]
        ]
        assert whole.num_targets == num_targets == sum(int((row.labels >= 0).sum()) for row in read)


@pytest.mark.parametrize("is_damaged", [False, True])
def test_threads_read_at_the_same_time_what_one_reads(
    is_damaged: bool, make_rows: MakeRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one of them finds a damaged cache, which it rebuilds while the others wait."""
    monkeypatch.setattr(arrays, "PIECE", 256)
    alone = make_rows(cache="other")
    expected = [alone.batch(step)[0] for step in range(12)]
    make_rows().batch(2)
    for path in (tmp_path / "cache").glob("*/*.npy") if is_damaged else ():
        whole = path.read_bytes()
        path.write_bytes(whole[:256] + bytes(byte ^ 1 for byte in whole[256:]))
    together = make_rows()
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda step: together.batch(step)[0], [*range(12)] * 4))
    for number, rows in enumerate(read):
        assert all(same(x, y) for x, y in zip(rows, expected[number % 12], strict=True))
