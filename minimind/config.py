"""The run's configuration: one typed place for everything a run can be told.

`RunConfig(model, data, train)` is read from a JSON file, flags override it, and flags are generated from the fields
below. A field that is None was not set by the user: `minimind.ds_config` fills it from the DeepSpeed JSON or from its
documented default. Knows nothing of torch, ranks or files other than the configuration file itself.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from minimind.errors import UserError
from minimind.flags import parse_flags, parse_known_flags
from minimind.model.config import PRESETS, ModelConfig
from minimind.schema import check_fields, nearest

Precision = Literal["fp32", "bf16", "fp16"]
Schedule = Literal["cosine", "linear", "constant", "wsd", "step", "exponential", "deepspeed"]
OptimizerName = Literal["adamw", "muon", "deepspeed"]


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from and how they are cut into samples."""

    shards: str | None = None
    """Folder made by data_prep.tokenize_corpus (it holds train/ and val/), or one split of it."""
    seq_len: int = 512
    """Tokens in a sample (the context length in training)."""
    document_mask: bool = False
    """Keep attention and positions inside a document; the default packs documents and lets attention cross them."""


@dataclass(frozen=True)
class TrainConfig:
    """How the run trains. None: not set, filled from the DeepSpeed JSON or the documented default."""

    run_dir: str = "runs/pretrain"
    """The run's folder: configuration, metrics, TensorBoard, checkpoints."""
    ds_config: str | None = None
    """DeepSpeed JSON file; None: ZeRO stage 1 with everything else left to the run."""
    steps: int | None = None
    """Optimizer steps; None: as many as `epochs` asks for."""
    epochs: float = 1.0
    """Passes over the training shards, where `steps` is not set."""
    seed: int = 42
    """Seed of the weights, the order of the data and dropout."""
    micro_batch_size: int | None = None
    """Sequences a rank takes in one forward [default: 8]."""
    global_batch_size: int | None = None
    """Sequences of one optimizer step over all ranks [default: micro batch x accumulation x ranks]."""
    gradient_accumulation_steps: int | None = None
    """Micro-batches of a rank in one optimizer step; usually derived from the other two [default: 1]."""
    optimizer: OptimizerName | None = None
    """adamw or muon (Muon for matrices, AdamW for the rest); deepspeed: another type named in the JSON
    [default: adamw]."""
    lr: float | None = None
    """Peak learning rate [default: 5e-4]."""
    betas: tuple[float, float] | None = None
    """Adam's decay rates of the first and second moment [default: 0.9 0.95]."""
    eps: float | None = None
    """Adam's epsilon [default: 1e-8]."""
    weight_decay: float | None = None
    """Decoupled weight decay, on matrices only: no norms, no biases [default: 0.1]."""
    max_grad_norm: float | None = None
    """Clip the global gradient norm to this; 0 turns clipping off [default: 1.0]."""
    schedule: Schedule | None = None
    """Learning rate after the warm-up; deepspeed: the scheduler of the JSON drives it [default: cosine]."""
    warmup_steps: int | None = None
    """Steps of linear warm-up [default: 2% of the run, at least 1]."""
    min_lr_ratio: float = 0.1
    """Floor of the schedule as a share of lr."""
    decay_ratio: float = 0.2
    """wsd: share of the run spent in the final decay."""
    lr_step_size: int = 1000
    """step and exponential: steps over which the rate is multiplied by lr_gamma."""
    lr_gamma: float = 0.5
    """step and exponential: the factor."""
    precision: Precision | None = None
    """Arithmetic of forward and backward [default: bf16 on a GPU that has it, otherwise fp32]."""
    activation_checkpointing: bool = False
    """Keep only each block's input for the backward and recompute the rest: less memory, about a third more time."""
    compile: bool = False
    """Compile the model with torch.compile."""
    skip_bad_steps: int = 0
    """Skip up to this many steps whose loss or gradient is NaN or infinite; 0: stop at the first."""
    log_every: int = 1
    """Steps between two readings of loss and norm from the device; every step is in metrics.jsonl either way."""
    eval_every: int = 0
    """Steps between two evaluations on the validation split; 0: only at the end."""
    eval_samples: int = 0
    """Validation samples in one evaluation; 0: all."""
    save_every: int = 0
    """Steps between two checkpoints; 0: only at the end."""
    keep_last: int = 3
    """Newest checkpoints to keep; 0: all."""
    keep_every: int = 0
    """Checkpoints at multiples of this step are kept for ever; 0: none."""
    resume: str = "auto"
    """auto: continue from the newest sound checkpoint of run_dir, if any; never: start anew; or a checkpoint's path."""
    tensorboard: bool = True
    """Write TensorBoard events into run_dir/tensorboard."""
    num_workers: int = 1
    """Threads that read batches ahead of the step; 0: read in the step itself."""


@dataclass(frozen=True)
class RunConfig:
    """Everything about a run. `model` also stands for a preset's name in files and flags."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping; `from_dict` reads it back to an equal configuration."""
        return {
            "model": self.model.to_dict(),
            "data": dataclasses.asdict(self.data),
            "train": dataclasses.asdict(self.train),
        }

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], where: str = "run config") -> "RunConfig":
        """Read `{"model": PRESET or {...}, "data": {...}, "train": {...}}`.

        Raises:
            UserError: an unknown section, field or preset, or a wrong type, naming the nearest known one.
        """
        if not isinstance(mapping, Mapping):
            raise UserError(f"{where}: expected an object with model, data and train, found {type(mapping).__name__}")
        for key in mapping:
            if key not in ("model", "data", "train"):
                raise UserError(f"{where}: unknown section '{key}'{nearest(key, ['model', 'data', 'train'])}")
        model: Any = mapping.get("model", {})
        if isinstance(model, str):
            config = preset(model)
        else:
            fields = dict(model)
            base = preset(fields.pop("preset")) if "preset" in fields else ModelConfig()
            config = dataclasses.replace(base, **check_fields(ModelConfig, fields, f"{where}: model"))
        return cls(
            model=config,
            data=DataConfig(**check_fields(DataConfig, mapping.get("data", {}), f"{where}: data")),
            train=TrainConfig(**check_fields(TrainConfig, mapping.get("train", {}), f"{where}: train")),
        )


