import itertools
import math
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from vila_ops.artifacts.kinds import Pretrained
from vila_ops.artifacts.store import content
from vila_ops.config import Stage
from vila_ops.data.images import pixels
from vila_ops.data.order.packing import pack
from vila_ops.data.shards import read_index, read_sample
from vila_ops.model import folder as model_folder
from vila_ops.model.assemble import assemble
from vila_ops.model.trainable import set_trainable
from vila_ops.train.batches import Batches
from vila_ops.train.engine import PlainEngine
from vila_ops.train.job import Job
from vila_ops.train.objective import Objective
from vila_ops.train.optim import rate_factor


def samples(bench: Any, source: str, count: int) -> list[Any]:
    folder = content(bench.data)
    rows = [row for row in read_index(folder).to_pylist() if row["source"] == source][:count]
    return [read_sample(folder, shard=r["shard"], offset=r["offset"], key=r["key"]) for r in rows]


def make_job(bench: Any, stage: Stage, init: Pretrained, root: Any) -> Job:
    return Job(
        stage=stage, data=bench.data, init=init, resources=bench.resources, attempt=str(root), resume=str(root),
        run_id=None, fresh_projector=True,
    )  # fmt: skip


def make_engine(bench: Any, stage: Stage, init: Pretrained, root: Any) -> tuple[PlainEngine, Batches]:
    model = model_folder.load(content(init))
    objective = Objective(model, bf16=False)
    trained: Any = set_trainable(objective, stage.trainable)
    batches = Batches(make_job(bench, stage, init, root), model, device=torch.device("cpu"))
    return PlainEngine(objective, trained, stage, bench.resources), batches


@pytest.mark.parametrize("source", ["pairs", "documents", "definitions"])
def test_the_loss_is_that_of_stock_llava(
    source: str, bench: Any, make_model: Any, make_stage: Any, tmp_path: Any
) -> None:
    """Summed over the samples of a packed row, against each alone through stock transformers with its own shift."""
    init = assemble(make_model("clip", "mlp_gelu", patch_size=28), bench.resources)  # 4 tokens, as in the dataset
    stage = make_stage(bench.mixture, row_tokens=384, trainable=["projector"])
    engine, batches = make_engine(bench, stage, init, tmp_path)
    chosen = samples(bench, source, 3)
    stock = LlavaForConditionalGeneration.from_pretrained(content(init), dtype=torch.float32).eval()
    mean, std = model_folder.normalisation(content(init))
    expected = 0.0
    for sample in chosen:
        ids = torch.tensor([sample.input_ids])
        labels = torch.where(torch.tensor([sample.is_target]), ids, -100)
        images = torch.from_numpy(pixels(list(sample.images), mean=mean, std=std)) if sample.images else None
        with torch.no_grad():
            loss = stock(input_ids=ids, pixel_values=images, labels=labels).loss
        expected += float(loss) * int((labels[:, 1:] >= 0).sum())
    with torch.no_grad():
        found = float(engine.loss(batches([pack(chosen, capacity=384)]))[0])
    assert found == pytest.approx(expected, rel=1e-5)


def test_samples_in_rows_of_their_own_give_loss_and_gradients_of_a_packed_row(
    bench: Any, make_stage: Any, tmp_path: Any
) -> None:
    stage = make_stage(bench.mixture, trainable=["projector", "language_model"])
    chosen = [sample for source in ("pairs", "documents", "definitions") for sample in samples(bench, source, 2)]
    targets = sum(sum(sample.is_target[1:]) for sample in chosen)
    together = [pack(chosen, capacity=512)]
    alone = [pack([sample], capacity=len(sample.input_ids)) for sample in chosen]
    assert len({len(row.input_ids) for row in alone}) > 1, "none is padded"
    found = []
    for rows in (together, alone):
        engine, batches = make_engine(bench, stage, bench.init, tmp_path)
        loss = engine.loss(batches(rows))[0] / targets
        engine.backward(loss)
        found.append((float(loss.detach()), {name: p.grad for name, p in engine.named}))
    (packed, gradients), (single, others) = found
    assert single == pytest.approx(packed, abs=1e-6)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, others[name], atol=1e-6), name


