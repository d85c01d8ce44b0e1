"""fp16's loss scale, as torch moves it."""


def move_scale(scale: float, good_steps: int, overflow: bool, window: int = 2000) -> tuple[float, int]:
    """(the next scale, the good steps in a row so far): halve at an overflow, double after `window` good steps."""
    if overflow:
        return scale / 2, 0
    if good_steps + 1 == window:
        return scale * 2, 0
    return scale, good_steps + 1
