"""What README.md and docs/ say is so: commands, excerpts, flags, metrics, files, links, numbers.

python docs/flags.py  # writes the tables of flags anew
"""

import csv
import fnmatch
import functools
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from scipy import stats

import sac_continuous
from benchmark import judge, report, run, same_bits, tune
from benchmark.runs import runs_of
from benchmark.studies import SOLVED, STUDIES

ROOT = Path(__file__).parent.parent
SCRIPT_NAMES = ["sac_continuous.py", "sac_dmc.py", "sac_ablations.py"]
README = ROOT / "README.md"
REFERENCE = ROOT / "docs" / "reference.md"
HOW_TO = ROOT / "docs" / "how-to.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS]
# docs/variants.md has commands and diffs that tests of its own hold.
COMMAND_PAGES = [page for page in PAGES if page.name != "variants.md"]

sys.path.insert(0, str(ROOT / "docs"))
flags = importlib.import_module("flags")


def table_under(page: Path, title: str) -> list[list[str]]:
    """The rows, without the header, of the first table under a heading."""
    section = page.read_text().split(f"\n{title}\n", 1)[1]
    table = re.search(r"(?:^\|.*\n)+", section, re.M)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert len(rows) > 2
    return rows[2:]


# Commands -----------------------------------------------------------------------------------------

SHORT = "--total-timesteps 60 --learning-starts 40 --batch-size 8 --eval-frequency 60 "
SHORT += "--eval-episodes 1 --threads 1"
NOT_RUN = {
    "python3 -m venv .venv && source .venv/bin/activate": "part of what runs this test",
    "pip install -r requirements.txt": "the line with -m pytest installs them too",
    "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt "
    "-r tests/requirements.txt && .venv/bin/python -m pytest": "it is what runs this test",
    "uv run sac_continuous.py --env-id Hopper-v4": "needs uv, and an hour",
    "tensorboard --logdir runs": "a server",
    "pip install -r requirements.txt -r benchmark/requirements.txt": "part of what runs this test",
    "pip install -r requirements.txt -r benchmark/requirements.txt optuna-dashboard": "likewise",
    "pip install -r benchmark/requirements-ray.txt": "likewise",
    "pip install onnx onnxscript onnxruntime": "likewise",
    "pip install -r requirements-robotics.txt": "its absence is tested in test_storage.py",
    "pip install -r requirements.txt && pip install --no-deps dm-control==1.0.44": (
        "needs Python 3.13 or later"
    ),
    "pip install dm-env dm-tree glfw lxml pyopengl pyparsing requests scipy": "likewise",
    "wandb login": "needs an account",
    "wandb sync runs/FOLDER/wandb/offline-run-*": "likewise",
    "optuna-dashboard runs/tune-cartpole.journal": "a server",
    "ray start --head --port 6379": "needs a cluster; the tests of benchmark/ start one",
    "ray start --address FIRST:6379": "likewise",
    "python docs/flags.py": "the tests of the tables of flags call it",
    "python benchmark/speed.py": "half an hour of a quiet machine; benchmark/ has tests for it",
}
NOT_RUN_PREFIXES = {
    "sbatch ": "needs Slurm; the command that it wraps is parsed",
    "python -m openrlbenchmark.rlops ": "needs an account and the network",
}


def commands_of(page: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)
    text = "".join(blocks).replace("\\\n", " ")
    lines = [re.sub(r"\s+", " ", line.split(" #")[0]).strip() for line in text.splitlines()]
    return [line for line in lines if line]


COMMANDS = sorted({command for page in COMMAND_PAGES for command in commands_of(page)})


def script_command(command: str) -> str | None:
    """The call of a script that a command is, or repeats in a loop."""
    loop = re.fullmatch(r"for \w+ in .*; do (.*?)(?: > \S+ 2>&1)? & done; wait", command)
    call = loop[1].replace("$seed", "1") if loop else command
    return call if re.match(r"(\w+=\w+ )?python sac_\w+\.py", call) else None


def benchmark_command(command: str) -> str | None:
    found = re.search(r"python -m benchmark\.[^\"]*", command)
    return found[0] if found else None


SCRIPT_COMMANDS = [command for command in COMMANDS if script_command(command)]
BENCHMARK_COMMANDS = [command for command in COMMANDS if benchmark_command(command)]


def test_there_are_commands_of_both_kinds():
    assert len(SCRIPT_COMMANDS) > 10
    assert len(BENCHMARK_COMMANDS) > 4


def test_every_command_is_run_parsed_or_named():
    named = {command for command in COMMANDS if command.startswith(tuple(NOT_RUN_PREFIXES))}
    assert set(COMMANDS) == {*SCRIPT_COMMANDS, *BENCHMARK_COMMANDS, *NOT_RUN, *named}


def test_the_readme_says_how_to_test_as_ci_reads_it():
    (line,) = [line for line in README.read_text().splitlines() if "-m pytest" in line]
    assert line == (
        "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt "
        "-r tests/requirements.txt && .venv/bin/python -m pytest"
    )


def execute(folder: Path, command: str) -> str:
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    environment = {"PATH": path, "HOME": str(folder), "WANDB_MODE": "offline"}
    shell = dict(shell=True, capture_output=True, text=True)
    ended = subprocess.run(command, cwd=folder, env=environment, **shell)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """An empty folder with the scripts, the files that the pages print, and a finished run."""
    folder = tmp_path_factory.mktemp("alone")
    for script in SCRIPT_NAMES:
        shutil.copy(ROOT / script, folder)
    for name, text in re.findall(FILE_BLOCK, HOW_TO.read_text(), re.S):
        (folder / name).write_text(text)
    everything = f"{SHORT} --capture-video --track"
    execute(folder, f"python sac_continuous.py --env-id Pendulum-v1 {everything}")
    return folder


@pytest.fixture(scope="module")
def finished(alone) -> Path:
    """The finished run: recorded and tracked."""
    return min(alone.glob("runs/Pendulum*"))


@pytest.mark.slow
@pytest.mark.parametrize("command", SCRIPT_COMMANDS, ids=lambda command: command[:70])
def test_a_command_runs_in_a_folder_with_the_scripts_alone(command, alone, finished):
    if "sac_dmc" in command or "dm_control" in command:
        pytest.importorskip("dm_control")
    call = script_command(command).replace("FOLDER", finished.name)
    if "--resume" in call:
        call += " --total-timesteps 80" * ("--total-timesteps" in call)
    elif not re.search("--help|--list-tasks|--evaluate", call):
        call += f" {SHORT}"
    shown = {"--help": "--env-id", "--list-tasks": "walker-walk", "--evaluate": "policy at step"}
    expected = next((text for flag, text in shown.items() if flag in call), "done: runs/")
    assert expected in execute(alone, call)


@pytest.mark.slow
def test_a_tracked_run_is_evaluated_without_a_login(alone, finished):
    assert (finished / "wandb").exists()
    command = f"WANDB_MODE=online python sac_continuous.py --evaluate {finished}"
    assert "policy at step" in execute(alone, command)


