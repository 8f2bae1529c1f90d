"""sac_dmc.py: every task of the suite, its names and mistakes, action repeat, video.

Exact resume is tested in test_resume.py.
"""

import math
import re
import sys

import helpers
import numpy as np
import pytest
from helpers import load, only_run, suite_or_skip
from moviepy import VideoFileClip

import sac_dmc

slow = pytest.mark.slow
suite = suite_or_skip()
TASKS = [f"{domain}-{task}" for domain, task in suite.ALL_TASKS]
# In the fast tier: one task of each kind of trouble.
FAST = {"cartpole-swingup", "lqr-lqr_2_1", "point_mass-hard"}
MARKED = [task if task in FAST else pytest.param(task, marks=slow) for task in TASKS]
SMALL = "--total-timesteps 300 --learning-starts 120 --batch-size 16 --checkpoint-frequency 60 "
SMALL += "--log-frequency 20 --eval-frequency 0 --threads 1"


def make(env_id, **flags):
    return sac_dmc.make_env(sac_dmc.Args(env_id=env_id, **flags))


def trajectory(env, seed) -> tuple[np.ndarray, np.ndarray]:
    """Observations and rewards of five steps of always the same actions."""
    shape = (5, *env.action_space.shape)
    actions = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    observations = [env.reset(seed=seed)[0]]
    rewards = []
    for action in actions:
        obs, reward, *_ = env.step(action)
        observations.append(obs)
        rewards.append(reward)
    return np.array(observations), np.array(rewards)


@pytest.mark.parametrize("task", MARKED)
class TestEveryTask:
    def test_has_finite_observations_and_rewards_up_to_one_by_its_seed(self, task):
        env = make(task)
        first, other, again = (trajectory(env, seed) for seed in (3, 4, 3))
        observations, rewards = first
        assert observations.ndim == 2
        assert np.isfinite(observations).all()
        assert (rewards <= 1).all()
        assert (rewards >= 0).all() or "lqr" in task
        elsewhere = trajectory(make(task), seed=3)
        helpers.same(again, first)
        helpers.same(elsewhere, first)
        assert not np.array_equal(first[0], other[0])


def test_an_episode_of_1000_steps_is_truncated_not_terminated():
    env = make("cartpole-swingup")
    env.reset(seed=0)
    ends = [env.step(np.zeros(1, np.float32))[2:4] for _ in range(1000)]
    assert ends == [(False, False)] * 999 + [(False, True)]


@pytest.mark.parametrize("action", [-1.0, 1.0, 0.25])
def test_lqr_whose_actions_have_no_limits_is_acted_on_within_one(action):
    bare = suite.load("lqr", "lqr_2_1", task_kwargs={"random": 1})
    bare.reset()
    env = make("lqr-lqr_2_1")
    env.reset(seed=1)
    expected = bare.step([action])
    obs, reward, *_ = env.step(np.full(1, action, np.float32))
    np.testing.assert_array_equal(obs, np.concatenate([*expected.observation.values()]))
    assert reward == expected.reward


def single_steps(number: int) -> list[tuple]:
    """What each of so many steps of cartpole-balance gives, always with the action 0.3."""
    env = make("cartpole-balance")
    env.reset(seed=1)
    return [env.step(np.full(1, 0.3, np.float32)) for _ in range(number)]


def test_action_repeat_sums_rewards_and_shows_the_last_observation():
    env = make("cartpole-balance", action_repeat=3)
    env.reset(seed=1)
    obs, reward, *_ = env.step(np.full(1, 0.3, np.float32))
    singles = single_steps(3)
    np.testing.assert_array_equal(obs, singles[-1][0])
    assert reward == sum(reward for _, reward, *_ in singles)


def test_action_repeat_stops_where_the_episode_ends():
    env = make("cartpole-balance", action_repeat=300)
    env.reset(seed=1)
    singles = single_steps(1000)
    for start in (0, 300, 600, 900):  # the last of these has 100 steps to go
        obs, reward, *ends = env.step(np.full(1, 0.3, np.float32))[:4]
        part = singles[start : start + 300]
        np.testing.assert_array_equal(obs, part[-1][0])
        assert reward == sum(reward for _, reward, *_ in part)
        assert ends == [False, start == 900]


@slow
def test_counts_with_action_repeat_are_environment_steps(tmp_path):
    flags = f"{SMALL} --total-timesteps 2400 --checkpoint-frequency 9999"  # no episode is cut
    # The action that passes step 121 has begun before it: no update yet.
    flags += " --env-id cartpole-balance --action-repeat 4 --learning-starts 121"
    ended = helpers.run(tmp_path, sac_dmc, flags)
    assert ended.code == 0, ended.err
    folder = only_run(tmp_path)
    state = load(folder / "checkpoint.pt")
    lengths = sac_dmc.read_records(folder)["charts/episodic_length"]
    assert lengths.tolist() == [[1000, 2000], [1000, 1000]]
    assert state["step"] == 2400
    assert len(state["rows"]) == 600
    assert state["agent"]["critic_optimizer.steps"] == (2400 - 124) / 4  # one update per action


