"""What the scripts do with environments: actions, observations, episodes, seeds, every kind."""

import importlib.util
import warnings
from copy import deepcopy

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict
from helpers import BOUNDS, SPACES, Counting, journal, made_columns, register, suite_or_skip

pytestmark = pytest.mark.usefixtures("gymnasium_only")
own_make_env = pytest.mark.without("sac_dmc")  # a test of make_env itself; that of sac_dmc differs
once = pytest.mark.only("sac_continuous")  # it takes long, and the lines are the same in each


@pytest.fixture(autouse=True)
def clean_journal():
    journal.clear()


def make_env(sac, env_id):
    return sac.make_env(sac.Args(env_id=env_id))


# Episodes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint_frequency", [1000, 10])
@pytest.mark.parametrize("n_envs", [1, 3, 4])
def test_log_tells_what_finished_episodes_paid(sac, train, n_envs, checkpoint_frequency):
    flags = dict(num_envs=n_envs, checkpoint_frequency=checkpoint_frequency)
    seen = train(sac, "Counting-mixed-v0", 120, **flags)
    paid = {}
    for m in journal.made:
        paid[m.episode] = paid.get(m.episode, 0) + m.reward
    expected = []
    for step in range(n_envs, len(journal.made) + 1, n_envs):
        if last := [m for m in journal.made[step - n_envs : step] if m.done]:
            returns = np.mean([paid[m.episode] for m in last])
            lengths = np.mean([m.length for m in last])
            expected.append((step, returns, lengths))
    steps, returns, lengths = np.array(expected).T
    recorded = seen.records["charts/episodic_return"]
    np.testing.assert_allclose(recorded, [steps, returns], rtol=1e-6)
    recorded = seen.records["charts/episodic_length"]
    np.testing.assert_allclose(recorded, [steps, lengths], rtol=1e-6)
    if checkpoint_frequency == 10:
        # Episodes were cut at checkpoints, not just left over at the end.
        ended = {m.episode for m in journal.made if m.done}
        assert len(paid) > len(ended) + n_envs


@pytest.mark.parametrize("n_envs", [1, 3, 4])
class TestCheckpoints:
    @pytest.fixture
    def seen(self, sac, train, n_envs):
        return train(sac, "Counting-mixed-v0", 60, num_envs=n_envs, checkpoint_frequency=10)

    def test_start_new_environments(self, seen, n_envs):
        instances = {}
        for i, m in enumerate(journal.made):
            period = i // n_envs * n_envs // 10
            instances.setdefault(period, set()).add(m.episode[0])
        assert [len(numbers) for numbers in instances.values()] == [n_envs] * 6
        assert len(set.union(*instances.values())) == 6 * n_envs

    def test_give_them_new_seeds(self, seen, n_envs):
        # Those after the last checkpoint, which ends the run, are started as well.
        started = len(journal.seeds)
        assert started == 7 * n_envs
        assert len(set(journal.seeds)) == started

    def test_every_environment_is_closed(self, sac, train, n_envs, monkeypatch):
        closed = []
        monkeypatch.setattr(Counting, "close", lambda self: closed.append(self.instance))
        flags = dict(num_envs=n_envs, checkpoint_frequency=10, eval_frequency=20, eval_episodes=2)
        train(sac, "Counting-mixed-v0", 60, **flags)
        # The seven starts, three evaluations, and one that showed its spaces.
        assert len(journal.instances) == 7 * n_envs + 3 * 2 + 1
        assert set(closed) == {env.instance for env in journal.instances}

    def test_close_the_old_environments_before_they_start_the_new(self, sac, train, n_envs):
        """As it has to be where only one can exist; without evaluations, as the how-to says."""

        class Lone(Counting):
            opened = 0

            def __init__(self):
                super().__init__()
                Lone.opened += 1
                assert Lone.opened <= n_envs

            def close(self):
                Lone.opened -= 1

        train(sac, register("Lone", Lone), 60, num_envs=n_envs, checkpoint_frequency=10)
        assert len(journal.instances) == 7 * n_envs + 1
        assert Lone.opened == 0

    def test_leave_no_row_that_crosses_the_cut(self, sac, seen):
        expected = made_columns(sac)
        np.testing.assert_array_equal(seen.stored.obs, expected.obs)
        np.testing.assert_array_equal(seen.stored.next_obs, expected.next_obs)


