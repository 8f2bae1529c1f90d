"""What the scripts do with environments: replay, actions, observations, logging and evaluation.

Most tests train through the real main() on Counting, an environment whose observations say where they come from and
which writes down every transition it made. What replay, updates and log hold is then compared with what happened.
"""

import importlib.util
import signal
import sys
import tempfile
import warnings
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from matplotlib.figure import Figure

import sac_continuous
import sac_continuous as sac  # for annotations; the tests have each script in its place

SCRIPTS = ["sac_continuous", "sac_dmc", "sac_ablations"]
own_make_env = pytest.mark.without("sac_dmc")  # a test of make_env itself
once = pytest.mark.only("sac_continuous")  # it takes long, and the lines are the same in each

torch.set_num_threads(1)


def make_env(env_id):
    return sac.make_env(sac.Args(env_id=env_id))


class Made(NamedTuple):
    """A transition as the environment itself saw it; observations already flat, the action within the bounds."""

    obs: np.ndarray
    action: np.ndarray
    reward: float
    terminated: bool
    truncated: bool
    next_obs: np.ndarray
    episode: tuple[int, int]  # the instance, and the number of its episode
    length: int  # of the episode, this step included


INSTANCES, MADE, SEEDS = [], [], []  # of Counting: its instances, their transitions, and the seeds they were given

LENGTHS = (4, 1, 7, 1, 1, 3)  # of one episode after the other
ENDINGS = {  # and their (terminated, truncated); mixed: 5 against 6 lengths, so that each meets each
    "terminated": [(True, False)],
    "truncated": [(False, True)],
    "both": [(True, True)],
    "mixed": [(True, False), (False, True), (True, True), (False, True), (True, False)],
}
LINE = Box(-np.inf, np.inf, (3,), np.float32)
SPACES = {
    "line": LINE,
    "double": Box(-np.inf, np.inf, (3,), np.float64),
    "grid": Box(-np.inf, np.inf, (3, 1), np.float64),
    "dict": Dict(place=LINE, phase=Discrete(4)),
    "reused": LINE,  # one array, written over at every step and reset, as environments in C do
}
BOUNDS = {
    "plain": Box(np.float32([0, -np.pi / 4]), np.float32([5, np.pi / 4])),
    "rounding": Box(np.float32([-0.1, -0.7, 0.3]), np.float32([0.7, 0.1, 1e3])),  # low + (high - low) exceeds high
    "double": Box(np.array([-0.1, -0.7]), np.array([0.7, 0.1]), dtype=np.float64),
    "matrix": Box(np.float32([[0, 1, 2], [3, 4, 5]]), np.float32([[1, 3, 5], [7, 9, 11]])),
}


