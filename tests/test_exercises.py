"""Each exercise of the course fails until it is done, is right with the solution, and is named by the pages."""

import ast
import re
import shutil
import subprocess
import sys

import pytest
import torch
from docs_pages import ARCHITECTURE, GUIDE, LANGUAGES, ROOT, find_sections, read_page

sys.path.insert(0, str(ROOT / "exercises"))
sys.path.insert(0, str(ROOT / "docs"))

import check
import worked
from checks import CHECKS, Wrong, same

BLANKS = sorted((ROOT / "exercises").glob("e*.py"))


@pytest.mark.parametrize("number", CHECKS)
def test_an_exercise_fails_until_it_is_done(number):
    answer = check.check(number)
    assert answer is not None and "not done yet" in answer
    assert check.check(number, solution=True) is None


@pytest.mark.parametrize("path", BLANKS, ids=lambda path: path.stem)
def test_a_blank_is_its_solution_without_the_body(path):
    def outline(text):
        """Everything but the bodies: documentation, imports, names and types of arguments."""
        tree = ast.parse(text)
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        inner = {child for node in functions for child in ast.walk(node) if child is not node}
        for node in functions:
            head = node.body[0]
            documented = isinstance(head, ast.Expr) and isinstance(head.value, ast.Constant)
            node.body = [head] if documented else [ast.Pass()]
        return ast.unparse(tree), len(functions) - len([node for node in functions if node in inner])

    solution = (path.parent / "solutions" / path.name).read_text(encoding="utf-8")
    assert outline(path.read_text(encoding="utf-8")) == outline(solution)


def test_a_wrong_answer_is_named(tmp_path, monkeypatch):
    with pytest.raises(Wrong, match=r"the loss should be 3.5, found 3.0"):
        same("the loss", 3.0, 3.5)
    shutil.copytree(ROOT / "exercises", tmp_path / "exercises")
    wrong = tmp_path / "exercises" / "e23_step_loss.py"
    wrong.write_text(wrong.read_text().replace("raise NotImplementedError", "return sum(means) / len(means)"))
    monkeypatch.setattr(check, "HERE", tmp_path / "exercises")
    assert check.check(23) == "not right: the example of the guide should be 3.5, found 3.0"


def test_the_command_says_what_is_missing():
    def run(*arguments):
        return subprocess.run(["bash", "launch/exercise.sh", *arguments], cwd=ROOT, capture_output=True, text=True)

    done = run("23")
    assert done.returncode == 1 and done.stdout.startswith("exercise 23: not done yet: write it in ")
    assert run("99").returncode == 2


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_page_names_every_exercise(language):
    assert sorted(CHECKS) == [int(path.stem[1:3]) for path in BLANKS] == list(range(1, len(BLANKS) + 1))
    links = re.findall(r"\(\.\./\.\./exercises/(e\d\d_\w+\.py)\)", read_page(language, "exercises.md"))
    assert links == [path.name for path in BLANKS]


@pytest.mark.parametrize("section", worked.read_practice())
def test_what_a_section_lets_its_reader_try_prints_what_it_shows(section, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    # DeepSpeed's, where a test before this one trained at stage 3, keeps other tensors.
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
    entry = worked.read_practice()[section]
    exec("\n".join(entry["code"]), {"__name__": "try"})
    assert capsys.readouterr().out.splitlines() == entry["prints"]
    assert set(entry["exercises"]) <= set(CHECKS) and entry["exercises"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_point_ends_with_something_to_do(language):
    found = {}
    for page in (ARCHITECTURE, GUIDE):
        for anchor, section in find_sections(read_page(language, page)).items():
            if f'id="{anchor}-points"' in section:
                found[anchor] = f"<!-- generated: practice:{anchor} -->" in section.split(f'id="{anchor}-practice"')[-1]
    assert [anchor for anchor in found if not found[anchor]] == []
    assert set(found) == set(worked.read_practice())
