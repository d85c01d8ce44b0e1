"""The plain way to train: transformers' Qwen3 of minimind3's shape on padded batches, AdamW, no library around it.

    python benchmarks/padded_loop.py --tokens FILE --length 340 --batch 8 --accumulation 2

FILE: JSON, one list of token ids a text, in the order of training. Prints one line a micro-batch; made for `train.py`.
"""

import json
from pathlib import Path

import torch
import tyro
from measure import ROOT  # noqa: F401 - puts the repository on the path
from transformers import Qwen3Config, Qwen3ForCausalLM

from minimind.config.run_config import preset


def main(tokens: Path, length: int, batch: int, accumulation: int, model: str = "minimind3") -> None:
    """Train until the texts end.

    Args:
        tokens: the texts.
        length: positions that each is padded to.
        batch: texts in a micro-batch.
        accumulation: micro-batches in an optimizer step.
        model: preset whose shape is built.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    texts = json.loads(tokens.read_text())
    network = build_qwen3(model).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-4)
    amp = torch.autocast("cuda", dtype=torch.bfloat16, enabled=device.type == "cuda")
    for number in range(len(texts) // batch):
        rows = texts[number * batch : (number + 1) * batch]
        input_ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=device)
        labels = torch.tensor([row + [-100] * (length - len(row)) for row in rows], device=device)
        with amp:
            loss = network(input_ids, labels=labels).loss / accumulation
        loss.backward()
        if (number + 1) % accumulation == 0:
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        print(f"micro-batch {number + 1} loss {loss.item() * accumulation:.4f}", flush=True)


def build_qwen3(name: str, vocab_size: int | None = None) -> Qwen3ForCausalLM:
    """Qwen3 with the shape of one of our presets, and its vocabulary or another."""
    config = preset(name)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size or config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.feed_forward_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_size,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_word_embeddings,
            use_cache=False,
        )
    )


if __name__ == "__main__":
    tyro.cli(main)
