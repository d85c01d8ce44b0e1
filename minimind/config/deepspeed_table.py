"""What becomes of every key of DeepSpeed 0.19.8's JSON: one table, read from top to bottom.

`docs/*/ds_configs.md` prints it and a test walks it: at every stage, with and without experts, on a CPU and on CUDA a
key runs, is refused before anything starts, or is passed over with a note.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

from minimind.config.deepspeed_keys import AUTO, offload_device, optimizer_name, zero_stage
from minimind.errors import UserError
from minimind.schema import nearest

Section = dict[str, Any]
Verdict = Literal["runs", "note", "refused"]
STAGES = (0, 1, 2, 3)


_WITH_OPS = ("cuda", "gpu")  # a plan calls it gpu


@dataclass(frozen=True)
class Rule:
    """Where a key does not simply run, and what is said there."""

    words: str
    verdict: Verdict
    stages: tuple[int, ...] = STAGES
    experts: bool | None = None
    """Only with (True) or without experts (False)."""
    device: str | None = None
    """Only on "cpu", only on an accelerator ("gpu"), or only where DeepSpeed's ops for CUDA are not ("no ops")."""
    when: Callable[[Section], bool] | None = None
    """Only where this holds of the whole JSON."""
    package: str = ""
    """Only where this package is not installed."""
    becomes: Callable[[Section], None] | None = None
    """Of a note: what is done to the JSON, where it is more than taking the key out."""

    def applies(self, ds: Section, stage: int, experts: bool, device: str) -> bool:
        """Whether it is for this run."""
        where = {None, "cpu" if device == "cpu" else "gpu", *([] if device in _WITH_OPS else ["no ops"])}
        here = stage in self.stages and self.experts in (None, experts) and self.device in where
        return here and (self.when is None or self.when(ds)) and not (self.package and find_spec(self.package))


@dataclass(frozen=True)
class Row:
    """One key: dotted, with `=VALUE` for one value of it. The first rule that applies decides; with none it runs."""

    key: str
    example: Any
    """A value that asks for something."""
    rules: tuple[Rule, ...] = ()
    off: tuple[Any, ...] = ()
    """Values, beside null, false, "auto", empty ones and `enabled` false, that ask for nothing."""
    beside: Section = field(default_factory=dict)
    """What the example needs in the JSON to mean anything."""

    def example_json(self, stage: int) -> Section:
        """A JSON that sets the example in a ZeRO stage."""
        path, _, _ = self.key.partition("=")
        inner: Any = self.example
        for name in reversed(path.split(".")):
            inner = {name: inner}
        return merge({"zero_optimization": {"stage": stage}}, self.beside, inner)

    def verdict(self, stage: int, experts: bool, device: str, *, all_packages: bool = False) -> tuple[Verdict, str]:
        """What becomes of the example, and the words.

        Args:
            all_packages: as if every package were installed.
        """
        ds = self.example_json(stage)
        asked = (rule for rule in self.rules if not (all_packages and rule.package))
        rules = (rule for rule in asked if rule.applies(ds, stage, experts, device))
        return next(((rule.verdict, rule.words) for rule in rules), ("runs", ""))

    def is_off(self, value: Any) -> bool:
        """Whether a value asks for nothing."""
        return "=" not in self.key and (value in self.off or _asks_nothing(value))


def _asks_nothing(value: Any) -> bool:
    if not isinstance(value, dict):
        return value is None or value is False or value in (AUTO, "none", [])
    if value.get("device") in ("none", AUTO):
        return True
    switches = [inner for name, inner in value.items() if name == "enabled"]
    inside = [inner for inner in value.values() if isinstance(inner, dict)]
    if switches:
        return switches[0] is not True
    return not value or (bool(inside) and _has_switch(value) and all(map(_asks_nothing, filter(_has_switch, inside))))


def _has_switch(value: Any) -> bool:
    return isinstance(value, dict) and ("enabled" in value or any(map(_has_switch, value.values())))


