"""What an error says to a person: one line for each fault, with the value, the rule and the way out."""

import tempfile
import traceback
from typing import TYPE_CHECKING, Any

from vila_ops.errors import VilaError, did_you_mean

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

    from vila_ops.config import Config

MOST_PLACES = 2
"""Places of a misplaced setting that an error names; a name that is in more places is no hint."""


def message_of(error: Exception) -> str:
    """What an error says; for a config, a line for each setting that is wrong, without pydantic's own words.

    Passwords in URLs are left out.
    """
    from vila_ops.tracking.outbox import shown

    return shown(_text_of(error))


def _text_of(error: Exception) -> str:
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        root = _class_named(error.title)
        return "\n".join(_line(fault, error, root) for fault in error.errors(include_url=False))
    if isinstance(error, OSError) and not isinstance(error, VilaError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _line(fault: "ErrorDetails", error: "ValidationError", root: "type[Config] | None") -> str:
    """The place of one wrong setting, and what is wrong with it."""
    if root is None:
        return f"{'.'.join(map(str, fault['loc'])) or error.title}: {_reason(fault, [], '')}"
    from vila_ops.config.schema import locate

    keys, known = locate(root, fault["loc"])
    place = ".".join(keys).removeprefix("recipe.")
    return f"{place or error.title}: {_reason(fault, known, _elsewhere(root, keys))}"


def _reason(fault: "ErrorDetails", known: list[str], elsewhere: str) -> str:
    """What is wrong with one setting, and its value."""
    given, told = fault["input"], fault.get("ctx", {})
    match fault["type"]:
        case "value_error":
            return fault["msg"].removeprefix("Value error, ")
        case "extra_forbidden":
            hint = did_you_mean(str(fault["loc"][-1]), known) or elsewhere
            return f"there is no such setting; docs/settings.md lists them{hint}"
        case "missing":
            return "this setting is required; docs/settings.md says what it may be"
        case "model_attributes_type" | "model_type" | "dict_type":
            return f"a mapping is wanted here, such as {{kind: ...}}, not {given!r}; see docs/settings.md"
        case "union_tag_not_found":
            return "a mapping with a `kind` is wanted here; docs/settings.md lists the kinds"
        case "union_tag_invalid":
            kinds = told["expected_tags"]
            return f"there is no kind {told['tag']!r}; it may be {kinds}{did_you_mean(told['tag'], _quoted(kinds))}"
        case "literal_error":
            hint = did_you_mean(given, _quoted(told["expected"])) if isinstance(given, str) else ""
            return f"it is {given!r}, but may be {told['expected']}{hint}"
        case _ if isinstance(given, str | int | float | None):
            return f"{fault['msg']}; it is {given!r}"
        case _:
            return fault["msg"]


def _quoted(words: str) -> list[str]:
    """The words between single quotes in a text of pydantic's."""
    return words.split("'")[1::2]


def _elsewhere(root: "type[Config]", keys: list[str]) -> str:
    """The places where a setting of this name is, if they are few."""
    from vila_ops.config.schema import places_of

    places = dict.fromkeys(place.removeprefix("recipe.") for place in places_of(root, keys[-1])) if keys else {}
    return f"; did you mean {' or '.join(places)}?" if 0 < len(places) <= MOST_PLACES else ""


def _class_named(name: str) -> "type[Config] | None":
    """The config class of a name; None for another class of pydantic's."""
    from vila_ops.config import Config

    below: list[Any] = [Config]
    while below:
        one = below.pop()
        if one.__name__ == name:
            return one  # type: ignore[no-any-return]
        below += one.__subclasses__()
    return None


def unexpected(error: Exception) -> str:
    """What is said of an error that no command expects; its traceback is written to a file for the report."""
    descriptor, path = tempfile.mkstemp(prefix="vila-ops-error-", suffix=".txt")
    with open(descriptor, "w", encoding="utf-8") as file:
        file.writelines(traceback.format_exception(error))
    return f"{type(error).__name__}: {error}. This is a fault of vila-ops; {path} says where it happened"
