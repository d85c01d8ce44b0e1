"""Where a text may be cut so that SentencePiece gives the parts the ids that they have in the whole."""

import itertools
import re
from collections import defaultdict
from collections.abc import Sequence

# Runs without a word's end are cut here: SentencePiece needs far more memory than text, and time beyond its length.
_PART_CHARACTERS = 1 << 14
_CLOSING = "\n\uff0c\u3002\uff01\uff1f\uff1b\uff1a\u3001"


def words_pattern(pieces: Sequence[str]) -> re.Pattern[str]:
    """Parts that SentencePiece encodes by themselves to the same ids as inside the whole text.

    It merges characters that stand side by side only if one of `pieces` has them so. No piece goes on across the start
    of a run of spaces, so a part is a run and a word. A word is cut behind a mark of `_CLOSING` where no piece has what
    follows, and, unless `pieces` mix them, between an ASCII letter and another ASCII character. What has no such place
    is cut where it is too long for memory.
    """
    longest = f"{{1,{_PART_CHARACTERS}}}"
    other, beyond = r"\x00-\x1f!-@\[-`{-\x7f", r"\x80-\U0010ffff"
    mixed = re.compile(f"[A-Za-z][{other}]|[{other}][A-Za-z]")
    ascii_runs = rf"[A-Za-z]{longest}(?![A-Za-z{beyond}])|[{other}]{longest}(?![{other}{beyond}])|"
    followers: defaultdict[str, set[str]] = defaultdict(set)
    for mark, after in itertools.chain.from_iterable(map(itertools.pairwise, pieces)):
        followers[mark].add(after)
    joined = [f"{c}(?=[{''.join(map(re.escape, sorted(followers[c])))}])" for c in _CLOSING if followers[c]]
    inside = "|".join([f"[^ {_CLOSING}]", *joined])
    word = f"{'' if any(map(mixed.search, pieces)) else ascii_runs}(?:{inside}){longest}[{_CLOSING}]?|[{_CLOSING}]"
    return re.compile(rf" {{0,{_PART_CHARACTERS}}}(?:{word})| {longest}")