def merge(*mappings: Section) -> Section:
    """The mappings as one, section by section."""
    merged: Section = {}
    for mapping in mappings:
        for key, value in mapping.items():
            both = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = merge(merged[key], value) if both else value
    return merged


def refuse(words: str, **where: Any) -> Rule:
    return Rule(words, "refused", **where)


def note(words: str, **where: Any) -> Rule:
    return Rule(words, "note", **where)


def _reduce_scatters(ds: Section) -> bool:
    return ds.get("zero_optimization", {}).get("reduce_scatter") is not False


def _on_device(ds: Section) -> bool:
    return offload_device(ds, "optimizer") is None


def _is_adamw(ds: Section) -> bool:
    return optimizer_name(ds) in (None, "adamw")


def _on_nvme(ds: Section) -> bool:
    return "nvme" in (offload_device(ds, "optimizer"), offload_device(ds, "param"))


def _stays(ds: Section) -> None:
    """`resolve` writes the precision itself."""


def _to_autocast(ds: Section) -> None:
    del ds["amp"]
    ds.setdefault("torch_autocast", {"enabled": True, "dtype": "float16"})


def _has_no_bf16(ds: Section) -> bool:
    return ds.get("bf16", {}).get("enabled") is not True


def _autocasts_fp16(ds: Section) -> bool:
    return str(ds.get("torch_autocast", {}).get("dtype")).removeprefix("torch.") in ("float16", "fp16", "half")


def _to_default(ds: Section) -> None:
    ds["torch_autocast"] = {"enabled": AUTO}


def _to_clipping(ds: Section) -> None:
    value = ds["optimizer"]["params"].pop("max_grad_norm")
    if ds.get("gradient_clipping", AUTO) == AUTO:
        ds["gradient_clipping"] = value


_BF16 = {"bf16": {"enabled": True}}
_OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
_MUON = {"optimizer": {"type": "Muon"}}
_UNTESTED = {"zero_allow_untested_optimizer": True}
_LOSES_NAN = refuse("a NaN gradient would reach the weights at ZeRO stage 0; use stage 1, or AdamW", stages=(0,))
_NO_OVERFLOW = refuse(
    "experts at ZeRO stage 0 do not tell all ranks of an overflow; use stage 1", stages=(0,), experts=True
)
_ROUNDS = refuse("what is kept in float32, in memory and in checkpoints, would be rounded at every step; remove it")
_TO_AUTOCAST = note("torch_autocast takes its place at ZeRO stage 0, where a block would start Adam at its second step",
                    stages=(0,), becomes=_stays)  # fmt: skip
_ON_CPU = note("fp16 does not run on a CPU: fp32, or what --precision says", device="cpu", when=_has_no_bf16)
_NO_FP16_AUTOCAST = note(_ON_CPU.words, device="cpu", when=_autocasts_fp16, becomes=_to_default)
_NO_PIPELINE = note("the model is not a pipeline")
_NO_NAN_CHECK = refuse("a NaN gradient would reach the weights; remove it")
_NO_MICS = refuse("removed from DeepSpeed; zero_hpz_partition_size took its place")
_SAVES_ITSELF = refuse("the run writes checkpoints itself; remove it")
_UNREAD = note("DeepSpeed does not read it")
_NO_CPU_OP = refuse("its op is for CUDA; remove it", stages=(3,), device="no ops")
_NO_AUTOEP = refuse("AutoEP does not know it at ZeRO stage 3; remove it", stages=(3,), experts=True)
_ONLY_1_2 = refuse("experts need true at ZeRO stages 1 and 2", stages=(1, 2), experts=True)
_NVME_EXPERTS = refuse("experts cannot be saved from nvme at ZeRO stage 3; offload to cpu", stages=(3,), experts=True,
                       when=_on_nvme)  # fmt: skip
_TORCH_SCHEDULER = refuse(
    "torch's schedulers refuse ZeRO's optimizer; use --schedule, or one of DeepSpeed's", stages=(1, 2, 3)
)
_NEEDS_A_SCRIPT = "DeepSpeed never did it without a script or a model written for it, and none is here"
_1_BIT = note("it is of 1-bit Adam", when=_is_adamw)
_TORCHS = note("it is how torch computes, not what; the run's AdamW is fused", when=_is_adamw)


