import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests.train.closeness import ROUNDING, apart
from vila_ops.artifacts.kinds import Pretrained
from vila_ops.artifacts.store import content
from vila_ops.config import NO_CONTEXT, Stage
from vila_ops.data.loading.packing import pack
from vila_ops.data.shards import read_index, read_sample
from vila_ops.model import folder as model_folder
from vila_ops.model.assemble import assemble
from vila_ops.model.compiled import compile_layers
from vila_ops.model.pixels import Pixels
from vila_ops.model.recompute import recompute
from vila_ops.model.trainable import set_trainable
from vila_ops.train.batch_builder import BatchBuilder
from vila_ops.train.engine import PlainEngine, build_engine
from vila_ops.train.job import TrainJob
from vila_ops.train.loop import load
from vila_ops.train.objective import Objective
from vila_ops.train.optim import lr_multiplier


def samples(bench: Any, source: str, count: int) -> list[Any]:
    folder = content(bench.data)
    rows = [row for row in read_index(folder).to_pylist() if row["source"] == source][:count]
    return [read_sample(folder, shard=r["shard"], offset=r["offset"], key=r["key"]) for r in rows]


def make_job(bench: Any, stage: Stage, init: Pretrained, root: Any) -> TrainJob:
    return TrainJob(
        stage=stage, data=bench.data, init=init, resources=bench.resources, attempt=str(root), resume=str(root),
        run_id=None, fresh_projector=True, context=NO_CONTEXT,
    )  # fmt: skip


def make_engine(bench: Any, stage: Stage, init: Pretrained, root: Any) -> tuple[PlainEngine, BatchBuilder]:
    model = model_folder.load(content(init))
    objective = Objective(model)
    trained: Any = set_trainable(objective, stage.trainable)
    batches = BatchBuilder(make_job(bench, stage, init, root), model, device=torch.device("cpu"))
    return PlainEngine(objective, trained, stage, bench.resources), batches


@pytest.mark.parametrize("source", ["pairs", "documents", "definitions"])
def test_the_loss_is_that_of_stock_llava(
    source: str, bench: Any, make_model: Any, make_stage: Any, tmp_path: Any
) -> None:
    """The loss of a packed row is the sum of its samples' losses by stock transformers, which shifts labels itself."""
    init = assemble(make_model("clip", "mlp_gelu", patch_size=28), bench.resources)  # 4 tokens, as in the dataset
    stage = make_stage(bench.mixture, sequence_length=384, trainable=["projector"])
    engine, batches = make_engine(bench, stage, init, tmp_path)
    chosen = samples(bench, source, 3)
    stock = LlavaForConditionalGeneration.from_pretrained(content(init), dtype=torch.float32).eval()
    mean, std = model_folder.normalisation(content(init))
    expected = 0.0
    for sample in chosen:
        ids = torch.tensor([sample.input_ids])
        labels = torch.where(torch.tensor([sample.is_target]), ids, -100)
        images = Pixels(mean, std)(sample.images) if sample.images else None
        with torch.no_grad():
            loss = stock(input_ids=ids, pixel_values=images, labels=labels).loss
        expected += float(loss) * int((labels[:, 1:] >= 0).sum())
    with torch.no_grad():
        actual = float(engine.loss(batches([pack(chosen, capacity=384)]))[0])
    assert actual == pytest.approx(expected, rel=1e-5)


def test_samples_in_rows_of_their_own_give_loss_and_gradients_of_a_packed_row(
    bench: Any, make_stage: Any, tmp_path: Any
) -> None:
    stage = make_stage(bench.mixture, trainable=["projector", "language_model"])
    chosen = [sample for source in ("pairs", "documents", "definitions") for sample in samples(bench, source, 2)]
    targets = sum(sum(sample.is_target[1:]) for sample in chosen)
    together = [pack(chosen, capacity=512)]
    alone = [pack([sample], capacity=len(sample.input_ids)) for sample in chosen]
    assert len({len(row.input_ids) for row in alone}) > 1, "none is padded"
    results = []
    for rows in (together, alone):
        engine, batches = make_engine(bench, stage, bench.init, tmp_path)
        loss = engine.loss(batches(rows))[0] / targets
        engine.backward(loss)
        results.append((float(loss.detach()), {name: p.grad for name, p in engine.named}))
    (packed, gradients), (single, others) = results
    assert single == pytest.approx(packed, abs=1e-6)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, others[name], atol=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("most", [0.5, None])
