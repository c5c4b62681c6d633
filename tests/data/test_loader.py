from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vila_ops.config import Mixture, Stage
from vila_ops.data.loader import Rows, stack
from vila_ops.data.shards import Sample, ShardWriter, write_index

COUNTS = {"a": 60, "b": 30, "c": 10}
DIGEST = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources of samples with lengths of their own."""
    root: Path = tmp_path_factory.mktemp("rows")
    draw = np.random.default_rng(0)
    rows = []
    for name, count in COUNTS.items():
        writer = ShardWriter(root / f"{name}-00000.tar")
        for number in range(count + 5):
            ids = draw.integers(4, 500, draw.integers(5, 30)).tolist()
            targets = [False, *(draw.random(len(ids) - 1) < 0.6).tolist()]
            targets[-1] = True
            made = Sample(
                key=f"{name}-00000-{number:06d}", source=name, object=str(number), category="", text="", licence="",
                provenance="", input_ids=ids, is_target=targets, images=(b"png",) * int(number % 3 == 0),
            )  # fmt: skip
            writer.add(made, split="train" if number < count else "validation")
        rows += writer.close()
    write_index(rows, root)
    return root


@pytest.fixture(scope="module")
def make_rows(folder: Path, make_stage: Any) -> Any:
    def make(weights: dict[str, float] | None = None, *, digest: str = DIGEST, **more: Any) -> Rows:
        sources = {
            name: {"kind": "jsonl", "path": "x", "render": "caption", "weight": weight}
            for name, weight in (weights or {"a": 1, "b": 1, "c": 1}).items()
        }
        mixture = Mixture.model_validate({"name": "m", "sources": sources})
        stage: Stage = make_stage(mixture, **{"row_tokens": 64, "global_batch_size": 8, **more})
        return Rows(folder, digest=digest, stage=stage)

    return make


def same(left: Any, right: Any) -> bool:
    return left.keys == right.keys and all(
        (getattr(left, name) == getattr(right, name)).all() for name in ("input_ids", "labels", "segment_ids")
    )


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_global_batches_are_the_same_for_any_world_size(world_size: int, make_rows: Any) -> None:
    rows = make_rows()
    for step in (0, 1, 5, 9):
        whole, targets = rows.batch(step)
        shares = [rows.batch(step, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert all(same(x, y) for x, y in zip(whole, [row for share, _ in shares for row in share], strict=True))
        assert {number for _, number in shares} == {targets}
        assert targets == sum(int((row.labels >= 0).sum()) for row in whole)


def test_any_step_is_reached_at_once_and_the_order_is_a_pure_function(make_rows: Any) -> None:
    sequential = make_rows()
    keys = [[row.keys for row in sequential.batch(step)[0]] for step in range(40)]  # several epochs
    for step in (39, 0, 17, 18, 3):
        assert [row.keys for row in make_rows().batch(step)[0]] == keys[step]
        assert [row.keys for row in sequential.batch(step)[0]] == keys[step]
    first = make_rows(seed=1).batch(0)[0]
    assert [row.keys for row in first] != keys[0]
    assert [row.keys for row in make_rows(digest="f" * 64).batch(0)[0]] != keys[0]
    turned = make_rows({"c": 1, "b": 1, "a": 1}).batch(3)[0]
    assert [row.keys for row in turned] == keys[3]


def test_weights_give_the_shares_asked_for(make_rows: Any) -> None:
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
    for name, count in COUNTS.items():  # and inside a source nothing is favoured
        drawn = [keys[f"{name}-00000-{number:06d}"] for number in range(count)]
        assert max(drawn) - min(drawn) <= 2
    assert not any(int(key.rsplit("-", 1)[1]) >= COUNTS[key[0]] for key in keys), "a held-out sample was trained on"


def test_one_epoch_of_equal_weights_shows_everything_of_a_single_source_once(make_rows: Any) -> None:
    rows = make_rows({"a": 1}, global_batch_size=1)
    seen: Counter[str] = Counter()
    step = 0
    while seen.total() < 60:
        seen.update(rows.batch(step)[0][0].keys)
        step += 1
    assert set(seen.values()) == {1}
    assert len(seen) == 60


def test_validation_reads_held_out_samples_and_always_the_same(make_rows: Any) -> None:
    one, again = make_rows().validation(), make_rows(seed=3).validation()
    assert [row.keys for row in one] == [row.keys for row in again]
    assert len(one) == 2
    assert all(int(key.rsplit("-", 1)[1]) >= COUNTS[key[0]] for row in one for key in row.keys)
    assert len(make_rows(validation_rows=100).validation()) < 100


def test_an_empty_source_is_named(make_rows: Any) -> None:
    with pytest.raises(ValueError, match=r"\['nothing'\] have no training sample"):
        make_rows({"a": 1, "nothing": 1})


def test_rows_are_stacked(make_rows: Any) -> None:
    rows, _ = make_rows().batch(0)
    arrays = stack(rows)
    assert [array.shape for array in arrays] == [(8, 64)] * 4
    assert (arrays[3][2] == rows[2].labels).all()
