"""The two engines that take an optimizer step: plain torch, and DeepSpeed's ZeRO stages 1 to 3.

Both use the same objective, parameter groups and loss scaling. In a stage of precision bf16, parameters, gathers and
activations are bf16; master weights, moments and the sums of gradients over micro-batches are fp32. Masters begin as
the fp32 weights of the stage's initial model. Both engines yield their state by parameter name, whole and in fp32, so
that a checkpoint fits any world size. No other module imports DeepSpeed.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from vila_ops.config import Resources, Stage
from vila_ops.config.resources import Offloaded
from vila_ops.device import device_of
from vila_ops.model.compiled import compile_layers, compiled_layers
from vila_ops.model.recompute import recompute, recomputed_layers
from vila_ops.model.trainable import compute_in
from vila_ops.plan.messages import MessageSizes, sizes_of
from vila_ops.train.objective import Batch, Objective
from vila_ops.train.optim import Trained, build_optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
State = tuple[str, dict[str, Tensor]]
"""The name of a parameter, and its fp32 `param`, `exp_avg` and `exp_avg_sq`."""


class TrainEngine(Protocol):
    """Forward pass, backward pass, optimizer step, and the whole state by parameter name."""

    live: bool
    """Whether `state` yields the tensors that `step` updates in place, rather than gathered copies."""

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the summed token loss of this rank's micro-batch, and its (N,) token losses: see Objective."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss that is already divided by the target tokens of the global batch."""

    def step(self, lr_multiplier: float) -> Tensor:
        """Clip the gradients and update at `lr_multiplier` times the peak rates. Returns the norm before clipping, ().

        If the norm is not finite, no rank updates anything. The norm is on the device, and the host did not wait for
        it.
        """

    def state(self) -> Iterator[State]:
        """Yield every trained parameter with its moments, in the same order on all ranks.

        All ranks must iterate to the end, as ZeRO gathers each parameter from all of them.
        """

    def facts(self) -> dict[str, Any]:
        """Return what really ran, read from the engine and its optimizer."""

    def restore(self, states: dict[str, dict[str, Tensor]], *, step: int) -> None:
        """Restore a state that `state` yielded after `step` steps."""


