"""benchmark.run: a study that is stopped, killed or half done ends as one left alone. Small runs of real scripts."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmark import report, run
from benchmark.run import runs_of
from benchmark.studies import STUDIES, Rule, Study

ROOT = Path(__file__).parent.parent
SMALL = "--learning-starts 60 --batch-size 8 --checkpoint-frequency 100 --log-frequency 20 --eval-frequency 0"
TINY = Study({"Pendulum-v1": 1500}, {"default": "", "gamma 0.9": "--gamma 0.9"}, seeds=1, flags=SMALL)
BROKEN = Study({"Pendulum-v1": 60}, {"x": "--tau 5 --learning-starts 50"}, seeds=1, flags=SMALL)
MISTAKEN = Study({"Pendulum-v1": 60}, {"x": ""}, "a claim")
RUNNER = f"""
import sys
from benchmark import run, studies
Study = studies.Study
run.STUDIES.clear()
run.STUDIES.update(tiny={TINY!r}, also={TINY!r}, broken={BROKEN!r}, mistaken={MISTAKEN!r})
sys.argv[0] = "run"
run.main()
"""


def start(folder, *flags, before=""):
    """The runner, in a session of its own as a terminal's foreground process would be."""
    command = [sys.executable, "-c", before + RUNNER, *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    kwargs = dict(cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, start_new_session=True, **kwargs)


def weights(folder):
    """The final weights of all runs by the beginning of their folders' names; each run must have one folder."""
    found = {}
    for path in (folder / "runs").glob("*/model.pt"):
        name = path.parent.name.rsplit("__", 1)[0]
        assert name not in found, f"{name} was run twice"
        found[name] = torch.load(path, weights_only=True)["agent"]
    return found


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n][k], b[n][k]) for n in a for k in a[n])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    runner = start(folder, "tiny", "also", "--jobs", "2")
    said, _ = runner.communicate(timeout=300)
    assert runner.returncode == 0 and "2 runs, 0 finished before" in said, said  # what two studies share is run once
    assert said.count("done: tiny Pendulum-v1") == 2
    return folder


def children(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def wait_until_between_checkpoints(folder, process):
    """Until both runs are between two checkpoints, which come every 100 steps, and one has learned."""
    while process.poll() is None:
        logs = [path.read_text() for path in folder.glob("runs/logs/*.txt")]
        steps = [int(found[-1]) for log in logs if (found := re.findall(r"step (\d+),", log))]
        if len(steps) == 2 and max(steps) > 300 and all(20 <= step % 100 <= 60 for step in steps):
            return
        time.sleep(0.02)
    raise AssertionError("the study was over before it could be disturbed")


def test_a_finished_study_is_not_run_again(undisturbed):
    before = sorted((undisturbed / "runs").iterdir())
    runner = start(undisturbed, "tiny")
    said, _ = runner.communicate(timeout=100)
    assert runner.returncode == 0 and "2 runs, 2 finished before" in said
    assert sorted((undisturbed / "runs").iterdir()) == before


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("how", ["Ctrl-C", "runner killed", "run killed"])
def test_a_disturbed_study_ends_as_an_undisturbed_one(how, tmp_path, undisturbed):
    runner = start(tmp_path, "tiny", "--jobs", "2")
    wait_until_between_checkpoints(tmp_path, runner)
    runs = children(runner)
    assert len(runs) == 2
    if how == "Ctrl-C":
        assert all(os.getpgid(run) != runner.pid for run in runs)
        os.killpg(runner.pid, signal.SIGINT)  # as the terminal does: to all of its foreground group
        said, _ = runner.communicate(timeout=60)
        assert runner.returncode == 1 and "to continue: python -m benchmark.run tiny --jobs 2" in said, said
        logs = "".join(path.read_text() for path in tmp_path.glob("runs/logs/*.txt"))
        assert logs.count("stopped, to continue") == 2 and "Traceback" not in logs
    elif how == "runner killed":
        runner.kill()
        runner.communicate()
        deadline = time.time() + 20
        while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_text() for pid in runs):
            assert time.time() < deadline, "the runs outlive their runner"
            time.sleep(0.05)
    else:
        os.kill(runs[0], signal.SIGKILL)
        said, _ = runner.communicate(timeout=300)
        assert runner.returncode == 0 and said.count("done:") == 2, said
    if how != "run killed":
        assert len(weights(tmp_path)) < 2
        runner = start(tmp_path, "tiny", "--jobs", "2")
        said, _ = runner.communicate(timeout=300)
        assert runner.returncode == 0, said
    assert same(weights(tmp_path), weights(undisturbed))