def test_steps_equal_a_hand_written_loop(most: float | None, bench: Any, make_stage: Any, tmp_path: Any) -> None:
    """The norm of the gradients is far above 0.5, so that clipping has an effect."""
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
        norms.append(float(engine.step(lr_multiplier(step, stage, num_steps=8))))

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
            rate = (3e-2 if "multi_modal_projector" in name else 1e-2) * lr_multiplier(step, stage, num_steps=8)
            g = gradients[name] * scale
            with torch.no_grad():
                if p.ndim >= 2:
                    p.mul_(1 - rate * 0.1)
                first[name] = 0.8 * first[name] + 0.2 * g
                second[name] = 0.9 * second[name] + 0.1 * g**2
                corrected = second[name] / (1 - 0.9 ** (step + 1))
                p.sub_(rate * first[name] / (1 - 0.8 ** (step + 1)) / (corrected.sqrt() + 1e-8))
    states = dict(engine.state())
    for name, p in parameters.items():
        for key, moment in (("exp_avg", first[name]), ("exp_avg_sq", second[name])):
            near = 1e-4 * float(moment.abs().max())  # rounding of a sum is relative to the largest value
            assert torch.allclose(states[name][key], moment, rtol=0, atol=near), (name, key)
        way = 3 * (3e-2 if "multi_modal_projector" in name else 1e-2)
        assert apart({name: states[name]["param"]}, {name: p.detach()}, way=way) < ROUNDING, name


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_twenty_steps_equal_stock_torch(precision: str, bench: Any, make_stage: Any, tmp_path: Any) -> None:
    """AdamW by groups, `clip_grad_norm_` and torch's schedulers, with two passes per step.

    In bf16, weights are copies of fp32 masters, and gradients of the passes are added up in fp32.
    """
    stage = make_stage(
        bench.mixture, trainable=["projector", "language_model"], learning_rate=1e-3, weight_decay=0.1, num_steps=20,
        learning_rates={"projector": 3e-3}, max_grad_norm=0.1, warmup_ratio=0.2, precision=precision,
    )  # fmt: skip
    rows = [pack(samples(bench, name, 2), capacity=128) for name in ("pairs", "definitions")]
    engine, batches = make_engine(bench, stage, bench.init, tmp_path)
    targets = sum(int((row.labels >= 0).sum()) for row in rows)
    losses = []
    for step in range(20):
        passes = [engine.loss(batches([row]))[0] / targets for row in rows]
        for loss in passes:
            engine.backward(loss)
        losses.append(sum(float(loss.detach()) for loss in passes))
        engine.step(lr_multiplier(step, stage, num_steps=20))

    model = model_folder.load(content(bench.init))
    twin = Objective(model)
    set_trainable(twin, stage.trainable)
    batches = BatchBuilder(make_job(bench, stage, bench.init, tmp_path), model, device=torch.device("cpu"))
    named = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    masters = {name: torch.nn.Parameter(p.detach().clone()) for name, p in named.items()}
    chosen = [(True, 1e-3, 0.1), (False, 1e-3, 0.0), (True, 3e-3, 0.1), (False, 3e-3, 0.0)]
    groups = [
        {
            "params": [
                p for n, p in masters.items() if (p.ndim > 1) == matrix and ("projector" in n) == (rate == 3e-3)
            ],
            "lr": rate, "weight_decay": decay,
        }
        for matrix, rate, decay in chosen
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 4, total_iters=3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=16)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[4])
    expected = []
    for _ in range(20):
        for name, p in twin.named_parameters():
            p.data = masters.get(name, p).detach().to(torch.bfloat16 if precision == "bf16" else torch.float32)
        expected.append(0.0)
        for row in rows:
            loss = twin(batches([row]))[0] / targets
            expected[-1] += float(loss.detach())
            gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            for master, gradient in zip(masters.values(), gradients, strict=True):
                if gradient is not None:
                    master.grad = gradient.float() + (0 if master.grad is None else master.grad)
        assert torch.nn.utils.clip_grad_norm_(masters.values(), 0.1) > 0.2
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    # Embedding and head are one weight. The engine adds its two gradients up in fp32, autograd alone in bf16.
    near = 1e-6 if precision == "fp32" else 1e-3
    assert losses == pytest.approx(expected, abs=near)