class PlainEngine:
    """Plain torch. Of several processes each has all of the state, and they add their gradients up (ZeRO stage 0)."""

    def __init__(self, objective: Objective, trained: Trained, stage: Stage, resources: Resources) -> None:
        self.objective = objective
        self.named = [pair for named in trained.values() for pair in named]
        self.live = True
        self.max_grad_norm = stage.max_grad_norm
        self.reductions = _dtype(resources.train.reductions) if stage.precision == "bf16" else torch.float32
        device = device_of(resources.device)
        fp32 = compute_in(_dtype(stage.precision), objective, trained)
        objective.to(device)
        masters = {name: nn.Parameter(weight.to(device)) for name, weight in fp32.items()}
        updated: Trained = {
            part: [(name, masters.get(name, parameter)) for name, parameter in named] for part, named in trained.items()
        }
        self.masters = [master for named in updated.values() for _, master in named]
        """The fp32 weights that the optimizer updates, in the order of `named`; in fp32 the parameters themselves."""
        for _, parameter in self.named:
            parameter.grad_dtype = torch.float32
        if _world_size() > 1:
            for master in self.masters:
                torch.distributed.broadcast(master.data, 0)
            self._round()
        self.optimizer = build_optimizer(stage, updated, resources)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See TrainEngine."""
        total, token_losses = self.objective(batch)
        return total, token_losses

    def backward(self, loss: Tensor) -> None:
        """See TrainEngine."""
        if loss.requires_grad:  # not for a batch of text where only parts on the image path train
            torch.autograd.backward(loss)

    def step(self, lr_multiplier: float) -> Tensor:
        """See TrainEngine. A parameter that no row used gets a gradient of zero, as under ZeRO."""
        for (_, parameter), master in zip(self.named, self.masters, strict=True):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(master)
            if master is not parameter:
                master.grad, parameter.grad = parameter.grad, None
        self._reduce()
        norm = _clip(self.masters, self.max_grad_norm)
        _set_learning_rates(self.optimizer, lr_multiplier)
        self._update(norm)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _update(self, norm: Tensor) -> None:
        """Update masters and parameters unless the norm is not finite, which the fused kernel itself looks up."""
        if _is_fused(self.optimizer):
            self.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]  # which AdamW reads
        elif not norm.isfinite():  # here the host waits for the device
            return
        self.optimizer.step()
        self._round()

    def state(self) -> Iterator[State]:
        """See TrainEngine."""
        for (name, _), master in zip(self.named, self.masters, strict=True):
            moments = self.optimizer.state.get(master) or dict.fromkeys(MOMENTS, torch.zeros_like(master))
            yield name, {"param": master.detach(), **{key: moments[key] for key in MOMENTS}}

    def facts(self) -> dict[str, Any]:
        """See TrainEngine."""
        facts = {"engine": "torch", "zero_stage": 0, "world_size": _world_size(), "offload": "none"}
        return facts | _optimizer_facts(self.optimizer, self.objective)

    def restore(self, states: dict[str, dict[str, Tensor]], *, step: int) -> None:
        """See TrainEngine."""
        for (name, _), master in zip(self.named, self.masters, strict=True):
            saved = states[name]
            with torch.no_grad():
                master.copy_(saved["param"])
            moments = {key: saved[key].to(master.device, copy=True) for key in MOMENTS}  # not a memory map
            self.optimizer.state[master] = {"step": _step_count(step, master, self.optimizer), **moments}
        self._round()

    @torch.no_grad()
    def _round(self) -> None:
        """Set the parameters to the masters, rounded to the precision of the forward pass."""
        for (_, parameter), master in zip(self.named, self.masters, strict=True):
            if master is not parameter:
                parameter.copy_(master)

    def _reduce(self) -> None:
        """Add the gradients up over all ranks."""
        if _world_size() == 1:
            return
        sums = [master.grad.to(self.reductions) for master in self.masters if master.grad is not None]
        works = [torch.distributed.all_reduce(total, async_op=True) for total in sums]
        for master, total, work in zip(self.masters, sums, works, strict=True):
            work.wait()
            if total is not master.grad:
                master.grad = total.to(torch.float32)


class DeepSpeedEngine:
    """DeepSpeed with ZeRO stage 1, 2 or 3, in one of several processes."""

    def __init__(self, objective: Objective, trained: Trained, stage: Stage, resources: Resources) -> None:
        deepspeed = _import_deepspeed()
        self.deepspeed = deepspeed
        self.named = [pair for named in trained.values() for pair in named]
        self.zero_stage = resources.train.zero_stage
        self.live = False
        optimizer = build_optimizer(stage, trained, resources)
        masters = compute_in(_dtype(stage.precision), objective, trained)
        config = deepspeed_config(stage, resources, sizes_of(objective.model))
        device = device_of(resources.device)
        compute_on(device)
        module = self._placed(objective, config, device)
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.adamw = optimizer
        self.world_size = torch.distributed.get_world_size()
        self._init_moments(step=0)
        for name, parameter in self.named if masters else ():
            self._restore_optimizer(parameter, {"param": masters[name]})

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See TrainEngine."""
        total, token_losses = self.engine(batch)
        return total, token_losses

    def backward(self, loss: Tensor) -> None:
        """See TrainEngine. DeepSpeed averages gradients over ranks; the factor of the world size makes that a sum."""
        self.engine.backward(loss * self.world_size, scale_wrt_gas=False)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # only counts the micro-batch

    def step(self, lr_multiplier: float) -> Tensor:
        """See TrainEngine. ZeRO skips an update whose norm is not finite."""
        _set_learning_rates(self.engine.optimizer, lr_multiplier)
        if self._offloaded() != "none" and self.zero_stage > 1:
            # DeepSpeed 0.19.8 copied to the host only the gradients that the last pass reached.
            self.engine.optimizer.finalize_gradient_accumulation_boundary()
        self.engine.step()
        self._zero_gradients()
        return torch.as_tensor(self.engine.get_global_grad_norm())

    def state(self) -> Iterator[State]:
        """See TrainEngine."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, parameter in self.named:
            full = {"param": safe_get_full_fp32_param(parameter)}
            full |= {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            yield name, {key: value.view(_full_shape(parameter)) for key, value in full.items()}

    def facts(self) -> dict[str, Any]:
        """See TrainEngine."""
        facts = {
            "engine": f"deepspeed {self.deepspeed.__version__}",
            "zero_stage": self.engine.zero_optimization_stage(),
            "world_size": torch.distributed.get_world_size(),
            "backend": torch.distributed.get_backend(),
            "offload": self._offloaded(),
        }
        return facts | _optimizer_facts(self.adamw, self.engine.module)

    def restore(self, states: dict[str, dict[str, Tensor]], *, step: int) -> None:
        """See TrainEngine."""
        self._init_moments(step=step)
        for name, parameter in self.named:
            saved = states[name]
            with self._gathered([parameter]), torch.no_grad():
                parameter.copy_(saved["param"].view(parameter.shape))
            self._restore_optimizer(parameter, saved)

    def _restore_optimizer(self, parameter: nn.Parameter, saved: dict[str, Tensor]) -> None:
        """Set a parameter's fp32 weights, and its moments if they are saved, in the optimizer.

        Under ZeRO-3 each rank holds a flat shard of them; the last shard is padded with zeros.
        """
        from deepspeed import utils

        moments = [key for key in MOMENTS if key in saved]
        if self.zero_stage < 3:
            utils.safe_set_full_fp32_param(parameter, saved["param"])
            for key in moments:
                utils.safe_set_full_optimizer_state(parameter, saved[key], key)
        else:  # DeepSpeed 0.19.8's setters of full values fail where the ranks do not divide the number of elements
            size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # which DeepSpeed adds
            rank = torch.distributed.get_rank()
            shard = {key: _shard(value, size=size, rank=rank) for key, value in saved.items()}
            utils.safe_set_local_fp32_param(parameter, shard["param"])
            for key in moments:
                utils.safe_set_local_optimizer_state(parameter, shard[key], key)

    def _placed(self, objective: Objective, config: dict[str, Any], device: torch.device) -> nn.Module:
        """Return the module that DeepSpeed trains, on its device.

        ZeRO-3 takes one parameter after another from the host and shards it, so that the model is never whole there.
        """
        module = _without_frozen_tower(objective)
        if self.zero_stage < 3 or any(hasattr(p, "quant_type") for p in module.parameters()):
            objective.to(device)  # which also rounds 4-bit weights
            return module
        if module is not objective:
            objective.model.model.vision_tower.to(device)
        for part in module.modules():
            for name, buffer in part.named_buffers(recurse=False):
                setattr(part, name, buffer.to(device))
        # Init reads the world size from DeepSpeed's own state.
        self.deepspeed.init_distributed(torch.distributed.get_backend(), dist_init_required=False)
        self.deepspeed.zero.Init(module=module, config_dict_or_path=config)
        return module

    def _init_moments(self, *, step: int) -> None:
        """Create zero moments for all groups, as after `step` steps.

        torch creates them at the first step, group by group. DeepSpeed 0.19.8 links moments to parameter names as soon
        as the first group has them, and fails as the other groups have none. So all of them are created here.
        """
        for flat in self._optimized_tensors():
            empty = {key: torch.zeros_like(flat) for key in MOMENTS}
            self.adamw.state[flat] = {"step": _step_count(step, flat, self.adamw), **empty}
        if self.zero_stage < 3:
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _zero_gradients(self) -> None:
        """Set the gradients of this step to zero.

        DeepSpeed 0.19.8 keeps gradients of parameters that the next step's first pass does not reach: all of them under
        ZeRO-3, and those in the host's memory otherwise.
        """
        for flat in self._optimized_tensors():
            if flat.grad is not None:
                flat.grad.zero_()
        for gradient in getattr(self.engine.optimizer, "accumulated_grads_in_cpu", {}).values():
            gradient.zero_()
        if self.zero_stage == 3:
            self.engine.optimizer.grad_partitions_flat_buffer.zero_()

    def _optimized_tensors(self) -> list[Tensor]:
        """The tensors that the optimizer updates: parameters, or under ZeRO this rank's flat shard of each group."""
        if self.zero_stage == 3:  # its groups hold their shards only during an update
            return list(self.engine.optimizer.fp32_partitioned_groups_flat)
        return [flat for group in self.adamw.param_groups for flat in group["params"]]

    def _offloaded(self) -> Offloaded:
        """Return what DeepSpeed's optimizer reports to keep in the host's memory."""
        if getattr(self.engine.optimizer, "offload_param", False):
            return "parameters"
        name = "offload_optimizer" if self.zero_stage == 3 else "cpu_offload"
        return "optimizer" if getattr(self.engine.optimizer, name, False) else "none"

    def _gathered(self, parameters: list[nn.Parameter]) -> Any:
        """A context in which parameters are whole on every rank. ZeRO-3 shards them outside of it."""
        if self.zero_stage < 3:
            return nullcontext()
        return self.deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def compute_on(device: torch.device) -> None:
    """Let DeepSpeed compute on a device.

    DeepSpeed takes LOCAL_RANK for the number of its GPU. That is another number where a process sees its own GPU alone,
    or where the GPUs that Ray gave the workers are in another order than the workers.
    """
    if device.index is not None:  # the CPU has none
        os.environ["LOCAL_RANK"] = str(device.index)


