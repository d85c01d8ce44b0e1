"""The documentation inside Python source text, by parsing alone: nothing is imported or run.

Docstrings with the name and signature they belong to, documentation passed to calls (`add_newdoc` and its like), and
comments of several lines. Knows nothing of files.
"""

import ast
import inspect
import re
import warnings
from collections.abc import Iterator

_SMALLEST_COMMENT = 200
_COMMENT = re.compile(r"(?:^[ \t]*#[^\n]*\n){3,}", re.MULTILINE)
_COMMENT_MARK = re.compile(r"^[ \t]*#+:?[ \t]?", re.MULTILINE)
_LICENCE = re.compile(r"copyright|licen[cs]ed? |warrant|all rights reserved|permission is", re.IGNORECASE)

_Documented = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def find_docstrings(source: str, module: str) -> list[str]:
    """Pieces of text in the order of the source; none if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    paragraphs = (ast.get_docstring(tree) or "").split("\n\n")
    introduction = "\n\n".join(paragraph for paragraph in paragraphs if not _LICENCE.search(paragraph))
    pieces = [(0, _entry(f"module {module}", introduction))]
    pieces += _walk(tree, "")
    pieces += _find_comments(source)
    return [text for _, text in sorted(pieces, key=lambda piece: piece[0]) if text]


def _walk(node: ast.AST, prefix: str) -> Iterator[tuple[int, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Documented):
            name = f"{prefix}{child.name}"
            yield child.lineno, _entry(_sign(child, name), ast.get_docstring(child) or "")
            yield from _walk(child, f"{name}.")
        elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
            yield from _find_documenting_call(child.value)
        elif isinstance(child, (ast.If, ast.Try, ast.With)):
            yield from _walk(child, prefix)


def _sign(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {name}({bases})" if bases else f"class {name}"
    return f"{name}({ast.unparse(node.args)})"


def _find_documenting_call(call: ast.Call) -> Iterator[tuple[int, str]]:
    """`add_newdoc("module", "name", "text")`, `add_docstr(object, "text")` and the like."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if "doc" not in name.lower():
        return
    strings = [a.value for a in ast.walk(call) if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    text = max(strings, key=len, default="")
    title = ".".join(s for s in strings if s.isidentifier()) or (ast.unparse(call.args[0]) if call.args else "")
    yield call.lineno, _entry(title, inspect.cleandoc(text) if "\n" in text else "")


def _entry(title: str, text: str) -> str:
    text = text.strip()
    return f"{title}\n\n{text}" if text else ""


def _find_comments(source: str) -> Iterator[tuple[int, str]]:
    for match in _COMMENT.finditer(source):
        text = _COMMENT_MARK.sub("", match[0]).strip()
        if len(text) >= _SMALLEST_COMMENT and not _LICENCE.search(text):
            yield source.count("\n", 0, match.start()) + 1, text
