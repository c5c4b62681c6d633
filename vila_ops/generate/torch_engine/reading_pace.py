"""How much of prompts and images is read between two tokens of the answers under way: the pauses are bounded."""

SMOOTHING = 0.2
"""Weight of the newest measurement in a running mean."""
SHARE = 0.2
"""Of the time of a pass that decodes: what reading may add to it."""
MIN_TOKENS = 4
"""A prompt gets on by so many a pass, however slow reading is."""


class ReadingPace:
    """What reading may take between two tokens, from the times of passes so far.

    A pass that decodes takes d seconds; one that reads N tokens too takes about d + N t, as it goes through the weights
    once. N is chosen so that N t is SHARE d, and the tower computes for so long between two passes: a pause between two
    tokens is then about 1.2 passes that decode, whatever the machine and the model. Where more requests are
    to be read than answers are under way, reading may take so many times more: few readers do not hold up many.
    """

    def __init__(self, *, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._decoding: float | None = None
        """Mean seconds of a pass that decodes."""
        self._added: float | None = None
        """Mean seconds that reading adds to a pass."""
        self._read: float | None = None
        """Mean number of tokens that such a pass reads. A mean of seconds per token would be that of small passes."""

    def decoded(self, seconds: float) -> None:
        """Note a pass that added a token to answers."""
        self._decoding = _mean(self._decoding, seconds)

    def read(self, tokens: int, seconds: float) -> None:
        """Note a pass that read so many tokens, padding included, while it added a token to answers."""
        if self._decoding is not None:
            self._added = _mean(self._added, max(0.0, seconds - self._decoding))
            self._read = _mean(self._read, tokens)

    def tokens(self, to_read: int, answers: int) -> int:
        """The most tokens of prompts in the next pass, which adds to `answers` while `to_read` requests wait."""
        if self._decoding is None or self._read is None or not self._added:
            return self.max_tokens
        tokens = round(_share(to_read, answers) * self._decoding * self._read / self._added)
        return min(self.max_tokens, max(MIN_TOKENS, tokens))

    def seconds(self, to_read: int, answers: int) -> float | None:
        """How long the tower may compute before the next pass; None: no pass was measured yet."""
        return None if self._decoding is None else _share(to_read, answers) * self._decoding


def _share(to_read: int, answers: int) -> float:
    return SHARE * max(1.0, to_read / answers)


def _mean(before: float | None, new: float) -> float:
    return new if before is None else before + SMOOTHING * (new - before)
