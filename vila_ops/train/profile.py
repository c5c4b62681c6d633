"""A profile of some optimizer steps: a trace of torch's profiler, and a table of where the time of a step went.

data           waiting for rows that threads read ahead
copies         tokens, pixels and features to the device
tower          the vision tower's forward pass
forward        the rest of the forward pass, with the loss
backward       the backward pass, with the layers that are recomputed
communication  collectives of the workers, in whatever part they happen
update         clipping and the optimizer
waiting        the host waits for the device: at the loss and the gradient norm
other          the rest of the loop: metrics, validations, checkpoints

SCRATCH/diagnostics/<address>/profile-000003-000005.json.gz   trace of rank 0 in steps 3 to 5, for ui.perfetto.dev
SCRATCH/diagnostics/<address>/profile-000003-000005.txt       their table
"""

import bisect
import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from torch.profiler import profile, record_function, schedule

from vila_ops.tracking import MetricLog
from vila_ops.train.job import RankInfo, TrainJob

PARTS = ("data", "copies", "tower", "forward", "backward", "communication", "update", "waiting", "other")
PREFIX = "vila-ops/"
STEP = "ProfilerStep"
"""What the name of a step begins with in torch's profiler."""
COLLECTIVES = ("c10d::", "gloo:", "nccl:", "xccl:")
"""Names of collectives on the host begin so."""
WARM_UP = 2
"""Steps before the profiled ones, in which kernels are chosen and memory is reserved."""
log = logging.getLogger(__name__)


def span(part: str) -> record_function:
    """A context whose time belongs to a part."""
    return record_function(PREFIX + part)


class Times(NamedTuple):
    """Milliseconds of each part in a mean step."""

    host: dict[str, float]
    """Of the thread that runs the loop; they add up to the step."""
    device: dict[str, float]
    """Of the device's kernels; `waiting`: none ran. Kernels that ran at the same time all count. Empty on the CPU."""


class StepProfiler:
    """Profiles steps of rank 0 as the resources ask, from the first one of this attempt on, after WARM_UP."""

    def __init__(self, job: TrainJob, rank_info: RankInfo, metrics: MetricLog) -> None:
        self.stage, self.folder, self.metrics = job.stage.name, job.diagnostics(), metrics
        self.num_steps = job.resources.train.profile_steps if rank_info.rank == 0 else 0
        self._profile: profile | None = None
        self._step = self._done = 0

    def __enter__(self) -> Self:
        if self.num_steps:
            plan = schedule(wait=WARM_UP - 1, warmup=1, active=self.num_steps, repeat=1)
            self._profile = profile(schedule=plan, on_trace_ready=self._write)
            self._profile.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._profile is None:
            return
        if error is not None:
            self._profile.on_trace_ready = None
        self._profile.stop()
        if error is None and self._step < WARM_UP:
            log.warning("%s: no profile, which begins after %d steps; the stage ended before", self.stage, WARM_UP)

    def step(self, step: int) -> None:
        """End a step; `step` steps are done."""
        self._step += 1
        if self._profile is not None:
            self._done = step
            self._profile.step()

    def _write(self, profiled: profile) -> None:
        events: Any = profiled.events()  # type: ignore[no-untyped-call]  # torch
        times = times_of(events)
        first = self._done - sum(_is_step(event) for event in events) + 1
        trace = self.folder / f"profile-{first:06d}-{self._done:06d}.json.gz"
        profiled.export_chrome_trace(str(trace))
        file = trace.with_suffix("").with_suffix(".txt")
        text = "\n".join(table(times))
        file.write_text(f"{text}\n")
        self.metrics.attach(file)
        log.info("%s, steps %d to %d, written to %s and %s:\n%s", self.stage, first, self._done, file, trace, text)


def table(times: Times) -> list[str]:
    """The lines of the table: milliseconds of a mean step, and their share of it."""
    step = sum(times.host.values())
    lines = [f"{'part':<13} {'host ms':>9} {'share':>6}" + f" {'device ms':>10} {'share':>6}" * bool(times.device)]
    for part in PARTS:
        line = f"{part:<13} {times.host[part]:9.1f} {times.host[part] / step:6.1%}"
        if times.device:
            line += f" {times.device[part]:10.1f} {times.device[part] / step:6.1%}"
        lines.append(line)
    return [*lines, f"{'step':<13} {step:9.1f} {1:6.1%}"]


