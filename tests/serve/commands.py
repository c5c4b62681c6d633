"""The commands that change a service, on two registered versions of the tiny recipe's service."""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from vila_ops.artifacts.kinds import ModelVersion
from vila_ops.cli import app
from vila_ops.config import Resources, Run, Service, load
from vila_ops.registry.mlflow_registry import open_registry
from vila_ops.registry.register import set_champion, shown_in_mlflow

TINY = Path(__file__).parents[2] / "configs/recipes/tiny.yaml"


class Commands:
    """A recipe and resources in files, and a registry whose version 1 is the champion."""

    def __init__(self, folder: Path, database: Path, versions: tuple[ModelVersion, ...], run: Run) -> None:
        """`database` is one of MLflow, with tables alone; the run's service and resources are used."""
        shutil.copyfile(database, folder / "mlflow.db")
        self.service = run.recipe.service
        self.gate = run.recipe.gate.with_changes({"model_name": versions[0].name})
        self.resources = run.resources.with_changes({"tracking.uri": f"sqlite:///{folder}/mlflow.db"})
        self._recipe, self._resources = folder / "recipe.yaml", folder / "resources.yaml"
        changes = {"service": self.service.model_dump(mode="json"), "gate": {"model_name": self.gate.model_name}}
        self._recipe.write_text(yaml.safe_dump({"extends": [str(TINY)], **changes}))
        self._resources.write_text(yaml.safe_dump(self.resources.model_dump(mode="json")))
        with open_registry(self.resources, self.gate.model_name, "the versions of a test") as registry:
            assert [registry.version_of(version.checkpoint) for version in versions] == [1, 2]
        set_champion(self.gate.model_name, 1, self.resources, reason="first")

    def said(self, *arguments: str) -> dict[str, Any]:
        """The JSON object that a command prints."""
        done = self._invoked(*arguments, "--json")
        assert done.exit_code == 0, f"{done.exception!r}\n{done.output}"
        printed: dict[str, Any] = json.loads(done.stdout)
        return printed

    def refused(self, *arguments: str) -> str:
        """Why a command fails."""
        done = self._invoked(*arguments)
        assert done.exit_code != 0
        return str(done.exception) + done.output

    def aliases(self) -> dict[str, int]:
        """Where the aliases point, by the store; MLflow shows the same."""
        return {str(alias): version for alias, version in self.history()[-1].aliases.items()}

    def history(self) -> tuple[Any, ...]:
        """Every move of an alias."""
        return shown_in_mlflow(self.gate.model_name, self.resources).history

    def _invoked(self, command: str, *arguments: str) -> Any:
        return CliRunner().invoke(app, [command, str(self._recipe), "-r", str(self._resources), *arguments])


def tiny_run(service: Service, resources: Resources) -> Run:
    """The tiny recipe with a service, and resources."""
    run = load(TINY, resources=TINY.parents[1] / "resources/inline.yaml")
    return Run(recipe=run.recipe.with_changes({"service": service.model_dump()}), resources=resources)
