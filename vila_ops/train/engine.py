"""The two ways to take an optimizer step: plain torch in one process, and DeepSpeed ZeRO over many.

Both see the same objective, the same groups and the same loss scaling; both give up their state by parameter name,
in fp32 and whole, so that a checkpoint fits any world size. The only importer of DeepSpeed.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vila_ops.config import Resources, Stage
from vila_ops.config.resources import Offloaded
from vila_ops.model.recompute import recompute, recomputed_layers
from vila_ops.train.objective import Batch, Objective
from vila_ops.train.optim import Trained, build_optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
State = tuple[str, dict[str, Tensor]]
"""A parameter's name, and its `param`, `exp_avg` and `exp_avg_sq`."""


class Engine(Protocol):
    """Forward, backward, step, and the whole state by name."""

    live: bool
    """Whether `state` gives the very tensors that `step` changes, and not gathered copies of them."""

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed token loss of this rank's micro-batch, and the losses of its tokens: see Objective."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss that is already divided by the global number of tokens."""

    def step(self, factor: float) -> float:
        """Clip and update at `factor` of the peak rates; returns the gradient norm before clipping.

        Where that is not finite nothing moves, on any rank.
        """

    def state(self) -> Iterator[State]:
        """Every trained parameter with its moments, the same on every rank; every rank must call it to the end."""

    def facts(self) -> dict[str, Any]:
        """What really ran, asked of the engine itself."""

    def restore(self, states: dict[str, dict[str, Tensor]], *, step: int) -> None:
        """Continue from states that `state` gave after `step` steps."""


