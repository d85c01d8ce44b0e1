"""Bytes a rank at each ZeRO stage."""


def zero_bytes(params: int, ranks: int, stage: int) -> float:
    """Bytes of weights (2 a parameter), gradients (4) and optimizer (12) on a rank in bf16, stages 1, 2 and 3; without
    what stage 3 gathers for a moment.
    """
    raise NotImplementedError
