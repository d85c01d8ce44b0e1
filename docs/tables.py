"""The tables of the documentation, computed from presets, formulas and dataclasses, in both languages.

Each function takes "en" or "zh" and gives Markdown. Knows nothing of pages; needs no torch.
"""

import ast
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from minimind.config import run_config
from minimind.config.deepspeed_file import load_ds_config
from minimind.config.deepspeed_table import STAGES, TABLE, Row
from minimind.config.resolve import resolve_run
from minimind.config.run_config import DataConfig, RunConfig, TrainConfig, preset
from minimind.errors import UserError
from minimind.model.config import ModelConfig
from minimind.model.presets import PRESETS
from minimind.reports.plan.memory import MemoryEstimate, estimate_memory
from minimind.units import format_bytes

ROOT = Path(__file__).resolve().parents[1]


def format_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; numbers stand to the right."""
    marks = ["---" if isinstance(cell, str) and not cell[:1].isdigit() else "---:" for cell in (rows or [head])[0]]
    lines = [head, marks, *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def presets(language: str) -> str:
    """Shape and size of every preset."""
    head = {
        "en": ["preset", "width", "layers", "heads (KV)", "feed-forward", "parameters", "active a token"],
        "zh": ["预设", "宽度", "层数", "头数（KV）", "前馈宽度", "参数量", "每个词元激活"],
    }[language]
    rows = []
    for name, config in PRESETS.items():
        width = config.expert_feed_forward_size
        feed_forward = f"{width}" if not config.use_moe else f"{config.num_experts}+{config.n_shared_experts} x {width}"
        heads = f"{config.num_attention_heads} ({config.num_key_value_heads})"
        counts = (f"{config.num_params():,}", f"{config.num_active_params():,}")
        rows.append((f"`{name}`", config.hidden_size, config.num_hidden_layers, heads, feed_forward, *counts))
    return format_table(head, rows)


def cache_bytes_per_token(config: ModelConfig) -> int:
    """Keys and values of one token in all layers, two bytes a number."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_size * 2


def kv_cache(language: str) -> str:
    """The cache of minimind3 with as many KV heads as MHA, GQA and MQA have."""
    head = {
        "en": ["minimind3 with", "KV heads", "bytes a token", "2,048 tokens", "32,768 tokens"],
        "zh": ["minimind3 采用", "KV 头数", "每个词元字节数", "2,048 个词元", "32,768 个词元"],
    }[language]
    rows = []
    for name, heads in (("MHA", 8), ("GQA", 4), ("GQA", 2), ("MQA", 1)):
        size = cache_bytes_per_token(dataclasses.replace(PRESETS["minimind3"], num_key_value_heads=heads))
        rows.append((name, heads, f"{size:,}", format_bytes(size * 2048), format_bytes(size * 32768)))
    return format_table(head, rows)


def yarn_row(config: ModelConfig, pair: int) -> tuple[float, float, float]:
    """(turns in the trained context, ramp, new frequency / old) of a pair by YaRN's formulas (arXiv 2309.00071)."""
    context, size = config.trained_length, config.head_size

    def pair_of(turns: float) -> float:
        return size * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = math.floor(pair_of(config.rope_beta_fast)), math.ceil(pair_of(config.rope_beta_slow))
    ramp = min(max((pair - low) / (high - low), 0), 1)
    turns = context * config.rope_theta ** (-2 * pair / size) / (2 * math.pi)
    return turns, ramp, 1 - ramp + ramp / config.rope_scaling_factor


def yarn(language: str) -> str:
    """What YaRN does to minimind3's pairs when the context grows fourfold."""
    head = {
        "en": ["pair", "turns in 2,048 tokens", "ramp", "new frequency / old"],
        "zh": ["维度对", "2,048 个词元内转的圈数", "斜坡值", "新频率 / 旧频率"],
    }[language]
    config = dataclasses.replace(PRESETS["minimind3"], rope_scaling_factor=4.0)
    rows = []
    for pair in (0, 8, 12, 16, 20, 21, 47):
        turns, ramp, ratio = yarn_row(config, pair)
        rows.append((pair, f"{turns:.4g}", f"{ramp:.3f}", f"{ratio:.3f}"))
    return format_table(head, rows)


