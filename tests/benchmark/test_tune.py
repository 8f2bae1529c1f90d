"""benchmark.tune: trials are scored, pruned, shared and continued as its docstring says. Small runs, and fake ones."""

import contextlib
import csv
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages.journal import JournalFileBackend
from PIL import Image

from benchmark import tables, trials, tune
from benchmark.runs import RESULTS, Records, code_hash
from benchmark.trials import Env, Space
from benchmark.tune import SPACES
from tests.benchmark.helpers import SMALL, same, start_python, weights

EVALUATED = f"{SMALL} --eval-frequency 200 --eval-episodes 1"
REAL = Space(
    {"Pendulum-v1": Env(400, -1700, 0)},
    {
        "--gamma": FloatDistribution(0.8, 0.95),
        "--layers": IntDistribution(1, 3),
    },  # without the script's own
    flags=EVALUATED,
)
FAKE = """
import os, sys, time
from dataclasses import dataclass
from pathlib import Path
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

@dataclass
class Args:
    env_id: str = "a"
    seed: int = 1
    total_timesteps: int = 8
    eval_frequency: int = 0
    threads: int = 1
    exp_name: str = ""
    x: float = 0.2
    mode: str = "good"

if __name__ == "__main__":
    given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    env_id, steps, x, mode = (given.get(k) for k in ("--env-id", "--total-timesteps", "--x", "--mode"))
    folder = Path("runs", f"{env_id}__{given['--exp-name']}__{given['--seed']}__{time.time_ns() // 10**6}")
    folder.mkdir()
    writer = EventFileWriter(str(folder))
    with open("starts.txt", "a") as file:
        file.write(f"{os.getpid()} {folder.name}\\n")
    for step in range(2, int(steps) + 1, 2):
        if mode == "broken":
            sys.exit("error: out of order")
        if mode == "full disk" and step > 4:
            sys.exit("error: no space left. Last checkpoint: step 0.")
        if mode == "diverging" and step > 4:
            sys.exit("error: alpha is not finite at step 5; the last good checkpoint stays")
        skill = (1 - abs(float(x or 0.7) - 0.7)) * step / int(steps)
        value = Summary.Value(tag="eval/episodic_return", simple_value={"a": 10, "b": 200}[env_id] * skill - 1)
        writer.add_event(Event(step=step, wall_time=time.time(), summary=Summary(value=[value])))
        writer.flush()
        time.sleep(0.1)
    (folder / "model.pt").touch()
"""
TUNER = """
import sys
from pathlib import Path
from optuna.distributions import *
from benchmark import trials, tune
from benchmark.trials import Env, Space
trials.POLL, tune.RESULTS = 0.02, Path("results")
tune.SPACES.clear()
tune.SPACES["tiny"] = {space!r}
sys.argv[0] = "tune"
tune.main()
"""


def start(folder, space, *flags):
    """The tuner, which knows one space."""
    options = ["-W", "error::UserWarning"]
    return start_python(folder, TUNER.format(space=space), "tiny", *flags, options=options)


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    """A space of a script that learns at once: best at --x 0.7, with returns of -1 to 9 on a and of -1 to 199 on b."""
    script = tmp_path_factory.mktemp("fake") / "fake_script.py"
    script.write_text(FAKE)
    envs = {"a": Env(8, -1, 9), "b": Env(8, 99, 199)}
    return Space(envs, {"--x": FloatDistribution(0, 1)}, str(script), 1, "--eval-frequency 2")


def skills(x, steps=8):
    """The fake script's, by evaluation."""
    return (1 - abs(x - 0.7)) * np.arange(2, steps + 1, 2) / steps


def rows(folder):
    with open(folder / "results" / "tune-tiny" / "trials.csv", newline="") as file:
        return list(csv.DictReader(file))


def run_here(monkeypatch, folder, space, *flags):
    """The tuner in this process, which spares the imports."""
    monkeypatch.setattr(trials, "POLL", 0.02)
    monkeypatch.setattr(tune, "RESULTS", folder / "results")
    monkeypatch.setitem(SPACES, "tiny", space)
    monkeypatch.setattr(sys, "argv", ["tune", *flags])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(folder)
    tune.main()


# ---------------------------------------------------------------- scores and pruning


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, fake):
    folder = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_here(monkeypatch, folder, fake, "tiny", "--trials", "14", "--jobs", "1")
    return folder


