"""The documentation as data: pages, anchors, links, code blocks and citations, for the tests of docs/ and README.md.

Knows Markdown as far as these pages use it; nothing of the project's code.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from repository import ROOT

LANGUAGES = ("en", "zh")
ARCHITECTURE, GUIDE = "minimind_architecture.md", "training_guide.md"
PAGES = (
    "README.md",
    ARCHITECTURE,
    GUIDE,
    "fine_tuning.md",
    "parallelism.md",
    "preferences.md",
    "distillation.md",
    "rewards.md",
    "long_context.md",
    "configuration.md",
    "data_sources.md",
    "data_format.md",
    "python.md",
    "run_folder.md",
    "watching.md",
    "ds_configs.md",
    "devices.md",
    "gpu.md",
    "exercises.md",
    "glossary.md",
    "cheat_sheet.md",
)
STEP_IDS = ("why", "history", "idea", "code", "points")
STEPS = {
    "en": ("Why it is needed", "How it developed", "The idea", "In this code", "Points to watch"),
    "zh": ("为什么需要", "怎么发展来的", "核心思想", "代码实现", "注意事项"),
}

_FENCE = re.compile(r"(?:<!-- needs: (?P<needs>[^>]+?) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
_SECTION = re.compile(r'^<a id="([^"]+)"></a>\n\n(#+) (.+)$', re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block; `needs` is what its mark says it needs, or None."""

    kind: str
    text: str
    needs: str | None


def page_path(language: str, name: str) -> Path:
    return ROOT / "docs" / language / name


def read_page(language: str, name: str) -> str:
    return page_path(language, name).read_text(encoding="utf-8")


def flow(text: str) -> str:
    """The text with line breaks as spaces, so that a phrase is found wherever it is broken."""
    return " ".join(text.split())


def find_blocks(text: str) -> list[Block]:
    return [Block(found["kind"], found["text"], found["needs"]) for found in _FENCE.finditer(text)]


def without_blocks(text: str) -> str:
    return _FENCE.sub("", text)


def find_sections(text: str) -> dict[str, str]:
    """Anchor -> the text from its heading up to the next section, in order."""
    marks = list(_SECTION.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return {mark[1]: text[mark.start(2) : end] for mark, end in zip(marks, ends, strict=True)}


def find_levels(text: str) -> list[tuple[str, int]]:
    """(anchor, heading level) of each section, in order."""
    return [(mark[1], len(mark[2])) for mark in _SECTION.finditer(text)]


def find_anchors(text: str) -> set[str]:
    """Everything a link's #part may name: explicit ids, and the slugs that GitHub gives to headings."""
    headings = re.findall(r"^#+ (?:<a .+?></a>)?(.+)$", without_blocks(text), re.M)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)">', text))


def find_links(text: str) -> list[str]:
    """Targets of links and pictures outside of code."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", without_blocks(text)))


def find_citations(text: str) -> list[tuple[str, str]]:
    """(title, number) of each paper named as *Title* (arXiv number), with either language's brackets."""
    found = re.findall(r"\*([^*]+)\*\s*[(（]\s*arXiv (\d{4}\.\d{4,5})", text)
    return [(flow(title), number) for title, number in found]