class TimePiece(NamedTuple):
    """A piece of the loop's time, in microseconds, that belongs to one part."""

    start: float
    end: float
    part: str


def times_of(events: Sequence[Any]) -> Times:
    """Where the time of a mean step went, from the events of torch's profiler."""
    on_host = [event for event in events if event.device_type.name == "CPU"]
    steps = [event for event in on_host if _is_step(event)]
    spans = [TimePiece(one.time_range.start, one.time_range.end, "other") for one in steps]
    spans += [
        TimePiece(one.time_range.start, one.time_range.end, one.name.removeprefix(PREFIX))
        for one in on_host
        if one.name.startswith(PREFIX) and any(_within(one, step) for step in steps)
    ]
    pieces = _innermost(spans)
    collective = _Union(one for one in on_host if one.name.startswith(COLLECTIVES))
    host = dict.fromkeys(PARTS, 0.0)
    for piece in pieces:
        communicating = collective.before(piece.end) - collective.before(piece.start)
        host[piece.part] += piece.end - piece.start - communicating
        host["communication"] += communicating
    per_step = 1000 * len(steps)
    device = _device_times(events, pieces, steps)
    return Times(*({part: time / per_step for part, time in each.items()} for each in (host, device)))


def _device_times(events: Sequence[Any], pieces: list[TimePiece], steps: list[Any]) -> dict[str, float]:
    """Microseconds of kernels by the part that launched them; {} without kernels."""
    kernels = _Union(one for one in events if one.device_type.name != "CPU" and not one.is_user_annotation)
    times: dict[str, float] = defaultdict(float)
    starts = [piece.start for piece in pieces]
    for event in events:
        number = bisect.bisect_right(starts, event.time_range.start) - 1
        for kernel in event.kernels if number >= 0 else ():
            times[_part_of(kernel.name) or pieces[number].part] += kernel.duration
    if not times:
        return {}
    busy = sum(kernels.before(step.time_range.end) - kernels.before(step.time_range.start) for step in steps)
    idle = sum(step.time_range.end - step.time_range.start for step in steps) - busy
    return {**dict.fromkeys(PARTS, 0.0), **times, "waiting": times["waiting"] + idle}


def _part_of(kernel: str) -> str | None:
    """The part of a kernel that its name alone tells."""
    if kernel.startswith(("Memcpy", "Memset")):
        return "copies"
    return "communication" if kernel.startswith(("nccl", "rccl")) else None


def _is_step(event: Any) -> bool:
    return bool(event.name.startswith(STEP) and event.device_type.name == "CPU")


def _within(event: Any, step: Any) -> bool:
    """Whether an event is part of a step, in the thread of the loop."""
    inside = step.time_range.start <= event.time_range.start and event.time_range.end <= step.time_range.end
    return bool(inside and event.thread == step.thread)


def _innermost(spans: list[TimePiece]) -> list[TimePiece]:
    """The time of nested spans in pieces, each with the part of the innermost span."""
    pieces: list[TimePiece] = []
    nested: list[TimePiece] = []
    cursor = 0.0

    def up_to(time: float) -> None:
        nonlocal cursor
        if time > cursor:
            pieces.append(TimePiece(cursor, time, nested[-1].part))
        cursor = time

    for one in sorted(spans, key=lambda one: (one.start, -one.end)):
        while nested and nested[-1].end <= one.start:
            up_to(nested[-1].end)
            nested.pop()
        if nested:
            up_to(one.start)
        cursor = one.start
        nested.append(one)
    while nested:
        up_to(nested[-1].end)
        nested.pop()
    return pieces


class _Union:
    """The time in which at least one of some events was there."""

    def __init__(self, events: Iterable[Any]) -> None:
        edges, totals, end = [0.0], [0.0], 0.0
        for start, until in sorted((one.time_range.start, one.time_range.end) for one in events):
            if until > end:
                begun = max(start, end)
                edges += [begun, until]
                totals += [totals[-1], totals[-1] + until - begun]
                end = until
        self._edges, self._totals = edges, totals

    def before(self, time: float) -> float:
        """How much of it is before a time."""
        return float(np.interp(time, self._edges, self._totals))
