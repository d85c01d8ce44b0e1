"""fp16's loss scale, as torch moves it."""


def move_scale(scale: float, good_steps: int, overflow: bool, window: int = 2000) -> tuple[float, int]:
    """(the next scale, the good steps in a row so far): halve at an overflow, double after `window` good steps."""
    raise NotImplementedError
