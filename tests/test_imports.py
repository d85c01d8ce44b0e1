"""Who may import whom: the order of layers of the design, held by reading every import."""

from repository import ROOT
import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

DEFAULT_LAYER = 5

# Modules of a layer import lower layers, and one another without a circle. What is not named here belongs to a running
# engine or to a model's files: layer 5.
LAYERS = {
    0: "errors atomic schema flags host_tuning tokenizer data.manifest data.array_file data.shard_writer data.shards "
    "model.config model.arithmetic model.limits",
    1: "config cpu_gather distributed rendezvous lifeline lifeline_server ds_sections ds_communication ds_overlaps "
    "ds_experts",
    2: "ds_config expert_names schedule data.order data.dataset data.loader model model.attention model.cache "
    "model.cpu_experts model.cpu_layers model.grouped model.layers model.loss model.moe model.pretrained "
    "model.products model.rope model.routing model.transformer model.visibility",
    3: "experts native_experts",
    4: "engine",
    6: "trainer",
    7: "train generate evaluate export serve http_api batching checkpoint plan doctor status report trial micro_batch",
}
LAYER_OF = {f"minimind.{name}": layer for layer, names in LAYERS.items() for name in names.split()}

MAY_IMPORT_DEEPSPEED = {
    "minimind.distributed.launchers.deepspeed", "minimind.distributed.environment", "minimind.parallel.engine", "minimind.parallel.experts", "minimind.export",
    "minimind.parallel.deepspeed_moe", "minimind.checkpoints.portable_loading", "minimind.checkpoints.formats.init_from", "minimind.checkpoints.engine_files",
}  # fmt: skip
WITHOUT_TORCH = [name for name, layer in LAYER_OF.items() if layer == 0]


def find_modules(package: str) -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = {**find_modules("minimind"), **find_modules("data_prep")}


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


def layer_of(name: str) -> int:
    return LAYER_OF.get(name, DEFAULT_LAYER)


def top(name: str) -> str:
    return name.split(".")[0]


def test_the_walk_sees_what_is_there():
    assert len(MODULES) > 40
    assert ("minimind.config.resolve", False) in imports_of("minimind.parallel.engine")
    assert ("deepspeed", False) in imports_of("minimind.parallel.engine")
    assert ("deepspeed", False) not in imports_of("minimind.training.trainer"), "an import for the type checker was counted"


@pytest.mark.parametrize("name", [name for name in MODULES if top(name) == "minimind"])
def test_imports_go_down(name):
    for imported, inside in imports_of(name):
        if top(imported) not in ("minimind", "data_prep"):
            continue
        assert not inside, f"{name} imports {imported} inside a function"
        assert top(imported) == "minimind", f"{name} imports {imported}: training knows nothing of preparing"
        assert layer_of(imported) <= layer_of(name), f"{name} imports {imported}, which stands above it"


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
def test_preparation_imports_only_the_ground_floor(name):
    for imported, inside in imports_of(name):
        assert top(imported) not in ("torch", "deepspeed"), f"{name} imports {imported}"
        if top(imported) == "minimind":
            assert not inside, f"{name} imports {imported} inside a function"
            assert layer_of(imported) == 0 or imported == "minimind.config.run_config", f"{name} imports {imported}"


@pytest.mark.parametrize("name", MODULES)
def test_few_know_deepspeed_and_the_model_knows_little(name):
    tops = {top(imported) for imported, _ in imports_of(name)}
    if name not in MAY_IMPORT_DEEPSPEED and not name.startswith("minimind.checkpoint"):
        assert "deepspeed" not in tops
    assert "transformers" not in tops
    if name in WITHOUT_TORCH:
        assert "torch" not in tops
    if name.startswith("minimind.model."):
        assert not tops & {"argparse", "tyro"}


def test_the_model_the_data_and_the_configuration_run_without_deepspeed():
    """In a process where its import fails."""
    below = [
        name for name in MODULES
        if layer_of(name) <= 2 and name != "minimind.distributed.environment" and top(name) == "minimind"
    ]  # fmt: skip
    program = "import sys, importlib\nsys.modules['deepspeed'] = None\n" + "".join(
        f"importlib.import_module({name!r})\n" for name in [*below, *(n for n in MODULES if top(n) == "data_prep")]
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
