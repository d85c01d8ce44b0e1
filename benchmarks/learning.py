"""What was learnt for the tokens seen: the reference trainer and ours on the same text, evaluated in the same way.

    python benchmarks/learning.py --peer DIR [--text FILE.jsonl] [--tokens 250000]

Both train once over the same real tokens, at the same peak learning rate and about as many tokens an optimizer step;
the model is minimind3 in a smaller size, so that this takes minutes. Then the weights of both are read by our model
and scored on the same held-out texts: the mean loss of each token after the first, the text alone in its context, in
float32 (the reference's after its own start token, as it was trained).
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import tyro
from measure import ROOT, Claim, core_threads, environment, report
from peer import Peer, read_texts
from texts import find_text, make_shards

from minimind.config import preset
from minimind.model import MiniMindForCausalLM
from minimind.pretrained import load_model

HELD_OUT = 400  # texts
HIDDEN_SIZE, LAYERS = 256, 4


def main(
    peer: Path,
    text: Path | None = None,
    tokens: int = 250_000,
    length: int = 340,
    batch: int = 16,
    lr: float = 2e-3,
    output: Path | None = None,
) -> None:
    """Measure.

    Args:
        peer: checkout of jingyaogong/minimind.
        text: JSONL with a `text` field [default: what `texts.py` finds on this machine].
        tokens: real tokens to train on.
        length: the reference's maximum length and our window.
        batch: texts in the reference's optimizer step; ours takes about as many real tokens.
        lr: peak learning rate of both.
        output: where the JSON goes.
    """
    where = environment()
    folder = Path(tempfile.mkdtemp(prefix="learning-benchmark-"))
    try:
        reference = Peer.copied(peer, folder / "peer")
        texts = read_texts(find_text(text, folder))
        held_out, rest = texts[:HELD_OUT], texts[HELD_OUT:]
        rows, seen = [], 0
        for row in reference.read_tokens(rest[: tokens // 20], length):
            if seen >= tokens:
                break
            rows.append(row)
            seen += len(row)
        part = folder / "texts.jsonl"
        part.write_text("".join(json.dumps({"text": item}, ensure_ascii=False) + "\n" for item in rest[: len(rows)]))
        scored = [row[1:-1] for row in reference.read_tokens(held_out, length)]
        theirs = score(train_reference(reference, part, length, batch, lr), scored, start=[1])
        mean_tokens = seen / len(rows)
        windows = max(1, round(batch * mean_tokens / length))
        ours = score(train_ours(folder, part, reference.tokenizer, length, windows, lr), scored, start=[])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    title = f"evaluation loss after {seen:,} tokens"
    claims = [
        Claim(f"{title}: minimind", (theirs,), unit="nats a token"),
        Claim(f"{title}: ours", (ours,), unit="nats a token"),
        Claim(f"{title}: ours over minimind", (ours / theirs,), 1.0, at_least=False, unit="x"),
    ]
    report(__file__, where, claims, {"minimind": theirs, "ours": ours, "tokens": seen}, output)


def run(command: Sequence[object], folder: Path) -> None:
    """Run one trainer to its end."""
    env = {**os.environ, **core_threads(), "HF_HOME": str(folder / "hf")}
    done = subprocess.run([str(part) for part in command], cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{(done.stderr or done.stdout).strip()[-800:]}")


def train_reference(reference: Peer, part: Path, length: int, batch: int, lr: float) -> MiniMindForCausalLM:
    """One epoch of its own trainer; its weights in our model."""
    more = ["--hidden_size", HIDDEN_SIZE, "--num_hidden_layers", LAYERS, "--learning_rate", lr]
    run(reference.command(part, length=length, batch=batch, accumulation=1, more=more), reference.folder / "trainer")
    state = torch.load(reference.folder / "out" / f"pretrain_{HIDDEN_SIZE}.pth", weights_only=True)
    model = small_model()
    missing, unexpected = model.load_state_dict({name: value.float() for name, value in state.items()}, strict=False)
    if missing or any("freqs" not in name for name in unexpected):
        raise SystemExit(f"the reference's weights do not fit: missing {missing}, unexpected {unexpected}")
    return model.eval()


def train_ours(folder: Path, part: Path, tokenizer: Path, length: int, windows: int, lr: float) -> MiniMindForCausalLM:
    """One epoch of ours over all of the same texts."""
    shards = make_shards(part, tokenizer, folder / "shards", val_fraction=0)
    command: list[object] = [
        sys.executable,
        "-m",
        "minimind.train",
        "--model",
        "minimind3",
        "--hidden-size",
        HIDDEN_SIZE,
    ]
    command += ["--num-hidden-layers", LAYERS, "--shards", shards, "--seq-len", length, "--document-mask"]
    command += ["--micro-batch-size", windows, "--lr", lr, "--precision", "bf16", "--run-dir", folder / "run"]
    command += ["--no-tensorboard", "--ds-config", ROOT / "ds_configs" / "zero1.json"]
    run(command, ROOT)
    model, *_ = load_model(folder / "run", dtype=torch.float32)
    return model


def small_model() -> MiniMindForCausalLM:
    """minimind3, smaller."""
    config = dataclasses.replace(preset("minimind3"), hidden_size=HIDDEN_SIZE, num_hidden_layers=LAYERS)
    return MiniMindForCausalLM(config)


@torch.no_grad()
def score(model: MiniMindForCausalLM, rows: Sequence[Sequence[int]], start: Sequence[int]) -> float:
    """Mean loss of every token but the first of each row, read after the tokens in `start`."""
    total, count = 0.0, 0
    for row in rows:
        if len(row) < 2:
            continue
        tokens = torch.tensor([[*start, *row]])
        labels = tokens[:, 1:].clone()
        labels[:, : len(start)] = -100
        total += float(model(tokens[:, :-1], labels, loss_reduction="sum").loss)
        count += len(row) - 1
    return total / count


if __name__ == "__main__":
    tyro.cli(main)
