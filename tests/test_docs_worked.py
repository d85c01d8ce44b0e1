"""What the pages work out by hand (docs/worked.py) is what the code of minimind/ computes."""

import sys

import pytest
import torch
import torch.nn.functional as F
from docs_pages import ARCHITECTURE, GUIDE, LANGUAGES, ROOT, flow, read_page
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from minimind.model import ModelConfig
from minimind.model.attention import explicit_attention, fused_attention
from minimind.model.attention_mask import AttentionMask
from minimind.model.router import route, router_aux_loss

sys.path.insert(0, str(ROOT / "docs"))

import worked


@pytest.mark.parametrize("attend", [explicit_attention, fused_attention])
def test_attention_by_hand(attend):
    heads = [torch.tensor(vectors)[None, None] for vectors in (worked.QUERIES, worked.KEYS, worked.VALUES)]
    found = attend(*heads, AttentionMask(), 0.0)[0, 0]
    assert torch.allclose(found, torch.tensor(worked.attention_outputs()))
    both = torch.cat((found, torch.tensor(worked.SECOND_HEAD)), dim=-1)
    mixed = F.linear(both, torch.tensor([worked.OUTPUT_ROW]))[:, 0]
    shown = [line.split("|")[-2].strip() for line in worked.output_mix("en").splitlines()[2:]]
    assert shown == [f"{value:.3f}" for value in mixed.tolist()]


def test_merges_by_hand():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = len(set(worked.TEXT) - {" "})
    tokenizer.train_from_iterator([worked.TEXT], trainers.BpeTrainer(vocab_size=letters + 3, show_progress=False))
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    assert [token for token, _ in by_id[letters:]] == ["".join(pair) for pair, _, _ in worked.merges(3)]
    *_, (_, _, words) = worked.merges(3)
    assert tokenizer.encode(worked.TEXT).tokens == [piece for word in words for piece in word]
    assert tokenizer.encode("heat").tokens == ["h", "e", "at"]


def test_adamw_by_hand():
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], **worked.ADAMW)
    for gradient, *_, theta in worked.adamw_steps():
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        assert weight.item() == pytest.approx(theta)


def test_router_by_hand():
    config = ModelConfig(use_moe=True, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True)
    logits = torch.tensor(worked.ROUTER_LOGITS)
    weights, experts = route(logits, config)
    assert experts.tolist() == [chosen for _, chosen, _ in worked.routed()]
    assert torch.allclose(weights, torch.tensor([token[2] for token in worked.routed()]))
    loss = router_aux_loss([logits], config, (1, 4)).aux_loss.item() / config.router_aux_loss_coef
    assert loss == pytest.approx(worked.balance()[2])


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_beside_the_tables_say_their_figures(language):
    logits = torch.tensor([worked.SCORES], requires_grad=True)
    loss = F.cross_entropy(logits, torch.tensor([1]))
    loss.backward()
    rows = worked.loss(language).splitlines()[2:]
    assert [float(row.split("|")[-2]) for row in rows] == pytest.approx(logits.grad[0].tolist(), abs=5e-5)
    balance = worked.balance()[2]
    pieces = sum(map(len, worked.merges(3)[-1][2]))
    letters = len(worked.TEXT.replace(" ", ""))
    guide = [f"= {loss.item():.4f}$", f"= {logits.exp().sum().item():.3f}$", f"{letters} ", f" {pieces} "]
    architecture = [f"= {balance:.3f}$", f"{balance - 1:.3f}", f"{balance * 0.01:.5f}", "0.401"]
    for page, figures in ((GUIDE, guide), (ARCHITECTURE, architecture)):
        text = flow(read_page(language, page))
        for figure in figures:
            assert figure in text, f"{language}/{page} should say {figure}"
