"""A command line that has to pass through shells on other hosts, as one word that no shell changes.

Knows nothing of what the words mean.
"""

import base64
import binascii
import json
from collections.abc import Sequence

from minimind.errors import UserError

FLAG = "--words="


def pack_words(words: Sequence[str]) -> str:
    """The words as one flag of letters, digits, `-`, `_` and `=`."""
    return FLAG + base64.urlsafe_b64encode(json.dumps(list(words)).encode()).decode()


def unpack_words(args: Sequence[str]) -> list[str]:
    """`args` with every packed flag replaced by the words in it.

    Raises:
        UserError: a packed flag was damaged.
    """
    words: list[str] = []
    for arg in args:
        if not arg.startswith(FLAG):
            words.append(arg)
            continue
        try:
            words += json.loads(base64.urlsafe_b64decode(arg.removeprefix(FLAG)))
        except (ValueError, binascii.Error):
            raise UserError(f"{arg[:40]}: damaged on its way through a shell; start with launch/deepspeed") from None
    return words
