"""DeepSpeed's JSON beside the run: who decides what, and what is refused before anything starts."""

import copy
import json
import re
from typing import Any

import pytest
from pytest import approx
from repository import ROOT

from minimind.config.deepspeed_file import load_ds_config
from minimind.config.resolve import DEFAULTS, resolve_run, zero_stage
from minimind.config.resolved_run import ResolvedRun
from minimind.config.run_config import DataConfig, RunConfig, TrainConfig
from minimind.errors import UserError
from minimind.model.config import ModelConfig
from minimind.parallel.deepspeed_check import check_ds_config

FILES = sorted((ROOT / "ds_configs").glob("*.json"))
STAGE_1 = {"zero_optimization": {"stage": 1}}


def resolve(ds: dict[str, Any], *, world_size: int = 1, **train: Any) -> ResolvedRun:
    """As the command does it, on a CPU unless told."""
    device = {name: train.pop(name) for name in ("device_type", "bf16_supported", "local_world_size") if name in train}
    before = copy.deepcopy(ds)
    resolved = resolve_run(RunConfig(train=TrainConfig(**train)), ds, world_size=world_size, **device)
    assert ds == before, "the user's own mapping was touched"
    check_ds_config(resolved.ds)
    return resolved


def refusal(ds: dict[str, Any], **train: Any) -> str:
    with pytest.raises(UserError) as error:
        resolve(ds, **train)
    assert "\n" not in str(error.value)
    return str(error.value)


# (field of the run, another value, section of the JSON, key, its value there)
OVERLAPS = [
    ("micro_batch_size", 4, (), "train_micro_batch_size_per_gpu", 2),
    ("gradient_accumulation_steps", 2, (), "gradient_accumulation_steps", 3),
    ("global_batch_size", 16, (), "train_batch_size", 24),
    ("max_grad_norm", 0.5, (), "gradient_clipping", 2.0),
    ("lr", 1e-4, ("optimizer", "params"), "lr", 2e-4),
    ("betas", (0.8, 0.9), ("optimizer", "params"), "betas", [0.7, 0.9]),
    ("eps", 1e-6, ("optimizer", "params"), "eps", 1e-7),
    ("weight_decay", 0.0, ("optimizer", "params"), "weight_decay", 0.2),
]


def at(ds: dict[str, Any], path: tuple[str, ...], key: str) -> Any:
    for name in path:
        ds = ds[name]
    return ds[key]


def with_value(path: tuple[str, ...], key: str, value: Any) -> dict[str, Any]:
    section: dict[str, Any] = {key: value}
    for name in reversed(path):
        section = {name: section}
    return {**STAGE_1, **section}


