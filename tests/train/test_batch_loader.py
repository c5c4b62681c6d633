"""Micro-batches that threads read ahead are those that are read one after another, and nothing of them is shared."""

import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vila_ops.config import NO_CONTEXT
from vila_ops.data.shards import CorruptShard
from vila_ops.model.copies import Copies
from vila_ops.model.features import BATCH
from vila_ops.model.trainable import set_trainable
from vila_ops.train.batch_loader import BatchLoader
from vila_ops.train.engine import PlainEngine
from vila_ops.train.job import RankInfo, TrainJob
from vila_ops.train.loop import load, train
from vila_ops.train.objective import Batch, Objective, copied

STEPS, ROWS = 6, 4


@pytest.fixture
def job(bench: Any, make_stage: Any, tmp_path: Path) -> TrainJob:
    return make_job(bench, make_stage, tmp_path)


def make_job(bench: Any, make_stage: Any, root: Path, *, stage: Any = (), **train: Any) -> TrainJob:
    """A job whose features are in a folder of its own."""
    settings = {"trainable": ["projector", "language_model"], "num_steps": STEPS, "global_batch_size": ROWS}
    changes = {"storage.store": str(root / "store"), **{f"train.{key}": value for key, value in train.items()}}
    return TrainJob(
        stage=make_stage(bench.mixture, **{**settings, **dict(stage)}), data=bench.data, init=bench.init,
        resources=bench.resources.with_changes(changes), attempt=str(root), resume=str(root / "resume"),
        run_id=None, fresh_projector=False, context=NO_CONTEXT,
    )  # fmt: skip


def loader_of(job: TrainJob, rank_info: RankInfo | None = None) -> BatchLoader:
    _, rows, batches = load(job)
    return BatchLoader(job, rank_info or RankInfo(), rows, batches)


def living_threads() -> list[str]:
    """Threads of a stage that do not end, on however busy a machine."""
    named = [thread for thread in threading.enumerate() if thread.name in ("loading", "features", "watchdog")]
    for thread in named:
        thread.join(60)
    return [thread.name for thread in named if thread.is_alive()]


def tensors_of(batch: Batch) -> dict[str, Tensor]:
    """Every tensor of a batch by its field."""
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def assert_same(batch: Batch, expected: Batch) -> None:
    actual, wanted = tensors_of(batch), tensors_of(expected)
    assert actual.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(actual[name], wanted[name]), name
    assert (batch.draws, batch.any_images) == (expected.draws, expected.any_images)


@pytest.mark.parametrize("trainable", [("projector", "language_model"), ("vision_tower", "projector")])
def test_the_bytes_are_those_of_rows_that_are_read_in_turn_at_any_number_of_threads(
    trainable: tuple[str, ...], bench: Any, make_stage: Any, tmp_path: Path
) -> None:
    stage = {"trainable": trainable}
    _, rows, batches = load(make_job(bench, make_stage, tmp_path / "in_turn", stage=stage))
    for threads, size in ((1, 1), (2, 3), (5, 4)):
        job = make_job(
            bench, make_stage, tmp_path / f"{threads}", stage=stage, loading_threads=threads, micro_batch_size=size
        )
        with loader_of(job) as loader:
            for step in (0, 1, 2, 5, 4):  # also a jump, as a resume makes
                own, num_targets = rows.batch(step)
                taken = list(loader.train(step))
                assert [len(one.rows) for one in taken] == [
                    len(own[start : start + size]) for start in range(0, 4, size)
                ]
                for number, one in enumerate(taken):
                    assert_same(one.batch, batches(own[number * size : (number + 1) * size], step=step))
                    assert one.num_targets == num_targets
            validated = list(loader.validation())
            assert [one.rows[0].keys for one in validated] == [row.keys for row in rows.read(rows.held_out().rows)]
            for one in validated:
                assert_same(one.batch, batches(one.rows))


def test_a_rank_knows_without_asking_whether_any_rank_has_images(bench: Any, make_stage: Any, tmp_path: Path) -> None:
    job = make_job(bench, make_stage, tmp_path, stage={"validation_rows": 3, "pack": False})
    kinds = set()
    ranks = [RankInfo(rank=rank, world_size=2) for rank in range(2)]
    with loader_of(job, ranks[0]) as first, loader_of(job, ranks[1]) as second:
        loaders = (first, second)
        passes = [pair for step in range(STEPS) for pair in zip(*(one.train(step) for one in loaders), strict=True)]
        validated = list(zip(*(one.validation() for one in loaders), strict=True))
    assert [len(one.rows) for one in validated[-1]] == [1, 0], "the third row, and a pass that keeps the ranks together"
    for pair in passes + validated:
        own = [one.batch.features is not None for one in pair]
        kinds.add(tuple(own))
        assert [one.batch.any_images for one in pair] == [any(own)] * 2
    assert {(True, False), (False, False)} <= kinds | {kind[::-1] for kind in kinds}