def _rows(prefix: str, *rows: tuple[Any, ...]) -> list[Row]:
    """Rows of `(key, example, rule...)`."""
    return [Row(prefix + key, example, rules) for key, example, *found in rows for rules in (tuple(found),)]


def _removed(key: str, example: Any, instead: str, *off: Any) -> Row:
    return Row(key, example, (refuse(f"removed from DeepSpeed; {instead}"),), off)


def _optimizer(kind: str, *rules: Rule, **beside: Any) -> Row:
    return Row(f"optimizer.type={kind}", kind, (*rules, _LOSES_NAN), beside=beside)


# fmt: off
TABLE = (
    *_rows("", ("train_batch_size", 4), ("train_micro_batch_size_per_gpu", 2), ("gradient_accumulation_steps", 2),
           ("gradient_clipping", 1.0)),
    # Precision
    Row("amp", {"enabled": True}, (
        refuse(_NO_OVERFLOW.words, stages=(0,), experts=True, device="gpu"),
        note("removed from DeepSpeed; torch_autocast takes its place", becomes=_to_autocast),)),
    Row("bf16.enabled", True, (_TO_AUTOCAST,)),
    Row("bf16.immediate_grad_update", True, beside=_BF16),
    Row("bf16.check_grad_overflow=false", False, (_NO_NAN_CHECK,)),
    *(Row(f"bf16.{key}", True, (_ROUNDS,), beside=_BF16) for key in (
        "bf16_master_weights_and_grads", "bf16_optimizer_states")),
    Row("fp16.enabled", True, (
        _ON_CPU,
        _NO_OVERFLOW,
        _TO_AUTOCAST)),
    Row("fp16.auto_cast", True, (note("the inputs are whole numbers, which nothing casts"),)),
    *(Row(f"fp16.{key}", value, off=(value,)) for key, value in (
        ("loss_scale", 0), ("initial_scale_power", 16), ("loss_scale_window", 1000), ("hysteresis", 2),
        ("consecutive_hysteresis", False), ("min_loss_scale", 1))),
    Row("fp16.fp16_master_weights_and_grads", True, (_ROUNDS,)),
    *_rows("torch_autocast.", ("enabled", True), ("dtype", "float16", _NO_FP16_AUTOCAST),
           ("lower_precision_safe_modules", ["torch.nn.Linear"])),
    *_rows("data_types.", ("grad_accum_dtype", "fp32", note("ZeRO stage 0 adds up in float32", stages=(0,))),
           ("param_dtype", "fp32", refuse("--precision says it; remove it")), ("buffer_dtype", "fp32"),
           ("keep_in_fp32_modules", ["norm"])),
    # Gradients and their way between ranks
    *_rows("", ("communication_data_type", "fp32"),
           ("prescale_gradients", True, refuse(
               'needs "reduce_scatter": false in zero_optimization at ZeRO stages 2 and 3', stages=(2, 3),
               when=_reduce_scatters))),
    Row("gradient_predivide_factor", 2.0, (refuse(
        'needs "reduce_scatter": false in zero_optimization at ZeRO stages 2 and 3', stages=(2, 3),
        when=_reduce_scatters),), off=(1,)),
    Row("gradient_allreduce_op", "sum", (refuse("the loss is normalised for the mean over ranks; remove it"),),
        off=("mean",)),
    *_rows("", ("managed_gradient_accumulation=false", False, refuse(
        "the run follows DeepSpeed's own accumulation; remove it"))),
    *_rows("", ("disable_allgather", True, note("DeepSpeed's engine does not look at it"))),
    *_rows("", ("sparse_gradients", True, note("removed from DeepSpeed; the embedding's gradients are sent whole"))),
    # Optimizer and scheduler
    Row("optimizer.type=AdamW", "AdamW"), Row("optimizer.type=Adam", "Adam"), Row("optimizer.type=Muon", "Muon"),
    _optimizer("Adagrad", refuse(
        'DeepSpeed has it for offload alone; add "offload_optimizer": {"device": "cpu"} to zero_optimization, or use '
        "AdamW", when=_on_device)),
    _optimizer("Lion", refuse(
        'its op is for CUDA; add "offload_optimizer": {"device": "cpu"} to zero_optimization, or use AdamW',
        device="no ops", when=_on_device)),
    _optimizer("Lamb", refuse("its op is for CUDA; use AdamW", device="no ops")),
    *(_optimizer(kind, refuse("needs the package mup; pip install mup", package="mup"))
      for kind in ("MuAdam", "MuAdamW", "MuSGD")),
    *(_optimizer(kind, **_UNTESTED) for kind in (
        "SGD", "RMSprop", "Adadelta", "Adamax", "NAdam", "RAdam", "Adafactor")),
    *(Row(f"optimizer.type={kind}", kind, (refuse("it takes no weight_decay, which the run passes; use AdamW"),))
      for kind in ("Rprop", "LBFGS", "SparseAdam")),
    Row("optimizer.type=ASGD", "ASGD", (refuse("its state cannot be resumed on other ranks; use SGD or AdamW"),)),
    *(_removed(f"optimizer.type={kind}", kind, f"{plain} is the optimizer that it compresses") for kind, plain in (
        ("OneBitAdam", "AdamW"), ("ZeroOneAdam", "AdamW"), ("OneBitLamb", "Lamb"))),
    *_rows(
        "optimizer.", ("legacy_fusion", True, note("it is of an optimizer that this run does not build")),
        ("params.lr", 1e-3), ("params.betas", [0.9, 0.95]), ("params.eps", 1e-8), ("params.weight_decay", 0.1),
        ("params.adam_w_mode", True), ("params.torch_adam", True), ("params.fp32_optimizer_states", True),
        ("params.bias_correction=true", True, note("it is so anyway")),
        ("params.bias_correction=false", False, _LOSES_NAN),
        ("params.amsgrad", True, refuse("neither CPU Adam nor the run's AdamW has it; remove it", when=_is_adamw)),
        ("params.max_grad_norm", 1.0, note("it is gradient_clipping here", becomes=_to_clipping)),
        ("params.freeze_step", 100, _1_BIT), ("params.cuda_aware", True, _1_BIT),
        ("params.comm_backend_name", "nccl", _1_BIT), ("params.fused", True, _TORCHS),
        ("params.foreach", True, _TORCHS), ("params.capturable", True, _TORCHS),
        ("params.maximize", True, refuse("it would raise the loss; remove it"))),
    *(Row(f"optimizer.params.{key}", example, rules, beside=_MUON) for key, example, rules in (
        ("momentum", 0.95, ()), ("muon_lr", 0.02, ()), ("adam_lr", 5e-4, ()),
        ("ns_method", "gram", (note("it is how the same is computed"),)),
        ("per_head_muon", True, (refuse("the run's Muon takes whole matrices; remove it"),)))),
    *(Row(f"scheduler.type={kind}", kind, beside={"scheduler": {"params": params}}) for kind, params in (
        ("LRRangeTest", {}), ("OneCycle", {"cycle_min_lr": 1e-5, "cycle_max_lr": 1e-3}), ("WarmupLR", {}),
        ("WarmupDecayLR", {"total_num_steps": 10}), ("WarmupCosineLR", {"total_num_steps": 10}))),
    *(Row(f"scheduler.type={kind}", kind, (_TORCH_SCHEDULER,), beside={"scheduler": {"params": params}})
      for kind, params in (("StepLR", {"step_size": 2}), ("CosineAnnealingLR", {"T_max": 10}))),
    *_rows("", ("scheduler.type=ReduceLROnPlateau", "ReduceLROnPlateau", refuse(
        "it follows the evaluation loss, which DeepSpeed does not give it; use --schedule"))),
    *_rows("", ("zero_allow_untested_optimizer", True), ("zero_force_ds_cpu_optimizer", True)),
    # ZeRO
    Row("zero_optimization.offload_optimizer.super_offload", True, (
        refuse("its op is for CUDA; remove it", device="no ops"),
        refuse("it is of ZeRO stage 3; remove it", stages=(0, 1, 2))), beside=_OFFLOAD),
    Row("zero_optimization.offload_optimizer.ratio", 0.5, (
        note("a part stays on the device at ZeRO stage 3 alone", stages=(0, 1, 2)),), off=(1,), beside=_OFFLOAD),
    *_rows(
        "zero_optimization.", ("stage", 1), ("contiguous_gradients=false", False, _ONLY_1_2),
        ("reduce_scatter=false", False, _ONLY_1_2), ("reduce_bucket_size", 200_000_000),
        ("use_multi_rank_bucket_allreduce", True), ("allgather_partitions", True),
        ("allgather_bucket_size", 200_000_000), ("overlap_comm", True), ("load_from_fp32_weights", True),
        ("compute_grad_norm=false", False, _NO_NAN_CHECK),
        ("offload_optimizer", {"device": "cpu"}, _NVME_EXPERTS,
         note("every rank holds the whole optimizer at ZeRO stage 0", stages=(0,))),
        ("offload_param", {"device": "cpu"}, _NVME_EXPERTS,
         note("every rank holds the weights below ZeRO stage 3", stages=(0, 1, 2))),
        ("elastic_checkpoint", True, refuse(
            "what it saves can be loaded by nobody; remove it: a run resumes on other ranks by itself")),
        ("zenflow", {"topk_ratio": 0.1}, refuse(
            "its own state is in no checkpoint, so that a resumed run would differ; remove it")),
        ("sub_group_size", 1_000_000_000), ("stage3_prefetch_bucket_size", 50_000_000),
        ("stage3_param_persistence_threshold", 100_000), ("stage3_model_persistence_threshold", 1_000_000),
        ("stage3_max_live_parameters", 1_000_000_000), ("stage3_max_reuse_distance", 1_000_000_000),
        ("stage3_gather_16bit_weights_on_model_save", True), ("stage3_module_granularity_threshold", 100),
        ("stage3_use_all_reduce_for_fetch_params", True), ("stage3_allgather_sequential", True),
        ("ignore_unused_parameters", True), ("round_robin_gradients", True), ("parameter_alignment", True),
        ("legacy_stage1", True, refuse("removed from DeepSpeed; ZeRO stage 1 has one implementation; remove it")),
        ("zero_quantized_weights", True, _NO_CPU_OP, _NO_AUTOEP),
        ("zero_quantized_gradients", True, _NO_CPU_OP, _NO_AUTOEP),
        ("zero_quantized_nontrainable_weights", True, _NO_CPU_OP), ("memory_efficient_linear", True),
        ("pipeline_loading_checkpoint", True, _NO_PIPELINE), ("override_module_apply", True),
        ("log_trace_cache_warnings", True), ("enable_sanity_checks", True),
        ("save_muon_momentum_buffer_in_memory", True, note("the run's Muon is its own")),
        ("leaf_module", {"classes": ["DecoderLayer"]}), ("mics_hierarchical_params_gather", True, _NO_MICS),
        ("zeropp_loco_param", {"err_beta": 0.8}, refuse(
            "removed from DeepSpeed; zero_quantized_gradients works without it"))),
    Row("zero_optimization.zero_hpz_partition_size", 2, (_NO_AUTOEP,), off=(1,)),
    Row("zero_optimization.mics_shard_size", 2, (_NO_MICS,), off=(-1,)),
    Row("aio", {"block_size": 1_048_576}),
    # Experts
    Row("expert_parallel.enabled", True, (refuse("the model is dense; set --use-moe, or remove it", experts=False),)),
    Row("use_data_before_expert_parallelism", True, (refuse(
        "checkpoints are laid out for experts on neighbouring ranks; remove it", experts=True),)),
    # Watching
    *_rows(
        "", ("steps_per_print", 10), ("wall_clock_breakdown", True), ("memory_breakdown", True), ("dump_state", True),
        ("log_level", "info"), ("disable_python_gc", True), ("tensorboard", {"enabled": True}),
        ("csv_monitor", {"enabled": True}),
        ("wandb", {"enabled": True}, refuse(
            "needs the package wandb; pip install wandb, or remove it", package="wandb")),
        ("comet", {"enabled": True}, refuse(
            "needs the package comet_ml; pip install comet_ml, or remove it", package="comet_ml")),
        ("flops_profiler", {"enabled": True}), ("comms_logger", {"enabled": True}), ("timers", {"throughput": {}}),
        ("autotuning", {"enabled": True}, note("the autotuner works under DeepSpeed's own launcher alone")),
        ("log", {"steps_per_print": 1}, _UNREAD), ("comms_config", {"verbose": True}, _UNREAD),
        ("cuda_visible_devices", 0, note("set CUDA_VISIBLE_DEVICES in the environment")),
        ("monitor_config", {"tag": "x"}, _UNREAD)),
    # The run's own business
    *_rows(
        "checkpoint.", ("tag_validation", "Warn"), ("checkpoint_serialization", True),
        ("parallel_write", {"pipeline_stage": True}, _NO_PIPELINE), ("writer", {"type": "torch"}, _SAVES_ITSELF),
        ("use_node_local_storage", True, _SAVES_ITSELF), ("load_universal", True, _SAVES_ITSELF)),
    *_rows(
        "", ("compile.deepcompile", True, refuse("its op is for CUDA; use --compile", device="no ops")),
        *((f"compile.{key}", value, note("--compile compiles")) for key, value in (
            ("disable", True), ("backend", "inductor"), ("kwargs", {"mode": "default"}))),
        ("activation_checkpointing", {"partition_activations": True},
         note("the block does nothing by itself; --activation-checkpointing does it")),
        ("dataloader_drop_last", True, note("the run has its own loader, and no partial batches")),
        ("data_efficiency", {"enabled": True}, note("the run has its own loader and layers, which do not look at it")),
        ("datastates_ckpt", {"enabled": True}, _SAVES_ITSELF), ("vocabulary_size", 6400, note("the model says it")),
        ("hybrid_engine", {"enabled": True}, refuse("it serves generation inside reinforcement learning; remove it")),
        ("weight_quantization", {"enabled": True}, refuse("the run does not quantise weights; remove it"))),
    Row("sequence_parallel_size", 2, off=(0, 1)),
    Row("pipe-parallel-size", 2, (refuse("the model has no pipeline parallelism; remove it"),), off=(0, 1)),
    Row("model-parallel-size", 2, (refuse("--tp-size shares layers; remove it"),), off=(0, 1)),
    # One rank, as more need an ep_size beside experts.
    *_rows("", ("tensor_parallel.autotp_size", 1), ("tensor_parallel.tp_overlap_comm", True),
           ("seq_parallel_communication_data_type", "fp32", note(
               "ranks that share sequences average gradients as others do: communication_data_type")),
           ("pipeline", {"stages": 2}, _NO_PIPELINE)),
    # Gone from DeepSpeed
    *_rows("", *((key, example, note(f"removed from DeepSpeed; {_NEEDS_A_SCRIPT}")) for key, example in (
               ("compression_training", {"layer_reduction": {"enabled": True}}),
               ("curriculum_learning", {"enabled": True}), ("progressive_layer_drop", {"enabled": True})))),
    Row("sparse_attention", {"mode": "fixed"}, (note(f"removed from DeepSpeed; {_NEEDS_A_SCRIPT}"),),
        off=({"mode": "dense"},)),
    *(_removed(key, example, instead) for key, example, instead in (
        ("quantize_training", {"enabled": True}, "the model would train unquantised; remove it"),
        ("eigenvalue", {"enabled": True}, "it was for quantize_training, which is gone too; remove it"),
        ("elasticity", {"enabled": True}, "a run resumes on another number of ranks by itself; remove it"),
        ("nebula", {"enabled": True}, "--async-save writes checkpoints beside training; remove it"),
        ("graph_harvesting", True, "--compile captures graphs; remove it"))),
)
# fmt: on
"""Every row, in the order of the documentation."""
SECTIONS = frozenset(re.split(r"[.=]", row.key)[0] for row in TABLE) | {"optimizer", "scheduler"}
# DeepSpeed reads these by name and says nothing of a name that it does not know; other sections it checks itself.
_NAMES = {
    section: sorted({re.split(r"[.=]", row.key)[1] for row in TABLE if row.key.startswith(f"{section}.")} | more)
    for section, more in (
        ("data_types", set()), ("checkpoint", set()), ("torch_autocast", set()), ("optimizer", {"params"}),
        ("scheduler", {"params"}),
    )
}  # fmt: skip
_PARAMS = [row for row in TABLE if row.key.startswith("optimizer.params.")]
_MUON_PARAMS = sorted(re.split(r"[.=]", row.key)[2] for row in _PARAMS)
_ADAMW_PARAMS = sorted(re.split(r"[.=]", row.key)[2] for row in _PARAMS if not row.beside)


