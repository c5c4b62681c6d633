"""Strict validation of custom resources: a CRD's own schema, closed against unknown fields, and its CEL rules.

The schemas are not part of this project. VILA_CRDS names a folder with one file per CRD; docs/kubernetes.md says where
they come from.
"""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import celpy
import jsonschema_rs
import yaml

FREE = "x-kubernetes-preserve-unknown-fields"
RULES = "x-kubernetes-validations"
ANY_NUMBER = "x-kubernetes-int-or-string"


def folder() -> Path | None:
    """The folder of the CRDs; None: VILA_CRDS is not set."""
    return Path(given) if (given := os.environ.get("VILA_CRDS")) else None


@cache
def schema_of(api_version: str, kind: str) -> dict[str, Any]:
    """The closed schema of a kind, from GROUP_PLURAL.yaml, as the operators call the files of their CRDs."""
    group, _, wanted = api_version.partition("/")
    place = folder()
    assert place is not None
    text = (place / f"{group}_{kind.lower()}s.yaml").read_text()
    spec = yaml.load(text, yaml.CSafeLoader)["spec"]  # the same as safe_load, in C
    (version,) = (each for each in spec["versions"] if each["name"] == wanted)
    return closed(version["schema"]["openAPIV3Schema"], top=True)


def closed(schema: Any, *, top: bool = False) -> Any:
    """The schema, with no other fields than those it names."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {key: closed(value) for key, value in schema.items()}
    if changed.get(ANY_NUMBER):
        changed.pop("type", None)
    properties = changed.get("properties")
    if isinstance(properties, dict) and changed.get("type") == "object" and not changed.get(FREE):
        changed.setdefault("additionalProperties", False)
    if top:
        changed["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own
    return changed


def faults(resource: dict[str, Any]) -> list[str]:
    """What its CRD says against a resource: unknown or wrong fields, then broken rules."""
    kind = resource["apiVersion"], resource["kind"]
    errors = validator_of(*kind).iter_errors(resource)
    wrong = [f"{'/'.join(map(str, error.instance_path))}: {error.message}" for error in errors]
    return wrong + list(_broken_rules(schema_of(*kind), resource, ""))


@cache
def validator_of(api_version: str, kind: str) -> jsonschema_rs.Validator:
    return jsonschema_rs.validator_for(_plain(schema_of(api_version, kind)))


def _plain(schema: Any) -> Any:
    """The schema without Kubernetes' extensions, and without formats that JSON Schema does not have."""
    if isinstance(schema, list):
        return [_plain(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _plain(value) for key, value in schema.items() if not key.startswith("x-kubernetes-")}


def _broken_rules(schema: Any, value: Any, place: str) -> Iterator[str]:
    """The CEL rules that a value breaks; rules about the change of a value (oldSelf) have nothing to compare with."""
    for rule in schema.get(RULES, ()):
        if "oldSelf" not in rule["rule"] and not _holds(rule["rule"], value):
            yield f"{place}: {rule['message']}"
    if isinstance(value, dict):
        for key, inner in schema.get("properties", {}).items():
            if key in value:
                yield from _broken_rules(inner, value[key], f"{place}/{key}")
    if isinstance(value, list):
        for number, each in enumerate(value):
            yield from _broken_rules(schema.get("items", {}), each, f"{place}/{number}")


def _holds(rule: str, value: Any) -> bool:
    environment = celpy.Environment()
    program = environment.program(environment.compile(rule))
    return bool(program.evaluate({"self": celpy.json_to_cel(value)}))
