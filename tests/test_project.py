"""The files agree with each other, and the script needs none of them."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "sac_continuous.py"
FILES = [SCRIPT, ROOT / "sac_dmc.py", ROOT / "sac_ablations.py"]


def metadata(script=SCRIPT) -> dict:
    """The script's inline metadata (PEP 723), as uv reads it."""
    block = re.search(r"^# /// script\n(.*?)^# ///$", script.read_text(), re.S | re.M).group(1)
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    return tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))


def header(script=SCRIPT) -> list[str]:
    """The requirements there."""
    return metadata(script)["dependencies"]


@pytest.mark.parametrize("script", FILES, ids=lambda script: script.stem)
def test_the_header_promises_the_pythons_of_the_readme(script):
    assert metadata(script)["requires-python"] == ">=3.10"


def test_the_header_pins_what_requirements_pin():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert header()
    assert sorted(header()) == sorted(line for line in lines if line and not line.startswith("#"))


def test_every_requirement_is_one_version():
    for line in header():
        assert re.fullmatch(r"[\w.-]+(\[[\w,-]+\])?==[\w.]+(; python_version .+)?", line)


def test_the_copies_require_the_same():
    # uv can do without labmaze, which keeps pip from dm-control.
    everywhere = [line.split(";")[0] if "dm-control" in line else line for line in header()]
    assert header(ROOT / "sac_ablations.py") == header()
    assert header(ROOT / "sac_dmc.py") == everywhere


def test_the_lesson_stays_short_enough_to_read():
    lesson, plumbing = SCRIPT.read_text().split("\n# Plumbing. ")
    assert len(lesson.splitlines()) <= 450
    assert "def main():" in lesson
    assert "def make_env(" in plumbing


@pytest.mark.parametrize("script", FILES, ids=lambda script: script.stem)
def test_the_script_compiles_for_every_promised_python(script):
    for minor in range(10, 15):
        ast.parse(script.read_text(), feature_version=(3, minor))


@pytest.mark.parametrize("script", FILES, ids=lambda script: script.stem)
def test_nothing_runs_at_import(script):
    command = [sys.executable, "-c", f"import {script.stem}"]
    ended = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    assert ended.stdout == ""  # on stderr libraries may warn


@pytest.mark.parametrize("script", FILES, ids=lambda script: script.stem)
def test_the_script_ends_with_main_and_its_requirements(script):
    end = 'if __name__ == "__main__":\n    with closed_output_is_no_error():\n        main()\n'
    code, metadata = script.read_text().split(f"\n{end}")
    assert all(line.startswith("#") for line in metadata.splitlines() if line)


CHECKED = [
    path
    for folder in ("tests", "tests/benchmark", "benchmark", "docs")
    for path in sorted((ROOT / folder).glob("*.py"))
]


@pytest.mark.parametrize("path", [*FILES, *CHECKED], ids=lambda path: str(path.relative_to(ROOT)))
def test_ruff_finds_nothing(path):
    check = [sys.executable, "-m", "ruff", "check", "--no-cache", str(path)]
    ended = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