@pytest.mark.parametrize("command", BENCHMARK_COMMANDS)
def test_a_command_of_the_benchmark_is_understood(command):
    name, *words = shlex.split(benchmark_command(command).removeprefix("python -m benchmark."))
    modules = {"run": run, "report": report, "tune": tune, "same_bits": same_bits}
    args = vars(tyro.cli(modules[name].Args, args=words))
    subjects = [args.get(key) for key in ("studies", "space", "old")]
    assert args["list"] if "--list" in words else any(subjects)
    assert {*args.get("studies", ())} <= STUDIES.keys()
    assert args.get("space", "") in ("", *tune.SPACES)


# Code ---------------------------------------------------------------------------------------------

EXCERPT = r"<!-- (\w+\.py) -->\n```python\n(.*?)```"
RUN_BLOCK = r"<!-- (run|run: onnx) -->\n```python\n(.*?)```"
FILE_BLOCK = r"<!-- file: (\w+\.py) -->\n```python\n(.*?)```"
EXCERPTS = [
    pytest.param(name, text, id=f"{page.stem}{i}")
    for page in PAGES
    for i, (name, text) in enumerate(re.findall(EXCERPT, page.read_text(), re.S))
]


def stands_in(excerpt: str, source: str) -> bool:
    """Whether the excerpt is whole consecutive lines of the source, but for the indentation."""
    wanted = textwrap.dedent(excerpt).splitlines()
    lines = source.splitlines()
    for first in range(len(lines) - len(wanted) + 1):
        part = "\n".join(lines[first : first + len(wanted)])
        if textwrap.dedent(part).splitlines() == wanted:
            return True
    return False


def test_there_are_excerpts():
    assert len(EXCERPTS) > 10


@pytest.mark.parametrize("name, text", EXCERPTS)
def test_an_excerpt_stands_in_its_file(name, text):
    assert stands_in(text, (ROOT / name).read_text()), f"no longer in {name}:\n{text}"


@pytest.mark.parametrize("change", [("amin(0)", "amin(1)"), (" - alpha", " + alpha"), ("q = ", "")])
def test_a_changed_excerpt_is_found(change):
    source = (ROOT / "sac_continuous.py").read_text()
    excerpts = [param.values[1] for param in EXCERPTS if change[0] in param.values[1]]
    assert excerpts
    assert not any(stands_in(text.replace(*change), source) for text in excerpts)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_python_is_an_excerpt_or_is_run(page):
    text = page.read_text()
    marked = [
        found for mark in (EXCERPT, RUN_BLOCK, FILE_BLOCK) for found in re.findall(mark, text, re.S)
    ]
    assert text.count("```python\n") == len(marked)


@pytest.fixture
def namespace(finished, monkeypatch) -> dict:
    """Where the blocks of docs/how-to.md that run without onnx have run."""
    monkeypatch.chdir(finished.parent.parent)
    monkeypatch.syspath_prepend(finished.parent.parent)
    names = {}
    for kind, text in blocks_to_run(finished):
        if kind == "run":
            exec(text, names)
    return names


def blocks_to_run(finished: Path) -> list[tuple[str, str]]:
    found = re.findall(RUN_BLOCK, HOW_TO.read_text(), re.S)
    assert len(found) == 7
    return [(kind, text.replace("FOLDER", finished.name)) for kind, text in found]


@pytest.mark.slow
def test_the_loaded_agent_is_the_one_of_the_run(namespace, finished):
    loaded, expected = namespace["agent"].state_dict(), agent_of(finished).state_dict()
    assert loaded.keys() == expected.keys() and loaded
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert -17 < namespace["reward"] < 0


@pytest.mark.slow
def test_the_curves_are_those_of_the_run(namespace):
    steps, returns = namespace["steps"], namespace["returns"]
    assert steps[0] == 60 and steps.shape == returns.shape  # other tests make the run longer
    assert all(-2000 < value < 0 for value in returns)


@pytest.mark.slow
def test_the_loaded_policy_acts_as_the_agent(namespace, finished):
    obs = torch.randn(100, 3)
    expected = 2 * agent_of(finished).act(obs.numpy(), torch.zeros(100, 1))  # Pendulum's bounds
    actions = namespace["policy"](obs).detach().numpy()
    assert np.std(actions) > 0
    np.testing.assert_allclose(actions, expected, atol=1e-6)


def agent_of(folder: Path) -> sac_continuous.SAC:
    args = sac_continuous.Args(**json.loads((folder / "args.json").read_text()))
    agent = sac_continuous.SAC(3, 1, args)
    agent.load_state_dict(torch.load(folder / "model.pt", weights_only=True)["agent"])
    return agent


@pytest.mark.slow
def test_the_loaded_policy_plays_an_episode(namespace):
    assert -2000 < namespace["episode_return"] < 0


@pytest.mark.slow
def test_the_exported_policy_gives_the_same_actions(namespace, finished):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    for kind, text in blocks_to_run(finished):
        if kind == "run: onnx":
            exec(text, namespace)
    assert namespace["actions"].shape == (5, 1)
    obs = torch.randn(1000, 3) * 3
    (actions,) = namespace["session"].run(None, {"obs": obs.numpy()})
    expected = namespace["policy"](obs).detach().numpy()
    assert np.std(expected) > 0
    np.testing.assert_allclose(actions, expected, atol=1e-5)


# Flags --------------------------------------------------------------------------------------------

OTHERS_FLAGS = {"--help", "--no-track", "--index-url", "--with"}  # of tyro, pip and uv
OTHERS_FLAGS |= {"--again", "--cases", "--trials"}  # of benchmark/


def test_the_tables_of_flags_are_those_of_the_scripts():
    text = REFERENCE.read_text()
    assert flags.filled(text) == text, "python docs/flags.py writes them"


@pytest.mark.parametrize("script", SCRIPT_NAMES)
def test_the_tables_have_every_flag_and_its_default(script):
    module = importlib.import_module(script.removesuffix(".py"))
    defaults = vars(module.Args())
    rows = flags.flags_of(script)
    assert len(rows) == len(defaults) > 20
    for name, value in defaults.items():
        row = rows["--" + name.replace("_", "-")]
        shown = re.split(r" \| ", row.splitlines()[-1])[1].strip("`")
        if name != "threads":  # it depends on the machine
            assert shown.replace("_", "") == str(value).replace("_", "") or float(shown) == value


@pytest.mark.slow
@pytest.mark.parametrize("change", [("`0.99`", "`0.9`"), ("discount per action", "discount")])
def test_a_wrong_default_or_meaning_is_found(change):
    text = REFERENCE.read_text()
    assert change[0] in text
    wrong = text.replace(*change)
    assert flags.filled(wrong) != wrong


def known_flags() -> set[str]:
    named = set(OTHERS_FLAGS)
    for script in SCRIPT_NAMES:
        for name in flags.flags_of(script):
            named |= {name, name.replace("--", "--no-", 1)}
    return named


@pytest.mark.slow
@pytest.mark.parametrize("page", COMMAND_PAGES, ids=lambda page: page.stem)
def test_every_flag_that_a_page_names_exists(page):
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", prose))
    assert named <= known_flags()