class Counting(gym.Env):
    """Observes its own number, its episode's and its step's, in thirds, which float32 and float64 round differently."""

    def __init__(self, endings="mixed", lengths=LENGTHS, view="line", bounds="plain", render_mode=None):
        self.instance, self.episode, self.t = len(INSTANCES), -1, 0
        INSTANCES.append(self)
        self.endings, self.lengths, self.view, self.memory = ENDINGS[endings], lengths, view, np.zeros(3, np.float32)
        self.observation_space, self.action_space = SPACES[view], BOUNDS[bounds]

    def observe(self):
        """The observation, and the float32 vector that is to be stored of it."""
        state = np.array([self.instance, self.episode, self.t]) / 3
        self.memory[:] = state
        flat, phase = np.float32(state), self.t % 4
        if self.view == "dict":
            return {"place": flat, "phase": phase}, np.append(flat, np.eye(4, dtype=np.float32)[phase])
        return {"line": flat.copy(), "double": state, "grid": state[:, None], "reused": self.memory}[self.view], flat

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        SEEDS.extend([] if seed is None else [seed])
        self.episode, self.t = self.episode + 1, 0
        obs, self.flat = self.observe()
        return obs, {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        before, turn, reward = self.flat, self.instance + self.episode, len(MADE) + 0.5  # a number for each transition
        self.t += 1
        obs, self.flat = self.observe()
        done = self.t == self.lengths[turn % len(self.lengths)]
        ends = [done and ending for ending in self.endings[turn % len(self.endings)]]
        MADE.append(Made(before, action.copy(), reward, *ends, self.flat, (self.instance, self.episode), self.t))
        return obs, reward, *ends, {}


class Plainest(Counting):
    """Takes no render_mode, as an environment without pictures need not."""

    def __init__(self):
        super().__init__()


VARIANTS = {name: dict(endings=name) for name in ENDINGS} | {name: dict(view=name) for name in SPACES}
VARIANTS |= {f"{name}-actions": dict(bounds=name, lengths=(10**9,)) for name in BOUNDS}
VARIANTS |= {"thirty": dict(lengths=(30,))}
for variant, kwargs in VARIANTS.items():
    gym.register(f"Counting-{variant}-v0", entry_point=Counting, kwargs=kwargs)
gym.register("Plainest-v0", entry_point=Plainest)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    forget()
    if sac.__name__ == "sac_dmc":  # its make_env knows the suite alone; here the loop is tested, around the parent's
        monkeypatch.setattr(sac, "make_env", sac_continuous.make_env)


def forget():
    INSTANCES.clear(), MADE.clear(), SEEDS.clear()


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Function that trains with main() in an empty folder, at the given flags, and tells what it saw there."""

    def run(env_id: str, total_timesteps: int, **flags) -> SimpleNamespace:
        forget()
        flags = dict(learning_starts=total_timesteps - 1, eval_frequency=0, threads=1, batch_size=4) | flags
        flags |= dict(env_id=env_id, total_timesteps=total_timesteps)
        seen, update, evaluate = SimpleNamespace(updates=[], evaluations=[]), sac.SAC.update, sac.evaluate

        class Buffer(sac.ReplayBuffer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                seen.buffer = self

        def spy_update(agent, batch, noise, *weight):
            if not seen.updates:
                seen.initial = deepcopy(agent.state_dict())
            seen.updates.append(SimpleNamespace(made=len(MADE), batch=batch, noise=noise.clone()))
            return update(agent, batch, noise, *weight)

        def spy_evaluate(*args, **kwargs):
            seen.evaluations.append(evaluate(*args, **kwargs))
            return seen.evaluations[-1]

        argv = ["sac", "--no-cuda", *(f"--{key.replace('_', '-')}={value}" for key, value in flags.items())]
        with monkeypatch.context() as patch:
            patch.chdir(tempfile.mkdtemp(dir=tmp_path))
            patch.setattr(sys, "argv", argv)
            patch.setattr(sac, "ReplayBuffer", Buffer)
            patch.setattr(sac.SAC, "update", spy_update)
            patch.setattr(sac, "evaluate", spy_evaluate)
            patch.setattr(Figure, "savefig", lambda *args, **kwargs: None)  # it takes longer than the training
            patch.setattr(signal, "signal", lambda *args: None)  # Ctrl-C remains pytest's
            sac.main()
            (folder,) = (Path.cwd() / "runs").iterdir()
        seen.final = torch.load(folder / "model.pt", weights_only=True)["agent"]
        seen.rows, seen.records = oldest_first(seen.buffer), sac.read_records(folder)
        return seen

    return run


def oldest_first(buffer: sac.ReplayBuffer) -> np.ndarray:
    return buffer.rows[torch.arange(buffer.count - len(buffer), buffer.count) % len(buffer.rows)].numpy()


def made_rows(bounds: Box = BOUNDS["plain"]) -> np.ndarray:
    """The rows that replay should hold, had it endless room."""

    def row(m: Made):
        action = 2 * (m.action.astype(float) - bounds.low) / (bounds.high.astype(float) - bounds.low) - 1
        return np.concatenate([m.obs, action.ravel(), [m.reward, m.terminated], m.next_obs])

    return np.array([row(m) for m in MADE])


def same(rows, expected):
    """Equal; the allowance is for actions, which went to the bounds and back."""
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-6)


# Replay


@pytest.mark.parametrize("n_envs", [1, 4])
@pytest.mark.parametrize("variant", [*ENDINGS, *SPACES])
def test_replay_holds_every_transition_once_in_order(train, variant, n_envs):
    seen = train(f"Counting-{variant}-v0", 102, num_envs=n_envs)
    assert seen.buffer.count == len(seen.rows) == len(MADE) == -(-102 // n_envs) * n_envs
    same(seen.rows, made_rows())
    width = len(MADE[0].obs)  # said again without the environment's list: no row crosses an episode
    now, then = seen.rows[:, :3], seen.rows[:, -width:][:, :3]
    np.testing.assert_allclose(then - now, np.tile([0, 0, 1 / 3], (len(now), 1)), atol=1e-5)


def test_only_termination_is_stored_as_such(train):
    for variant, ended in {"terminated": True, "both": True, "truncated": False}.items():
        seen = train(f"Counting-{variant}-v0", 60)
        done = [m.terminated or m.truncated for m in MADE]
        assert sum(done) > 10
        np.testing.assert_array_equal(seen.rows[:, 6], np.float32(done) * ended)


@pytest.mark.parametrize("capacity, n_envs", [(50, 1), (53, 1), (50, 3), (52, 4), (53, 4), (5, 4), (4, 4)])
def test_a_full_ring_holds_the_newest_and_only_they(train, capacity, n_envs):
    seen = train("Counting-mixed-v0", 120, num_envs=n_envs, buffer_size=capacity)
    assert seen.rows.shape == (capacity, 3 + 2 + 1 + 1 + 3)
    same(seen.rows, made_rows()[-capacity:])


@pytest.mark.parametrize("n_envs, capacity", [(1, 1000), (4, 1000), (3, 20)])
def test_updates_get_fresh_batches_of_what_happened_and_fresh_noise(train, n_envs, capacity):
    flags = dict(num_envs=n_envs, buffer_size=capacity, learning_starts=12, batch_size=16)
    updates, rows = train("Counting-mixed-v0", 60, **flags).updates, made_rows()
    for u in updates:
        columns = [column if column.ndim == 2 else column[:, None] for column in u.batch]
        drawn = u.batch.reward.long().numpy()
        assert max(0, u.made - capacity) <= drawn.min() and drawn.max() < u.made
        same(torch.cat(columns, dim=1).numpy(), rows[drawn])
    assert len({u.batch.reward.numpy().tobytes() for u in updates}) == len(updates)
    noise = torch.cat([u.noise for u in updates])
    assert noise.shape == (2 * len(updates), 16, 2)
    assert len({half.numpy().tobytes() for half in noise}) == len(noise)
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1


@pytest.mark.parametrize("chunk", [1, 3, 5])
def test_ring_by_itself(chunk):
    buffer, added = sac.ReplayBuffer(5, obs_dim=2, action_dim=1), np.zeros((0, 7))
    for start in range(0, 8 * chunk, chunk):
        new = np.arange(start, start + chunk)[:, None] + np.arange(7) / 10
        buffer.add(new[:, :2], new[:, 2:3], new[:, 3], new[:, 4], new[:, 5:])
        added = np.concatenate([added, new])
        assert (buffer.count, len(buffer)) == (len(added), min(5, len(added)))
        np.testing.assert_array_equal(oldest_first(buffer), np.float32(added[-5:]))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int64, np.uint8])
def test_rows_are_float32_whatever_comes_in(dtype):
    buffer = sac.ReplayBuffer(10, obs_dim=2, action_dim=1)
    numbers = np.random.default_rng(0).uniform(0, 99, (2, 6)).astype(dtype)
    obs, action, reward, next_obs = np.split(numbers, [2, 3, 4], axis=1)
    buffer.add(obs, action, reward[:, 0], np.array([True, False]), next_obs)
    batch = buffer[buffer.sample(6, torch.Generator().manual_seed(0))]
    assert {column.dtype for column in (buffer.rows, *batch)} == {torch.float32}
    expected = np.hstack([obs, action, reward, [[1], [0]], next_obs]).astype(np.float32)
    np.testing.assert_array_equal(buffer.rows[:2].numpy(), expected)


@pytest.mark.parametrize("added", [1, 25, 40, 41, 70])
def test_samples_are_uniform_over_the_filled_rows(added):
    buffer = sac.ReplayBuffer(40, obs_dim=2, action_dim=3)
    buffer.rows.fill_(torch.nan)  # so that an unfilled row shows
    shapes, scales = [(1, 2), (1, 3), (1,), (1,), (1, 2)], [1 / 3, -1, 1, 2, 1 / 7]
    for i in range(added):
        buffer.add(*(np.full(shape, scale * i) for shape, scale in zip(shapes, scales)))
    batch = buffer[buffer.sample(400 * len(buffer), torch.Generator().manual_seed(0))]
    for column, shape, scale in zip(batch, shapes, scales):  # what was stored together is drawn together
        assert column.shape == (400 * len(buffer), *shape[1:])
        numbers = column.numpy().T / scale
        np.testing.assert_allclose(numbers, np.broadcast_to(batch.reward, numbers.shape), rtol=1e-6)
    values, counts = np.unique(batch.reward, return_counts=True)
    np.testing.assert_array_equal(values, np.arange(added)[-40:])
    freedom = len(values) - 1
    assert abs(((counts - 400) ** 2 / 400).sum() - freedom) <= 4 * np.sqrt(2 * freedom)  # chi-square, four sigmas


def test_samples_follow_their_generator_alone():
    buffer = sac.ReplayBuffer(1000, obs_dim=1, action_dim=1)
    column = np.arange(1000.0)
    buffer.add(column[:, None], column[:, None], column, column, column[:, None])
    generator, again = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    first, second = (buffer[buffer.sample(50, generator)].reward for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(7)  # the global generator plays no part
    assert torch.equal(first, buffer[buffer.sample(50, again)].reward)


# Counts and logs


@pytest.mark.parametrize("checkpoint_frequency", [1000, 7])
@pytest.mark.parametrize("n_envs, learning_starts", [(1, 1), (1, 30), (3, 30), (3, 31), (4, 4), (4, 30)])
def test_one_update_per_step_after_learning_starts(train, n_envs, learning_starts, checkpoint_frequency):
    flags = dict(learning_starts=learning_starts, checkpoint_frequency=checkpoint_frequency)
    seen = train("Counting-mixed-v0", 50, num_envs=n_envs, **flags)
    steps = range(0, len(MADE), n_envs)  # updates come before the environments' step, and learn from what was stored
    moments = [step for step in steps for _ in range(max(0, min(n_envs, step + n_envs - learning_starts)))]
    assert 50 <= len(MADE) < 50 + n_envs
    assert [u.made for u in seen.updates] == moments and len(moments) == len(MADE) - learning_starts


@pytest.mark.parametrize("checkpoint_frequency", [1000, 10])
@pytest.mark.parametrize("n_envs", [1, 3, 4])
def test_log_tells_what_finished_episodes_paid(train, n_envs, checkpoint_frequency):
    seen = train("Counting-mixed-v0", 120, num_envs=n_envs, checkpoint_frequency=checkpoint_frequency)
    paid, ended, expected = {}, {m.episode for m in MADE if m.terminated or m.truncated}, []
    for m in MADE:
        paid[m.episode] = paid.get(m.episode, 0) + m.reward
    for step in range(n_envs, len(MADE) + 1, n_envs):
        if last := [m for m in MADE[step - n_envs : step] if m.terminated or m.truncated]:
            expected.append((step, np.mean([paid[m.episode] for m in last]), np.mean([m.length for m in last])))
    steps, returns, lengths = np.array(expected).T
    np.testing.assert_allclose(seen.records["charts/episodic_return"], [steps, returns], rtol=1e-6)
    np.testing.assert_allclose(seen.records["charts/episodic_length"], [steps, lengths], rtol=1e-6)
    if checkpoint_frequency == 10:
        assert len(paid) > len(ended) + n_envs  # episodes were cut, not just left over at the end


@pytest.mark.parametrize("n_envs", [1, 3, 4])
def test_checkpoints_start_new_environments_with_new_seeds(train, n_envs):
    seen = train("Counting-mixed-v0", 60, num_envs=n_envs, checkpoint_frequency=10)
    periods = {}
    for i, m in enumerate(MADE):
        periods.setdefault(i // n_envs * n_envs // 10, set()).add(m.episode[0])
    assert [len(instances) for instances in periods.values()] == [n_envs] * 6
    assert len(set.union(*periods.values())) == len(set(SEEDS)) == len(SEEDS) == 6 * n_envs
    same(seen.rows, made_rows())  # and no row crosses the cut


# Actions


@own_make_env
@pytest.mark.parametrize("name", BOUNDS)
def test_actions_cover_the_bounds_and_never_leave_them(name):
    env, box = make_env(f"Counting-{name}-actions-v0"), deepcopy(BOUNDS[name])
    size, random = box.low.size, np.random.default_rng(0)
    assert env.action_space == Box(-1, 1, (size,), np.float32)
    env.reset(seed=0)
    almost = [np.nextafter(np.float32(1), np.float32(0)), np.nextafter(np.float32(-1), np.float32(0))]
    actions = [np.full((3, size), [[-1], [0], [1]]), random.choice([-1, 1, 0, *almost], (500, size))]
    actions = np.concatenate([*actions, random.uniform(-1, 1, (2000, size))]).astype(np.float32)
    for action in actions:
        env.step(action)  # where Counting asks the inner space whether it contains the action
    got = np.array([m.action for m in MADE])
    assert got.shape == (len(actions), *box.shape)
    np.testing.assert_allclose(got[0], box.low, rtol=2e-7)
    np.testing.assert_allclose(got[2], box.high, rtol=2e-7)
    np.testing.assert_allclose(got[1], (box.low + box.high) / 2, rtol=1e-6, atol=1e-6)
    span = box.high.astype(float) - box.low
    linear = box.low + (actions.reshape(got.shape).astype(float) + 1) / 2 * span
    assert (abs(got - linear) <= 2e-7 * np.maximum(span, 1)).all()
    assert (box.low <= got).all() and (got <= box.high).all()
    assert env.unwrapped.action_space == box  # as it was


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
def test_actions_have_the_type_that_the_environment_takes():
    gym.register("Half-v0", entry_point=Narrow, kwargs=dict(low=-2, high=3, dtype=np.float16))
    env = make_env("Half-v0")
    env.reset(seed=0)
    for action in np.linspace(-1, 1, 101, dtype=np.float32):
        env.step(action[None])


@own_make_env
@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("dtype, bound", [(np.float32, 3e38), (np.float64, 1e308)])
def test_bounds_too_wide_to_scale_are_refused(dtype, bound, capsys):
    gym.register("Wide-v0", entry_point=Narrow, kwargs=dict(low=-bound, high=bound, dtype=dtype))
    with pytest.raises(SystemExit, match="2"):
        make_env("Wide-v0")
    assert "finite bounds" in capsys.readouterr().err


@pytest.mark.parametrize("name", BOUNDS)
def test_replay_stores_actions_before_rescaling(train, name):
    seen = train(f"Counting-{name}-actions-v0", 60, num_envs=4, learning_starts=20)
    actions = seen.rows[:, 3 : 3 + BOUNDS[name].low.size]
    assert (abs(actions) <= 1).all() and (actions.min(0) < -0.3).all() and (actions.max(0) > 0.3).all()
    same(seen.rows, made_rows(BOUNDS[name]))


@pytest.mark.parametrize("n_envs", [1, 4])
def test_warm_up_actions_are_uniform_between_the_bounds(train, n_envs):
    train("Counting-plain-actions-v0", 2004, num_envs=n_envs, learning_starts=2000)
    box = BOUNDS["plain"]
    share = (np.array([m.action for m in MADE[:2000]]) - box.low) / (box.high - box.low)
    for dimension in share.T:
        counts = np.histogram(dimension, bins=10, range=(0, 1))[0]
        assert counts.sum() == 2000 and ((counts - 200) ** 2 / 200).sum() < 9 + 4 * np.sqrt(2 * 9)
    pairs = [(share[:, 0], share[:, 1])] + [(share[i:, 0], share[:-i, 0]) for i in (1, 4)]
    assert all(abs(np.corrcoef(*pair)[0, 1]) < 4 / np.sqrt(2000) for pair in pairs)  # of nothing else


@pytest.mark.parametrize("n_envs, learning_starts", [(1, 30), (3, 30), (3, 31)])
def test_policy_acts_from_learning_starts_on(train, monkeypatch, n_envs, learning_starts):
    acted, act = [], sac.SAC.act
    monkeypatch.setattr(sac.SAC, "act", lambda *args: acted.append((len(MADE), act(*args))) or acted[-1][1])
    seen = train("Counting-plain-actions-v0", 60, num_envs=n_envs, learning_starts=learning_starts)
    steps, actions = zip(*acted)
    assert steps == tuple(step for step in range(0, 60, n_envs) if step >= learning_starts)
    np.testing.assert_array_equal(seen.rows[steps[0] :, 3:5], np.concatenate(actions))


# Observations and environments of every kind


@own_make_env
@pytest.mark.parametrize("view, size", [("line", 3), ("double", 3), ("grid", 3), ("dict", 7), ("reused", 3)])
def test_observations_are_flat_and_spaces_untouched(view, size):
    spaces = deepcopy(SPACES), deepcopy(BOUNDS)
    env = make_env(f"Counting-{view}-v0")
    obs, _ = env.reset(seed=0)
    assert env.observation_space.shape == obs.shape == (size,)
    next_obs = env.step(np.zeros(2, np.float32))[0]
    np.testing.assert_array_equal(np.float32(next_obs), MADE[0].next_obs)
    assert env.unwrapped.observation_space is SPACES[view]
    assert (SPACES, BOUNDS) == spaces


@own_make_env
def test_environments_need_not_know_of_pictures():
    make_env("Plainest-v0").reset(seed=0)


box2d = pytest.mark.skipif(not importlib.util.find_spec("Box2D"), reason="needs Box2D")
dm_control = pytest.mark.skipif(not importlib.util.find_spec("dm_control"), reason="needs dm_control")
CARTPOLE = "shimmy:dm_control/cartpole-swingup-v0"
KINDS = ["Pendulum-v1", "MountainCarContinuous-v0", "Hopper-v4", "Hopper-v5", pytest.param(CARTPOLE, marks=dm_control)]
KINDS += [pytest.param(env_id, marks=box2d) for env_id in ("LunarLanderContinuous-v3", "BipedalWalker-v3")]


@once
@pytest.mark.parametrize("env_id", KINDS)
def test_trains_on(train, env_id):
    seen = train(env_id, 60, learning_starts=30, batch_size=32)
    assert len(seen.updates) == 30 and seen.buffer.count == 60 and np.isfinite(seen.rows).all()
    unchanged = [name for name, value in seen.final.items() if torch.equal(value, seen.initial[name])]
    assert not unchanged and all(value.isfinite().all() for value in seen.final.values())


@own_make_env
@pytest.mark.parametrize("env_id", ["Hopper-v4", "Ant-v4"])
def test_v4_is_no_reason_to_warn(env_id):
    with pytest.warns(match="out of date"):
        gym.make(env_id)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_env(env_id).reset(seed=0)
        warnings.warn("another")
    assert [str(warning.message) for warning in caught] == ["another"]


@own_make_env
@dm_control
def test_dm_control_ends_by_truncation_and_follows_its_seed():
    env = make_env(CARTPOLE)

    def episode(seed: int, steps: int):
        first, actions = env.reset(seed=seed)[0], np.random.default_rng(0).uniform(-1, 1, (steps, 1))
        transitions = [env.step(action)[:4] for action in actions.astype(np.float32)]
        return np.array([first] + [obs for obs, *_ in transitions]), [ends for _, _, *ends in transitions]

    assert episode(5, 1000)[1] == [[False, False]] * 999 + [[False, True]]
    np.testing.assert_array_equal(episode(5, 20)[0], episode(5, 20)[0])
    assert (episode(5, 0)[0] != episode(6, 0)[0]).any()


# Evaluation


def new_agent(env_id: str, **flags) -> tuple[sac.SAC, sac.Args]:
    torch.manual_seed(0)
    env, args = make_env(env_id), sac.Args(env_id=env_id, **flags)
    return sac.SAC(env.observation_space.shape[0], env.action_space.shape[0], args), args


def test_evaluation_is_the_first_episode_of_each_environment():
    returns = sac.evaluate(*new_agent("Counting-mixed-v0", eval_episodes=9), step=0)
    firsts = [sum(m.reward for m in MADE if m.episode == (i, 0)) for i in sorted({m.episode[0] for m in MADE})]
    assert len(MADE) > len([m for m in MADE if m.episode[1] == 0])  # there was more to take
    np.testing.assert_array_equal(returns, firsts)
    assert returns.shape == (9,)


def test_evaluation_is_deterministic_unless_asked():
    agent, args = new_agent("Counting-thirty-v0", eval_episodes=1)
    sac.evaluate(agent, args, step=0)
    sac.evaluate(agent, args, step=0, stochastic=True)
    mode, drawn = np.split(made_rows(), 2)
    expected = agent.act(mode[:, :3], torch.zeros(len(mode), 2))
    np.testing.assert_allclose(mode[:, 3:5], expected, atol=1e-6)
    distance = abs(drawn[:, 3:5] - agent.act(drawn[:, :3], torch.zeros(len(drawn), 2)))
    assert len(np.unique(drawn[:, 3:5], axis=0)) == len(drawn) == 30 and distance.mean() > 0.2


def test_evaluation_can_be_repeated():
    agent, args = new_agent("Pendulum-v1", eval_episodes=2)
    first = sac.evaluate(agent, args, step=1)
    np.testing.assert_array_equal(sac.evaluate(agent, args, step=1), first)
    assert (sac.evaluate(agent, args, step=2) != first).all()
    stochastic = sac.evaluate(agent, args, step=1, stochastic=True)
    np.testing.assert_array_equal(sac.evaluate(agent, args, step=1, stochastic=True), stochastic)
    assert (stochastic != first).all()


def test_evaluations_have_seeds_of_their_own(train):
    flags = dict(num_envs=2, eval_frequency=20, checkpoint_frequency=20, eval_episodes=3)
    train("Counting-mixed-v0", 60, **flags)
    assert len(SEEDS) == 3 * 2 + 3 * 3 and len(set(SEEDS)) == len(SEEDS)
    before = SEEDS.copy()
    train("Counting-mixed-v0", 60, seed=2, **flags)
    assert not set(before) & set(SEEDS)


@once
def test_endless_episodes_are_cut():
    (paid,) = sac.evaluate(*new_agent("Counting-plain-actions-v0", eval_episodes=1), step=0)
    assert len(MADE) == 10_000 and paid == sum(m.reward for m in MADE)


def test_evaluation_leaves_training_alone(train):
    flags = dict(learning_starts=70, eval_episodes=2, num_envs=2)
    without = train("Pendulum-v1", 100, **flags)
    within = train("Pendulum-v1", 100, eval_frequency=20, **flags)
    other = train("Pendulum-v1", 100, seed=2, **flags)
    assert not without.evaluations and len(within.evaluations) == 5
    np.testing.assert_array_equal(without.rows, within.rows)
    assert all(torch.equal(without.final[name], within.final[name]) for name in without.final)
    assert not np.array_equal(without.rows, other.rows)
    assert not any(torch.equal(without.final[name], other.final[name]) for name in without.final if "actor." in name)
    steps, values = within.records["eval/episodic_return"]
    np.testing.assert_array_equal(steps, [20, 40, 60, 80, 100])
    np.testing.assert_allclose(values, [returns.mean() for returns in within.evaluations], rtol=1e-6)
    spread = [returns.std() for returns in within.evaluations]
    np.testing.assert_allclose(within.records["eval/episodic_return_std"][1], spread, rtol=1e-5)
    assert "eval/episodic_return" not in without.records
