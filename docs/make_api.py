"""Write docs/api.md from the docstrings of the library's face: ``python docs/make_api.py``."""

from __future__ import annotations

import inspect
from pathlib import Path

import opentrans_lab

HEAD = """# The public calls

Made from the docstrings by `python docs/make_api.py`. Each name is also on the face of its room
([the map](house.md)), where its neighbours are. Every error that a user can mend is a
`LabError` of one sentence: what is wrong, where, and what to do.
"""
METHODS = ("by_magnitude", "by_score", "random_layerwise", "apply", "keep", "layers", "save")


def call(name: str, found: object) -> str:
    """``name(a, b='x')``, without annotations."""
    signature = inspect.signature(found)
    plain = [p.replace(annotation=p.empty) for n, p in signature.parameters.items() if n != "self"]
    told = signature.replace(parameters=plain, return_annotation=signature.empty)
    return f"{name}{told}"


def entry(name: str, found: object) -> list[str]:
    first, _, rest = inspect.getdoc(found).partition("\n\n")
    lines = [f"`{call(name, found)}`  ", " ".join(first.split()), ""]
    if rest:
        summary = "<details><summary>arguments, shapes, units, errors</summary>"
        lines += [summary, "", "```text", rest.rstrip(), "```", "", "</details>", ""]
    return lines


def page() -> str:
    lines = [HEAD]
    for name in opentrans_lab.__all__:
        found = getattr(opentrans_lab, name)
        lines += [f"## {name}", "", *entry(name, found)]
        if inspect.isclass(found):
            there = [method for method in METHODS if hasattr(found, method)]
            lines += [part for m in there for part in entry(f"{name}.{m}", getattr(found, m))]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "api.md").write_text(page(), encoding="utf-8")