@pytest.mark.slow
def test_scores_are_means_of_what_lies_between_low_and_high(tuned):
    complete = [row for row in rows(tuned) if row["state"] == "complete"]
    assert len(complete) >= 5
    for row in complete:
        on_a = skills(float(row["--x"])).mean()
        on_b = np.maximum(0, 2 * skills(float(row["--x"])) - 1).mean()  # what is below low counts 0
        assert float(row["a seed 1"]) == pytest.approx(on_a, abs=1e-6)
        assert float(row["b seed 1"]) == pytest.approx(on_b, abs=1e-6)
        assert float(row["score"]) == pytest.approx((on_a + on_b) / 2, abs=1e-6)
        assert row["steps"] == "16"


def test_bad_trials_are_pruned_and_their_runs_stopped(tuned):
    def far(state):
        return [abs(float(row["--x"]) - 0.7) for row in rows(tuned) if row["state"] == state]

    assert (
        len(rows(tuned)) == 14
        and len(far("pruned")) >= 3
        and len(far("pruned") + far("complete")) == 14
    )
    assert min(far("complete")) < 0.1 and np.mean(far("complete")) < np.mean(far("pruned"))
    starts = [line.split() for line in (tuned / "starts.txt").read_text().splitlines()]
    finished = sum((tuned / "runs" / name / "model.pt").exists() for _, name in starts)
    scored = sum(row[f"{env_id} seed 1"] != "" for row in rows(tuned) for env_id in "ab")
    assert scored <= finished < len(starts) < 28  # some were stopped at work, others never begun
    for row in rows(tuned):
        if row["state"] == "pruned":
            assert 4 <= int(row["steps"]) < 16 and row["score"] == "" and row["b seed 1"] == ""
    for pid, _ in starts:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_a_trial_is_pruned_where_its_score_so_far_is_below_the_median(tuned):
    """The rule of the median, applied by hand to what each trial must have reported."""
    storage = optuna.storages.JournalStorage(
        JournalFileBackend(str(tuned / "runs" / "tune-tiny.journal"))
    )
    (study,) = (
        optuna.load_study(storage=storage, study_name=name)
        for name in optuna.get_all_study_names(storage)
    )
    reports, complete = {}, []
    for row in rows(tuned):
        number, x = int(row["trial"]), float(row["--x"])
        on_a, on_b = skills(x), np.maximum(0, 2 * skills(x) - 1)

        def means(values):
            return np.cumsum(values) / np.arange(1, 5)

        so_far = np.concatenate([means(on_a), on_a.mean() + means(on_b)]) / 2
        reports[number] = dict(zip(range(2, 17, 2), so_far))
        for step, value in study.trials[number].intermediate_values.items():
            assert value == pytest.approx(reports[number][step], abs=1e-6)
        below = [
            step
            for step in range(4, 16, 2)
            if len(complete) >= 5
            and max(v for s, v in reports[number].items() if s <= step)
            < np.median([reports[n][step] for n in complete])
        ]
        assert (row["state"], row["steps"]) == (
            ("pruned", str(below[0])) if below else ("complete", "16")
        )
        complete += [number] * (not below)


def test_table_csv_and_figures_hold_all_trials(tuned, fake, monkeypatch, capsys):
    results = tuned / "results" / "tune-tiny"
    before, starts = (results / "trials.csv").read_bytes(), (tuned / "starts.txt").read_bytes()
    # A finished study: nothing runs, all is said again.
    run_here(monkeypatch, tuned, fake, "tiny", "--trials", "14")
    said = capsys.readouterr().out
    assert (results / "trials.csv").read_bytes() == before and (
        tuned / "starts.txt"
    ).read_bytes() == starts
    ranked = sorted(
        (row for row in rows(tuned) if row["score"]), key=lambda row: -float(row["score"])
    )
    table = [line.split() for line in said[said.index("--x") :].splitlines()[1:6]]
    assert [row[0] for row in table] == [row["trial"] for row in ranked[:5]]
    assert [row[2] for row in table] == [f"{float(row['--x']):.3g}" for row in ranked[:5]]
    assert f"--eval-frequency 2 --x {ranked[0]['--x']}\n" in said
    assert (
        f"{len(ranked)} complete, {14 - len(ranked)} pruned" in said
        and "importances: --x 1.00" in said
    )
    (own,) = [row for row in rows(tuned) if row["note"]]
    assert (
        own["trial"] == "0"
        and own["--x"] == "0.2"
        and "the script's own settings: trial 0, score" in said
    )
    assert all(
        "optuna 5" in row["versions"] and len(row["script_hash"]) == 10 for row in rows(tuned)
    )
    for name in ("slices.png", "importances.png"):
        pixels = np.asarray(Image.open(results / name).convert("L"))
        assert pixels.shape[0] > 150 and (pixels < 150).mean() > 0.001


