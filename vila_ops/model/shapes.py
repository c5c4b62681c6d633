"""What a recipe says of its parts' shapes, as transformers' configs: known without fetching or allocating anything."""

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from vila_ops.config.model import HubLanguageModel, HubTower, Shape


def config_of(shape: Shape) -> PreTrainedConfig:
    """The transformers config of a shape, its other fields as their class has them.

    Raises ValueError for a model type or a field that transformers does not know, and where fields contradict.
    """
    fields = dict(shape)
    model_type = fields.pop("model_type", None)
    try:
        known = AutoConfig.for_model(str(model_type))
    except ValueError as error:
        raise ValueError(f"shape has model_type {model_type!r}, which transformers does not know") from error
    if unknown := [name for name in fields if not hasattr(known, name)]:
        raise ValueError(f"shape has {unknown}, which a {model_type} has not; correct the names or leave them out")
    try:
        config: PreTrainedConfig = AutoConfig.for_model(str(model_type), **fields)
    except StrictDataclassError as error:
        raise ValueError(f"shape is not one of a {model_type}: {str(error).strip()}") from error
    return config


def check_shape(part: HubTower | HubLanguageModel, config: PreTrainedConfig) -> None:
    """Raises ValueError where the config that came with a part is otherwise than its recipe's shape says."""
    if part.shape is None:
        return
    expected = config_of(part.shape)
    found = {name: (getattr(expected, name), getattr(config, name, None)) for name in part.shape}
    if wrong := {name: values for name, values in found.items() if _plain(values[0]) != _plain(values[1])}:
        told = "; ".join(f"{name} is {came!r} and the recipe says {said!r}" for name, (said, came) in wrong.items())
        raise ValueError(f"{part.name} at {part.revision!r} is another model than its shape: {told}; correct either")


def _plain(value: object) -> object:
    """Height and width are a list in one file and a tuple in another."""
    return tuple(value) if isinstance(value, list) else value