def test_two_runners_share_a_study(tmp_path, undisturbed):
    runners = [start(tmp_path, "tiny", "--jobs", "1") for _ in range(2)]
    for runner in runners:
        said, _ = runner.communicate(timeout=300)
        assert runner.returncode == 0, said
    assert same(weights(tmp_path), weights(undisturbed))
    starts = [path.read_text().count("Pendulum-v1: ") for path in tmp_path.glob("runs/logs/*.txt")]
    assert starts == [1, 1], "what one had finished the other one has begun again"


def test_a_finished_run_is_not_started(tmp_path, undisturbed, monkeypatch):
    job = run.Job(runs_of("tiny", TINY)[0])
    assert not job.start(undisturbed / "runs", track=False) and not job.process
    # what is committed and has no folder here is for main() to leave out; who asks for its run gets one
    monkeypatch.setattr(run, "committed", lambda: {(job.run.env_id, job.run.key, str(job.run.seed))})
    assert job.run.committed() and not job.run.finished(tmp_path / "runs")
    assert job.start(tmp_path / "runs", track=False) and job.process.wait(100) == 0


def test_what_is_committed_is_run_again_if_asked(tmp_path, monkeypatch, capsys):
    grid, begun = runs_of("tiny", TINY), []
    monkeypatch.setattr(run, "STUDIES", {"tiny": TINY})
    monkeypatch.setattr(run, "committed", lambda: {(grid[0].env_id, grid[0].key, str(grid[0].seed))})
    monkeypatch.setattr(run, "execute", lambda jobs, *_: begun.append([job.run for job in jobs]))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / f"{grid[1].name}__1").mkdir(parents=True)
    (tmp_path / "runs" / f"{grid[1].name}__1" / "model.pt").touch()
    for flags in ([], ["--again"]):
        monkeypatch.setattr(sys, "argv", ["run", "tiny", *flags])
        run.main()
    assert begun == [[], [grid[0]]] and "2 runs, 2 finished before" in capsys.readouterr().out


def test_the_overview_is_redrawn_in_place_however_many_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run.os, "get_terminal_size", lambda: os.terminal_size((30, 10)))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    (tmp_path / "log").write_text("step 100, 50 steps/s, 1 minutes left, return 7.5, best 9.0\n")
    board = run.Board(20)
    for running in (2, 15, 0):
        jobs = [run.Job(runs_of("tiny", TINY)[0]) for _ in range(running)]
        for job in jobs:
            job.log = tmp_path / "log"
        before = board.drawn
        board.show([], jobs, 20 - running, [])
        said = capsys.readouterr().out
        assert said.startswith(f"\033[{before}A\033[J" if before else f"done {20 - running}, ")
        lines = said.replace(f"\033[{before}A\033[J", "").splitlines()
        assert len(lines) == board.drawn == min(running + 1, 9) and max(map(len, lines)) <= 29


def test_a_run_that_fails_twice_is_reported_and_the_others_go_on(tmp_path):
    runner = start(tmp_path, "broken", "tiny", "--variants", "x", "default", "--jobs", "2")
    said, _ = runner.communicate(timeout=300)
    assert runner.returncode == 1 and said.count("done:") == 1 and said.count("failed with exit code 2") == 1, said
    assert "error: --tau must lie in" in said
    (log,) = [path for path in tmp_path.glob("runs/logs/*.txt") if "--tau" in path.read_text()]
    assert log.read_text().count("error: --tau") == 2
    (row,) = report.read(runs_of("broken", BROKEN)[0], tmp_path / "runs", False).runs.to_dict("records")
    assert row["state"] == "failed with exit code 2"
    (row,) = report.read(runs_of("tiny", TINY)[0], tmp_path / "runs", False).runs.to_dict("records")
    assert row["state"] == "finished"


NO_SPACE = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))"  # not for a single byte


@pytest.mark.parametrize("before, answer", [("open('runs', 'x')", "Not a directory"), (NO_SPACE, "File too large")])
def test_where_nothing_can_be_written_one_line_says_so(before, answer, tmp_path):
    runner = start(tmp_path, "broken", before=before)
    said, _ = runner.communicate(timeout=100)
    assert runner.returncode == 2 and "Traceback" not in said, said
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert answer in line and str(tmp_path / "runs") in line and line == said.splitlines()[-1]


@pytest.mark.parametrize(
    "flags, answer",
    [
        (["F99"], "no study F99"),
        ([], "no study named"),
        (["tiny", "--variants", "y"], "--variants y"),
        (["tiny", "--jobs", "0"], "--jobs"),
        (["mistaken"], "study mistaken has a claim without rules"),
    ],
)
def test_mistakes_get_one_line(flags, answer, tmp_path):
    runner = start(tmp_path, *flags)
    said, _ = runner.communicate(timeout=100)
    assert runner.returncode == 2 and said.count("\n") == 1 and said.startswith("error:") and answer in said
    assert not list(tmp_path.iterdir())


