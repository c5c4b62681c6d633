"""The watch over one canary: hard signs, and the sequential test. It only says why to take the canary back."""

from collections import deque

from vila_ops.serve.router.outcome import ResponseOutcome
from vila_ops.serve.router.sequential import CanaryTest, Observation
from vila_ops.serve.router.state import Canary

RECENT = 10
"""Responses of the canary among which failures are a burst."""
BURST = 5
STABLE_RECENT = 20
FEW = 0.2
"""Share of failures among the stable version's last responses below which a burst is the canary's own."""
SILENT_PROBES = 3
"""Questions for its state that a canary may leave unanswered in a row."""
MAX_CONVERSATIONS = 1_000_000


class CanaryWatch:
    """Counts what comes of the requests while a canary runs."""

    def __init__(self, canary: Canary) -> None:
        rules = canary.rules
        self.canary, self._share = canary, rules.share
        self._test = CanaryTest(rules.level, slower=rules.slower, more_errors=rules.more_errors, drift=rules.drift)
        self._counted: set[int] = set()
        self._canary: deque[bool] = deque(maxlen=RECENT)
        self._stable: deque[bool] = deque(maxlen=STABLE_RECENT)
        self._silent = 0
        self.verdict: str | None = None
        """Why the canary has to be taken back; None while it may stay."""

    def first(self, position: int) -> bool:
        """Whether a conversation was not counted yet; it is now. A client that asks for more has one count."""
        if position in self._counted or len(self._counted) >= MAX_CONVERSATIONS:
            return False
        self._counted.add(position)
        return True

    def responded(self, outcome: ResponseOutcome, *, canary: bool, counts: bool) -> None:
        """Note what came of a request; `counts` where it is the first of its conversation."""
        (self._canary if canary else self._stable).append(outcome.failed)
        failures = sum(self._canary)
        if failures >= BURST and sum(self._stable) <= FEW * len(self._stable):
            self._decide(f"{failures} of its last {len(self._canary)} responses failed")
        if counts:
            failed = outcome.failed or outcome.refused
            text = not failed and not outcome.left
            self._test.add(
                Observation(
                    canary=canary,
                    share=self._share,
                    failed=failed,
                    seconds=None if failed else outcome.seconds,
                    length=outcome.length if text else None,
                    degenerate=outcome.degenerate if text else None,
                )
            )
            if reason := self._test.verdict():
                self._decide(reason)

    def probed(self, status: int | None) -> None:
        """Note the status of a question for its state; None: no answer."""
        self._silent = self._silent + 1 if status is None else 0
        if status is not None and status != 200:
            self._decide(f"it is not ready any more (status {status})")
        elif self._silent >= SILENT_PROBES:
            self._decide(f"it did not answer {SILENT_PROBES} questions for its state")

    def _decide(self, reason: str) -> None:
        self.verdict = self.verdict or reason
