"""Artifact references, which pass between tasks: a place, a digest and the digests of the parents."""

from vila_ops.config.base import Config
from vila_ops.config.secrets import Url


class Artifact(Config):
    """A sealed folder. Equal digest, equal bytes."""

    uri: str
    """Folder with the manifest, on disk or `s3://`; `store.content` and `store.file` give its files."""
    digest: str
    parents: tuple[str, ...] = ()
    """Digests of the artifacts that it was made from."""


class Dataset(Artifact):
    """A prepared mixture: tokenised samples in shards, and their index."""

    num_samples: int
    num_tokens: int


class Shard(Artifact):
    """A unit of prepared data, sealed by itself so that a dataset can link to it."""

    num_samples: int


class Survey(Artifact):
    """The signatures of a unit of raw records, or of the evaluation sets, for rules over all records."""

    num_records: int


class RawScan(Artifact):
    """Hashes of what a scan saw of the raw files of a mixture, by which workers notice a file that changed since."""

    num_records: int
    """Number of hashes."""


class Pretrained(Artifact):
    """Tower, projector and language model before any stage, assembled or read from the folder of `model.weights`."""


class Checkpoint(Artifact):
    """A model after a stage, as a transformers folder. `step` is the number of optimizer steps."""

    stage: str
    step: int


class Endpoint(Config):
    """A model behind an OpenAI-compatible API, which is measured in place of a sealed one. Its key is no part of it."""

    url: Url
    """Base of its routes, such as http://127.0.0.1:8000/v1."""
    name: str
    """Name of the model there."""
    revision: str = ""
    """What tells models of one name apart, such as a date: answers of another revision are not reused."""

    @property
    def digest(self) -> str:
        """Identity of the model, as of a sealed one."""
        return self.fingerprint()


class BenchmarkFiles(Artifact):
    """The official files of a benchmark as items and images."""

    benchmark: str
    """The benchmark's kind."""
    num_items: int
    num_unreadable: int
    """Items with an image that is missing or cannot be read."""


class Demonstrations(Artifact):
    """The demonstrations of each item of a benchmark, chosen by the tower of a model."""

    model: str
    """Digest of the model."""


class Answers(Artifact):
    """The responses of one model to a shard of requests."""

    model: str
    """Digest of the model that was asked."""


class BenchmarkResult(Artifact):
    """Scores of one model on one benchmark, item by item."""

    benchmark: str
    """The benchmark's kind."""
    model: str
    """Digest of the model that was evaluated."""


class EvalReport(Artifact):
    """Metrics of one model on one suite, composed of the results of its benchmarks."""

    suite: str
    model: str
    """Digest of the model that was evaluated."""


class ModelCard(Artifact):
    """What a registered version was made from and what was measured, in Markdown."""

    name: str
    """Of the registered model."""
    version: int
    model: str
    """Digest of the model."""


class Decision(Artifact):
    """What was decided about retraining a model, with its numbers."""

    name: str
    """Of the recipe."""
    subject: str
    """What was decided: `retrain`, `gate` or `canary`."""
    verdict: str
    rule: str
    """The rule that decided."""


class ModelVersion(Config):
    """A version in the MLflow registry; there is one per checkpoint digest."""

    name: str
    version: int
    checkpoint: Checkpoint
    promoted: bool
    """Whether the alias `champion` points to this version."""


class Deployment(Config):
    """A served model."""

    url: str
    model: str
    """Digest that the replicas loaded."""
    version: int
