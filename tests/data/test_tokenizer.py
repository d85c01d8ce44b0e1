"""The tokenizer interface: exact round trips, special tokens, damaged files."""

import json
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers_for_tests import NASTY, TEXTS

from data_prep.train_tokenizer import cut_sentences, save_tokenizer, train_tokenizer
from minimind.data.tokenizer import BLANK, SPECIAL_TOKENS, Tokenizer, load_tokenizer
from minimind.errors import UserError


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    save_tokenizer(train_tokenizer(list(cut_sentences(TEXTS)), 330), folder)
    return folder


@pytest.fixture(scope="module")
def huggingface_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made like MiniMind's own: byte-level BPE with the special tokens first, here with traps switched on."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(TEXTS, trainer)
    model.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    model.enable_truncation(max_length=5)
    model.enable_padding(length=7)
    file = tmp_path_factory.mktemp("huggingface") / "tokenizer.json"
    model.save(str(file))
    return file


@pytest.fixture(params=["sentencepiece", "huggingface"])
def tokenizer(request: pytest.FixtureRequest, sentencepiece_folder: Path, huggingface_file: Path) -> Tokenizer:
    return load_tokenizer(sentencepiece_folder if request.param == "sentencepiece" else huggingface_file)


def test_special_tokens_have_fixed_ids(tokenizer: Tokenizer) -> None:
    assert [tokenizer.special_ids[token] for token in SPECIAL_TOKENS] == [0, 1, 2]
    assert tokenizer.eos_token_id == 0
    assert [tokenizer.token_bytes(i).decode() for i in range(3)] == list(SPECIAL_TOKENS)


@pytest.mark.parametrize("allow_special", [True, False])
def test_nasty_text_comes_back_exactly(tokenizer: Tokenizer, allow_special: bool) -> None:
    encoded = tokenizer.encode_batch([*NASTY, *TEXTS], allow_special)
    for text, ids in zip([*NASTY, *TEXTS], encoded, strict=True):
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_random_text_comes_back_exactly(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    alphabets = ["ab ", f" {BLANK}\n\t\r", "<|im_start|>end0x", "你好 the\n", "\0\x01\u0301\u200d\ufeff\U0001f600a "]
    for _ in range(1500):
        alphabet = rng.choice(alphabets)
        if rng.random() < 0.3:
            alphabet += "".join(chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) for _ in "ab")
        text = "".join(rng.choices(alphabet, k=rng.randrange(40)))
        for allow_special in (True, False):
            assert tokenizer.decode(tokenizer.encode(text, allow_special)) == text


def test_special_text_is_one_id_or_plain_text(tokenizer: Tokenizer) -> None:
    text = "<|im_start|>hi<|im_end|>"
    special, plain = tokenizer.encode(text), tokenizer.encode(text, allow_special=False)
    assert special[0] == 1 and special[-1] == 2
    assert not {0, 1, 2} & set(plain)
    assert tokenizer.encode(text) == special  # the flag of one call does not stick


def test_long_text_is_not_cut_short_nor_padded(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXTS[0] * 2000)
    assert len(ids) > 5
    assert tokenizer.decode(ids) == TEXTS[0] * 2000
    # Cut where tokens end anyway: the same ids as for the parts.
    assert ids[:20] == tokenizer.encode(TEXTS[0] * 2)[:20]


@pytest.mark.parametrize("splits", [(True, True), (False, True), (False, False)])
def test_words_encode_as_the_whole_text_does(tmp_path: Path, splits: tuple[bool, bool]) -> None:
    import sentencepiece

    save_tokenizer(train_tokenizer(list(cut_sentences(TEXTS)), 330, *splits), tmp_path)
    ours = load_tokenizer(tmp_path)
    library = sentencepiece.SentencePieceProcessor(model_file=str(ours.file))
    rng = random.Random(1)
    words = [*"\n \t,.(,。、é\u0301の", "  ", "the", "def", "return", "day", "今天", "365", "x", "\r\n", "。\n", "café"]
    for _ in range(2000):
        text = "".join(rng.choices(words, k=rng.randrange(60)))
        assert ours.encode(text) == library.encode(text)


def test_batch_equals_one_by_one(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch(NASTY) == [tokenizer.encode(text) for text in NASTY]
    assert tokenizer.encode_batch([]) == []


def test_bytes_that_are_no_text_decode_to_replacement(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("😀")
    assert len(ids) > 1
    assert "\ufffd" in tokenizer.decode(ids[:1])
    assert b"".join(map(tokenizer.token_bytes, ids)) == "😀".encode()


def test_wrong_arguments_are_user_errors(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="lone surrogate at character 2"):
        tokenizer.encode("ab\ud800")
    for token_id in (-1, tokenizer.vocab_size):
        with pytest.raises(UserError, match=f"token id {token_id} "):
            tokenizer.decode([token_id])


def test_shard_folder_and_file_load_alike(sentencepiece_folder: Path, huggingface_file: Path, tmp_path: Path) -> None:
    for file in (sentencepiece_folder / "tokenizer.model", huggingface_file):
        assert load_tokenizer(file).encode("the day") == load_tokenizer(file.parent).encode("the day")
        assert load_tokenizer(file.parent).file == file
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"holds both"):
        load_tokenizer(tmp_path)


def test_truncated_model_is_refused_at_every_length(sentencepiece_folder: Path, tmp_path: Path) -> None:
    data = (sentencepiece_folder / "tokenizer.model").read_bytes()
    file = tmp_path / "tokenizer.model"
    for length in [*range(0, len(data), 97), *range(len(data) - 200, len(data) - 20)]:
        file.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"tokenizer\.model"):
            load_tokenizer(file)