# Metrics, files, messages -------------------------------------------------------------------------


@pytest.mark.slow
def test_the_table_of_metrics_has_those_that_a_run_logs(finished):
    named = {row[0].strip("`") for row in table_under(REFERENCE, "## Metrics")}
    # The finished run is too short for an episode to end, and its environment knows no success.
    elsewhere = {"charts/episodic_return", "charts/episodic_length", "eval/success_rate"}
    assert named == set(sac_continuous.read_records(finished)) | elsewhere


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_metric_that_a_page_names_is_in_the_table(page):
    in_table = {row[0].strip("`") for row in table_under(REFERENCE, "## Metrics")}
    named = set(re.findall(r"`((?:charts|losses|eval)/\w+)`", page.read_text()))
    assert named <= in_table | {"eval/video"}


@pytest.mark.slow
def test_the_table_of_files_has_those_of_a_run(finished):
    patterns = [
        row[0].strip("`").rstrip("/") for row in table_under(REFERENCE, "## Files of a run")
    ]
    kept = [
        path for path in finished.rglob("*") if "wandb" not in path.parts or path.name == "wandb"
    ]
    files = {str(path.relative_to(finished)) for path in kept} - {"videos"}
    for pattern in patterns:
        assert fnmatch.filter(files, pattern), pattern
        files -= set(fnmatch.filter(files, pattern))
    assert not files


@pytest.mark.slow
@pytest.mark.parametrize("name", ["checkpoint.pt", "best.pt", "model.pt"])
def test_the_table_of_contents_has_those_of_a_file(name, finished):
    intro = 'All `.pt` files load with `torch.load(path, map_location="cpu", weights_only=True)`:'
    expected = set()
    for keys, files, _ in table_under(REFERENCE, intro):
        if files == "all three" or name in files:
            expected |= set(keys.replace("`", "").split(", "))
    assert set(torch.load(finished / name, weights_only=True)) == expected


def test_every_error_message_that_is_explained_exists():
    source = (ROOT / "sac_continuous.py").read_text()
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    for message, _, _ in table_under(HOW_TO, "## Error messages"):
        for part in message.strip("`").split("..."):
            assert part.strip(" ,").replace("--learning-starts", "") in source, message


# Links and pages ----------------------------------------------------------------------------------

LINKED = [*PAGES, ROOT / "benchmark" / "README.md"]