def test_slices_show_the_complete_trials_and_importances_the_pruned_too(
    monkeypatch, tmp_path, capsys
):
    study, drawn = optuna.create_study(direction="maximize"), []
    distributions = {"--x": FloatDistribution(0, 1), "--y": FloatDistribution(0, 1)}
    for i in range(12):
        params = {"--x": i / 12, "--y": (7 * i % 12) / 12}
        state = optuna.trial.TrialState.PRUNED if i % 3 == 0 else optuna.trial.TrialState.COMPLETE
        made = dict(params=params, distributions=distributions, value=i / 12, state=state)
        study.add_trial(optuna.create_trial(**made))
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure)
    )
    tune.draw(study, tmp_path)
    slices, importances = drawn
    points = slices.axes[0].collections[0].get_offsets()
    assert sorted(map(tuple, np.round(points, 6).tolist())) == sorted(
        (round(i / 12, 6), round(i / 12, 6)) for i in range(12) if i % 3
    )
    assert re.search(r"importances: --x (0\.[5-9]|1\.)", capsys.readouterr().out)
    assert {label.get_text() for label in importances.axes[0].get_yticklabels()} == {"--x", "--y"}


def test_only_the_last_evaluations_count_if_so_wanted(monkeypatch, tmp_path, fake):
    space = Space({"a": Env(8, -1, 9)}, fake.search, fake.script, 1, fake.flags, last=1)
    run_here(monkeypatch, tmp_path, space, "tiny", "--trials", "1")
    assert float(rows(tmp_path)[0]["score"]) == pytest.approx(skills(0.2)[-1], abs=1e-6)


@pytest.mark.slow
def test_diverged_runs_count_0_and_broken_trials_fail_while_others_go_on(
    monkeypatch, tmp_path, fake, capsys
):
    modes = {"--mode": CategoricalDistribution(["good", "diverging", "broken"])}
    space = Space({"a": Env(8, -1, 9)}, modes, fake.script, 1, fake.flags)
    run_here(monkeypatch, tmp_path, space, "tiny", "--trials", "6", "--jobs", "2")
    said, found = capsys.readouterr().out, {row["--mode"]: row for row in rows(tmp_path)}
    assert found.keys() == {"good", "diverging", "broken"}, "another seed would have all three"
    assert found["broken"]["state"] == "fail" and found["broken"]["score"] == ""
    assert re.search(
        r"^trial \d: failed, a, seed 1 ended with exit code 1: error: out of order.*--mode broken$",
        said,
        re.M,
    )
    assert float(found["good"]["score"]) == pytest.approx(np.mean([0.25, 0.5, 0.75, 1]), abs=1e-6)
    assert float(found["diverging"]["score"]) == pytest.approx(np.mean([0.25, 0.5, 0, 0]), abs=1e-6)
    assert re.search(r"^trial \d: a, seed 1 diverged, what it had left counts 0$", said, re.M)
    assert "importances need 10 finished trials" in said and len(rows(tmp_path)) == 6
    started = [line.split("__")[1] for line in (tmp_path / "starts.txt").read_text().splitlines()]
    # the same setting, drawn again, is not run again; a broken one is tried twice in each of its trials
    broken = sum(row["--mode"] == "broken" for row in rows(tmp_path))
    assert len(started) == 2 + 2 * broken and len(set(started)) == 3


@pytest.mark.slow
def test_a_full_disk_is_a_failure_and_no_divergence(monkeypatch, tmp_path, fake, capsys):
    modes = {"--mode": CategoricalDistribution(["full disk"])}
    space = Space({"a": Env(8, -1, 9)}, modes, fake.script, 1, fake.flags)
    with pytest.raises(SystemExit, match="no trial is complete"):
        run_here(monkeypatch, tmp_path, space, "tiny", "--trials", "1")
    assert "trial 0: failed, a, seed 1 ended with exit code 1: error: no space left" in (
        capsys.readouterr().out
    )
    assert len((tmp_path / "starts.txt").read_text().splitlines()) == 2


