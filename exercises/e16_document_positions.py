"""Positions and borders of packed documents."""


def positions_and_borders(tokens: list[int], end: int) -> tuple[list[int], list[int]]:
    """(position_ids, cu_seqlens) of a window in which each document ends with the token `end`, as --document-mask has
    them: positions begin anew behind it; borders are the starts of all documents, and the length.
    """
    raise NotImplementedError
