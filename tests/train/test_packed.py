"""Samples in a packed row do not affect each other, and a step's gradient does not depend on the split of its rows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vila_ops.artifacts.store import content, opened
from vila_ops.config import NO_CONTEXT
from vila_ops.data.loading.loader import RowLoader, stack
from vila_ops.data.loading.packing import PackedRow, pack
from vila_ops.data.shards import Sample, read_index, read_sample
from vila_ops.model import folder as model_folder
from vila_ops.model.trainable import set_trainable
from vila_ops.tracking import MetricLog
from vila_ops.train.bad_samples import BadSampleFinder
from vila_ops.train.batch_builder import BatchBuilder
from vila_ops.train.batch_loader import BatchLoader
from vila_ops.train.engine import PlainEngine
from vila_ops.train.job import RankInfo, TrainJob
from vila_ops.train.loop import accumulate_gradients
from vila_ops.train.metrics import LossAccumulator
from vila_ops.train.objective import Objective
from vila_ops.train.watchdog import StepWatchdog

BATCH = 8


@pytest.fixture
def job(bench: Any, make_stage: Any, tmp_path: Path) -> TrainJob:
    trainable = ["projector", "language_model"]
    return TrainJob(
        stage=make_stage(bench.mixture, trainable=trainable, global_batch_size=BATCH, sequence_length=256),
        data=bench.data, init=bench.init, resources=bench.resources, attempt=str(tmp_path), resume=str(tmp_path),
        run_id=None, fresh_projector=True, context=NO_CONTEXT,
    )  # fmt: skip


@pytest.fixture
def objective(job: TrainJob) -> Objective:
    """In train mode and with a KV cache by default. Its matrices are scaled up, so that a leak exceeds rounding."""
    model = model_folder.load(content(job.init))
    for parameter in model.model.language_model.parameters():
        if parameter.ndim == 2:
            parameter.data *= 4
    assert model.config.text_config.use_cache
    return Objective(model).train()


def chosen(job: TrainJob) -> list[Sample]:
    """Return two samples of each source, so that some have images and some have none."""
    table = read_index(content(job.data)).to_pylist()
    picked = [
        row for source in ("pairs", "documents", "definitions") for row in
        [row for row in table if row["source"] == source][:2]
    ]  # fmt: skip
    return [read_sample(content(job.data), shard=r["shard"], offset=r["offset"], key=r["key"]) for r in picked]


def logits_of(objective: Objective, batches: BatchBuilder, row: PackedRow) -> Tensor:
    """Return the (T, V) logits of the hidden states in the objective's forward pass."""
    seen: list[Tensor] = []
    hook = objective.model.model.language_model.register_forward_hook(lambda *args: seen.append(args[-1][0]))
    objective(batches([row]))
    hook.remove()
    logits: Tensor = objective.model.lm_head(seen[0][0])
    return logits


def test_logits_of_a_packed_row_are_those_of_its_samples_alone(job: TrainJob, objective: Objective) -> None:
    batches = BatchBuilder(job, objective.model, device=torch.device("cpu"))
    samples = chosen(job)
    assert {bool(sample.images) for sample in samples} == {True, False}
    length = sum(len(sample.input_ids) for sample in samples)
    packed = logits_of(objective, batches, pack(samples, capacity=length + 9))
    assert packed.abs().max() > 1
    start = 0
    for sample in samples:
        stop = start + len(sample.input_ids)
        alone = logits_of(objective, batches, pack([sample], capacity=stop - start))
        assert (packed[start:stop] - alone).abs().max() <= 1e-4
        start = stop
    assert start == length


def test_the_call_that_leaves_mask_and_cache_to_transformers_leaks(job: TrainJob, objective: Objective) -> None:
    """This is why the mask is always passed. It also shows that the test above can fail."""
    batches = BatchBuilder(job, objective.model, device=torch.device("cpu"))
    first, *_, last = chosen(job)
    row = pack([first, last], capacity=len(first.input_ids) + len(last.input_ids))
    batch, model = batches([row]), objective.model
    embeddings = model.embed(batch.input_ids, batch.features)
    leaking = model.lm_head(model.hidden(embeddings, position_ids=batch.position_ids).last_hidden_state)[0]
    alone = logits_of(objective, batches, pack([last], capacity=len(last.input_ids)))
    assert (leaking[len(first.input_ids) :] - alone).abs().max() > 0.1
    assert (logits_of(objective, batches, row)[len(first.input_ids) :] - alone).abs().max() <= 1e-4


def gradients(engine: PlainEngine) -> dict[str, Tensor]:
    """Return the accumulated gradients and clear them."""
    gradients = {name: parameter.grad.clone() for name, parameter in engine.named if parameter.grad is not None}
    engine.optimizer.zero_grad(set_to_none=True)
    return gradients


@pytest.mark.slow
def test_a_steps_gradient_is_the_same_for_any_split_into_ranks_micro_batches_and_accumulation(
    job: TrainJob, objective: Objective
) -> None:
    """The reference is stock cross-entropy over the full logits of all rows of the step at once.

    The ranks run one after another in this process, whose gradients add up as in an all-reduce.
    """
    trained = set_trainable(objective, job.stage.trainable)
    engine = PlainEngine(objective, trained, job.stage, job.resources)
    batches = BatchBuilder(job, objective.model, device=torch.device("cpu"))
    cache = job.resources.storage.plan_cache()
    rows = RowLoader(opened(job.data).file, digest=job.data.digest, stage=job.stage, cache=cache)
    accumulator = LossAccumulator(job, objective.model, batches, rows.sources())
    everything, num_targets = rows.batch(0)
    logits = torch.stack([logits_of(objective, batches, row) for row in everything])
    loss = cross_entropy(logits.mT, torch.from_numpy(stack(everything)[3]))
    torch.autograd.backward(loss)
    expected = gradients(engine)
    per_row = {int((row.labels >= 0).sum()) for row in everything}
    assert len(per_row) > 1, "a mean of the rows' means would do"
    splits = [(ranks, size) for ranks in (1, 2, 4) for size in (1, 2, 4, 8) if ranks * size <= BATCH]
    for ranks, size in splits:
        resources = job.resources.with_changes({"train.micro_batch_size": size})
        own = TrainJob.model_validate({**job.model_dump(), "resources": resources})
        value = 0.0
        for rank in range(ranks):
            watchdog = StepWatchdog(own, RankInfo(rank=rank, world_size=ranks))
            bad_samples = BadSampleFinder(own, watchdog, rows, [], MetricLog(own.resources, None))
            with BatchLoader(own, watchdog.rank_info, rows, batches) as loader:
                accumulate_gradients(engine, accumulator, loader, step=0, bad_samples=bad_samples)
            value += accumulator.reduce().loss
        assert value == pytest.approx(float(loss.detach()), rel=1e-6)
        for name, gradient in gradients(engine).items():
            assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), (ranks, size, name)
    assert num_targets == sum(int((row.labels >= 0).sum()) for row in everything)
