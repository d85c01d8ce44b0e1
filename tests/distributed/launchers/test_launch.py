"""Real ranks on one machine: as many as there are, whatever the ZeRO stage, they are the one-process run.

The command of every user, `deepspeed launch/pretrain.sh`, is started for the usual stages; the other comparisons run on
two ranks that have imported everything once.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
from pytest import approx
from stream_hash import hash_stream
from training_runs import ROOT, RankPool, flags_for, losses, rank_pool, read_metrics, train

from minimind.config.run_config import ObjectiveName
from minimind.distributed.launchers.local import find_free_port

BIN = Path(sys.executable).parent
SETTINGS = {"hidden_size": 32, "num_hidden_layers": 2, "steps": 6, "lr": 5e-3, "save_every": 0}


def flags(corpus: Path, run_dir: Path, **others) -> list[str]:
    return flags_for(corpus, run_dir, **{**SETTINGS, **others})


@pytest.fixture(scope="module")
def pool():
    yield from rank_pool(2)


@pytest.fixture(scope="module")
def one_process(tiny_corpus, tmp_path_factory) -> dict[int, float]:
    """The losses of the plain run on one rank."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    train(flags(tiny_corpus, run_dir, stage=0))
    return losses(run_dir)


def assert_same(found: dict[int, float], expected: dict[int, float], tolerance: float) -> None:
    assert list(found) == list(expected)
    assert list(found.values()) == approx(list(expected.values()), rel=tolerance)


def start(command: list[str], **environment: str) -> subprocess.Popen:
    """With the environment's launcher variables taken away, and its own programs first."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    env = {**clean, "PATH": f"{BIN}:{os.environ['PATH']}", **environment}
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def run(command: list[str], **environment: str) -> tuple[int, str, str]:
    process = start(command, **environment)
    try:
        out, err = process.communicate(timeout=400)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


def deepspeed(*args: str) -> list[str]:
    return ["deepspeed", "--num_gpus", "2", "--master_port", str(find_free_port()), "launch/pretrain.sh", *args]


def processes_of(word: str) -> list[str]:
    """Command lines of running processes that name `word`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if word in line:
            found.append(line)
    return found


def shared_memory() -> set[str]:
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir() if "deepspeed" in path.name} if folder.is_dir() else set()


def assert_nothing_left(run_dir: Path, before: set[str]) -> None:
    for _ in range(100):
        if not processes_of(str(run_dir)):
            break
        time.sleep(0.1)
    assert processes_of(str(run_dir)) == []
    assert shared_memory() <= before
    assert not [path for path in run_dir.rglob("*") if path.suffix in (".tmp", ".partial")]


# The launchers.


@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_under_the_deepspeed_launcher_are_the_one_process_run(tiny_corpus, tmp_path, one_process, stage):
    before = shared_memory()
    code, out, err = run(deepspeed(*flags(tiny_corpus, tmp_path / "run", stage=stage)))
    assert code == 0, out + err
    assert f"device    2 x cpu, fp32, ZeRO stage {stage}" in out
    assert out.count("step 6/6") == 1, "more than one rank speaks"
    assert_same(losses(tmp_path / "run"), one_process, 1e-4)
    assert_nothing_left(tmp_path / "run", before)


def test_the_script_starts_its_ranks_by_itself(tiny_corpus, tmp_path, one_process):
    before = shared_memory()
    code, out, err = run(["launch/pretrain.sh", *flags(tiny_corpus, tmp_path / "run")], NUM_RANKS="2")
    assert code == 0, out + err
    assert "2 x cpu" in out and "Traceback" not in err
    assert_same(losses(tmp_path / "run"), one_process, 1e-4)
    assert_nothing_left(tmp_path / "run", before)


def test_a_mistake_under_the_deepspeed_launcher_is_said_once(tiny_corpus, tmp_path):
    code, out, err = run(deepspeed(*flags(tiny_corpus, tmp_path / "run", seq_len=65)))
    assert code != 0
    assert (out + err).count("error: seq_len: 65 is beyond max_position_embeddings 64") == 1
    assert "Traceback" not in out + err and not (tmp_path / "run").exists()