def estimate(model: str, stage: int, world_size: int) -> MemoryEstimate:
    """What `--dry-run` prints for ds_configs/zeroN.json and AdamW on GPUs in bf16, 2 x 2,048 tokens a rank."""
    train = TrainConfig(micro_batch_size=2, precision="bf16", optimizer="adamw")
    return _estimate(RunConfig(preset(model), DataConfig(seq_len=2048), train), stage, world_size, "cuda")


def estimate_plan(model: str, stage: int, seq_len: int) -> MemoryEstimate:
    """What `--dry-run` prints for ds_configs/zeroN.json on one CPU rank with every other setting left alone."""
    return _estimate(RunConfig(preset(model), DataConfig(seq_len=seq_len)), stage, 1, "cpu")


def _estimate(run: RunConfig, stage: int, world_size: int, device_type: str) -> MemoryEstimate:
    ds = load_ds_config(ROOT / "ds_configs" / f"zero{stage}.json")
    on_gpu = device_type == "cuda"
    resolved = resolve_run(run, ds, world_size=world_size, device_type=device_type, bf16_supported=on_gpu)
    return estimate_memory(resolved, device_type)


def zero_memory(language: str) -> str:
    """Parameters, gradients and optimizer states of three presets in every ZeRO stage on 8 ranks."""
    head = {
        "en": ["preset", "stage", "parameters", "gradients", "optimizer", "gathered weights", "states together"],
        "zh": ["预设", "阶段", "参数", "梯度", "优化器状态", "临时聚集的权重", "状态合计"],
    }[language]
    rows = []
    for name in ("minimind3", "medium", "large"):
        for stage in range(4):
            memory = estimate(name, stage, 8)
            parts = (memory.parameters, memory.gradients, memory.optimizer, memory.gathered)
            rows.append((f"`{name}`", stage, *map(format_bytes, parts), format_bytes(sum(parts))))
    return format_table(head, rows)


SHARING: dict[str, tuple[bool, dict[str, Any]]] = {
    "dense": (False, {}),
    "LoRA": (False, {"lora_rank": 4}),
    "AutoEP, `--ep-size 1`": (True, {}),
    "AutoEP, `--ep-size 2`": (True, {"ep_size": 2}),
    "DeepSpeed-MoE, `--ep-size 2`": (True, {"ep_size": 2, "moe_backend": "deepspeed"}),
}
"""What may train on ranks that share something: whether the model has experts, and the settings."""


def shares(row: str, size: dict[str, int], stage: int) -> bool:
    """Whether a row of `SHARING` runs with `--sp-size` or `--tp-size`, as `size` says, in a ZeRO stage on two ranks."""
    experts, train = SHARING[row]
    run = RunConfig(preset("minimind3-moe" if experts else "minimind3"), DataConfig(), TrainConfig(**train, **size))
    try:
        _estimate(run, stage, 2, "cpu")
    except UserError:
        return False
    return True


def sharing(language: str) -> str:
    """What runs on ranks that share sequences or layers, in which ZeRO stage."""
    yes, no = {"en": ("yes", "refused"), "zh": ("支持", "拒绝")}[language]
    rows = [
        (row, f"`--{name.replace('_', '-')} 2`", *(yes if shares(row, {name: 2}, stage) else no for stage in STAGES))
        for name in ("sp_size", "tp_size")
        for row in SHARING
    ]
    return format_table(["", "", *(f"ZeRO {stage}" for stage in STAGES)], rows)


def long_memory(language: str) -> str:
    """The peak of a step of minimind3 at two lengths, by ranks that share the sequence, on GPUs in bf16 and ZeRO 2."""
    head = {
        "en": ["length", "`--sp-size`", "all activations kept", "`--activation-checkpointing`"],
        "zh": ["长度", "`--sp-size`", "保留所有激活", "`--activation-checkpointing`"],
    }[language]
    model = dataclasses.replace(PRESETS["minimind3"], max_position_embeddings=1_000_000)
    rows = []
    for seq_len, sp_size in ((32_768, 1), (32_768, 4), (1_000_000, 1), (1_000_000, 4), (1_000_000, 8)):
        peaks = []
        for recomputes in (False, True):
            train = TrainConfig(
                micro_batch_size=1, precision="bf16", sp_size=sp_size, activation_checkpointing=recomputes
            )
            peaks.append(_estimate(RunConfig(model, DataConfig(seq_len=seq_len), train), 2, sp_size, "cuda").total)
        rows.append((f"{seq_len:,}", sp_size, *map(format_bytes, peaks)))
    return format_table(head, rows)