class PlainEngine:
    """One process, plain torch."""

    def __init__(self, objective: Objective, trained: Trained, stage: Stage, resources: Resources) -> None:
        self.objective = objective
        self.named = [pair for named in trained.values() for pair in named]
        self.live = True
        self.max_grad_norm = stage.max_grad_norm
        self.optimizer = build_optimizer(stage, trained, resources)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See Engine."""
        total, each = self.objective(batch)
        return total, each

    def backward(self, loss: Tensor) -> None:
        """See Engine."""
        if loss.requires_grad:  # text alone gives none where only what images pass through trains
            torch.autograd.backward(loss)

    def step(self, factor: float) -> float:
        """See Engine. A parameter that no row reached has a gradient of zero, as it has under ZeRO."""
        for _, parameter in self.named:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = _clip([p for _, p in self.named], self.max_grad_norm)
        if math.isfinite(norm):
            _set_rates(self.optimizer, factor)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state(self) -> Iterator[State]:
        """See Engine."""
        for name, parameter in self.named:
            moments = self.optimizer.state.get(parameter) or dict.fromkeys(MOMENTS, torch.zeros_like(parameter))
            yield name, {"param": parameter.detach(), **{key: moments[key] for key in MOMENTS}}

    def facts(self) -> dict[str, Any]:
        """See Engine."""
        ran = {"engine": "torch", "zero_stage": 0, "world_size": 1, "offload": "none"}
        return ran | _asked(self.optimizer, self.objective)

    def restore(self, states: dict[str, dict[str, Tensor]], *, step: int) -> None:
        """See Engine."""
        for name, parameter in self.named:
            saved = states[name]
            with torch.no_grad():
                parameter.copy_(saved["param"])
            moments = {key: saved[key].to(parameter.device, copy=True) for key in MOMENTS}  # no map of a file
            self.optimizer.state[parameter] = {"step": _steps(step, parameter), **moments}


class DeepSpeedEngine:
    """One of many processes, ZeRO 0 to 3."""

    def __init__(self, objective: Objective, trained: Trained, stage: Stage, resources: Resources) -> None:
        deepspeed = _import_deepspeed()
        self.deepspeed = deepspeed
        self.named = [pair for named in trained.values() for pair in named]
        self.zero_stage = resources.train.zero_stage
        self.live = self.zero_stage == 0
        self.max_grad_norm = stage.max_grad_norm
        optimizer = build_optimizer(stage, trained, resources)
        shared, config = _without_frozen_tower(objective), deepspeed_config(stage, resources)
        self.engine, *_ = deepspeed.initialize(
            model=shared, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.base = optimizer
        self.world_size = torch.distributed.get_world_size()
        self._make_moments(step=0)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See Engine."""
        total, each = self.engine(batch)
        return total, each

    def backward(self, loss: Tensor) -> None:
        """See Engine. DeepSpeed averages over ranks, so the sum needs the world size back."""
        self.engine.backward(loss * self.world_size, scale_wrt_gas=False)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # counts the micro-batch

    def step(self, factor: float) -> float:
        """See Engine. ZeRO 1 to 3 skip an update whose norm is not finite; without ZeRO DeepSpeed has no norm."""
        _set_rates(self.engine.optimizer, factor)
        if self.zero_stage == 0:
            norm = _clip([p for _, p in self.named], self.max_grad_norm)
            if math.isfinite(norm):
                self.engine.step()
            return norm
        if self._offloaded() != "none" and self.zero_stage > 1:
            # It took into the host's memory only what the last pass reached (0.19.8).
            self.engine.optimizer.finalize_gradient_accumulation_boundary()
        self.engine.step()
        self._forget_gradients()
        return float(self.engine.get_global_grad_norm())

    def state(self) -> Iterator[State]:
        """See Engine."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, parameter in self.named:
            if self.zero_stage == 0:
                moments = self.base.state[parameter]
                yield name, {"param": parameter.detach(), **{key: moments[key] for key in MOMENTS}}
            else:
                full = {"param": safe_get_full_fp32_param(parameter)}
                full |= {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
                yield name, {key: value.view(_shape(parameter)) for key, value in full.items()}

    def facts(self) -> dict[str, Any]:
        """See Engine."""
        ran = {
            "engine": f"deepspeed {self.deepspeed.__version__}",
            "zero_stage": self.engine.zero_optimization_stage(),
            "world_size": torch.distributed.get_world_size(),
            "backend": torch.distributed.get_backend(),
            "offload": self._offloaded(),
        }
        return ran | _asked(self.base, self.engine.module)

    def restore(self, states: dict[str, dict[str, Tensor]], *, step: int) -> None:
        """See Engine."""
        self._make_moments(step=step)
        for name, parameter in self.named:
            saved = states[name]
            with self._whole([parameter]), torch.no_grad():
                parameter.copy_(saved["param"].view(parameter.shape))
            self._set(parameter, saved)

    def _set(self, parameter: nn.Parameter, saved: dict[str, Tensor]) -> None:
        """What the optimizer keeps of a parameter. Under ZeRO-3 that is a share, the last one filled up with zeros."""
        from deepspeed import utils

        if self.zero_stage == 0:
            for key in MOMENTS:
                self.base.state[parameter][key].copy_(saved[key])
        elif self.zero_stage < 3:
            utils.safe_set_full_fp32_param(parameter, saved["param"])
            for key in MOMENTS:
                utils.safe_set_full_optimizer_state(parameter, saved[key], key)
        else:  # DeepSpeed's setters of whole values cut beyond the end of one that the ranks do not divide (0.19.8)
            size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # which DeepSpeed adds
            rank = torch.distributed.get_rank()
            own = {key: _share_of(value, size=size, rank=rank) for key, value in saved.items()}
            utils.safe_set_local_fp32_param(parameter, own["param"])
            for key in MOMENTS:
                utils.safe_set_local_optimizer_state(parameter, own[key], key)

    def _make_moments(self, *, step: int) -> None:
        """Zero moments of every group after `step` steps.

        torch makes them at the first step, group by group; DeepSpeed ties them to parameters by name as soon as the
        first group has them, and then finds those of the other groups missing (0.19.8). So they are made here.
        """
        for flat in self._updated():
            empty = {key: torch.zeros_like(flat) for key in MOMENTS}
            self.base.state[flat] = {"step": _steps(step, flat), **empty}
        if self.zero_stage in (1, 2):
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _forget_gradients(self) -> None:
        """DeepSpeed would keep gradients of a step for parameters that get none, or not at first, in the next (0.19.8).

        All of them under ZeRO-3, else those that are in the host's memory.
        """
        for flat in self._updated():
            if flat.grad is not None:
                flat.grad.zero_()
        for gradient in getattr(self.engine.optimizer, "accumulated_grads_in_cpu", {}).values():
            gradient.zero_()
        if self.zero_stage == 3:
            self.engine.optimizer.grad_partitions_flat_buffer.zero_()

    def _updated(self) -> list[Tensor]:
        """What the optimizer updates: whole parameters, or under ZeRO this rank's share of each group, flat."""
        if self.zero_stage == 3:  # which puts a share into its group only while it updates it
            return list(self.engine.optimizer.fp32_partitioned_groups_flat)
        return [flat for group in self.base.param_groups for flat in group["params"]]

    def _offloaded(self) -> Offloaded:
        """What the optimizer of DeepSpeed says that it keeps in the host's memory."""
        if getattr(self.engine.optimizer, "offload_param", False):
            return "parameters"
        name = "offload_optimizer" if self.zero_stage == 3 else "cpu_offload"
        return "optimizer" if getattr(self.engine.optimizer, name, False) else "none"

    def _whole(self, parameters: list[nn.Parameter]) -> Any:
        """ZeRO-3 keeps a share of each parameter; inside this context it is whole on every rank."""
        if self.zero_stage < 3:
            return nullcontext()
        return self.deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def deepspeed_config(stage: Stage, resources: Resources) -> dict[str, Any]:
    """DeepSpeed's own config: a pure function of stage and resources."""
    per_pass = resources.train.micro_batch_size * resources.train.num_workers
    zero: dict[str, Any] = {"stage": resources.train.zero_stage}
    if resources.train.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if resources.train.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_batch_size": stage.global_batch_size,
        "train_micro_batch_size_per_gpu": resources.train.micro_batch_size,
        "gradient_accumulation_steps": stage.global_batch_size // per_pass,
        "gradient_clipping": (stage.max_grad_norm or 0.0) if resources.train.zero_stage else 0.0,  # 0: it does not clip
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW updates on the CPU too; DeepSpeed's is compiled first
        "steps_per_print": 2**31,
    }