def settle_table(ds: Section, *, experts: bool, device: str) -> list[str]:
    """Take out of the JSON, in place, what asks for nothing or does nothing here; a note for each.

    Raises:
        UserError: what is unknown, or cannot be done: the key, and what to do instead.
    """
    notes = _pass_over_neox(ds)
    _check_names(ds)
    stage = zero_stage(ds)
    for row in TABLE:
        found = _find(ds, row.key)
        if found is None:
            continue
        section, key = found
        rule = next((rule for rule in row.rules if rule.applies(ds, stage, experts, device)), None)
        if rule is None:
            continue
        name = row.key.replace("=", " ")
        if row.is_off(section[key]):
            if rule.becomes is not _stays and (rule.verdict == "note" or rule.stages == STAGES):
                notes += [f"{name}: off, passed over"] if isinstance(section[key], dict) else []
                del section[key]
        elif rule.verdict == "refused":
            raise UserError(f"DeepSpeed config: {name}: {rule.words}")
        elif rule.becomes is not None:
            notes.append(f"{name}: {rule.words}")
            rule.becomes(ds)
        else:
            notes.append(f"{name}: passed over; {rule.words}")
            del section[key]
    return notes


def _find(ds: Section, key: str) -> tuple[Section, str] | None:
    """The section that holds a row's key, and the key in it; None where the JSON does not say it."""
    path, _, value = key.partition("=")
    *outer, name = path.split(".")
    for part in outer:
        ds = ds.get(part) or {}
        if not isinstance(ds, dict) or ds.get("enabled") is False:
            return None
    if name not in ds or (value and str(ds[name]).lower() != value.lower()):
        return None
    return ds, name