@pytest.mark.slow
def test_three_failed_trials_in_a_row_end_the_search(monkeypatch, tmp_path, fake):
    """They are no settings' fault: a full disk would use up all trials within a minute."""
    modes = {"--mode": CategoricalDistribution(["broken"])}
    space = Space({"a": Env(8, -1, 9)}, modes, fake.script, 1, fake.flags)
    for failed in (3, 6):  # the same command begins to count anew
        with pytest.raises(SystemExit, match="error: 3 trials in a row failed, see .*logs"):
            run_here(monkeypatch, tmp_path, space, "tiny", "--trials", "30", "--jobs", "1")
        assert [row["state"] for row in rows(tmp_path)] == ["fail"] * failed


# ---------------------------------------------------------------- stopped, shared, continued


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    tuner = start(folder, REAL, "--trials", "1", "--jobs", "1")
    said, _ = tuner.communicate(timeout=300)
    assert tuner.returncode == 0 and said.count("best so far") == 1, said
    return folder


def steps_of(folder):
    """The last step that each run in a folder has recorded, where there are two."""
    read = [Records(run).read() for run in folder.glob("runs/Pendulum*")]
    steps = [scalars["charts/SPS"][-1][0] for scalars in read if "charts/SPS" in scalars]
    return steps if len(steps) == 2 else []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("how", ["Ctrl-C", "killed"])
def test_a_disturbed_study_ends_as_an_undisturbed_one(how, tmp_path, undisturbed):
    tuner = start(tmp_path, REAL, "--trials", "1", "--jobs", "1")

    def finished():
        return list(tmp_path.glob("runs/*/model.pt"))

    # Until the second run of the trial has learned, and is past a checkpoint and an evaluation. It
    # is looked at while it is stopped: so it cannot end before it is disturbed.
    children = Path(f"/proc/{tuner.pid}/task/{tuner.pid}/children")
    while True:
        assert tuner.poll() is None, "the study was over before it could be disturbed"
        run = int(children.read_text() or 0)
        if run and len(finished()) == 1:
            with contextlib.suppress(ProcessLookupError):  # a short one, that asks git
                os.kill(run, signal.SIGSTOP)
                if 300 <= min(steps_of(tmp_path), default=0) < 400:
                    break
                os.kill(run, signal.SIGCONT)
        time.sleep(0.02)
    if how == "Ctrl-C":
        os.killpg(tuner.pid, signal.SIGINT)  # as the terminal does: to all of its foreground group
        os.kill(run, signal.SIGCONT)
        said, _ = tuner.communicate(timeout=60)
        assert tuner.returncode == 1, said
        assert said == "stopped, to continue: python -m benchmark.tune tiny --trials 1 --jobs 1\n"
    else:
        tuner.kill()
        tuner.communicate()
    deadline = time.time() + 20
    while Path(f"/proc/{run}/cmdline").exists() and Path(f"/proc/{run}/cmdline").read_text():
        assert time.time() < deadline, "the run outlives its tuner"
        time.sleep(0.05)
    (first,) = finished()
    before = first.stat().st_mtime_ns
    said, _ = start(tmp_path, REAL, "--trials", "1", "--jobs", "1").communicate(timeout=300)
    assert said.count("best so far") == 1, said
    assert first.stat().st_mtime_ns == before and same(weights(tmp_path), weights(undisturbed))
    starts = [len(list(folder.glob("events*"))) for folder in tmp_path.glob("runs/Pendulum*")]
    assert sorted(starts) == [1, 2]  # the second was continued
    assert rows(tmp_path) == rows(undisturbed)