@pytest.mark.parametrize(("name", "ours", "path", "key", "theirs"), OVERLAPS)
def test_the_four_lines_of_the_table(name, ours, path, key, theirs):
    def there(value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    # set | "auto" or absent -> ours
    for ds in (STAGE_1, with_value(path, key, "auto")):
        resolved = resolve(ds, **{name: ours})
        assert getattr(resolved.train, name) == ours and there(at(resolved.ds, path, key)) == ours
    # unset | explicit -> theirs, read back
    resolved = resolve(with_value(path, key, theirs))
    assert getattr(resolved.train, name) == there(theirs) and at(resolved.ds, path, key) == theirs
    # unset | "auto" or absent -> the documented default
    for ds in (STAGE_1, with_value(path, key, "auto")):
        resolved = resolve(ds, optimizer="adamw")
        default = DEFAULTS.get(name, {"micro_batch_size": 8, "global_batch_size": 8}.get(name, 1))
        assert getattr(resolved.train, name) == default and there(at(resolved.ds, path, key)) == default
    # equal on both sides is no disagreement; different is one
    equal = list(ours) if isinstance(ours, tuple) else ours
    assert getattr(resolve(with_value(path, key, equal), **{name: ours}).run.train, name) == ours
    shown = ".".join((*path, key))
    if "batch" in name or "accumulation" in name:  # batch figures give way
        resolved = resolve(with_value(path, key, theirs), **{name: ours})
        assert getattr(resolved.train, name) == ours and f"{shown} {theirs} of the DeepSpeed" in resolved.notes[0]
        return
    words = refusal(with_value(path, key, theirs), **{name: ours})
    assert f"{name} is {ours} in the run and {theirs} as {shown} in the DeepSpeed config" in words
    assert '"auto"' in words


def test_every_disagreement_is_listed_at_once():
    ds = {**STAGE_1, "gradient_clipping": 2.0, "optimizer": {"type": "Muon", "params": {"lr": 1.0, "eps": 1e-3}}}
    words = refusal(ds, lr=0.5, eps=1e-6, max_grad_norm=1.0, optimizer="adamw")
    for part in ("lr is 0.5", "eps is 1e-06", "max_grad_norm is 1.0", "optimizer is adamw in the run and muon"):
        assert part in words


@pytest.mark.parametrize(
    ("run", "json_", "world", "expected"),
    [
        ({}, {}, 3, (8, 24, 1)),
        ({"global_batch_size": 16}, {}, 2, (8, 16, 1)),
        ({"global_batch_size": 48}, {}, 2, (8, 48, 3)),
        ({"global_batch_size": 12}, {}, 2, (6, 12, 1)),
        ({"global_batch_size": 26}, {}, 2, (1, 26, 13)),
        ({"global_batch_size": 16, "micro_batch_size": 2}, {}, 2, (2, 16, 4)),
        ({"global_batch_size": 16}, {"gradient_accumulation_steps": 2}, 2, (4, 16, 2)),
        ({"micro_batch_size": 3}, {"gradient_accumulation_steps": 2}, 2, (3, 12, 2)),
        ({"micro_batch_size": 3}, {"train_batch_size": 12, "gradient_accumulation_steps": 2}, 2, (3, 12, 2)),
    ],
)
def test_two_batch_figures_give_the_third(run, json_, world, expected):
    train = resolve({**STAGE_1, **json_}, world_size=world, **run).run.train
    assert (train.micro_batch_size, train.global_batch_size, train.gradient_accumulation_steps) == expected


@pytest.mark.parametrize(
    ("run", "json_", "world", "words"),
    [
        ({"global_batch_size": 12}, {}, 5, "12 is no multiple of 5 (5 ranks x accumulation 1); nearest: 10 or 15"),
        ({"global_batch_size": 3}, {}, 5, "nearest: 5"),
        ({"global_batch_size": 12, "micro_batch_size": 5}, {}, 1, "(micro batch 5 x 1 ranks); nearest: 10 or 15"),
        (
            {"global_batch_size": 16, "micro_batch_size": 4, "gradient_accumulation_steps": 3}, {}, 2,
            "gradient_accumulation_steps is 3, but global_batch_size 16 / (micro_batch_size 4 x 2 ranks) is 2",
        ),
        ({}, {"train_batch_size": 12.5}, 1, "global_batch_size: 12.5 is not an integer"),
        ({}, {"train_batch_size": "twelve"}, 1, "global_batch_size: 'twelve' is not an integer"),
        ({}, {"train_batch_size": 12}, 5, "or pass --micro-batch-size 2 --global-batch-size 10: the file gives way"),
        ({}, {"train_micro_batch_size_per_gpu": True}, 1, "micro_batch_size: True is not a finite number of 1 or more"),
        ({}, {"gradient_accumulation_steps": 0}, 1, "gradient_accumulation_steps: 0 is not"),
    ],
)  # fmt: skip
def test_batches_that_do_not_divide(run, json_, world, words):
    assert words in refusal({**STAGE_1, **json_}, world_size=world, **run)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_shipped_file_serves_every_precision_and_batch(path, precision):
    ds = load_ds_config(path)
    resolved = resolve(
        ds, world_size=4, local_world_size=2, device_type="cuda", precision=precision, micro_batch_size=2, lr=3e-4,
        global_batch_size=16, max_grad_norm=0.7,
    )  # fmt: skip
    text = json.dumps(resolved.ds)
    assert "auto" not in re.findall(r'"([^"]*)"', text), "an auto reached DeepSpeed"
    assert resolved.notes == ()
    assert resolved.ds["train_batch_size"] == 16 and resolved.ds["gradient_accumulation_steps"] == 2
    assert resolved.ds["optimizer"]["params"]["lr"] == 3e-4
    stage = int(re.match(r"zero(\d)", path.stem)[1])  # type: ignore[index]
    assert resolved.zero.stage == stage
    if stage == 0:
        dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(precision)
        assert resolved.ds.get("torch_autocast", {}).get("dtype") == dtype
        assert not {"bf16", "fp16"} & set(resolved.ds)
    else:
        assert resolved.ds["data_types"]["grad_accum_dtype"] == "fp32"
        assert {key: resolved.ds[key]["enabled"] for key in ("bf16", "fp16")} == {
            "bf16": precision == "bf16",
            "fp16": precision == "fp16",
        }


def test_shipped_files_are_the_ones_promised_and_hpz_follows_the_node():
    names = {"zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "zero3_hpz", "zero3_nvme"}
    assert names | {"zero2_muon"} <= {path.stem for path in FILES}
    hpz = load_ds_config(FILES[0].with_name("zero3_hpz.json"))
    resolved = resolve(hpz, world_size=8, local_world_size=4)
    assert resolved.ds["zero_optimization"]["zero_hpz_partition_size"] == 4


def test_the_default_precision_is_what_the_device_has():
    assert resolve(STAGE_1).run.train.precision == "fp32"
    assert resolve(STAGE_1, device_type="cuda", bf16_supported=True).run.train.precision == "bf16"
    assert resolve(STAGE_1, device_type="cuda", bf16_supported=False).run.train.precision == "fp16"
    assert resolve(STAGE_1, device_type="cpu", bf16_supported=True).run.train.precision == "fp32"
    assert resolve({**STAGE_1, "bf16": {"enabled": True}}).run.train.precision == "bf16"
    # What DeepSpeed itself does with an explicit "off".
    off = {**STAGE_1, "bf16": {"enabled": False}}
    assert resolve(off, device_type="cuda", bf16_supported=True).run.train.precision == "fp32"


def test_a_gpu_is_read_less_often():
    gpu = resolve(load_ds_config(None), device_type="cuda", bf16_supported=True, world_size=8)
    assert (gpu.train.log_every, resolve(STAGE_1).train.log_every, resolve(STAGE_1, log_every=3).train.log_every) == (
        10, 1, 3,
    )  # fmt: skip
    assert gpu.zero.immediate_grad_update and not gpu.notes


@pytest.mark.parametrize(
    ("sections", "carrier"),
    [
        ({}, "bf16"),
        ({"bf16": {"enabled": "auto"}, "torch_autocast": {"enabled": False}}, "bf16"),
        ({"bf16": {"enabled": True}, "torch_autocast": {"enabled": "auto"}}, "bf16"),
        ({"torch_autocast": {"enabled": "auto"}}, "torch_autocast"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast"),
        ({"fp16": {"enabled": False}}, "bf16"),
    ],
)
def test_an_explicit_block_carries_the_precision(sections, carrier):
    ds = resolve({**STAGE_1, **sections}, precision="bf16").ds
    enabled = {key for key in ("bf16", "fp16", "torch_autocast") if ds.get(key, {}).get("enabled")}
    assert enabled == {carrier}


def test_the_optimizer_and_the_schedule_of_the_json_are_read_back():
    adamw = resolve({**STAGE_1, "optimizer": {"type": "Adam", "params": {"lr": 0.1}}})
    assert (adamw.run.train.optimizer, adamw.run.train.lr, adamw.run.train.betas) == ("adamw", 0.1, (0.9, 0.95))
    for params, flags, rates in (
        ({}, {}, (2.56 / 768, 0.02)), ({"lr": 0.01}, {}, (0.01, 0.01)), ({"lr": 0.01}, {"muon_lr": 0.1}, (0.01, 0.1)),
        ({"lr": 0.01, "adam_lr": 0.002}, {}, (0.002, 0.01)), ({"lr": "auto", "muon_lr": 0.03}, {}, (2.56 / 768, 0.03)),
    ):  # fmt: skip
        muon = resolve({**STAGE_1, "optimizer": {"type": "Muon", "params": params}}, **flags)
        assert (muon.train.optimizer, muon.train.lr, muon.train.muon_lr) == ("muon", *map(approx, rates))
        assert muon.ds["optimizer"]["params"]["muon_lr"] == rates[1]
    assert adamw.train.muon_lr is None and "muon_lr" not in adamw.ds["optimizer"]["params"]
    lion = {**STAGE_1, "optimizer": {"type": "Lion", "params": {"lr": 0.1}}}
    other = resolve(lion, device_type="cuda").ds["optimizer"]
    assert other == {"type": "Lion", "params": {"lr": 0.1, "weight_decay": 0.1}}, "what Lion does not take was added"
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}
    resolved = resolve({**STAGE_1, "scheduler": scheduler})
    assert resolved.train.schedule == "deepspeed" and resolved.ds["scheduler"] == scheduler
    assert "scheduler" not in resolve({**STAGE_1, "scheduler": {"type": "auto"}}).ds


OFFLOADED = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize(
    ("ds", "train", "optimizer"),
    [
        (STAGE_1, {}, "muon"), (STAGE_1, {"objective": "distill", "teacher": "runs/t"}, "muon"),
        ({**STAGE_1, "optimizer": {"type": "auto", "params": {"lr": "auto"}}}, {}, "muon"),
        ({**STAGE_1, "optimizer": {"params": {"lr": 1e-3}}}, {}, "adamw"),
        ({**STAGE_1, "scheduler": {"type": "WarmupLR"}}, {}, "adamw"), (OFFLOADED, {}, "adamw"),
        (STAGE_1, {"init_from": "runs/t"}, "adamw"), (STAGE_1, {"init_from": "runs/t", "objective": "dpo"}, "adamw"),
        (STAGE_1, {"init_from": "runs/t", "lora_rank": 4}, "adamw"),
        (STAGE_1, {"init_from": "runs/t", "optimizer": "muon"}, "muon"),
    ],
)  # fmt: skip
def test_fresh_weights_begin_with_muon_where_nothing_says_otherwise(ds, train, optimizer):
    assert resolve(ds, **train).train.optimizer == optimizer


def test_ranks_that_share_layers_begin_as_others_do():
    assert resolve(STAGE_1, world_size=2, tp_size=2).train.optimizer == "muon"


@pytest.mark.parametrize("hidden_size", [64, 256, 768])
def test_rates_keep_their_meaning_over_width(hidden_size):
    def rates(tied: bool, **train: Any) -> tuple[float | None, ...]:
        model = ModelConfig(hidden_size=hidden_size, num_attention_heads=4, tie_word_embeddings=tied)
        train = resolve_run(RunConfig(model=model, train=TrainConfig(**train)), STAGE_1, world_size=1).train
        return train.muon_lr, train.lr, train.embedding_lr, train.norm_lr

    output = 1e-2 * 256 / hidden_size
    assert rates(True) == approx((0.02, output, None, 1e-2)) and rates(False) == approx((0.02, output, 1e-2, 1e-2))
    assert rates(False, lr=3e-3) == (0.02, 3e-3, 3e-3, 3e-3), "a rate that is given is that of all but Muon's"
    assert rates(False, lr=3e-3, norm_lr=1e-4, muon_lr=0.1, embedding_lr=1e-5) == (0.1, 3e-3, 1e-5, 1e-4)
    assert rates(True, optimizer="adamw") == (None, 5e-4, None, None)
    betas = [resolve(STAGE_1, **train).train.betas for train in ({}, {"optimizer": "adamw"}, {"betas": (0.9, 0.99)})]
    assert betas == [(0.8, 0.95), (0.9, 0.95), (0.9, 0.99)]


def test_other_autos_go_and_are_told():
    zero = {"stage": 2, "allgather_bucket_size": "auto"}
    resolved = resolve({"zero_optimization": zero, "aio": {"block_size": "auto"}})
    assert "allgather_bucket_size" not in resolved.ds["zero_optimization"] and resolved.ds["aio"] == {}
    assert len(resolved.notes) == 2 and "zero_optimization.allgather_bucket_size" in resolved.notes[0]
    told = resolve({**STAGE_1, "bf16": {"enabled": True}}, gradient_accumulation_steps=2).notes
    assert "accumulate in bf16" in told[0]
    bf16 = {**STAGE_1, "bf16": {"enabled": True}}
    assert "gradients of 512 ranks are summed in bf16" in resolve(bf16, world_size=512).notes[0]
    assert resolve(bf16, world_size=64).notes == ()
    assert resolve({**bf16, "communication_data_type": "fp32"}, world_size=512).notes == ()


@pytest.mark.parametrize(
    ("ds", "words"),
    [
        ({"zero_optimisation": {}}, "unknown section 'zero_optimisation'; did you mean 'zero_optimization'?"),
        ({"elasticity": {"enabled": True}}, "elasticity: removed from DeepSpeed; a run resumes on another number of"),
        ({"zero_optimization": []}, "zero_optimization: [] is not an object"),
        ({"optimizer": None}, "optimizer: None is not an object"),
        ({"aio": "fast"}, "aio: 'fast' is not an object"),
        ({"optimizer": {"params": []}}, "optimizer.params: [] is not an object"),
        ({"optimizer": {"type": 5}}, "optimizer.type: 5 is not a string"),
        ({"optimizer": {"type": "AdamW", "params": {"learning_rate": 1}}}, "unknown field 'learning_rate'"),
        ({"optimizer": {"type": "AdamW", "params": {"beta": [0, 0]}}}, "'beta'; did you mean 'betas'?"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "fast"}}}, "lr: 'fast' is not a number"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": -1}}}, "lr: -1.0 is not a finite number above 0"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9]}}}, "betas: (0.9,) is not a list of 2 values"),
        ({**STAGE_1, "optimizer": {"type": "AdamWW"}}, "'AdamWW' is unknown; did you mean 'AdamW'?"),
        ({**STAGE_1, "optimizer": {"type": "SGD", "params": {}}}, "SGD is untested under ZeRO"),
        (
            {**STAGE_1, "zero_allow_untested_optimizer": True, "optimizer": {"type": "SGD", "params": {"momentun": 1}}},
            "optimizer.params of SGD:",
        ),
        ({"gradient_clipping": -1}, "max_grad_norm: -1.0 is not a finite number of 0 or more"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: 4 is not one of 'auto', 0, 1, 2, 3"),
        ({"zero_optimization": {"stage": "two"}}, "zero_optimization.stage: 'two' is not"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage: True is not"),
        ({"zero_optimization": {"stge": 2}}, "stge: Extra inputs are not permitted"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, "offload_optimizer: 'cpu' is not an object"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}}, "offload_optimizer.device"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "needs an nvme_path"),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "a NaN gradient would reach the weights"),
        ({**STAGE_1, "bf16": {"enabled": True, "check_grad_overflow": False}}, "NaN gradient would reach"),
        ({"bf16": {"enabled": "yes"}}, "bf16.enabled: 'yes' is not true or false or 'auto'"),
        ({"fp16": {"enabled": 1}}, "fp16.enabled: 1 is not true or false or 'auto'"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16 and fp16 are both enabled"),
        ({**STAGE_1, "bf16": {"enabled": True, "loss_scal": 1}}, "bf16: loss_scal"),
        ({"torch_autocast": {"enabled": True, "dtype": "float64"}}, "torch_autocast.dtype is 'float64'"),
        ({"data_types": {"grad_accum_dtype": "fp23"}}, "grad_accum_dtype: 'fp23' is not one of 'auto', 'fp32'"),
        ({"data_types": {"grad_accum": "fp32"}}, "unknown field 'grad_accum'; did you mean 'grad_accum_dtype'?"),
        ({"scheduler": {"type": "WarmupLRx"}}, "'WarmupLRx' is unknown; did you mean 'WarmupLR'?"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup": 5}}}, "scheduler.params of WarmupLR:"),
        ({"scheduler": {"type": "OneCycle", "params": {"cycle_max_lr": "auto"}}}, "cycle_max_lr is \"auto\""),
        ({"scheduler": {"params": {"warmup_num_steps": 5}}}, "belongs to no scheduler"),
        ({"checkpoint": {"tag_validation": "loud"}}, "tag_validation"),
        ({"communication_data_type": "fp8"}, "communication_data_type"),
        ({"optimizer": {"type": "Muon", "params": {"per_head_muon": True}}}, "the run's Muon takes whole matrices"),
    ],
)  # fmt: skip
def test_what_deepspeed_would_ignore_or_trip_over_is_one_line(ds, words):
    assert words in refusal(ds)


@pytest.mark.parametrize(
    ("ds", "train", "words"),
    [
        (STAGE_1, {"precision": "fp16"}, "precision: fp16 does not run on CPU; use --precision bf16 or fp32"),
        ({**STAGE_1, "bf16": {"enabled": False}}, {"precision": "bf16"}, "precision is bf16 in the run and off"),
        ({**STAGE_1, "bf16": {"enabled": True}}, {"precision": "fp32"}, "precision is fp32 in the run and bf16"),
        (STAGE_1, {"optimizer": "deepspeed"}, "needs an optimizer.type in the DeepSpeed config"),
        ({**STAGE_1, "scheduler": {"type": "WarmupLR"}}, {"optimizer": "muon"}, "muon has two rates, and a DeepSpeed"),
        (STAGE_1, {"optimizer": "muon", "lora_rank": 4}, "muon has nothing to update: it takes no adapters"),
        (STAGE_1, {"optimizer": "adamw", "muon_lr": 0.1}, "muon_lr: 0.1 has no effect on adamw; leave it out"),
        (STAGE_1, {"embedding_lr": 0.1}, "embedding_lr: 0.1 has no effect on an embedding that"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}},
         {"optimizer": "muon"}, "muon keeps nothing on nvme; offload to cpu, or use adamw"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
         {"optimizer": "muon"}, "offload_optimizer.ratio is of DeepSpeed's Adam"),
        (STAGE_1, {"schedule": "deepspeed"}, "needs a scheduler.type in the DeepSpeed config"),
        ({"scheduler": {"type": "WarmupLR"}}, {"schedule": "wsd"}, "schedule is wsd in the run and deepspeed"),
        ({"scheduler": {"type": "WarmupLR"}}, {"warmup_steps": 3}, "warmup_steps: 3 has no effect on schedule deepspe"),
        (STAGE_1, {"decay_ratio": 0.5}, "decay_ratio: 0.5 has no effect on schedule cosine; leave it out"),
        (STAGE_1, {"schedule": "constant", "min_lr_ratio": 0.0}, "min_lr_ratio: 0.0 has no effect on schedule const"),
        (
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}}, {"world_size": 4, "local_world_size": 3},
            "does not divide 4",
        ),
    ],
)  # fmt: skip
def test_what_the_run_and_the_json_cannot_do_together(ds, train, words):
    assert words in refusal(ds, **train)