def deepspeed_config(stage: Stage, resources: Resources, sizes: MessageSizes) -> dict[str, Any]:
    """Return DeepSpeed's config for a stage on its resources."""
    train = resources.train
    per_pass = train.micro_batch_size * train.num_workers
    zero: dict[str, Any] = {
        "stage": train.zero_stage,
        "overlap_comm": train.zero_stage == 3,  # in stages 1 and 2 it waits for the device in every backward pass
        "reduce_bucket_size": sizes.reduce,
        "allgather_bucket_size": sizes.gather,
        "stage3_prefetch_bucket_size": sizes.gather,
    }
    if train.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if train.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    bf16 = {
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": train.reductions,
    }
    return {
        "train_batch_size": stage.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": stage.global_batch_size // per_pass,
        "gradient_clipping": stage.max_grad_norm or 0.0,  # 0: none
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW runs on the CPU as well; DeepSpeed's needs a compiler
        "steps_per_print": 2**31,
        **(bf16 if stage.precision == "bf16" else {}),
    }


def build_engine(objective: Objective, trained: Trained, stage: Stage, resources: Resources) -> TrainEngine:
    """Return the engine for the resources, with gradient checkpointing if they set it.

    The engine casts the model to the stage's precision and moves it to its device, in this order.
    Gradient checkpointing covers the layers of the language model, and of the vision tower if that trains.
    """
    if resources.train.gradient_checkpointing:
        recompute(objective.model.model.language_model)
        if "vision_tower" in trained:
            recompute(objective.model.model.vision_tower)
    if resources.train.compile:
        compile_layers(objective.model.model.language_model)
    if resources.launch == "inline" or resources.train.zero_stage == 0:
        return PlainEngine(objective, trained, stage, resources)
    return DeepSpeedEngine(objective, trained, stage, resources)


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _dtype(precision: Literal["fp32", "bf16"]) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _optimizer_facts(optimizer: torch.optim.Optimizer, objective: nn.Module) -> dict[str, Any]:
    """Return the facts of optimizer and model that both engines report."""
    kind = type(optimizer)
    return {
        "optimizer": f"{kind.__module__}.{kind.__name__}",
        "fused": _is_fused(optimizer),
        "recomputed_layers": recomputed_layers(objective),
        "compiled_layers": compiled_layers(objective),
        "parameters": "bf16" if objective.model.dtype == torch.bfloat16 else "fp32",
    }