@pytest.mark.slow
def test_processes_share_trials_and_take_up_what_a_killed_one_left(tmp_path, fake):
    flags = ("--trials", "6", "--jobs", "2")
    killed = start(tmp_path, fake, *flags)
    while (
        not (tmp_path / "starts.txt").exists()
        or (tmp_path / "starts.txt").read_text().count("\n") < 2
    ):
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.02)
    killed.kill()
    killed.communicate()
    first = (tmp_path / "starts.txt").read_text().splitlines()
    tuners = [start(tmp_path, fake, *flags) for _ in range(2)]
    said = [tuner.communicate(timeout=300)[0] for tuner in tuners]
    assert [tuner.returncode for tuner in tuners] == [0, 0], said
    finished = [re.findall(r"^trial (\d+): ", words, re.M) for words in said]
    assert all(finished) and sorted(finished[0] + finished[1]) == [str(i) for i in range(6)], (
        finished
    )
    assert len({row["--x"] for row in rows(tmp_path)}) == 6
    lines = (tmp_path / "starts.txt").read_text().splitlines()[len(first) :]
    begun = [(line.split("__")[1], line.split()[1][0]) for line in lines]
    keys = {key for key, _ in begun}
    assert len(set(begun)) == len(begun)
    # Two environments of six trials: the same settings are taken up. A run of the killed process
    # may have been finished just before.
    assert len(keys | {line.split("__")[1] for line in first}) == 12


@pytest.mark.slow
def test_stopping_between_trials_changes_nothing(monkeypatch, tmp_path, fake, tuned):
    for wanted in ("2", "4"):
        run_here(monkeypatch, tmp_path, fake, "tiny", "--trials", wanted, "--jobs", "1")
    assert [row["--x"] for row in rows(tmp_path)] == [row["--x"] for row in rows(tuned)[:4]]


# ---------------------------------------------------------------- the tables


def copy_results(folder, to, until):
    """The tables of a search as they were after so many trials, run one at a time."""
    (to / "results" / "tune-tiny").mkdir(parents=True)
    for name in ("trials.csv", "reports.csv"):
        head, *lines = (folder / "results" / "tune-tiny" / name).read_text().splitlines(True)
        kept = [line for line in lines if int(line.split(",")[0]) < until]
        (to / "results" / "tune-tiny" / name).write_text("".join([head, *kept]))


@pytest.mark.slow
def test_without_its_journal_a_search_goes_on_from_its_tables(
    monkeypatch, tmp_path, fake, tuned, capsys
):
    copy_results(tuned, tmp_path, until=10)
    run_here(monkeypatch, tmp_path, fake, "tiny", "--trials", "14", "--jobs", "1")
    results = Path("results", "tune-tiny")
    for name in ("trials.csv", "reports.csv"):
        assert (tmp_path / results / name).read_bytes() == (tuned / results / name).read_bytes()
    said = capsys.readouterr().out
    assert f"10 trials are taken from {tmp_path / results}\n" in said
    assert re.findall(r"^trial (\d+): ", said, re.M) == ["10", "11", "12", "13"]


@pytest.mark.slow
def test_a_journal_gets_from_the_tables_what_it_lacks(monkeypatch, tmp_path, fake, tuned, capsys):
    """Its own two trials stay as they are: none is there twice, and none is lost."""
    run_here(monkeypatch, tmp_path, fake, "tiny", "--trials", "2", "--jobs", "1")
    shutil.rmtree(tmp_path / "results")
    copy_results(tuned, tmp_path, until=14)  # as pulled from where more were made
    starts = (tmp_path / "starts.txt").read_bytes()
    for taken in (12, 0):
        capsys.readouterr()
        run_here(monkeypatch, tmp_path, fake, "tiny", "--trials", "2", "--jobs", "1")
        assert (f"{taken} trials are taken" in capsys.readouterr().out) == bool(taken)
        assert rows(tmp_path) == rows(tuned)
    assert (tmp_path / "starts.txt").read_bytes() == starts


@pytest.mark.slow
def test_a_trial_is_in_the_tables_once_it_has_ended(monkeypatch, tmp_path, fake):
    """Whatever ends the search afterwards."""

    def lost(*_):
        raise RuntimeError("the machine is lost")

    claim, claimed = trials.Tuning.claim, []

    def claim_two(tuning):
        claimed.append(len(rows(tmp_path)) if claimed else 0)
        return claim(tuning) if len(claimed) < 3 else lost()

    monkeypatch.setattr(trials.Tuning, "claim", claim_two)
    with pytest.raises(RuntimeError):
        run_here(monkeypatch, tmp_path, fake, "tiny", "--trials", "5", "--jobs", "1")
    assert claimed == [0, 1, 2]
    assert not list((tmp_path / "results" / "tune-tiny").glob(".*"))


