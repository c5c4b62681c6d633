"""What is checked before a stage works: libraries, devices, and whether the model can read its samples. Light."""

from importlib.util import find_spec

from vila_ops.artifacts.kinds import Dataset
from vila_ops.artifacts.store import file
from vila_ops.cluster import device_on
from vila_ops.config import Mixture, Stage
from vila_ops.config.train import Lora
from vila_ops.model.context import check_stage
from vila_ops.packages.untrusted import read_json
from vila_ops.train.job import StageInputs


def check_quantised(stage: Stage) -> None:
    """Raise ValueError for 4-bit weights without their library."""
    if isinstance(stage.tuning, Lora) and stage.tuning.quantise and find_spec("bitsandbytes") is None:
        raise ValueError(
            f"stage {stage.name!r} has tuning.quantise {stage.tuning.quantise}, which needs bitsandbytes; "
            f"pip install 'vila-ops[qlora]', or set tuning.quantise to null"
        )


def check_inputs(inputs: StageInputs) -> None:
    """Raise ValueError or ClusterFull for a device that is not there, and ValueError for samples beyond the context."""
    device_on(inputs.resources, inputs.resources.device)
    from vila_ops.model.configuration import VilaConfig  # heavy: torch, transformers

    stated = read_json(file(inputs.init, "config.json"))
    config = VilaConfig(**{key: value for key, value in stated.items() if key != "model_type"})
    longest = _longest(inputs.data, inputs.stage.mixture)
    check_stage(inputs.stage, config.text_config.to_dict(), longest=longest)


def _longest(data: Dataset, mixture: Mixture) -> int:
    """Tokens of the longest sample of the mixture's sources, 0 without samples."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from vila_ops.data.shards import INDEX

    filters = [("source", "in", list(mixture.sources))]
    table = pq.read_table(file(data, INDEX), columns=["num_tokens"], filters=filters)
    return int(pc.max(table["num_tokens"]).as_py() or 0)