def test_killed_ranks_leave_nothing(tiny_corpus, tmp_path):
    """SIGKILL to the process that a user sees: its ranks end too."""
    before, run_dir = shared_memory(), tmp_path / "run"
    process = start(["bash", "launch/pretrain.sh", *flags(tiny_corpus, run_dir, steps=100_000)], NUM_RANKS="2")
    try:
        for _ in range(3000):
            if (run_dir / "metrics.jsonl").exists() and len(read_metrics(run_dir)) > 2:
                break
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        else:
            raise AssertionError("the run never began")
        assert len(processes_of(str(run_dir))) == 3
    finally:
        process.kill()
        process.wait(60)
        process.stdout.close()
        process.stderr.close()
    for _ in range(600):
        if not processes_of(str(run_dir)):
            break
        time.sleep(0.1)
    assert processes_of(str(run_dir)) == []
    assert shared_memory() <= before


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"NUM_RANKS": "1"}, "launch/pretrain.sh --steps 3 --run-dir a\\ b"),
        ({"NUM_RANKS": "4"}, "-m minimind.distributed.launchers.local 4 "),
        ({"CUDA_VISIBLE_DEVICES": "0,2,3"}, "-m minimind.distributed.launchers.local 3 "),
        ({"CUDA_VISIBLE_DEVICES": ""}, "launch/pretrain.sh --steps 3 --run-dir a\\ b"),
    ],
)
def test_dry_runs_of_the_script_show_the_command(tmp_path, environment, expected):
    command = ["bash", str(ROOT / "launch" / "pretrain.sh"), "--steps", "3", "--run-dir", "a b"]
    code, out, err = run(command, DRY_RUN="1", **environment)
    assert (code, err) == (0, "")
    assert out.count("\n") == 1 and expected in out and "--run-dir a\\ b" in out


@pytest.mark.parametrize("name", [name for name in get_args(ObjectiveName) if name != "pretrain"])
@pytest.mark.parametrize("program", ["bash", sys.executable])
def test_every_objective_has_its_script(program, name):
    code, out, err = run([program, str(ROOT / "launch" / f"{name}.sh"), "--steps", "3"], DRY_RUN="1", NUM_RANKS="1")
    assert (code, err) == (0, "")
    assert out.strip().endswith(f"launch/pretrain.sh --objective {name} --steps 3")


@pytest.mark.parametrize(
    ("container", "expected"),
    [
        ("", f"--wait=60 {ROOT}/"),
        (
            "a/minimind.sif",
            f"apptainer exec --nv --bind {ROOT}:{ROOT}\\,/data:/data --pwd {ROOT} a/minimind.sif python3 ",
        ),
        (
            "org/minimind:1",
            f"--container-image=org/minimind:1 --container-mounts={ROOT}:{ROOT}\\,/data:/data "
            f"--container-workdir={ROOT} python3 ",
        ),
    ],
    ids=["no image", "apptainer", "pyxis"],
)
def test_one_variable_runs_a_job_in_a_container(container, expected):
    command = ["bash", str(ROOT / "launch" / "pretrain.sbatch"), "--steps", "3"]
    code, out, err = run(command, DRY_RUN="1", CONTAINER=container, CONTAINER_MOUNTS="/data")
    assert (code, err) == (0, "")
    assert out.startswith("srun ") and expected in out and out.strip().endswith("launch/pretrain.sh --steps 3")


@pytest.mark.parametrize(("cores", "said"), [("", True), ("1", True), ("8", False)])
def test_a_job_whose_ranks_have_one_core_says_so(tmp_path, cores, said):
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho node1\n")
    (tmp_path / "scontrol").chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node1", "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT)}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", str(ROOT / "launch" / "pretrain.sbatch"), "--steps", "3"]
    code, _, err = run(command, DRY_RUN="1", PATH=path, SLURM_CPUS_PER_TASK=cores, **slurm)
    assert code == 0 and ("no --cpus-per-task above 1: SLURM gives a rank one core" in err) == said


def test_both_images_are_made_alike():
    """Neither is built by a test: that needs root, a network and gigabytes."""
    docker, apptainer = ((ROOT / name).read_text() for name in ("Dockerfile", "launch/apptainer.def"))
    assert re.findall(r"^FROM (\S+)", docker, re.M) == re.findall(r"^From: (\S+)", apptainer, re.M) != []
    for text in (docker, apptainer):
        assert "bash /opt/minimind/container.sh" in text
        for name in ("requirements.txt", "requirements-serve.txt", "launch/container.sh"):
            assert name in text and (ROOT / name).is_file()


def test_the_script_is_python_too():
    compile((ROOT / "launch" / "pretrain.sh").read_text(), "pretrain.sh", "exec")
    assert os.access(ROOT / "launch" / "pretrain.sh", os.X_OK)