def anchors_of(page: Path) -> set[str]:
    """The names that GitHub gives to headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    titles = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", title) for title in titles]
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path, text: str) -> list[str]:
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in anchors_of(path)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page):
    assert not broken_links(page, page.read_text())


@pytest.mark.parametrize("change", [("docs/speed.md", "docs/sped.md"), ("#gymnasium", "#gym")])
def test_a_broken_link_is_found(change):
    text = README.read_text()
    assert change[0] in text
    assert broken_links(README, text.replace(*change))


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_a_page_says_who_needs_it(page):
    title, empty, sentence = page.read_text().splitlines()[:3]
    assert title.startswith("# ") and not empty
    assert sentence.startswith("For readers who ")


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_a_page_can_be_found_from_the_readme(page):
    assert f"](docs/{page.name})" in README.read_text()


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 160


@pytest.mark.parametrize("page", COMMAND_PAGES, ids=lambda page: page.stem)
def test_a_table_has_at_most_six_columns(page):
    rows = re.findall(r"^\|.*\|$", page.read_text(), re.M)
    assert all(row.count("|") <= 7 for row in rows)


# Numbers ------------------------------------------------------------------------------------------


def final_returns(study: str) -> dict[str, list[float]]:
    """The last evaluation of each seed, by task, of this version of the script."""
    returns = defaultdict(list)
    for (task, _), curve in sorted(curves(study).items()):
        returns[task].append(curve[max(curve)])
    return returns


def curves(study: str) -> dict[tuple[str, int], dict[int, float]]:
    """Returns by step, by task and seed; a variant that is not the first is part of the task."""
    found, keys = {}, set().union(*(run.keys for run in runs_of(study, STUDIES[study])))
    with open(ROOT / "benchmark" / "results" / study / "returns.csv", newline="") as file:
        for row in csv.DictReader(file):
            first = row["variant"] == next(iter(STUDIES[study].variants))
            task = row["env_id"] if first else f"{row['env_id']}, {row['variant']}"
            if row["key"] in keys:
                curve = found.setdefault((task, int(row["seed"])), {})
                curve[int(row["step"])] = float(row["return"])
    return found


@pytest.mark.parametrize(
    "study, title", [("quick", "## Gymnasium"), ("dmc-100k", "## DeepMind Control Suite")]
)
def test_the_tables_of_returns_are_those_of_the_runs(study, title):
    rows = {row[0]: row for row in table_under(ROOT / "docs" / "results.md", title)}
    returns = final_returns(study)
    assert rows.keys() == returns.keys()
    for task, values in returns.items():
        *_, seeds, mean, _ = rows[task]
        np.testing.assert_allclose([float(value) for value in seeds.split(", ")], values, atol=0.5)
        assert abs(float(mean) - np.mean(values)) <= 0.5


def test_the_returns_after_a_million_steps_are_those_of_the_runs():
    page = ROOT / "docs" / "results.md"
    rows = {row[0]: row[1:] for row in table_under(page, "## One million steps")}
    returns, found = final_returns("mujoco"), curves("mujoco")
    assert rows.keys() == returns.keys()
    for task, values in returns.items():
        seeds, told_mean, _, late, _ = rows[task]
        np.testing.assert_allclose([float(value) for value in seeds.split(", ")], values, atol=0.5)
        mean = f"{np.mean(values):.0f}"
        assert told_mean == mean
        assert f"| {task} | 1,000,000 | {len(values)} | {mean} |" in README.read_text()
        mine = [curve for (other, _), curve in found.items() if other == task]
        ends = [value for curve in mine for step, value in curve.items() if step >= 910_000]
        assert abs(float(late) - np.mean(ends)) <= 0.5


def test_three_seeds_after_a_million_steps_are_not_significantly_different_as_said():
    page = re.sub(r"\s+", " ", (ROOT / "docs" / "results.md").read_text())
    report = (ROOT / "benchmark" / "results" / "mujoco" / "README.md").read_text()
    sentence = r"published: not significantly different, \+?(-?[\d.]+) "
    sentence += r"\[(-?[\d.]+), (-?[\d.]+)\] by Welch's t"
    found = np.array(re.findall(sentence, report), dtype=float)
    sentence = r"is (-?\d+) \((-?\d+) to (-?\d+)(?:, Welch's t)?\): not significantly different"
    told = np.array(re.findall(sentence, page), dtype=float)
    assert told.shape == found.shape == (4, 3)
    np.testing.assert_allclose(told, found, atol=0.51)


def test_the_race_of_the_libraries_is_that_of_the_runs():
    folder = ROOT / "benchmark" / "results" / "peers"
    returns, minutes = defaultdict(list), defaultdict(list)
    for row in csv.DictReader(open(folder / "returns.csv", newline="")):
        if row["step"] == "100000":
            returns[row["variant"]].append(float(row["return"]))
    for row in csv.DictReader(open(folder / "runs.csv", newline="")):
        minutes[row["variant"]].append(60 * float(row["hours"]))
    table = table_under(ROOT / "docs" / "results.md", "## Beside other libraries")
    assert len(table) == len(returns) == 4
    for library, n, seeds, mean, duration in table:
        ours = library.startswith("One-File SAC")
        # Theirs have their version beside them.
        name = library.replace("One-File SAC", "this project") if ours else library.split(" ")[0]
        values = [float(value) for value in seeds.split(", ")]
        assert int(n) == len(values)
        np.testing.assert_allclose(values, returns[name], atol=0.5)
        assert abs(float(mean) - np.mean(returns[name])) <= 0.5
        assert abs(float(duration) - np.median(minutes[name])) <= 0.5
        assert mean in README.read_text()


PAGE_OF_STUDIES = ROOT / "docs" / "studies.md"
VERDICTS = table_under(PAGE_OF_STUDIES, "## Claims and verdicts")
UNDECIDED_BY_T = ("F5", "F14")  # as the page says
LANDING = "Share of the evaluations in the second half of training that land (F14 and F15, n = 3):"


def test_the_page_says_where_students_t_disagrees():
    text = re.sub(r"\s+", " ", PAGE_OF_STUDIES.read_text())
    assert f"except that {' and '.join(UNDECIDED_BY_T)} are undecided" in text


@pytest.mark.parametrize("row", VERDICTS, ids=lambda row: row[0].split("]")[0][1:])
def test_a_verdict_is_that_of_the_report(row):
    link, _, verdict, difference, _ = row
    study = re.match(r"\[(\w+)\]", link)[1]
    by_t = "undecided" if study in UNDECIDED_BY_T else verdict
    report = (PAGE_OF_STUDIES.parent / re.search(r"\((.*)\)", link)[1]).read_text()
    assert f"**Verdict: {verdict}.**" in report
    rules = re.findall(r"^\| .* \| (-?[\d.]+ \[.*\]) \| (\w+) \| .*\] (\w+) \|$", report, re.M)
    number = re.compile(r"-?[\d.]+")
    shown = number.findall(difference.split(": ")[1])
    found = []
    for text, *verdicts in rules:
        if [f"{float(x):.0f}" for x in number.findall(text)] == shown:
            found.append(verdicts)
    assert found == [[verdict, by_t]]


def test_what_is_said_of_the_threshold_is_so():
    """800 of 1000 is no more than a choice, on which two refutations depend."""
    text = re.sub(r"\s+", " ", PAGE_OF_STUDIES.read_text())
    verdicts = {}
    for study in ("F3", "F4", "F5"):
        rows, _ = judge.collect(study, STUDIES[study], Path("none"))
        scores = judge.finals(STUDIES[study], rows)
        rules = [
            rule._replace(other=825.0) if rule.other == SOLVED else rule
            for rule in STUDIES[study].rules
        ]
        assert rules != list(STUDIES[study].rules)
        judged = [judge.judge(rule, scores) for rule in rules]
        verdicts[study] = judge.verdict(judged)
        refuted = {one.rule.variant for one in judged if one.verdict == "refuted"}
        assert refuted == ({"alpha learned"} if study == "F4" else set())
    assert verdicts == {"F3": "undecided", "F4": "refuted", "F5": "undecided"}
    told = (
        "With 825, F3 and F5 would be undecided, and F4 still refuted: the learned alpha would not"
    )
    assert told in text
    counts = {len(STUDIES[re.match(r"\[(\w+)\]", row[0])[1]].rules) for row in VERDICTS}
    assert (min(counts), max(counts)) == (1, 6) and "A claim has one to six rules." in text


def holm(p_values: list[float]) -> np.ndarray:
    """The p-values corrected for their number (Holm 1979)."""
    order = np.argsort(p_values)
    scaled = np.array(p_values)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(1, np.maximum.accumulate(scaled))
    return corrected


def test_holm_corrects_as_worked_out_by_hand():
    np.testing.assert_allclose(holm([0.04, 0.01, 0.03]), [0.06, 0.03, 0.06])


@functools.cache
def judged_by_t(study: str) -> tuple[list[float], list[str]]:
    """Of each rule of a claim Student's p-value, and on which side of it the runs lie."""
    rows, _ = judge.collect(study, STUDIES[study], ROOT / "no-runs")
    rules, found = STUDIES[study].rules, []
    for rule in rules:
        scores = judge.finals(STUDIES[study], rows, rule.measure)
        ours, other = scores[rule.env_id, rule.variant], rule.other
        if isinstance(other, str):
            theirs = scores[rule.env_id, other]
            p = stats.ttest_ind(ours, theirs, equal_var=False).pvalue
        else:
            theirs = other
            p = stats.ttest_1samp(ours, other).pvalue
        as_claimed = (np.mean(ours) > np.mean(theirs)) == (rule.relation == "above")
        found.append((p, "confirmed" if as_claimed else "refuted"))
    p_values, words = zip(*found, strict=True)
    return [*p_values], [*words]


def verdict_of(p_values: np.ndarray, words: list[str]) -> str:
    verdicts = {word if p < 0.05 else "undecided" for p, word in zip(p_values, words, strict=True)}
    return next(word for word in ("refuted", "undecided", "confirmed") if word in verdicts)


def verdict_by_holm(study: str) -> str:
    """The verdict on a claim by Student's t, corrected for the number of its rules."""
    p_values, words = judged_by_t(study)
    return verdict_of(holm(p_values), words)


def test_the_page_says_what_one_correction_for_all_rules_leaves():
    studies = [re.match(r"\[(\w+)\]", row[0])[1] for row in VERDICTS]
    judged = {study: judged_by_t(study) for study in studies}
    corrected = [*holm([p for p_values, _ in judged.values() for p in p_values])]
    told = f"With one correction for all {len(corrected)} rules one is confirmed (F7), two are "
    told += "refuted (F1, F9) and ten are undecided."
    verdicts = defaultdict(list)
    for study, (_, words) in judged.items():
        mine = [corrected.pop(0) for _ in words]
        verdicts[verdict_of(mine, words)].append(study)
    assert verdicts["confirmed"] == ["F7"] and verdicts["refuted"] == ["F1", "F9"]
    assert len(verdicts["undecided"]) == 10
    assert told in re.sub(r"\s+", " ", PAGE_OF_STUDIES.read_text())


@pytest.mark.parametrize(
    "runs, against_runs, against_a_number", [(3, 1 / 5, 1 / 4), (5, 1 / 8, 1 / 6)]
)
def test_the_bootstrap_errs_as_often_as_the_page_says(runs, against_runs, against_a_number):
    """Where nothing differs: how often its 95 % interval leaves out zero, for normal returns."""
    random = np.random.default_rng(0)

    def resampled_means(returns):
        rows = random.integers(0, runs, (len(returns), 500, runs))
        return np.take_along_axis(returns[:, None], rows, 2).mean(2)

    ours, theirs = (resampled_means(random.normal(size=(4000, runs))) for _ in range(2))
    for difference, share in ((ours - theirs, against_runs), (ours, against_a_number)):
        low, high = np.percentile(difference, [2.5, 97.5], axis=1)
        assert np.mean((low > 0) | (high < 0)) == pytest.approx(share, abs=0.02)
    text = re.sub(r"\s+", " ", PAGE_OF_STUDIES.read_text())
    assert (
        "one rule in eight is still decided by chance with five seeds, and one in five with" in text
    )
    assert "Against a number it is one in six, and one in four." in text


