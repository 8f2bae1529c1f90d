"""benchmark.peers: other libraries are evaluated as the scripts are, and their runs are read like the scripts'."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sac_continuous as sac
from benchmark import peers
from benchmark.runs import Records, read, runs_of
from benchmark.studies import STUDIES, Study
from tests.benchmark.helpers import ROOT


def test_an_evaluation_is_that_of_the_scripts():
    """A policy of zeros has the same return in each episode: the same environments, from the same seeds."""
    model = SimpleNamespace(
        predict=lambda obs, deterministic: (np.zeros((len(obs), 1), np.float32), None)
    )
    agent = SimpleNamespace(
        act=lambda obs, noise: np.zeros((len(obs), 1), np.float32), device=torch.device("cpu")
    )
    args = dict(env_id="Pendulum-v1", seed=3, eval_episodes=4)
    theirs = peers.evaluate(model, peers.Args(**args), step=500)
    ours, _ = sac.evaluate(agent, sac.Args(**args), 500)
    assert theirs.tolist() == ours.tolist() and len(set(theirs)) == 4


def test_a_watcher_records_when_the_scripts_do(monkeypatch):
    base = SimpleNamespace(BaseCallback=type("BaseCallback", (), {}))
    monkeypatch.setitem(sys.modules, "stable_baselines3.common.callbacks", base)
    monkeypatch.setattr(peers, "evaluate", lambda model, args, step: np.array([step, step + 2.0]))
    said = []
    writer = SimpleNamespace(add_scalar=lambda *point: said.append(point), flush=lambda: None)
    args = peers.Args(total_timesteps=250, eval_frequency=100, log_frequency=50)
    watcher = peers.watcher(args, writer)
    watcher.model = SimpleNamespace(logger=SimpleNamespace(name_to_value={"train/ent_coef": 0.5}))
    watcher._on_training_start()
    for step in range(1, 251):
        watcher.num_timesteps = step
        watcher.locals = dict(infos=[{"episode": dict(r=-3.0, l=200)} if step == 200 else {}])
        assert watcher._on_step() == (step < 250)

    def points(key):
        return [(step, value) for name, value, step in said if name == key]

    assert [step for step, _ in points("charts/SPS")] == [50, 100, 150, 200, 250]
    assert points("losses/alpha") == [(step, 0.5) for step in (50, 100, 150, 200, 250)]
    assert points("eval/episodic_return") == [(100, 101), (200, 201), (250, 251)]
    assert points("eval/episodic_return_std") == [(100, 1), (200, 1), (250, 1)]
    assert points("charts/episodic_return") == [(200, -3.0)]


def test_the_study_of_peers_gives_all_of_them_the_same_task():
    grid = [run for run in runs_of("peers", STUDIES["peers"]) if run.seed == 1]
    ours, *theirs, control = grid
    assert (ours.script, control.script) == ("sac_continuous.py", "sac_ablations.py")
    assert [run.script for run in theirs] == ["benchmark/peers.py"] * 2
    assert "--no-cuda" in ours.flags and "--no-cuda" in control.flags  # peers.py has no GPU either
    assert len({run.key for run in grid}) == 4
    assert len({(run.env_id, run.steps) for run in grid}) == 1


def test_without_their_packages_one_line_names_the_requirements(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "ROOT", tmp_path)
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "benchmark" / "requirements-peers.txt").touch()
    monkeypatch.setattr(subprocess, "run", lambda command: SimpleNamespace(returncode=1))
    with pytest.raises(SystemExit) as stop:
        peers.python_of_peers()
    assert stop.value.code == 2 and "requirements-peers.txt" in capsys.readouterr().err


def test_other_requirements_make_the_environment_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "ROOT", tmp_path)
    made = []
    monkeypatch.setattr(
        subprocess, "run", lambda command: made.append(command) or SimpleNamespace(returncode=0)
    )
    (tmp_path / ".venv-peers").mkdir()
    (tmp_path / "benchmark").mkdir()
    requirements = tmp_path / "benchmark" / "requirements-peers.txt"
    commands = []
    for text in ("sbx-rl==1", "sbx-rl==1", "sbx-rl==2"):
        requirements.write_text(text)
        python = peers.python_of_peers()
        commands.append(len(made))
    # A virtual environment, then pip: not again as long as the requirements are the same.
    assert commands == [2, 2, 4] and made[-1][-1] == requirements
    assert python == str(tmp_path / ".venv-peers" / "bin" / "python")


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".venv-peers" / "complete").exists(), reason="needs .venv-peers")
@pytest.mark.parametrize("library", ["stable-baselines3", "sbx"])
def test_a_run_of_a_peer_is_read_like_one_of_ours(library, tmp_path):
    flags = "--eval-frequency 150 --eval-episodes 2 --log-frequency 50"
    study = Study(
        {"Pendulum-v1": 450},
        {"peer": f"benchmark/peers.py --library {library}"},
        seeds=1,
        flags=flags,
    )
    (run,) = runs_of("x", study)
    done = subprocess.run(
        run.command(tmp_path / "runs"), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and sys.executable in done.args, done.stderr
    assert run.finished(tmp_path / "runs")
    scalars = Records(run.folder(tmp_path / "runs")).read()
    wanted = {
        "charts/SPS",
        "charts/episodic_return",
        "charts/episodic_length",
        "eval/episodic_return_std",
    }
    assert wanted <= scalars.keys() and scalars["charts/episodic_length"][0] == (200, 200)
    found = read(run, tmp_path / "runs")
    assert [row["step"] for row in found.returns] == [150, 300, 450]
    assert found.about["state"] == "finished" and "stable-baselines3 2" in found.about["versions"]
    assert (
        found.about["command"].startswith("python benchmark/peers.py") and found.about["hours"] > 0
    )
