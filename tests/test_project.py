"""The files agree with each other, and the script needs none of them."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from benchmark import report, run, tune
from benchmark.run import runs_of
from benchmark.spaces import SPACES
from benchmark.studies import STUDIES, Rule, Study

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "sac_continuous.py"
FILES = [SCRIPT, ROOT / "sac_dmc.py", ROOT / "sac_ablations.py"]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = [line.split(" #")[0].strip() for block in BLOCKS for line in block.splitlines()]

# Every command that the README prints: how the tests run it, or why they do not. FOLDER is a finished run.
SHORT = "--total-timesteps 60 --learning-starts 40 --batch-size 8 --eval-frequency 60 --eval-episodes 1 --threads 1"
RUNS = {
    "python sac_continuous.py --help": "",
    "python sac_continuous.py --env-id Pendulum-v1 --total-timesteps 10000": SHORT,
    "python sac_continuous.py --env-id HalfCheetah-v4 --seed 2": SHORT,
    "python sac_continuous.py --env-id shimmy:dm_control/cartpole-swingup-v0": SHORT,
    "python sac_continuous.py --env-id BipedalWalker-v3 --num-envs 4 --capture-video": SHORT,
    "WANDB_MODE=offline python sac_continuous.py --env-id Pendulum-v1 --track": SHORT,
    "python sac_dmc.py --env-id walker-walk": SHORT,
    "python sac_dmc.py --list-tasks": "",
    "python sac_ablations.py --env-id Hopper-v4 --n-critics 5": SHORT,
    "python sac_ablations.py --env-id Hopper-v4 --preset spinningup": SHORT,
    "python sac_continuous.py --resume runs/FOLDER": "",
    "python sac_continuous.py --evaluate runs/FOLDER --capture-video": "",
}
NOT_RUN = {
    "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/python sac_continuous.py "
    "--env-id Hopper-v4": "an hour of training; its flags are those of the Hopper runs in test_resume.py",
    "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt -r tests/requirements.txt && "
    ".venv/bin/python -m pytest": "it is what runs this test",
    "uv run sac_continuous.py --env-id Hopper-v4": "needs uv, and an hour",
    "tensorboard --logdir runs": "a server; what it shows is read back in test_records.py",
    "python benchmark/learning.py": "an hour of training",
    "python benchmark/speed.py": "half an hour of a quiet machine; its parts are tested in test_benchmark.py",
    "pip install -r requirements.txt -r benchmark/requirements.txt": "part of what runs this test",
    "python -m benchmark.run --list": "in test_studies.py",
    "python -m benchmark.run F5": "hours; smaller studies are run in test_studies.py",
    "python -m benchmark.report F5": "needs the runs; in test_report.py",
    "pip install -r requirements.txt && pip install --no-deps dm-control==1.0.44": "needs Python 3.13 or later",
    "pip install dm-env dm-tree glfw lxml pyopengl pyparsing requests scipy": "likewise",
}


# Likewise every command in benchmark/README.md. These are not run but read by the program that they start: it knows
# their flags, and the study or space that they name.
GUIDE = (ROOT / "benchmark" / "README.md").read_text()
GUIDED = [
    line.split(" #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", GUIDE, re.S)
    for line in block.splitlines()
]
GUIDED += re.findall(r"`(python [^`\n]*)`", GUIDE)
OTHERS = {
    "ray start --head --port 6379": "as in test_ray.py",
    "ray start --address FIRST:6379": "likewise",
    "python benchmark/speed.py": "in the README too",
    "python benchmark/learning.py": "likewise",
    "pip install -r requirements.txt -r benchmark/requirements.txt": "likewise",
}


def header(script=SCRIPT) -> list[str]:
    """The requirements in the script's inline metadata (PEP 723)."""
    block = re.search(r"^# /// script\n(.*?)^# ///$", script.read_text(), re.S | re.M).group(1)
    return re.findall(r'"((?:[^"\\])+==[^"]+)"', block)


