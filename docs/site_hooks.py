"""What MkDocs needs to read these pages, which are written for GitHub: called while the site is built (mkdocs.yml).

Knows nothing of what the pages say.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
KATEX = ROOT / "minimind" / "inference" / "chat_page" / "vendor"
LANGUAGES = {"zh": "中文", "en": "English"}
FORMULAS = r"""document$.subscribe(() => {
  for (const place of document.querySelectorAll(".arithmatex")) {
    const found = /^\\[([]([^]*)\\[)\]]$/.exec(place.textContent.trim());
    if (found) katex.render(found[1], place, {displayMode: place.tagName === "DIV", throwOnError: false});
  }
});
"""
STYLE = """:root { --md-text-font: -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif; }
:root { --md-code-font: Menlo, Consolas, 'DejaVu Sans Mono', monospace; }
.md-typeset img[src$=".svg"] { background: white; padding: 0.4rem; }
.md-typeset .arithmatex { overflow-x: auto; overflow-y: hidden; }
"""


def on_config(config: Any) -> Any:
    """Every page of a language, in the order of its index."""
    config["nav"] = [{name: [f"{folder}/{page}" for page in list_pages(folder)]} for folder, name in LANGUAGES.items()]
    return config


def list_pages(language: str) -> list[str]:
    """The index, and the pages that its table names."""
    text = (ROOT / "docs" / language / "README.md").read_text(encoding="utf-8")
    return ["README.md", *dict.fromkeys(re.findall(r"^\| \[(\w+\.md)\]", text, re.M))]


def on_files(files: Files, config: Any) -> Files:
    """KaTeX, as the chat page has it, and two small files."""
    for path in [KATEX / "katex.js", KATEX / "katex.css", *(KATEX / "fonts").iterdir()]:
        files.append(File.generated(config, f"katex/{path.relative_to(KATEX).as_posix()}", abs_src_path=str(path)))
    files.append(File.generated(config, "formulas.js", content=FORMULAS))
    files.append(File.generated(config, "site.css", content=STYLE))
    files.append(File.generated(config, "index.md", content="- [中文](zh/README.md)\n- [English](en/README.md)\n"))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """GitHub's Markdown as Python-Markdown reads it, outside of code."""
    pieces = re.split(r"(^```.*?^```$)", markdown, flags=re.M | re.S)
    return "".join(piece if piece.startswith("```") else convert(piece) for piece in pieces)


def convert(text: str) -> str:
    """Blank lines before lists, four blanks for inner ones, none where a Chinese sentence goes on in the next line, and
    no links to files outside the site."""
    text = re.sub(r"(?<=[一-鿿，。；：、）」])\n *(?=[一-鿿（「*])(?![*] )", "", text)
    text = re.sub(r"^<!--.*?-->$", "", text, flags=re.M)
    text = re.sub(r"^(?![-*] |\d+\. | |$)(.+)\n(?=[-*] |\d+\. )", r"\1\n\n", text, flags=re.M)
    text = re.sub(r"^  (?=[-*] )", "    ", text, flags=re.M)
    return re.sub(r"\[([^\]]+)\]\(\.\./\.\./[^)]*\)", r"\1", text)
