"""Predict a model's size from its shape."""


def num_params(vocab: int, width: int, layers: int, heads: int, kv_heads: int, head_size: int, inner: int) -> int:
    """Trainable parameters of a dense model with QK norm, whose output matrix is the embedding.

    Count: the embedding; in each layer four attention matrices, three of the feed-forward, two norms of the width and
    two of the head; the last norm.
    """
    attention = 2 * width * heads * head_size + 2 * width * kv_heads * head_size
    layer = attention + 3 * width * inner + 2 * width + 2 * head_size
    return vocab * width + layers * layer + width
