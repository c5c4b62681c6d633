"""The projectors, by kind: patch features of the tower to token embeddings of the language model. Imports no torch.

Tokens of an image, by its side / the patch's side in pixels:

| | 224/14 | 336/14 | 384/14 | 448/14 |
|---|---|---|---|---|
| linear, MLP, transformer | 256 | 576 | 729 | 1024 |
| merged 2 x 2 | 64 | 144 | 196 | 256 |
| merged 3 x 3 | 36 | 64 | 81 | 121 |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, cast

from vila_ops.config.kinds import Group, module_of, provenance

if TYPE_CHECKING:
    from torch import nn

    from vila_ops.model.configuration import VilaConfig

GROUP: Group = "vila_ops.projectors"
PROJECTORS = {
    "linear": "vila_ops.model.projectors.linear",
    "mlp_gelu": "vila_ops.model.projectors.mlp",
    "transformer": "vila_ops.model.projectors.transformer",
    "mlp_downsample": "vila_ops.model.projectors.downsample",
}


class ProjectorModule(Protocol):
    """What the module of a kind offers; a plugin's also has `Config`, a ProjectorConfig, and `REVISION`."""

    def build(self, config: VilaConfig, choice: Any) -> nn.Module:
        """The projector of these settings, (I, P, C) -> (I, Q, D) with Q = choice.tokens(sqrt P).

        Its parameters are those of linear layers and layer norms; the last linear layer gives the output.
        """
        ...


def build_projector(config: VilaConfig) -> nn.Module:
    """The projector that a config names."""
    choice = config.projector_choice()
    module = cast(ProjectorModule, module_of(GROUP, PROJECTORS, choice.kind))
    return module.build(config, choice)


def plugin_of(kind: str) -> dict[str, Any] | None:
    """Package, version and revision of the plugin that adds a kind; None for a kind of ours or of nobody."""
    return provenance(GROUP, PROJECTORS, kind)
