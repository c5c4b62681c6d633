"""Recipe (hashed) and Run (recipe and resources), from which everything starts."""

from typing import Any

from pydantic import PositiveInt, model_validator

from vila_ops.config.base import Config, Slug, differences, fingerprint
from vila_ops.config.eval import Gate, Suite
from vila_ops.config.mixture import Mixture
from vila_ops.config.model import Model, TextFormat
from vila_ops.config.resources import Resources
from vila_ops.config.serve import Service
from vila_ops.config.train import Stage
from vila_ops.errors import did_you_mean

BASE = "base"
"""Name of the model before the first stage, in place of a stage's name."""


class Recipe(Config):
    """Everything that changes the numbers."""

    name: Slug
    model: Model
    max_tokens: PositiveInt
    """Longest training sample in tokens, image tokens included."""
    stages: dict[str, Stage]
    """Stages in the order in which they run."""
    final_suite: Suite
    """Benchmarks of the last stage's model, by which it is compared with others and promoted."""
    stage_suite: Suite
    """Benchmarks of the base model and of the model after each stage."""
    gate: Gate
    service: Service

    @model_validator(mode="before")
    @classmethod
    def _stages_carry_their_key_as_name(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("stages"), dict):
            stages = {
                key: {"name": key, **stage} if isinstance(stage, dict) else stage
                for key, stage in value["stages"].items()
            }
            return {**value, "stages": stages}
        return value

    @model_validator(mode="after")
    def _one_name_is_one_dataset(self) -> "Recipe":
        if BASE in self.stages:
            raise ValueError(f"{BASE!r} names the model before the first stage; give the stage another name")
        read = {f"stages.{name}": (stage.mixture, self.text(name)) for name, stage in self.stages.items()}
        last, suite = [BASE, *self.stages][-1], self.final_suite
        read["final_suite"] = (suite.mixture, self.text(last, max_tokens=suite.max_tokens))
        first: dict[str, str] = {}
        for place, (mixture, text) in read.items():
            other = first.setdefault(mixture.name, place)
            if changed := next(differences(_settings(*read[other]), _settings(mixture, text)), None):
                setting, ours, theirs = changed
                raise ValueError(
                    f"{other}.mixture and {place}.mixture are both named {mixture.name!r}, but they are two datasets: "
                    f"{setting} is {ours!r} and {theirs!r}; give one of them another name, or change both: edit the "
                    f"file of the mixture"
                )
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> "Recipe":
        for key, stage in self.stages.items():
            if stage.name != key:
                raise ValueError(f"stage {key!r} is named {stage.name!r}; remove its name")
            if stage.sequence_length < self.max_tokens:
                raise ValueError(
                    f"stage {key!r} has a sequence_length of {stage.sequence_length} tokens but a sample may have "
                    f"{self.max_tokens}; raise sequence_length or lower max_tokens"
                )
        if (self.stage_suite.mixture, self.stage_suite.max_tokens) != (
            self.final_suite.mixture,
            self.final_suite.max_tokens,
        ):
            raise ValueError(
                f"stage_suite {self.stage_suite.name!r} and final_suite {self.final_suite.name!r} read the same "
                f"prepared data; give them the same mixture and max_tokens"
            )
        texts = [
            source.origin() for source in self.final_suite.mixture.sources.values() if source.render == "definition"
        ]
        for stage in self.stages.values():
            if shared := [name for name, source in stage.mixture.sources.items() if source.origin() in texts]:
                raise ValueError(
                    f"stage {stage.name!r} trains on {shared}, by which suite {self.final_suite.name!r} measures text "
                    f"skill; take it out of one of the two mixtures"
                )
        for suite in (self.final_suite, self.stage_suite):
            kept_out = [suite.mixture.sources[name].origin() for name in suite.kept_out]
            for stage in self.stages.values():
                if shared := [name for name, source in stage.mixture.sources.items() if source.origin() in kept_out]:
                    raise ValueError(
                        f"stage {stage.name!r} trains on {shared}, whose drawing style suite {suite.name!r} keeps out; "
                        f"take it out of the stage's mixture, or out of the suite's kept_out"
                    )
                if stage.mixture.split != suite.mixture.split:
                    raise ValueError(
                        f"suite {suite.name!r} and stage {stage.name!r} split objects differently, "
                        f"so a test object could be trained on; give both mixtures the same split"
                    )
        return self

    @model_validator(mode="after")
    def _the_gate_reads_what_is_measured(self) -> "Recipe":
        suite = self.final_suite
        for rule in self.gate.rules:
            if not suite.measures(rule.metric):
                raise ValueError(
                    f"gate {self.gate.model_name!r} has a rule on {rule.metric!r}, which final_suite "
                    f"{suite.name!r} does not measure; its benchmarks are {list(suite.benchmarks)}"
                    f"{did_you_mean(rule.metric, suite.benchmarks)}"
                )
        return self

    @model_validator(mode="after")
    def _the_stages_read_clean_data(self) -> "Recipe":
        for name in self.gate.clean_of:
            for stage in self.stages.values():
                rules = stage.mixture.contamination
                if name not in (known := list(rules.sources) if rules else []):
                    raise ValueError(
                        f"gate {self.gate.model_name!r} asks for training data clean of {name!r}, but mixture "
                        f"{stage.mixture.name!r} of stage {stage.name!r} is compared with {known}; add {name!r} to its "
                        f"contamination.sources, or take it out of gate.clean_of{did_you_mean(name, known)}"
                    )
        return self

    @model_validator(mode="after")
    def _tunings_follow_each_other(self) -> "Recipe":
        expert = ""
        for name, stage in self.stages.items():
            if expert and stage.tuning.kind == "lora":
                raise ValueError(
                    f"stage {name!r} has tuning lora after stage {expert!r} gave the model a visual expert, and LoRA "
                    f"adapts one weight of a layer, not two; give it tuning full or visual_expert"
                )
            if stage.tuning.kind == "visual_expert":
                expert = name
        return self

    def fingerprint(self) -> str:
        """sha256 of all settings and of the order of the stages, which canonical JSON does not keep."""
        return fingerprint([self.model_dump(mode="json"), list(self.stages)])

    def model_of(self, stage: str) -> Model:
        """The model in and after a stage (`base`: before the first one), since stages may change its image size."""
        names = list(self.stages)[: list(self.stages).index(stage) + 1] if stage != BASE else []
        sizes = [size for name in names if (size := self.stages[name].image_size) is not None]
        return self.model.with_changes({"image_size": sizes[-1]}) if sizes else self.model

    def text(self, stage: str = BASE, *, max_tokens: int | None = None) -> TextFormat:
        """How the model of a stage reads records. `max_tokens` differs between training and a suite."""
        return self.model_of(stage).text(max_tokens=self.max_tokens if max_tokens is None else max_tokens)