def test_model_that_is_not_the_one_described_is_refused(sentencepiece_folder: Path, tmp_path: Path) -> None:
    for file in sentencepiece_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    load_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "sha256": "0" * 64}))
    with pytest.raises(UserError, match="damaged or was replaced"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: line 1 column 2: Expecting"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b'{"version": "1.0", "tru', "damaged"),
        ("tokenizer.json", b"\xff\xfe", "damaged"),
        ("tokenizer.json", b"[]", "damaged"),
        ("tokenizer.model", b"not a model at all", "damaged"),
        ("tokenizer.txt", b"", "is no tokenizer"),
        ("tokenizer_config.json", b"{}", "is no tokenizer"),
    ],
)
def test_wrong_file_is_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_absent_file_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match=r"holds neither"):
        load_tokenizer(tmp_path)


def save_llama(folder: Path) -> Path:
    """As Llama's: a space before the text, no words, a token for each byte, and `</s>` at the end of a document."""
    model = tokenizers.Tokenizer(models.BPE(byte_fallback=True))
    model.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)])
    model.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", "<|im_end|>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*special, *byte_tokens], show_progress=False)
    model.train_from_iterator([text[:60] for text in TEXTS], trainer)
    fields = json.loads(model.to_str())
    fields["added_tokens"] = [token for token in fields["added_tokens"] if token["content"] in special]
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    return folder / "tokenizer.json"


def save_prefixed(folder: Path) -> Path:
    """Byte-level with the default of the library: a space before the text."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel()
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(TEXTS, trainer)
    model.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("kind", ["byte-level", "prefixed", "llama"])
def test_ids_are_those_of_the_library_for_the_whole_text(kind: str, huggingface_file: Path, tmp_path: Path) -> None:
    file = {"llama": save_llama, "prefixed": save_prefixed}.get(kind, lambda _: huggingface_file)(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(file))
    library.no_truncation()
    library.no_padding()
    ours = load_tokenizer(file)
    # Special tokens at places where a long text might be cut, runs without a space, and spaces alone.
    texts = ["中" * (16_384 - shift) + "<|im_end|>" + "文" * 50 for shift in range(12)]
    texts += ["word " * 12_000, "中文内容没有空格" * 5000, " " * 40_000, "x" * 50_000, "".join(TEXTS) * 1000]
    for text in texts:
        ids = library.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids
        assert ours.decode(ours.encode(text)).removeprefix(" ") == library.decode(ids, False).removeprefix(" ")
    assert ours.encode(texts[5]).count(ours.special_ids["<|im_end|>"]) == 1


def test_the_end_token_is_found_by_its_name_or_named(tmp_path: Path) -> None:
    def save(*special: str) -> Path:
        model = tokenizers.Tokenizer(models.BPE())
        model.add_special_tokens(list(special))
        model.save(str(tmp_path / "tokenizer.json"))
        return tmp_path / "tokenizer.json"

    for token in ("</s>", "<|end_of_text|>", "<eos>", "<｜end▁of▁sentence｜>", "[EOS]", "<|endoftext|>"):
        assert load_tokenizer(save("<s>", token, "<|im_end|>")).eos_token_id == 1
    assert load_tokenizer(save("<s>", "</s>", "<|endoftext|>")).eos_token_id == 2
    assert load_tokenizer(tmp_path, "</s>").eos_token_id == 1
    with pytest.raises(
        UserError, match=r"has no special token <s2> to end .* choose with --eos-token among </s>, <\|end"
    ):
        load_tokenizer(tmp_path, "<s2>")
    with pytest.raises(UserError, match=r"has no one special token such as .* among <eos>, </s>$"):
        load_tokenizer(save("<eos>", "</s>"))
    with pytest.raises(UserError, match=r"choose with --eos-token among none at all"):
        load_tokenizer(save())


def test_a_tokenizer_that_loses_text_is_known(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert tokenizer.is_lossless
    model = tokenizers.Tokenizer(models.BPE())
    model.add_special_tokens(["</s>"])
    model.save(str(tmp_path / "tokenizer.json"))
    assert not load_tokenizer(tmp_path).is_lossless
    assert load_tokenizer(save_llama(tmp_path)).is_lossless


def test_foreign_sentencepiece_models_are_refused(tmp_path: Path) -> None:
    import io

    import sentencepiece

    data = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=data, model_type="bpe", vocab_size=100, minloglevel=5
    )
    (tmp_path / "tokenizer.model").write_bytes(data.getvalue())
    with pytest.raises(UserError, match=r"does not begin with .* or use the model's tokenizer\.json"):
        load_tokenizer(tmp_path / "tokenizer.model")
