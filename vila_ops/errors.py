"""Our errors, and whether another try can fix an error. The bottom layer: the standard library alone.

Errors of libraries (botocore, Ray, MLflow, httpx, the registries' clients) become errors of ours where they enter.
ValueError is for wrong arguments and settings.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import ClassVar


class VilaError(Exception):
    """An error of ours. Final unless its class says otherwise."""

    retryable: ClassVar[bool] = False
    """Whether the same call may succeed at another try."""


class Unreachable(VilaError, ConnectionError):
    """A service did not answer, or not as it should."""

    retryable = True


class CorruptArtifact(VilaError):
    """A sealed folder, or a file from outside, does not hold what its manifest or its header says."""


class OtherFormat(VilaError):
    """A store, a manifest or a resume checkpoint was written in a format that this version does not read."""


class DamagedFile(CorruptArtifact):
    """A file of a store is missing, or holds other bytes than were sealed."""

    def __init__(self, place: str, fault: str) -> None:
        super().__init__(place, fault)
        self.place, self.fault = place, fault

    def __str__(self) -> str:
        return " ".join(self.args)


class UnsafeStore(VilaError):
    """The store does not keep what sealing rests on, so nothing may be sealed there."""


class StoreRefused(VilaError):
    """The store refuses, and will refuse again: credentials, rights, a bucket or a folder that cannot be used."""


class DiskFault(VilaError, OSError):
    """A disk is full, read-only or broken. Built from an error number and a message, or from a message alone."""

    retryable = True

    def __str__(self) -> str:
        return str(self.args[-1])


class RawRefused(StoreRefused):
    """An object store refuses raw data: credentials, rights, region. What was prepared of it may still be here."""


class StoreUnreachable(Unreachable):
    """The store did not answer as it should, although asked several times."""


class RawChanged(VilaError):
    """A raw file is not the one that was scanned, or changed while it was read. The next run takes it as it is then."""


class DamagedAnswer(VilaError):
    """An answer of S3 broke off."""

    retryable = True


class OtherBytes(DamagedAnswer):
    """An answer of S3 holds other bytes than were stored."""


class FetchError(VilaError):
    """A package could not be brought into the cache: no network, or a client that failed."""

    retryable = True


class FetchRefused(FetchError):
    """A package that will not be in the cache at the next try either: not found, not as pinned, no client."""

    retryable = False


class TrackerRefused(VilaError):
    """MLflow refuses a call."""


class TrackerUnreachable(Unreachable):
    """MLflow did not answer."""


class ClusterUnreachable(Unreachable):
    """The Ray cluster or its job server did not answer, or did not let us in."""


class ClusterFull(VilaError):
    """The cluster had no free resources for all workers in time."""

    retryable = True


class EndpointUnreachable(Unreachable):
    """An endpoint that is measured does not answer."""


class EndpointRefused(VilaError):
    """An endpoint that is measured refuses, and will refuse again: its key, model or URL is wrong."""


class WorkerLost(VilaError):
    """A process of an evaluation died again and again. What it had sealed stays."""

    retryable = True


class JobFailed(VilaError):
    """A job of the cluster ended with an error that is not final."""

    retryable = True


class JobStopped(VilaError):
    """Someone stopped a job of the cluster; the next try would start it again."""


class NonFiniteLoss(VilaError):
    """The loss of a step, or its gradient, is not a number; nothing was updated."""


class OutOfMemory(VilaError):
    """A device has too little memory for a stage with these resources."""


class DeviceLost(VilaError):
    """A device failed or vanished while a process computed on it. That process cannot use it again.

    Workers on a cluster are replaced, see `train/ray_workers.py` and `eval/ray_workers.py`.
    """


class HungStep(VilaError):
    """A step took far longer than those before it, and its processes were ended."""

    retryable = True


class Preempted(VilaError):
    """The machine is taken away: a stage was told to end, and has saved what it had done."""

    retryable = True


class LeaseLost(VilaError):
    """Another process took over the lease under which a result was made, so the result is not published."""

    retryable = True


class PromotionRaceLost(VilaError):
    """The champion changed while a version was judged against the one before."""

    retryable = True


class UnsupportedSetting(VilaError, ValueError):
    """A setting of a request that an engine cannot follow."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name
        """As in OpenAI's API."""


class NotReady(VilaError):
    """A service did not become ready; the text ends with the end of its log."""

    retryable = True


class TokenizerMissing(VilaError):
    """The program behind an official number is not installed here, or does not run."""


class ServerFailed(VilaError):
    """A server of this machine did not start."""

    retryable = True


FINAL: tuple[type[Exception], ...] = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    NameError,
    AssertionError,
    NotImplementedError,
    ImportError,
)
"""Errors that are not ours and are the same at the next try: wrong arguments, bad data, a fault in the code.

Any other may be fixed by another try: a worker that died, a disk or a network that failed.
"""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'sft'?` where one of the known words is nearly the same; else nothing."""
    close = get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def counted(number: int, noun: str) -> str:
    """`1 record`, `2,000 records`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def is_final(error: BaseException) -> bool:
    """Whether another try would raise the same error."""
    return not error.retryable if isinstance(error, VilaError) else isinstance(error, FINAL)


@dataclass(frozen=True)
class RemoteError:
    """An error on its way from one process to another."""

    kind: str
    """Name of a class of this module or of FINAL."""
    message: str

    @classmethod
    def of(cls, error: Exception) -> "RemoteError":
        """The error as the most specific class that every process knows by name."""
        return cls(next(kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _kinds()), str(error))

    @classmethod
    def from_json(cls, text: str) -> "RemoteError":
        """The error that `to_json` wrote."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """One line of text."""
        return json.dumps(asdict(self))

    def rebuilt(self) -> Exception:
        """The error to raise in this process."""
        return _kinds()[self.kind](self.message)


def _kinds() -> dict[str, type[Exception]]:
    """Classes that are built from their message alone, by name."""
    ours = (kind for kind in globals().values() if isinstance(kind, type) and issubclass(kind, VilaError))
    more = (DamagedFile, UnsupportedSetting)
    return {kind.__name__: kind for kind in (*ours, *FINAL, OSError, Exception) if kind not in more}
