"""First weights of a projector from data: each image token begins as a linear guess at the words after the image."""

# I images, P patches, C tower channels, Q tokens of an image, H inputs of the last layer, D language model dim

import torch
from torch import Tensor, nn

RIDGE = 0.1
"""Penalty of the weights, as a share of the mean variance of the inputs; chosen on held-out objects of the demo."""

ALIKE = 1e-9
"""Covariance as a share of the mean product below which it is rounding."""


class LeastSquares:
    """Ridge regression of the last linear layer of a projector, over as many images as are added.

    Each of an image's tokens is to predict the mean embedding of the words after the image. The inputs of the last
    layer are what the layers before it make of the features, and these do not change.
    """

    def __init__(self, projector: nn.Module) -> None:
        """The last of the projector's linear layers must have a bias."""
        self._projector = projector
        self._last = [module for module in projector.modules() if isinstance(module, nn.Linear)][-1]
        inputs, outputs = self._last.in_features, self._last.out_features
        self._count = 0
        self._sum_H = torch.zeros(inputs, dtype=torch.float64)
        self._sum_D = torch.zeros(outputs, dtype=torch.float64)
        self._products_HH = torch.zeros(inputs, inputs, dtype=torch.float64)
        self._products_HD = torch.zeros(inputs, outputs, dtype=torch.float64)

    @torch.no_grad()
    def add(self, features_IPC: Tensor, targets_ID: Tensor) -> None:
        """Add images: their tower features, and the mean embedding of the words after each."""
        seen: list[Tensor] = []
        hook = self._last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            self._projector(features_IPC.float())
        finally:
            hook.remove()
        inputs_IQH = seen[0].double()
        tokens = inputs_IQH.shape[1]
        inputs_IH, targets_ID = inputs_IQH.sum(1), targets_ID.double()
        flat = inputs_IQH.flatten(0, 1)
        self._count += len(flat)
        self._sum_H += inputs_IH.sum(0)
        self._sum_D += tokens * targets_ID.sum(0)
        self._products_HH += flat.T @ flat
        self._products_HD += inputs_IH.T @ targets_ID

    @torch.no_grad()
    def fit(self, std: float) -> None:
        """Set the last layer: outputs with the mean of the targets, and with this deviation of what images change.

        Raises ValueError if no image was added, or if images or words are all alike.
        """
        if self._count == 0:
            raise ValueError("no image was added, so there is nothing to fit a projector to")
        mean_H, mean_D = self._sum_H / self._count, self._sum_D / self._count
        covariance_HH = self._products_HH / self._count - torch.outer(mean_H, mean_H)
        covariance_HD = self._products_HD / self._count - torch.outer(mean_H, mean_D)
        for covariance, products in ((covariance_HH, self._products_HH), (covariance_HD, self._products_HD)):
            if covariance.norm() <= ALIKE * products.norm() / self._count:
                raise ValueError(
                    "the images of the stage, or the words after them, are all alike, so that a projector cannot be "
                    "fitted to them by least squares; set projector_fit: scale"
                )
        penalty = RIDGE * covariance_HH.diagonal().mean()
        weight_HD = torch.linalg.solve(covariance_HH + penalty * torch.eye(len(mean_H)), covariance_HD)
        variance = torch.einsum("hd,hk,kd->", weight_HD, covariance_HH, weight_HD) / len(mean_D)
        weight_HD *= std / variance.sqrt()
        self._last.weight.copy_(weight_HD.T)
        self._last.bias.copy_(mean_D - mean_H @ weight_HD)