@pytest.mark.parametrize("column", ["script_hash", "space_hash"])
def test_tables_of_something_else_are_never_overwritten(
    column, monkeypatch, tmp_path, fake, tuned, capsys
):
    copy_results(tuned, tmp_path, until=3)
    table = tmp_path / "results" / "tune-tiny" / "trials.csv"
    other = table.read_text().replace(rows(tmp_path)[0][column], "0123456789", 1)  # one is enough
    table.write_text(other)
    with pytest.raises(SystemExit) as end:
        run_here(monkeypatch, tmp_path, fake, "tiny", "--trials", "5")
    said = capsys.readouterr().err
    assert end.value.code == 2 and re.fullmatch("error: .*to begin anew\n", said)
    assert f"{table.parent} is of another version of {fake.script}, or another" in said
    assert table.read_text() == other and not (tmp_path / "starts.txt").exists()


@pytest.mark.parametrize("known, pruned", [(4, False), (5, True)])
def test_what_four_trials_reported_prunes_nothing(known, pruned, tmp_path, fake):
    (tmp_path / "runs" / "logs").mkdir(parents=True)
    tuning = trials.Tuning("tiny", fake, tune.Args(trials=20), tmp_path / "runs", tmp_path)
    tuning.open()
    for i in range(9):
        made = dict(params={"--x": 0.5}, distributions=fake.search, value=0.9)
        reports = {step: 0.9 for step in (4, 6, 8)} if i < known else {8: 0.9}
        tuning.study.add_trial(optuna.create_trial(**made, intermediate_values=reports))
    trial = tuning.study.ask()
    trial.report(0.1, 6)
    assert trial.should_prune() == pruned


@pytest.mark.parametrize(
    "fault", ["no reports", "no column", "no number", "no state", "cut", "nothing"]
)
def test_damaged_tables_get_one_line(fault, monkeypatch, tmp_path, fake, tuned, capsys):
    copy_results(tuned, tmp_path, until=3)
    results = tmp_path / "results" / "tune-tiny"
    table = (results / "trials.csv").read_text()
    if fault == "no reports":
        (results / "reports.csv").unlink()
    changes = {
        "no column": ("--x", "--y"),
        "no number": (",0.2,", ",a,"),
        "no state": ("te,", "d,"),
    }
    cut = {"cut": table[:-30], "nothing": ""}.get(fault, table)
    changed = cut.replace(*changes.get(fault, ("", "")))
    assert changed != table or fault == "no reports"
    (results / "trials.csv").write_text(changed)
    with pytest.raises(SystemExit) as end:
        run_here(monkeypatch, tmp_path, fake, "tiny", "--trials", "3")
    said = capsys.readouterr().err
    assert end.value.code == 2 and re.fullmatch("error: .*away to begin anew\n", said)
    assert str(results) in said and not (tmp_path / "starts.txt").exists()
    assert (results / "trials.csv").read_text() == changed


