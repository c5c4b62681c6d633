from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vila_ops.data.loading.index import Index
from vila_ops.data.loading.order import EpochRequest, draws, epoch_plan
from vila_ops.data.shards import write_index


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """16 samples of one source, then 5 of another; half as many held-out ones between them."""
    folder = tmp_path_factory.mktemp("index")
    splits = [("a", "train")] * 16 + [("a", "validation")] * 11 + [("b", "train")] * 5
    text = dict.fromkeys(("id", "object", "licence", "shard"), "x")
    rows = [
        {**text, "key": str(i), "source": source, "split": split, "offset": 0, "num_tokens": 1 + i % 7,
         "num_targets": 1, "num_images": 0}
        for i, (source, split) in enumerate(splits)
    ]  # fmt: skip
    write_index(rows, folder)
    return Index(folder.joinpath, digest="ab" * 32, cache=folder / "cache")


def asked(*, seed: int = 0, digest: str = "ab" * 32, capacity: int = 20, **samples_per_epoch: int) -> EpochRequest:
    return EpochRequest(digest, seed, capacity, samples_per_epoch)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(count=st.integers(1, 60), epochs=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_over_any_epochs_each_sample_of_a_source_is_seen_equally_often(
    count: int, epochs: int, seed: int, index: Index
) -> None:
    seen: Counter[int] = Counter()
    for epoch in range(epochs):
        drawn = draws(asked(seed=seed, a=count, b=3), epoch, index).tolist()
        assert sum(number < 16 for number in drawn) == count
        assert sum(number >= 27 for number in drawn) == 3
        seen.update(drawn)
    often = [seen[number] for number in range(16)]
    assert min(often) == count * epochs // 16
    assert max(often) == -(-count * epochs // 16)


def test_half_a_pass_is_another_half_each_epoch(index: Index) -> None:
    """Of 2.5 passes: all samples twice, and half of them a third time."""
    want = asked(a=40, b=1)
    first, second = (Counter(n for n in draws(want, epoch, index).tolist() if n < 16) for epoch in (0, 1))
    assert set(first.values()) == set(second.values()) == {2, 3}
    thrice = [{number for number, count in seen.items() if count == 3} for seen in (first, second)]
    assert [len(some) for some in thrice] == [8, 8]
    assert not thrice[0] & thrice[1]


def test_the_order_follows_digest_seed_and_epoch_and_nothing_else(index: Index, tmp_path: Path) -> None:
    def rows(epoch: int = 0, **more: int | str) -> list[list[int]]:
        found = epoch_plan(asked(a=16, b=5, **more), epoch, index=index, cache=tmp_path)  # type: ignore[arg-type]
        return [found.row(number).tolist() for number in range(len(found))]

    assert rows() == rows()
    variants = [rows(), rows(epoch=1), rows(seed=1), rows(digest="cd" * 32), rows(capacity=21)]
    assert len({str(variant) for variant in variants}) == 5
    for variant in variants:
        assert sorted(number for row in variant for number in row) == [*range(16), *range(27, 32)]


def test_a_kept_plan_is_the_plan(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = asked(a=40, b=40)
    planned = epoch_plan(want, 3, index=index, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("vila_ops.data.loading.order.CACHED_FROM", 80)
    for _ in ("made", "opened"):
        kept = epoch_plan(want, 3, index=index, cache=tmp_path)
        assert len(kept) == len(planned)
        assert all((kept.row(number) == planned.row(number)).all() for number in range(len(planned)))
    assert len(list(tmp_path.iterdir())) == 1
    assert np.concatenate([kept.row(number) for number in range(len(kept))]).dtype == np.uint32
