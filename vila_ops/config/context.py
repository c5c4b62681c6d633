"""The context of a run, which is never hashed and never computed with."""

from vila_ops.config.base import Config


class RunContext(Config):
    """The last argument of every task. It only appears in links, messages and MLflow."""

    parent_run: str | None = None
    """MLflow run that is the parent of the tasks' runs."""
    links: dict[str, str] = {}
    """URLs of pages that belong to the run, such as Prefect's, by name."""
    trace: str | None = None
    """Span of OpenTelemetry that the work belongs to, as a `traceparent`, in a process that another one started."""
    command: str | None = None
    """Recipe and options of the user's command, for commands that messages suggest."""

    def below(self, parent_run: str | None) -> "RunContext":
        """This context with another parent run."""
        return self.with_changes({"parent_run": parent_run})

    def suggest(self, command: str) -> str:
        """A `vila-ops` command with the user's recipe and options, or with RECIPE if they are unknown."""
        return f"vila-ops {command} {self.command or 'RECIPE'}"


NO_CONTEXT = RunContext()
