"""Evaluation: whole episodes of environments of its own, deterministic unless asked, no trace."""

import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from helpers import Counting, is_same, journal, made_columns, register, same

pytestmark = pytest.mark.usefixtures("gymnasium_only")
once = pytest.mark.only("sac_continuous")  # it takes long, and the lines are the same in each


@pytest.fixture(autouse=True)
def clean_journal():
    journal.clear()


def new_agent(sac, env_id: str, **flags):
    torch.manual_seed(0)
    args = sac.Args(env_id=env_id, **flags)
    env = sac.make_env(args)
    return sac.SAC(env.observation_space.shape[0], env.action_space.shape[0], args), args


def test_evaluation_is_the_first_episode_of_each_environment(sac):
    returns, _ = sac.evaluate(*new_agent(sac, "Counting-mixed-v0", eval_episodes=9), step=0)
    firsts = {}
    for m in journal.made:
        instance, episode = m.episode
        if episode == 0:
            firsts[instance] = firsts.get(instance, 0) + m.reward
    assert len({m.episode for m in journal.made}) > len(firsts) == 9  # there was more to take
    np.testing.assert_array_equal(returns, [firsts[instance] for instance in sorted(firsts)])


class NanAfterwards(gym.Env):
    """The first instance has an episode of three steps, and then rewards that are no numbers."""

    observation_space = Box(-1, 1, (1,))
    action_space = Box(-1, 1, (1,))
    instances = 0

    def __init__(self):
        self.length = 3 if NanAfterwards.instances == 0 else 6
        NanAfterwards.instances += 1
        self.t = 0

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        reward = 1.0 if self.t <= self.length else math.nan
        return np.zeros(1, np.float32), reward, self.t >= self.length, False, {}


def test_what_follows_an_episode_does_not_count(sac, monkeypatch):
    agent, args = new_agent(sac, register("NanAfterwards", NanAfterwards), eval_episodes=2)
    monkeypatch.setattr(NanAfterwards, "instances", 0)
    returns, _ = sac.evaluate(agent, args, step=0)
    np.testing.assert_array_equal(returns, [3, 6])


def test_evaluation_is_deterministic_unless_asked(sac):
    agent, args = new_agent(sac, "Counting-thirty-v0", eval_episodes=1)
    sac.evaluate(agent, args, step=0)
    made = made_columns(sac)
    modes = agent.act(made.obs, torch.zeros(30, 2))
    np.testing.assert_allclose(made.action, modes, atol=1e-6)


def test_stochastic_evaluation_draws_its_actions(sac):
    agent, args = new_agent(sac, "Counting-thirty-v0", eval_episodes=1)
    sac.evaluate(agent, args, step=0, stochastic=True)
    made = made_columns(sac)
    modes = agent.act(made.obs, torch.zeros(30, 2))
    assert len(np.unique(made.action, axis=0)) == 30
    assert abs(made.action - modes).mean() > 0.2


@pytest.mark.parametrize("stochastic", [False, True])
def test_evaluation_can_be_repeated(sac, stochastic):
    agent, args = new_agent(sac, "Pendulum-v1", eval_episodes=2)
    first, _ = sac.evaluate(agent, args, step=1, stochastic=stochastic)
    again, _ = sac.evaluate(agent, args, step=1, stochastic=stochastic)
    np.testing.assert_array_equal(first, again)


def test_evaluation_of_another_step_has_other_episodes(sac):
    agent, args = new_agent(sac, "Pendulum-v1", eval_episodes=2)
    one, other = (sac.evaluate(agent, args, step=step)[0] for step in (1, 2))
    assert (one != other).all()


SEEDS = dict(num_envs=2, eval_frequency=20, checkpoint_frequency=20, eval_episodes=3)


def test_evaluations_have_seeds_of_their_own(sac, train):
    train(sac, "Counting-mixed-v0", 60, **SEEDS)
    assert len(journal.seeds) == 4 * 2 + 3 * 3
    assert len(set(journal.seeds)) == len(journal.seeds)


def test_another_seed_means_other_seeds_everywhere(sac, train):
    train(sac, "Counting-mixed-v0", 60, **SEEDS)
    before = set(journal.seeds)
    train(sac, "Counting-mixed-v0", 60, seed=2, **SEEDS)
    assert before
    assert not before & set(journal.seeds)


@pytest.mark.slow
@once
def test_endless_episodes_are_cut(sac):
    returns, _ = sac.evaluate(*new_agent(sac, "Counting-plain-actions-v0", eval_episodes=1), step=0)
    assert len(journal.made) == 10_000
    assert list(returns) == [sum(m.reward for m in journal.made)]


@pytest.mark.slow
@pytest.mark.only("sac_ablations")
def test_endless_episodes_of_held_actions_are_cut_at_the_same_step(sac):
    flags = dict(eval_episodes=1, action_repeat=4)
    sac.evaluate(*new_agent(sac, "Counting-plain-actions-v0", **flags), step=0)
    assert len(journal.made) == 10_000


