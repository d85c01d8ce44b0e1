"""The pictures of the pages are those that the present code draws, and each is shown, with words beside it."""

import re
import sys

import matplotlib
import pytest
from docs_pages import LANGUAGES, ROOT

sys.path.insert(0, str(ROOT / "docs"))
sys.path.insert(0, str(ROOT / "docs" / "pictures"))

import draw
import refresh


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


@pytest.mark.parametrize("name", draw.PICTURES)
def test_pictures_are_those_of_the_present_code(name, tmp_path):
    for language in LANGUAGES:
        fresh = draw.draw(name, language, tmp_path).read_text(encoding="utf-8")
        kept = (draw.HERE / language / f"{name}.svg").read_text(encoding="utf-8")
        assert texts(fresh), "words are text, so that readers' fonts draw them"
        # Another matplotlib may place things otherwise; what is said stays.
        same_program = f"Matplotlib v{matplotlib.__version__}," in kept
        found, expected = (fresh, kept) if same_program else (texts(fresh), texts(kept))
        assert found == expected, f"{language}/{name}.svg is not what the code draws: run python docs/pictures/draw.py"
        assert bool(re.search("[一-鿿]", fresh)) == (language == "zh")


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_picture_is_shown_in_its_language_with_words(language):
    shown = {}
    for page in refresh.find_pages():
        if page.parent.name == language:
            shown |= {path: alt for alt, path in re.findall(r"!\[(.*?)\]\((\S+?\.svg)\)", page.read_text("utf-8"))}
    assert {f"../pictures/{language}/{name}.svg" for name in draw.PICTURES} <= set(shown)
    assert all(len(alt) > 5 for alt in shown.values())