def softmax(logits: Sequence[float], temperature: float = 1.0) -> list[float]:
    """Probabilities of scores divided by a temperature."""
    powers = [math.exp(value / temperature) for value in logits]
    return [power / sum(powers) for power in powers]


def papers(language: str) -> str:
    """Every paper that a page names, by topic."""
    head = {"en": ["topic", "paper", "arXiv"], "zh": ["主题", "论文", "arXiv"]}[language]
    rows = [
        (topic[language], f"*{title}*", f"[{number}](https://arxiv.org/abs/{number})")
        for topic in json.loads((ROOT / "docs" / "papers.json").read_text(encoding="utf-8"))
        for number, title in topic["papers"].items()
    ]
    return format_table(head, rows)


def runs_table(language: str) -> str:
    """What the runs of docs/pictures/make.py reached."""
    head = {
        "en": ["run", "learning rate", "sequences a step", "tokens seen", "last training loss", "evaluation loss"],
        "zh": ["训练", "学习率", "每步序列数", "看过的词元", "最后的训练损失", "评估损失"],
    }[language]
    rows = []
    for name, run in json.loads((ROOT / "docs" / "pictures" / "runs.json").read_text(encoding="utf-8")).items():
        loss = f"{run['last_loss']:.3f}" if isinstance(run["last_loss"], float) else run["last_loss"]
        evaluation = "" if run["eval_loss"] is None else f"{run['eval_loss']:.3f}"
        rows.append((f"`{name}`", f"{run['lr']:g}", run["sequences"], f"{run['tokens']:,}", loss, evaluation))
    return format_table(head, rows)


SCORES = (2.0, 1.0, 0.0, -1.0)
"""The scores of the worked examples of sampling: tokens A, B, C, D."""


def temperature(language: str) -> str:
    """The worked example of the temperature."""
    head = {"en": ["temperature", "A", "B", "C", "D"], "zh": ["温度", "A", "B", "C", "D"]}[language]
    return format_table(head, [(t, *(f"{p:.4f}" for p in softmax(SCORES, t))) for t in (2.0, 1.0, 0.5, 0.25)])