def test_bf16_begins_with_the_folder_s_bits_sums_in_fp32_and_moves_norms_by_less_than_bf16_can_hold(
    bench: Any, make_stage: Any, tmp_path: Any
) -> None:
    """A norm's weight of 1 moves by the learning rate, 1e-5, in the first step; the bf16 number below 1 is 1 - 2^-8."""
    stage = make_stage(bench.mixture, trainable=["projector", "language_model"], precision="bf16", learning_rate=1e-5)
    engine, batches = make_engine(bench, stage, bench.init, tmp_path)
    folder = load_file(content(bench.init) / "model.safetensors")
    stored = {f"model.{name}": tensor for name, tensor in folder.items()}
    begun = {name: tensors["param"].clone() for name, tensors in engine.state()}
    assert all(torch.equal(begun[name], stored[name]) for name in begun)
    assert all(p.dtype == torch.bfloat16 for p in engine.objective.parameters())
    four = samples(bench, "pairs", 4)
    rows = [pack(two, capacity=128) for two in (four[:2], four[2:])]
    gradients = []
    for passes in (rows[:1], rows[1:], rows):
        for row in passes:
            engine.backward(engine.loss(batches([row]))[0] / 10)
        gradients.append({name: p.grad for name, p in engine.named})
        if passes != rows:
            engine.objective.zero_grad(set_to_none=True)
    first, second, both = gradients
    assert all(torch.equal(both[name], first[name] + second[name]) for name in both), "sums of passes are fp32"
    engine.step(1.0)
    norms = {name for name in begun if name.endswith("layernorm.weight")}
    assert len(norms) == 4
    for name, tensors in engine.state():
        if name in norms:
            moved = (tensors["param"] - begun[name]).abs()
            assert moved.max() == pytest.approx(1e-5, rel=0.01)
            assert torch.equal(dict(engine.named)[name], torch.ones_like(moved, dtype=torch.bfloat16))


def test_bf16_norms_have_fp32_statistics() -> None:
    """Sums of 4,096 squares of numbers near 3 would end at 2,048 in bf16, where adding 9 changes nothing."""
    torch.manual_seed(0)
    x = (torch.randn(8, 4096, dtype=torch.float64) + 3).to(torch.bfloat16)
    rms, layer = LlamaRMSNorm(4096).to(torch.bfloat16), torch.nn.LayerNorm(4096).to(torch.bfloat16)
    exact = x.double()
    for actual, expected in (
        (rms(x), exact / (exact**2).mean(-1, keepdim=True).sqrt()),
        (layer(x), (exact - exact.mean(-1, keepdim=True)) / exact.std(-1, correction=0, keepdim=True)),
    ):
        assert actual.dtype == torch.bfloat16
        assert torch.allclose(actual.double(), expected, rtol=2**-7, atol=2**-9)


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", [False, True])
def test_compiled_layers_give_the_same_loss_from_two_graphs_in_fifty_batches(
    recomputed: bool, bench: Any, make_stage: Any, tmp_path: Any
) -> None:
    """The 50 batches have rows of many lengths. The graphs run without code generation, which takes a minute."""
    stage = make_stage(bench.mixture, trainable=["projector", "language_model"])
    rows = [pack(samples(bench, "pairs", 1 + number % 3), capacity=200 + number) for number in range(50)]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    losses = []
    for compiled in (False, True):
        engine, batches = make_engine(bench, stage, bench.init, tmp_path)
        decoder = engine.objective.model.model.language_model
        if recomputed:
            recompute(decoder)
        if compiled:
            compile_layers(decoder, backend="aot_eager")
        losses.append([])
        for row in rows:
            loss = engine.loss(batches([row]))[0] / 10
            engine.backward(loss)
            losses[-1].append(float(loss.detach()))
        losses[-1].append(float(engine.step(1.0)))
        assert engine.facts()["compiled_layers"] == (2 if compiled else 0)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