@dataclass(frozen=True)
class CommandLine:
    """A parsed command line: the run, and what is asked of this one invocation."""

    run: RunConfig
    dry_run: bool
    explicit: frozenset[str]
    """Names of the fields that the file or the flags set."""


def preset(name: str) -> ModelConfig:
    """The model preset of that name.

    Raises:
        UserError: there is none; the message lists them.
    """
    if name not in PRESETS:
        raise UserError(f"model: no preset '{name}'{nearest(name, list(PRESETS))} (presets: {', '.join(PRESETS)})")
    return PRESETS[name]


def read_json(path: str | os.PathLike[str], what: str) -> Any:
    """The parsed JSON of a file that the user named.

    Raises:
        UserError: it cannot be read, or is no JSON (naming line and column).
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{what} {path}: {error.strerror or error}; give the path of a readable file") from None
    except UnicodeDecodeError:
        raise UserError(f"{what} {path}: not UTF-8 text; give a JSON file") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{what} {path}: line {error.lineno} column {error.colno}: {error.msg}") from None


@dataclass(frozen=True)
class _Selection:
    """Flags that choose the defaults of all others, read in a first pass."""

    config: str | None = None
    """JSON file with defaults, as written to run_config.json; flags override it."""
    model: str | None = None
    """Model preset; any field of the model below overrides it."""


@dataclass(frozen=True)
class _Flags:
    """Train a MiniMind language model under DeepSpeed."""

    selection: Annotated[_Selection, tyro.conf.arg(name="")]
    data: Annotated[DataConfig, tyro.conf.arg(name="")]
    train: Annotated[TrainConfig, tyro.conf.arg(name="")]
    fields: Annotated[ModelConfig, tyro.conf.arg(name="")]
    dry_run: bool = False
    """Print the resolved run, its size and its memory, and exit."""


def parse_command_line(args: Sequence[str]) -> CommandLine:
    """Flags and, under them, the file of `--config`, as one run configuration.

    Raises:
        UserError: unknown flag, field or preset, a wrong type, or a file that is no JSON.
        SystemExit: code 0 after `--help`.
    """
    selection = parse_known_flags(_Selection, args, default=_Selection())
    base = RunConfig()
    explicit: set[str] = set()
    if selection.config is not None:
        content = read_json(selection.config, "--config")
        base = RunConfig.from_dict(content, where=selection.config)
        explicit |= {name for section in ("data", "train") for name in content.get(section, {})}
    if selection.model is not None:
        base = dataclasses.replace(base, model=preset(selection.model))
    default = _Flags(selection=selection, data=base.data, train=base.train, fields=base.model)
    flags = parse_flags(_Flags, args, default=default)
    run = RunConfig(model=flags.fields, data=flags.data, train=flags.train)
    explicit |= {
        name
        for old, new in ((base.data, run.data), (base.train, run.train))
        for name, value in dataclasses.asdict(new).items()
        if value != getattr(old, name)
    }
    check_run(run)
    return CommandLine(run=run, dry_run=flags.dry_run, explicit=frozenset(explicit))


def check_run(run: RunConfig) -> None:
    """Refuse what no device could train; everything here is known before a process group is made.

    Raises:
        UserError: naming the first wrong field, its value and the fix.
    """
    data, train = run.data, run.train
    for section, name, low in (
        (data, "seq_len", 1),
        (train, "steps", 1),
        (train, "micro_batch_size", 1),
        (train, "global_batch_size", 1),
        (train, "gradient_accumulation_steps", 1),
        (train, "lr_step_size", 1),
        (train, "log_every", 1),
        (train, "seed", 0),
        (train, "warmup_steps", 0),
        (train, "max_grad_norm", 0),
        (train, "weight_decay", 0),
        (train, "eps", 0),
        (train, "skip_bad_steps", 0),
        (train, "eval_every", 0),
        (train, "eval_samples", 0),
        (train, "save_every", 0),
        (train, "keep_last", 0),
        (train, "keep_every", 0),
        (train, "num_workers", 0),
    ):
        value = getattr(section, name)
        if value is not None and not value >= low:
            raise UserError(f"{name}: {value} is below {low}; give {low} or more")
    for name in ("lr", "epochs", "lr_gamma"):
        value = getattr(train, name)
        if value is not None and not value > 0:
            raise UserError(f"{name}: {value} is not positive")
    for name in ("min_lr_ratio", "decay_ratio"):
        if not 0 <= getattr(train, name) <= 1:
            raise UserError(f"{name}: {getattr(train, name)} is not between 0 and 1")
    if train.betas is not None and not all(0 <= beta < 1 for beta in train.betas):
        raise UserError(f"betas: {train.betas} are not in [0, 1)")
    if train.steps is not None and train.warmup_steps is not None and train.warmup_steps > train.steps:
        raise UserError(f"warmup_steps: {train.warmup_steps} is longer than the run of {train.steps} steps")
    if data.seq_len > run.model.max_position_embeddings:
        raise UserError(
            f"seq_len: {data.seq_len} is beyond max_position_embeddings {run.model.max_position_embeddings}; "
            f"shorten it or pass --max-position-embeddings {data.seq_len}"
        )