@own_make_env
@pytest.mark.parametrize("video", [True, False])
def test_where_egl_is_missing_the_line_says_how_to_install_it(sac, video):
    """As PyOpenGL puts it where there is no such library."""
    error = "argument 1: AttributeError: 'NoneType' object has no attribute 'glGetError'"
    args = sac.Args(capture_video=video)
    assert ("apt install libegl1" in sac.remedy(args, TypeError(error))) == video
    assert not sac.remedy(args, TypeError("no screen here"))


@own_make_env
@pytest.mark.parametrize("env_id", ["finger-turn_easy", "dm_control/finger-turn_easy-v0"])
def test_tasks_of_the_suite_are_told_their_names(sac, env_id):
    args = sac.Args(env_id=env_id)
    told = "shimmy:dm_control/finger-turn_easy-v0, or sac_dmc.py --env-id finger-turn_easy."
    assert told in sac.remedy(args, gym.error.NamespaceNotFound("Namespace dm_control not found."))


@own_make_env
@pytest.mark.parametrize("env_id", ["my-v0", "HalfCheeta-v4", "Ant-v5", "a_package:my_env-v1"])
def test_other_tasks_are_not_taken_for_those_of_the_suite(sac, env_id):
    args = sac.Args(env_id=env_id)
    assert not sac.remedy(args, gym.error.NameNotFound("There is no such environment."))


# Actions ------------------------------------------------------------------------------------------