def test_what_studies_share_is_run_once_with_the_first(monkeypatch):
    first = Study({"Pendulum-v1": 100}, {"a": "", "b": "--tau 0.01"}, seeds=2)
    second = Study({"Pendulum-v1": 100}, {"c": "--tau 0.02", "also a": "--gamma 0.99"}, seeds=2)
    monkeypatch.setattr(run, "STUDIES", {"first": first, "second": second})
    found = [(one.study, one.variant, one.seed) for one in run.runs_of_all(("first", "second"))]
    assert found == [("first", label, seed) for seed in (1, 2) for label in "ab"] + [
        ("second", "c", 1),
        ("second", "c", 2),
    ]


def test_the_list_names_all_studies_and_their_cost():
    listed = subprocess.run([sys.executable, "-m", "benchmark.run", "--list"], cwd=ROOT, capture_output=True, text=True)
    assert listed.returncode == 0 and [line.split()[0] for line in listed.stdout.splitlines()[::2]] == list(STUDIES)
    assert "F5       25 runs, 1.2M steps, about 2 core-hours" in listed.stdout


def test_tracked_runs_carry_study_and_variant(tmp_path):
    study = Study({"Pendulum-v1": 60}, {"rates 1, 2": ""}, seeds=1, flags=f"{SMALL} --learning-starts 50")
    job = run.Job(runs_of("a study", study)[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        assert job.start(tmp_path / "runs", track=True) and job.process.wait(100) == 0, job.log.read_text()
    (record,) = tmp_path.glob("runs/*/wandb/offline-run-*/run-*.wandb")
    said = record.read_bytes()
    assert b"a study" in said and b"rates 1 2" in said


def test_settings_tell_runs_apart_and_scripts_too():
    a, b = (runs_of("x", Study({"Pendulum-v1": 100}, {"v": flags}, seeds=1))[0] for flags in ("", "--tau 0.005"))
    c = runs_of("y", Study({"Pendulum-v1": 100}, {"v": "--tau 0.01"}, seeds=1))[0]
    d = runs_of("x", Study({"Pendulum-v1": 100}, {"v": ""}, seeds=1, script="sac_continuous.py"))[0]
    assert a.key == b.key and len({a.key, c.key, d.key}) == 3
    more_threads = runs_of("x", Study({"Pendulum-v1": 100}, {"v": ""}, seeds=1), threads=2)[0]
    assert a.key == more_threads.key  # their number changes no bits


def test_comments_make_no_other_version_and_code_does(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    for name, text in dict(
        a='x = "1 # 2"  # why\n\n# more\ny = f"""{x}\n# 3"""\n',
        b='x = "1 # 2"\ny = f"""{x}\n# 3"""  # because\n',
        c='x = "1 # 2"\ny = f"""{x}\n# 4"""\n',
        d='x = "1"\ny = f"""{x}\n# 3"""\n',
    ).items():
        (tmp_path / name).write_text(text)
    a, b, c, d = map(run.code_of, "abcd")
    assert a == b == 'x = "1 # 2"\ny = f"""{x}\n# 3"""' and len({a, c, d}) == 3


@pytest.mark.parametrize("name", STUDIES)
def test_studies_can_be_run_and_their_rules_judged(name):
    study = STUDIES[name]
    assert study.mistake() is None
    keys = {(run.env_id, run.key) for run in runs_of(name, study)}  # of all settings: the script takes the flags
    assert len(keys) == len(study.envs) * len(study.variants)  # no two variants are the same


A_RULE = Rule("E", "a", "above", "b")


@pytest.mark.parametrize(
    "changes, answer",
    [
        ({}, None),
        (dict(rules=[Rule("E", "a", "below", 200)]), None),
        (dict(claim="", rules=()), None),
        (dict(rules=()), "a claim without rules"),
        (dict(claim=""), "rules without a claim"),
        (dict(rules=[A_RULE, A_RULE._replace(env_id="F")]), "for F, which is none of its environments: E"),
        (dict(rules=[A_RULE, A_RULE._replace(variant="c")]), "for c, which is none of its variants: a, b"),
        (dict(rules=[A_RULE, A_RULE._replace(other="c")]), "for c, which is none of its variants: a, b"),
        (dict(rules=[A_RULE, A_RULE._replace(other="a")]), "a with itself"),
        (dict(rules=[A_RULE._replace(relation="abvoe")]), "relation abvoe, which is none of above, below, like"),
        (dict(rules=[A_RULE._replace(measure="speed")]), "measure speed, which is none of return, steps per second"),
        (dict(seeds=0), "a seed at least"),
        (dict(envs={}), "an environment"),
        (dict(variants={}), "a variant"),
    ],
)
def test_mistakes_in_a_study_are_named(changes, answer):
    study = dict(envs={"E": 100}, variants={"a": "", "b": "--tau 0.1"}, claim="a claim", rules=[A_RULE])
    found = Study(**study | changes).mistake()
    assert found is None if answer is None else answer in found