def _clip(parameters: list[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale the gradients down to `max_norm` and return their global L2 norm before that."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _without_frozen_tower(objective: Objective) -> Objective:
    """Return the objective without a frozen tower, sharing all other parameters, so that ZeRO does not shard the tower.

    A rank runs the tower only on its images that the feature cache does not have. ZeRO-3 needs all ranks to run the
    same modules, and fails where one rank runs the tower and another does not.
    """
    if any(p.requires_grad for p in objective.model.model.vision_tower.parameters()):
        return objective
    outer, vila, inner = (copy.copy(module) for module in (objective, objective.model, objective.model.model))
    for module in (outer, vila, inner):
        module._modules = dict(module._modules)
    inner.vision_tower, vila.model, outer.model = None, inner, vila
    return outer


def _set_learning_rates(optimizer: Any, lr_multiplier: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * lr_multiplier


def _is_fused(optimizer: torch.optim.Optimizer) -> bool:
    return all(bool(group["fused"]) for group in optimizer.param_groups)


def _step_count(step: int, like: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """Return the number of steps where AdamW reads it: the fused kernel on the device, the loop on the host.

    A number on the device would make the host wait for the device once for each parameter.
    """
    return torch.tensor(float(step), device=like.device if _is_fused(optimizer) else "cpu")


def _shard(full: Tensor, *, size: int, rank: int) -> Tensor:
    """Return the (size,) flat shard of a rank, padded with zeros beyond the end of the tensor."""
    shard = full.flatten()[rank * size : (rank + 1) * size]
    return nn.functional.pad(shard, (0, size - len(shard)))


def _full_shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _import_deepspeed() -> Any:
    import deepspeed
    import deepspeed.ops

    # DeepSpeed would compile its shared-memory all-reduce with g++ at its first start, for a minute. gloo replaces it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