@own_make_env
@pytest.mark.parametrize("name", BOUNDS)
class TestActions:
    @pytest.fixture
    def sent_and_got(self, sac, name):
        """Actions in [-1, 1], the first three at its ends and middle, and what they became."""
        env = make_env(sac, f"Counting-{name}-actions-v0")
        size = BOUNDS[name].low.size
        assert env.action_space == Box(-1, 1, (size,), np.float32)
        random = np.random.default_rng(0)
        almost = [np.nextafter(np.float32(end), np.float32(0)) for end in (-1, 1)]
        sent = [np.full((3, size), [[-1], [0], [1]])]
        sent += [random.choice([-1, 1, 0, *almost], (500, size))]
        sent += [random.uniform(-1, 1, (2000, size))]
        sent = np.concatenate(sent).astype(np.float32)
        env.reset(seed=0)
        for action in sent:
            env.step(action)  # where Counting asks the inner space whether it contains the action
        got = np.array([m.action for m in journal.made])
        assert got.shape == (len(sent), *BOUNDS[name].shape)
        return sent, got

    def test_cover_the_bounds(self, name, sent_and_got):
        box = BOUNDS[name]
        _, got = sent_and_got
        np.testing.assert_allclose(got[0], box.low, rtol=2e-7)
        np.testing.assert_allclose(got[1], (box.low + box.high) / 2, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(got[2], box.high, rtol=2e-7)

    def test_never_leave_the_bounds(self, name, sent_and_got):
        box = BOUNDS[name]
        _, got = sent_and_got
        assert (box.low <= got).all()
        assert (got <= box.high).all()

    def test_are_scaled_linearly(self, name, sent_and_got):
        box = BOUNDS[name]
        sent, got = sent_and_got
        span = box.high.astype(float) - box.low
        linear = box.low + (sent.reshape(got.shape).astype(float) + 1) / 2 * span
        assert (abs(got - linear) <= 2e-7 * np.maximum(span, 1)).all()

    def test_leave_the_inner_space_as_it_was(self, sac, name):
        before = deepcopy(BOUNDS[name])
        assert make_env(sac, f"Counting-{name}-actions-v0").unwrapped.action_space == before


class Narrow(gym.Env):
    """Takes actions of one space and of no other."""

    observation_space = Box(-1, 1, (1,))

    def __init__(self, low, high, dtype):
        self.action_space = Box(np.array([low], dtype), np.array([high], dtype), dtype=dtype)

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        return np.zeros(1, np.float32), 0.0, False, False, {}


@own_make_env
def test_actions_have_the_type_that_the_environment_takes(sac):
    env = make_env(sac, register("Half", Narrow, low=-2, high=3, dtype=np.float16))
    env.reset(seed=0)
    for action in np.linspace(-1, 1, 101, dtype=np.float32):
        env.step(action[None])


@own_make_env
@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("dtype, bound", [(np.float32, 3e38), (np.float64, 1e308)])
def test_bounds_too_wide_to_scale_are_refused(sac, dtype, bound, capsys):
    env_id = register("Bottomless", Narrow, low=-bound, high=bound, dtype=dtype)
    with pytest.raises(SystemExit, match="2"):
        make_env(sac, env_id)
    assert "finite bounds" in capsys.readouterr().err


class Unflat(Counting):
    """Its observations are of a space that cannot be flattened."""

    def __init__(self, space):
        super().__init__()
        self.observation_space = space


class OwnSpace(gym.Space):
    """A space that Gymnasium does not know."""


@own_make_env
@pytest.mark.parametrize("space", [OwnSpace(), Dict()], ids=["own", "empty"])
def test_observations_that_cannot_be_flattened_are_refused(sac, space, capsys):
    env_id = register("Unflat", Unflat, space=space)
    with pytest.raises(SystemExit, match="2"):
        make_env(sac, env_id)
    said = capsys.readouterr().err
    assert said.startswith(f"error: --env-id {env_id}: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("n_envs", [1, 4])
def test_warm_up_actions_are_uniform_between_the_bounds(sac, train, n_envs):
    train(sac, "Counting-plain-actions-v0", 2004, num_envs=n_envs, learning_starts=2000)
    box = BOUNDS["plain"]
    actions = np.array([m.action for m in journal.made[:2000]])
    share = (actions - box.low) / (box.high - box.low)
    for dimension in share.T:
        counts = np.histogram(dimension, bins=10, range=(0, 1))[0]
        assert counts.sum() == 2000
        assert ((counts - 200) ** 2 / 200).sum() < 9 + 4 * np.sqrt(2 * 9)
    # They depend neither on each other nor on those before.
    pairs = [(share[:, 0], share[:, 1])]
    pairs += [(share[i:, 0], share[:-i, 0]) for i in (1, 4)]
    for one, other in pairs:
        assert abs(np.corrcoef(one, other)[0, 1]) < 4 / np.sqrt(2000)


@pytest.mark.parametrize("n_envs, learning_starts", [(1, 30), (3, 30), (3, 31)])
def test_policy_acts_from_learning_starts_on(sac, train, monkeypatch, n_envs, learning_starts):
    acted = []
    act = sac.SAC.act

    def spy(*args):
        action = act(*args)
        acted.append((len(journal.made), action))
        return action

    monkeypatch.setattr(sac.SAC, "act", spy)
    flags = dict(num_envs=n_envs, learning_starts=learning_starts)
    seen = train(sac, "Counting-plain-actions-v0", 60, **flags)
    steps, actions = zip(*acted)
    assert list(steps) == [step for step in range(0, 60, n_envs) if step >= learning_starts]
    np.testing.assert_array_equal(seen.stored.action[steps[0] :], np.concatenate(actions))


# Observations and environments of every kind ------------------------------------------------------


@own_make_env
@pytest.mark.parametrize(
    "view, size", [("line", 3), ("double", 3), ("grid", 3), ("dict", 7), ("reused", 3)]
)
class TestObservations:
    def test_are_flat(self, sac, view, size):
        env = make_env(sac, f"Counting-{view}-v0")
        obs, _ = env.reset(seed=0)
        next_obs = env.step(np.zeros(2, np.float32))[0]
        assert env.observation_space.shape == obs.shape == (size,)
        np.testing.assert_array_equal(np.float32(next_obs), journal.made[0].next_obs)

    def test_leave_the_spaces_as_they_were(self, sac, view, size):
        spaces = deepcopy(SPACES)
        env = make_env(sac, f"Counting-{view}-v0")
        env.reset(seed=0)
        assert env.unwrapped.observation_space is SPACES[view]
        assert SPACES == spaces


class Plainest(Counting):
    """Takes no render_mode, as an environment without pictures need not."""

    def __init__(self):
        super().__init__()


@own_make_env
def test_environments_need_not_know_of_pictures(sac):
    make_env(sac, register("Plainest", Plainest)).reset(seed=0)


@own_make_env
@pytest.mark.parametrize("num_envs, frequency", [(1, 200), (2, 400)])
def test_checkpoints_that_cut_episodes_are_warned_of(sac, capsys, num_envs, frequency):
    env = make_env(sac, "Pendulum-v1")
    for apart, warned in ((frequency - 1, True), (frequency, False)):
        flags = dict(env_id="Pendulum-v1", checkpoint_frequency=apart, num_envs=num_envs)
        sac.check_episodes(sac.Args(**flags), env)
        said = "cuts episodes of up to 200 steps after 199: raise it"
        assert (said in capsys.readouterr().err) == warned


class Unpaid(Counting):
    """Its rewards are no single numbers."""

    def __init__(self, reward):
        super().__init__()
        self.reward = reward

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, self.reward, *rest


@own_make_env
@pytest.mark.parametrize(
    "reward, error, said",
    [
        (np.zeros(2), ValueError, r"a reward of one number, not of shape \(2,\)"),
        ([], ValueError, r"a reward of one number, not of shape \(0,\)"),
        (None, TypeError, "NoneType"),
    ],
)
def test_a_reward_that_is_no_number_is_an_error_at_once(sac, reward, error, said):
    env = make_env(sac, register("Unpaid", Unpaid, reward=reward))
    env.reset(seed=1)
    with pytest.raises(error, match=said):
        env.step(env.action_space.sample())


class Silent(Counting):
    """Returns None in place of `info`, as some environments do against Gymnasium's rules."""

    def step(self, action):
        *transition, _ = super().step(action)
        return *transition, None


@own_make_env
def test_info_may_be_missing(sac):
    env = make_env(sac, register("Silent", Silent))
    env.reset(seed=1)
    assert env.step(env.action_space.sample())[-1] == {}


class Talkative(Counting):
    """Rewards are arrays (1,), and `info` differs in shape and type from instance to instance."""

    def info(self) -> dict:
        nested = {"a": 1} if self.instance % 2 else 3
        return dict(contacts=np.zeros(self.instance), hit=nested, is_success="no" * self.instance)

    def reset(self, **kwargs):
        obs, _ = super().reset(**kwargs)
        return obs, self.info()

    def step(self, action):
        obs, reward, *ends, _ = super().step(action)
        return obs, np.array([reward]), *ends, self.info()


def test_rewards_and_infos_may_have_any_shape(sac, train):
    env_id = register("Talkative", Talkative)
    seen = train(sac, env_id, 60, num_envs=3, eval_frequency=30, eval_episodes=4)
    assert [returns.shape for returns in seen.evaluations] == [(4,)] * 2
    assert "eval/success_rate" not in seen.records
    trained = range(1, 4)  # the first instance showed its spaces
    paid = [m.reward for m in journal.made if m.episode[0] in trained]
    assert len(paid) == 60
    np.testing.assert_array_equal(seen.stored.reward, paid)


class Broken(Counting):
    """Its simulator is gone after ten steps, or cannot be reset."""

    def __init__(self, **kwargs):
        self.reset_fails = kwargs.pop("reset_fails", False)
        self.left = 10
        super().__init__(**kwargs)

    def reset(self, **kwargs):
        if self.reset_fails:
            raise ConnectionResetError("no simulator")
        return super().reset(**kwargs)

    def step(self, action):
        self.left -= 1
        if self.left < 0:
            raise BrokenPipeError("simulator gone")
        return super().step(action)


@own_make_env
def test_an_environments_broken_pipe_does_not_end_in_silence(sac, train):
    env_id = register("Broken", Broken)
    with pytest.raises(RuntimeError, match="the environment failed: BrokenPipeError.*gone"):
        train(sac, env_id, 60)


@own_make_env
def test_an_environment_without_its_simulator_is_no_full_disk(sac, train):
    env_id = register("Broken", Broken, reset_fails=True)
    with pytest.raises(RuntimeError, match="the environment failed: ConnectionResetError.*no sim"):
        train(sac, env_id, 60)


def timed(env_id):
    """An environment that gym.make() made, wrapped; the wrapper has asked for its spec."""
    return lambda: gym.wrappers.TimeAwareObservation(gym.make(env_id))


@own_make_env
def test_a_wrapped_environment_is_not_taken_for_the_one_inside(sac, train, capsys):
    env_id = register("Timed", timed("Pendulum-v1"))
    env = make_env(sac, env_id)
    assert env.spec.id == "Pendulum-v1" and env.observation_space.shape == (4,)
    seen = train(sac, env_id, 60)
    assert seen.buffer.widths[0] == 4
    assert seen.folder.name.startswith("Toy-Timed-v0__")
    assert "newest version" not in capsys.readouterr().out


box2d = pytest.mark.skipif(not importlib.util.find_spec("Box2D"), reason="needs Box2D")
CARTPOLE = "shimmy:dm_control/cartpole-swingup-v0"
KINDS = ["Pendulum-v1", "MountainCarContinuous-v0", "Hopper-v4", "Hopper-v5"]
KINDS += [CARTPOLE]
KINDS += [pytest.param("LunarLanderContinuous-v3", marks=box2d)]
KINDS += [pytest.param("BipedalWalker-v3", marks=box2d)]


@once
@pytest.mark.parametrize("env_id", KINDS)
def test_trains_on(sac, train, env_id):
    if env_id == CARTPOLE:
        suite_or_skip()
    seen = train(sac, env_id, 60, learning_starts=30, batch_size=32)
    assert len(seen.updates) == 30
    assert seen.buffer.count == 60
    assert all(np.isfinite(column).all() for column in seen.stored)
    assert all(value.isfinite().all() for value in seen.final.values())
    unchanged = [name for name, value in seen.final.items() if value.equal(seen.initial[name])]
    assert not unchanged


@own_make_env
@pytest.mark.parametrize("env_id", ["Hopper-v4", "Ant-v4"])
def test_v4_is_no_reason_to_warn(sac, env_id):
    with pytest.warns(match="out of date"):
        gym.make(env_id)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_env(sac, env_id).reset(seed=0)
        warnings.warn("another")
    assert [str(warning.message) for warning in caught] == ["another"]


@own_make_env
class TestDmControl:
    @pytest.fixture(autouse=True)
    def suite(self):
        suite_or_skip()

    def episode(self, sac, seed, steps):
        """First observation and those of the steps, and the ends."""
        env = make_env(sac, CARTPOLE)
        observations = [env.reset(seed=seed)[0]]
        ends = []
        actions = np.random.default_rng(0).uniform(-1, 1, (steps, 1))
        for action in actions.astype(np.float32):
            obs, _, terminated, truncated, _ = env.step(action)
            observations.append(obs)
            ends.append((terminated, truncated))
        return np.array(observations), ends

    def test_ends_by_truncation(self, sac):
        _, ends = self.episode(sac, seed=5, steps=1000)
        assert ends == [(False, False)] * 999 + [(False, True)]

    def test_follows_its_seed(self, sac):
        first, _ = self.episode(sac, seed=5, steps=20)
        again, _ = self.episode(sac, seed=5, steps=20)
        other, _ = self.episode(sac, seed=6, steps=20)
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()
