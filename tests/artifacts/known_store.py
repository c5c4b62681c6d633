"""What today's code reads of a store with one artifact of each kind, in numbers that outlive a version."""

from pathlib import Path
from typing import Any

import torch

from vila_ops.artifacts.kinds import Artifact, Checkpoint, Dataset, EvalReport, Pretrained
from vila_ops.artifacts.listing import manifests
from vila_ops.artifacts.store import KINDS, content, reference, verify
from vila_ops.data.shards import read_index, read_sample
from vila_ops.eval.report import read_report
from vila_ops.generate.engine import EngineOptions
from vila_ops.generate.torch_engine.loaded_model import read_model
from vila_ops.registry import alias_register

IDS = list(range(5, 25))


def known(store: Path) -> dict[str, Any]:
    """Digests of everything, samples, the loss of a fixed sequence, metrics and the champion."""
    sealed = {kind: _only(kind, store) for kind in (Pretrained, Dataset, Checkpoint, EvalReport)}
    for artifact in sealed.values():
        verify(artifact)
    record = alias_register.read("own", store=str(store))
    return {
        "digests": {KINDS[kind]: artifact.digest for kind, artifact in sealed.items()},
        "samples": _samples(sealed[Dataset]),
        "losses": [_loss(sealed[kind]) for kind in (Pretrained, Checkpoint)],
        "metrics": {metric.name: metric.value for metric in read_report(sealed[EvalReport]).metrics},  # type: ignore[arg-type]
        "champion": [record.version("champion"), len(record.history), record.history[0].reason],
    }


def _only(kind: type[Artifact], store: Path) -> Artifact:
    ((uri, manifest),) = manifests(kind, store=str(store))
    return reference(kind, uri, manifest)


def _samples(data: Artifact) -> list[list[Any]]:
    folder = content(data)
    rows = sorted(read_index(folder).to_pylist(), key=lambda row: str(row["key"]))
    samples = [read_sample(folder, **{name: row[name] for name in ("shard", "offset", "key")}) for row in rows]
    return [[one.id, one.source, list(one.input_ids), len(one.images)] for one in samples]


@torch.no_grad()
def _loss(model: Artifact) -> float:
    """Mean loss of a sequence of ids in nats per token."""
    loaded, ids = read_model(content(model), EngineOptions(device="cpu")).model, torch.tensor([IDS])
    logits = loaded.lm_head(loaded.hidden(loaded.embed(ids, None)).last_hidden_state)
    return float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]))