# Two ranks and one, in processes that stay.


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_in_bf16(pool: RankPool, tiny_corpus, tmp_path, one_process, stage):
    pool.run(train, flags(tiny_corpus, tmp_path, stage=stage, precision="bf16"))
    assert list(losses(tmp_path).values()) != approx(list(one_process.values()), rel=1e-7)
    assert_same(losses(tmp_path), one_process, 2e-2)


@pytest.mark.parametrize(
    "others",
    [
        {"stage": 0},
        {"stage": 2},
        {"micro_batch_size": 2},
        {"stage": 3, "activation_checkpointing": True, "flash_attn": False},
        {"ds_config": ROOT / "ds_configs" / "zero3_hpz.json"},
    ],
    ids=["stage 0", "stage 2", "without accumulation", "checkpointed", "hpz"],
)
def test_other_ways_on_two_ranks(pool: RankPool, tiny_corpus, tmp_path, one_process, others):
    pool.run(train, flags(tiny_corpus, tmp_path, **others))
    assert_same(losses(tmp_path), one_process, 1e-4)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_document_mask_weighs_the_targets_of_all_ranks(pool: RankPool, tiny_corpus, tmp_path, stage):
    """Ranks and micro-batches have unequal numbers of targets; norms show the gradient, and evaluations the split."""
    settings = {"document_mask": True, "stage": stage, "eval_every": 3}
    train(flags(tiny_corpus, tmp_path / "one", **settings))
    pool.run(train, flags(tiny_corpus, tmp_path / "two", **settings))
    assert_same(losses(tmp_path / "two"), losses(tmp_path / "one"), 1e-4)
    for key in ("grad_norm", "eval_loss", "eval_targets", "consumed_samples", "tokens_seen", "lr"):
        one, two = (
            [record[key] for record in read_metrics(tmp_path / name) if key in record] for name in ("one", "two")
        )
        assert two == approx(one, rel=1e-4) and len(one) >= 2, key


def train_and_hash(args: list[str]) -> list[int]:
    """Train, and give the hash of this rank's batches of every step."""
    from minimind.training.trainer import Trainer

    hashes = []
    take = Trainer.train_step

    def note(self, batches):
        hashes.append(hash_stream(batches))
        take(self, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", note)
        train(args)
    return hashes


def test_one_and_two_ranks_consume_the_same_tokens(pool: RankPool, tiny_corpus, tmp_path):
    settings = {"steps": 20, "hidden_size": 16, "num_hidden_layers": 1}
    one = train_and_hash(flags(tiny_corpus, tmp_path / "one", **settings))
    parts = pool.run(train_and_hash, flags(tiny_corpus, tmp_path / "two", **settings))
    assert len(one) == 20 and len(set(one)) == 20
    assert not set(parts[0]) & set(parts[1]), "both ranks took the same samples"
    assert [(a + b + 2**63) % 2**64 - 2**63 for a, b in zip(*parts, strict=True)] == one


def test_a_bad_rank_is_named(pool: RankPool, tiny_corpus, tmp_path):
    results = pool.run(train_with_a_bad_rank, flags(tiny_corpus, tmp_path, save_every=2))
    for words in results:
        assert words.startswith("step 3: loss is nan on rank 1;") and "step_00000002" in words
    assert list(losses(tmp_path)) == [1, 2]


def train_with_a_bad_rank(args: list[str]) -> str:
    """Rank 1's loss is NaN in step 3; what the error says."""
    from minimind.model import MiniMindForCausalLM
    from minimind.training.trainer import BadStepError

    forward, calls = MiniMindForCausalLM.forward, [0]

    def spoilt(self, *given, **named):
        output = forward(self, *given, **named)
        calls[0] += int(self.training)
        if os.environ["RANK"] == "1" and calls[0] == 6:
            return output._replace(loss=output.loss * float("nan"))
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MiniMindForCausalLM, "forward", spoilt)
        try:
            train(args)
        except BadStepError as error:
            return str(error)
    return "nothing was noticed"


def test_what_rank_0_alone_finds_out_reaches_every_rank(pool: RankPool, tiny_corpus, tmp_path):
    """A run folder that cannot be made: nobody is left waiting."""
    (tmp_path / "run").write_text("mine")
    pool.start(train, flags(tiny_corpus, tmp_path / "run"))
    results = pool.finish()
    assert [kind for kind, _ in results] == ["error", "error"]
    assert str(results[0][1]) == str(results[1][1]) and str(tmp_path / "run") in str(results[0][1])
