"""DeepSpeed files of the kinds that projects publish: how each is read, and how many start."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_deepspeed_table import resolve

from minimind.config.deepspeed_file import load_ds_config
from minimind.config.resolve import resolve_run
from minimind.config.run_config import RunConfig, TrainConfig
from minimind.errors import UserError

AUTO_BATCH = dict.fromkeys(
    ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"
)
AUTO_ADAM = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}
SCALES = {"loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1}
BUCKETS = {"allgather_bucket_size": 2e8, "reduce_bucket_size": "auto", "overlap_comm": True, "reduce_scatter": True}
STAGE3 = {"stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto", "sub_group_size": 1e9,
          "stage3_max_live_parameters": 1e9, "stage3_gather_16bit_weights_on_model_save": True}  # fmt: skip
CPU = {"device": "cpu", "pin_memory": True}
WARMUP = dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto")
OFF = {"enabled": False}


def trainer(stage: int, *, zero: Any = (), **more: Any) -> dict[str, Any]:
    """As trainers write it that fill in "auto" themselves."""
    sections = {"fp16": {"enabled": "auto", **SCALES}, "bf16": {"enabled": "auto"}, "gradient_clipping": "auto"}
    return {**AUTO_BATCH, **sections, "zero_optimization": {"stage": stage, **BUCKETS, **dict(zero)}, **more}


def engine(stage: int | None, batch: int, *, zero: Any = (), **more: Any) -> dict[str, Any]:
    """As examples of DeepSpeed itself write it."""
    zero_section = {} if stage is None else {"zero_optimization": {"stage": stage, **dict(zero)}}
    return {"train_batch_size": batch, "steps_per_print": 10, "gradient_clipping": 1.0, **zero_section, **more}


def adam(kind: str = "Adam", **params: Any) -> dict[str, Any]:
    return {"type": kind, "params": {"lr": 1e-4, "weight_decay": 0.01, **params}}


FP16 = {"enabled": True, **SCALES}
DECAY = {**WARMUP, "total_num_steps": "auto"}
STARTS: dict[str, dict[str, Any]] = {
    **{f"trainer, stage {stage}": trainer(stage, zero=STAGE3 if stage == 3 else {}) for stage in range(4)},
    "trainer, stage 2, offload": trainer(2, zero={"offload_optimizer": CPU}),
    "trainer, stage 3, offload": trainer(3, zero={**STAGE3, "offload_optimizer": CPU, "offload_param": CPU}),
    "offload to none": trainer(3, zero={"offload_optimizer": {"device": "none"}, "offload_param": {"device": "none"}}),
    "trainer, auto AdamW": trainer(3, optimizer=AUTO_ADAM),
    "auto WarmupLR": trainer(2, optimizer=AUTO_ADAM, scheduler={"type": "WarmupLR", "params": WARMUP}),
    "auto WarmupDecayLR": trainer(3, optimizer=AUTO_ADAM, scheduler={"type": "WarmupDecayLR", "params": DECAY}),
    "auto WarmupCosineLR": trainer(1, scheduler={"type": "WarmupCosineLR", "params": DECAY}),
    "own WarmupLR": engine(1, 8, optimizer=adam(), scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 5}}),
    "bf16 on": trainer(2, bf16={"enabled": True}),
    "stage 0, bf16 on": trainer(0, bf16={"enabled": True}),
    "stage 0, fp16 on": engine(0, 8, fp16=FP16),
    "no ZeRO, fp16 on": engine(None, 8, fp16=FP16, optimizer=adam()),
    "stage 0, torch_autocast": engine(0, 8, torch_autocast={"enabled": True, "dtype": "torch.bfloat16"}),
    "amp": engine(1, 8, amp={"enabled": True, "opt_level": "O1"}),
    "amp, auto": trainer(2, amp={"enabled": "auto", "opt_level": "auto"}),
    "bfloat16": engine(1, 8, bfloat16={"enabled": True}),
    "bias_correction": engine(1, 8, fp16=FP16, optimizer=adam(bias_correction=True)),
    "torch_adam, adam_w_mode": engine(2, 8, optimizer=adam(torch_adam=True, adam_w_mode=True)),
    "max_grad_norm": engine(1, 8, optimizer=adam(max_grad_norm=1.0)),
    "amsgrad off": engine(1, 8, optimizer=adam("AdamW", amsgrad=False, fused=True)),
    "L2 Adam": engine(1, 8, optimizer=adam(adam_w_mode=False)),
    "one-bit left-overs": engine(1, 8, optimizer=adam(freeze_step=100, cuda_aware=False, comm_backend_name="nccl")),
    "SGD": engine(2, 8, optimizer=adam("SGD"), zero_allow_untested_optimizer=True),
    "cpu_offload": engine(2, 8, optimizer=adam(), zero={"cpu_offload": True, "cpu_offload_use_pin_memory": True}),
    "cpu_offload off": engine(2, 8, zero={"cpu_offload": False}),
    "cpu_offload_params": engine(3, 8, zero={"cpu_offload": True, "cpu_offload_params": True}),
    "gather_fp16": engine(3, 8, zero={"stage3_gather_fp16_weights_on_model_save": True}),
    "ZeRO as a switch": {**engine(None, 8), "zero_optimization": True, "allgather_size": 5e8},
    "quoted numbers": {
        **engine(2, 8), "train_batch_size": "8", "gradient_clipping": "1.0", "wall_clock_breakdown": "false"},
    "comments": {"_comment": "ours", **engine(1, 8, zero={"//": "small", "reduce_bucket_size": 1e6}), "comment": "x"},
    "activation_checkpointing": engine(2, 8, activation_checkpointing={"partition_activations": True}),
    "everything off": engine(1, 8, **dict.fromkeys(
        ("compression_training", "autotuning", "data_efficiency", "curriculum_learning", "elasticity", "nebula",
         "hybrid_engine", "progressive_layer_drop", "eigenvalue", "quantize_training", "flops_profiler"), OFF),
        sparse_attention={"mode": "dense"}, sparse_gradients=False),
    "autotuning": engine(None, 8, autotuning={"enabled": True, "fast": True}),
    "random-LTD": engine(1, 8, data_efficiency={"enabled": True, "data_routing": {"enabled": True}}),
    "pre-scaled": engine(1, 8, prescale_gradients=True, fp16=FP16),
    "gpt-neox": {**engine(1, 8, optimizer=adam()), "pipe-parallel-size": 1, "model-parallel-size": 1, "num-layers": 12,
                 "train-iters": 1000},
    "gpt-neox, no pipe": {**engine(0, 8), "pipe_parallel_size": 0, "split": "949,50,1"},
    "hpZ of another node": engine(3, 8, zero={"zero_hpz_partition_size": 16}),
    "old compile block": engine(2, 8, compile={"disable": False, "backend": "inductor"}),
    "one tensor rank": engine(1, 8, tensor_parallel={"autotp_size": 1}, sequence_parallel_size=1),
    "two tensor ranks": trainer(2, tensor_parallel={"autotp_size": 2}),
    "watched": engine(1, 8, flops_profiler={"enabled": True, "profile_step": 2}, comms_logger={"enabled": True}),
    "communication": engine(2, 8, communication_data_type="fp32", zero={"round_robin_gradients": True}),
    "pipeline": engine(1, 8, pipeline={"seed_layers": True, "activation_checkpoint_interval": 1}),
    "offload below its stage": engine(2, 8, zero={"offload_param": CPU}),
    "logged attributes": engine(1, 8, log={"steps_per_print": 50}, comms_config={}, monitor_config={}),
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "one-bit Adam": (engine(None, 8, optimizer=adam("OnebitAdam")), "AdamW is the optimizer that it compresses"),
    "elasticity": (engine(1, 8, elasticity={"enabled": True}), "resumes on another number of ranks"),
    "MoQ": (engine(1, 8, quantize_training={"enabled": True}), "would train unquantised"),
    "pipeline parallel": ({"pipe-parallel-size": 4, "num-layers": 12}, "no pipeline parallelism"),
    "OneCycle, auto": (trainer(1, scheduler={"type": "OneCycle", "params": {"cycle_min_lr": "auto"}}), '"auto"'),
    "another warm-up": (
        trainer(1, scheduler={"type": "WarmupLR", "params": {**WARMUP, "warmup_min_lr": 1e-5}}), "begins at 0"),
    "a batch of other ranks": (
        {**engine(2, 256), "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 8},
        "or pass --micro-batch-size 4 --global-batch-size 256",
    ),
}  # fmt: skip


def through_a_file(ds: dict[str, Any], folder: Path) -> dict[str, Any]:
    path = folder / "ds.json"
    path.write_text(json.dumps(ds))
    return load_ds_config(path)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", STARTS)
def test_it_starts(kind, device, tmp_path):
    resolved = resolve(through_a_file(STARTS[kind], tmp_path), device=device)
    # What was decided can be given again, and is read without a note.
    again = resolve_run(resolved.run, resolved.ds, world_size=2, device_type=device, bf16_supported=True)
    assert again.run == resolved.run and again.ds == resolved.ds


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", REFUSED)
def test_it_is_refused(kind, device, tmp_path):
    ds, words = REFUSED[kind]
    with pytest.raises(UserError) as error:
        resolve(through_a_file(ds, tmp_path), device=device)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "device", "said"),
    [
        ("auto WarmupDecayLR", "cpu", 'scheduler WarmupDecayLR with "auto": the run\'s own schedule linear'),
        ("stage 0, bf16 on", "cuda", "bf16.enabled: torch_autocast takes its place at ZeRO stage 0"),
        ("stage 0, fp16 on", "cpu", "fp16.enabled: passed over; fp16 does not run on a CPU"),
        ("max_grad_norm", "cpu", "optimizer.params.max_grad_norm: it is gradient_clipping here"),
        ("cpu_offload", "cpu", "zero_optimization.cpu_offload: an old name of offload_optimizer"),
        ("quoted numbers", "cpu", "train_batch_size, gradient_clipping, wall_clock_breakdown: in quotes"),
        ("comments", "cpu", "_comment, zero_optimization.//, comment: comments, passed over"),
        ("gpt-neox", "cpu", "num-layers, train-iters: gpt-neox's, passed over"),
        ("hpZ of another node", "cuda", "zero_hpz_partition_size 16: 2, the ranks of a node here"),
        ("everything off", "cpu", "compression_training: off, passed over"),
    ],
)
def test_a_note_says_what_was_made_of_it(kind, device, said):
    assert any(note.startswith(said) for note in resolve(STARTS[kind], device=device).notes)


def test_what_was_made_of_it_is_right():
    decay = resolve(STARTS["auto WarmupDecayLR"]).train
    assert (decay.schedule, decay.min_lr_ratio, decay.lr) == ("linear", 0.0, 5e-4)
    assert resolve(STARTS["auto WarmupLR"]).train.schedule == "constant"
    stage0 = resolve(STARTS["stage 0, bf16 on"], device="cuda")
    assert stage0.zero.autocast and stage0.zero.weights == "fp32" and stage0.train.precision == "bf16"
    assert resolve(STARTS["amp"], device="cuda").train.precision == "fp16"
    offloaded = resolve(STARTS["cpu_offload_params"]).zero
    assert (offloaded.offload_optimizer, offloaded.offload_param) == ("cpu", "cpu")
    quoted = resolve(STARTS["quoted numbers"])
    assert (quoted.train.global_batch_size, quoted.train.max_grad_norm) == (8, 1.0)
    assert quoted.ds["wall_clock_breakdown"] is False


def test_explicit_values_beside_auto_are_the_runs():
    params = {"warmup_min_lr": 0, "warmup_max_lr": 2e-4, "warmup_num_steps": 3, "total_num_steps": "auto"}
    train = resolve(trainer(1, scheduler={"type": "WarmupDecayLR", "params": params})).train
    assert (train.schedule, train.lr, train.warmup_steps) == ("linear", 2e-4, 3)


def test_batch_figures_give_way_to_flags():
    ds = {**engine(2, 256), "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 8}
    run = RunConfig(train=TrainConfig(micro_batch_size=3, global_batch_size=12))
    resolved = resolve_run(run, ds, world_size=2)
    train = resolved.train
    assert (train.micro_batch_size, train.gradient_accumulation_steps, train.global_batch_size) == (3, 2, 12)
    assert sum("gives way to the flags" in note for note in resolved.notes) == 3
    kept = resolve_run(RunConfig(train=TrainConfig(micro_batch_size=8)), ds, world_size=2)
    assert kept.train.global_batch_size == 256 and kept.train.gradient_accumulation_steps == 16


TEMPLATE = """{
  // filled in by a script
  "train_batch_size": GBSIZE,
  "train_micro_batch_size_per_gpu": MB_SIZE,
  "steps_per_print": LOG_INTERVAL,
  "zero_optimization": {"stage": ${zero_stage}},
  "fp16": {"enabled": CONFIG_FP16_ENABLED, "loss_scale": 0},
  "curriculum_learning": {"enabled": CL_ENABLED, "min_difficulty": CL_1st_MIN},
}"""


def test_a_template_is_read_with_auto_in_its_gaps(tmp_path):
    path = tmp_path / "template.json"
    path.write_text(TEMPLATE)
    resolved = resolve(load_ds_config(path))
    assert (resolved.zero.stage, resolved.train.micro_batch_size) == (0, 8)
    assert resolved.notes[0].startswith("train_batch_size, train_micro_batch_size_per_gpu, steps_per_print")
    assert 'words to be replaced, taken as "auto"' in resolved.notes[0]
    path.write_text(TEMPLATE.replace("{", "", 1))
    with pytest.raises(UserError, match=r"line \d+ column"):
        load_ds_config(path)