def test_the_page_says_what_holms_correction_leaves():
    studies = [re.match(r"\[(\w+)\]", row[0])[1] for row in VERDICTS]
    verdicts = {study: verdict_by_holm(study) for study in studies}
    told = [row[2] for row in VERDICTS]
    fallen = [
        study
        for study, before in zip(studies, told, strict=True)
        if verdicts[study] != before and study not in UNDECIDED_BY_T
    ]
    count = Counter(verdicts.values())
    words = dict(enumerate("none one two three four five six seven eight nine".split()))
    text = re.sub(r"\s+", " ", PAGE_OF_STUDIES.read_text())
    assert f"of a claim, {' and '.join(fallen)} are undecided too: then " in text
    assert (
        f"{words[count['confirmed']]} claim is confirmed, {words[count['refuted']]} are refuted "
        f"and {words[count['undecided']]} are undecided." in text
    )


STEPS = {"balance": "30000", "swingup": "50000", "Hopper": "100000", "LunarLander": "250000"}


def test_the_findings_are_the_means_of_the_runs():
    for study, where, *cells in table_under(PAGE_OF_STUDIES, "## The findings in numbers"):
        task, _, seeds = where.partition(", n = ")
        means = defaultdict(list)
        folder = ROOT / "benchmark" / "results" / study.split(",")[0]
        with open(folder / "returns.csv", newline="") as file:
            for row in csv.DictReader(file):
                if task in row["env_id"] and row["step"] == STEPS[task]:
                    means[row["variant"], row["key"][:10]].append(float(row["return"]))
        told = sorted(int(x) for x in re.findall(r": (\d+)", ", ".join(cells)))
        # F5 has rows of three more runs each, made by another version of the script.
        expected = [np.mean(x) for x in means.values() if len(x) == int(seeds or 5)]
        assert len(told) > 2
        np.testing.assert_allclose(told, sorted(expected), atol=0.51)


def lander_returns() -> tuple[dict, dict]:
    """Evaluations of F14 and F15 in the two halves of training, by variant and seed."""
    halves = defaultdict(list), defaultdict(list)
    for study in ("F14", "F15"):
        with open(ROOT / "benchmark" / "results" / study / "returns.csv", newline="") as file:
            for row in csv.DictReader(file):
                half = halves[int(row["step"]) > 125_000]
                half[row["variant"], row["seed"]].append(float(row["return"]))
    return halves


def of_variant(returns: dict, variant: str) -> list[float]:
    """The returns of all seeds of a variant."""
    return [value for key, values in returns.items() if key[0] == variant for value in values]


def test_the_shares_that_land_are_those_of_the_evaluations():
    _, late = lander_returns()
    scales, starts = table_under(PAGE_OF_STUDIES, LANDING)
    for name, cell in (("reward scale", scales[1]), ("start", starts[1])):
        told = re.findall(r"([\d,]+): (\d+) %", cell)
        assert len(told) == cell.count("%") > 2
        for value, percent in told:
            returns = of_variant(late, f"{name} {value.replace(',', '')}")
            assert len(returns) == 39
            assert percent == f"{100 * np.mean(np.array(returns) >= 200):.0f}"


def test_what_is_said_of_the_lander_runs_is_so():
    text = re.sub(r"\s+", " ", PAGE_OF_STUDIES.read_text())
    early, late = lander_returns()
    # F15's start of 20,000 and F14's scale of 40 are the same runs.
    runs = [key for key in late if key[0] != "start 20000"]
    assert f"Each of the {len(runs)} runs lands in some evaluations" in text
    landed = {key: np.array(early[key] + late[key]) >= 200 for key in runs}
    assert all(lands.any() for lands in landed.values())
    # Below 200 in the second half, after it had landed in either.
    falling = [
        any(not lands[i] and lands[:i].any() for i in range(len(early[key]), len(lands)))
        for key, lands in landed.items()
    ]
    assert (
        f"in {sum(falling)} a later evaluation in the second half of training is below 200" in text
    )
    told = "return {:.0f}, {:.0f} and {:.0f} in the first half, "
    told += "and {:.0f}, {:.0f} and {:.0f} in the second"
    starts = [f"start {start}" for start in (20_000, 10_000, 300)]
    means = [np.mean(of_variant(half, start)) for half in (early, late) for start in starts]
    assert told.format(*means) in text


