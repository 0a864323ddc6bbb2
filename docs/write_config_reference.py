"""Print docs/reference/config.md from the configuration's own models (`make docs` writes it, a test compares it)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from medsynth.config import Study

HEAD = """# Configuration

*Written by `make docs` from `medsynth/config.py`; do not edit.*

A study is one YAML file. Unknown keys are refused with their path. `medsynth config show CONFIG` prints a study with all defaults
filled in, and `--set privacy.epsilon=3` replaces one value of the file.

Values that touch privacy (`privacy`, clip norms, rates, steps) are public constants: write them down before the cohort is read, and never
derive them from it."""


def section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def type_of(field: FieldInfo) -> str:
    kind = field.annotation
    text = kind.__name__ if isinstance(kind, type) and not getattr(kind, "__args__", None) else str(kind)
    text = re.sub(r"Annotated\[(\w+),.*?\)\]+", r"\1", text)
    text = re.sub(r"\b(typing|builtins|annotated_types)\.", "", text)
    return text.replace("|", "or").replace("Literal[", "one of [").replace("Ellipsis", "...")


def default_of(field: FieldInfo) -> str:
    return "required" if field.default is PydanticUndefined else f"`{field.default!r}`"


def rows(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        nested = section(field)
        if nested is None:
            text = (field.description or "").replace("|", "\\|")
            yield f"| `{prefix}{name}` | {type_of(field)} | {default_of(field)} | {text} |"
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
