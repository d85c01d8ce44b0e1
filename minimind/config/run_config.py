"""`RunConfig(model, data, train)`: every setting of a run, its documentation and its limits.

Flags are generated from these fields. None means that the user has not set the field: `minimind.config.resolve` fills
it from the DeepSpeed JSON or with the documented default.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from minimind.errors import UserError
from minimind.model.config import ModelConfig
from minimind.model.presets import PRESETS
from minimind.model.tuning import LORA_TARGETS, LoRA, LoRATarget, parameter_shapes, trained_shapes
from minimind.remote import url_of
from minimind.schema import ABOVE_0, AT_LEAST_0, AT_LEAST_1, Limits, check_fields, nearest

Precision = Literal["fp32", "bf16", "fp16"]
DTYPE_NAMES: dict[Precision, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""torch's name of the type that each precision computes in."""
Schedule = Literal["cosine", "linear", "constant", "wsd", "step", "exponential", "deepspeed"]
OptimizerName = Literal["adamw", "muon", "deepspeed"]
PreferenceObjective = Literal["dpo", "ipo", "orpo", "simpo", "kto"]
ObjectiveName = Literal["pretrain", "distill", "grpo", "dpo", "ipo", "orpo", "simpo", "kto"]
MoeBackend = Literal["autoep", "deepspeed"]
CompileMode = Literal["auto", "on", "off"]
GateNoise = Literal["none", "jitter", "rsample"]

SHARD_FINGERPRINT = "shard_fingerprint"
"""Key of run_config.json that is no setting: the shards that the run was trained on."""
SOURCE_FINGERPRINTS = "source_fingerprints"
"""The same of each source, of a mixture."""

SHARE = Limits(at_least=0, at_most=1)


def _default(text: str, help: str | None = None) -> Any:
    """The default that --help shows for a field whose None is filled in later."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {text})", help=help)


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from and how they are cut into samples."""

    shards: Annotated[str | tuple[str, ...] | None, _default("none, must be given")] = None
    """Folder made by data_prep.tokenize_corpus (it holds train/ and val/), or one split of it. A mixture: several
    NAME=DIR:WEIGHT[:max-epochs=N], weights being shares of the tokens, or a .json or .yaml file that names them."""
    mixture_schedule: Annotated[str | None, _default("none")] = None
    """.json or .yaml file: a mixture's weights from later steps on, as [{"step": N, "weights": {NAME: WEIGHT}}]."""
    corpus_parts: Annotated[int | None, AT_LEAST_1, _default("all, on a resume those the run began with")] = None
    """Take the first so many parts of a corpus that tokenize_corpus --append has added to."""
    seq_len: Annotated[int, AT_LEAST_1] = 512
    """Tokens in a sample (the context length in training)."""
    document_mask: bool = False
    """Keep attention and positions inside a document; the default packs documents and lets attention cross them."""
    packing: Literal["stream", "whole-documents"] = "stream"
    """stream: windows tile the joined documents. whole-documents: whole documents in windows, with the document mask
    (arXiv 2404.10830); conversations are always packed so."""
    window_warmup_steps: Annotated[int, AT_LEAST_0] = 0
    """Steps in which a window is read as four, then as two shorter ones that do not see each other (sequence length
    warm-up, arXiv 2108.06084): the same tokens, learnt from faster at first."""


