"""Writes the tables of docs/settings.md from the config classes, in the order of a recipe: `make settings`."""

import ast
import inspect
import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import IPvAnyNetwork
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from vila_ops.config import (
    benchmarks,
    clean,
    download,
    engine,
    few_shot,
    images,
    local,
    mixture,
    model,
    package,
    resources,
    retrain,
    run,
    schedule,
    serve,
    train,
)
from vila_ops.config import eval as evaluation
from vila_ops.config import sources as source
from vila_ops.config.base import Config

PAGE = Path(__file__).with_name("settings.md")
START, END = "<!-- made by docs/settings.py -->", "<!-- end -->"
ALIASES: tuple[ModuleType, ...] = (benchmarks, engine, evaluation, few_shot, images, model, source)
"""Modules whose type aliases have a docstring."""
GROUPS: dict[str, tuple[Any, ...]] = {
    "A recipe": (run.Recipe,),
    "Its stages": (train.Stage, train.Tuning),
    "Its model": (
        model.Model,
        model.Projector,
        model.VisionTower,
        model.LanguageModel,
        model.FolderWeights,
        package.Package,
    ),
    "Its mixtures": (
        mixture.Mixture,
        mixture.Split,
        mixture.Blend,
        images.ImageReading,
        images.ImageStorage,
        images.ImageEncoding,
        clean.NearDuplicates,
        mixture.Contamination,
    ),
    "Sources of a mixture": (
        source.SourceBase,
        clean.Clean,
        clean.Bounds,
        clean.TopShare,
        source.OwnFiles,
        source.OwnRecords,
        source.Source,
    ),
    "Suite, gate and service": (
        evaluation.MeasureSettings,
        evaluation.SuiteSettings,
        evaluation.Suite,
        evaluation.OfficialSuite,
        evaluation.Benchmark,
        benchmarks.OfficialBenchmark,
        benchmarks.Captions,
        benchmarks.JudgedBenchmark,
        benchmarks.Judge,
        benchmarks.PromptTemplate,
        benchmarks.AnswerFormat,
        few_shot.FewShot,
        few_shot.Pool,
        few_shot.Selection,
        evaluation.Gate,
        evaluation.Rule,
        serve.Service,
        serve.Golden,
    ),
    "Where it runs": (
        resources.Resources,
        resources.StorageResources,
        resources.TrackingResources,
        resources.PrepareResources,
        resources.TrainResources,
        resources.StageResources,
        resources.Accelerator,
        resources.Retention,
        resources.Watchdog,
        resources.Network,
        resources.EvaluateResources,
        resources.EndpointResources,
        resources.ServeResources,
        serve.Access,
        serve.Autoscale,
        serve.CanaryRules,
        serve.Samples,
        serve.RemoteImages,
        serve.RequestLimits,
        engine.TorchEngine,
        engine.VllmEngine,
        engine.AutoEngine,
    ),
    "Retraining": (
        retrain.RetrainPolicy,
        retrain.Quality,
        retrain.DriftRules,
        retrain.FeedbackRules,
        retrain.Budget,
        retrain.CanaryPolicy,
        schedule.Schedule,
    ),
    "Files of their own": (download.DownloadSettings, local.LocalServers),
}
WORDS = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "`true` or `false`",
    NoneType: "`null`",
    IPvAnyNetwork: "network such as `10.0.0.0/8`",
}
PATTERNS = {
    "^[A-Za-z0-9][A-Za-z0-9_.-]*$": "name of letters, digits, `_`, `.` and `-`",
    "^[0-9a-f]{64}$": "64 hexadecimal digits",
    r"^[\x20-\x7e]+$": "printable ASCII",
    r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$": "host name in lower case",
    "(?s)^(id=.+|licence=.*|all)$": "`id=ID`, `licence=LICENCE` or `all`",
    r"^https?://[a-z0-9.-]+(:[0-9]+)?$": "origin, such as `https://chat.example.org`",
}
LIMITS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
NAMES = (*LIMITS, "pattern", "min_length")
NOT_WRITTEN = {(train.Stage, "name"): "The stage's key under `stages`; leave it out."}


def main() -> None:
    """Write the tables between their marks."""
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text("\n".join([before + START, *lines(), END]) + rest.partition(END)[2])


def lines() -> Iterator[str]:
    """The generated part of the page."""
    yield from ("", " · ".join(f"[{title}](#{title.lower().replace(' ', '-').replace(',', '')})" for title in GROUPS))
    for title, kinds in GROUPS.items():
        yield from ("", f"## {title}")
        if source.Source in kinds:
            yield from ("", *renderings())
        for kind in kinds:
            for one in members(kind):
                yield from ("", *section(one, chosen=len(members(kind)) > 1))
    yield ""


def members(kind: Any) -> tuple[type[Config], ...]:
    """The classes of a union tagged by `kind`; for a class, the class alone."""
    return get_args(get_args(kind)[0]) if get_origin(kind) is Annotated else (kind,)


def renderings() -> list[str]:
    """A table of the values of `render` for each kind of source."""
    rows = ["| `kind` | `render` may be | default |", "| --- | --- | --- |"]
    for one in members(source.Source):
        field = one.model_fields["render"]
        rows.append(f"| {named(one)} | {allowed(field.annotation)} | {default(field)} |")
    return rows


