"""The scripts are copies of each other: they differ where a reader is told that they do, and nowhere else.

python tests/test_copies.py  # write the numbers of lines into the README's table of knobs
"""

import ast
import difflib
import re
import sys
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


@pytest.mark.parametrize("name", [*ALLOWED, "sac_ablations.py"])
@pytest.mark.parametrize("module", ["math", "envs", "cli", "records", "variants"])
def test_a_copy_is_tested_as_its_parent_is(module, name):
    (scripts,) = re.findall(r"^SCRIPTS = (\[.*\])$", (ROOT / "tests" / f"test_{module}.py").read_text(), re.M)
    assert {PARENT.stem, Path(name).stem} <= set(ast.literal_eval(scripts))


CHANGES = [("self.tau)", "0.1)"), ("import copy,", "import cmath, copy,"), ("class SAC", "class Agent")]


@pytest.mark.parametrize("old, new", CHANGES)
def test_a_difference_elsewhere_is_found(old, new):
    text = PARENT.read_text()
    assert old in text and strays(text, text.replace(old, new, 1), {"Args", "make_env"})


def test_a_difference_in_its_place_is_allowed():
    text = PARENT.read_text()
    assert not strays(text, text.replace("seed: int = 1 ", "seed: int = 2 "), {"Args"})
    assert strays(text, text.replace("seed: int = 1 ", "seed: int = 2 "), {"make_env"})


# sac_ablations.py: what differs may stand anywhere, but names its knob

ABLATIONS = ROOT / "sac_ablations.py"
README = ROOT / "README.md"
ROW = re.compile(r"^\| `# (\w+)` \|.*\| (\d+) \|$", re.M)  # of the table of knobs: name, ..., number of lines
NOT_A_KNOB = {"all"}  # the limits of the knobs' flags


def additions(parent: str, copy: str) -> list[int]:
    """The lines of `copy`, counted from 0, that `diff` marks with `>`."""
    operations = difflib.SequenceMatcher(None, parent.splitlines(), copy.splitlines(), autojunk=False).get_opcodes()
    return [n for operation, _, _, b1, b2 in operations if operation in ("replace", "insert") for n in range(b1, b2)]


def knob_of(lines: list[str], n: int, knobs: set[str]) -> str:
    """The knob that line n is for: the first in its own comment, else that of the block it stands in, else none."""
    for comment in re.findall("# ([^#]+)", lines[n]):
        found = re.match(r"[\w, ]*", comment)[0].strip().split(", ")
        if set(found) <= knobs:
            return found[0]
    indent = len(lines[n]) - len(lines[n].lstrip())
    outer = indent if lines[n].strip(")]}") == "" else indent - 1  # a closing bracket belongs to the line that opens it
    for above in range(n - 1, -1, -1):
        if lines[above].strip() and len(lines[above]) - len(lines[above].lstrip()) <= outer:
            return knob_of(lines, above, knobs)
    return ""


def of_knobs(parent: str, copy: str, knobs: set[str]) -> dict[str, int]:
    """How many lines each knob takes; those that name none count for the empty name."""
    lines, count = copy.splitlines(), dict.fromkeys([*knobs, ""], 0)
    untold = set(range(ast.parse(copy).body[0].end_lineno))  # header and docstring
    untold |= {n for n, line in enumerate(lines) if not line.strip() or "exp_name: str" in line}
    for n in set(additions(parent, copy)) - untold:
        count[knob_of(lines, n, knobs)] += 1
    return count


def test_every_addition_names_its_knob_and_the_readme_counts_them():
    table = dict(ROW.findall(README.read_text()))
    count = of_knobs(PARENT.read_text(), ABLATIONS.read_text(), {*table, *NOT_A_KNOB})
    assert count.pop("") == 0 and all(count.values())
    assert {name: int(lines) for name, lines in table.items()} == {name: count[name] for name in table}
    assert len(additions(PARENT.read_text(), ABLATIONS.read_text())) <= 180
    assert count["value"] <= 20 and count["PER"] <= 20


def test_an_addition_without_a_name_is_found():
    text, knobs = PARENT.read_text(), {"critics", "delay"}
    line = "        self.tau = 1.0"
    assert "        alpha = self.log_alpha" in text
    for addition, expected in [
        (line, {"": 1}),
        (f"{line}  # why", {"": 1}),
        (f"{line}  # delay", {"delay": 1}),
        (f"{line}  # critics, delay: why", {"critics": 1}),
        (f"        if True:  # critics\n    {line}\n    {line}", {"critics": 3}),
        (f"        if True:  # critics\n    {line}  # delay\n{line}", {"critics": 1, "delay": 1, "": 1}),
    ]:
        changed = text.replace("        alpha = self.log_alpha", f"{addition}\n        alpha = self.log_alpha", 1)
        count = of_knobs(text, changed, knobs)
        assert {name: lines for name, lines in count.items() if lines} == expected


if __name__ == "__main__":
    count = of_knobs(PARENT.read_text(), ABLATIONS.read_text(), {*dict(ROW.findall(README.read_text())), *NOT_A_KNOB})
    number = lambda row: f"{row[0].rsplit('|', 2)[0]}| {count[row[1]]} |"
    README.write_text(ROW.sub(number, README.read_text()))
    sys.exit("lines that name no knob" if count[""] else 0)