@dataclass(frozen=True)
class TrainConfig:
    """How the run trains. None: not set, filled from the DeepSpeed JSON or the documented default."""

    run_dir: str = "runs/pretrain"
    """The run's folder: configuration, metrics, TensorBoard, checkpoints."""
    ds_config: Annotated[str | None, _default("ZeRO stage 1")] = None
    """DeepSpeed JSON file."""
    device: str = "auto"
    """auto: the accelerator, where there is one (a GPU that torch cannot use is an error), else the CPU. Or its name in
    torch: cpu, cuda (AMD's too), mps (Apple), xpu (Intel), npu (Ascend)."""
    init_from: Annotated[str | None, _default("fresh weights")] = None
    """Begin with the weights (and, without --model, the shape) of a run, a checkpoint, an export, a Hugging Face folder
    or a .pth; a resumed run has its own."""
    objective: Annotated[ObjectiveName | None, _default("pretrain; dpo on preferences, kto on feedback")] = None
    """What is minimised. pretrain: the loss of the next token, of conversations that of the answers. distill: with it,
    the divergence from a teacher (arXiv 1503.02531). grpo: rewards of sampled answers to the questions of conversations
    (arXiv 2402.03300). The others learn from pairs of answers (arXiv 2305.18290, 2310.12036, 2403.07691, 2405.14734),
    kto from single judged ones (arXiv 2402.01306)."""
    teacher: Annotated[str | None, _default("none")] = None
    """distill: a run, a checkpoint or an export with the tokenizer of the shards; whole on every rank, at ZeRO stage 3
    partitioned."""
    teacher_int8: bool = False
    """distill: on a CPU, the teacher's matrices in 8 bits: a quarter of the memory of fp32, slightly less exact."""
    teacher_top_k: Annotated[int, AT_LEAST_0] = 0
    """distill: compute the teacher's so many most likely tokens a position once, before training, and store them in the
    run's folder: training then holds no teacher. 0: all tokens, with the teacher in memory."""
    distill_alpha: Annotated[float, SHARE] = 0.5
    """distill: share of the loss of the next token; the rest is the divergence from the teacher."""
    distill_temperature: Annotated[float, ABOVE_0] = 1.0
    """distill: divides both models' logits in the divergence; above 1, what is unlikely counts more."""
    distill_kl: Literal["forward", "reverse"] = "forward"
    """distill: forward covers all that the teacher finds likely, reverse keeps to it (arXiv 2306.08543)."""
    beta: Annotated[float, ABOVE_0] = 0.1
    """Preferences: how far the model may leave its start (dpo, ipo, kto); weight of the odds (orpo); scale (simpo: 2 or
    more)."""
    reference: Literal["stored", "live"] = "stored"
    """dpo, ipo, kto: log-probabilities of the model that training begins with, computed once and stored; or that model
    (--init-from) live in memory, at ZeRO stage 3 partitioned."""
    label_smoothing: Annotated[float, Limits(at_least=0, below=0.5)] = 0.0
    """dpo: share of pairs that are taken to be the wrong way round."""
    length_normalised: bool = False
    """dpo: compare log-probabilities a token, so that longer answers have no advantage."""
    target_margin: Annotated[float, AT_LEAST_0] = 0.5
    """simpo: by how much, a token, the preferred answer should be the more probable one (gamma / beta)."""
    desirable_weight: Annotated[float, AT_LEAST_0] = 1.0
    """kto: weight of answers that were liked."""
    undesirable_weight: Annotated[float, AT_LEAST_0] = 1.0
    """kto: weight of the others; weight times number should be about the same for both."""
    reward: Annotated[tuple[str, ...], _default("none, must be given")] = ()
    """grpo: what an answer earns: `module:function`, or the name of a ready one (minimind.training.rewards.ready)."""
    reward_weights: Annotated[tuple[float, ...], _default("1 each")] = ()
    """grpo: what each of several rewards counts in their sum."""
    reward_seconds: Annotated[float, ABOVE_0] = 10.0
    """grpo: a reward that takes longer for one answer has failed."""
    reward_workers: Annotated[int, AT_LEAST_1] = 2
    """grpo: processes of a rank that compute rewards."""
    environment: Annotated[str | None, _default("none")] = None
    """grpo: what answers the model's turns, until it has nothing to say: `module:class` with `reset` and `step`, or the
    name of a ready one (minimind.training.rewards.environments)."""
    max_turns: Annotated[int, AT_LEAST_1] = 4
    """grpo: turns of the model in a conversation with an environment."""
    skip_bad_rewards: Annotated[int, AT_LEAST_0] = 0
    """grpo: go on after up to this many answers whose reward raised, took too long or was not finite, leaving out all
    answers to their questions; 0: stop at the first."""
    group_size: Annotated[int, Limits(at_least=2)] = 8
    """grpo: answers sampled for a question."""
    max_new_tokens: Annotated[int, AT_LEAST_1] = 64
    """grpo: longest sampled answer, in tokens."""
    rollout_batch_size: Annotated[int, AT_LEAST_1] = 64
    """grpo: answers that a rank decodes together."""
    rollout_steps: Annotated[int, AT_LEAST_1] = 1
    """grpo: steps whose questions are answered together, by the weights before the first of them: fewer, larger
    samplings, and ratios that leave 1."""
    rollout_server: Annotated[str | None, _default("none, the run samples itself")] = None
    """grpo: address of a server that samples the answers and is given the weights of each rollout: vLLM, or
    minimind.serve --accept-weights."""
    rollout_seconds: Annotated[float, ABOVE_0] = 300.0
    """grpo: a rollout server that takes longer for an answer or for new weights has failed."""
    policy_loss: Literal["clip", "cispo"] = "clip"
    """grpo: clip takes the gradient of a token whose ratio has left the range; cispo (arXiv 2506.13585) its weight."""
    clip_low: Annotated[float, SHARE] = 0.2
    """grpo: how far below 1 a token's ratio to the sampler's probability counts."""
    clip_high: Annotated[float, AT_LEAST_0] = 0.2
    """grpo: how far above 1; DAPO (arXiv 2503.14476) takes 0.28."""
    loss_average: Literal["answer", "token", "constant"] = "answer"
    """grpo: mean over the tokens of each answer, over all tokens of a step (DAPO), or tokens divided by max_new_tokens,
    so that an answer's length has no influence (Dr. GRPO, arXiv 2503.20783)."""
    advantage_scale: Literal["std", "none"] = "std"
    """grpo: divide advantages by the standard deviation of their group's rewards, or not (Dr. GRPO)."""
    kl_coef: Annotated[float, AT_LEAST_0] = 0.0
    """grpo: weight of the divergence from the model of --init-from, then in memory too, at ZeRO stage 3
    partitioned; 0: none."""
    lora_rank: Annotated[int, AT_LEAST_0] = 0
    """Train low-rank adapters of this rank (arXiv 2106.09685) on the frozen weights of --init-from; 0: train all."""
    lora_alpha: Annotated[float | None, _default("twice the rank"), ABOVE_0] = None
    """The adapters' product is multiplied by this, divided by the rank."""
    lora_targets: tuple[LoRATarget, ...] = LORA_TARGETS
    """Matrices that get adapters: of attention, of every feed-forward but the routed experts, or (experts) theirs."""
    freeze: Annotated[str, _default("nothing")] = ""
    """Leave weights of --init-from as they are: a regular expression, searched for in the parameters' names."""
    steps: Annotated[int | None, _default("as many as --epochs asks for"), AT_LEAST_1] = None
    """Optimizer steps."""
    epochs: Annotated[float, ABOVE_0] = 1.0
    """Passes over the training shards (of a mixture: as many windows as all its sources hold), where `steps` is not
    set."""
    seed: Annotated[int, Limits(at_least=0, at_most=2**63 - 1)] = 42
    """Seed of the weights, the order of the data and dropout."""
    micro_batch_size: Annotated[Annotated[int, AT_LEAST_1] | Literal["auto"] | None, _default("8")] = None
    """Sequences a rank takes in one forward. auto, on GPUs: as many as fit, by trial; --global-batch-size stays."""
    global_batch_size: Annotated[int | None, _default("micro batch x accumulation x ranks"), AT_LEAST_1] = None
    """Sequences of one optimizer step over all ranks."""
    gradient_accumulation_steps: Annotated[int | None, _default("1"), AT_LEAST_1] = None
    """Micro-batches of a rank in one optimizer step; usually derived from the other two."""
    optimizer: Annotated[OptimizerName | None, _default("muon for fresh weights, else adamw")] = None
    """adamw or muon (Muon for matrices, AdamW for the rest); deepspeed: another type named in the JSON."""
    lr: Annotated[float | None, _default("5e-4; beside Muon 2.56 / hidden_size"), ABOVE_0] = None
    """Peak learning rate; with Muon that of the output matrix, an embedding tied to it, and routers."""
    muon_lr: Annotated[float | None, _default("0.02, for Muon"), ABOVE_0] = None
    """Peak learning rate of the matrices that Muon updates; the schedule moves it as it moves lr."""
    embedding_lr: Annotated[float | None, _default("beside Muon lr, or 1e-2 if that is not set"), ABOVE_0] = None
    """The same of an embedding that is not the output matrix too (--no-tie-word-embeddings)."""
    norm_lr: Annotated[float | None, _default("beside Muon lr, or 1e-2 if that is not set"), ABOVE_0] = None
    """The same of norms and biases."""
    betas: Annotated[
        tuple[float, float] | None, _default("0.9 0.95; beside Muon 0.8 0.95"), Limits(at_least=0, below=1)
    ] = None
    """Adam's decay rates of the first and second moment."""
    eps: Annotated[float | None, _default("1e-8"), AT_LEAST_0] = None
    """Adam's epsilon."""
    weight_decay: Annotated[float | None, _default("0.1"), AT_LEAST_0] = None
    """Decoupled weight decay, on matrices only: no norms, no biases."""
    max_grad_norm: Annotated[float | None, _default("1.0"), AT_LEAST_0] = None
    """Clip the global gradient norm to this; 0 turns clipping off."""
    schedule: Annotated[Schedule | None, _default("cosine")] = None
    """Learning rate after the warm-up; deepspeed: the scheduler of the JSON drives it."""
    warmup_steps: Annotated[int | None, _default("2% of the run, at least 1"), AT_LEAST_0] = None
    """Steps of linear warm-up."""
    min_lr_ratio: Annotated[float | None, _default("0.1"), SHARE] = None
    """Floor of the schedule as a share of lr."""
    decay_ratio: Annotated[float, SHARE] = 0.2
    """wsd: share of the run spent in the final decay."""
    lr_step_size: Annotated[int, AT_LEAST_1] = 1000
    """step and exponential: steps over which the rate is multiplied by lr_gamma."""
    lr_gamma: Annotated[float, SHARE] = 0.5
    """step and exponential: the factor."""
    precision: Annotated[
        Precision | None, _default("bf16 on a GPU that has it, fp16 on an older one, fp32 on a CPU")
    ] = None
    """Arithmetic of forward and backward."""
    activation_checkpointing: bool = False
    """Keep only each block's input for the backward and recompute the rest: less memory, about a third more time."""
    compile: CompileMode = "auto"
    """Compile each block with torch.compile: fewer and larger kernels, after a minute at the first start. auto: on a
    GPU, where Triton and a C compiler are installed."""
    moe_backend: Annotated[MoeBackend | None, _default("autoep, for a model with experts")] = None
    """What runs the experts: autoep (DeepSpeed's AutoEP) drops no token and knows every ZeRO stage; deepspeed
    (deepspeed.moe) can limit what an expert takes, and knows ZeRO 0 to 2."""
    sp_size: Annotated[int | None, _default("1"), AT_LEAST_1] = None
    """Neighbouring ranks that share each sequence (DeepSpeed-Ulysses, arXiv 2309.14509): each has so many times fewer
    of its tokens, and around attention they exchange tokens for heads. Divides the ranks, seq_len and the heads."""
    tp_size: Annotated[int | None, _default("1"), AT_LEAST_1] = None
    """Neighbouring ranks that share the matrices of every layer (AutoTP); divides the key-value heads and the ranks."""
    ep_size: Annotated[int | None, _default("1"), AT_LEAST_1] = None
    """Ranks that share one set of experts; divides the experts and the ranks. 1: every rank holds all experts."""
    moe_drop_tokens: bool = False
    """moe_backend deepspeed: an expert passes over what exceeds its capacity, also in evaluation."""
    moe_capacity_factor: Annotated[float, ABOVE_0] = 1.0
    """With moe_drop_tokens: tokens that an expert takes in training, as a multiple of its even share."""
    moe_eval_capacity_factor: Annotated[float, ABOVE_0] = 1.0
    """The same in evaluation."""
    moe_min_capacity: Annotated[int, AT_LEAST_1] = 4
    """With moe_drop_tokens: what an expert takes at least; not above seq_len."""
    moe_random_selection: bool = False
    """With moe_drop_tokens and one expert a token, in training: draw at random what is dropped."""
    moe_gate_noise: GateNoise = "none"
    """moe_backend deepspeed, in training: jitter multiplies the router's input by 0.99 to 1.01, rsample (one expert a
    token) adds Gumbel noise to its logits. Noise moves the choice, not the weights."""
    moe_sample_second: bool = False
    """moe_backend deepspeed, two experts a token, in training: draw the second instead of taking the next best."""
    skip_bad_steps: Annotated[int, AT_LEAST_0] = 0
    """Skip up to this many steps whose loss or gradient is NaN or infinite; 0: stop at the first."""
    log_every: Annotated[int | None, _default("10 on a GPU, 1 on a CPU"), AT_LEAST_1] = None
    """Steps between two readings of loss and norm from the device; every step is in metrics.jsonl either way."""
    eval_every: Annotated[int, AT_LEAST_0] = 0
    """Steps between two evaluations on the validation split; 0: only at the end."""
    eval_samples: Annotated[int, AT_LEAST_0] = 0
    """Validation samples in one evaluation; 0: all."""
    save_every: Annotated[int, AT_LEAST_0] = 0
    """Steps between two checkpoints; 0: only at the end."""
    keep_last: Annotated[int, AT_LEAST_0] = 3
    """Newest checkpoints to keep; 0: all."""
    keep_every: Annotated[int, AT_LEAST_0] = 0
    """Checkpoints at multiples of this step are kept for ever; 0: none."""
    keep_best: Annotated[int, AT_LEAST_0] = 1
    """Checkpoints with the lowest evaluation loss to keep, of those evaluated at the step of their save."""
    async_save: bool = True
    """Write checkpoints beside training, from a copy in host memory."""
    store_checkpoints: Annotated[str | None, _default("none")] = None
    """Copy each checkpoint to this run folder in an object store too (s3://...); with --resume auto a run that finds
    none in its own goes on from the newest there."""
    resume: str = "auto"
    """auto: continue from the newest valid checkpoint of run_dir, if any; never: start anew; or a checkpoint's path."""
    allow_data_change: bool = False
    """Continue a run on other shards, or another mixture, than it began with (the tokenizer must stay); each source
    goes on where it stood."""
    tensorboard: bool = True
    """Write TensorBoard events into run_dir/tensorboard."""
    profile_steps: Annotated[int, AT_LEAST_0] = 0
    """Profile so many steps, after the first three, into run_dir/profile; 0: none."""
    wandb_project: Annotated[str | None, _default("none")] = None
    """Send the figures to this project of Weights & Biases too (needs the package wandb)."""
    num_workers: Annotated[int, AT_LEAST_0] = 1
    """Threads that read batches ahead of the step; 0: read in the step itself."""
    timeout_minutes: Annotated[float, ABOVE_0] = 30.0
    """A collective that hangs this long ends the run, saying where each rank stands."""
    preflight: bool = True
    """With several ranks, compare hosts, versions, code and folders before training."""

    @property
    def lora(self) -> LoRA | None:
        """The adapters to train, if any."""
        if not self.lora_rank:
            return None
        return LoRA(self.lora_rank, self.lora_alpha or 2.0 * self.lora_rank, self.lora_targets)

    @property
    def keeps_frozen(self) -> bool:
        """Whether some weights stay those of `init_from`."""
        return bool(self.lora_rank or self.freeze)


