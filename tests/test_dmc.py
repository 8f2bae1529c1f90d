"""sac_dmc.py: every task of the suite, its names and mistakes, action repeat, video. (Exact resume: test_resume.py.)"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ.setdefault("MUJOCO_GL", "egl")  # as main() does, before dm_control looks
pytest.importorskip("dm_control")
from dm_control import suite  # noqa: E402

import sac_dmc as sac  # noqa: E402

SCRIPT = Path(sac.__file__)
TASKS = [f"{domain}-{task}" for domain, task in suite.ALL_TASKS]
SMALL = "--total-timesteps 300 --learning-starts 120 --batch-size 16 --checkpoint-frequency 60 --log-frequency 20 "
SMALL += "--eval-frequency 0 --threads 1"


def make(env_id, **flags):
    return sac.make_env(sac.Args(env_id=env_id, **flags))


def execute(folder, flags):
    return subprocess.run([sys.executable, SCRIPT, *flags.split()], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_runs_and_re_seeds_identically(task):
    actions = np.random.default_rng(0).uniform(-1, 1, (5, *make(task).action_space.shape)).astype(np.float32)

    def trajectory(env, seed):
        obs, _ = env.reset(seed=seed)
        steps = [env.step(action) for action in actions]
        assert obs.ndim == 1 and all(reward <= 1 and (reward >= 0 or "lqr" in task) for _, reward, *_ in steps)
        return np.concatenate([obs, *(obs for obs, *_ in steps), [reward for _, reward, *_ in steps]])

    env = make(task)
    first, other, again, elsewhere = *(trajectory(env, seed) for seed in (3, 4, 3)), trajectory(make(task), 3)
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, elsewhere)
    assert not np.array_equal(first, other)


def test_an_episode_of_1000_steps_is_truncated_not_terminated():
    env = make("cartpole-swingup")
    env.reset(seed=0)
    ends = [env.step(np.zeros(1, np.float32))[2:4] for _ in range(1000)]
    assert ends == [(False, False)] * 999 + [(False, True)]


def test_lqr_whose_actions_have_no_limits_is_acted_on_within_one():
    bare = suite.load("lqr", "lqr_2_1", task_kwargs={"random": 1})
    bare.reset()
    env = make("lqr-lqr_2_1")
    env.reset(seed=1)
    for action in (-1.0, 1.0, 0.25):
        expected = bare.step([action])
        obs, reward, *_ = env.step(np.full(1, action, np.float32))
        np.testing.assert_array_equal(obs, np.concatenate([*expected.observation.values()]))
        assert reward == expected.reward


def test_action_repeat_sums_rewards_and_counts_simulator_steps():
    once, thrice = make("cartpole-balance"), make("cartpole-balance", action_repeat=3)
    action = np.full(1, 0.3, np.float32)
    np.testing.assert_array_equal(once.reset(seed=1)[0], thrice.reset(seed=1)[0])
    singles = [once.step(action) for _ in range(3)]
    obs, reward, *_ = thrice.step(action)
    np.testing.assert_array_equal(obs, singles[-1][0])
    assert reward == sum(reward for _, reward, *_ in singles)


def test_action_repeat_stops_where_the_episode_ends():
    once, often = make("cartpole-balance"), make("cartpole-balance", action_repeat=300)
    action = np.full(1, 0.3, np.float32)
    once.reset(seed=1), often.reset(seed=1)
    singles = [once.step(action) for _ in range(1000)]
    for start in (0, 300, 600, 900):  # the last of these has 100 steps to go
        obs, reward, *ends = often.step(action)[:4]
        np.testing.assert_array_equal(obs, singles[start : start + 300][-1][0])
        assert reward == sum(reward for _, reward, *_ in singles[start : start + 300])
        assert ends == [False, start == 900]


def test_counts_with_action_repeat_are_simulator_steps(tmp_path):
    flags = f"{SMALL} --total-timesteps 2400 --checkpoint-frequency 9999"  # no episode is cut
    result = execute(tmp_path, f"--env-id cartpole-balance --action-repeat 4 {flags}")
    assert result.returncode == 0, result.stderr
    (run,) = tmp_path.glob("runs/*")
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    assert sac.read_records(run)["charts/episodic_length"].tolist() == [[1000, 2000], [1000, 1000]]
    assert state["step"] == 2400 and len(state["rows"]) == 600
    assert state["agent"]["critic_optimizer.steps"] == (2400 - 120) / 4  # one update per action


@pytest.mark.parametrize(
    "name", ["cartpole-swingup", "dm_control/cartpole-swingup-v0", "shimmy:dm_control/cartpole-swingup-v0"]
)
def test_names_of_a_task(name):
    assert make(name).observation_space.shape == (5,)


@pytest.mark.parametrize(
    "flags, answer",
    [
        ("--env-id cartpole-swingop", "cartpole-swingup"),
        ("--env-id walker", "walker-"),
        ("--env-id Hopper-v4", "hopper-"),
        ("--action-repeat 0", "--action-repeat"),
    ],
)
def test_mistakes_get_one_line(flags, answer, tmp_path):
    result = execute(tmp_path, flags)
    assert result.returncode == 2 and answer in result.stderr and not (tmp_path / "runs").exists()
    assert len([line for line in result.stderr.splitlines() if "GLFW" not in line and "warn" not in line]) == 1


def test_list_of_tasks(tmp_path):
    result = execute(tmp_path, "--list-tasks")
    assert result.returncode == 0 and result.stdout.split() == TASKS


def test_without_dm_control_one_line_says_how_to_install_it(tmp_path):
    (tmp_path / "dm_control.py").write_text("raise ModuleNotFoundError(\"No module named 'dm_control'\")")
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    result = subprocess.run([sys.executable, SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "pip install shimmy dm-control" in result.stderr and "Python 3.13 on" in result.stderr
    recipe = re.search("pip install --no-deps (.*) && pip install (.*)", result.stderr)
    readme = (SCRIPT.parent / "README.md").read_text()
    assert recipe[1] in readme and all(package in readme for package in recipe[2].split())


def test_video_without_a_screen(tmp_path):
    flags = "--env-id ball_in_cup-catch --total-timesteps 60 --learning-starts 40 --batch-size 8 --eval-frequency 60"
    result = execute(tmp_path, f"{flags} --eval-episodes 1 --threads 1 --capture-video --action-repeat 10")
    assert result.returncode == 0, result.stderr
    (video,) = tmp_path.glob("runs/*/videos/*.mp4")
    assert video.stat().st_size > 1000
