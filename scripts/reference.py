"""The key-by-key part of docs/experiment-files.md, from the models that check the files.

Usage: python scripts/reference.py    (tests/test_docs.py fails when it has to be run again)
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedsim import registry
from fedsim.config import Experiment

PAGE = Path(__file__).parent.parent / "docs" / "experiment-files.md"
MARK = "<!-- From here on written by scripts/reference.py. -->\n"
INHERITED = {"strategies", "clients"}
"""Kinds whose parameters the README and the classes explain."""


def allowed(schema: dict[str, Any]) -> str:
    """What a value may be, in words: `whole number >= 1`."""
    if "anyOf" in schema:
        options = [allowed(s) for s in schema["anyOf"] if s.get("type") != "null"]
        return " or ".join(dict.fromkeys(options))
    if "$ref" in schema:
        return "name or table"
    if "enum" in schema:
        return ", ".join(f"`{v}`" for v in schema["enum"])
    if schema.get("type") == "array":
        return f"list: {allowed(schema['items'])}" if schema.get("items") else "list"
    words = {"integer": "whole number", "number": "number", "string": "text", "object": "table"}
    words["boolean"] = "`true`, `false`"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [
        f"{sign} {schema[name]:g}"
        for name, sign in signs.items()
        # Ceilings that only keep out the absurd would hide the ones that mean something.
        if name in schema and schema[name] < 1000
    ]
    return " ".join([words.get(schema.get("type", ""), "any"), ", ".join(bounds)]).strip()


def default(schema: dict[str, Any], required: bool) -> str:
    """The default as it would stand in the file."""
    value = schema.get("default")
    if required:
        return "*required*"
    if isinstance(value, dict):
        value = value.get("name")
    return "" if value in (None, "", {}) else f"`{json.dumps(value)}`"


def sections() -> Iterator[str]:
    """One table for each section."""
    whole = Experiment.model_json_schema()
    for name, entry in whole["properties"].items():
        entries = [entry, entry.get("items", {}), *entry.get("anyOf", [])]
        reference = next(e["$ref"] for e in entries if "$ref" in e)
        section = whole["$defs"][reference.rpartition("/")[2]]
        if section["title"] == "Named":
            yield f"### `[{name}]`\n\n{entry['description']} Other keys are its parameters.\n"
            continue
        title = f"[[{name}]]" if entry.get("type") == "array" else f"[{name}]"
        about = section["description"].partition(": ")[2]
        yield f"### `{title}`\n\n{about[:1].upper()}{about[1:]}\n"
        yield "| key | allowed | default | meaning |\n|---|---|---|---|"
        required = section.get("required", [])
        for key, value in section["properties"].items():
            cells = [f"`{key}`", allowed(value), default(value, key in required)]
            yield "| " + " | ".join([*cells, value.get("description", "")]) + " |"
        yield ""


def parameters(kind: str, name: str) -> str:
    """The parameters an experiment may give, with their defaults."""
    given = registry.GIVEN.get(kind, frozenset())
    out = []
    for p in inspect.signature(registry.resolve(kind, name)).parameters.values():
        if p.name in given or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        out.append(f"`{p.name}`" if p.default is p.empty else f"`{p.name} = {p.default!r}`")
    return ", ".join(out)


def components() -> Iterator[str]:
    """One table for each kind of component."""
    for kind in registry.SINGULAR:
        if kind in INHERITED:
            continue
        yield f"### {kind.capitalize()}\n\n| name | parameters | meaning |\n|---|---|---|"
        for name in registry.builtin(kind):
            meaning = registry.describe(kind, name).replace("|", "\\|")
            yield f"| `{name}` | {parameters(kind, name)} | {meaning} |"
        yield ""


def page() -> str:
    """The whole page: what was written by hand, then what is generated."""
    head = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    parts = ["## Sections and keys\n", *sections(), "## Components\n", *components()]
    return head + MARK + "\n" + "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
