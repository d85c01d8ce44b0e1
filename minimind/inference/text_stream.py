"""Tokens into text that can be shown at once: whole characters only, and nothing of a stop string.

Knows nothing of models; works with any tokenizer, because it compares decoded texts instead of joining pieces.
"""

from collections.abc import Sequence

from minimind.data.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"


class TextStream:
    """The text of one continuation. What `push` and `finish` give out, joined, is `text`.

    Args:
        prompt: token ids before the continuation (some tokenizers write a first token without its space).
        stop: texts that end the continuation; neither they nor what follows is given out.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.is_stopped = False
        self._tokenizer = tokenizer
        self._stop = [string for string in stop if string]
        self._held = ""  # decoded, but it may be the beginning of a stop string
        self._token_ids: list[int] = []  # the tokens that the next decoding looks at
        self._known = ""  # their text that has been taken over already
        self._keep_last(prompt)

    def push(self, token_id: int) -> str:
        """Take one more token; returns the text that can be shown now."""
        self._token_ids.append(token_id)
        decoded = self._tokenizer.decode(self._token_ids)
        # A replacement character at the end is most often a character whose bytes have not all come yet.
        if decoded.endswith(REPLACEMENT) or self.is_stopped:
            return ""
        new = decoded[len(self._known) :]
        self._known = decoded
        self._keep_last(self._token_ids)
        return self._give_out(new)

    def finish(self) -> str:
        """No more tokens come; returns what was held back, incomplete characters as U+FFFD."""
        if self.is_stopped:
            return ""
        shown = self._give_out(self._tokenizer.decode(self._token_ids)[len(self._known) :])
        if self.is_stopped:
            return shown
        rest, self._held = self._held, ""
        self.text += rest
        return shown + rest

    def _keep_last(self, token_ids: Sequence[int]) -> None:
        """Look back to one token only, if it has a text of its own."""
        last = list(token_ids[-1:])
        decoded = self._tokenizer.decode(last)
        if REPLACEMENT not in decoded:
            self._token_ids, self._known = last, decoded

    def _give_out(self, new: str) -> str:
        self._held += new
        found = [(place, string) for string in self._stop if (place := self._held.find(string)) >= 0]
        if found:
            self.is_stopped = True
            keep = min(found)[0]
        else:
            keep = len(self._held) - max((_overlap(self._held, string) for string in self._stop), default=0)
        shown = self._held[:keep]
        self._held = "" if self.is_stopped else self._held[keep:]
        self.text += shown
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` may begin."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