def test_files_that_are_no_json_objects(tmp_path):
    path = tmp_path / "ds.json"
    for content, words in (("{,}", "line 1 column 2"), ("[1]", "expected a JSON object, found list"), ("", "line 1")):
        path.write_text(content)
        with pytest.raises(UserError, match=f"--ds-config .*{re.escape(words)}"):
            load_ds_config(path)
    with pytest.raises(UserError, match="No such file"):
        load_ds_config(tmp_path / "nowhere.json")
    assert zero_stage(load_ds_config(None)) == 1
    assert load_ds_config(None)["bf16"] == load_ds_config(ROOT / "ds_configs" / "zero1.json")["bf16"]
    load_ds_config(None)["zero_optimization"]["stage"] = 3
    assert zero_stage(load_ds_config(None)) == 1, "the default can be changed from outside"


def test_the_resolved_pair_resolves_to_itself():
    """run_config.json and ds_config.json of a run folder, given again, mean the same run."""
    for path in FILES:
        first = resolve(load_ds_config(path), world_size=2, local_world_size=2, global_batch_size=16)
        again = resolve_run(first.run, first.ds, world_size=2, local_world_size=2)
        assert again.run == first.run and again.ds == first.ds
    assert resolve_run(RunConfig(data=DataConfig(seq_len=3)), {}, world_size=1).run.data.seq_len == 3


