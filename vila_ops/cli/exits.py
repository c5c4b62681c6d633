"""The exit codes of `vila-ops`: all of them, listed here alone."""

from enum import IntEnum


class ExitCode(IntEnum):
    """What a command's exit code says."""

    meaning: str

    def __new__(cls, code: int, meaning: str) -> "ExitCode":
        """A code with its meaning."""
        member = int.__new__(cls, code)
        member._value_, member.meaning = code, meaning
        return member

    DONE = 0, "done"
    FAILED = 1, "an error, or a check that found something: faults of data, a difference, a plan that does not fit"
    USAGE = 2, "a command, an option or an argument that does not exist or is missing; nothing was done"
    TRY_AGAIN = 75, "a stage was told to end (SIGTERM) and has saved what it had done; the same command goes on"
    INTERRUPTED = 130, "Ctrl-C; what was finished is kept, and the same command goes on"

    @classmethod
    def summary(cls) -> str:
        """All codes in a sentence, for the help."""
        return "Exit codes: " + "; ".join(f"{one.value} {one.meaning}" for one in cls) + "."