def build_engine(objective: Objective, trained: Trained, stage: Stage, resources: Resources) -> Engine:
    """The engine that the resources ask for. Where they say so, the layers that gradients pass are recompute."""
    if resources.train.gradient_checkpointing:
        recompute(objective.model.model.language_model)
        if "vision_tower" in trained:
            recompute(objective.model.model.vision_tower)
    if resources.launch == "inline":
        return PlainEngine(objective, trained, stage, resources)
    return DeepSpeedEngine(objective, trained, stage, resources)


def _asked(optimizer: torch.optim.Optimizer, objective: nn.Module) -> dict[str, Any]:
    """What an engine says of its optimizer and its model."""
    kind = type(optimizer)
    return {
        "optimizer": f"{kind.__module__}.{kind.__name__}",
        "fused": all(bool(group["fused"]) for group in optimizer.param_groups),
        "recomputed_layers": recomputed_layers(objective),
    }


def _clip(parameters: list[nn.Parameter], most: float | None) -> float:
    """The norm of all gradients together, after which they are scaled down to `most`."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if most is not None:
        nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return float(norm)


def _without_frozen_tower(objective: Objective) -> Objective:
    """The same objective over the same parameters, but a frozen tower's, which stay whole on every rank.

    A rank reads its own images' features by the tower when the cache has them not. ZeRO-3 wants every rank to run
    the same modules, and stops where one runs the tower and another does not.
    """
    if any(p.requires_grad for p in objective.model.model.vision_tower.parameters()):
        return objective
    outer, whole, inner = (copy.copy(module) for module in (objective, objective.model, objective.model.model))
    for module in (outer, whole, inner):
        module._modules = dict(module._modules)
    inner.vision_tower, whole.model, outer.model = None, inner, whole
    return outer


def _set_rates(optimizer: Any, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def _steps(step: int, like: Tensor) -> Tensor:
    """The count of steps as torch's fused AdamW keeps it."""
    return torch.tensor(float(step), device=like.device)


def _share_of(whole: Tensor, *, size: int, rank: int) -> Tensor:
    """(size,) numbers of a rank, zeros beyond the end."""
    own = whole.flatten()[rank * size : (rank + 1) * size]
    return nn.functional.pad(own, (0, size - len(own)))


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _import_deepspeed() -> Any:
    import deepspeed
    import deepspeed.ops

    # Its shared-memory all-reduce is compiled with g++ at the first start, which takes a minute; gloo does as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
