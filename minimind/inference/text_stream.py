"""Turn tokens into text as they come: complete characters only, and nothing of a stop string.

Works with any tokenizer, because it compares decoded texts instead of joining pieces.
"""

from collections.abc import Sequence

from minimind.data.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"


class TextStream:
    """The text of one continuation: the concatenation of what `push` and `finish` return.

    Args:
        prompt: token ids before the continuation (some tokenizers write a first token without its space).
        stop: texts that end the continuation; neither they nor anything after them is returned.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.is_stopped = False
        self._tokenizer = tokenizer
        self._stop = [string for string in stop if string]
        self._held = ""  # decoded, but may be the start of a stop string
        self._token_ids: list[int] = []  # tokens to decode next
        self._known = ""  # their text so far
        self._keep_last(prompt)

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is now certain."""
        self._token_ids.append(token_id)
        decoded = self._tokenizer.decode(self._token_ids)
        # A replacement character at the end is usually a character with bytes still missing.
        if decoded.endswith(REPLACEMENT) or self.is_stopped:
            return ""
        new = decoded[len(self._known) :]
        self._known = decoded
        self._keep_last(self._token_ids)
        return self._give_out(new)

    def finish(self) -> str:
        """End the text; returns what was held back, incomplete characters as U+FFFD."""
        if self.is_stopped:
            return ""
        shown = self._give_out(self._tokenizer.decode(self._token_ids)[len(self._known) :])
        if self.is_stopped:
            return shown
        rest, self._held = self._held, ""
        self.text += rest
        return shown + rest

    def _keep_last(self, token_ids: Sequence[int]) -> None:
        """Keep only the last token as context, if it decodes by itself."""
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
            keep = len(self._held) - max((overlap(self._held, string) for string in self._stop), default=0)
        shown = self._held[:keep]
        self._held = "" if self.is_stopped else self._held[keep:]
        self.text += shown
        return shown


def overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
