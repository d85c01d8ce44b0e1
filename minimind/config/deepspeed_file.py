"""A DeepSpeed JSON file as people have it, read and said in today's words.

Comments, template words, numbers in quotes and old names have one sensible meaning each; every reading is a note.
"""

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

from minimind.config.deepspeed_keys import AUTO
from minimind.errors import UserError
from minimind.files import read_json

DEFAULT_DS_CONFIG: dict[str, Any] = {
    "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"},
    "bf16": {"enabled": "auto", "immediate_grad_update": True},
    "data_types": {"grad_accum_dtype": "fp32"},
}
"""The JSON of a run without `--ds-config`."""

# A word to be replaced before use: ${stage} anywhere, GBSIZE or CL_1st_MIN outside quotes.
_PLACEHOLDER = re.compile(r"\$\{\w+\}|[A-Z][A-Z0-9]*_?\w*")
_BARE_PLACEHOLDER = re.compile(rf"(?<=[:\[,])(\s*)({_PLACEHOLDER.pattern})(?=\s*[,\]}}])")
# As DeepSpeed itself, which reads its file as hjson: comments, and a comma behind the last value.
_COMMENT = re.compile(r'("(?:\\.|[^"\\])*")|//[^\n]*|#[^\n]*|/\*.*?\*/', re.DOTALL)
_LAST_COMMA = re.compile(r'(?<=[\w"\]}.]),(?=\s*[}\]])')
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_IN_QUOTES = "in quotes, read as a number or true or false"
_DROPPED = object()
# Keys whose text is text, whatever it looks like.
_TEXT_KEYS = ("type", "path", "name", "device", "level", "validation", "team")  # how they end
_TEXT_SECTIONS = frozenset(("tensorboard", "wandb", "csv_monitor", "comet", "data_efficiency", "autotuning"))


def load_ds_config(path: str | os.PathLike[str] | None) -> dict[str, Any]:
    """The DeepSpeed JSON of a path, or the default one for None.

    In what is no JSON, comments and last commas are left out, and a bare word in capitals stays as `${WORD}`.

    Raises:
        UserError: it cannot be read, is no JSON, or no object.
    """
    if path is None:
        return copy.deepcopy(DEFAULT_DS_CONFIG)
    try:
        content = read_json(path, "--ds-config")
    except UserError as error:
        if not isinstance(error.__context__, json.JSONDecodeError):
            raise
        text = _COMMENT.sub(lambda found: found[1] or "", Path(path).read_text(encoding="utf-8"))
        text = _BARE_PLACEHOLDER.sub(lambda found: f'{found[1]}"${{{found[2].strip("${}")}}}"', text)
        try:
            content = json.loads(_LAST_COMMA.sub("", text))
        except ValueError:
            raise error from None
    if not isinstance(content, dict):
        raise UserError(f"--ds-config {path}: expected a JSON object, found {type(content).__name__}")
    return content


def modernize(ds: dict[str, Any]) -> list[str]:
    """Put the user's JSON into today's words, in place; a note for each kind of change."""
    found: dict[str, list[str]] = {}
    _read_values(ds, "", found)
    notes = []
    for kind, places in found.items():
        shown = ", ".join(places[:8]) + (f" and {len(places) - 8} more" if len(places) > 8 else "")
        notes.append(f"{shown}: {kind}")
    return notes + _rename(ds)


def _read_values(section: Any, path: str, found: dict[str, list[str]]) -> None:
    """Read every value below a section or list, and note in `found` where which kind of reading was made."""
    for key in list(section) if isinstance(section, dict) else range(len(section)):
        where = f"{path}{key}" if isinstance(section, dict) else path.rstrip(".")
        reading = _read_value(key, section[key], where)
        if reading is None:
            if isinstance(section[key], (dict, list)):
                _read_values(section[key], f"{where}.", found)
            continue
        found.setdefault(reading[0], []).append(where)
        if reading[1] is _DROPPED:
            del section[key]
        else:
            section[key] = reading[1]


def _read_value(key: Any, value: Any, where: str) -> tuple[str, Any] | None:
    """How a value is read in another way than it stands there, in words, and what it is; None: as it stands."""
    if isinstance(key, str) and (key.startswith(("_", "//", "#", "$")) or key.lower().startswith("comment")):
        return "comments, passed over", _DROPPED
    if not isinstance(value, str) or str(key).endswith(_TEXT_KEYS) or where.split(".")[0] in _TEXT_SECTIONS:
        return None
    if re.fullmatch(r"\$\{\w+\}|[A-Z][A-Z0-9]+(_[A-Z0-9]+)*", value):
        return 'words to be replaced, taken as "auto"', AUTO
    if value.lower() in ("true", "false"):
        return _IN_QUOTES, value.lower() == "true"
    if _NUMBER.fullmatch(value.strip()):
        number = float(value)
        return _IN_QUOTES, int(number) if number.is_integer() and "." not in value else number
    return None


def _rename(ds: dict[str, Any]) -> list[str]:
    """Old names of sections and of ZeRO's settings."""
    notes = []
    zero = ds.get("zero_optimization")
    if isinstance(zero, bool):
        zero = ds["zero_optimization"] = {"stage": int(zero)}
        notes.append(f"zero_optimization: {str(bool(zero['stage'])).lower()}: an old form; ZeRO stage {zero['stage']}")
    if "allgather_size" in ds and isinstance(zero, dict):
        zero.setdefault("allgather_bucket_size", ds.pop("allgather_size"))
        notes.append("allgather_size: an old name of zero_optimization.allgather_bucket_size")
    if "bfloat16" in ds:
        ds.setdefault("bf16", ds.pop("bfloat16"))
        notes.append("bfloat16: an old name of bf16")
    if not isinstance(zero, dict):
        return notes
    if isinstance(zero.get("stage"), list):
        zero["stage"] = AUTO
        notes.append('zero_optimization.stage: a list is for the autotuner; taken as "auto"')
    for old, what in (
        ("cpu_offload", "optimizer"), ("cpu_offload_params", "param"), ("cpu_offload_param", "param")
    ):  # fmt: skip
        if old not in zero:
            continue
        name, is_on = f"offload_{what}", zero.pop(old)
        notes.append(f"zero_optimization.{old}: an old name of {name}" + ("" if is_on else ", and off"))
        if is_on:
            zero.setdefault(name, {"device": "cpu"})
    pinned = zero.pop("cpu_offload_use_pin_memory", None)
    if pinned is not None:
        notes.append("zero_optimization.cpu_offload_use_pin_memory: an old name of pin_memory in offload_optimizer")
        for name in ("offload_optimizer", "offload_param"):
            if isinstance(zero.get(name), dict):
                zero[name].setdefault("pin_memory", pinned)
    old, new = "stage3_gather_fp16_weights_on_model_save", "stage3_gather_16bit_weights_on_model_save"
    if old in zero:
        zero.setdefault(new, zero.pop(old))
        notes.append(f"zero_optimization.{old}: an old name of {new}")
    return notes
