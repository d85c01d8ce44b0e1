"""One step of AdamW."""

from torch import Tensor


def adamw_step(weight: Tensor, gradient: Tensor, m: Tensor, v: Tensor, t: int, lr: float, decay: float) -> None:
    """Change weight, m and v in place, for the t-th step (the first is 1). Betas are 0.9 and 0.95, eps is 1e-8."""
    m += 0.1 * (gradient - m)
    v += 0.05 * (gradient.square() - v)
    m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.95**t)
    weight -= lr * (m_hat / (v_hat.sqrt() + 1e-8) + decay * weight)
