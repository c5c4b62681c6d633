"""The plan of a run, stage by stage: `vila-ops plan`."""

import itertools
import math
from fractions import Fraction

from vila_ops.artifacts import store
from vila_ops.artifacts.kinds import Dataset
from vila_ops.config import NO_CONTEXT, Config, Model, Resources, Run, RunContext, Stage, TextFormat
from vila_ops.config.lengths import Lengths
from vila_ops.config.resources import LEAST_ZERO, Accelerator, Offloaded
from vila_ops.data.loading.loader import RowLoader
from vila_ops.data.preprocess.prepare import prepared as prepared_dataset
from vila_ops.model.build import padded
from vila_ops.model.configuration import VilaConfig
from vila_ops.model.context import check_recipe
from vila_ops.model.count import Counts, count, stated_language_model, text_config, vision_config
from vila_ops.plan import lengths as data
from vila_ops.plan.flops import Flops, Load, flops
from vila_ops.plan.memory import GIB, Memory, MicroBatch, Weights, memory, value_bytes
from vila_ops.plan.messages import MessageSizes, sizes_by_shapes
from vila_ops.plan.shapes import Shapes, shapes_of

RESERVED = 1.5 * GIB
"""Bytes of a GPU for the CUDA context, NCCL and fragmentation of the allocator."""
OFFLOADED: tuple[Offloaded, ...] = tuple(LEAST_ZERO)
MOST_WORKERS = 4096
"""The most workers that are tried to make a stage fit."""


class StagePlan(Config):
    """Estimates for one stage."""

    stage: str
    lengths: str
    """Origin of the lengths: `prepared` or `declared`."""
    trained_parameters: int
    total_parameters: int
    """While the stage trains: adapters count, which are merged after it."""
    samples: float
    tokens: float
    """Tokens with image tokens and without padding."""
    targets: float
    """Target tokens."""
    images: float
    padding: float
    """Share of the computed positions that is padding."""
    steps: int
    model_flops: float
    """FLOPs for MFU: without padding and recomputation."""
    machine_flops: float
    """FLOPs for hours: with padding and recomputation."""
    memory: Memory
    """In GiB."""
    messages: MessageSizes | None
    """Of ZeRO, in elements. None: ZeRO stage 0, which sends no collected messages."""
    fits: bool | None
    """None: the resources name no accelerator."""
    nearest: dict[str, int | str | bool] | None
    """If the stage does not fit: the changed settings with which it fits, or {} if there are none."""
    hours: float | None
    mfu: float | None
    """Model FLOPs utilisation over these hours."""
    cost: float | None
    """None without an accelerator or its price."""
    resume_bytes: float
    """Bytes of the resume checkpoints that exist at once, with the one that is being written."""
    model_bytes: float
    """Bytes of the sealed checkpoint."""
    data_bytes: float | None
    """Bytes of the prepared mixture. None: lengths are declared."""
    feature_bytes: float
    """Bytes of cached features of the frozen tower."""


class Plan(Config):
    """Estimates for a run."""

    recipe: str
    recipe_fingerprint: str
    workers: dict[str, int]
    """Number of workers by stage."""
    stages: tuple[StagePlan, ...]
    hours: float | None
    gpu_hours: float | None
    cost: float | None
    storage_bytes: float


def plan_run(run: Run, lengths: Lengths | None = None, context: RunContext = NO_CONTEXT) -> Plan:
    """Return the plan of a run, from the shapes of the model and from declared lengths or prepared mixtures.

    Raises ValueError if a mixture has neither, if the shape of a part is not known, or if samples may exceed the
    language model's context.
    """
    cache = run.resources.storage.cache_folder()
    check_recipe(run.recipe, stated_language_model(run.recipe.model, cache))
    counts = count(run.recipe.model, cache=cache)
    stages: list[StagePlan] = []
    before: tuple[Stage, ...] = ()
    for name, stage in run.recipe.stages.items():
        before = (*before, stage)
        shapes = shapes_of(config_of(run.recipe.model_of(name), run.resources))
        weights, total = _weights(counts, before)
        stages.append(_StagePlanner(run, context, stage, shapes=shapes, weights=weights).plan(lengths, total=total))
    workers = {
        stage.name: run.resources.train.for_stage(stage.name).num_workers for stage in run.recipe.stages.values()
    }
    hours = [(one.hours, one.hours * workers[one.stage]) for one in stages if one.hours is not None]
    costs = [one.cost for one in stages if one.cost is not None]
    return Plan(
        recipe=run.recipe.name,
        recipe_fingerprint=run.recipe.fingerprint(),
        workers=workers,
        stages=tuple(stages),
        hours=sum(wall for wall, _ in hours) if hours else None,
        gpu_hours=sum(gpu for _, gpu in hours) if hours else None,
        cost=sum(costs) if costs else None,
        storage_bytes=sum(one.model_bytes + (one.data_bytes or 0) for one in stages)
        + max(one.resume_bytes for one in stages)
        + sum(one.feature_bytes for one in stages),
    )