@pytest.mark.parametrize(
    "name, repeat, frames_per_second", [("walker-walk", 1, 40), ("cartpole-balance", 4, 25)]
)
def test_videos_are_as_fast_as_the_simulated_time(name, repeat, frames_per_second):
    env = make(name, action_repeat=repeat)
    assert env.metadata["render_fps"] == pytest.approx(frames_per_second)
    env.reset(seed=1)  # which builds the task anew
    assert env.metadata["render_fps"] == pytest.approx(frames_per_second)


@pytest.mark.parametrize("name, cut", [("walker-walk", True), ("lqr-lqr_2_1", False)])
def test_checkpoints_that_come_before_an_episode_can_end_are_warned_of(name, cut, capsys):
    env = make(name)
    assert env.unwrapped._env._step_limit == pytest.approx(1000 if cut else math.inf)
    flags = dict(env_id=name, checkpoint_frequency=999, action_repeat=3)
    sac_dmc.check_episodes(sac_dmc.Args(**flags), env)
    said = capsys.readouterr().err
    assert said.startswith("warning: --checkpoint-frequency 999 cuts episodes") == cut
    sac_dmc.check_episodes(sac_dmc.Args(**flags | dict(checkpoint_frequency=1000)), env)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        "cartpole-swingup",
        "dm_control/cartpole-swingup-v0",
        "shimmy:dm_control/cartpole-swingup-v0",
    ],
)
class TestNames:
    def test_make_the_task(self, name):
        assert make(name).observation_space.shape == (5,)

    def test_become_that_of_the_list(self, name):
        assert sac_dmc.full_name(sac_dmc.Args(env_id=name)) == "cartpole-swingup"


@pytest.mark.parametrize(
    "flags, answer",
    [
        ("--env-id cartpole-swingop", "cartpole-swingup"),
        ("--env-id walker", "walker-"),
        ("--env-id Hopper-v4", "hopper-"),
        ("--action-repeat 0", "--action-repeat"),
        ("--action-repeat 1001", "--action-repeat"),
    ],
)
def test_mistakes_get_one_line(flags, answer, tmp_path):
    ended = helpers.run_forked(tmp_path, sac_dmc, flags)
    assert ended.code == 2
    assert re.fullmatch("error: .*\n", ended.err), ended.err
    assert answer in ended.err
    assert not (tmp_path / "runs").exists()


def test_list_of_tasks(tmp_path):
    ended = helpers.run_forked(tmp_path, sac_dmc, "--list-tasks")
    assert ended.code == 0
    assert ended.out.split() == TASKS


@slow
def test_without_a_screen_there_is_no_warning(tmp_path):
    ended = helpers.run(tmp_path, sac_dmc, "--list-tasks", MUJOCO_GL=None, DISPLAY=None)
    assert ended.code == 0
    assert ended.err == ""


@slow
def test_without_dm_control_one_line_says_how_to_install_it(tmp_path):
    missing = "raise ModuleNotFoundError(\"No module named 'dm_control'\")"
    (tmp_path / "dm_control.py").write_text(missing)
    ended = helpers.run(tmp_path, sac_dmc, PYTHONPATH=str(tmp_path), MUJOCO_GL=None)
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert "pip install shimmy dm-control" in ended.err
    assert "Python 3.13 on" in ended.err


@pytest.mark.parametrize(
    "error",
    [
        "ctypes.ArgumentError(\"argument 1: AttributeError: no attribute 'glGetError'\")",
        "ImportError('Cannot initialize a headless EGL display.')",
        "RuntimeError('invalid value for environment variable MUJOCO_GL')",
    ],
)
def test_where_opengl_fails_one_line_says_what_it_needs(error, monkeypatch, tmp_path, capsys):
    package = tmp_path / "dm_control"
    package.mkdir()
    (package / "__init__.py").write_text(f"import ctypes\nraise {error}\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "dm_control"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("MUJOCO_GL", "egl")
    with pytest.raises(SystemExit) as ended:
        sac_dmc.suite_tasks()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith("error: MUJOCO_GL=egl: ") and said.count("\n") == 1
    assert "apt install libegl1" in said and "pip install" not in said


def test_the_way_around_labmaze_is_that_of_the_documentation():
    recipe = re.search('all_but_labmaze = "(.*)"', (helpers.ROOT / "sac_dmc.py").read_text())[1]
    pages = [helpers.ROOT / "README.md", *helpers.ROOT.glob("docs/*.md")]
    text = "\n".join(page.read_text() for page in pages)
    assert "pip install --no-deps dm-control==1.0.44" in text
    assert len(recipe.split()) > 5
    assert all(package in text for package in recipe.split())


@slow
def test_video_without_a_screen(tmp_path):
    flags = "--env-id ball_in_cup-catch --total-timesteps 60 --learning-starts 40 --batch-size 8 "
    flags += "--eval-frequency 60 --eval-episodes 1 --threads 1 --capture-video --action-repeat 10"
    ended = helpers.run(tmp_path, sac_dmc, flags)
    assert ended.code == 0, ended.err
    (video,) = tmp_path.glob("runs/*/videos/*.mp4")
    with VideoFileClip(str(video)) as clip:
        assert clip.duration == pytest.approx(20, abs=0.5)  # 1,000 steps of 0.02 s
