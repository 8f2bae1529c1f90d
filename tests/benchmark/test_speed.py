"""The benchmarks measure what they say: steps are counted, paused trainers pause, floors and ratios are right."""

import os
import runpy
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from benchmark import speed, speed_gpu, speed_parts
from tests.benchmark.helpers import ROOT


def rows(variant, threads, values, env_id="Hopper-v4"):
    about = dict(commit="abc", versions="torch 2.13.0", hardware="a processor")
    return [
        speed.row("whole", env_id, variant, threads, "", turn, value, "steps/s") | about
        for turn, value in enumerate(values)
    ]


def test_ratios_are_taken_within_each_round():
    """A machine that halves its speed in mid-run changes every speed and no ratio."""
    measured = rows("compiled", 2, [300, 150, 300]) + rows("SBX", 2, [100, 50, 100])
    measured = pd.DataFrame(measured + rows("SBX", 1, [7, 8, 9]))
    assert speed.ratio(measured, 2, "compiled", "SBX") == "3.00 (3.00 - 3.00)"
    assert speed.spread(measured[measured.variant == "compiled"].value) == "300 (150 - 300)"


def test_the_report_shows_each_variant_once():
    measured = []
    for place, variant in enumerate(speed.VARIANTS):
        for threads in (1, 2) if variant != "environment alone" else (1,):
            measured += rows(variant, threads, [10 * (place + 1) * threads])
    elsewhere = speed.row("memory", "Hopper-v4", "replay buffer", 0, "", 0, 12.345, "MiB")
    elsewhere |= measured[0] | elsewhere | dict(hardware="another one")
    text = speed.report(pd.DataFrame([*measured, elsewhere]))
    assert "a processor; another one." in text and "whole: abc, memory: abc" in text
    assert "| Hopper-v4: replay buffer |  |  | 12.3 (12.3 - 12.3) MiB |" in text
    assert "| eager | 30 (30 - 30) | 60 (60 - 60) |" in text
    assert "| compiled / SBX | 0.25 (0.25 - 0.25) | 0.25 (0.25 - 0.25) |" in text
    assert "| compiled, bfloat16 / SBX | 0.50 (0.50 - 0.50) | 0.50 (0.50 - 0.50) |" in text
    assert all(text.count(f"| {variant} |") == 1 for variant in speed.VARIANTS)


def test_the_report_compares_with_scripts_beside():
    measured = rows("environment alone", 1, [9000, 9000])
    for threads in (1, 2):
        measured += rows("compiled", threads, [300, 200])
        measured += rows("compiled, bfloat16", threads, [400, 400])
        measured += rows("CleanRL", threads, [100, 100])
    text = speed.report(pd.DataFrame(measured))
    assert "| CleanRL | 100 (100 - 100) | 100 (100 - 100) |" in text
    assert "| compiled / CleanRL | 2.50 (2.00 - 3.00) | 2.50 (2.00 - 3.00) |" in text
    assert "/ environment alone" not in text