def refusals(plan: Plan) -> list[str]:
    """Return a line for each stage that does not fit its GPUs, with the nearest settings with which it fits."""
    lines = []
    for one in plan.stages:
        if one.fits is False:
            settings = ", ".join(f"{key} {value}" for key, value in (one.nearest or {}).items())
            remedy = (
                f"nearest that fits, in resources.train.stages.{one.stage}: {settings}"
                if settings
                else "no setting makes it fit"
            )
            lines.append(f"stage {one.stage!r} needs {one.memory.total:.1f} GiB, more than its GPU has; {remedy}")
    return lines


class _StagePlanner:
    """Plans one stage on its resources."""

    def __init__(self, run: Run, context: RunContext, stage: Stage, *, shapes: Shapes, weights: Weights) -> None:
        self.run, self.context, self.stage, self.shapes, self.weights = run, context, stage, shapes, weights
        self.resources = run.resources.for_stage(stage.name)

    def plan(self, lengths: Lengths | None, *, total: int) -> StagePlan:
        """Return the plan. `total` is the number of the model's parameters while the stage trains."""
        stage, resources = self.stage, self.resources
        text = self.run.recipe.text(stage.name)
        epoch, steps, data_bytes = (
            self._prepared(text) if lengths is None else (self._declared(lengths, text), None, None)
        )
        most = stage.sequence_length // text.image_tokens
        rows = data.rows_of(epoch, stage, micro_batch_size=resources.train.micro_batch_size, most_images=most)
        if steps is None:
            steps = stage.num_steps or math.ceil(
                Fraction(str(stage.epochs)) * Fraction(rows.rows) / stage.global_batch_size
            )
        epochs = steps * stage.global_batch_size / rows.rows
        first = epoch.distinct * min(1.0, 1 / epochs) if self._keeps_features() else 1.0
        useful, machine = (self._flops(loads, epochs, first) for loads in (rows.useful, rows.padded))
        hours, mfu, cost = self._time(useful, machine)
        largest = MicroBatch(
            resources.train.micro_batch_size, rows.longest, resources.train.micro_batch_size * rows.most_images
        )
        peak = memory(self.shapes, self.weights, stage, resources, largest)
        fits = _fits(peak, resources.train.accelerator) if resources.train.accelerator else None
        images = epochs * sum(one.images for one in rows.useful)
        tokens = epochs * sum(one.tokens for one in rows.useful)
        computed = epochs * sum(one.tokens for one in rows.padded)
        return StagePlan(
            stage=stage.name,
            lengths="prepared" if lengths is None else "declared",
            trained_parameters=self.weights.trained,
            total_parameters=total,
            samples=epochs * len(epoch.tokens) * epoch.times,
            tokens=tokens,
            targets=epochs * sum(one.targets for one in rows.useful),
            images=images,
            padding=1 - tokens / computed,
            steps=steps,
            model_flops=useful.model,
            machine_flops=self._machine_flops(machine),
            memory=peak.in_gib(),
            messages=sizes_by_shapes(self.shapes) if resources.train.zero_stage else None,
            fits=fits,
            nearest=self._nearest(largest) if fits is False else None,
            hours=hours,
            mfu=mfu,
            cost=cost,
            resume_bytes=3 * 4 * self.weights.trained * _checkpoints_at_once(stage, resources, steps),
            model_bytes=4.0 * total,
            data_bytes=data_bytes,
            feature_bytes=self._feature_bytes(images * first),
        )

    def _declared(self, lengths: Lengths, text: TextFormat) -> data.EpochLengths:
        longest = min(text.max_tokens, self.stage.sequence_length)
        return data.declared(lengths, self.stage.mixture, image_tokens=text.image_tokens, max_tokens=longest)

    def _prepared(self, text: TextFormat) -> tuple[data.EpochLengths, int, float]:
        """Return an epoch of the prepared mixture, the steps that the training loop takes, and the bytes on disk."""
        dataset = self._dataset(text)
        files = store.opened(dataset)
        cache = self.resources.storage.plan_cache()
        row_loader = RowLoader(files.file, digest=dataset.digest, stage=self.stage, cache=cache)
        data_bytes = float(sum(facts["size"] for _, facts in files.places.values()))
        return data.prepared(dataset, self.stage.mixture), row_loader.num_steps(), data_bytes

    def _dataset(self, text: TextFormat) -> Dataset:
        mixture = self.stage.mixture
        reason = "it is not prepared"
        try:
            if dataset := prepared_dataset(mixture, text, self.resources):
                return dataset
        except (ValueError, OSError) as error:
            reason = str(error)  # the raw data is not on this machine
        raise ValueError(
            f"the lengths of mixture {mixture.name!r} are not known: {reason}; run "
            f"`{self.context.suggest('prepare')} --mixture {mixture.name}`, or declare them in a file with --lengths"
        )

    def _time(self, useful: Flops, machine: Flops) -> tuple[float | None, float | None, float | None]:
        """Return hours, MFU and cost: all None without an accelerator, and no cost if the accelerator has no price."""
        if (card := self.resources.train.accelerator) is None:
            return None, None, None
        workers = self.resources.train.num_workers
        peak_flops = card.peak_tflops * 1e12 * workers
        seconds = self._machine_flops(machine) / (peak_flops * self.resources.train.mfu)
        return (
            seconds / 3600,
            useful.model / (seconds * peak_flops),
            seconds / 3600 * workers * card.price_per_hour or None,
        )

    def _flops(self, loads: tuple[Load, ...], epochs: float, first: float) -> Flops:
        """Return the FLOPs of all steps. `first` is the share of images that a frozen tower runs on."""
        total = Flops(0, 0, 0)
        for load in loads:
            whole = Load(*(epochs * getattr(load, name) for name in ("tokens", "pairs", "images", "targets")))
            cached = flops(self.shapes, self.stage, whole, features_cached=True)
            tower = flops(self.shapes, self.stage, whole).forward - cached.forward
            total = total + cached + Flops(first * tower, 0, 0)
        return total

    def _machine_flops(self, counted: Flops) -> float:
        """Return the FLOPs of the machine, with recomputation if the resources set gradient checkpointing."""
        return counted.machine if self.resources.train.gradient_checkpointing else counted.model

    def _feature_bytes(self, images: float) -> float:
        if "vision_tower" in self.stage.trainable or not self._keeps_features():
            return 0.0
        return value_bytes(self.stage) * images * self.shapes.patches * self.shapes.tower.width

    def _keeps_features(self) -> bool:
        return self.resources.storage.features_leave_free < 1

    def _nearest(self, largest: MicroBatch) -> dict[str, int | str | bool]:
        """Return the cheapest changed settings that fit, or {}.

        From cheap to expensive: a smaller micro-batch and a higher ZeRO stage, recomputation, offload, more workers.
        """
        now, card = self.resources.train, self.resources.train.accelerator
        assert card is not None
        inline = self.resources.launch == "inline"
        sizes = [size for size in range(now.micro_batch_size, 0, -1) if self.stage.global_batch_size % size == 0]
        more = [now.num_workers * 2**power for power in range(13) if now.num_workers * 2**power <= MOST_WORKERS]
        fitting: list[tuple[tuple[float, ...], dict[str, int | str | bool]]] = []
        for workers, offload, recompute, zero, size in itertools.product(
            [1] if inline else more,
            OFFLOADED[:1] if inline else OFFLOADED[OFFLOADED.index(now.offload) :],
            [now.gradient_checkpointing] if now.gradient_checkpointing else [False, True],
            [0] if inline else range(now.zero_stage, 4),
            sizes,
        ):
            if self.stage.global_batch_size % (workers * size) or zero < LEAST_ZERO[offload]:
                continue
            settings = {
                "num_workers": workers, "offload": offload, "gradient_checkpointing": recompute, "zero_stage": zero,
                "micro_batch_size": size,
            }  # fmt: skip
            other = self.resources.with_changes({f"train.{key}": value for key, value in settings.items()})
            batch = MicroBatch(size, largest.tokens, largest.images * size // largest.rows)
            if _fits(memory(self.shapes, self.weights, self.stage, other, batch), card):
                changed = {key: value for key, value in settings.items() if value != getattr(now, key)}
                cost = (
                    workers,
                    OFFLOADED.index(offload),
                    recompute,
                    now.micro_batch_size / size * 1.5 ** (zero - now.zero_stage),
                )
                fitting.append((cost, changed))
        return min(fitting, key=lambda one: one[0])[1] if fitting else {}


def _fits(peak: Memory, card: Accelerator) -> bool:
    return peak.total <= card.memory_gib * GIB - RESERVED


def _checkpoints_at_once(stage: Stage, resources: Resources, steps: int) -> int:
    """Return the number of resume checkpoints that exist at once, with the one that is being written."""
    written = max(0, (steps - 1) // stage.save_every)
    keep = resources.train.keep
    spaced = steps // math.lcm(keep.every, stage.save_every) if keep.every else 0
    return min(written, keep.last + keep.best + spaced + 1)


def config_of(model: Model, resources: Resources) -> VilaConfig:
    """Return the config of the whole model."""
    cache = resources.storage.cache_folder()
    vision, text = vision_config(model, cache), text_config(model, cache)
    if vision is None or text is None:
        part = "vision_tower" if vision is None else "language_model"
        raise ValueError(f"the shape of {part} is not known on this machine; run `vila-ops fetch`, or set its `shape`")
    text.vocab_size = padded(text.vocab_size + (model.language_model.kind != "random"))  # one more for <image>
    return VilaConfig(
        vision_config=vision,
        text_config=text,
        projector=model.projector.model_dump(mode="json"),
        vision_feature_layer=model.feature_layer,
        vision_side=model.image_size,
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )


def _weights(counts: Counts, stages: tuple[Stage, ...]) -> tuple[Weights, int]:
    """Return the parameters by state while the last of these stages trains, and their total number."""
    trained, total, parts = counts.trained(stages), counts.total(stages), stages[-1].trainable
    assert trained is not None
    assert total is not None
    assert counts.vision_tower is not None
    assert counts.projector is not None
    rest = counts.vision_tower * ("vision_tower" not in parts) + counts.projector * ("projector" not in parts)
    return Weights(trained, total - trained - rest, rest), total
