"""What the training data of a checkpoint was compared with, stage by stage, from the manifests in its store."""

import json

from vila_ops.artifacts.kinds import Checkpoint, Dataset
from vila_ops.artifacts.listing import of_digest
from vila_ops.artifacts.store import file, manifest_of, store_of
from vila_ops.data.preprocess.summary import SUMMARY
from vila_ops.registry.gate import TrainingData

REASON = "contaminated"
"""How the reasons begin for which decontamination leaves records out."""


def training_data(checkpoint: Checkpoint) -> tuple[TrainingData, ...]:
    """The data of each stage, the first stage first. Raises ValueError for data that the checkpoint's store lacks."""
    root = store_of(checkpoint.uri)
    digest, init = checkpoint.parents
    data = of_digest(Dataset, digest, store=root)
    if data is None:
        raise ValueError(
            f"the data of stage {checkpoint.stage!r} (digest {digest[:12]}) is not in {root}, so nobody can say what "
            "it was compared with; bring it back, or take clean_of out of the gate"
        )
    before = of_digest(Checkpoint, init, store=root)
    return (*(training_data(before) if before else ()), _of_stage(checkpoint.stage, data))


def _of_stage(stage: str, data: Dataset) -> TrainingData:
    rules = manifest_of(data)["recipe"]["mixture"]["contamination"]
    counts = json.loads(file(data, SUMMARY).read_text())["sources"].values()
    reasons = sorted({reason for one in counts for reason in one["taken_out"] if reason.startswith(REASON)})
    return TrainingData(
        stage=stage,
        left_out={reason: sum(one["taken_out"].get(reason, 0) for one in counts) for reason in reasons},
        against=tuple(rules["sources"]) if rules else (),
    )