def _settings(mixture: Mixture, text: TextFormat) -> dict[str, Any]:
    """The settings that make a dataset."""
    return {**mixture.model_dump(mode="json"), **text.model_dump(mode="json")}


class Run(Config):
    """A recipe and the resources to run it with. Only the recipe is identity."""

    recipe: Recipe
    resources: Resources

    @model_validator(mode="after")
    def _resources_are_of_its_stages(self) -> "Run":
        if unknown := [name for name in self.resources.train.stages if name not in self.recipe.stages]:
            raise ValueError(
                f"resources.train.stages names {unknown}, which are not stages of recipe {self.recipe.name!r}; "
                f"its stages are {list(self.recipe.stages)}"
            )
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> "Run":
        for stage in self.recipe.stages.values():
            resources = self.resources.for_stage(stage.name)
            per_pass = resources.train.micro_batch_size * resources.train.num_workers
            if stage.global_batch_size % per_pass:
                nearest = max(1, stage.global_batch_size // per_pass) * per_pass
                raise ValueError(
                    f"stage {stage.name!r}: global_batch_size {stage.global_batch_size} is not a multiple of "
                    f"micro_batch_size {resources.train.micro_batch_size} x num_workers {resources.train.num_workers}; "
                    f"use {nearest}, or change the resources"
                )
        return self
