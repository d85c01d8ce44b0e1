"""The documentation: complete in both languages, equal to the source it quotes, and runnable."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from typing import get_type_hints

import pytest
from docs_pages import (
    ARCHITECTURE,
    GUIDE,
    LANGUAGES,
    PAGES,
    ROOT,
    STEP_IDS,
    STEPS,
    find_anchors,
    find_blocks,
    find_citations,
    find_levels,
    find_links,
    find_sections,
    flow,
    page_path,
    read_page,
    without_blocks,
)
from warm_python import warm_python

from minimind.checkpoints.manifest import CheckpointManifest
from minimind.config.run_config import DataConfig, TrainConfig
from minimind.data.manifest import Manifest, ShardInfo, TokenizerInfo
from minimind.model import ModelConfig
from minimind.training.record.metrics import _TENSORBOARD_NAMES
from minimind.training.record.run_files import EvaluationRecord, ExpertBalance, StepRecord

sys.path.insert(0, str(ROOT / "docs"))

import refresh
import tables
import worked

# Each topic that the documentation promises: its page, its section, and a word that the section cannot do without.
TOPICS = {
    "index: who it is for": ("README.md", "beginners", "minimind_architecture.md"),
    "index: people who know NLP": ("README.md", "know-nlp", "YaRN"),
    "index: in a hurry": ("README.md", "hurry", "launch/quickstart.sh"),
    "index: papers": ("README.md", "papers", "arxiv.org/abs/1706.03762"),
    "index: online resources": ("README.md", "resources", "deepspeed.ai"),
    "readers from computer vision": (ARCHITECTURE, "notation", "ViT"),
    "the whole picture, top-down": (ARCHITECTURE, "whole-picture", "lm_head"),
    "assembly, bottom-up": (ARCHITECTURE, "assembly", "layers.py"),
    "RMSNorm against LayerNorm": (ARCHITECTURE, "rmsnorm", r"\mathrm{LayerNorm}"),
    "RoPE: sinusoidal and learned positions, derivation": (ARCHITECTURE, "rope", r"e^{i(m-n)\theta}"),
    "YaRN": (ARCHITECTURE, "yarn", r"\gamma_i"),
    "MHA, MQA, GQA": (ARCHITECTURE, "gqa", "H_{kv}"),
    "KV cache arithmetic": (ARCHITECTURE, "kv-cache", "12,288"),
    "flash attention": (ARCHITECTURE, "flash-attention", "2205.14135"),
    "SwiGLU, gating and width": (ARCHITECTURE, "swiglu", r"\frac83"),
    "MoE: history, sparse activation": (ARCHITECTURE, "moe", "1701.06538"),
    "MoE: router": (ARCHITECTURE, "router", "norm_topk_prob"),
    "MoE: load balancing, batch and sequence form": (ARCHITECTURE, "load-balancing", "seq_aux"),
    "MoE: shared experts": (ARCHITECTURE, "shared-experts", "635,376"),
    "MoE: training and inference optimisation": (ARCHITECTURE, "moe-efficiency", "grouped_mm"),
    "expert parallelism": (ARCHITECTURE, "expert-parallelism", "all-to-all"),
    "choice of tokenizer": (GUIDE, "tokenizer", "tokenizer.json"),
    "causal language modelling format": (GUIDE, "clm", "input_ids"),
    "shards": (GUIDE, "shards", "verify_shards"),
    "packing": (GUIDE, "packing", "cu_seqlens"),
    "the loader and its settings": (GUIDE, "loader", "--micro-batch-size"),
    "AdamW and its settings": (GUIDE, "adamw", r"\beta_2"),
    "Muon": (GUIDE, "muon", "--muon-lr"),
    "learning-rate schedules": (GUIDE, "schedules", "wsd"),
    "tuning advice with figures": (GUIDE, "tuning", "learning_rates.svg"),
    "gradient clipping": (GUIDE, "gradient-clipping", "--max-grad-norm"),
    "mixed precision, loss scaling": (GUIDE, "mixed-precision", "65504"),
    "gradient accumulation": (GUIDE, "gradient-accumulation", "3.5"),
    "activation checkpointing": (GUIDE, "activation-checkpointing", "--activation-checkpointing"),
    "ZeRO stages and memory": (GUIDE, "zero", "12P/N"),
    "offload": (GUIDE, "offload", "zero2_offload.json"),
    "checkpoint strategy": (GUIDE, "checkpoints", "--save-every"),
    "resuming, number of ranks": (GUIDE, "resuming", "SIGTERM"),
    "conversion": (GUIDE, "conversion", "safetensors"),
    "cross-entropy": (GUIDE, "cross-entropy", r"\ln p"),
    "auxiliary loss": (GUIDE, "aux-loss", "aux_loss"),
    "generation": (GUIDE, "generation", "#kv-cache"),
    "temperature": (GUIDE, "temperature", "0.6439"),
    "top-k and top-p": (GUIDE, "top-k-top-p", "0.6652"),
    "logging, TensorBoard": (GUIDE, "logging", "tensorboard --logdir"),
    "healthy and sick curves": (GUIDE, "curves", "healthy_and_sick.svg"),
    "multi-node: deepspeed, SLURM, MPI": (GUIDE, "multi-node", "srun"),
    "trouble: NaN": (GUIDE, "trouble-nan", "grad_norm"),
    "trouble: loss does not fall": (GUIDE, "trouble-flat", "lr"),
    "trouble: overfitting": (GUIDE, "trouble-overfitting", "eval_loss"),
    "trouble: too slow": (GUIDE, "trouble-slow", "tokens_per_second"),
    "trouble: out of memory": (GUIDE, "trouble-memory", "--dry-run"),
    "trouble: a hang": (GUIDE, "trouble-hang", "py-spy"),
    "trouble: a resume that differs": (GUIDE, "trouble-resume", "run_config.json"),
    "trouble: a launch that fails": (GUIDE, "trouble-launch", "MASTER_PORT"),
    "reference: shards": ("data_format.md", "manifest", "documents_sha256"),
    "reference: run folder and metrics": ("run_folder.md", "metrics", "tokens_per_second"),
    "reference: configuration": ("configuration.md", "train-fields", "--global-batch-size"),
    "reference: DeepSpeed JSON files": ("ds_configs.md", "files", "zero3_hpz.json"),
}
# Sections that only gather others, or are no technical point.
NO_POINTS = {"notation", "first-run", "loop", "data", "optimizer", "stability", "losses", "troubleshooting", "next"}


@pytest.mark.parametrize("topic", TOPICS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_every_topic_has_its_section(topic, language):
    page, anchor, word = TOPICS[topic]
    section = find_sections(read_page(language, page)).get(anchor, "")
    assert word in section, f"{language}/{page}#{anchor} does not treat {topic}"
    assert len(section) > 150


@pytest.mark.parametrize("page", PAGES)
def test_both_languages_have_the_same_sections(page):
    english, chinese = (find_levels(read_page(language, page)) for language in LANGUAGES)
    assert english == chinese and english


@pytest.mark.parametrize("page", PAGES)
def test_both_languages_show_the_same_code_and_commands(page):
    def shown(language):
        kinds = ("bash", "python", "json")
        return [
            (block.kind, re.sub(r" *#.*", "", block.text), block.needs is None)
            for block in find_blocks(read_page(language, page))
            if block.kind in kinds
        ]

    assert shown("en") == shown("zh")


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("page", [ARCHITECTURE, GUIDE])
def test_every_point_follows_the_five_steps(language, page):
    for anchor, section in find_sections(read_page(language, page)).items():
        if anchor in NO_POINTS or anchor.startswith("trouble-"):
            continue
        steps = zip(STEP_IDS, STEPS[language], strict=True)
        places = [section.find(f'# <a id="{anchor}-{name}"></a>{words}\n') for name, words in steps]
        assert -1 not in places and places == sorted(places), f"{language}/{page}#{anchor}: {places}"


def test_every_page_is_up_to_date_with_the_source():
    for page in refresh.find_pages():
        text = page.read_text(encoding="utf-8")
        fresh = refresh.refresh(text, "zh" if page.parent.name == "zh" else "en")
        assert text == fresh, f"{page} does not show the source as it is: run python docs/refresh.py"


def test_an_excerpt_is_contiguous_source_and_a_changed_one_is_noticed():
    marks = re.findall(r"<!-- excerpt: (.+?) -->\n```python\n(.*?)\n```", read_page("en", ARCHITECTURE), re.S)
    assert len(marks) > 12
    for what, shown in marks:
        source = (ROOT / what.split("::")[0]).read_text(encoding="utf-8")
        stripped = "\n".join(line.strip() for line in source.splitlines())
        assert "\n".join(line.strip() for line in shown.splitlines()) in stripped, what
    text = read_page("en", ARCHITECTURE)
    assert refresh.refresh(text.replace("F.silu", "F.relu"), "en") == text != text.replace("F.silu", "F.relu")
    with pytest.raises(SystemExit, match="has no nothing_like_it"):
        refresh.read_excerpt("minimind/model/rope.py::nothing_like_it")
    with pytest.raises(SystemExit, match="no line begins"):
        refresh.read_excerpt("minimind/model/rope.py::rotate | from: never written")


def test_every_configuration_field_is_described_in_chinese_and_only_those():
    words = {
        "none, must be given",
        "bf16 on a GPU that has it, fp16 on an older one, fp32 on a CPU",
        "ZeRO stage 1",
        "fresh weights",
        "pretrain; dpo on preferences, kto on feedback",
        "none",
        "nothing",
        "twice the rank",
        "10 on a GPU, 1 on a CPU",
        "as many as --epochs asks for",
        "2% of the run, at least 1",
    }
    words |= {"micro batch x accumulation x ranks", "bf16 on a GPU that has it, otherwise fp32"}
    words |= {"autoep, for a model with experts", "1 each"}
    fields = set()
    for cls, file in (
        (ModelConfig, "model/config.py"),
        (DataConfig, "config/run_config.py"),
        (TrainConfig, "config/run_config.py"),
    ):
        found = [field[0] for field in tables.documented_fields(cls, f"minimind/{file}")]
        assert found == list(cls.__dataclass_fields__), "a field without a line of documentation"
        fields |= set(found)
    described = set(tables.chinese_descriptions())
    assert described - words == fields, f"docs/zh/field_descriptions.json: {(described - words) ^ fields}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_messages_that_troubleshooting_quotes_are_those_of_the_source(language):
    source = flow("".join(path.read_text(encoding="utf-8") for path in (ROOT / "minimind").rglob("*.py")))
    text = flow(read_page(language, GUIDE))
    quoted = (
        "good checkpoint: ",
        "no process group at MASTER_ADDR",
        "this host has",
        "compiles DeepSpeed's",
        " does not build",
    )
    for message in (*quoted, "changed: "):
        assert message in source and message in text


@pytest.mark.parametrize("language", LANGUAGES)
def test_reference_pages_name_every_field_on_disk(language):
    data, run = read_page(language, "data_format.md"), read_page(language, "run_folder.md")
    for cls in (Manifest, ShardInfo, TokenizerInfo):
        for name in cls.__dataclass_fields__:
            assert f"`{name}`" in data, f"{language}/data_format.md: {name}"
    keys = {key for cls in (StepRecord, EvaluationRecord, ExpertBalance) for key in get_type_hints(cls)}
    assert {"eval_loss", "tokens_per_second"} <= keys
    keys |= set(CheckpointManifest.__dataclass_fields__)
    for name in (*keys, *_TENSORBOARD_NAMES.values()):
        assert f"`{name}`" in run, f"{language}/run_folder.md: {name}"


@pytest.mark.parametrize("path", refresh.find_pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_internal_links_and_anchors_exist(path):
    links = find_links(path.read_text(encoding="utf-8"))
    assert links or path.name == "README.md"
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{path}: {link}"
        if anchor:
            assert anchor in find_anchors(target.read_text(encoding="utf-8")), f"{path}: {link}"


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("language", LANGUAGES)
def test_formulas_are_written_so_that_they_are_shown(language, page):
    text = re.sub(r"`[^`\n]*`", "", without_blocks(read_page(language, page)))
    formulas = re.findall(r"\$\$.+?\$\$", text, re.S)
    text = re.sub(r"\$\$.+?\$\$", "", text, flags=re.S)
    inline = re.findall(r"(.?)\$([^$]+)\$(.?)", text)
    assert text.count("$") == 2 * len(inline)
    assert inline or page not in (ARCHITECTURE, GUIDE, "data_format.md", "rewards.md")
    for before, formula, after in inline:
        # A formula that touches a Chinese character or mark is not taken for one.
        assert ord(before or " ") < 0x2000 and ord(after or " ") < 0x2000, f"{before}${formula}${after}"
    for formula in [*formulas, *(found[1] for found in inline)]:
        # Markdown takes a backslash before a mark for an escape, and the formula loses it.
        assert not re.search(r"\\[,_;:!%#]", formula), formula


def test_papers_carry_title_and_number():
    known = {
        number: title
        for topic in json.loads((ROOT / "docs" / "papers.json").read_text(encoding="utf-8"))
        for number, title in topic["papers"].items()
    }
    for language in LANGUAGES:
        cited = set()
        for page in (ARCHITECTURE, GUIDE):
            text = read_page(language, page)
            citations = find_citations(text)
            # No number without a title in front of it.
            assert len(citations) == len(re.findall(r"arXiv \d{4}\.\d{4,5}", without_blocks(text))), (language, page)
            for title, number in citations:
                assert known.get(number) == title, f"{language}/{page}: {number} {title}"
                cited.add(number)
        assert cited == set(known), f"{language}: {cited ^ set(known)}"


def test_pictures_are_drawings_made_from_runs():
    curves = json.loads((ROOT / "docs" / "pictures" / "curves.json").read_text(encoding="utf-8"))
    assert all(len(run["loss"]) == len(run["step"]) for run in curves.values()) and len(curves) >= 6
    for language in LANGUAGES:
        for link in find_links(read_page(language, GUIDE)):
            if link.endswith(".svg"):
                assert "<svg" in (ROOT / "docs" / "en" / link).resolve().read_text(encoding="utf-8")


# Commands ----------------------------------------------------------------------------------------------------------

# Commands of the repository's README that this test does not run, and why.
LEFT_OUT = {
    "bash launch/quickstart.sh": "the whole quickstart: .ci/run runs it",
    "bash launch/test.sh": "these tests",
    "deepspeed --num_gpus": "needs GPUs",
    ".venv/bin/tensorboard": "serves until it is stopped",
}


def find_commands(text: str) -> list[str]:
    """Every command line of a page without a mark, in order, each once."""
    commands: dict[str, None] = {}
    for block in find_blocks(text):
        if block.kind == "bash" and block.needs is None:
            for line in block.text.replace("\\\n", " ").splitlines():
                command = line.split(" #")[0].strip()
                if command and not command.startswith(tuple(LEFT_OUT)):
                    commands[command] = None
    return list(commands)


def find_base(text: str) -> str | None:
    """The page whose commands come before those of this one, which says so."""
    found = re.search(r"^<!-- after: (\S+) -->\n.*\]\((\S+)\)", text, re.M)
    assert found is None or found[1] == found[2]
    return found and found[1]


def shorten(command: str) -> str:
    """README's training commands on a model that a CPU trains in seconds; everything else as it stands."""
    if "runs/mine" in command and "pretrain.sh" in command:
        return command.replace("--model minimind3", "--model tiny --steps 2 --seq-len 64 --eval-samples 4")
    return command


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A copy of the repository with a small pretrain.jsonl, as a reader has it who has set up .venv."""
    copy = tmp_path_factory.mktemp("docs") / "repository"
    left_out = shutil.ignore_patterns(".git", ".venv", "data", "runs", ".cache", "*_cache", "__pycache__", "tests")
    # "data" in the root only: minimind/data is code.
    copy.mkdir()
    for path in ROOT.iterdir():
        if path.name in left_out(str(ROOT), [path.name]):
            continue
        if path.is_dir():
            shutil.copytree(path, copy / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(path, copy / path.name)
    (copy / ".venv" / "bin").mkdir(parents=True)
    with warm_python(copy / ".venv" / "bin" / "python"):
        yield copy


def run_in(folder, command: str) -> str:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "NUM_RANKS": "1"}
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_page_runs_alone_by_its_own_commands(scratch):
    """Each page begins with an empty data/ and runs/, or with what the page that it names has left there."""
    texts = {page: read_page("en", page) for page in PAGES}
    bases = {page: find_base(text) for page, text in texts.items()}
    texts["../README.md"] = (ROOT / "README.md").read_text(encoding="utf-8")
    corpus = next(command for command in find_commands(texts[GUIDE]) if "data_prep.default_corpus" in command)
    run_in(scratch, corpus)
    shutil.move(scratch / "data/guide/corpus.jsonl", scratch / "pretrain.jsonl")  # README's reader has a text
    printed: dict[str, str] = {}
    tried = {"\n".join(entry["code"]) + "\n" for entry in worked.read_practice().values()}  # in test_exercises.py
    for page, text in texts.items():
        for folder in ("data", "runs"):
            shutil.rmtree(scratch / folder, ignore_errors=True)
            if base := bases.get(page):
                shutil.copytree(scratch / "left" / base / folder, scratch / folder, symlinks=True)
        for command in find_commands(text):
            printed[command] = run_in(scratch, shorten(command))
        for block in find_blocks(text) if page in (GUIDE, "data_format.md") else ():
            if block.kind == "python" and block.text.startswith(("import", "from")) and block.text not in tried:
                subprocess.run([scratch / ".venv/bin/python", "-c", block.text], cwd=scratch, check=True)
        if page in bases.values():
            for folder in ("data", "runs"):
                shutil.copytree(scratch / folder, scratch / "left" / page / folder, symlinks=True)
    plan = next(output for command, output in printed.items() if "--run-dir runs/plan" in command)
    assert tables.estimate_plan("minimind3", 2, 512).summary() in plan, "--dry-run and the guide's table disagree"
    metrics = scratch / "left" / GUIDE / "runs/guide/metrics.jsonl"
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [record["step"] for record in steps if "loss" in record] == list(range(1, 26))
    assert abs(steps[0]["loss"] - math.log(6400)) < 0.1


def test_a_command_is_found_and_a_marked_one_is_not():
    commands = find_commands(read_page("en", GUIDE))
    assert any(command.startswith("NUM_RANKS=2 DRY_RUN=1") for command in commands)
    assert not any("srun" in command or "mpirun" in command for command in commands)
    assert len(commands) >= 12


@pytest.mark.parametrize("page", PAGES)
def test_commands_use_what_was_made_before_them(page):
    """The cheap half of the test above: no command names data or a run that no earlier one has named as its output."""
    chain = [page]
    while base := find_base(read_page("en", chain[0])):
        chain.insert(0, base)
    made: set[str] = set()
    for command in [command for name in chain for command in find_commands(read_page("en", name))]:
        outputs = set(re.findall(r"(?:--output|--run-dir|>) ((?:data|runs)/[\w/.-]+)", command))
        for path in set(re.findall(r"(?<![\w/])(?:data|runs)/[\w/.-]+", command)) - outputs:
            assert any(path.startswith(place) for place in made), f"{page}: nothing has made {path}: {command}"
        made |= outputs


def test_both_languages_say_which_page_comes_before():
    bases = [{page: find_base(read_page(language, page)) for page in PAGES} for language in LANGUAGES]
    assert bases[0] == bases[1] and set(bases[0].values()) == {None, GUIDE, "fine_tuning.md"}


def find_flags() -> set[str]:
    """Every flag of the project's commands: the annotated names in the sources of commands and configurations."""
    names: set[str] = set()
    places = (
        "data_prep/*.py",
        "launch/*.py",
        "data_prep/reading/*.py",
        "data_prep/writing/*.py",
        "minimind/*.py",
        "minimind/data/__main__.py",
        "minimind/config/*.py",
        "minimind/model/config.py",
        "minimind/inference/*.py",
        "minimind/checkpoints/formats/export.py",
        "minimind/reports/plan/planned_run.py",
    )
    for path in (path for place in places for path in ROOT.glob(place)):
        names |= set(re.findall(r"^    ([a-z][a-z0-9_]*): ", path.read_text(encoding="utf-8"), re.M))
    return {"--" + name.replace("_", "-") for name in names}


# Flags of other programs, and the placeholder that explains how booleans are written.
FOREIGN_FLAGS = {"--jinja", "--solution", "--name", "--config", "--gpu-bind", "--append-eod"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_flags_named_in_the_pages_exist(language):
    known = find_flags() | FOREIGN_FLAGS
    for page in PAGES:
        for flag in re.findall(r"(?<![\w-])`(--[a-z][a-z0-9-]*)", read_page(language, page)):
            assert flag.replace("--no-", "--") in known, f"{page_path(language, page)}: {flag} is no flag"