def _check_names(ds: Section) -> None:
    for key in ds:
        if key not in SECTIONS:
            raise UserError(f"DeepSpeed config: unknown section '{key}'{nearest(key, sorted(SECTIONS))}")
    for section, known in _NAMES.items():
        for key in ds.get(section) or {}:
            if key not in known:
                raise UserError(f"DeepSpeed config: {section}: unknown field '{key}'{nearest(key, known)}")
    kind = optimizer_name(ds)
    params = _MUON_PARAMS if kind == "muon" else _ADAMW_PARAMS
    for key in ds.get("optimizer", {}).get("params") or {}:
        if key not in params and kind != "deepspeed":  # DeepSpeed and torch say themselves what theirs take
            raise UserError(f"DeepSpeed config: optimizer.params: unknown field '{key}'{nearest(key, params)}")


def _pass_over_neox(ds: Section) -> list[str]:
    """gpt-neox keeps the whole run in its file: what is not DeepSpeed's is said by flags here."""
    sizes = [key for key in ds if key.replace("_", "-") in ("pipe-parallel-size", "model-parallel-size")]
    for key in sizes:
        ds[key.replace("_", "-")] = ds.pop(key)
    foreign = [key for key in ds if key not in SECTIONS] if sizes else []
    for key in foreign:
        del ds[key]
    return [f"{', '.join(foreign)}: gpt-neox's, passed over; the run's own flags say it"] if foreign else []