def test_tables_keep_what_trials_had(tmp_path):
    """Values of every type, each state, and reports whose score was lost."""
    space = Space(
        {"Pendulum-v1": Env(400, -1700, 0)},
        {
            "--gamma": FloatDistribution(0.8, 0.95),
            "--layers": IntDistribution(1, 3),
            "--init": CategoricalDistribution(["xavier", "torch"]),
            "--autotune": CategoricalDistribution([True, False]),
            "--dropout": CategoricalDistribution([0, 0.01, None]),
        },
        flags=EVALUATED,
    )
    code = code_hash(trials.ROOT / space.script)
    study = optuna.create_study(direction="maximize")
    state, nan = optuna.trial.TrialState, float("nan")
    outcomes = [
        (state.COMPLETE, 0.1 + 0.2, {200: 0.1, 400: 0.1 + 0.2}),
        (state.PRUNED, 1 / 3, {200: 1 / 3}),
        (state.PRUNED, None, {200: nan}),
        (state.FAIL, None, {}),
    ]
    for i, (state, value, reports) in enumerate(outcomes):
        params = {"--gamma": 0.8 + i / 70, "--layers": 1 + i % 3}
        params |= {"--init": ["xavier", "torch"][i % 2], "--autotune": i < 2}
        params |= {"--dropout": [0, 0.01, None][i % 3]}
        scores = {"Pendulum-v1 seed 1": value} if value else {}
        about = dict(versions="python 3, torch 2", scores=scores, script_hash=code)
        about |= {"note": "a, b"} if i == 1 else {}
        trial = optuna.create_trial(
            state=state,
            value=value,
            params=params,
            distributions=space.search,
            user_attrs=about,
            intermediate_values=reports,
        )
        study.add_trial(trial)
    tables.write(study, space, tmp_path)
    found = tables.read(space, tmp_path)
    for trial, before in zip(found, study.trials, strict=True):
        assert (trial.state, trial.value) == (before.state, before.value)
        assert (trial.params, trial.last_step) == (before.params, before.last_step)
        assert repr(trial.intermediate_values) == repr(before.intermediate_values)  # NaN too
        assert {k: type(v) for k, v in trial.params.items()} == {
            k: type(v) for k, v in before.params.items()
        }
        assert trial.user_attrs == before.user_attrs


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "flags, answer",
    [
        (["cartpol", "--trials", "3"], "error: no search space cartpol; there are cartpole, tiny"),
        (["--trials", "3"], "error: no search space named; there are cartpole, tiny"),
        (
            ["tiny"],
            "error: --trials must be at least 1, the number of finished trials wanted in all",
        ),
        (["tiny", "--trials", "3", "--jobs", "0"], "error: --jobs must be at least 1"),
        (["tiny", "--trials", "3", "--threads", "0"], "error: --threads must be at least 1"),
        (["tiny", "--trials", "3", "--seed", "-1"], "error: --seed must be at least 0"),
        ({"search": {"--depth": IntDistribution(1, 3)}}, "does not take --depth 1, see its --help"),
        (
            {"search": {"--x": CategoricalDistribution([0.5, "wide"])}},
            "does not take --x wide, see its --help",
        ),
        (
            {"flags": "--eval-frequency 2 --y 3"},
            "does not take --eval-frequency 2 --y 3, see its --help",
        ),
        (
            {"flags": ""},
            "error: space tiny: evaluations make the score, its flags must have --eval-frequency 1 or more",
        ),
        (
            {"script": "sac.py"},
            "error: space tiny: needs a script that exists (sac.py), an environment and a seed",
        ),
        ({"seeds": 0}, "an environment and a seed at least"),
        (
            {"envs": {"a": Env(8, 5, 5)}},
            "error: space tiny: a needs low < high, the returns that score 0 and 1",
        ),
    ],
)
def test_mistakes_get_one_line(flags, answer, monkeypatch, tmp_path, fake, capsys):
    changes, flags = (flags, ["tiny", "--trials", "3"]) if isinstance(flags, dict) else ({}, flags)
    with pytest.raises(SystemExit) as exit:
        run_here(monkeypatch, tmp_path, Space(**vars(fake) | changes), *flags)
    said = capsys.readouterr()
    assert (
        exit.value.code == 2
        and said.err.startswith("error:")
        and answer in said.err
        and said.err.count("\n") == 1
    )
    assert not said.out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["runs", "results"])
def test_where_nothing_can_be_written_one_line_says_so(name, monkeypatch, tmp_path, fake, capsys):
    (tmp_path / name).touch()  # a file, where a folder should be
    with pytest.raises(SystemExit) as end:
        run_here(monkeypatch, tmp_path, fake, "tiny", "--trials", "1")
    said = capsys.readouterr().err
    assert (
        end.value.code == 2 and re.fullmatch("error: .*\n", said) and str(tmp_path / name) in said
    )


def test_a_journal_of_something_else_is_never_continued(monkeypatch, tmp_path, fake, capsys):
    script = tmp_path / "other_script.py"
    script.write_text(FAKE)
    space = Space({"a": Env(8, -1, 9)}, fake.search, str(script), 1, fake.flags)
    run_here(monkeypatch, tmp_path, space, "tiny", "--trials", "1")
    journal = tmp_path / "runs" / "tune-tiny.journal"
    before, starts = journal.read_bytes(), (tmp_path / "starts.txt").read_bytes()
    capsys.readouterr()

    def refused(space, *words):
        with pytest.raises(SystemExit) as exit:
            run_here(monkeypatch, tmp_path, space, "tiny", "--trials", "2")
        said = capsys.readouterr()
        assert exit.value.code == 2 and said.err.startswith("error:") and said.err.count("\n") == 1
        assert all(word in said.err for word in [str(journal), *words]), said.err

    refused(
        Space(**vars(space) | {"search": {"--x": FloatDistribution(0, 2)}}),
        "search space",
        "away to begin anew",
    )
    before_code = code_hash(script)
    script.write_text(FAKE + "changed = True\n")
    code_hash.cache_clear()
    refused(space, f"another version of {script}", "away to begin anew")
    assert journal.read_bytes() == before and (tmp_path / "starts.txt").read_bytes() == starts
    for module in (trials, tables):  # as if there was a proof
        monkeypatch.setattr(module, "same_as", lambda code: {code, before_code})
    run_here(monkeypatch, tmp_path, space, "tiny", "--trials", "1")
    assert "1 complete" in capsys.readouterr().out
    journal.write_text("no journal\n" + journal.read_text())
    refused(space, "is damaged", "move it away")


