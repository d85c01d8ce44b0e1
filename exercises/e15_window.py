"""A training sample from a stream of tokens."""


def window(stream: list[int], index: int, seq_len: int, ignored: int = -100) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of window `index`, both seq_len long. labels[t] is the token after input_ids[t].

    The last window may be short: fill input_ids with 0 and labels with `ignored`.
    """
    raise NotImplementedError