KINDS: dict[str, dict[str, Any]] = {
    "language model": {"trainable": ["projector", "language_model"]},
    "frozen language model": {"trainable": ["projector"]},
    "tower": {"trainable": ["vision_tower", "projector"]},
    "lora": {"trainable": ["projector", "language_model"], "tuning": {"kind": "lora", "rank": 4, "dropout": 0.2}},
    "expert": {"trainable": ["projector", "language_model"], "tuning": {"kind": "visual_expert"}},
    "bf16": {"trainable": ["projector", "language_model"], "precision": "bf16"},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_are_computed_anew_give_the_same_bits_from_fewer_kept_bytes(
    kind: str, bench: Any, make_stage: Any, tmp_path: Any
) -> None:
    """Compares gradients, how often each layer begins to run, and the bytes that the graph keeps."""
    stage = make_stage(bench.mixture, **KINDS[kind])
    kept, begun, gradients = [], [], []
    for again in (False, True):
        engine, loss, runs, bytes_kept = _forward(bench, stage, tmp_path, **{"train.gradient_checkpointing": again})
        engine.backward(loss)
        kept.append(bytes_kept)
        begun.append(runs)
        gradients.append({name: p.grad for name, p in engine.named})
        assert engine.facts()["recomputed_layers"] == (0 if not again else 4 if kind == "tower" else 2)
    once, twice = begun
    assert set(once.values()) == {1}
    recomputed = {name for name in once if kind == "tower" or "language_model" in name}
    last = {
        name for name in recomputed if name.endswith("vision_tower.encoder.layers.1.mlp")
    }  # after the state that the projector reads
    assert twice == {name: 2 if name in recomputed - last else 1 for name in once}
    assert kept[1] < 0.7 * kept[0]
    plain, other = gradients
    assert {name for name, g in plain.items() if g is not None and g.any()}
    for name, gradient in plain.items():
        assert (gradient is None) == (other[name] is None), name
        assert gradient is None or torch.equal(gradient, other[name]), name


def _forward(
    bench: Any, stage: Stage, root: Any, **resources: Any
) -> tuple[PlainEngine, torch.Tensor, dict[str, int], int]:
    """Run a forward pass over two rows with images.

    Returns the engine, the loss, how often each MLP has begun to run, which the backward pass counts on, and the bytes
    that the graph keeps.
    """
    own = bench.resources.with_changes(resources)
    job = TrainJob.model_validate(
        {**make_job(bench, stage, bench.init, root).model_dump(), "resources": own.model_dump()}
    )
    torch.manual_seed(0)
    model, _, batches = load(job)
    objective = Objective(model)
    trained = set_trainable(objective, stage.trainable, stage.tuning)
    engine = build_engine(objective, trained, stage, own)
    assert isinstance(engine, PlainEngine)
    for name, p in engine.named:
        if ".lora_B." in name:
            torch.nn.init.normal_(p, std=0.1)
    batch = batches([pack(samples(bench, "pairs", 4), capacity=128)] * 2, step=0)
    runs: dict[str, int] = {}

    def begins(name: str) -> Any:
        return lambda *_: runs.update({name: runs.get(name, 0) + 1})

    for name, module in model.named_modules():
        if name.endswith(".mlp"):
            module.register_forward_pre_hook(begins(name))
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = engine.loss(batch)[0] / 20
    return engine, loss, runs, sum(size for at, size in storages.items() if at not in weights)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tower", "precision"), [("clip", "fp32"), ("siglip", "fp32"), ("dinov2", "fp32"), ("clip", "bf16")]
)
def test_a_tower_that_trains_gives_its_state_and_takes_it_back(
    tower: str, precision: str, bench: Any, make_model: Any, make_stage: Any, tmp_path: Any
) -> None:
    """The projector reads the state before the last layer, so the last layer and the pooling never get a gradient."""
    init = assemble(make_model(tower, "mlp_downsample"), bench.resources)
    stage = make_stage(bench.mixture, trainable=["vision_tower", "projector"], weight_decay=0.1, precision=precision)
    row = pack(samples(bench, "pairs", 2), capacity=128)

    def step(engine: PlainEngine, batches: BatchBuilder) -> None:
        engine.backward(engine.loss(batches([row]))[0] / 10)
        engine.step(1.0)

    engine, batches = make_engine(bench, stage, init, tmp_path)
    step(engine, batches)
    saved = {name: {key: t.clone() for key, t in tensors.items()} for name, tensors in engine.state()}
    step(engine, batches)
    again, batches = make_engine(bench, stage, init, tmp_path)
    again.restore(saved, step=1)
    for name, tensors in again.state():
        assert all(torch.equal(tensors[key], saved[name][key]) for key in tensors), name
    step(again, batches)
    moved = 0
    for (name, p), (_, q) in zip(engine.state(), again.state(), strict=True):
        assert all(torch.equal(p[key], q[key]) for key in p), name
        moved += "vision_tower" in name and not torch.equal(p["param"], saved[name]["param"])
    assert moved > 10


@pytest.mark.parametrize("part", ["projector", "language_model"])
def test_a_step_without_images_is_a_gradient_of_zero_and_runs_neither_tower_nor_projector(
    part: str, bench: Any, make_stage: Any, tmp_path: Any
) -> None:
    """AdamW computed here: moments shrink by their betas, and the first moment still moves the weights."""
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


@pytest.mark.parametrize("optimizer", ["fused", "torch"])
def test_a_gradient_that_is_not_finite_moves_nothing(
    optimizer: str, bench: Any, make_stage: Any, tmp_path: Any
) -> None:
    """In the first step and in the third; the second moves everything."""
    own = dataclasses.replace(bench, resources=bench.resources.with_changes({"train.optimizer": optimizer}))
    engine, _ = make_engine(own, make_stage(bench.mixture), bench.init, tmp_path)
    for first in (float("nan"), 1.0, float("inf")):
        before = {name: {key: t.clone() for key, t in tensors.items()} for name, tensors in engine.state()}
        for (_, p), value in zip(engine.named, itertools.chain([first], itertools.repeat(1.0)), strict=False):
            p.grad = torch.full_like(p, value)
        norm = engine.step(1.0)
        assert math.isfinite(norm) == (first == 1.0)
        for name, tensors in engine.state():
            assert all(torch.equal(t, before[name][key]) != (first == 1.0) for key, t in tensors.items()), name