@pytest.mark.parametrize(
    ("model", "start", "length", "said"),
    [
        ({}, None, 256, None),
        ({"rope_original_max_position_embeddings": 256}, None, 256, None),
        ({"rope_original_max_position_embeddings": 2048}, None, 256, "the model will say 256, not 2048"),
        ({"rope_original_max_position_embeddings": 2048}, "other", 2048, None),
        ({"rope_original_max_position_embeddings": 64}, "other", 256, "the model will say 256, not 64"),
        ({"rope_original_max_position_embeddings": 64, "rope_scaling_factor": 4.0}, None, 64, None),
    ],
)
def test_the_model_learns_at_which_length_it_is_trained(model, start, length, said):
    run = RunConfig(ModelConfig(**model), DataConfig(seq_len=256), TrainConfig(init_from=start))
    resolved = resolve_run(run, {}, world_size=1)
    assert resolved.run.model.trained_length == length
    assert [note for note in resolved.notes if "rope_original" in note] == [
        note for note in resolved.notes if said and said in note
    ]
    assert not said or any(said in note for note in resolved.notes)
    assert resolve_run(resolved.run, {}, world_size=1).model == resolved.model


@pytest.mark.parametrize(("factor", "said"), [(2.0, True), (4.0, False)])
def test_a_stretch_that_is_too_short_for_the_rows_is_noted(factor, said):
    model = ModelConfig(rope_original_max_position_embeddings=64, rope_scaling_factor=factor)
    resolved = resolve_run(RunConfig(model, DataConfig(seq_len=256)), {}, world_size=1)
    assert any("stretches 64 tokens to 128, and seq_len is 256; 4 would" in note for note in resolved.notes) == said
    assert resolved.model == model
