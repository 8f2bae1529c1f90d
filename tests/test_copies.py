"""The scripts are copies of each other: they differ in the definitions named here, nowhere else."""

import ast
import difflib
import re
from functools import cache

import pytest
from helpers import ROOT

PARENT = (ROOT / "sac_continuous.py").read_text()
METADATA = "# Requirements for `uv run"  # what begins the last section

# Copy: the names of the definitions and constants that may differ, beside docstring and metadata.
MAY_DIFFER = {
    "sac_dmc": {
        "Args",
        "main",
        "FIXED_FLAGS",
        "RETURN_LABEL",
        "steps_per_action",
        "make_env",
        "full_name",
        "episode_limit",
        "check_flags",
        # Only in the parent.
        "remedy",
        "is_bounded_float_box",
        "PlainResults",
        # Only in the copy.
        "suite_tasks",
        "Task",
        "difflib",
    },
    "sac_ablations": {
        "Args",
        "ReplayBuffer",
        "Actor",
        "Critics",
        "SAC",
        "train",
        "remedy",
        "FIXED_FLAGS",
        "make_env",
        "steps_per_action",
        "make_buffer",
        "make_agent",
        "parse_args",
        "parse_flags",
        "check_flags",
        "check_memory",
        "multiply_in_bfloat16",
        "compile_update",
        # Only in the copy.
        "PRESETS",
        "INITS",
        "init_like_torch",
        "StateValue",
        "Repeat",
        "random_steps",
        "learn_once",
        "updates_due",
        "updates_until",
        "policy_updates_at",
        "check_variants",
        "check_updates",
        "COUNTED_EXACTLY",
        "check_storage",
        "make_storage",
        "Storage",
        "NStepSums",
        "Hindsight",
        "check_goals",
        "outermost",
        "goal_columns",
    },
}


def named(node) -> list[str]:
    """The names that a statement at a module's top defines."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, (ast.Assign, ast.AugAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [target.id for target in targets if isinstance(target, ast.Name)]
    return [node.name] if hasattr(node, "name") else []


def places(text: str, names: set[str]) -> set[int]:
    """The lines, from 0, of the docstring, the metadata and the definitions called `names`."""
    body = ast.parse(text).body
    lines = text.splitlines()
    (metadata,) = [n for n, line in enumerate(lines) if line.startswith(METADATA)]
    found = set(range(body[0].end_lineno)) | set(range(metadata, len(lines)))
    for node in body:
        if names & {*named(node)}:
            decorators = [d.lineno for d in getattr(node, "decorator_list", [])]
            first = min([node.lineno, *decorators]) - 1
            # A comment that stands right above belongs to the definition.
            while lines[first - 1].startswith("#"):
                first -= 1
            found |= set(range(first, node.end_lineno))
    return found


@cache
def operations(parent: str, copy: str) -> list[tuple]:
    """What difflib would do to the lines of one text to get the other's."""
    lines = parent.splitlines(), copy.splitlines()
    return difflib.SequenceMatcher(None, *lines, autojunk=False).get_opcodes()


def strays(parent: str, copy: str, names: set[str]) -> list[str]:
    """The lines of either text that differ outside the places where they may."""
    a, b = parent.splitlines(), copy.splitlines()
    in_parent, in_copy = places(parent, names), places(copy, names)
    found = []
    for operation, a1, a2, b1, b2 in operations(parent, copy):
        if operation != "equal":
            found += [f"- {n + 1}: {a[n]}" for n in range(a1, a2) if n not in in_parent]
            found += [f"+ {n + 1}: {b[n]}" for n in range(b1, b2) if n not in in_copy]
    return [line for line in found if line.split(": ", 1)[1].strip()]  # empty lines are no text


def copy_of(name: str) -> str:
    return (ROOT / f"{name}.py").read_text()


@pytest.mark.parametrize("name", MAY_DIFFER)
def test_a_copy_differs_only_where_it_may(name):
    found = strays(PARENT, copy_of(name), MAY_DIFFER[name])
    assert not found, "\n".join(["these lines differ:", *found])


@pytest.mark.parametrize(
    "name, one", [(name, one) for name in MAY_DIFFER for one in sorted(MAY_DIFFER[name])]
)
def test_no_permission_is_left_over(name, one):
    """Every name that may differ does, so that the list says what is different."""
    assert strays(PARENT, copy_of(name), MAY_DIFFER[name] - {one})


def test_the_suite_differs_in_main_by_the_list_of_tasks_alone():
    copy = copy_of("sac_dmc")
    lines = '    if args.list_tasks:\n        print(*suite_tasks(), sep="\\n")\n        return\n'
    assert copy.count(lines) == 1
    assert not strays(PARENT, copy.replace(lines, ""), MAY_DIFFER["sac_dmc"] - {"main"})


def test_the_suites_environments_stand_in_one_section():
    """All else that differs in sac_dmc.py lies in the section "Environments"."""
    copy = copy_of("sac_dmc")
    section = re.search(r"\n# Environments -+\n(.*?)\n# [A-Z][\w ]+ -{10,}\n", copy, re.S)[1]
    elsewhere = {"Args", "main", "check_flags", "difflib"}
    defined = {name for node in ast.parse(section).body for name in named(node)}
    only_in_parent = {"remedy", "is_bounded_float_box", "PlainResults"}
    assert MAY_DIFFER["sac_dmc"] - elsewhere - only_in_parent <= defined


@pytest.mark.parametrize("name", MAY_DIFFER)
@pytest.mark.parametrize(
    "old, new",
    [
        ("self.tau)", "0.1)"),
        ("import copy", "import cmath"),
        ("class Adam(", "class Adam2("),
        ("    logger.close()\n", ""),
        ("os.fsync(", "print("),
    ],
)
def test_a_difference_elsewhere_is_found(name, old, new):
    allowed = MAY_DIFFER[name] - {"SAC", "train"}
    assert old in PARENT
    assert strays(PARENT, PARENT.replace(old, new, 1), allowed)


def test_a_difference_in_its_place_is_allowed():
    changed = PARENT.replace("seed: int = 1 ", "seed: int = 2 ")
    assert changed != PARENT
    assert not strays(PARENT, changed, {"Args"})
    assert strays(PARENT, changed, {"make_env"})


@pytest.mark.parametrize(
    "module",
    ["update", "compile", "replay", "environments", "evaluation", "outputs", "cli", "resume"],
)
def test_a_copy_is_tested_as_its_parent_is(module):
    """These modules have tests for each script: they take the fixture `sac`, and mark none out."""
    text = (ROOT / "tests" / f"test_{module}.py").read_text()
    assert re.search(r"def test_\w+\(\s*(self, )?sac\b", text)
    assert not re.search(r"pytestmark = .*mark\.(only|without)", text)
    assert "import sac_continuous as sac" not in text