def test_the_header_pins_what_requirements_pin():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert sorted(header()) == sorted(line for line in lines if line and not line.startswith("#"))
    assert all(re.fullmatch(r"[\w.-]+(\[\w+\])?==[\w.]+(; python_version .+)?", line) for line in header())
    everywhere = [line.split(";")[0] if line.startswith("dm-control") else line for line in header()]
    assert header(ROOT / "sac_ablations.py") == header()
    assert header(ROOT / "sac_dmc.py") == everywhere  # uv can do without labmaze, which keeps pip from it


def test_the_script_stays_short_enough_to_read():
    assert len(SCRIPT.read_text().splitlines()) <= 450
    assert max(len(line) for script in FILES for line in script.read_text().splitlines()) <= 120


@pytest.mark.parametrize("script", FILES, ids=lambda script: script.stem)
def test_the_script_compiles_for_every_promised_python(script):
    import ast

    for minor in range(10, 15):
        ast.parse(script.read_text(), feature_version=(3, minor))


@pytest.mark.parametrize("script", FILES, ids=lambda script: script.stem)
def test_nothing_runs_at_import(script):
    subprocess.run([sys.executable, "-c", f"import {script.stem}"], cwd=ROOT, check=True)
    assert script.read_text().rstrip().endswith('if __name__ == "__main__":\n    main()')


def test_every_command_of_the_readme_is_accounted_for():
    assert sorted(COMMANDS) == sorted([*RUNS, *NOT_RUN])


def example() -> dict[str, Study]:
    """The study of the newcomer's page."""
    (text,) = re.findall(r"```python\n(.*?)```", GUIDE, re.S)
    return eval(f"{{{text}}}", {"Study": Study, "Rule": Rule})


def test_every_other_command_of_the_newcomers_page_is_accounted_for():
    assert {command for command in GUIDED if not command.startswith("python -m benchmark.")} == OTHERS.keys()


def test_the_newcomers_study_is_one():
    ((name, study),) = example().items()
    assert study.claim and study.mistake() is None
    runs = runs_of(name, study)
    assert f"# {len(runs)} runs" in GUIDE and len({run.key for run in runs}) == len(study.variants)


@pytest.mark.parametrize("command", sorted(set(GUIDED) - OTHERS.keys()))
def test_every_command_of_the_newcomers_page_is_understood(command):
    name, *flags = shlex.split(command.removeprefix("python -m benchmark."))
    module = {"run": run, "report": report, "tune": tune}[name]
    args = vars(tyro.cli(module.Args, args=flags))
    assert args.get("list") or args.get("studies") or args.get("space")
    assert {*args.get("studies", ())} <= STUDIES.keys() | example().keys()
    assert args.get("space", "") in ("", *SPACES)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """An empty folder with nothing but the scripts in it, and a finished run."""
    folder = tmp_path_factory.mktemp("alone")
    for script in FILES:
        shutil.copy(script, folder)
    execute(folder, f"python sac_continuous.py --env-id Pendulum-v1 {SHORT}")
    return folder


def execute(folder, command):
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(folder)}
    result = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("command", RUNS)
def test_the_readmes_commands_run_in_a_folder_with_the_script_alone(command, alone):
    if "dm_control" in command or "dmc" in command:
        pytest.importorskip("dm_control")
    if "Bipedal" in command:
        pytest.importorskip("Box2D")
    run = min(alone.glob("runs/Pendulum*"))  # the first one, which is not tracked
    output = execute(alone, f"{command} {RUNS[command]}".replace("FOLDER", run.name))
    shown = {"--help": "--env-id", "--list-tasks": "walker-walk", "--evaluate": "policy: return"}
    assert next((text for flag, text in shown.items() if flag in command), "done: runs/") in output


def test_a_tracked_run_is_evaluated_without_a_login(alone):
    tracked = max(alone.glob("runs/Pendulum*"))
    if not (tracked / "wandb").exists():  # run alone, this test makes its own
        execute(alone, f"WANDB_MODE=offline python sac_continuous.py --env-id Pendulum-v1 --track {SHORT}")
        tracked = max(alone.glob("runs/Pendulum*"))
    assert "policy: return" in execute(alone, f"python sac_continuous.py --evaluate {tracked}")