class LateCopies(Copies):
    """Copies as a busy stream makes them: the source is read only when the copy is waited for."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.sources: dict[int, Tensor] = {}

    def to_device(self, tensor: Tensor) -> Tensor:
        copy = torch.empty_like(tensor)
        self.sources[id(copy)] = tensor
        return copy

    def arrived(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(self.sources.pop(id(tensor)))

    def to_host(self, tensor: Tensor) -> Callable[[], Tensor]:
        return lambda: tensor.to("cpu", copy=True)


@pytest.mark.parametrize("copies", [Copies, LateCopies])
def test_what_the_consumer_does_with_a_batch_reaches_no_other_batch(copies: type[Copies], job: TrainJob) -> None:
    """The consumer overwrites each batch while later ones are read, and those it holds stay as they were."""
    _, rows, batches = load(job)
    loader = loader_of(job)
    loader.batch_builder.copies = copies(torch.device("cpu"))
    loader.batch_builder.feature_cache.copies = copies(torch.device("cpu"))
    with loader:
        held = []
        for step in range(STEPS):
            for number, one in enumerate(loader.train(step)):
                expected = batches([rows.batch(step)[0][number]], step=step)
                assert_same(one.batch, expected)
                if number % 2:
                    held.append((one.batch, copied(one.batch, torch.clone)))
                else:
                    for tensor in tensors_of(one.batch).values():
                        tensor.fill_(1)
        for batch, before in held:
            assert_same(batch, before)


def test_a_new_image_goes_through_the_tower_once_in_full_passes(
    bench: Any, make_stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(bench, make_stage, tmp_path, stage={"num_steps": 20}, loading_threads=40)
    _, rows, _ = load(job)
    images = [image for step in range(20) for row in rows.batch(step)[0] for image in row.images]
    assert len(set(images)) < len(images)
    loader = loader_of(job)
    shapes: list[tuple[int, ...]] = []
    tower_features = loader.batch_builder.model.tower_features

    def counted(pixel_values: Tensor) -> Tensor:
        shapes.append(tuple(pixel_values.shape))
        features: Tensor = tower_features(pixel_values)
        return features

    monkeypatch.setattr(loader.batch_builder.model, "tower_features", counted)
    with loader:
        for step in range(20):
            for _ in loader.train(step):
                pass
    assert set(shapes) == {(BATCH, 3, 56, 56)}
    assert len(shapes) == -(-len(set(images)) // BATCH), "blank images at the end only"
    assert loader.batch_builder.feature_cache.num_computed == len(set(images))


def test_features_that_are_not_kept_stay_on_the_device(
    bench: Any, make_stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(bench, make_stage, tmp_path)
    full = TrainJob.model_validate(
        {**job.model_dump(), "resources": job.resources.with_changes({"storage.features_leave_free": 1.0})}
    )
    _, rows, batches = load(make_job(bench, make_stage, tmp_path / "kept"))
    loader = loader_of(full)
    monkeypatch.setattr(loader.batch_builder.feature_cache.copies, "to_host", None)
    with loader:
        for step in range(STEPS):
            for number, one in enumerate(loader.train(step)):
                assert_same(one.batch, batches([rows.batch(step)[0][number]], step=step))
    assert not list(Path(full.feature_cache()).rglob("*.features"))


def damaged(rows: Any, *, step: int) -> str:
    """Let the first image of a step be read as half of it. Returns the key of its sample."""
    row = next(row for row in rows.batch(step)[0] if row.images)
    image, read = row.images[0], rows.read

    def cut(numbers: Any) -> Any:
        return [
            dataclasses.replace(one, images=tuple(i[: len(i) // 2] if i == image else i for i in one.images))
            for one in read(numbers)
        ]

    rows.read = cut
    key: str = row.keys_of_images()[0]
    return key


@pytest.mark.parametrize("trainable", [("projector",), ("vision_tower", "projector")])
def test_an_image_that_cannot_be_decoded_names_its_sample_when_its_turn_comes(
    trainable: tuple[str, ...], bench: Any, make_stage: Any, tmp_path: Path
) -> None:
    loader = loader_of(make_job(bench, make_stage, tmp_path, stage={"trainable": trainable}))
    seen = {image for step in range(2) for row in loader.row_loader.batch(step)[0] for image in row.images}
    step = next(
        step
        for step in range(2, STEPS)
        if (new := [i for row in loader.row_loader.batch(step)[0] for i in row.images]) and new[0] not in seen
    )
    key = damaged(loader.row_loader, step=step)
    with loader:
        for before in range(2):
            assert len(list(loader.train(before))) == ROWS
        with pytest.raises(CorruptShard, match=f"an image of sample '{key}' cannot be decoded"):
            list(loader.train(step))
    assert living_threads() == []


WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique")


class HostWaits(TorchDispatchMode):
    """Collects what would make the host wait for a device, and what the ranks would tell each other."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        masks = name == "aten::index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        if masks or name.startswith("c10d::") or any(name.startswith(f"aten::{wait}") for wait in WAITS):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("trainable", "tuning"),
    [
        (("projector",), {"kind": "full"}),
        (("vision_tower", "projector", "language_model"), {"kind": "full"}),
        (("projector", "language_model"), {"kind": "visual_expert"}),
        (("projector", "language_model"), {"kind": "lora", "rank": 2, "dropout": 0.1}),
    ],
)
def test_no_pass_of_a_step_waits_for_the_device_or_asks_another_rank(
    trainable: tuple[str, ...], tuning: dict[str, Any], bench: Any, make_stage: Any, tmp_path: Path
) -> None:
    """Ops that give a number or a shape to the host, on the thread that computes; the loading threads may use them."""
    job = make_job(bench, make_stage, tmp_path, stage={"trainable": trainable, "tuning": tuning})
    model, rows, batches = load(job)
    objective = Objective(model).train()
    engine = PlainEngine(objective, set_trainable(objective, trainable, job.stage.tuning), job.stage, job.resources)
    with BatchLoader(job, RankInfo(), rows, batches) as loader, HostWaits() as waits:
        kinds = set()
        for step in range(STEPS):
            for one in loader.train(step):
                kinds.add(one.batch.any_images)
                loss, _ = engine.loss(one.batch)
                engine.backward(loss / one.num_targets)
        assert waits.names == []
        assert int(loss.detach()) > 0
        assert waits.names == ["aten::_local_scalar_dense"], "so it would have been seen"
    assert kinds == {True, False}


def test_no_thread_of_a_stage_outlives_it(job: TrainJob) -> None:
    train(job, RankInfo())
    assert living_threads() == []