@pytest.mark.parametrize("most", [0.5, None])
def test_steps_equal_a_hand_written_loop(most: float | None, bench: Any, make_stage: Any, tmp_path: Any) -> None:
    """The gradients' norm is far more than half, so that clipping has an effect."""
    stage = make_stage(
        bench.mixture, trainable=["projector", "language_model"], learning_rate=1e-2, weight_decay=0.1,
        learning_rates={"projector": 3e-2}, max_grad_norm=most, betas=[0.8, 0.9],
    )  # fmt: skip
    rows = [pack(samples(bench, name, 2), capacity=128) for name in ("pairs", "definitions")]
    engine, batches = make_engine(bench, stage, bench.init, tmp_path)
    norms = []
    for step in range(3):
        for row in rows:
            engine.backward(engine.loss(batches([row]))[0] / 20)
        norms.append(engine.step(rate_factor(step, stage, num_steps=8)))

    twin, batches = make_engine(bench, stage, bench.init, tmp_path)
    parameters = dict(twin.named)
    first = {name: torch.zeros_like(p) for name, p in parameters.items()}
    second = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for step in range(3):
        total = sum(twin.objective(batches([row]))[0] for row in rows) / 20
        gradients = dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))
        norm = torch.sqrt(sum((g**2).sum() for g in gradients.values()))
        assert norms[step] == pytest.approx(float(norm), rel=1e-4)
        assert float(norm) > 1
        scale = 1.0 if most is None else min(1.0, most / (float(norm) + 1e-6))
        for name, p in parameters.items():
            rate = (3e-2 if "multi_modal_projector" in name else 1e-2) * rate_factor(step, stage, num_steps=8)
            g = gradients[name] * scale
            with torch.no_grad():
                if p.ndim >= 2:
                    p.mul_(1 - rate * 0.1)
                first[name] = 0.8 * first[name] + 0.2 * g
                second[name] = 0.9 * second[name] + 0.1 * g**2
                corrected = second[name] / (1 - 0.9 ** (step + 1))
                p.sub_(rate * first[name] / (1 - 0.8 ** (step + 1)) / (corrected.sqrt() + 1e-8))
    for name, p in engine.named:
        assert torch.allclose(p, parameters[name], atol=2e-5), name


@pytest.mark.parametrize("tower", ["clip", "siglip", "dinov2"])
def test_a_tower_that_trains_gives_its_state_and_takes_it_back(
    tower: str, bench: Any, make_model: Any, make_stage: Any, tmp_path: Any
) -> None:
    """Its last layer and its pooling are behind the state that is read, so they never get a gradient."""
    init = assemble(make_model(tower, "mlp_downsample"), bench.resources)
    stage = make_stage(bench.mixture, trainable=["vision_tower", "projector"], weight_decay=0.1)
    row = pack(samples(bench, "pairs", 2), capacity=128)

    def step(engine: PlainEngine, batches: Batches) -> None:
        engine.backward(engine.loss(batches([row]))[0] / 10)
        engine.step(1.0)

    engine, batches = make_engine(bench, stage, init, tmp_path)
    step(engine, batches)
    saved = {name: {key: t.clone() for key, t in tensors.items()} for name, tensors in engine.state()}
    step(engine, batches)
    again, batches = make_engine(bench, stage, init, tmp_path)
    again.restore(saved, step=1)
    step(again, batches)
    moved = 0
    for (name, p), (_, q) in zip(engine.named, again.named, strict=True):
        assert torch.equal(p, q), name
        moved += "vision_tower" in name and not torch.equal(p, saved[name]["param"])
    assert moved > 10


@pytest.mark.parametrize("part", ["projector", "language_model"])
def test_a_step_without_pictures_is_a_gradient_of_zero_and_runs_neither_tower_nor_projector(
    part: str, bench: Any, make_stage: Any, tmp_path: Any
) -> None:
    """AdamW by hand: moments shrink by their betas, and the weights go on by what is left of the first."""
    trainable = ["projector", *([part] if part != "projector" else [])]
    stage = make_stage(bench.mixture, trainable=trainable, learning_rate=1e-2, weight_decay=0.1, betas=[0.8, 0.9])
    engine, batches = make_engine(bench, stage, bench.init, tmp_path)
    seen: list[str] = []
    whole = engine.objective.model.model
    for source in ("pairs", "definitions"):
        states = engine.state() if seen else []
        before = {name: {key: t.clone() for key, t in tensors.items()} for name, tensors in states}
        seen.clear()
        hooks = [m.register_forward_pre_hook(lambda m, _: seen.append(type(m).__name__)) for m in whole.children()]
        engine.backward(engine.loss(batches([pack(samples(bench, source, 1), capacity=128)]))[0] / 10)
        for hook in hooks:
            hook.remove()
        engine.step(1.0)
    assert seen == ["LlamaModel"]
    for name, after in engine.state():
        if "multi_modal_projector" not in name:
            continue
        first, second = 0.8 * before[name]["exp_avg"], 0.9 * before[name]["exp_avg_sq"]
        assert torch.allclose(after["exp_avg"], first, rtol=1e-6)
        assert torch.allclose(after["exp_avg_sq"], second, rtol=1e-6)
        decayed = before[name]["param"] * ((1 - 1e-2 * 0.1) if after["param"].ndim >= 2 else 1)
        step = (first / (1 - 0.8**2)) / ((second / (1 - 0.9**2)).sqrt() + 1e-8)
        assert torch.allclose(after["param"], decayed - 1e-2 * step, atol=1e-6)


def test_a_gradient_that_is_not_finite_moves_nothing(bench: Any, make_stage: Any, tmp_path: Any) -> None:
    engine, _ = make_engine(bench, make_stage(bench.mixture), bench.init, tmp_path)
    before = [p.detach().clone() for _, p in engine.named]
    for (_, p), value in zip(engine.named, itertools.chain([float("nan")], itertools.repeat(1.0)), strict=False):
        p.grad = torch.full_like(p, value)
    assert math.isnan(engine.step(1.0))
    assert all(torch.equal(p, old) for (_, p), old in zip(engine.named, before, strict=True))