@dataclass(frozen=True)
class RunConfig:
    """Everything about a run. In files and flags `model` may also be the name of a preset."""

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
            model = {"preset": model}
        if isinstance(model, Mapping) and "preset" in model:
            model = {**preset(model["preset"]).to_dict(), **model}
            del model["preset"]
        train = mapping.get("train", {})
        if isinstance(train, Mapping) and isinstance(train.get("compile"), bool):  # as runs of before have it
            train = {**train, "compile": "on" if train["compile"] else "off"}
        return cls(
            model=ModelConfig(**check_fields(ModelConfig, model, f"{where}: model")),
            data=DataConfig(**check_fields(DataConfig, mapping.get("data", {}), f"{where}: data")),
            train=TrainConfig(**check_fields(TrainConfig, train, f"{where}: train")),
        )


def preset(name: str) -> ModelConfig:
    """The model preset of that name.

    Raises:
        UserError: there is none; the message lists them.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise UserError(f"model: no preset '{name}'{nearest(str(name), list(PRESETS))} (presets: {', '.join(PRESETS)})")
    return PRESETS[name]


def check_run(run: RunConfig) -> None:
    """Refuse what no device could train; everything here is known before a process group is made.

    Raises:
        UserError: naming the first wrong field, its value and the fix.
    """
    data, train = run.data, run.train
    for section in (data, train):
        check_fields(type(section), vars(section))
    for name in ("run_dir", "ds_config", "resume", "init_from"):
        if getattr(train, name) == "":
            raise UserError(f"{name}: empty; give a value, or leave the flag out")
    if data.shards in ("", ()):
        raise UserError("shards: empty; give a folder made by python -m data_prep.tokenize_corpus")
    if train.store_checkpoints is not None and url_of(train.store_checkpoints) is None:
        raise UserError(
            f"store_checkpoints: {train.store_checkpoints!r} is no address; give one such as s3://bucket/run"
        )
    _check_trained(run)
    if train.steps is not None and train.warmup_steps is not None and train.warmup_steps > train.steps:
        raise UserError(f"warmup_steps: {train.warmup_steps} is longer than the run of {train.steps} steps")
    if data.seq_len > run.model.max_position_embeddings:
        raise UserError(
            f"seq_len: {data.seq_len} is beyond max_position_embeddings {run.model.max_position_embeddings}; "
            f"shorten it or pass --max-position-embeddings {data.seq_len}"
        )


def _check_trained(run: RunConfig) -> None:
    """Refuse adapters and frozen weights that cannot be, or would train nothing."""
    train = run.train
    for name in ("lora_alpha", "lora_targets"):
        if not train.lora_rank and getattr(train, name) != getattr(TrainConfig(), name):
            raise UserError(f"{name}: has no effect without adapters; give --lora-rank, or leave it out")
    if not train.keeps_frozen:
        return
    flag = "lora_rank" if train.lora_rank else "freeze"
    if train.lora_rank and train.freeze:
        raise UserError(f"freeze: {train.freeze!r}: with --lora-rank every weight of the model is frozen; leave it out")
    try:
        trained = trained_shapes(run.model, train.lora, train.freeze)
    except re.error as error:
        raise UserError(f"freeze: {train.freeze!r} is no regular expression: {error}") from None
    if not trained:
        left = "no matrix for them" if train.lora_rank else "nothing to train"
        raise UserError(f"{flag}: {getattr(train, flag)!r} leaves {left} in this model; name others")
    names = list(parameter_shapes(run.model))
    if train.freeze and len(trained) == len(names):
        hint = nearest(train.freeze, names)
        raise UserError(f"freeze: {train.freeze!r} is found in no parameter's name, such as {names[1]}{hint}")
