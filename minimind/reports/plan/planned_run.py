"""The figures of a plan: the run resolved for the planned ranks, its memory in every ZeRO stage, its length."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from minimind.accelerator import default_device, device_module
from minimind.config.deepspeed_keys import with_stage
from minimind.config.resolve import resolve_run
from minimind.config.resolved_run import ResolvedRun
from minimind.config.run_config import RunConfig
from minimind.errors import UserError
from minimind.reports.plan.memory import MemoryEstimate, estimate_memory, largest_micro_batch
from minimind.schema import ABOVE_0, AT_LEAST_1, Limits, check_fields, nearest
from minimind.training.peak_flops import data_sheet_peak, known_accelerators
from minimind.units import parse_size

USABLE = 0.92
"""Share of a GPU's memory that tensors may take: the rest is CUDA's context, NCCL and fragmentation."""
ASSUMED_GPU_MEMORY = 80 * 2**30

VARIANTS: tuple[tuple[int, tuple[str, ...]], ...] = (
    (0, ()), (1, ()), (2, ()), (3, ()), (2, ("optimizer",)), (3, ("optimizer",)), (3, ("optimizer", "param"))
)  # fmt: skip
"""Stage and what is offloaded, of the columns that every plan has."""


@dataclass(frozen=True)
class PlanOptions:
    """What is planned beside the run itself."""

    num_gpus: Annotated[int, AT_LEAST_1] = 1
    """GPUs (or CPU ranks) of each node."""
    num_nodes: Annotated[int, AT_LEAST_1] = 1
    """Nodes."""
    device: Annotated[Literal["gpu", "cpu"], tyro.conf.Fixed, tyro.conf.arg(name="planned-device")] = "gpu"
    """What the ranks compute on."""
    gpu_memory: str | None = None
    """Memory of one GPU, such as 80GiB; the present GPU's, or 80GiB where there is none."""
    gpu: str | None = None
    """Name of the GPU, such as H100, for its peak; the present one's."""
    tokens: Annotated[float | None, ABOVE_0] = None
    """Tokens to train on, such as 10e9; without it, --steps."""
    tokens_per_second: Annotated[float | None, ABOVE_0] = None
    """Of all GPUs together, where it is known from a run."""
    mfu: Annotated[float | None, Limits(above=0, at_most=1, fix="write 0.4 for 40%")] = None
    """Share of the peak that training reaches, where the speed is not known; 0.35 where the GPU is known."""
    price: Annotated[float | None, ABOVE_0] = None
    """Price of one GPU for an hour."""
    compute_optimal: str | None = None
    """Say instead which size of model and how many tokens learn most from a budget: operations, such as 1e19, or hours
    of the planned GPUs, such as 24h."""
    law: str | None = None
    """With compute_optimal: the scaling law of runs of one's own, as benchmarks/scaling_law.py writes it, in place of
    20 tokens a parameter."""
    propose: bool = False
    """Say instead which mixture of data, sequence and tensor parallelism, ZeRO and activation checkpointing is fastest
    on the planned GPUs, and its flags."""
    find_micro_batch: bool = False
    """Try real steps on the present device, larger and larger, and stop below out-of-memory."""


def check_options(options: PlanOptions) -> PlanOptions:
    """Refuse figures that make no sense.

    Raises:
        UserError: naming the option, its value and the fix.
    """
    check_fields(PlanOptions, vars(options))
    if options.mfu is not None and options.tokens_per_second is not None:
        raise UserError("mfu: not together with tokens_per_second, which already says the speed; leave one out")
    if options.gpu is not None and data_sheet_peak(options.gpu, half=True) is None:
        known = known_accelerators()
        raise UserError(
            f"gpu: no data sheet of '{options.gpu}'{nearest(options.gpu, known)} (known: {', '.join(known)})"
        )
    return options


@dataclass(frozen=True)
class Column:
    """The run in one ZeRO stage."""

    memory: MemoryEstimate
    largest: int
    """The largest micro-batch that fits; 0: none."""