def documented_fields(cls: type, file: str) -> list[tuple[str, str, Any, str]]:
    """(name, type, default, docstring) of each field of a dataclass, read from its source."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    body = next(item for item in tree.body if isinstance(item, ast.ClassDef) and item.name == cls.__name__).body
    found = []
    for item, following in itertools.pairwise(body):
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and isinstance(following, ast.Expr):
            assert isinstance(following.value, ast.Constant)
            text = " ".join(str(following.value.value).split())
            kind, default = item.annotation, show(getattr(cls(), item.target.id))
            if isinstance(kind, ast.Subscript) and ast.unparse(kind.value) == "Annotated":
                # Annotated[type, _default("what stands in for None"), limits]
                kind, *hints = kind.slice.elts  # type: ignore[attr-defined]
                for hint in hints:
                    if isinstance(hint, ast.Call) and ast.unparse(hint.func) == "_default":
                        default = ast.literal_eval(hint.args[0])
            found.append((item.target.id, spell_type(ast.unparse(kind)), default, text))
    return found


def spell_type(kind: str) -> str:
    """A type as a reader needs it: the choices in place of a name for them, no None (that is the default's matter)."""
    name = re.sub(r"^tuple\[(\w+), \.\.\.\]$", r"\1", kind.removesuffix(" | None"))
    if name.startswith("Literal["):
        return ", ".join(ast.literal_eval(name.removeprefix("Literal")))
    choices = get_args(getattr(run_config, name, None))
    return ", ".join(map(str, choices)) if choices else name


def show(value: Any) -> str:
    """A default as it is typed; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return json.dumps(value) if isinstance(value, (str, bool)) else f"{value:g}" if abs(value) < 1e6 else f"{value:.0e}"


def chinese_descriptions() -> dict[str, str]:
    """Field name -> what it is, in Chinese; defaults that are said in words, too."""
    return json.loads((ROOT / "docs" / "zh" / "field_descriptions.json").read_text(encoding="utf-8"))


def fields(cls: type, file: str, language: str) -> str:
    """A table of a dataclass's fields, as flags."""
    head = {"en": ["flag", "type", "default", "meaning"], "zh": ["参数", "类型", "默认值", "含义"]}[language]
    chinese = chinese_descriptions() if language == "zh" else {}
    rows = []
    for name, kind, default, text in documented_fields(cls, file):
        flag = "--" + name.replace("_", "-")
        text = chinese.get(name, text).replace("|", "\\|")
        rows.append((f"`{flag}`", f"`{kind}`", chinese.get(default, default), text))
    return format_table(head, rows)


def ds_configs(language: str) -> str:
    """What each DeepSpeed file of the repository sets."""
    head = {
        "en": ["file", "ZeRO stage", "optimizer", "16 bit through", "offload", "other settings of `zero_optimization`"],
        "zh": ["文件", "ZeRO 阶段", "优化器", "16 位方式", "卸载", "`zero_optimization` 的其他设置"],
    }[language]
    rows = []
    for path in sorted((ROOT / "ds_configs").glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        zero = content["zero_optimization"]
        offload = ", ".join(
            f"{key.removeprefix('offload_')} -> {zero[key]['device']}" for key in zero if key.startswith("offload_")
        )
        others = ", ".join(
            f"`{key}` {json.dumps(value)}"
            for key, value in zero.items()
            if key != "stage" and not key.startswith("offload_")
        )
        sixteen = "`torch_autocast`" if "torch_autocast" in content else "`bf16` / `fp16`"
        optimizer = content.get("optimizer", {}).get("type", "")
        rows.append((f"`{path.name}`", zero["stage"], optimizer, sixteen, offload, others))
    return format_table(head, rows)


def ds_keys(language: str) -> str:
    """The stages at which each key of DeepSpeed's JSON runs, and what is said where it does not."""
    note = {"en": "note", "zh": "提示"}[language]
    head = {
        "en": ["key", "CPU, dense", "CPU, experts", "CUDA, dense", "CUDA, experts", "what is said otherwise"],
        "zh": ["键", "CPU，稠密", "CPU，专家", "CUDA，稠密", "CUDA，专家", "否则的提示或报错"],
    }[language]

    def cell(row: Row, device: str, experts: bool) -> str:
        verdicts = {stage: row.verdict(stage, experts, device, all_packages=True)[0] for stage in STAGES}
        runs, noted = ([str(i) for i in STAGES if verdicts[i] == kind] for kind in ("runs", "note"))
        return "; ".join(filter(None, (" ".join(runs), f"{note} {' '.join(noted)}" if noted else ""))) or "-"

    rows: list[tuple[str, ...]] = []
    for has_rules, group in itertools.groupby(TABLE, key=lambda row: bool(row.rules)):
        members = list(group)
        if not has_rules:
            rows.append((", ".join(f"`{row.key}`" for row in members), *["0 1 2 3"] * 4, ""))
        for row in members if has_rules else ():
            cells = [cell(row, device, experts) for device in ("cpu", "cuda") for experts in (False, True)]
            said = "<br>".join(f"{note}: {rule.words}" if rule.verdict == "note" else rule.words for rule in row.rules)
            rows.append((f"`{row.key}`", *cells, said.replace("|", "\\|")))
    return format_table(head, rows)


TABLES: dict[str, Callable[[str], str]] = {
    "presets": presets,
    "kv_cache": kv_cache,
    "yarn": yarn,
    "zero_memory": zero_memory,
    "sharing": sharing,
    "long_memory": long_memory,
    "temperature": temperature,
    "ds_configs": ds_configs,
    "ds_keys": ds_keys,
    "papers": papers,
    "runs_table": runs_table,
    "fields_model": lambda language: fields(ModelConfig, "minimind/model/config.py", language),
    "fields_data": lambda language: fields(DataConfig, "minimind/config/run_config.py", language),
    "fields_train": lambda language: fields(TrainConfig, "minimind/config/run_config.py", language),
}
