"""First weights of a projector: drawn when a model is built, scaled before its first stage."""

# I images, P patches, C tower channels

import torch
from torch import Tensor, nn
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from vila_ops.model.projectors.mlp import Mlp
from vila_ops.model.seeds import generator


@torch.no_grad()
def initialise(projector: nn.Module, *, std: float, seed: int) -> None:
    """Draw fresh weights as transformers does (normal with that deviation; biases 0, norms 1), in place.

    Each matrix has a generator of its own, seeded by its name. Raises ValueError for a parameter that belongs to no
    linear layer or norm.
    """
    drawn: set[str] = set()
    for name, module in projector.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(0, std, generator=generator(seed, f"multi_modal_projector.{name}"))
        elif isinstance(module, nn.LayerNorm):
            module.weight.fill_(1)
        else:
            continue
        if module.bias is not None:
            module.bias.zero_()
        drawn |= {f"{name}.{parameter}".removeprefix(".") for parameter, _ in module.named_parameters()}
    if left := sorted({name for name, _ in projector.named_parameters()} - drawn):
        raise ValueError(
            f"the projector's parameters {left[:3]} belong to no linear layer or layer norm, and no others are "
            f"initialised; build the projector from these layers"
        )


@torch.no_grad()
def fit_to(projector: nn.Module, features_IPC: Tensor, embedding_std: float) -> None:
    """Scale a fresh projector in place: its inputs to mean 0 and deviation 1, its outputs to twice `embedding_std`.

    A random projector's outputs are far off the embeddings' scale, which costs the first steps of align (measured).
    Only an MLP's inputs are scaled: other projectors have a norm before their linear layers, or one layer alone.
    """
    layers = [module for module in projector.modules() if isinstance(module, nn.Linear)]
    first, last = layers[0], layers[-1]
    if isinstance(projector, LlavaMultiModalProjector | Mlp):
        flat = features_IPC.flatten(0, 1).float()
        mean, std = flat.mean(0), flat.std(0).clamp_min(1e-4)
        first.weight.div_(std)
        first.bias.sub_(first.weight @ mean)
    out = projector(features_IPC.float())
    scale = 2 * embedding_std / out.std()
    last.weight.mul_(scale)
    if last.bias is not None:
        last.bias.mul_(scale)