TRAINING = dict(learning_starts=70, eval_episodes=2, num_envs=2)


def test_evaluation_leaves_training_alone(sac, train):
    without = train(sac, "Pendulum-v1", 100, **TRAINING)
    within = train(sac, "Pendulum-v1", 100, eval_frequency=20, **TRAINING)
    assert not without.evaluations
    assert len(within.evaluations) == 5
    same(within.stored._asdict(), without.stored._asdict())
    same(within.final, without.final)


@pytest.mark.slow
@once
def test_video_and_tracking_leave_training_alone(sac, train, monkeypatch):
    sent = []
    wandb_run = SimpleNamespace(log=lambda scalars, step: sent.extend(scalars))
    monkeypatch.setattr(sac, "start_wandb", lambda *_: wandb_run)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    watched = dict(eval_frequency=100, capture_video=True, track=True)
    without = train(sac, "Pendulum-v1", 100, **TRAINING)
    within = train(sac, "Pendulum-v1", 100, **watched, **TRAINING)
    assert sent.count("losses/alpha") > 0
    assert sent.count("eval/video") == len(list(within.folder.glob("videos/*.mp4"))) == 1
    same(within.stored._asdict(), without.stored._asdict())
    same(within.final, without.final)


def test_another_seed_trains_another_agent(sac, train):
    """What makes the test above able to fail."""
    one = train(sac, "Pendulum-v1", 100, **TRAINING)
    other = train(sac, "Pendulum-v1", 100, seed=2, **TRAINING)
    assert not np.array_equal(one.stored.obs, other.stored.obs)
    actors = [name for name in one.final if "actor." in name and "weight" in name]
    assert actors
    assert not any(is_same(one.initial[name], other.initial[name]) for name in actors)
    assert not any(is_same(one.final[name], other.final[name]) for name in actors)
    # The first actions are random, and no policy's.
    assert not np.array_equal(one.stored.action[:50], other.stored.action[:50])


def test_mean_and_spread_of_each_evaluation_are_logged(sac, train):
    seen = train(sac, "Pendulum-v1", 100, eval_frequency=20, **TRAINING)
    steps, means = seen.records["eval/episodic_return"]
    np.testing.assert_array_equal(steps, [20, 40, 60, 80, 100])
    np.testing.assert_allclose(means, [returns.mean() for returns in seen.evaluations], rtol=1e-6)
    _, spreads = seen.records["eval/episodic_return_std"]
    np.testing.assert_allclose(spreads, [returns.std() for returns in seen.evaluations], rtol=1e-5)


def test_no_evaluation_no_entry_in_the_log(sac, train):
    records = train(sac, "Pendulum-v1", 100, **TRAINING).records
    assert "losses/qf_loss" in records
    assert "eval/episodic_return" not in records


class Judged(Counting):
    """Succeeds at the end of each third environment's first episode; each fourth says nothing."""

    def step(self, action):
        *transition, info = super().step(action)
        if self.instance % 4 != 3:
            last = transition[2] or transition[3]
            info["is_success"] = bool(last and (self.instance % 3 == 0 or self.episode > 0))
        return *transition, info


JUDGED = register("Judged", Judged, lengths=(7, 2, 2, 2, 2))


def test_success_is_what_the_environment_says_at_the_end_of_the_first_episode(sac):
    _, success = sac.evaluate(*new_agent(sac, JUDGED, eval_episodes=9), step=0)
    expected = [np.nan if i % 4 == 3 else float(i % 3 == 0) for i in range(1, 10)]
    np.testing.assert_array_equal(success, expected)  # instance 0 showed its spaces


class JudgedAsInMazes(Judged):
    """Calls it success, as some environments of Gymnasium-Robotics do."""

    def step(self, action):
        *transition, info = super().step(action)
        return *transition, {"success": info["is_success"]} if info else {}


@pytest.mark.without("sac_dmc")  # which has the suite's tasks alone
def test_success_goes_by_two_names(sac):
    env_id = register("JudgedAsInMazes", JudgedAsInMazes, lengths=(7, 2, 2, 2, 2))
    _, success = sac.evaluate(*new_agent(sac, env_id, eval_episodes=9), step=0)
    expected = [np.nan if i % 4 == 3 else float(i % 3 == 0) for i in range(1, 10)]
    np.testing.assert_array_equal(success, expected)


class JudgedInArrays(Judged):
    """Says it `count` times, in an array."""

    def __init__(self, count, **kwargs):
        super().__init__(**kwargs)
        self.count = count

    def step(self, action):
        *transition, info = super().step(action)
        return *transition, {key: np.array([value] * self.count) for key, value in info.items()}


