"""benchmark/README.md: its commands are understood by the programs that they start, its example is a study."""

import re
import shlex

import pytest
import tyro

from benchmark import peers, report, run, same_bits, speed, speed_gpu, tune
from benchmark.runs import runs_of
from benchmark.studies import STUDIES, Rule, Study
from benchmark.tune import SPACES
from tests.benchmark.helpers import ROOT

GUIDE = (ROOT / "benchmark" / "README.md").read_text()
HOW_TO = (ROOT / "docs" / "how-to.md").read_text()


def commands_in(page: str) -> list[str]:
    blocks = "".join(re.findall(r"```bash\n(.*?)```", page, re.S)).replace("\\\n", "")
    return [line.split(" #")[0].strip() for line in blocks.splitlines()]


COMMANDS = commands_in(GUIDE)
COMMANDS += re.findall(r"`(python [^`\n]*)`", GUIDE)
PROGRAMS = {
    "-m benchmark.run": run,
    "-m benchmark.report": report,
    "-m benchmark.tune": tune,
    "-m benchmark.same_bits": same_bits,
    "benchmark/peers.py": peers,
    "benchmark/speed.py": speed,
    "benchmark/speed_gpu.py": speed_gpu,
}
OURS = sorted(
    {command.removeprefix("python ") for command in COMMANDS if command.startswith("python ")}
)
OTHERS = {
    "pip install -r requirements.txt -r benchmark/requirements.txt": "part of what runs this test",
    '.venv-peers/bin/pip install "jax[cuda13]"': "for a GPU",
}
# How CleanRL and LeanRL were installed for results/speed.csv: needs repositories beside this one.
BESIDE = ("git clone ", "python3.11 -m venv ../others", "../others/bin/pip install ", "export ")


def examples() -> dict[str, Study]:
    """The studies of the reader's own, with a script of ours for the reader's copy."""
    text = "".join(re.findall(r"```python\n(.*?)```", GUIDE, re.S))
    text = text.replace("my_sac.py", "sac_ablations.py")
    return eval(f"{{{text}}}", {"Study": Study, "Rule": Rule})


def test_every_command_is_accounted_for():
    others = {command for command in COMMANDS if not command.startswith(("python ", *BESIDE))}
    assert others == OTHERS.keys()
    assert all(any(command.startswith(known) for command in COMMANDS) for known in BESIDE)


@pytest.mark.parametrize("command", OURS)
def test_every_command_is_understood(command):
    (name,) = [name for name in PROGRAMS if command.startswith(f"{name} ") or command == name]
    args = vars(tyro.cli(PROGRAMS[name].Args, args=shlex.split(command.removeprefix(name))))
    assert {*args.get("studies", ())} <= STUDIES.keys() | examples().keys()
    assert args.get("space", "") in ("", *SPACES)


def test_each_task_of_a_job_array_is_a_runner():
    """N runners in one folder are tested in test_run.py."""
    in_pages = commands_in(HOW_TO)
    (sbatch,) = [shlex.split(command) for command in in_pages if command.startswith("sbatch ")]
    task = shlex.split(sbatch[sbatch.index("--wrap") + 1])
    assert task[:3] == ["python", "-m", "benchmark.run"] and "--array" in sbatch
    assert tyro.cli(run.Args, args=task[3:]).jobs == 1


@pytest.mark.parametrize("name, study", examples().items())
def test_the_readers_studies_are_such(name, study):
    assert name not in STUDIES and study.claim and study.mistake() is None
    runs = runs_of(name, study)
    assert re.search(rf"benchmark\.run {name}( --again)? +# {len(runs)} runs", GUIDE)
    assert len({run.key for run in runs}) == len(study.variants)


def test_the_study_of_a_copy_shares_runs_with_another_as_said():
    runs = runs_of("mine", examples()["mine"])
    assert sum(run.committed() for run in runs if run.variant == "original") == 3
    assert "three runs of the original come from `results/quick`" in " ".join(GUIDE.split())


def test_there_is_a_study_of_a_flag_and_one_of_a_copy():
    assert [*examples()] == ["wide", "mine"]
