"""Predict a model's size from its shape."""


def num_params(vocab: int, width: int, layers: int, heads: int, kv_heads: int, head_size: int, inner: int) -> int:
    """Trainable parameters of a dense model with QK norm, whose output matrix is the embedding.

    Count: the embedding; in each layer four attention matrices, three of the feed-forward, two norms of the width and
    two of the head; the last norm.
    """
    raise NotImplementedError
