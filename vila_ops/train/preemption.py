"""SIGTERM as a notice: the stage saves a resume checkpoint after the step that it is in, and ends."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from vila_ops.errors import Preempted


class PreemptionNotice:
    """Notes SIGTERM while the body runs, instead of what it did before.

    Only a main thread can: with launch inline. Workers on Ray are ended by Ray, and go on from their last checkpoint.
    """

    def __init__(self) -> None:
        self.given = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.given = True

    def obey(self, stage: str, step: int, *, written: Callable[[], None]) -> None:
        """Raise Preempted if there was a notice, once the checkpoint of this step is written."""
        if self.given:
            written()
            raise Preempted(f"{stage}: told to end; a resume checkpoint was saved after step {step}, run it again")
