"""Write a variant of sac_continuous.py as a script of its own.

    python docs/variants.py                     # list the variants
    python docs/variants.py td3 > sac_td3.py    # write one

The variants are the diffs in docs/variants.md. A hunk names the class or function that it changes.
Its old lines must stand there once, word for word; otherwise no script is written.
"""

import ast
import re
import sys
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).with_name("variants.md")
SCRIPT = PAGE.parent.parent / "sac_continuous.py"


class Hunk(NamedTuple):
    place: str  # "docstring", "imports", or the name of a class or function
    lines: list[str]  # each with its first character: " " kept, "-" removed, "+" added

    @property
    def old(self) -> list[str]:
        return [line[1:] for line in self.lines if not line.startswith("+")]

    @property
    def new(self) -> list[str]:
        return [line[1:] for line in self.lines if not line.startswith("-")]


class Variant(NamedTuple):
    name: str
    title: str
    hunks: list[Hunk]


class Misfit(Exception):
    """A hunk that does not fit the script."""


def read_variants(page: str) -> dict[str, Variant]:
    """The diffs of the page by name, each with the heading above it."""
    variants = {}
    for section in page.split("\n## ")[1:]:
        title = section.splitlines()[0]
        for diff in re.findall(r"^```diff\n(.*?)^```$", section, re.M | re.S):
            header, *parts = re.split(r"^@@ (.+) @@\n", diff, flags=re.M)
            name = re.fullmatch(r"--- sac_continuous\.py\n\+\+\+ sac_(\w+)\.py\n", header)[1]
            hunks = [Hunk(*part) for part in zip(parts[::2], map(str.splitlines, parts[1::2]))]
            variants[name] = Variant(name, title, hunks)
    return variants


def find_place(body: list[ast.stmt], place: str) -> tuple[int, int]:
    """The first line of a place in the script's statements, and the line after its last."""
    if place == "docstring":
        nodes = body[:1]
    elif place == "imports":
        nodes = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    else:
        for name in place.split("."):
            nodes = [node for node in body if getattr(node, "name", None) == name]
            if not nodes:
                raise Misfit(f"@@ {place} @@ is not in {SCRIPT.name}")
            body = nodes[0].body
    return nodes[0].lineno - 1, nodes[-1].end_lineno


def apply(hunks: list[Hunk], script: str) -> str:
    """The script with the hunks applied, which come in the order of its lines."""
    lines = script.splitlines()
    body = ast.parse(script).body
    result = []
    done = 0
    for hunk in hunks:
        first, end = find_place(body, hunk.place)
        length = len(hunk.old)
        starts = range(max(first, done), end - length + 1)
        fitting = [start for start in starts if lines[start : start + length] == hunk.old]
        if len(fitting) != 1:
            begins = f"@@ {hunk.place} @@ {hunk.old[0].strip()}"
            raise Misfit(f"fits {SCRIPT.name} in {len(fitting)} places, not in one: {begins}")
        result += lines[done : fitting[0]] + hunk.new
        done = fitting[0] + length
    return "\n".join(result + lines[done:]) + "\n"


def write_script(variant: Variant, script: str) -> str:
    """The variant as a script that goes by its own name and says where it comes from."""
    text = apply(variant.hunks, script).replace("sac_continuous", f"sac_{variant.name}")
    title, commands, rest = text.split("\n\n", 2)
    origin = f'This is sac_continuous.py, changed by "{variant.title}" of docs/variants.md.'
    return "\n\n".join([title, commands, origin, rest])


def main():
    variants = read_variants(PAGE.read_text())
    names = sys.argv[1:]
    if not names:
        for variant in variants.values():
            print(f"{variant.name:22}{variant.title}")
        return
    if len(names) > 1 or names[0] not in variants:
        unknown = " ".join(names)
        print(f"error: no variant {unknown!r}: python docs/variants.py lists them", file=sys.stderr)
        sys.exit(2)
    variant = variants[names[0]]
    try:
        sys.stdout.write(write_script(variant, SCRIPT.read_text()))
    except Misfit as error:
        sys.exit(f"error: {variant.name}: a hunk {error}")


if __name__ == "__main__":
    main()
