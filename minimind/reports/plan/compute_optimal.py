"""Which size of model, on how many tokens, learns most from a fixed amount of compute (arXiv 2203.15556)."""

import math
import re

from minimind.config.run_config import RunConfig
from minimind.errors import UserError
from minimind.model.presets import PRESETS
from minimind.reports.plan.planned_run import PlanOptions
from minimind.reports.plan.scaling_law import read_law
from minimind.reports.plan.table import planned_speed
from minimind.units import format_table

TOKENS_PER_PARAMETER = 20.0
"""Where parameters and tokens are in balance, after the runs of arXiv 2203.15556. Text and tokenizer move it."""


def show_compute_optimal(run: RunConfig, options: PlanOptions) -> str:
    """The best size for the budget, and what the budget means for every preset, as text.

    With 6 operations for a parameter and a token, C = 6 N D and D = 20 N give N = sqrt(C / 120); a law of one's own
    gives another N. The table counts
    operations exactly, at the run's `seq_len`; a model with experts counts the parameters that a token uses.

    Raises:
        UserError: the budget is no number of operations or hours, or hours of a GPU that is not known, or no law.
    """
    assert options.compute_optimal is not None
    budget = _operations(options)
    law = None if options.law is None else read_law(options.law)
    size = math.sqrt(budget / (6 * TOKENS_PER_PARAMETER)) if law is None else law.best_size(budget)
    ratio = budget / 6 / size**2
    seq_len = run.data.seq_len
    rows = [["preset", "parameters", "tokens", "tokens a parameter"]]
    distance: dict[str, float] = {}
    for name, model in PRESETS.items():
        params = model.num_active_params()
        tokens = budget / model.flops_per_token(seq_len)
        distance[name] = abs(math.log(tokens / params / ratio))
        rows.append([name, f"{params:,}", f"{tokens:,.0f}", f"{tokens / params:,.1f}"])
    nearest = min(distance, key=distance.__getitem__)
    for row in rows:
        row[0] += "*" if row[0] == nearest else ""
    return "\n".join(
        (
            f"budget    {budget:.3g} operations",
            f"best      {size:,.0f} parameters and {ratio * size:,.0f} tokens"
            + ("" if law is None else f": {law(size, ratio * size):.3f} bits a byte by {options.law}"),
            *([] if law is None or budget < 10 * law.largest else [_guess(budget / law.largest)]),
            "",
            format_table(rows, "<>"),
            "",
            f"* the nearest to {ratio:.3g} tokens a parameter; a model that will be used much is better "
            "smaller, and trained longer",
        )
    )


def _guess(beyond: float) -> str:
    return f"beyond    {beyond:,.0f} times the largest run that the law was fitted on: a guess; fit it on larger ones"


def _operations(options: PlanOptions) -> float:
    text = str(options.compute_optimal)
    hours = re.fullmatch(r"([\d.]+)h", text)
    try:
        figure = float(hours[1] if hours else text)
    except ValueError:
        figure = 0.0
    if not 0 < figure < math.inf:
        raise UserError(
            f"compute_optimal: '{text}' is no budget; write operations, such as 1e19, or hours, such as 24h"
        )
    if not hours:
        return figure
    speed = planned_speed(options, half=options.device == "gpu")
    if speed is None:
        raise UserError("compute_optimal: hours of what? give --gpu NAME, or operations, such as 1e19")
    return figure * 3600 * speed[0]
