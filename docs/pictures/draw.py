"""Draws the pictures of the pages that come from the code itself: python docs/pictures/draw.py [NAME ...]

Each into docs/pictures/en/NAME.svg and docs/pictures/zh/NAME.svg. Those of real trainings are make.py's.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import model_pictures  # noqa: E402 - the folders have to be on the path first
import training_pictures  # noqa: E402
from paper import SETTINGS, Words, plt, svg  # noqa: E402

PICTURES = {**model_pictures.PICTURES, **training_pictures.PICTURES}
LANGUAGES = ("en", "zh")


def draw(name: str, language: str, folder: Path = HERE) -> Path:
    """Draw one picture into folder/LANGUAGE/NAME.svg; returns that path."""
    path = folder / language / f"{name}.svg"
    with plt.rc_context(SETTINGS):
        svg(PICTURES[name](Words(language)), path)
    return path


if __name__ == "__main__":
    for name in sys.argv[1:] or PICTURES:
        for language in LANGUAGES:
            draw(name, language)
