"""The benchmarks measure what they say: steps are counted, paused trainers pause, floors and ratios are right."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))
import speed  # noqa: E402


def rows(variant, threads, values, env_id="Hopper-v4"):
    return [
        speed.row("whole", env_id, variant, threads, "", turn, value, "steps/s") | speed.versions()
        for turn, value in enumerate(values)
    ]


def test_ratios_are_taken_within_each_round():
    """A machine that halves its speed in mid-run changes every speed and no ratio."""
    measured = rows("compiled", 2, [300, 150, 300]) + rows("SBX", 2, [100, 50, 100])
    assert speed.ratio(measured, "Hopper-v4", 2, "compiled", "SBX") == "3.00 (3.00 - 3.00)"
    assert speed.medians(measured, "whole")["Hopper-v4", "SBX", 2, "", "steps/s"] == (100, 50, 100)


def test_the_report_shows_each_variant_once():
    measured = []
    for place, variant in enumerate(speed.VARIANTS):
        for threads in (1, 2) if variant != "environment alone" else (1,):
            measured += rows(variant, threads, [10 * (place + 1) * threads])
    text = speed.report(measured)
    assert "| eager | 30 (30 - 30) | 60 (60 - 60) |" in text
    assert "| compiled / SBX | 0.25 (0.25 - 0.25) | 0.25 (0.25 - 0.25) |" in text
    assert "| compiled, bfloat16 / SBX | 0.50 (0.50 - 0.50) | 0.50 (0.50 - 0.50) |" in text
    assert all(text.count(f"| {variant} |") == 1 for variant in speed.VARIANTS)


def test_the_floor_counts_the_products_of_the_update():
    """Against a count by hand: forward through actor and critics, and both halves of backward where they are due."""
    obs_dim, action_dim, batch, hidden = 11, 3, 256, 256
    agent = speed.sac.SAC(obs_dim, action_dim, speed.sac.Args())
    buffer = speed.sac.ReplayBuffer(300, obs_dim, action_dim)
    buffer.rows.normal_()
    with speed.Products() as products:
        agent.update(buffer[speed.torch.arange(batch)], speed.torch.randn(2, batch, action_dim))
    counted = sum(n * 2 * b * m * k * j for (b, m, k, j), n in products.shapes.items())
    actor = obs_dim * hidden + hidden**2 + hidden * 2 * action_dim
    critics = 2 * ((obs_dim + action_dim) * hidden + hidden**2)  # their last layer is a sum, not a product
    forward = 2 * actor + 3 * critics  # next actions, actions; targets, values, values of the new actions
    weights = actor + critics  # gradients of the weights
    inputs = (actor - obs_dim * hidden) + 2 * 2 * hidden**2 + 2 * (obs_dim + action_dim) * hidden  # and of the inputs
    assert counted == 2 * batch * (forward + weights + inputs)


def test_a_trainer_counts_its_steps_and_rests_when_paused(tmp_path):
    trainer = speed.Trainer(tmp_path / "run", str(ROOT / speed.SCRIPT), "Hopper-v4", 1, ["--compile", "off"])
    try:
        assert trainer.wait_for(50) > 0
        trainer.send(speed.signal.SIGSTOP)
        time.sleep(0.2)
        before = int(trainer.count[0])
        time.sleep(0.5)
        assert trainer.count[0] == before
        assert trainer.steps_per_second(1.0) > 0
    finally:
        trainer.send(speed.signal.SIGKILL)
        trainer.process.wait()


def test_a_trainer_that_ends_is_reported(tmp_path):
    trainer = speed.Trainer(tmp_path / "run", str(ROOT / speed.SCRIPT), "Hopper-v4", 1, ["--gamma", "2"])
    with pytest.raises(SystemExit, match="--gamma must lie in"):
        trainer.wait_for(1)


@pytest.mark.parametrize("flags", ["--parts nothing", "--rounds x"])
def test_bad_flags_are_refused(flags):
    result = subprocess.run([sys.executable, ROOT / "benchmark" / "speed.py", *flags.split()], capture_output=True)
    assert result.returncode == 2