@pytest.mark.parametrize("count", [1, 2])
def test_success_may_be_an_array_of_one_number_and_of_no_more(sac, count):
    env_id = register("JudgedInArrays", JudgedInArrays, lengths=(7, 2, 2, 2, 2), count=count)
    _, success = sac.evaluate(*new_agent(sac, env_id, eval_episodes=9), step=0)
    expected = [np.nan if i % 4 == 3 else float(i % 3 == 0) for i in range(1, 10)]
    np.testing.assert_array_equal(success, expected if count == 1 else [np.nan] * 9)


def test_an_environment_that_does_not_speak_of_success_has_none(sac):
    _, success = sac.evaluate(*new_agent(sac, "Counting-mixed-v0", eval_episodes=3), step=0)
    assert np.isnan(success).all()


def test_success_is_printed_with_the_returns(sac, train, tmp_path, capsys):
    agent, args = new_agent(sac, JUDGED, eval_episodes=9, evaluate=tmp_path)
    sac.print_evaluation(agent, args, step=0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" policy ")[0] for line in lines] == ["deterministic", "stochastic"]
    # Of the environments 1 to 9, 3 and 7 say nothing, 6 and 9 succeed; of 10 to 18, 12 and 18 do.
    for line in lines:
        assert line.endswith(" over 9 episodes, success in 2 of 7")
    flags = dict(eval_frequency=100, eval_episodes=12, learning_starts=70)
    train(sac, JUDGED, 100, **flags)
    assert " (12 episodes), success in 3 of 9\n" in capsys.readouterr().out


def test_the_rate_of_success_is_logged_where_it_is_reported(sac, train):
    flags = dict(eval_frequency=50, eval_episodes=12, learning_starts=70)
    records = train(sac, JUDGED, 100, **flags).records
    # Twelve environments in a row: nine speak of success, and three of these are multiples of 3.
    np.testing.assert_allclose(records["eval/success_rate"][1], [3 / 9, 3 / 9], rtol=1e-6)
    records = train(sac, "Counting-mixed-v0", 100, **flags).records
    assert "eval/episodic_return" in records
    assert "eval/success_rate" not in records


class Endless(gym.Env):
    """Every third instance ends after three steps and succeeds; the others never end."""

    observation_space = Box(-1, 1, (1,))
    action_space = Box(-1, 1, (1,))
    instances = 0

    def __init__(self, at_each_step):
        self.at_each_step = at_each_step
        self.ends = Endless.instances % 3 == 0
        Endless.instances += 1

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        done = self.ends and self.t == 3
        at_last = self.at_each_step == "and all succeed" and self.t >= 3
        said = {"is_success": done or at_last} if done or self.at_each_step else {}
        return np.zeros(1, np.float32), 1.0, done, False, said


def test_of_episodes_that_are_all_cut_the_silent_ones_failed_if_one_succeeds(sac):
    info = {"is_success": np.array([1.0, 0.0]), "_is_success": np.array([True, False])}
    cut = np.array([True, True])
    success = sac.success_of_cut(np.full(2, np.nan), info, cut)
    np.testing.assert_array_equal(success, [1, 0])


@pytest.mark.parametrize(
    "at_each_step, expected",
    [(True, [1, 0, 0, 1]), (False, [1, 0, 0, 1]), ("and all succeed", [1, 1, 1, 1])],
)
def test_episodes_that_are_cut_count_among_the_successes(sac, at_each_step, expected, monkeypatch):
    """Left out, one success beside three episodes without end would be a rate of 1."""
    env_id = register("Endless", Endless, at_each_step=at_each_step)
    agent, args = new_agent(sac, env_id, eval_episodes=4)
    monkeypatch.setattr(Endless, "instances", 0)
    monkeypatch.setattr(sac, "steps_per_action", lambda args: 500)  # cut after 20 steps
    returns, success = sac.evaluate(agent, args, step=0)
    np.testing.assert_array_equal(success, expected)
    np.testing.assert_array_equal(returns, [3, 20, 20, 3])


def test_where_no_episode_ends_and_none_says_so_there_is_no_success(sac, monkeypatch):
    env_id = register("Endless", Endless, at_each_step=False)
    agent, args = new_agent(sac, env_id, eval_episodes=2)
    monkeypatch.setattr(Endless, "instances", 1)  # neither of the next two ends
    monkeypatch.setattr(sac, "steps_per_action", lambda args: 500)
    _, success = sac.evaluate(agent, args, step=0)
    assert np.isnan(success).all() and len(success) == 2


def test_success_is_put_in_words(sac):
    assert sac.in_words(np.array([1.0, np.nan, 0.0, 1.0])) == ", success in 2 of 3"
    assert sac.in_words(np.array([0.0])) == ", success in 0 of 1"
    assert sac.in_words(np.array([np.nan, np.nan])) == ""
