"""An exported tokenizer gives the same ids as ours, for every kind of tokenizer, through AutoTokenizer."""

import json
import random
from pathlib import Path

import pytest
from tokenizers_for_tests import NASTY, TEXT, TEXTS, save_byte_level, save_sentencepiece

from minimind.checkpoints.formats.huggingface_tokenizer import tokenizer_files
from minimind.data.chat_template import encode_chat
from minimind.data.tokenizer import BLANK, Tokenizer, load_tokenizer

MIXED = "新的一天，Hello world! 😀👍🏽 def f(x):\n\treturn x ** 2  # 平方\n\n  “引号” café ﬁ 1234567 <|im_end|>\n"


@pytest.fixture(scope="module", params=[save_sentencepiece, save_byte_level])
def both(request, tmp_path_factory) -> tuple[Tokenizer, object]:
    """Our tokenizer, and what AutoTokenizer makes of its export."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    file = request.param(folder)
    exported = folder / "exported"
    exported.mkdir()
    for name, content in tokenizer_files(file, 1 << 20).items():
        (exported / name).write_bytes(content)
    return load_tokenizer(file), AutoTokenizer.from_pretrained(exported)


def same(both, texts: list[str]) -> None:
    ours, theirs = both
    for text, expected, found in zip(texts, ours.encode_batch(texts), theirs(texts)["input_ids"], strict=True):
        assert found == expected, repr(text[:80])


def test_ids_of_real_texts(both):
    pages = [path.read_text(encoding="utf-8") for path in sorted(Path("docs").glob("*/training_guide.md"))]
    same(both, [*pages, *TEXTS, TEXT, MIXED])


def test_ids_of_awkward_texts(both):
    same(both, NASTY)


def test_ids_of_random_texts(both):
    rng = random.Random(0)
    letters = f"aab  =-_\n\tthe你好世界。，!！123😀{BLANK}<|>{{}}()"
    texts = ["".join(rng.choices(letters, k=rng.randrange(1, 60))) for _ in range(3000)]
    texts += [rng.choice("ab =-_.#1\n") * rng.randrange(1, 50) + rng.choice("ab =") * 3 for _ in range(500)]
    same(both, texts)


def test_texts_come_back(both):
    ours, theirs = both
    for text in (*TEXTS, MIXED):
        ids = theirs(text)["input_ids"]
        assert theirs.decode(ids, skip_special_tokens=False) == text == ours.decode(ids)


def test_random_ids_are_decoded_alike(both):
    """Where their bytes are valid UTF-8: of others the libraries do not mark the same number of places."""
    ours, theirs = both
    rng, compared = random.Random(0), 0
    for _ in range(1500):
        ids = [rng.randrange(ours.vocab_size) for _ in range(rng.randrange(1, 6))]
        data = b"".join(map(ours.token_bytes, ids))
        if data.decode("utf-8", errors="ignore").encode() == data:
            compared += 1
            assert theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids), ids
    assert compared > 200


def test_llama_cpp_s_converter_is_told_to_put_nothing_before_a_text(tmp_path):
    settings = json.loads(tokenizer_files(save_sentencepiece(tmp_path), 512)["tokenizer_config.json"])
    assert settings["add_bos_token"] is False and settings["add_prefix_space"] is False


def test_a_conversation_is_written_alike(both):
    ours, theirs = both
    turns = [
        {"role": "system", "content": "简短"},
        {"role": "user", "content": "the fox?"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "why"},
    ]
    found = theirs.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert found == encode_chat(ours, turns)
    assert theirs.eos_token == "<|im_end|>" and theirs.pad_token == "<|endoftext|>"


def test_what_our_reader_leaves_out_is_left_out(tmp_path):
    from transformers import AutoTokenizer

    file = save_byte_level(tmp_path)
    content = json.loads(file.read_text(encoding="utf-8"))
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "out").mkdir()
    for name, data in tokenizer_files(file, 512).items():
        (tmp_path / "out" / name).write_bytes(data)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(MIXED)["input_ids"] == load_tokenizer(file).encode(MIXED)
