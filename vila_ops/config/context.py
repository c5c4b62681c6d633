"""What a run only takes along: never hashed, and no task computes anything from it."""

from vila_ops.config.base import Config


class RunContext(Config):
    """Passed last to every task; it only ends up in links, messages and MLflow."""

    parent_run: str | None = None
    """MLflow run that the runs of the tasks are children of."""
    links: dict[str, str] = {}
    """Addresses of pages that belong to the run, such as Prefect's, by name."""
    command: str | None = None
    """Recipe and options of the command that was given, for commands that messages suggest."""

    def below(self, parent_run: str | None) -> "RunContext":
        """This context under a parent run."""
        return self.with_changes({"parent_run": parent_run})

    def suggest(self, command: str) -> str:
        """A `vila-ops` command on the recipe and options that were given, or on RECIPE where none is known."""
        return f"vila-ops {command} {self.command or 'RECIPE'}"


NO_CONTEXT = RunContext()
