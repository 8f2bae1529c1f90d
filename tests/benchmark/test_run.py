"""benchmark.run: a study that is stopped, killed or half done ends as one left alone. Small runs of real scripts."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmark import jobs, run, runs
from benchmark.runs import Records, read, runs_of
from benchmark.studies import STUDIES, Study
from tests.benchmark.helpers import BROKEN, ROOT, TINY, TRAINING, same, start, weights
from tests.wandb_files import finished_records


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    runner = start(folder, "tiny", "also", "--jobs", "2")
    said, _ = runner.communicate(timeout=300)
    # Shared runs are run once.
    assert runner.returncode == 0 and "2 runs, 0 finished before" in said, said
    assert said.count("done: tiny Pendulum-v1") == 2
    assert said.endswith("2 of 2 runs finished. Next: python -m benchmark.report tiny also\n")
    return folder


def children(process):
    return [
        int(pid)
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]


def folder_of(folder, pid):
    """The run folder of a process; it has the name that the runner gives with --exp-name."""
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    name = words[words.index("--exp-name") + 1] if "--exp-name" in words else "not yet begun"
    return next(folder.glob(f"runs/Pendulum-v1__{name}__*"), None)


def is_between_checkpoints(run):
    """Whether a run has learned, and is well between two checkpoints, which come every 100 steps."""
    scalars = Records(run).read() if run else {}
    step = scalars["charts/SPS"][-1][0] if "charts/SPS" in scalars else 0
    return step > 300 and step % 100 in (20, 40)


def freeze_between_checkpoints(folder, runner):
    """The two runs, each stopped at such a moment: they cannot end before they are disturbed."""
    frozen = []
    while len(frozen) < 2:
        assert runner.poll() is None, "the study was over before it could be disturbed"
        for pid in set(children(runner)) - set(frozen):
            if is_between_checkpoints(folder_of(folder, pid)):
                os.kill(pid, signal.SIGSTOP)
                frozen.append(pid)
        time.sleep(0.01)
    return frozen


def thaw(pids):
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.slow
def test_a_finished_study_is_not_run_again(undisturbed):
    before = sorted((undisturbed / "runs").iterdir())
    runner = start(undisturbed, "tiny")
    said, _ = runner.communicate(timeout=100)
    assert runner.returncode == 0 and "2 runs, 2 finished before" in said
    assert sorted((undisturbed / "runs").iterdir()) == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("how", ["Ctrl-C", "runner killed", "run killed"])
def test_a_disturbed_study_ends_as_an_undisturbed_one(how, tmp_path, undisturbed):
    runner = start(tmp_path, "tiny", "--jobs", "2")
    runs = freeze_between_checkpoints(tmp_path, runner)
    if how == "Ctrl-C":
        assert all(os.getpgid(run) != runner.pid for run in runs)
        os.killpg(runner.pid, signal.SIGINT)  # as the terminal does: to all of its foreground group
        thaw(runs)
        said, _ = runner.communicate(timeout=60)
        assert (
            runner.returncode == 1 and "to continue: python -m benchmark.run tiny --jobs 2" in said
        ), said
        logs = "".join(path.read_text() for path in tmp_path.glob("runs/logs/*.txt"))
        assert logs.count("--resume") == 2 and "Traceback" not in logs
    elif how == "runner killed":
        runner.kill()
        runner.communicate()
        deadline = time.time() + 20
        while any(
            Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_text()
            for pid in runs
        ):
            assert time.time() < deadline, "the runs outlive their runner"
            time.sleep(0.05)
    else:
        os.kill(runs[0], signal.SIGKILL)
        thaw(runs[1:])
        said, _ = runner.communicate(timeout=300)
        assert runner.returncode == 0 and said.count("done:") == 2, said
    if how != "run killed":
        assert len(weights(tmp_path)) < 2  # or there was nothing left to continue
        runner = start(tmp_path, "tiny", "--jobs", "2")
        said, _ = runner.communicate(timeout=300)
        assert runner.returncode == 0, said
    assert same(weights(tmp_path), weights(undisturbed))


@pytest.mark.slow
def test_any_number_of_runners_share_a_study(tmp_path, undisturbed):
    runners = [start(tmp_path, "tiny", "--jobs", "1") for _ in range(3)]
    for runner in runners:
        said, _ = runner.communicate(timeout=300)
        assert runner.returncode == 0, said
    assert same(weights(tmp_path), weights(undisturbed))
    starts = [len(list(folder.glob("events*"))) for folder in tmp_path.glob("runs/Pendulum*")]
    assert starts == [1, 1], "what one had finished the other one has begun again"


def committed(*grid):
    return {(one.key, str(one.seed)) for one in grid}


@pytest.mark.slow
def test_a_finished_run_is_not_started(tmp_path, undisturbed, monkeypatch):
    short = Study({"Pendulum-v1": 70}, {"default": ""}, seeds=1, flags=TRAINING)
    job = jobs.Job(runs_of("tiny", TINY)[0])
    assert not job.start(undisturbed / "runs", track=False) and not job.process
    # what is committed and has no folder here is for main() to leave out; who asks for its run gets one
    job = jobs.Job(runs_of("short", short)[0])
    monkeypatch.setattr(runs, "committed_runs", lambda: committed(job.run))
    assert job.run.committed() and not job.run.finished(tmp_path / "runs")
    assert job.start(tmp_path / "runs", track=False) and job.process.wait(100) == 0


def test_what_is_committed_is_run_again_if_asked(tmp_path, monkeypatch, capsys):
    grid, begun = runs_of("tiny", TINY), []
    monkeypatch.setattr(runs, "STUDIES", {"tiny": TINY})
    monkeypatch.setattr(run, "STUDIES", runs.STUDIES)
    monkeypatch.setattr(runs, "committed_runs", lambda: committed(grid[0]))
    monkeypatch.setattr(run, "execute", lambda jobs, *_: begun.append([job.run for job in jobs]))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / f"Pendulum-v1__{grid[1].key}__1__1"
    folder.mkdir(parents=True)
    (folder / "model.pt").touch()
    for flags in ([], ["--again"]):
        monkeypatch.setattr(sys, "argv", ["run", "tiny", *flags])
        run.main()
    said = capsys.readouterr().out
    assert begun == [[], [grid[0]]] and "2 runs, 2 finished before" in said
    assert "2 of 2 runs finished. Next: python -m benchmark.report tiny\n" in said


def test_the_overview_is_redrawn_in_place_however_many_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs.os, "get_terminal_size", lambda: os.terminal_size((30, 10)))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    board = jobs.Board(20, tmp_path)
    for running in (2, 15, 0):
        before = board.drawn
        board.show(
            [], [jobs.Job(runs_of("tiny", TINY)[0]) for _ in range(running)], 20 - running, []
        )
        said = capsys.readouterr().out
        assert said.startswith(f"\033[{before}A\033[J" if before else f"done {20 - running}, ")
        lines = said.replace(f"\033[{before}A\033[J", "").splitlines()
        assert len(lines) == board.drawn == min(running + 1, 9) and max(map(len, lines)) <= 29


def test_a_run_that_ends_well_but_without_its_agent_has_failed(tmp_path, capsys):
    ended = SimpleNamespace(poll=lambda: 0)
    run_ = SimpleNamespace(finished=lambda runs: False, said=lambda runs: ["some", "words"])
    job = SimpleNamespace(process=ended, tries=2, run=run_, log=tmp_path / "log")
    pool = jobs.Pool([], lambda: 1, tmp_path, False, 0, running=[job])
    pool.collect(jobs.Board(1, tmp_path))
    assert pool.failed == [job] and pool.done == 0
    said = f"failed with exit code 0: {job.log}\n    some\n    words\n"
    assert capsys.readouterr().out == said


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(jobs.fcntl, "flock", no_locks)
    with pytest.raises(SystemExit, match="2"):
        jobs.lock(tmp_path / "a.lock")
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path / 'a.lock'}: No locks available: ")
    assert "must be on a file system with file locks" in said


def test_output_that_nobody_reads_is_no_full_disk(capsys):
    with pytest.raises(SystemExit) as ended, jobs.continuable("benchmark.run", "runs"):
        raise BrokenPipeError
    assert ended.value.code == 1 and capsys.readouterr().err == ""


def test_the_overview_tells_what_runs_recorded(undisturbed):
    step, speed, _ = jobs.Job(runs_of("tiny", TINY)[0]).progress(undisturbed / "runs")
    assert step == 900 and speed > 0
    assert jobs.Job(runs_of("broken", BROKEN)[0]).progress(undisturbed / "runs")[:2] == (0, 0)


@pytest.mark.slow
def test_a_run_whose_folder_is_gone_has_recorded_nothing(tmp_path, undisturbed):
    """A script that ends before its first checkpoint removes its folder; a second try makes one."""
    runs_folder = tmp_path / "runs"
    shutil.copytree(undisturbed / "runs", runs_folder)
    job = jobs.Job(runs_of("tiny", TINY)[0])
    folder = job.run.folder(runs_folder)
    recorded = job.scalars(runs_folder)
    assert job.progress(runs_folder)[0] == 900
    away = folder.rename(tmp_path / "away")
    assert job.scalars(runs_folder) == {} and job.progress(runs_folder)[:2] == (0, 0.0)
    assert job.records.read() == {}  # where it goes between the look and the reading
    name, milliseconds = folder.name.rsplit("__", 1)
    away.rename(folder.with_name(f"{name}__{int(milliseconds) + 1}"))
    assert job.scalars(runs_folder) == recorded and recorded


@pytest.mark.slow
def test_a_run_that_fails_twice_is_reported_and_the_others_go_on(tmp_path):
    runner = start(tmp_path, "broken", "tiny", "--variants", "x", "default", "--jobs", "2")
    said, _ = runner.communicate(timeout=300)
    assert (
        runner.returncode == 1
        and said.count("done:") == 1
        and said.count("failed with exit code 2") == 1
    ), said
    assert "--tau" in said
    (log,) = [path for path in tmp_path.glob("runs/logs/*.txt") if "--tau" in path.read_text()]
    assert log.read_text().count("error: ") == 2
    assert (
        read(runs_of("broken", BROKEN)[0], tmp_path / "runs").about["state"]
        == "failed with exit code 2"
    )
    assert read(runs_of("tiny", TINY)[0], tmp_path / "runs").about["state"] == "finished"


NO_SPACE = (
    "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))"  # not for a single byte
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "before, answer", [("open('runs', 'x')", "Not a directory"), (NO_SPACE, "File too large")]
)
def test_where_nothing_can_be_written_one_line_says_so(before, answer, tmp_path):
    runner = start(tmp_path, "broken", before=before)
    said, _ = runner.communicate(timeout=100)
    assert runner.returncode == 2 and "Traceback" not in said, said
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert answer in line and str(tmp_path / "runs") in line and line == said.splitlines()[-1]


@pytest.mark.slow
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
    assert (
        runner.returncode == 2
        and said.count("\n") == 1
        and said.startswith("error:")
        and answer in said
    )
    assert not list(tmp_path.iterdir())


def test_the_list_names_all_studies_and_their_cost():
    listed = subprocess.run(
        [sys.executable, "-m", "benchmark.run", "--list"], cwd=ROOT, capture_output=True, text=True
    )
    assert listed.returncode == 0 and [
        line.split()[0] for line in listed.stdout.splitlines()[::2]
    ] == list(STUDIES)
    assert "F5       25 runs, 1.2M steps, about 4.3 core-hours" in listed.stdout


@pytest.mark.parametrize("program", ["run", "tune"])
def test_a_list_that_nobody_reads_on_ends_in_silence(program):
    command = [sys.executable, "-m", f"benchmark.{program}", "--list"]
    listing = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    listing.stdout.close()
    assert listing.stderr.read() == b""
    listing.stderr.close()
    assert listing.wait() == -signal.SIGPIPE


@pytest.mark.parametrize(
    ("script", "tracked"), [("sac_dmc.py", True), ("benchmark/peers.py --library sbx", False)]
)
def test_only_scripts_that_can_are_tracked(script, tracked, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(jobs.subprocess, "Popen", lambda command, **_: begun.append(command))
    job = jobs.Job(runs_of("x", Study({"Pendulum-v1": 60}, {"a": script}, seeds=1))[0])
    assert job.start(tmp_path / "runs", track=True)
    assert ("--track" in begun[0]) == tracked


@pytest.mark.parametrize(("physical", "allowed", "cores"), [(8, {3}, 1), (2, {0, 1, 2, 3}, 2)])
def test_no_more_cores_are_taken_than_the_process_may_use(physical, allowed, cores, monkeypatch):
    monkeypatch.setattr(jobs.psutil, "cpu_count", lambda logical: physical)
    monkeypatch.setattr(jobs.os, "sched_getaffinity", lambda _: allowed, raising=False)
    assert jobs.cores() == cores


@pytest.mark.slow
def test_tracked_runs_carry_study_and_variant(tmp_path):
    study = Study(
        {"Pendulum-v1": 60}, {"rates 1, 2": ""}, seeds=1, flags=f"{TRAINING} --learning-starts 50"
    )
    job = jobs.Job(runs_of("a study", study)[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        assert job.start(tmp_path / "runs", track=True) and job.process.wait(100) == 0, (
            job.log.read_text()
        )
    (record,) = tmp_path.glob("runs/*/wandb/offline-run-*/run-*.wandb")
    begun = next(r.run for r in finished_records(record) if r.HasField("run"))
    assert begun.run_group == "a study" and list(begun.tags) == ["rates 1 2"]