def final(study: str, task: str, variant: str) -> list[float]:
    """The last returns of the seeds of a variant."""
    with open(ROOT / "benchmark" / "results" / study / "returns.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["variant"] == variant]
    rows = [row for row in rows if task in row["env_id"]]
    last = str(max(int(row["step"]) for row in rows))
    return [float(row["return"]) for row in rows if row["step"] == last]


def welch(ours: list[float], theirs: list[float]) -> tuple[str, str]:
    """The 95 % interval of the difference of means."""
    interval = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval()
    return f"{interval.low:.0f}", f"{interval.high:.0f}"


def test_what_is_said_of_both_sets_of_default_runs_is_so():
    text = re.sub(r"\s+", " ", PAGE_OF_STUDIES.read_text())
    these = final("F3", "swingup", "tau 0.005")
    others = final("F17", "swingup", "default")
    assert len(these) == len(others) == 5 and these != others
    tau = final("F3", "swingup", "tau 0.01")
    told = "by {} to {} (Welch's t), of the other five by {} to {}, and of all ten by {} to {}."
    intervals = [*welch(tau, these), *welch(tau, others), *welch(tau, these + others)]
    assert told.format(*intervals) in text
    alpha = final("F4", "swingup", "alpha 0.01")
    told = "by {} to {} (Welch's t) of these five runs of the default, "
    told += "by {} to {} of the other five, by {} to {} of all ten, and by"
    intervals = [*welch(alpha, these), *welch(alpha, others), *welch(alpha, these + others)]
    assert told.format(*intervals) in text


def evaluations(study: str, task: str, variant: str) -> dict[tuple[str, str], list[float]]:
    """All returns of a variant by version and seed, in the order of the steps."""
    found = defaultdict(list)
    with open(ROOT / "benchmark" / "results" / study / "returns.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if task in row["env_id"]]
    for row in sorted(rows, key=lambda row: int(row["step"])):
        if row["variant"] == variant:
            found[row["key"], row["seed"]].append(float(row["return"]))
    return found


def processors(study: str) -> dict[tuple[str, str, str], str]:
    """EPYC or Xeon of each finished run, by variant, settings and seed."""
    with open(ROOT / "benchmark" / "results" / study / "runs.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["state"] == "finished"]
    settings = [row["key"].split(".")[0] for row in rows]
    return {
        (row["variant"], key, row["seed"]): row["hardware"].split()[-1]
        for row, key in zip(rows, settings)
    }


ON_EPYC = {*(f"F{i}" for i in range(1, 9)), "bfloat16", "knobs", "walker"}
ON_BOTH = {"F9", "F16", "F17", "tau", "tuned"}


def test_the_processors_of_the_studies_are_as_said():
    page = PAGE_OF_STUDIES.read_text()
    text = re.sub(r"\s+", " ", page)
    assert (
        "F1 to F8, bfloat16, knobs and walker ran on an AMD EPYC, all others on an Intel Xeon."
        in text
    )
    for study in {*re.findall(r"benchmark/results/([\w-]+)/README.md", page)} - ON_BOTH:
        expected = "EPYC" if study in ON_EPYC else "Xeon"
        assert {*processors(study).values()} == {expected}, study
    # F16 and F17 share runs, under other labels.
    runs = {}
    for study in ("F9", "F16", "F17"):
        runs |= {at[1:]: kind for at, kind in processors(study).items()}
    on_epyc = [*runs.values()].count("EPYC")
    assert f"{on_epyc} of the {len(runs)} runs of F9, F16 and F17, seeds 9 and 10 of tau" in text
    assert {at[2] for at, kind in processors("tau").items() if kind == "EPYC"} == {"9", "10"}
    default, best = (
        [kind for at, kind in processors("tuned").items() if at[0] == variant]
        for variant in ("default", "tuned")
    )
    assert {*best} == {"EPYC"} and len(default) == 10 and default.count("Xeon") == 6
    assert "Of the ten default runs that these are compared with, six ran on the Xeon." in text


def test_time_limits_as_ends_stand_beside_every_run_of_the_default():
    def after_50_000_steps(study: str, variant: str) -> list[int]:
        return sorted(round(curve[4]) for curve in evaluations(study, "walker", variant).values())

    first, second = after_50_000_steps("walker", "truncation terminates")
    low, high = after_50_000_steps("walker", "all but tanh")
    default = [after_50_000_steps(study, "default") for study in ("dmc-100k", "F9")]
    default = sorted(sum(default, []))
    assert {*after_50_000_steps("walker", "default")} <= {*default} and len(default) == 8
    told = f"return {first} and {second} after 50,000 steps, "
    told += f"and with three more changes {low} and {high}. "
    told += f"Eight runs of the default return {default[0]} to {default[-1]} by then"
    assert told in re.sub(r"\s+", " ", PAGE_OF_STUDIES.read_text())
    variants = re.sub(r"\s+", " ", (ROOT / "docs" / "variants.md").read_text())
    assert f"two seeds return {first} and {second} after 50,000 steps" in variants
    assert f"default](studies.md#smaller-studies) {default[0]} to {default[-1]}" in variants


def curve_means(study: str, variant: str) -> list[float]:
    """The mean of the evaluations on swingup at 10,000, 20,000 ... 50,000 steps, of each run.

    F3 has evaluations between them, which F17 has not.
    """
    curves = evaluations(study, "swingup", variant).values()
    return [np.mean(curve[1::2] if len(curve) == 10 else curve) for curve in curves]


def test_what_is_said_of_whole_curves_is_so():
    text = re.sub(r"\s+", " ", PAGE_OF_STUDIES.read_text())
    default = curve_means("F3", "tau 0.005") + curve_means("F17", "default")
    assert len(default) == 10
    lengths = [len(x) for x in evaluations("F17", "swingup", "default").values()]
    assert lengths == [5] * 5  # every 10,000 steps
    intervals = [welch(curve_means("F3", f"tau {tau}"), default) for tau in (0.05, 0.1, 0.5, 0.01)]
    told = "0.05 is ahead of all ten by {} to {}, "
    told += "0.1 by {} to {}, 0.5 by {} to {} and 0.01 by {} to {}."
    assert told.format(*sum(intervals, ())) in text


def test_what_is_said_of_tau_on_new_seeds_is_so():
    text = re.sub(r"\s+", " ", PAGE_OF_STUDIES.read_text())
    more, less = [], []
    for task in ("balance", "swingup"):
        slow, fast = (evaluations("tau", task, f"tau {tau}").values() for tau in (0.005, 0.05))
        assert len(slow) == len(fast) == STUDIES["tau"].seeds == 5
        more.append(np.mean([*map(np.mean, fast)]) - np.mean([*map(np.mean, slow)]))
        less.append(([curve[-1] for curve in slow], [curve[-1] for curve in fast]))
    balance, swingup = less
    fewer = np.mean(balance[0]) - np.mean(balance[1])
    low, high = welch(*balance)
    told = (
        "over training it returns {:.0f} more on balance, {:.0f} on swingup; at the end {:.0f} less"
    )
    told += " on balance ({} to {}, Welch's t), on swingup not significantly different"
    assert float(low) > 0
    assert told.format(*more, fewer, low, high) in text
    assert float(welch(*swingup)[0]) < 0 < float(welch(*swingup)[1])
    walkthrough = re.sub(r"\s+", " ", (ROOT / "docs" / "walkthrough.md").read_text())
    told = "returns {:.0f} more on balance and {:.0f} more on swingup"
    assert told.format(*more) in walkthrough


COUNTS = "none one two three four five".split()


def lows_after_990(study: str, tau: float) -> list[float | None]:
    """Of each seed on balance, in their order; None where it never reaches 990."""
    curves = evaluations(study, "balance", f"tau {tau}").values()
    reached = [next((i for i, x in enumerate(curve) if x >= 990), None) for curve in curves]
    return [None if i is None else min(curve[i:]) for i, curve in zip(reached, curves, strict=True)]


def test_what_is_said_of_the_stability_of_tau_is_so():
    pages = [PAGE_OF_STUDIES, ROOT / "docs" / "walkthrough.md"]
    studies, walkthrough = (re.sub(r"\s+", " ", page.read_text()) for page in pages)
    first, second = lows_after_990("F3", 0.05), lows_after_990("tau", 0.05)
    assert None not in first + second
    told = "On balance {} of ten seeds with 0.05 fell below 920 after they had reached 990, "
    below = [COUNTS[sum(low < x for low in first + second)] for x in (920, 800)]
    assert (told + "{} of them below 800").format(*below) in walkthrough
    ends = [x[-1] for s in ("F3", "tau") for x in evaluations(s, "balance", "tau 0.05").values()]
    fell = [end for low, end in zip(first + second, ends, strict=True) if low < 920]
    recovered = COUNTS[sum(x > 980 for x in fell)].capitalize()
    assert f"{recovered} of the {below[0]} recovered." in walkthrough
    slow = lows_after_990("F3", 0.005) + lows_after_990("tau", 0.005)
    assert slow.count(None) == 1 and min(low for low in slow if low) > 980
    three, two = (COUNTS[sum(low < x for low in first)] for x in (900, 800))
    told = f"{three.capitalize()} of its five seeds fall below 900 after they had reached 990, "
    assert told + f"{two} of these below 800, and one ends there." in studies
    assert sum(x[-1] < 800 for x in evaluations("F3", "balance", "tau 0.05").values()) == 1
    lows = sorted(low for low in second if low < 950)
    assert len(lows) == 2 and "two fall, to {:.0f} and {:.0f}.".format(*lows) in studies


def test_what_is_said_of_the_tuned_setting_is_so():
    text = re.sub(r"\s+", " ", PAGE_OF_STUDIES.read_text())
    more, undecided = [], []
    for task in ("balance", "swingup"):
        default, tuned, fast = (
            [*evaluations(*run).values()]
            for run in (
                ("tuned", task, "default"),
                ("tuned", task, "tuned"),
                ("tau", task, "tau 0.05"),
            )
        )
        assert len(default) == len(tuned) == len(fast) == STUDIES["tuned"].seeds == 5
        # The same runs, so the same seeds.
        assert default == [*evaluations("tau", task, "tau 0.005").values()]
        over = [[np.mean(curve) for curve in curves] for curves in (default, tuned, fast)]
        ends = [[curve[-1] for curve in curves] for curves in (default, tuned, fast)]
        more.append(np.mean(over[1]) - np.mean(over[0]))
        undecided += [welch(ends[1], ends[0]), welch(ends[1], ends[2]), welch(over[1], over[2])]
    told = "over training it returns {:.0f} more than the default on balance, {:.0f} on swingup; "
    told += "final returns are not significantly different; "
    told += "neither measure is significantly different from that of tau 0.05 alone"
    assert told.format(*more) in text
    assert all(float(low) < 0 < float(high) for low, high in undecided)


def test_what_is_said_of_the_search_is_so():
    text = re.sub(r"\s+", " ", (ROOT / "benchmark" / "README.md").read_text())
    with open(ROOT / "benchmark" / "results" / "tune-cartpole" / "trials.csv", newline="") as file:
        trials = list(csv.DictReader(file))
    complete = [trial for trial in trials if trial["state"] == "complete"]
    ranked = sorted(complete, key=lambda trial: -float(trial["score"]))
    place = ranked.index(trials[0]) + 1
    best, default = float(ranked[0]["score"]), float(trials[0]["score"])
    told = f"finished {len(trials)} trials and pruned {len(trials) - len(complete)} of them. "
    told += f"The best setting scores {best:.2f}, the default {default:.2f}, "
    told += f"which is place {place} of the {len(complete)} not pruned"
    assert told in text
    # What the study runs is the best setting, rounded.
    words = STUDIES["tuned"].variants["tuned"].split()
    for flag, value in zip(words[::2], words[1::2]):
        exact = ranked[0][flag]
        assert exact == value or f"{float(exact):.3g}" == f"{float(value):.3g}"
    assert {*words[::2]} == {column for column in trials[0] if column.startswith("--")}


def test_what_is_said_of_the_seven_variants_is_so():
    text = re.sub(r"\s+", " ", PAGE_OF_STUDIES.read_text())
    default = final("F3", "swingup", "tau 0.005") + final("F17", "swingup", "default")
    p_values, ahead = [], []
    for study in ("F1", "F3", "F4", "F5", "F6", "F7", "F8"):
        for variant in list(STUDIES[study].variants)[1:]:
            # F5 has three more runs a value of an earlier version, which come last.
            returns = final(study, "swingup", variant)[:5]
            p = stats.ttest_ind(returns, default, equal_var=False).pvalue
            p_values.append(p)
            ahead.append(np.mean(returns) > np.mean(default))
    significant = [p < 0.05 and better for p, better in zip(p_values, ahead, strict=True)]
    assert sum(significant) == 7 and "seven variants are ahead on swingup" in text
    corrected = holm(p_values)
    assert not any(p < 0.05 and better for p, better in zip(corrected, ahead, strict=True))
    told = f"correction for the {len(p_values)} variants of F1 and F3 to F8, none of the seven is"
    assert told in text


def test_what_is_said_of_the_seven_variants_with_fifteen_runs_is_so():
    text = re.sub(r"\s+", " ", PAGE_OF_STUDIES.read_text())
    of_tau = final("tau", "swingup", "tau 0.005")
    assert f"The five of tau, with other seeds, return {np.mean(of_tau):.0f}." in text
    default = final("F3", "swingup", "tau 0.005") + final("F17", "swingup", "default") + of_tau
    assert len(default) == 15
    p_values, ahead = {}, set()
    for study in ("F1", "F3", "F4", "F5", "F6", "F7", "F8"):
        for variant in list(STUDIES[study].variants)[1:]:
            returns = final(study, "swingup", variant)[:5]
            p_values[study, variant] = stats.ttest_ind(returns, default, equal_var=False).pvalue
            if np.mean(returns) > np.mean(default):
                ahead.add((study, variant))
    corrected = dict(zip(p_values, holm([*p_values.values()]), strict=True))
    significant = {name for name in ahead if corrected[name] < 0.05}
    assert significant == {("F4", "alpha 0.01")} | {
        ("F3", f"tau {tau}") for tau in ("0.01", "0.05", "0.1", "0.5")
    }
    walkthrough = re.sub(r"\s+", " ", (ROOT / "docs" / "walkthrough.md").read_text())
    fixed = final("F4", "swingup", "alpha 0.01")
    less = " to ".join(welch(fixed, default))
    assert f"a fixed 0.01 returns {np.mean(fixed):.0f} after 50,000 steps (" in walkthrough
    studies = re.sub(r"\s+", " ", PAGE_OF_STUDIES.read_text())
    assert f"and by {less} of all fifteen, the five of tau included." in studies
    assert f"a learned temperature return {np.mean(default):.0f}. The 95 % interval" in walkthrough
    assert f"interval of the difference is {less} (" in walkthrough
    for alpha in ("alpha 0.074", "alpha 0.2"):
        low, high = welch(final("F4", "swingup", alpha), default)
        assert float(low) < 0 < float(high)
    told = "After the same correction five are significantly ahead of all fifteen, the default's "
    told += "five runs of tau included: "
    assert told + "tau 0.01, 0.05, 0.1 and 0.5, and a fixed alpha of 0.01." in text


def test_what_is_said_of_the_earlier_runs_of_f5_is_so():
    text = re.sub(r"\s+", " ", PAGE_OF_STUDIES.read_text())
    default = final("F3", "swingup", "tau 0.005") + final("F17", "swingup", "default")
    told, intervals = [], []
    for alpha in ("0.0001", "0.05", "0.07", "0.08"):
        returns = final("F5", "swingup", f"alpha from {alpha}")
        assert len(returns) == 8
        told.append("{:.0f}, {:.0f} and {:.0f}".format(*returns[5:]) + f" ({alpha})")
        intervals.append("{} to {}".format(*welch(returns, default)))
    assert "They return " + ", ".join(told) in text
    assert f"default ({intervals[1]} and {intervals[3]})" in text


def test_what_is_said_of_the_alphas_of_f9_is_so():
    text = re.sub(r"\s+", " ", PAGE_OF_STUDIES.read_text())
    records = defaultdict(list)
    with open(ROOT / "benchmark" / "results" / "F9" / "diagnostics.csv", newline="") as file:
        for row in sorted(csv.DictReader(file), key=lambda row: int(row["step"])):
            records[row["record"], row["seed"]].append(float(row["value"]))
    curves = defaultdict(list)
    for (record, _), values in records.items():
        curves[record].append(values)
    alphas = curves["losses/alpha"]
    lowest = [min(values) for values in alphas]
    later = [max(values[int(np.argmin(values)) :]) for values in alphas]
    assert len(lowest) == 5
    assert f"alpha falls to {min(lowest):.3f} to {max(lowest):.3f} and never" in text
    highest = [max(map(max, curves[name])) for name in ("losses/qf_loss", "losses/qf1_values")]
    told = "rises above {} again. The critics' loss stays below {}, Q below {}."
    limits = re.search(told.replace(".", r"\.").format(*[r"([\d.]*\d)"] * 3), text).groups()
    for value, limit, margin in zip(
        [max(later), *highest], map(float, limits), (0.001, 0.01, 1), strict=True
    ):
        assert limit - margin <= value <= limit


def test_by_the_second_half_f15_is_as_said():
    text = re.sub(r"\s+", " ", PAGE_OF_STUDIES.read_text())
    _, late = lander_returns()
    intervals = []
    for start in (20_000, 10_000, 300):
        means = [np.mean(values) for key, values in late.items() if key[0] == f"start {start}"]
        interval = stats.ttest_1samp(np.array(means) - 200, 0).confidence_interval()
        intervals += [f"{interval.low:.0f} to {interval.high:.0f}"]
    told = "above 200 by {}, that after 10,000 by {}, that after 300 by {} (Student's t)."
    assert told.format(*intervals) in text


THREE = ("HalfCheetah", "Hopper", "Walker2d")
SMALLER = "Mean returns after 100,000 steps, three seeds each (layer-norm and n-step):"


def test_what_is_said_of_layer_norm_and_n_step_is_so():
    default, of_the_other = [
        [final(study, task, "default") for task in THREE] for study in ("layer-norm", "n-step")
    ]
    assert default == of_the_other
    norm = [final("layer-norm", task, "layer norm") for task in THREE]
    steps = [final("n-step", task, "n-step 3") for task in THREE]
    told = table_under(PAGE_OF_STUDIES, SMALLER)
    assert [name for name, *_ in told] == ["default", "layer norm", "n-step 3"]
    for (_, *means), returns in zip(told, (default, norm, steps), strict=True):
        assert means == [f"{np.mean(values):.0f}" for values in returns]
        assert {len(values) for values in returns} == {3}
    of_norm, of_steps = (
        [welch(*values) for values in zip(returns, default)] for returns in (norm, steps)
    )
    assert all(float(low) < 0 < float(high) for low, high in of_norm + of_steps)
    text = re.sub(r"\s+", " ", PAGE_OF_STUDIES.read_text())
    differences = "difference of layer norm is {} to {}, that of n-step 3 is {} to {}."
    assert differences.format(*of_norm[0], *of_steps[0]) in text
    assert "return {:.0f}, {:.0f} and {:.0f} there".format(*steps[0]) in text


SPEED_TITLE = "Environment steps per second of training:"


@pytest.mark.parametrize(
    "page, title, column", [("results", "## What it reaches", 3), ("speed", SPEED_TITLE, 1)]
)
def test_the_readme_has_the_numbers_of_the_pages(page, title, column):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    for row in table_under(README, title):
        assert f"| {row[column]} |" in text
        if page == "results":
            task, number = re.escape(row[0]), re.escape(row[column])
            assert re.search(rf"^\| {task} \|.*\| {number} \|", text, re.MULTILINE)


def numbers_in(cell: str) -> list[float]:
    return [float(number) for number in re.findall(r"[\d.]+", cell)]


VARIANTS = {
    "compiled (default)": "compiled",
    "`--matmul-precision medium`": "compiled, bfloat16",
    "`--compile off`": "eager",
    "SBX (JAX)": "SBX",
    "LeanRL, compiled": "LeanRL",
}
COLUMNS = [(env_id, threads) for env_id in ("Hopper-v4", "Humanoid-v4") for threads in "12"]


def test_the_speeds_on_cpus_are_those_measured():
    speeds = defaultdict(list)
    with open(ROOT / "benchmark" / "results" / "speed.csv", newline="") as file:
        for row in csv.DictReader(file):
            if row["part"] == "whole":
                speeds[row["variant"], row["env_id"], row["threads"]].append(float(row["value"]))
    above = f"{SPEED_TITLE[:-1]}: acting, environment and update. Higher is better."
    table = table_under(ROOT / "docs" / "speed.md", above)
    told = set()
    for name, *cells in table:
        variant, _, other = VARIANTS.get(name, name).partition(" / ")
        told.add(variant)
        for cell, column in zip(cells, COLUMNS, strict=True):
            values = speeds[variant, *column]
            if other:
                ratios = [a / b for a, b in zip(values, speeds[other, *column], strict=True)]
                expected = [np.median(ratios), min(ratios), max(ratios)]
            else:
                expected = [np.median(values)]
            numbers = numbers_in(cell)
            assert len(numbers) == len(expected)
            np.testing.assert_allclose(numbers, expected, atol=0.0051 if other else 0.51)
    assert told == {variant for variant, *_ in speeds} - {"environment alone"}
    shown = {VARIANTS.get(name, name): [*cells[:2], cells[3]] for name, *cells in table}
    for library, *on_cpu, _ in table_under(README, SPEED_TITLE):
        name = "compiled" if library == "One-File SAC" else VARIANTS.get(library, library)
        assert on_cpu == shown[name]


def test_the_speeds_on_a_gpu_are_those_measured():
    speeds = defaultdict(list)
    with open(ROOT / "benchmark" / "results" / "speed-gpu.csv", newline="") as file:
        for row in csv.DictReader(file):
            speeds[row["variant"], row["runs"]].append(float(row["value"]))
    one = speeds["GPU, CUDA graphs", "1"]
    section = (ROOT / "docs" / "speed.md").read_text().split("## On a GPU\n")[1]
    rows = re.findall(r"^\|.*\|$", section, re.M)[2:]
    assert len(rows) == len(speeds) == 10
    for row, ((variant, runs), values) in zip(rows, speeds.items()):
        _, count, speed, ratio = row.strip("|").split("|")
        expected = [np.median(values), min(values), max(values)]
        assert count.strip() == runs
        np.testing.assert_allclose(numbers_in(speed), expected, atol=0.6)
        if variant != "GPU, CUDA graphs":
            ratios = [a / b for a, b in zip(one, values)]
            expected = [np.median(ratios), min(ratios), max(ratios)]
            np.testing.assert_allclose(numbers_in(ratio), expected, atol=0.05)
    libraries = {"One-File SAC": "CUDA graphs", "SBX": "SBX"}
    libraries |= {"Stable-Baselines3": "Stable-Baselines3"}
    for library, *_, speed in table_under(README, SPEED_TITLE):
        if library in ("CleanRL", "LeanRL, compiled"):
            assert speed == "not measured"
            continue
        measured = speeds[f"GPU, {libraries[library]}", "1"]
        assert speed == f"{np.median(measured):.0f}"
