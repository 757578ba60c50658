"""Writes what the code itself says into shardkit/README.md: `python -m tests.write_map`.

The rows of the import order come from `tests.test_imports`, and one line for each module from the
first sentence of its docstring.
"""

import ast
import re
from pathlib import Path

from tests.test_imports import LAYERS, PACKAGE

PAGE = PACKAGE / "README.md"
FIRST_SENTENCE = re.compile(r".+?[.?!](?=\s|$)|.+", re.DOTALL)


def render_import_order() -> str:
    """The rows, highest first; each imports from those below it only."""
    rows = [sorted(row) for row in reversed(LAYERS) if row != {"__main__"}]
    return "\n".join(["```text", *("   ".join(row) for row in rows), "```"])


def render_map() -> str:
    """Every package from the top row down, with its modules."""
    order = [name for row in reversed(LAYERS) for name in sorted(row)]
    packages = [PACKAGE / name for name in order if (PACKAGE / name).is_dir()]
    tables = [_render_modules("shardkit/", [p for p in PACKAGE.glob("*.py")])]
    for top in packages:
        for folder in sorted([top, *(path.parent for path in top.glob("*/__init__.py"))]):
            modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
            heading = f"{folder.relative_to(PACKAGE)}/"
            summary = read_summary(folder / "__init__.py")
            tables.append(_render_modules(heading, modules, summary))
    return "\n\n".join(tables)


def read_summary(path: Path) -> str:
    """The first sentence of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    sentence = FIRST_SENTENCE.match(text.partition("\n\n")[0])
    return " ".join(sentence[0].split()).replace("|", "\\|") if sentence else ""


def replace_block(page: str, name: str, text: str) -> str:
    """The page with `text` between the markers `<!-- NAME:begin -->` and `<!-- NAME:end -->`."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, _, rest = page.partition(begin)
    _, marker, after = rest.partition(end)
    if not marker:
        raise ValueError(f"{PAGE}: no markers {begin} and {end}")
    return f"{before}{begin}\n{text}\n{end}{after}"


def render_page(page: str) -> str:
    """The page as it should be."""
    page = replace_block(page, "order", render_import_order())
    return replace_block(page, "map", render_map())


def _render_modules(heading: str, modules: list[Path], summary: str = "") -> str:
    lines = [f"### {heading}", ""]
    lines += [summary, ""] if summary else []
    lines += ["| module | |", "|---|---|"]
    lines += [f"| `{path.name}` | {read_summary(path)} |" for path in sorted(modules)]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(render_page(PAGE.read_text()))