@dataclass(frozen=True)
class PlannedRun:
    """A run as the plan knows it."""

    resolved: ResolvedRun
    options: PlanOptions
    limit: int
    """Bytes of device memory that a rank may use."""
    columns: dict[str, Column | None]
    """The run in every ZeRO stage by `column_name`, its own among them; None: that stage cannot run it."""
    steps: int | None
    recomputing_nothing: MemoryEstimate
    """The same run without activation checkpointing."""

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.options.num_gpus * self.options.num_nodes

    @property
    def configured(self) -> str:
        """The name of the run's own column."""
        return column_name(self.resolved.zero.stage, self.resolved.zero.offloaded)

    @property
    def own(self) -> Column:
        """The run's own column."""
        column = self.columns[self.configured]
        assert column is not None
        return column

    @property
    def tokens(self) -> int | None:
        """Tokens of all steps."""
        train = self.resolved.train
        return None if self.steps is None else self.steps * train.global_batch_size * self.resolved.data.seq_len

    @property
    def fitting(self) -> list[str]:
        """The columns that fit the device."""
        return [name for name, column in self.columns.items() if column and column.memory.total <= self.limit]


def column_name(stage: int, offloaded: tuple[str, ...]) -> str:
    """`ZeRO 2`, `3 +offload` (the optimizer), `3 +both`."""
    kinds = {(): "", ("optimizer",): " +offload", ("param",): " +weights"}
    return f"{stage}{kinds.get(offloaded, ' +both')}" if offloaded else f"ZeRO {stage}"


def make_plan(run: RunConfig, ds: dict[str, Any], options: PlanOptions) -> PlannedRun:
    """Everything that the plan says, as figures.

    Raises:
        UserError: the run cannot be resolved for these ranks.
    """
    resolved = resolve_for(run, ds, options)
    limit = device_limit(options)
    batch = resolved.train.global_batch_size * resolved.data.seq_len
    steps = run.train.steps
    if options.tokens is not None:
        if steps is not None and round(options.tokens) != steps * batch:
            raise UserError(
                f"tokens: {options.tokens:g} disagree with {steps} steps of {batch} tokens = {steps * batch}; give one "
                "of the two"
            )
        steps = max(1, round(options.tokens / batch))

    def column(other: ResolvedRun) -> Column:
        return Column(estimate_memory(other, options.device), largest_micro_batch(other, limit, options.device))

    columns: dict[str, Column | None] = {}
    for stage, offloaded in VARIANTS:
        name = column_name(stage, offloaded)
        try:
            columns[name] = column(resolve_for(resolved.run, with_stage(ds, stage, offloaded), options))
        except UserError:  # this stage cannot run what the run asks for
            columns[name] = None
    columns[column_name(resolved.zero.stage, resolved.zero.offloaded)] = column(resolved)
    whole = dataclasses.replace(resolved.train, activation_checkpointing=False)
    recomputing_nothing = estimate_memory(dataclasses.replace(resolved, train=whole), options.device)
    return PlannedRun(resolved, options, limit, columns, steps, recomputing_nothing)


def resolve_for(run: RunConfig, ds: dict[str, Any], options: PlanOptions) -> ResolvedRun:
    """The run as training would resolve it on the planned ranks."""
    return resolve_run(
        run,
        ds,
        world_size=options.num_gpus * options.num_nodes,
        local_world_size=options.num_gpus,
        device_type=options.device,
        bf16_supported=options.device == "gpu",
    )


def device_limit(options: PlanOptions) -> int:
    """Bytes that a rank's tensors may take."""
    if options.gpu_memory is not None:
        return round(parse_size(options.gpu_memory, "gpu_memory", memory=True) * USABLE)
    device = default_device()
    if device.type != "cpu":
        return round(device_module(device).mem_get_info(device)[1] * USABLE)
    return round(ASSUMED_GPU_MEMORY * USABLE)