def test_a_journal_that_a_full_disk_cut_short_is_continued(monkeypatch, tmp_path, fake, capsys):
    """Its last line is half. Optuna would append to it, and could not read the journal again."""
    run_here(monkeypatch, tmp_path, fake, "tiny", "--trials", "1", "--jobs", "1")
    journal = tmp_path / "runs" / "tune-tiny.journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole + whole.splitlines()[-1][:20])
    for wanted in ("1", "2"):
        run_here(monkeypatch, tmp_path, fake, "tiny", "--trials", wanted, "--jobs", "1")
    assert journal.read_bytes().startswith(whole)
    said = capsys.readouterr().out
    assert "2 complete" in said and said.count("was cut short") == 1
    journal.write_bytes(b"no journal")
    with pytest.raises(SystemExit):
        run_here(monkeypatch, tmp_path, fake, "tiny", "--trials", "3")
    assert journal.read_bytes() == b"no journal"


@pytest.mark.parametrize("flags, jobs", [([], 4), (["--threads", "2"], 2), (["--threads", "8"], 1)])
def test_trials_at_a_time_have_cores_for_their_threads(flags, jobs, monkeypatch, tmp_path, fake):
    class Opened(Exception):
        pass

    def note(name, space, args, *_):
        raise Opened(args.jobs)

    monkeypatch.setattr(tune, "cores", lambda: 4)
    monkeypatch.setattr(tune, "Tuning", note)
    with pytest.raises(Opened, match=f"^{jobs}$"):
        run_here(monkeypatch, tmp_path, fake, "tiny", "--trials", "1", *flags)


# ---------------------------------------------------------------- the built-in spaces


@pytest.mark.parametrize("name", SPACES)
def test_committed_trials_are_those_of_the_space_and_the_script_of_today(name, tmp_path):
    committed = RESULTS / f"tune-{name}"
    study = optuna.create_study(direction="maximize")
    study.add_trials(tables.read(SPACES[name], committed))
    tables.write(study, SPACES[name], tmp_path)
    for table in ("trials.csv", "reports.csv"):
        assert (tmp_path / table).read_bytes() == (committed / table).read_bytes()


@pytest.mark.parametrize("name", SPACES)
def test_the_built_in_spaces_can_be_searched(name, tmp_path):
    space = SPACES[name]
    # Its flags are the script's.
    runs = tmp_path / "runs"
    tuning = trials.Tuning(name, space, tune.Args(trials=1), runs, tmp_path / "results")
    (tmp_path / "runs" / "logs").mkdir(parents=True)
    tuning.open()
    trial, mine = tuning.claim()
    assert trial.params == {
        flag: tuning.defaults[flag[2:].replace("-", "_")] for flag in space.search
    }
    assert tuning.claim() is None  # which is the one wanted, and at work
    with pytest.raises(SystemExit, match="no trial is complete"):
        tune.report(name, tuning.study, space, tmp_path / "results")
    assert not (tmp_path / "results").exists()  # a table without rows could not be read
    assert tuning.steps == space.seeds * sum(env.steps for env in space.envs.values())


def test_switches_are_flags():
    assert trials.flags_of({"--autotune": True, "--a": False, "--b": 1}) == [
        "--autotune",
        "--no-a",
        "--b",
        "1",
    ]


def test_the_list_names_every_space_and_flag(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tune", "--list"])
    tune.main()
    said = capsys.readouterr().out
    assert all(
        word in said
        for name, space in SPACES.items()
        for word in [f"{name}:", *space.search, *space.envs]
    )
