"""The `shape` of a recipe's tower or language model as a transformers config, without fetching or allocating."""

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from vila_ops.config.model import HubLanguageModel, HubTower, PackagedLanguageModel, PackagedTower, Shape

PretrainedPart = HubTower | PackagedTower | HubLanguageModel | PackagedLanguageModel


def config_of(shape: Shape) -> PreTrainedConfig:
    """The transformers config of a shape; other fields have their class's defaults.

    Raises ValueError for a model type or field that transformers does not know, and for fields that contradict.
    """
    fields = dict(shape)
    model_type = fields.pop("model_type", None)
    try:
        known = AutoConfig.for_model(str(model_type))
    except ValueError as error:
        raise ValueError(
            f"shape has model_type {model_type!r}, which transformers does not know; use one of its model types"
        ) from error
    if unknown := [name for name in fields if not hasattr(known, name)]:
        raise ValueError(
            f"shape has {unknown}, which {model_type} configs do not have; correct the names or leave them out"
        )
    try:
        config: PreTrainedConfig = AutoConfig.for_model(str(model_type), **fields)
    except StrictDataclassError as error:
        raise ValueError(f"shape is not a valid {model_type} config: {str(error).strip()}; correct it") from error
    return config


def check_shape(component: PretrainedPart, config: PreTrainedConfig) -> None:
    """Compare a downloaded config with the recipe's shape. Raises ValueError with every difference."""
    if component.shape is None:
        return
    expected = config_of(component.shape)
    pairs = {name: (getattr(expected, name), getattr(config, name, None)) for name in component.shape}
    differences = [
        f"{name} is {actual!r} and the recipe says {stated!r}"
        for name, (stated, actual) in pairs.items()
        if _plain(stated) != _plain(actual)
    ]
    if differences:
        named = (
            f"{component.name} at {component.revision!r}"
            if isinstance(component, HubTower | HubLanguageModel)
            else f"package {component.package.name} {component.package.version}"
        )
        raise ValueError(
            f"{named} differs from the recipe's shape: {'; '.join(differences)}; correct the shape or the name"
        )


def _plain(value: object) -> object:
    """A value that compares equal: height and width are a list in one file and a tuple in another."""
    return tuple(value) if isinstance(value, list) else value
