"""Who may import whom: a room imports the rooms above it in ROOMS, and inside a room no files form a circle."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import ROOT

# From the ground up. A room within another (`model/kernels`) follows the room that it lies in.
ROOMS = [
    "ground", "model", "model/kernels", "data", "config", "distributed", "distributed/launchers", "parallel",
    "inference", "checkpoints", "checkpoints/formats", "training/record", "training/rewards",
    "training/objectives", "training", "reports/plan", "reports/doctor", "reports/run", "reports", "commands",
]  # fmt: skip
COMMANDS = {
    "train", "generate", "answer", "evaluate", "export", "serve", "plan", "doctor", "status", "report", "checkpoint",
    "tune",
}  # fmt: skip
GROUND = {"__init__", "accelerator", "cache", "cli", "errors", "files", "host", "remote", "schema", "units"}
# `config` asks the model for nothing but its shape.
CONFIG_MAY_IMPORT = {"minimind.model.config", "minimind.model.presets", "minimind.model.tuning"}


def find_modules(package: str) -> dict[str, Path]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((ROOT / package).rglob("*.py"))
    }


MODULES = {**find_modules("minimind"), **find_modules("data_prep")}
OURS = [name for name in MODULES if name.startswith("minimind")]


def imports_of(name: str) -> Iterator[tuple[str, bool]]:
    """Full names that a module imports, and whether inside a function. Imports for the type checker alone are none."""

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name}: a relative import"
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    yield (whole if whole in MODULES else child.module or "", inside)
            else:
                yield from walk(child, inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    return walk(ast.parse(MODULES[name].read_text(encoding="utf-8")), False)


def room_of(name: str) -> str:
    folder = MODULES[name].relative_to(ROOT / "minimind").parent.as_posix()
    if folder == ".":
        return "ground" if MODULES[name].stem in GROUND else "commands"
    return folder


def top(name: str) -> str:
    return name.split(".")[0]


def test_the_walk_sees_what_is_there():
    assert ("minimind.config.resolved_run", False) in imports_of("minimind.parallel.engine")
    assert ("deepspeed", False) in imports_of("minimind.parallel.engine")
    assert ("deepspeed", False) not in imports_of("minimind.training.trainer"), "a type checker's import was counted"


def test_every_file_has_its_room():
    assert {room_of(name) for name in OURS} == set(ROOMS)
    assert {MODULES[name].stem for name in OURS if room_of(name) == "commands"} == COMMANDS


@pytest.mark.parametrize("name", OURS)
def test_a_room_imports_only_what_stands_above_it(name):
    floor = ROOMS.index(room_of(name))
    for imported, inside in imports_of(name):
        assert top(imported) != "data_prep", f"{name} imports {imported}: training does not depend on preparation"
        if top(imported) == "minimind":
            assert not inside, f"{name} imports {imported} inside a function"
            assert ROOMS.index(room_of(imported)) <= floor, f"{name} imports {imported}, which stands below it"
            if room_of(name) == "config" and room_of(imported).startswith("model"):
                assert imported in CONFIG_MAY_IMPORT, f"{name} imports {imported}"


def test_no_circles():
    graph = {name: {other for other, _ in imports_of(name) if other in MODULES} for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in sorted(MODULES):
        visit(name, ())


@pytest.mark.parametrize("name", [name for name in MODULES if top(name) == "data_prep"])
def test_preparation_needs_only_the_ground_and_the_data(name):
    for imported, inside in imports_of(name):
        assert top(imported) not in ("torch", "deepspeed"), f"{name} imports {imported}"
        if top(imported) == "minimind":
            assert not inside, f"{name} imports {imported} inside a function"
            assert room_of(imported) in ("ground", "data", "config"), f"{name} imports {imported}"


def test_the_rooms_below_the_ranks_run_without_deepspeed():
    """In a process where its import fails; reading a run, without torch too."""
    below = [name for name in OURS if ROOMS.index(room_of(name)) < ROOMS.index("distributed")]
    run_without(["deepspeed", "transformers"], [*below, *(name for name in MODULES if top(name) == "data_prep")])
    # Generation too, in Python or by the command.
    run_without(["deepspeed", "transformers"], ["minimind.checkpoints.formats.load_model", "minimind.generate"])
    reading = ["minimind", "minimind.training.record.run_files", "minimind.status", "minimind.report"]
    run_without(["deepspeed", "torch"], reading)


def test_one_door_leads_to_the_device():
    """No other file names a type of device, but for kernels, torch's profiler and what DeepSpeed has for CUDA alone."""
    found = {
        MODULES[name].relative_to(ROOT).as_posix()
        for name in OURS
        if "/kernels/" not in MODULES[name].as_posix()
        for line in MODULES[name].read_text(encoding="utf-8").splitlines()
        if re.search(r"torch\.(cuda|mps|xpu|npu)\b|[\"'](cuda|mps|xpu|npu)\b", line)
    }
    assert found == {"minimind/accelerator.py", "minimind/config/deepspeed_table.py", "minimind/training/profiler.py"}


def run_without(missing: list[str], names: list[str]) -> None:
    program = "import sys, importlib\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in missing)
    program += "".join(f"importlib.import_module({name!r})\n" for name in names)
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
