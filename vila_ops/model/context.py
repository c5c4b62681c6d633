"""The longest sequence that a language model reads, and what a recipe may not ask of it. Light: no torch.

A config is the `text_config` of a model folder or a `shape`, as a dict, so fields that it does not state are unknown.
"""

from collections.abc import Mapping
from typing import Any

from vila_ops.config import Recipe, Stage

LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Types of rotary positions whose frequencies depend on the longest sequence of a forward pass."""


def context_length(text_config: Mapping[str, Any]) -> int | None:
    """Positions of a language model; None if its config does not state them.

    Frequencies that depend on the longest sequence of a batch are constant up to the original context. Longer sequences
    would change the results of the others, so that context is the limit.
    """
    limits = [text_config.get("max_position_embeddings")]
    if length_dependent(text_config):
        limits += [stated.get("original_max_position_embeddings") for stated in (text_config, *_rotary(text_config))]
    known = [limit for limit in limits if type(limit) is int and limit > 0]
    return min(known, default=None)


def length_dependent(text_config: Mapping[str, Any]) -> str | None:
    """The type of rotary positions if their frequencies depend on the length, else None."""
    kinds = [stated.get("rope_type", stated.get("type")) for stated in _rotary(text_config)]
    return next((kind for kind in kinds if kind in LENGTH_DEPENDENT), None)


def check_recipe(recipe: Recipe, text_config: Mapping[str, Any]) -> None:
    """Raise ValueError if a recipe may have samples or prompts beyond the context, or packs what cannot be packed."""
    for stage in recipe.stages.values():
        _check_packing(stage, text_config)
    suites = (recipe.stage_suite, recipe.final_suite)
    asked = {"max_tokens": recipe.max_tokens, **{f"max_tokens of suite {one.name!r}": one.max_tokens for one in suites}}
    limit = context_length(text_config)
    for name, length in asked.items():
        if limit is not None and length > limit:
            raise ValueError(
                f"{name} is {length}, but the context of the language model has {limit} positions; set it to {limit} "
                f"or less"
            )


def check_stage(stage: Stage, text_config: Mapping[str, Any], *, longest: int) -> None:
    """Raise ValueError if the longest sample of a stage is longer than the context, or the stage cannot be packed."""
    _check_packing(stage, text_config)
    limit = context_length(text_config)
    if limit is not None and longest > limit:
        raise ValueError(
            f"stage {stage.name!r} has a sample of {longest} tokens, but the context of the language model has {limit} "
            f"positions; set max_tokens to {limit} or less and prepare the mixture again"
        )


def _check_packing(stage: Stage, text_config: Mapping[str, Any]) -> None:
    if stage.pack and (kind := length_dependent(text_config)):
        raise ValueError(
            f"stage {stage.name!r} has pack: true, but the rotary positions of the language model are of type {kind}: "
            f"their frequencies depend on the longest sample of a batch; set pack: false"
        )


def _rotary(text_config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The settings of rotary positions, also under the key of transformers 4: one mapping, or one per layer type."""
    stated = text_config.get("rope_parameters") or text_config.get("rope_scaling")
    if not isinstance(stated, Mapping):
        return []
    return [stated, *(inner for inner in stated.values() if isinstance(inner, Mapping))]
