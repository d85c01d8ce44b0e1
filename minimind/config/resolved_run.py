"""A run after `minimind.config.resolve`: nothing left to fill in, and ZeRO's settings as typed values."""

import functools
from dataclasses import dataclass
from typing import Any, Literal

from minimind.config.deepspeed_keys import offload_device, zero_stage
from minimind.config.rate_kinds import is_for_muon
from minimind.config.run_config import DataConfig, OptimizerName, Precision, RunConfig, Schedule, TrainConfig
from minimind.model.config import ModelConfig
from minimind.model.tuning import Shapes, count, trained_shapes, training_flops_per_token

OffloadDevice = Literal["cpu", "nvme"]


@dataclass(frozen=True, kw_only=True)
class ResolvedTrain(TrainConfig):
    """`TrainConfig` with every setting decided. What stays None has no value: `betas` and `eps` of an optimizer that
    has none, the further rates without Muon, `moe_backend` of a dense model."""

    steps: int
    """Optimizer steps; 0 in a plan that does not know the data."""
    warmup_steps: int
    """Steps of linear warm-up; 0 under a schedule of DeepSpeed's."""
    micro_batch_size: int
    global_batch_size: int
    gradient_accumulation_steps: int
    optimizer: OptimizerName
    lr: float
    weight_decay: float
    max_grad_norm: float
    schedule: Schedule
    min_lr_ratio: float
    precision: Precision
    log_every: int
    sp_size: int
    tp_size: int
    ep_size: int


