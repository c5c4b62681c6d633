"""What killed processes left in the folders of some resources: listed, and removed where nothing needs it.

Sealed artifacts are among it only if a caller says which recipes need theirs. What a live lease holds is listed and
kept, and so is what only its user can judge: the progress of a stage that was not finished, and the stores of a proof.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vila_ops.artifacts import copies, disk, output
from vila_ops.artifacts.attempts import DRAFT, unsealed
from vila_ops.artifacts.backend import Entry
from vila_ops.artifacts.disk_faults import size_of
from vila_ops.artifacts.exports import is_replaced, remove_replaced
from vila_ops.artifacts.kinds import Checkpoint
from vila_ops.artifacts.leases import hold, registers
from vila_ops.artifacts.store import KINDS, Address, backend, root_of
from vila_ops.config import Config, Resources, Run
from vila_ops.config.resources import StorageResources
from vila_ops.lineage.unneeded import Unneeded, remove_sealed, unneeded
from vila_ops.pipeline.sweeper import KIND as FLOW_RUN
from vila_ops.train.checkpoint.storage import storage_of
from vila_ops.train.checkpoint.unfinished import ResumeFolder, resume_folders

LEAST_HOURS = 1.0
"""The shortest grace time. Work without a lease, such as on a shard, changes its files more often."""
HELD = "a process holds its lease"
MAY_READ = "a process holds a lease in this store, and may read it"
CHECKPOINT = KINDS[Checkpoint]


class Leftover(Config):
    """Files that nothing needs, or that only a user can judge."""

    place: str
    what: str
    num_bytes: int
    changed: float
    """Time of the last change, in seconds since 1970."""
    kept: str | None
    """Why it is not removed unless it is named; None: nothing needs it."""
    lease: str | None = None
    """Address whose lease is held while it is removed; a process that needs it waits, or is waited for."""
    is_held: bool = False
    """Whether a live lease holds it, so that it is not removed either if it is named."""
    sealed: Unneeded | None = None
    """The sealed artifact that it is."""


def find(resources: Resources, *, grace_hours: float, keep: Sequence[Run] = ()) -> list[Leftover]:
    """All leftovers, the largest first. What changed within `grace_hours` (LEAST_HOURS at least) is kept.

    With runs to `keep`, sealed artifacts are among them that neither these runs nor a registered version need.
    """
    storage = resources.storage
    leases = registers(storage.store)
    every = [*_attempts(storage, leases), *_resume(storage, leases), *_proofs(storage), *_drafts(storage)]
    every += [*_probes(storage), *_flow_runs(storage, leases)]
    if keep:
        every += _unneeded(resources, keep, leases, grace_seconds=3600 * max(grace_hours, LEAST_HOURS))
    latest = time.time() - 3600 * max(grace_hours, LEAST_HOURS)
    return sorted((_in_grace(one, latest) for one in every), key=lambda one: (-one.num_bytes, one.place))


def remove(leftover: Leftover, *, store: str) -> None:
    """Remove a leftover. Raises ValueError for one that a live lease holds."""
    if leftover.is_held:
        raise ValueError(f"{leftover.place} is in use: {leftover.kept}; wait for the task, or end it first")
    if leftover.sealed is not None:
        if any(registers(store).values()):  # one that began since it was listed
            raise ValueError(f"{leftover.place} may be in use: {MAY_READ}; wait for the task, or end it first")
        remove_sealed(leftover.sealed)
        return
    if is_replaced(Path(leftover.place)):
        remove_replaced(Path(leftover.place))
        return
    if leftover.lease is None:
        backend(leftover.place).remove(leftover.place)
        return
    kind, _, key = leftover.lease.partition("/")
    with hold(Address(kind, key, None, ()), store=store):
        backend(leftover.place).remove(leftover.place)


def _in_grace(one: Leftover, latest: float) -> Leftover:
    if one.kept is not None or one.lease is not None or one.changed <= latest:
        return one
    minutes = (time.time() - one.changed) / 60
    return one.with_changes({"kept": f"it changed {minutes:.0f} minutes ago"})


def _attempts(storage: StorageResources, leases: Mapping[str, bool]) -> Iterator[Leftover]:
    for one in unsealed(storage.store):
        address = "/".join(one.place.split("/")[-3:-1])
        # a part of a dataset has no lease of its own: whoever prepares the dataset holds the dataset's
        is_held = leases[address] if address in leases else any(leases.values())
        yield Leftover(
            place=one.place, what="an attempt that was never sealed", num_bytes=one.num_bytes, changed=one.changed,
            kept=HELD if is_held else None, is_held=is_held,
        )  # fmt: skip


def _resume(storage: StorageResources, leases: Mapping[str, bool]) -> Iterator[Leftover]:
    for one in resume_folders(storage.store):
        is_held = leases.get(f"{CHECKPOINT}/{one.address}", False)
        is_spent = one.sealed or one.step is None
        kept = None if is_spent else "only it has the progress of a stage that was not finished"
        yield Leftover(
            place=one.place, what=_described(one), num_bytes=one.num_bytes, changed=one.changed,
            kept=HELD if is_held else kept, lease=f"{CHECKPOINT}/{one.address}", is_held=is_held,
        )  # fmt: skip
        if not is_held and not is_spent:
            for draft in storage_of(one.place).drafts():
                yield from _leftovers([draft], "a resume checkpoint that was not finished")


def _described(folder: ResumeFolder) -> str:
    if folder.sealed:
        return "resume checkpoints of a sealed stage"
    if folder.step is None:
        return f"a folder of stage {folder.stage or '?'}, which ended before its first resume checkpoint"
    return f"resume checkpoints of stage {folder.stage or '?'}, the last after step {folder.step}"


def _unneeded(
    resources: Resources, keep: Sequence[Run], leases: Mapping[str, bool], *, grace_seconds: float
) -> Iterator[Leftover]:
    """Sealed artifacts. Who holds a lease reads others, and which ones is not recorded; so all stay meanwhile."""
    is_held = any(leases.values())
    for one in unneeded(resources, keep, grace_seconds=grace_seconds):
        yield Leftover(
            place=one.uri, what=f"{one.kind} {one.name}".rstrip() + ", sealed, which nothing needs", is_held=is_held,
            num_bytes=one.num_bytes, changed=one.sealed, kept=MAY_READ if is_held else None, sealed=one,
        )  # fmt: skip


def _proofs(storage: StorageResources) -> Iterator[Leftover]:
    """The stores of `train verify-resume`, which removes them unless it was killed or found a difference."""
    root = f"{root_of(storage.store)}/verify-resume"
    by_proof: dict[str, list[Entry]] = defaultdict(list)
    for entry in backend(root).entries(root):
        by_proof[entry.name.partition("/")[0]].append(entry)
    for name, entries in sorted(by_proof.items()):
        stores = {"/".join(entry.name.split("/")[:2]) for entry in entries if "/leases/" in entry.name}
        is_held = any(any(registers(f"{root}/{one}").values()) for one in stores)
        yield Leftover(
            place=f"{root}/{name}", what="stores of `train verify-resume`",
            num_bytes=sum(entry.size for entry in entries), changed=max(entry.changed for entry in entries),
            kept=HELD if is_held else "it may show why a resumed stage differed", is_held=is_held,
        )  # fmt: skip


def _probes(storage: StorageResources) -> Iterator[Leftover]:
    """Objects by which a process tried a store on S3 when it was killed; on disk they are drafts."""
    root = f"{root_of(storage.store)}/.probe"
    for entry in backend(root).entries(root):
        yield Leftover(
            place=f"{root}/{entry.name}", what="an object that tried or measured the store", num_bytes=entry.size,
            changed=entry.changed, kept=None,
        )  # fmt: skip


def _flow_runs(storage: StorageResources, leases: Mapping[str, bool]) -> Iterator[Leftover]:
    """Leases of flow runs that ended: each run has one of its own, and whoever watches a store lists them all."""
    root = f"{root_of(storage.store)}/leases/{FLOW_RUN}"
    by_run: dict[str, list[Entry]] = defaultdict(list)
    for entry in backend(root).entries(root):
        by_run[entry.name.partition("/")[0]].append(entry)
    for name, entries in sorted(by_run.items()):
        if not leases.get(f"{FLOW_RUN}/{name}", True):
            yield Leftover(
                place=f"{root}/{name}", what="the lease of a flow run that ended",
                num_bytes=sum(one.size for one in entries), changed=max(one.changed for one in entries), kept=None,
            )  # fmt: skip


def _drafts(storage: StorageResources) -> Iterator[Leftover]:
    """Hidden files and folders of this machine that are unfinished, or were being removed."""
    scratch, cache = storage.scratch(), storage.cache_folder()
    hidden = [
        *(path for place in ("", "resume") for path in (scratch / place).glob(".*") if _is_draft(path)),
        *(path for path in scratch.glob("leases/*/*/.*") if _is_draft(path)),
        *(path for path in scratch.glob("plans/.*") if _is_draft(path)),
        *scratch.glob("features/*/*/.*"),
        *(path for place in ("packages", "converted", "archives", "listings") for path in cache.glob(f"{place}/.*")),
        *copies.drafts().glob("*"),
    ]
    yield from _leftovers(map(str, hidden), "an unfinished file or folder")
    data = Path(storage.data).resolve()
    yield from _leftovers(map(str, output.drafts(data)), "an unfinished copy of a dataset")
    for old in filter(is_replaced, output.replaced(data)):
        for one in _leftovers([str(old)], "a copy of a dataset that was being replaced"):
            yield one.with_changes({"changed": old.stat().st_ctime})  # its files are older


def _is_draft(path: Path) -> bool:
    return path.name.startswith(".probe-") or DRAFT.fullmatch(path.name) is not None


def _leftovers(places: Iterator[str] | list[str], what: str) -> Iterator[Leftover]:
    for place in places:
        if "://" in place:
            entries = backend(place).entries(place)
            num_bytes, changed = sum(one.size for one in entries), max((one.changed for one in entries), default=0.0)
        else:
            num_bytes, changed = size_of(Path(place)), disk.changed(Path(place))
        yield Leftover(place=place, what=what, num_bytes=num_bytes, changed=changed, kept=None)