def test_the_figure_shows_each_environment_with_what_was_measured_there(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(speed.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    measured = []
    for env_id, other in (("Hopper-v4", "CleanRL"), ("Humanoid-v4", "LeanRL")):
        for threads in (1, 2):
            measured += rows("compiled", threads, [300], env_id) + rows(other, threads, [9], env_id)
        measured += rows("environment alone", 1, [9000], env_id)
    speed.draw(pd.DataFrame(measured))
    shown = [[label.get_text() for label in axes.get_xticklabels()] for axes in figures[0].axes]
    ours = "this script,\ncompiled"
    assert shown == [[ours, "CleanRL"], [ours, "LeanRL"]]


def test_scripts_beside_are_found_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "python").symlink_to(sys.executable)  # as in a virtual environment
    (tmp_path / "sac.py").touch()
    monkeypatch.chdir(tmp_path)
    found = speed.scripts_beside(speed.Args(beside=("LeanRL=python sac.py --compile",)))
    assert found == {"LeanRL": [f"{tmp_path}/python", f"{tmp_path}/sac.py", "--compile"]}


def test_a_speed_is_that_of_all_trainers_in_their_turn(monkeypatch):
    sent = []
    clock = SimpleNamespace(now=0.0)
    asked = []
    about = dict(send=sent.append, fail_if_ended=lambda: asked.append(clock.now))
    trainers = [SimpleNamespace(count=[made], **about) for made in (1000, 5000)]

    def sleep(seconds):
        clock.now += seconds
        for trainer, steps_per_second in zip(trainers, (30, 70)):
            trainer.count[0] += int(steps_per_second * seconds)

    watch = SimpleNamespace(sleep=sleep, perf_counter=lambda: clock.now)
    monkeypatch.setattr(speed, "time", watch)
    assert speed.steps_per_second(trainers, 2.0) == 100
    assert sent == [speed.signal.SIGCONT] * 2 + [speed.signal.SIGSTOP] * 2
    assert asked == [3.0] * 2  # that one has died is seen when it was measured


@pytest.mark.parametrize("text", ["python", "=python python", "A=python", "A=python nothing.py"])
def test_scripts_beside_that_cannot_be_run_are_refused(text, tmp_path, monkeypatch, capsys):
    (tmp_path / "python").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        speed.scripts_beside(speed.Args(beside=(text,)))
    assert end.value.code == 2
    assert f"--beside {text}: must be NAME=PYTHON SCRIPT" in capsys.readouterr().err


def test_a_name_that_is_measured_already_is_refused(tmp_path, capsys):
    (tmp_path / "x").touch()
    command = f"{tmp_path}/x {tmp_path}/x"
    for beside in ([f"SBX={command}"], [f"A={command}", f"A={command}"]):
        with pytest.raises(SystemExit):
            speed.scripts_beside(speed.Args(beside=tuple(beside)))
        assert "is measured already" in capsys.readouterr().err


@pytest.mark.parametrize("module", [speed, speed_gpu])
@pytest.mark.parametrize("flags", [["--rounds", "0"], ["--seconds", "0"]])
def test_turns_without_length_are_refused(module, flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["speed.py", *flags])
    with pytest.raises(SystemExit) as end:
        module.main()
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.startswith(f"error: {flags[0]} 0") and said.count("\n") == 1


def test_a_measurement_replaces_the_rows_of_its_environments_alone(tmp_path, monkeypatch):
    """And where no whole run was measured there is no figure."""

    def memory(env_id, value):
        return speed.row("memory", env_id, "replay buffer", 0, "", 0, value, "MiB")

    monkeypatch.setattr(speed, "RESULTS", tmp_path)
    about = dict(commit="0123456", versions="", hardware="")  # a commit that looks like a number
    monkeypatch.setattr(speed, "versions", lambda args: about)
    for measured in ([memory("A", 1.0), memory("B", 2.0)], [memory("B", 3.0)]):
        monkeypatch.setattr(speed, "memory", lambda args, rows=measured: rows)
        monkeypatch.setattr(sys, "argv", ["speed.py", "--parts", "memory"])
        speed.main()
    kept = pd.read_csv(tmp_path / "speed.csv", dtype=str)
    assert list(zip(kept.env_id, kept.value)) == [("A", "1"), ("B", "3")]
    assert list(kept.commit) == ["0123456"] * 2
    assert not (tmp_path / "speed.png").exists()


def test_the_floor_counts_the_products_of_the_update():
    """Against a count by hand: forward through actor and critics, and both halves of backward where they are due."""
    obs_dim, action_dim, batch, hidden = 11, 3, 256, 256
    agent = speed_parts.sac.SAC(obs_dim, action_dim, speed_parts.sac.Args())
    buffer = speed_parts.sac.ReplayBuffer(300, obs_dim, action_dim)
    buffer.rows.normal_()
    with speed_parts.Products() as products:
        agent.update(buffer[torch.arange(batch)], torch.randn(2, batch, action_dim))
    counted = sum(n * 2 * b * m * k * j for (b, m, k, j), n in products.shapes.items())
    actor = obs_dim * hidden + hidden**2 + hidden * 2 * action_dim
    # The critics' last layer is a sum, not a product.
    critics = 2 * ((obs_dim + action_dim) * hidden + hidden**2)
    # Next actions and actions; targets, values, and values of the new actions.
    forward = 2 * actor + 3 * critics
    # Gradients of the weights, and of the inputs.
    weights = actor + critics
    inputs = (actor - obs_dim * hidden) + 2 * 2 * hidden**2 + 2 * (obs_dim + action_dim) * hidden
    assert counted == 2 * batch * (forward + weights + inputs)


@pytest.mark.slow
def test_a_trainer_counts_its_steps_and_rests_when_paused(tmp_path):
    trainer = speed.Trainer(
        tmp_path / "run", str(ROOT / speed.SCRIPT), "Hopper-v4", 1, ["--compile", "off"]
    )
    try:
        assert trainer.wait_for(50) > 0
        trainer.send(speed.signal.SIGSTOP)
        time.sleep(0.2)
        before = int(trainer.count[0])
        time.sleep(0.5)
        assert trainer.count[0] == before
        assert speed.steps_per_second([trainer], 1.0) > 0
    finally:
        trainer.send(speed.signal.SIGKILL)
        trainer.process.wait()


THEIRS = """
import sys
import gymnasium as gym
env = gym.make("Hopper-v4")
env.reset(seed=1)
print(sys.argv[1:], flush=True)
for _ in range(50):
    env.step(env.action_space.sample())
sys.exit("trained")
"""


@pytest.mark.slow
def test_a_script_beside_gets_the_flags_of_cleanrl_and_is_counted(tmp_path):
    script = tmp_path / "theirs.py"
    script.write_text(THEIRS)
    words = [str(script), "--compile"]
    trainer = speed.Trainer(tmp_path / "run", sys.executable, "Hopper-v4", 1, words)
    with pytest.raises(SystemExit, match="trained"):
        trainer.wait_for(100)
    assert trainer.count[0] == 50
    with pytest.raises(SystemExit, match="trained"):
        speed.steps_per_second([trainer], 0.1)
    flags = ["--env-id", "Hopper-v4", *speed.FLAGS, "--compile"]
    assert str(flags) in trainer.log.read_text()


@pytest.mark.slow
def test_a_trainer_that_ends_is_reported(tmp_path):
    trainer = speed.Trainer(
        tmp_path / "run", str(ROOT / speed.SCRIPT), "Hopper-v4", 1, ["--gamma", "2"]
    )
    with pytest.raises(SystemExit, match="--gamma 2.0: must be between"):
        trainer.wait_for(1)


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--parts nothing", "--rounds x"])
def test_bad_flags_are_refused(flags):
    result = subprocess.run(
        [sys.executable, ROOT / "benchmark" / "speed.py", *flags.split()], capture_output=True
    )
    assert result.returncode == 2


def test_a_buffer_on_the_host_gives_the_batches_of_the_script(tmp_path, monkeypatch):
    """With the CPU in place of the GPU: rows are drawn, moved as one tensor, and split there."""
    moved = {
        line: other.replace('"cuda"', '"cpu"') for line, other in speed_gpu.ON_THE_HOST.items()
    }
    monkeypatch.setattr(speed_gpu, "ON_THE_HOST", moved)
    path = speed_gpu.script_with_its_buffer_on_the_host(tmp_path)
    sac = SimpleNamespace(**runpy.run_path(str(path)))
    buffer = sac.ReplayBuffer(10, obs_dim=2, action_dim=1)
    columns = [np.arange(4 * width).reshape(4, width) for width in (2, 1)]
    rewards = np.arange(4)
    buffer.add(*columns, rewards, 0 * rewards, 100 + columns[0])

    rows = buffer.sample_index(50, torch.Generator())
    batch = buffer[rows]

    assert rows.shape == (50, 7) and set(batch.reward.tolist()) == {0, 1, 2, 3}
    assert torch.equal(batch.obs[:, 0], 2 * batch.reward)
    assert torch.equal(batch.next_obs, 100 + batch.obs)


def test_the_report_on_gpus_has_medians_and_ranges():
    speeds = [("GPU, eager", 1, 100.0), ("GPU, eager", 1, 300.0), ("GPU, eager", 1, 120.0)]
    speeds += [("CPU, compiled", 8, 800.0)]
    rows = [dict(variant=v, runs=n, round=0, value=value) for v, n, value in speeds]
    text = speed_gpu.report(pd.DataFrame(rows), "a machine")
    assert "a machine" in text
    assert "| GPU, eager | 1 | 120 (100 - 300) |" in text
    assert "| CPU, compiled | 8 | 800 (800 - 800) |" in text


@pytest.mark.slow
def test_runs_at_a_time_are_counted_together(tmp_path, monkeypatch):
    """One run and two, on the CPU, each on a core of its own, which this process gives back."""
    monkeypatch.setattr(speed_gpu, "WARM", 50)
    eager = (speed.SCRIPT, ["--compile", "off"], (1, 2))
    monkeypatch.setattr(speed_gpu, "VARIANTS", {"CPU": eager})
    before = os.sched_getaffinity(0)
    rows = speed_gpu.measure(speed_gpu.Args(rounds=1))
    assert [(row["variant"], row["runs"]) for row in rows] == [("CPU", 1), ("CPU", 2)]
    assert all(row["value"] > 0 for row in rows)
    assert os.sched_getaffinity(0) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_there_is_nothing_to_measure(monkeypatch, capsys):
    monkeypatch.setattr(speed_gpu, "measure", lambda args: pytest.fail("measured"))
    monkeypatch.setattr(sys, "argv", ["speed_gpu.py"])
    with pytest.raises(SystemExit) as stopped:
        speed_gpu.main()
    assert stopped.value.code == 2
    assert "error: PyTorch sees no GPU" in capsys.readouterr().err