@dataclass(frozen=True)
class ZeroSettings:
    """What DeepSpeed's JSON says about how weights, gradients and optimizer state are stored and moved."""

    stage: int
    weights: Precision
    """What the engine stores weights in: float32 under autocast, whatever the precision of the run."""
    autocast: bool
    grad_accum_dtype: Precision | None
    """None: DeepSpeed's default."""
    immediate_grad_update: bool
    offload_optimizer: OffloadDevice | None
    offload_param: OffloadDevice | None
    hpz_partition_size: int
    """Ranks that hold a second copy of the weights together; 1: no such copy."""
    reduce_bucket_size: int
    """Elements, as in all sizes below."""
    prefetch_bucket_size: int
    max_live_parameters: int
    max_reuse_distance: int
    overlap_comm: bool
    contiguous_gradients: bool
    sub_group_size: int | None
    round_robin_gradients: bool | None

    @classmethod
    def read(cls, ds: dict[str, Any]) -> "ZeroSettings":
        """The settings of a resolved DeepSpeed JSON, with DeepSpeed 0.19's defaults where it says nothing."""
        zero = ds.get("zero_optimization", {})
        weights: list[Precision] = ["bf16", "fp16"]
        return cls(
            stage=zero_stage(ds),
            weights=next((name for name in weights if ds.get(name, {}).get("enabled")), "fp32"),
            autocast=bool(ds.get("torch_autocast", {}).get("enabled")),
            grad_accum_dtype=ds.get("data_types", {}).get("grad_accum_dtype"),
            immediate_grad_update=bool(ds.get("bf16", {}).get("immediate_grad_update")),
            offload_optimizer=offload_device(ds, "optimizer"),
            offload_param=offload_device(ds, "param"),
            hpz_partition_size=zero.get("zero_hpz_partition_size", 1),
            reduce_bucket_size=int(zero.get("reduce_bucket_size", 5e8)),
            prefetch_bucket_size=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
            max_live_parameters=int(zero.get("stage3_max_live_parameters", 1e9)),
            max_reuse_distance=int(zero.get("stage3_max_reuse_distance", 1e9)),
            overlap_comm=bool(zero.get("overlap_comm")),
            contiguous_gradients=zero.get("contiguous_gradients", True),
            sub_group_size=zero.get("sub_group_size"),
            round_robin_gradients=zero.get("round_robin_gradients"),
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of one stored weight."""
        return 4 if self.weights == "fp32" else 2

    @property
    def offloaded(self) -> tuple[str, ...]:
        """What does not stay on the device: "optimizer", "param", both or neither."""
        devices = {"optimizer": self.offload_optimizer, "param": self.offload_param}
        return tuple(name for name, device in devices.items() if device is not None)


@dataclass(frozen=True)
class FrozenBase:
    """The model whose weights a run keeps frozen."""

    path: str
    """Absolute: a checkpoint, an export, or a file of weights."""
    sha256: str
    """Of its weights; see `checkpoints.base`."""


@dataclass(frozen=True)
class ResolvedRun:
    """A run and a DeepSpeed JSON that agree, on `world_size` ranks."""

    model: ModelConfig
    data: DataConfig
    train: ResolvedTrain
    ds: dict[str, Any]
    """What DeepSpeed is given. Only `minimind.config` and `minimind.parallel` read it; see `zero`."""
    dp_size: int
    """Ranks that read different samples, `sp_size` x `tp_size` ranks counted as one."""
    notes: tuple[str, ...]
    """What a user should know and is not an error."""
    base: FrozenBase | None = None
    """Known when the run starts, where weights are frozen."""

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.dp_size * self.train.sp_size * self.train.tp_size

    @property
    def num_averaging(self) -> int:
        """Ranks over which DeepSpeed averages a gradient and ZeRO cuts the states: those with other tokens."""
        return self.dp_size * self.train.sp_size

    @functools.cached_property
    def zero(self) -> ZeroSettings:
        """How ZeRO stores and moves the states."""
        return ZeroSettings.read(self.ds)

    @functools.cached_property
    def trained(self) -> Shapes:
        """Name and shape of every parameter that is trained, adapters among them."""
        return trained_shapes(self.model, self.train.lora, self.train.freeze)

    def describe_size(self) -> str:
        """Parameters of the model, and how many of them, or of adapters beside them, are trained."""
        model = self.model
        trained = f"; {count(self.trained):,} trained" if self.train.keeps_frozen else ""
        return f"{model.num_params():,} parameters ({model.num_active_params():,} active a token){trained}"

    @functools.cached_property
    def trains_routers(self) -> bool:
        """Whether the choice of experts is trained; if not, their selection biases stay too."""
        return any(name.endswith(".mlp.gate.weight") for name in self.trained)

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of training on one token."""
        return training_flops_per_token(self.model, self.data.seq_len, self.trained)

    @property
    def owns_optimizer(self) -> bool:
        """Whether the optimizer is the run's own, given to DeepSpeed, and not one that DeepSpeed makes."""
        return self.train.optimizer == "muon" or (
            self.train.optimizer == "adamw" and self.zero.offload_optimizer is None
        )

    @property
    def optimizer_type(self) -> str:
        """`adamw`, `muon`, or the type that the JSON names."""
        return self.train.optimizer if self.train.optimizer != "deepspeed" else self.ds["optimizer"]["type"]

    @property
    def checkpoint_bytes(self) -> int:
        """Size of one checkpoint, all ranks together: the trained weights as they are stored, their float32 copy, two
        moments.

        In stage 0 the weights are their own float32 copy; stage 3 writes the weights only as that copy.
        """
        each = {0: 4 + 8, 3: 12}.get(self.zero.stage, self.zero.weight_bytes + 12)
        return count(self.trained) * each - 4 * self.num_muon_params

    @functools.cached_property
    def num_muon_params(self) -> int:
        """Parameters that Muon updates: they have one moment."""
        if self.train.optimizer != "muon":
            return 0
        return count({name: shape for name, shape in self.trained.items() if is_for_muon(name, shape)})

    @property
    def run(self) -> RunConfig:
        """The run as run_config.json has it. A setting that does not apply is unset, so that the run can be given
        again as it is."""
        train = self.train
        unset = {
            "steps": train.steps == 0,
            "warmup_steps": train.schedule == "deepspeed" or train.steps == 0 == train.warmup_steps,
            "min_lr_ratio": train.schedule in ("constant", "deepspeed"),
            "ep_size": train.moe_backend is None,
        }
        values = {**vars(train), **{name: None for name, is_unset in unset.items() if is_unset}}
        return RunConfig(self.model, self.data, TrainConfig(**values))
