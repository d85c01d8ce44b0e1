"""What `import minimind` offers, on a run, a checkpoint, an export and a `.pth`; the code of docs/*/python.md."""

import ast
import math
import subprocess
import sys

import pytest
import torch
from docs_pages import LANGUAGES, find_blocks, read_page
from repository import ROOT
from tokenizers_for_tests import TEXT, save_sentencepiece
from training_runs import flags_for, train

import minimind
from minimind.errors import UserError
from minimind.export import main as export_main
from minimind.inference.generation import complete
from minimind.inference.sampling import GenerationOptions

PLACES = ["runs/first", "runs/first/checkpoints/step_00000004", "data/export", "data/pth", "data/pth/pretrain_64.pth"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder as the page has it: a run of a tiny model, its shards, its exports."""
    home = tmp_path_factory.mktemp("home")
    (home / "tokenizer").mkdir()
    save_sentencepiece(home / "tokenizer")
    (home / "text.txt").write_text(TEXT)
    flags = ["--input", str(home / "text.txt"), "--tokenizer", str(home / "tokenizer")]
    flags += ["--output", str(home / "data/shards"), "--val-fraction", "0"]
    subprocess.run([sys.executable, "-m", "data_prep.tokenize_corpus", *flags], cwd=ROOT, check=True)
    shape = {"vocab_size": 400, "hidden_size": 64, "max_position_embeddings": 128}
    train(flags_for(home / "data/shards", home / "runs/first", steps=4, **shape))
    for name, kind in (("export", "hf"), ("pth", "pth")):
        export_main(["--run-dir", str(home / "runs/first"), "--output", str(home / "data" / name), "--format", kind])
    return home


@pytest.fixture
def at_home(home, monkeypatch):
    monkeypatch.chdir(home)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_page_runs_from_top_to_bottom(language, at_home, capsys):
    page = read_page(language, "python.md")
    program = "\n".join(block.text for block in find_blocks(page) if block.kind == "python")
    exec(compile(program, "python.md", "exec"), {})
    assert "LanguageModel(" in capsys.readouterr().out
    assert all(f"minimind.{name}" in page for name in minimind.__all__)
    assert all(f"| `{place}` |" in page for place in PLACES if place != "data/pth")
    assert all(f"`{name}`" in page for name in GenerationOptions.__dataclass_fields__)


def test_every_place_gives_the_same_model(at_home):
    loaded = [minimind.load(place, device="cpu") for place in PLACES]
    texts = {minimind.generate(m, "The quick", max_new_tokens=20, temperature=0) for m in loaded}
    assert len(texts) == 1
    state = loaded[0].model.state_dict()
    for place, m in zip(PLACES, loaded, strict=True):
        alone = minimind.MiniMindForCausalLM.from_pretrained(place)
        assert alone.config == m.model.config and not alone.training
        assert all(torch.equal(tensor, state[name]) for name, tensor in alone.state_dict().items())


def test_generate_and_stream_are_the_commands_generation(at_home):
    m = minimind.load("runs/first", device="cpu")
    prompts = ["the quick", "x"]
    options = {"max_new_tokens": 12, "temperature": 0.9, "seed": 3, "stop": "z", "stop_token_ids": ()}
    expected = complete(m.model, m.tokenizer, prompts, GenerationOptions(**{**options, "stop": ("z",)}))
    assert minimind.generate(m, prompts, **options) == [answer.text for answer in expected]
    assert minimind.generate(m, prompts[0], **options) == expected[0].text
    assert "".join(minimind.stream(m, prompts[0], **options)) == expected[0].text
    asked = minimind.generate(m, "x", chat=True, system="y", **options)
    assert asked == "".join(minimind.stream(m, "x", chat=True, system="y", **options)) != expected[1].text
    with pytest.raises(UserError, match="add chat=True"):
        minimind.generate(m, "x", system="y")
    with pytest.raises(UserError, match="top_k: 0 is not"):
        minimind.generate(m, "x", top_k=0)
    with pytest.raises(TypeError, match="max_tokens"):
        minimind.generate(m, "x", max_tokens=3)


def test_a_score_is_the_sum_over_the_text_alone(at_home):
    m = minimind.load("runs/first", device="cpu")
    text, context = "jumps over the lazy dog", "the quick brown fox "
    ids = m.tokenizer.encode(context + text)
    start = len(m.tokenizer.encode(context.rstrip()))
    with torch.no_grad():
        logprobs = m.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = sum(float(logprobs[i - 1, ids[i]]) for i in range(start, len(ids)))
    found = minimind.score(m, text, context=context)
    assert found.log_likelihood == pytest.approx(wanted, rel=1e-5) and found.num_tokens == len(ids) - start
    assert found.loss == pytest.approx(-wanted / found.num_tokens, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.bits_per_byte == pytest.approx(-wanted / math.log(2) / len(text), rel=1e-5)
    assert minimind.score(m, [text, "x"], context=context)[0] == found != minimind.score(m, text)
    for wrong in ("", "x " * 200):
        with pytest.raises(UserError):
            minimind.score(m, wrong)


def test_the_shards_are_the_text(at_home):
    m = minimind.load("data/export", device="cpu")
    dataset = minimind.load_shards("data/shards", seq_len=16)
    assert (
        m.tokenizer.decode(dataset[0].input_ids.tolist())
        == TEXT[: len(m.tokenizer.decode(dataset[0].input_ids.tolist()))]
    )
    assert len(minimind.load_shards("data/shards/train", seq_len=16, document_mask=True)) == len(dataset)
    with pytest.raises(UserError, match="no val split"):
        minimind.load_shards("data/shards", "val")


def test_names_are_found_without_torch_and_stay_functions_beside_the_commands(home):
    """In a fresh process; `import minimind.generate` would set the module as the package's attribute."""
    program = (
        "import sys, minimind\n"
        "assert set(minimind.__all__) <= set(dir(minimind))\n"
        "assert not hasattr(minimind, 'nothing')\n"
        "assert not {'torch', 'numpy', 'deepspeed'} & set(sys.modules), 'the import alone loads them'\n"
        "import minimind.generate\n"
        "from minimind.generate import main\n"
        "from minimind import generate\n"
        "assert callable(main) and generate is minimind.generate\n"
        "m = minimind.load(sys.argv[1], device='cpu')\n"
        "print(minimind.generate(m, 'Once', max_new_tokens=4, temperature=0, stop_token_ids=[]))\n"
        "assert 'deepspeed' not in sys.modules\n"
    )
    command = [sys.executable, "-c", program, str(home / "data/export")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr[-2000:]


def test_type_checkers_see_the_names_where_they_are():
    tree = ast.parse((ROOT / "minimind/__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    shown = {alias.name: node.module for node in block.body for alias in node.names}  # type: ignore[union-attr]
    assert shown == minimind._HOMES and set(minimind.__all__) == set(shown) - {"load_weights"}
