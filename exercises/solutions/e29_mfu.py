"""How busy a device is."""


def mfu(tokens_per_second: float, active_params: int, layers: int, width: int, seq_len: int, peak: float) -> float:
    """The share of `peak` (FLOP a second) that training uses: 6 FLOP a token and weight of a matrix; and for attention,
    in each layer, 6 * width * (seq_len + 1), as a token sees half of the sequence.
    """
    flops = 6 * active_params + layers * 6 * width * (seq_len + 1)
    return tokens_per_second * flops / peak