def section(one: type[Config], *, chosen: bool) -> list[str]:
    """The heading, docstring and table of a class; inherited fields are linked, not repeated."""
    own = [name for name in inspect.get_annotations(one) if name in one.model_fields]
    above = [parent for parent in one.__bases__ if issubclass(parent, Config) and set(parent.model_fields) - set(own)]
    rows = [f"### {one.__name__}", "", shown(inspect.getdoc(one) or "")]
    for parent in above:
        rows += ["", f"Also the keys of [{parent.__name__}](#{parent.__name__.lower()})."]
    rows += ["", "| key | may be | default | meaning |", "| --- | --- | --- | --- |"]
    for name in own:
        field = one.model_fields[name]
        given = "required" if chosen and name == "kind" else default(field)
        meaning = meanings(one)[name] or of_class(field.annotation)
        if (one, name) in NOT_WRITTEN:
            given, meaning = "its key", NOT_WRITTEN[one, name]
        rows.append(f"| `{name}` | {allowed(field.annotation, field.metadata)} | {given} | {shown(meaning)} |")
    return rows


def allowed(kind: Any, limits: Any = ()) -> str:
    """The values that a type allows, in words."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        inner = [limit for one in args[1:] for limit in (one.metadata if isinstance(one, FieldInfo) else [one])]
        return allowed(args[0], [*inner, *limits])
    if origin in (Union, UnionType):
        words = either([allowed(one, limits) for one in args if one is not NoneType])
        return f"{words}, or `null`" if NoneType in args else words
    if origin is Literal:
        return either([f"`{one}`" for one in args])
    if origin is tuple and args[-1] is not Ellipsis:
        return f"list of {len(args)}: {', '.join(allowed(one) for one in args)}"
    if origin is tuple:
        return f"{limited('list', limits)}, each: {allowed(args[0])}"
    if origin is dict:
        return f"{limited('mapping', limits)}, key: {allowed(args[0])}; value: {allowed(args[1])}"
    if issubclass(kind, Config):
        return named(kind)
    return limited(WORDS[kind], limits)


def named(one: type[Config]) -> str:
    """A link to a class, named by its `kind` if it has one."""
    word = one.model_fields["kind"].default if "kind" in one.model_fields else one.__name__
    return f"[`{word}`](#{one.__name__.lower()})"


def limited(word: str, limits: Any) -> str:
    """A type's name with its limits; pydantic keeps each limit in an object of its own."""
    bounds = {name: value for one in limits for name in NAMES if (value := getattr(one, name, None)) is not None}
    if "pattern" in bounds:
        return PATTERNS[bounds["pattern"]]
    if "min_length" in bounds:
        return f"{word} of at least {bounds['min_length']}"
    if bounds.keys() == {"ge", "le"}:
        return f"{word} from {bounds['ge']} to {bounds['le']}"
    signs = ", ".join(f"{sign} {bounds[name]}" for name, sign in LIMITS.items() if name in bounds)
    return f"{word} {signs}".rstrip()


def either(words: list[str]) -> str:
    """Words joined as `a, b or c`."""
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def default(field: FieldInfo) -> str:
    """The default of a field, or `required`."""
    match field.default:
        case value if value is PydanticUndefined:
            return "required"
        case Config() as value if "kind" in type(value).model_fields:
            return named(type(value))
        case Config():
            return "its defaults"
        case str(value) if value:
            return f"`{value}`"
        case value:
            return f"`{json.dumps(value)}`"


@cache
def meanings(one: type[Config]) -> dict[str, str]:
    """The docstring of each field of a class, followed by that of its type alias."""
    docs: dict[str, str] = {}
    body = ast.parse(inspect.getsource(one)).body[0]
    assert isinstance(body, ast.ClassDef)
    own = texts(body.body)
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [part.id for part in ast.walk(node.annotation) if isinstance(part, ast.Name)]
            of_types = [aliases()[name] for name in names if name in aliases()]
            docs[node.target.id] = " ".join([own.get(node.target.id, ""), *of_types]).strip()
    return docs


def of_class(kind: Any) -> str:
    """The first paragraph of a class's docstring, for a field that takes that class alone."""
    kinds = [one for one in get_args(kind) or (kind,) if isinstance(one, type) and issubclass(one, Config)]
    return (inspect.getdoc(kinds[0]) or "").partition("\n\n")[0].replace("\n", " ") if len(kinds) == 1 else ""


@cache
def aliases() -> dict[str, str]:
    """The docstring of each type alias of the config modules."""
    return {name: text for one in ALIASES for name, text in texts(ast.parse(inspect.getsource(one)).body).items()}


def texts(body: list[ast.stmt]) -> dict[str, str]:
    """The string that follows each assignment."""
    docs: dict[str, str] = {}
    for node, after in pairwise(body):
        match node, after:
            case (
                ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                docs[name] = inspect.cleandoc(text).replace("\n", " ")
    return docs


def shown(text: str) -> str:
    """Text in Markdown, with YAML's null, true and false for Python's; text in backticks is left as it is."""
    parts = text.replace("|", "\\|").split("`")
    parts[::2] = [re.sub(r"([<*])", r"\\\1", re.sub(r"\b(None|True|False)\b", yaml_word, part)) for part in parts[::2]]
    return "`".join(parts)


def yaml_word(match: re.Match[str]) -> str:
    """None, True or False as YAML writes it."""
    return {"None": "`null`", "True": "`true`", "False": "`false`"}[match[1]]


if __name__ == "__main__":
    sys.exit(main())
