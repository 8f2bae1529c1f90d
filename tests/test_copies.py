"""The scripts are copies of each other: they differ where a reader is told that they do, and nowhere else."""

import ast
import difflib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARENT = ROOT / "sac_continuous.py"
ALLOWED = {"sac_dmc.py": {"Args", "make_env"}}  # copy: what may differ beside header and docstring


def places(text: str, names: set[str]) -> set[int]:
    """The lines, counted from 0, of the header, the docstring and the definitions called `names`."""
    body = ast.parse(text).body
    lines = set(range(body[0].end_lineno))
    for node in body:
        if getattr(node, "name", None) in names:
            lines |= set(range(node.lineno - 1, node.end_lineno))
    return lines


def strays(parent: str, copy: str, names: set[str]) -> list[str]:
    """The lines of either text that differ outside the places where they may."""
    a, b = parent.splitlines(), copy.splitlines()
    in_parent, in_copy = places(parent, names), places(copy, names)
    found = []
    for operation, a1, a2, b1, b2 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if operation != "equal":
            found += [f"- {n + 1}: {a[n]}" for n in range(a1, a2) if n not in in_parent]
            found += [f"+ {n + 1}: {b[n]}" for n in range(b1, b2) if n not in in_copy]
    return found


@pytest.mark.parametrize("name", ALLOWED)
def test_a_copy_differs_only_where_it_may(name):
    found = strays(PARENT.read_text(), (ROOT / name).read_text(), ALLOWED[name])
    assert not found, "\n".join(["these lines differ:", *found])


@pytest.mark.parametrize("name", ALLOWED)
@pytest.mark.parametrize("module", ["math", "envs", "cli", "records", "variants"])
def test_a_copy_is_tested_as_its_parent_is(module, name):
    (scripts,) = re.findall(r"^SCRIPTS = (\[.*\])$", (ROOT / "tests" / f"test_{module}.py").read_text(), re.M)
    assert {PARENT.stem, Path(name).stem} <= set(ast.literal_eval(scripts))


CHANGES = [("self.tau)", "0.1)"), ("import ctypes,", "import ctypes, copy,"), ("class SAC", "class Agent")]


@pytest.mark.parametrize("old, new", CHANGES)
def test_a_difference_elsewhere_is_found(old, new):
    text = PARENT.read_text()
    assert old in text and strays(text, text.replace(old, new, 1), {"Args", "make_env"})


def test_a_difference_in_its_place_is_allowed():
    text = PARENT.read_text()
    assert not strays(text, text.replace("seed: int = 1 ", "seed: int = 2 "), {"Args"})
    assert strays(text, text.replace("seed: int = 1 ", "seed: int = 2 "), {"make_env"})
