"""Writes into the documentation what is made from the source: code excerpts, tables of figures, configuration fields.

    python docs/refresh.py            bring every page up to date
    python docs/refresh.py --check    write nothing, exit with 1 and name the pages that are out of date

A page marks such places by comments: `<!-- excerpt: FILE::NAME | from: TEXT | to: TEXT -->` before a code block, and
`<!-- generated: NAME -->` ... `<!-- end -->` around a table. Knows nothing of prose; needs no torch.
"""

import ast
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from tables import TABLES  # noqa: E402 - the folder has to be on the path first
from worked import WORKED  # noqa: E402

_EXCERPT = re.compile(r"(<!-- excerpt: (?P<what>.+?) -->\n)(?:```python\n(?:.*?\n)??```\n)?", re.DOTALL)
_GENERATED = re.compile(r"(<!-- generated: (?P<name>\S+) -->\n)(?:.*?)(<!-- end -->)", re.DOTALL)


def find_pages() -> list[Path]:
    """Every page of the documentation, and the README."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*/*.md"))]


def read_definition(file: str, name: str) -> str:
    """The source of a function, class, method or module-level value of `file`, unindented.

    Args:
        name: dotted, such as `Attention.forward`.
    """
    source = (ROOT / file).read_text(encoding="utf-8")
    body: list[ast.stmt] = ast.parse(source).body
    node: ast.stmt | None = None
    for part in name.split("."):
        node = next((item for item in body if part in _names(item)), None)
        if node is None:
            raise SystemExit(f"docs: {file} has no {name}")
        body = getattr(node, "body", [])
    assert node is not None
    first = min([node.lineno, *(item.lineno for item in getattr(node, "decorator_list", []))])
    return textwrap.dedent("\n".join(source.splitlines()[first - 1 : node.end_lineno]))


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return [getattr(node, "name", "")]


def read_excerpt(what: str) -> str:
    """The lines that an excerpt's mark names: a whole definition, or its lines `from` one `to` another."""
    place, *limits = (part.strip() for part in what.split(" | "))
    file, name = place.split("::")
    lines = read_definition(file, name).splitlines()
    bounds = dict(limit.split(": ", 1) for limit in limits)
    if "from" not in bounds:
        return "\n".join(lines)
    begin = _find_line(lines, bounds["from"], 0, what)
    end = _find_line(lines, bounds["to"], begin, what) if "to" in bounds else begin
    return textwrap.dedent("\n".join(lines[begin : end + 1]))


def _find_line(lines: list[str], text: str, start: int, what: str) -> int:
    for number in range(start, len(lines)):
        if lines[number].strip().startswith(text):
            return number
    raise SystemExit(f"docs: no line begins with {text!r} in {what}")


def refresh(text: str, language: str) -> str:
    """The page with its excerpts and tables as they should be. `language`: "en" or "zh"."""
    text = _EXCERPT.sub(lambda found: f"{found[1]}```python\n{read_excerpt(found['what'])}\n```\n", text)
    makers = {**TABLES, **WORKED, "contents": lambda language: list_sections(text)}
    return _GENERATED.sub(lambda found: f"{found[1]}{makers[found['name']](language)}\n{found[3]}", text)


def list_sections(text: str) -> str:
    """A page's contents: a line for each section, and behind it the parts of the section."""
    lines: list[str] = []
    for anchor, level, title in re.findall(r'^<a id="([^"]+)"></a>\n\n(##+) (.+)$', text, re.M):
        if level == "##":
            lines.append(f"- [{title}](#{anchor})")
        else:
            lines.append(f"  - [{title}](#{anchor})")
    return "\n".join(lines)


def main() -> int:
    stale = []
    for page in find_pages():
        text = page.read_text(encoding="utf-8")
        fresh = refresh(text, "zh" if page.parent.name == "zh" else "en")
        if fresh != text:
            stale.append(str(page.relative_to(ROOT)))
            if "--check" not in sys.argv:
                page.write_text(fresh, encoding="utf-8")
    print("\n".join(stale) if stale else "every page is up to date")
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
