"""Print docs/reference/config.md from the configuration's own models (`make docs` writes it, a test compares it)."""

from __future__ import annotations

from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from medsynth.config import Study

HEAD = """# Configuration

*Written by `make docs` from `medsynth/sections.py`; do not edit.*

A study is one YAML file. Unknown keys are refused with their path. `medsynth config show CONFIG` prints a study with
all defaults filled in, and `--set privacy.epsilon=3` replaces one value of the file.

Values that touch privacy (`privacy`, clip norms, rates, steps) are public constants: write them down before the cohort
is read, and never derive them from it."""


def section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def name_of(kind: Any) -> str:
    """Return a type in words, without the checks that hang on it."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return name_of(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(name_of(argument) for argument in arguments)
    if origin is tuple and arguments[-1] is ...:
        return f"list of {name_of(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(name_of(argument) for argument in arguments)}]"
    if origin is dict:
        return f"{name_of(arguments[0])} to {name_of(arguments[1])}"
    return {NoneType: "null", float: "number", int: "integer", str: "text", bool: "true or false"}.get(kind, str(kind))


def default_of(field: FieldInfo) -> str:
    return "required" if field.default is PydanticUndefined else f"`{field.default!r}`"


def rows(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        nested = section(field)
        if nested is None:
            text = (field.description or "").replace("|", "\\|")
            yield f"| `{prefix}{name}` | {name_of(field.annotation)} | {default_of(field)} | {text} |"
        elif prefix:  # a section inside a section stays in its table
            yield from rows(nested, f"{prefix}{name}.")


def table(title: str, words: str, lines: list[str]) -> str:
    head = "| setting | type | default | meaning |\n|---|---|---|---|"
    return "\n".join([f"\n## {title}\n", words, "", head, *lines])


def page() -> str:
    parts = [HEAD, table("study", (Study.__doc__ or "").strip(), list(rows(Study, "")))]
    for name, field in Study.model_fields.items():
        nested = section(field)
        if nested is not None:
            words = "\n".join(line.strip() for line in (nested.__doc__ or "").strip().splitlines())
            parts.append(table(name, words, list(rows(nested, f"{name}."))))
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    print(page(), end="")
