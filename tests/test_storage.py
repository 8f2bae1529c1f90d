"""sac_ablations.py, --n-step and --hindsight: what of a run reaches the replay buffer, and targets.

Most tests train through main() on Counting, an environment whose observations say where they come
from and which writes down each step it made. What the replay buffer holds is compared with that.
"""

import re
import sys
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, MultiDiscrete
from helpers import needs_compiler, saved_args

import sac_ablations as sac
import sac_continuous as parent

torch.set_num_threads(1)

MADE = {}  # (environment, episode, step): what happened in it
LENGTHS = (5, 2, 7, 1, 4)
ENDINGS = ((True, False), (False, True), (False, True), (True, True))  # (terminated, truncated)


def place(environment: int, episode: int, t: int) -> float:
    """A number that no other step of any episode has, exact in float32."""
    return environment * 10_000 + episode * 100 + t


def reward_of(achieved, desired, info):
    """0 for a goal at most a step and a half away, else -1; for one goal (2, 1), or many."""
    return -(np.abs(achieved - desired).max(axis=(-2, -1)) > 1.5).astype(np.float64)


class Counting(gym.Env):
    """Observes its number, its episode's and its step's; each step achieves a goal of its own."""

    made = 0
    action_space = Box(-1, 1, (1,), np.float32)
    goal = Box(-np.inf, np.inf, (2, 1), np.float64)
    observation_space = Dict(
        observation=Box(-np.inf, np.inf, (3,), np.float64), achieved_goal=goal, desired_goal=goal
    )

    def __init__(self, render_mode=None):
        self.number = Counting.made
        Counting.made += 1
        self.episode = -1

    def achieved(self):
        at = place(self.number, self.episode, self.t)
        return np.array([[at], [-at]])

    def observe(self):
        return {
            "observation": np.array([self.number, self.episode, self.t], dtype=np.float64),
            "achieved_goal": self.achieved(),
            "desired_goal": self.desired,
        }

    def reset(self, *, seed=None, options=None):
        self.episode += 1
        self.t = 0
        # Half a step beside what is achieved: so that it is told from the goals of copies.
        self.desired = self.achieved() + [[1.5], [-1.5]]
        return self.observe(), {}

    def step(self, action):
        start = (self.number, self.episode, self.t)
        self.t += 1
        done = self.t == self.length()
        terminated, truncated = ENDINGS[self.episode % len(ENDINGS)] if done else (False, False)
        reward = self.reward()
        MADE[start] = SimpleNamespace(
            action=action[0],
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            desired=self.desired.copy(),
            achieved=self.achieved(),
        )
        return self.observe(), reward, terminated, truncated, {}

    def reward(self):
        return np.sin(place(self.number, self.episode, self.t))

    def length(self):
        return LENGTHS[self.episode % len(LENGTHS)]


class Goals(Counting):
    def reward(self):
        return float(reward_of(self.achieved(), self.desired, {}))

    def compute_reward(self, achieved, desired, info):
        assert list(info) == [{}] * len(achieved)  # nothing is known of copies
        return reward_of(achieved, desired, info)


class Ending(Goals):
    """Says which goals end the task, for one goal at a time, as an array of one number."""

    def compute_terminated(self, achieved, desired, info):
        assert achieved.shape == desired.shape == (2, 1)
        return np.array([reward_of(achieved, desired, info) == 0])


class OneAtATime(Goals):
    def compute_reward(self, achieved, desired, info):
        return float(np.abs(achieved - desired).max() < 1)


class Picky(Goals):
    def compute_reward(self, achieved, desired, info):
        raise TypeError("one goal, please")


class Squeezing(Goals):
    def compute_reward(self, achieved, desired, info):
        return np.squeeze(reward_of(achieved, desired, info))


class Choices(Goals):
    """Its goals are one-hot in flat observations."""

    goal = MultiDiscrete([3, 3])
    observation_space = Dict(
        observation=Counting.observation_space["observation"], achieved_goal=goal, desired_goal=goal
    )


class Unlike(Goals):
    """Wants one number where it achieves two."""

    observation_space = Dict(Goals.observation_space.spaces | {"desired_goal": Box(-1, 1, (1, 1))})


class Endless(Goals):
    """Says that no goal ends the task."""

    def compute_terminated(self, achieved, desired, info):
        return False


class Drawn(Goals):
    """Draws its number from its seed, so that it is the same in a run and in one continued."""

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.number = seed % 1000
        return super().reset()


class Paying(Goals):
    """Pays for a goal that is met exactly. Its own, half a step beside, never are."""

    def compute_reward(self, achieved, desired, info):
        met = (achieved == desired).all(axis=(-2, -1))
        return reward_of(achieved, desired, info) + 2.0 * met


class Tenfold(gym.Wrapper):
    """Rewards ten times as large, and says so of other goals too."""

    def __init__(self, **kwargs):
        super().__init__(Goals(**kwargs))

    def step(self, action):
        obs, reward, *rest = self.env.step(action)
        return obs, 10 * reward, *rest

    def compute_reward(self, achieved, desired, info):
        return 10 * self.env.compute_reward(achieved, desired, info)


class Silent(Tenfold):
    """Does not say so: compute_reward is that of the environment within."""

    def __getattribute__(self, name):
        if name == "compute_reward":
            raise AttributeError(name)
        return super().__getattribute__(name)


class Ended(gym.Wrapper):
    """Ends the task at a goal, where the environment within says that no goal ends it."""

    def __init__(self, **kwargs):
        super().__init__(Endless(**kwargs))

    def compute_terminated(self, achieved, desired, info):
        return reward_of(achieved, desired, info) == 0


KINDS = (Counting, Goals, Ending, OneAtATime, Picky, Squeezing, Choices, Unlike, Endless, Drawn)
KINDS += (Paying, Tenfold, Silent, Ended)
for kind in KINDS:
    gym.register(f"Storage{kind.__name__}-v0", entry_point=kind)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Function that starts main() with these flags and returns the run's folder and its replay."""

    def run(env="Counting", script=sac, **flags):
        MADE.clear()
        Counting.made = 0
        monkeypatch.chdir(tmp_path)
        before = set(tmp_path.glob("runs/*"))
        if "resume" not in flags:
            default = dict(env_id=f"Storage{env}-v0", total_timesteps=70, learning_starts=24)
            default |= dict(batch_size=8, eval_frequency=0, checkpoint_frequency=27, threads=1)
            flags = default | flags
        words = [f"--{key.replace('_', '-')}={value}" for key, value in flags.items()]
        words = [word.replace("=True", "") for word in words]
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *words])
        monkeypatch.setattr(script, "plot_learning_curve", lambda folder: None)  # it is slow
        script.main()
        (folder,) = set(tmp_path.glob("runs/*")) - before or {flags["resume"]}
        return folder, torch.load(folder / "checkpoint.pt", weights_only=True)

    return run


OBSERVATION, ACHIEVED, DESIRED = slice(0, 3), slice(3, 5), slice(5, 7)


def read_rows(checkpoint, extra=()) -> list[SimpleNamespace]:
    """The rows of a replay of flat observations (7,) and one action, oldest first."""
    rows = checkpoint["rows"].numpy()
    rows = np.roll(rows, -(checkpoint["count"] % len(rows)), axis=0)
    names = ["obs", "action", "reward", "terminated", "next_obs", *extra]
    ends = np.cumsum([7, 1, 1, 1, 7, *[1] * len(extra)])
    assert rows.shape[1] == ends[-1]
    columns = [rows[:, end - width : end] for width, end in zip([7, 1, 1, 1, 7, 1, 1], ends)]
    return [SimpleNamespace(**dict(zip(names, parts))) for parts in zip(*columns)]


def origin(obs) -> tuple[int, int, int]:
    return tuple(int(x) for x in obs[OBSERVATION])


def last_step(key) -> int:
    """The last step of the episode that was made, be it its end or where it was cut."""
    return max(t for environment, episode, t in MADE if (environment, episode) == key[:2])


# N-step sums


def check_sum(row, n: int, gamma: float):
    """A row against the steps that were made."""
    environment, episode, t = origin(row.obs)
    steps = int(row.steps[0])
    made = [MADE[environment, episode, t + k] for k in range(steps)]
    assert row.action[0] == pytest.approx(made[0].action)
    assert row.reward[0] == pytest.approx(sum(gamma**k * m.reward for k, m in enumerate(made)))
    assert origin(row.next_obs) == (environment, episode, t + steps)
    assert row.terminated[0] == made[-1].terminated
    assert not any(m.terminated or m.truncated for m in made[:-1])
    left = last_step((environment, episode)) - t + 1
    assert steps == min(n, left)


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("n", [2, 3, 8])
def test_each_step_starts_one_sum_that_stays_in_its_episode(start, n, num_envs):
    _, checkpoint = start(n_step=n, num_envs=num_envs, gamma=0.7)
    rows = read_rows(checkpoint, ["steps"])
    assert len(rows) == len(MADE) >= 70
    assert Counter(origin(row.obs) for row in rows) == Counter(list(MADE))
    for row in rows:
        check_sum(row, n, 0.7)
    if n > 2:
        assert any(row.steps[0] < n and not ends_episode(row) for row in rows)  # cut, not ended


def ends_episode(row) -> bool:
    """Whether the last step that a row spans ended its episode."""
    environment, episode, t = origin(row.next_obs)
    made = MADE[environment, episode, t - 1]
    return made.terminated or made.truncated


def test_with_truncation_terminates_a_time_limit_ends_the_sum_for_good(start):
    _, checkpoint = start(n_step=3, truncation_terminates=True)
    rows = read_rows(checkpoint, ["steps"])
    truncated = [row for row in rows if ends_episode(row)]
    assert truncated
    assert all(row.terminated[0] == 1 for row in truncated)
    assert all(row.terminated[0] == 0 for row in rows if not ends_episode(row))


def test_the_ring_keeps_the_newest_sums(start):
    _, whole = start(n_step=3, num_envs=2, learning_starts=40)
    _, ring = start(n_step=3, num_envs=2, learning_starts=40, buffer_size=32)
    assert ring["count"] == whole["count"] > 32
    newest = whole["rows"][-32:, :7]  # the actions depend on what was learned
    wrapped = torch.roll(ring["rows"], -(ring["count"] % 32), 0)
    assert torch.equal(wrapped[:, :7], newest)
    for row in read_rows(ring, ["steps"]):
        check_sum(row, 3, 0.99)


def test_rewards_are_scaled_before_they_are_summed(start):
    _, checkpoint = start(n_step=3, reward_scale=5.0)
    for row in read_rows(checkpoint, ["steps"]):
        row.reward = row.reward / 5
        check_sum(row, 3, 0.99)


def test_one_step_is_the_parent_bit_for_bit(start):
    flags = dict(env_id="Pendulum-v1", num_envs=2)
    _, expected = start(script=parent, **flags)
    _, checkpoint = start(n_step=1, **flags)
    assert torch.equal(checkpoint["rows"], expected["rows"])
    assert checkpoint["agent"].keys() == expected["agent"].keys()
    for name, value in checkpoint["agent"].items():
        assert torch.equal(value, expected["agent"][name]), name


def agent_and_batch(script=sac, **flags):
    """An agent, a batch of 8 with ended and unended rows, and the noise of an update."""
    torch.manual_seed(0)
    agent = script.SAC(3, 2, script.Args(**flags)).double()
    random = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64)

    batch = script.Batch(
        draw(8, 3), draw(8, 2).tanh(), draw(8), (draw(8) > 0.3).double(), draw(8, 3)
    )
    return agent, batch, draw(2, 8, 2)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_target_after_so_many_steps_is_that_of_the_discount_to_their_power(steps):
    agent, batch, noise = agent_and_batch(gamma=0.9, n_step=5)
    expected, its_batch, _ = agent_and_batch(parent, gamma=0.9**steps)
    losses = agent.update(batch, noise, steps=torch.full((8,), float(steps)).double())
    its_losses = expected.update(its_batch, noise)
    assert losses.keys() == its_losses.keys()
    for name, value in losses.items():
        assert value.item() == pytest.approx(its_losses[name].item(), rel=1e-9), name


def test_each_row_has_its_own_power():
    steps = [1, 2, 3, 4, 5, 6, 7, 8]
    means = []
    for n in steps:
        one, batch, noise = agent_and_batch(gamma=0.9, n_step=8)
        one_row = sac.Batch(*(column[n - 1 : n] for column in batch))
        losses = one.update(one_row, noise[:, n - 1 : n], steps=torch.tensor([n]).double())
        means.append(losses["losses/target_q"].item())
    agent, batch, noise = agent_and_batch(gamma=0.9, n_step=8)
    losses = agent.update(batch, noise, steps=torch.tensor(steps).double())
    target = losses["losses/target_q"].item()
    assert target == pytest.approx(np.mean(means), rel=1e-9)
    assert batch.terminated.sum() not in (0, 8)


def test_what_is_sampled_knows_its_steps():
    args = sac.Args(n_step=4, prioritized_replay=True, batch_size=2)
    buffer = sac.ReplayBuffer(10, 1, 1, args=args)
    column = np.arange(3.0)
    buffer.add(column[:, None], column[:, None], column, column, column[:, None], column + 2)
    assert buffer.steps(torch.tensor([2, 0])).tolist() == [4.0, 2.0]


def test_an_update_gets_the_steps_of_its_rows(start, monkeypatch):
    seen = []
    update = sac.SAC.update

    def spy(agent, batch, noise, policy_updates, weight, steps):
        seen.append((batch, steps))
        return update(agent, batch, noise, policy_updates, weight, steps)

    monkeypatch.setattr(sac.SAC, "update", spy)
    start(n_step=3, prioritized_replay=True)
    assert len(seen) == 46
    for batch, steps in seen:
        spans = batch.next_obs[:, 2] - batch.obs[:, 2]  # of the numbers of steps
        assert steps.tolist() == spans.tolist()
    assert len({n for _, steps in seen for n in steps.tolist()}) == 3


@pytest.mark.parametrize(
    "flags",
    [
        dict(prioritized_replay=True),
        dict(combined_replay=True, num_envs=2),
        dict(value_network=True),
        dict(action_repeat=2),
        pytest.param(dict(compile="on"), marks=[pytest.mark.slow, needs_compiler]),
    ],
    ids=str,
)
def test_sums_go_with_other_variants(start, flags):
    folder, checkpoint = start(n_step=3, **flags)
    assert saved_args(folder)["compile"] == flags.get("compile", "off")
    assert all(value.isfinite().all() for value in checkpoint["agent"].values())
    assert checkpoint["agent"]["critic_optimizer.steps"] > 20


# Hindsight


def check_copies(rows, copies: int, strategy="future", cls=Goals):
    """Every row is a step that was made, or one of its copies with a goal of its later episode."""
    relabelled = Counter()
    sources = []
    for row in rows:
        key = origin(row.obs)
        made = MADE[key]
        environment, episode, t = key
        assert origin(row.next_obs) == (environment, episode, t + 1)
        assert row.obs[ACHIEVED].tolist() == [place(*key), -place(*key)]
        assert row.next_obs[ACHIEVED].tolist() == made.achieved.flatten().tolist()
        assert row.action[0] == pytest.approx(made.action)
        goal = row.obs[DESIRED]
        assert row.next_obs[DESIRED].tolist() == goal.tolist()
        if goal.tolist() == made.desired.flatten().tolist():
            relabelled[key, "original"] += 1
            assert row.reward[0] == made.reward
            assert row.terminated[0] == made.terminated
            continue
        relabelled[key, "copy"] += 1
        last = last_step(key)
        reached = [MADE[environment, episode, u].achieved[0, 0] for u in range(t, last + 1)]
        source = reached.index(goal[0])
        assert goal[1] == -goal[0]
        if strategy == "final":
            assert source == len(reached) - 1
        sources.append((len(reached), source))
        expected = reward_of(made.achieved, goal.reshape(2, 1), {})
        assert row.reward[0] == expected
        assert row.terminated[0] == (expected == 0 if cls is Ending else made.terminated)
    assert set(relabelled) == {(key, kind) for key in MADE for kind in ("original", "copy")}
    for (_, kind), count in relabelled.items():
        assert count == (copies if kind == "copy" else 1)
    return sources


@pytest.mark.parametrize("env", ["Goals", "Ending", "Endless"])
@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("copies, strategy", [(1, "future"), (4, "future"), (1, "final")])
def test_every_copy_has_a_later_goal_of_its_episode_and_its_reward(
    start, env, num_envs, copies, strategy
):
    flags = dict(num_envs=num_envs, hindsight=copies, hindsight_strategy=strategy)
    _, checkpoint = start(env, **flags)
    rows = read_rows(checkpoint)
    assert len(rows) == len(MADE) * (1 + copies)
    check_copies(rows, copies, strategy, dict(Goals=Goals, Ending=Ending, Endless=Endless)[env])


def test_future_goals_are_as_likely_one_as_the_other(start):
    """With n steps left in an episode, the outcome of each is the goal of 1 / n of the copies."""
    _, checkpoint = start("Goals", hindsight=60, total_timesteps=40)
    sources = check_copies(read_rows(checkpoint), 60)
    assert {n for n, _ in sources} == set(range(1, 8))
    for left in range(2, 8):
        chosen = [source for n, source in sources if n == left]
        expected = len(chosen) / left
        counts = np.bincount(chosen, minlength=left)
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert chi_square < left - 1 + 5 * np.sqrt(2 * (left - 1)), (left, counts)


def test_copies_are_stored_when_their_episode_ends(start, monkeypatch):
    sizes = []
    add = sac.Hindsight.add

    def spy(self, obs, action, reward, terminated, next_obs, done):
        add(self, obs, action, reward, terminated, next_obs, done)
        sizes.append((self.buffer.count, done[0]))

    monkeypatch.setattr(sac.Hindsight, "add", spy)
    start("Goals", hindsight=2)
    gains = np.diff([0, *(size for size, _ in sizes)])
    lengths = iter([5, 2, 7, 1, 4, 5, 2])
    ended = [gain for gain, (_, done) in zip(gains[:26], sizes[:26]) if done]
    assert ended == [1 + 2 * next(lengths) for _ in ended] != []
    assert {gain for gain, (_, done) in zip(gains[:26], sizes[:26]) if not done} == {1}


def test_the_ring_keeps_the_newest_rows_of_hindsight(start):
    _, whole = start("Goals", hindsight=4, learning_starts=60)
    _, ring = start("Goals", hindsight=4, learning_starts=60, buffer_size=100)
    assert ring["count"] == whole["count"] == 70 * 5
    wrapped = torch.roll(ring["rows"], -(ring["count"] % 100), 0)
    assert torch.equal(wrapped[:, :7], whole["rows"][-100:, :7])


def test_the_rewards_of_copies_are_scaled_as_the_others(start):
    _, checkpoint = start("Goals", hindsight=2, reward_scale=4.0)
    rows = read_rows(checkpoint)
    assert {float(row.reward[0]) for row in rows} == {0.0, -4.0}
    for row in rows:
        row.reward = row.reward / 4
    check_copies(rows, 2)


def test_where_time_limits_count_as_ends_copies_end_there_too(start):
    _, checkpoint = start("Endless", hindsight=2, truncation_terminates=True)
    truncated = [key for key, made in MADE.items() if made.truncated]
    assert truncated
    of_truncated = [row for row in read_rows(checkpoint) if origin(row.obs) in truncated]
    assert len(of_truncated) == 3 * len(truncated)
    assert all(row.terminated[0] == 1 for row in of_truncated)


def test_copies_that_reach_their_goal_end_there_wherever_time_limits_count_as_ends(start):
    _, checkpoint = start("Ending", hindsight=2, truncation_terminates=True)
    rows = [row for row in read_rows(checkpoint) if row.obs[DESIRED][0] % 1 == 0]  # copies
    assert len(rows) == 2 * len(MADE)
    reached = [row for row in rows if row.reward[0] == 0]
    assert len(reached) > len(MADE) / 2
    assert all(row.terminated[0] == 1 for row in reached)
    ended = {key for key, made in MADE.items() if made.truncated or made.terminated}
    going_on = [row for row in rows if row.reward[0] < 0 and origin(row.obs) not in ended]
    assert going_on
    assert all(row.terminated[0] == 0 for row in going_on)


def test_goals_are_found_wherever_they_stand_in_flat_observations():
    parts = {"desired_goal": 2, "speed": 1, "achieved_goal": 2, "observation": 3}
    for order in (list(parts), sorted(parts)):
        boxes = [(key, Box(-9, 9, (parts[key],), np.float64)) for key in order]
        space = Dict(boxes)
        value = {key: np.full(size, i) for i, (key, size) in enumerate(parts.items())}
        flat = gym.spaces.flatten(space, value)
        shape, achieved, desired = sac.goal_columns(space)
        assert shape == (2,)
        assert flat[achieved].tolist() == [2, 2]
        assert flat[desired].tolist() == [0, 0]


def test_clipped_targets_stay_within_what_returns_can_be():
    agent, batch, noise = agent_and_batch(gamma=0.5)
    high = batch._replace(reward=batch.reward * 100)
    clipped, *_ = agent_and_batch(gamma=0.5, clip_targets=True, reward_scale=3.0)
    plain = agent.update(high, noise)
    losses = clipped.update(high, noise)
    assert plain["losses/target_q"] != losses["losses/target_q"]
    for i in range(8):
        plain, batch, noise = agent_and_batch(gamma=0.5)
        clipped, *_ = agent_and_batch(gamma=0.5, clip_targets=True, reward_scale=3.0)
        row = sac.Batch(*(column[i : i + 1] for column in high))
        target = plain.update(row, noise[:, i : i + 1])["losses/target_q"].item()
        clip = clipped.update(row, noise[:, i : i + 1])["losses/target_q"].item()
        assert clip == pytest.approx(min(max(target, -6.0), 0.0), abs=1e-12)


def test_the_bound_of_clipped_targets_counts_every_repeated_step():
    flags = dict(gamma=0.5, clip_targets=True, reward_scale=3.0, action_repeat=4)
    agent, batch, noise = agent_and_batch(**flags)
    low = batch._replace(reward=batch.reward * 0 - 1000)
    assert agent.update(low, noise)["losses/target_q"].item() == pytest.approx(-24)


# Held noise


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("hold", [1, 4, 6])
def test_a_random_action_is_held_until_the_next_is_due_or_the_environments_restart(
    start, hold, num_envs
):
    _, checkpoint = start(hold_noise=hold, num_envs=num_envs, learning_starts=60)
    actions = checkpoint["rows"][:60, 7].reshape(-1, num_envs)
    rounds = len(actions)
    restarts = [0, -(-27 // num_envs), -(-54 // num_envs), rounds]
    drawn = [t for t in range(1, rounds) if not torch.equal(actions[t], actions[t - 1])]
    due = [t for first, last in pairwise(restarts) for t in range(first, last, hold)]
    assert drawn == due[1:]


# Continuing a run


@pytest.mark.parametrize(
    "flags",
    [
        dict(n_step=4, num_envs=3),
        dict(hindsight=3, num_envs=3),
        dict(hindsight=1, hindsight_strategy="final"),
        dict(hindsight=2, normalize_obs=True),
        dict(hold_noise=50, learning_starts=50),
    ],
    ids=str,
)
def test_interrupted_and_resumed_is_never_interrupted(start, monkeypatch, flags):
    """The run is stopped in the midst of episodes, some steps after a checkpoint."""
    whole_folder, whole = start("Drawn", **flags)
    stop = 40 // flags.get("num_envs", 1)
    with monkeypatch.context() as patch:
        patch.setattr(sac.Threads, "give_way", interrupt_at(stop))
        with pytest.raises(SystemExit, match="^1$"):
            start("Drawn", **flags)
    (folder,) = {*whole_folder.parent.iterdir()} - {whole_folder}
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 27
    start(resume=folder)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == whole["step"]
    assert checkpoint["count"] == whole["count"] > 0
    assert torch.equal(checkpoint["rows"], whole["rows"])
    assert torch.equal(checkpoint["random"], whole["random"])
    for name, value in checkpoint["agent"].items():
        assert torch.equal(value, whole["agent"][name]), name


def interrupt_at(n: int):
    calls = iter(range(n - 1))

    def give_way(self):
        if next(calls, None) is None:
            raise KeyboardInterrupt

    return give_way


# Bad input


@pytest.mark.parametrize(
    "env, flags, words",
    [
        ("Counting", dict(n_step=0), "--n-step 0: must be between 1 and"),
        ("Counting", dict(n_step=13, num_envs=2), "--n-step 13: .*add --learning-starts 26"),
        ("Counting", dict(hold_noise=0), "--hold-noise 0: must be between 1 and"),
        ("Counting", dict(hindsight=-1), "--hindsight -1: must be between 0 and"),
        ("Counting", dict(hindsight=2), "--hindsight 2: .*no compute_reward.*leave --hindsight"),
        ("OneAtATime", dict(hindsight=2), r"--hindsight 2: .*compute_reward must answer .*\(n,\)"),
        ("Picky", dict(hindsight=2), "--hindsight 2: .*arrays of goals.*one goal, please"),
        ("Squeezing", dict(hindsight=2), r"--hindsight 2: .*rewards \(n,\), not \(\) for 1"),
        ("Choices", dict(hindsight=2), "--hindsight 2: .*achieved_goal is MultiDiscrete.*Box"),
        ("Unlike", dict(hindsight=2), r"--hindsight 2: .*\(2, 1\) and desired .* \(1, 1\).*leave"),
        ("Goals", dict(hindsight=2, combined_replay=True), "--combined-replay with --hindsight"),
        ("Goals", dict(hindsight=2, hindsight_strategy="final"), "--hindsight 2: .*choose 1"),
        ("Goals", dict(hindsight=2, n_step=3), "--hindsight with --n-step 3: leave one"),
        ("Goals", dict(hindsight=2, stack=2), "--hindsight with --stack 2: leave one"),
        ("Goals", dict(hindsight=2, action_repeat=2), "--hindsight with --action-repeat 2"),
        ("Goals", dict(clip_targets=True, gamma=1.0), "--clip-targets .*--gamma below 1"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_line_that_names_flag_and_mend(start, capsys, env, flags, words):
    check_refusal(lambda: start(env, **flags), capsys, words)


def check_refusal(action, capsys, words: str):
    with pytest.raises(SystemExit) as ended:
        action()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(words, line), line


def test_hindsight_without_goals_is_refused(start, capsys):
    refused = "--hindsight 4: Pendulum-v1 has no goals.*leave --hindsight out"
    check_refusal(lambda: start(env_id="Pendulum-v1", hindsight=4), capsys, refused)


@pytest.mark.parametrize("name", ["gymnasium_robotics:FetchReach-v4", "FetchReach-v4"])
def test_without_gymnasium_robotics_one_line_says_what_to_install(start, capsys, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    refused = r"--env-id .*FetchReach-v4: .*pip install gymnasium-robotics"
    check_refusal(lambda: start(env_id=name, hindsight=4), capsys, refused)


def test_copies_are_rewarded_as_the_outermost_wrapper_rewards_them(start):
    _, checkpoint = start("Tenfold", hindsight=3, reward_scale=0.5)
    rewards = Counter(row.reward[0] for row in read_rows(checkpoint))
    assert set(rewards) == {0.0, -5.0}
    assert min(rewards.values()) > 20


def test_copies_end_where_the_outermost_wrapper_ends_them(start):
    _, checkpoint = start("Ended", hindsight=3)
    for row in read_rows(checkpoint):
        made = MADE[origin(row.obs)]
        if row.obs[DESIRED].tolist() == made.desired.flatten().tolist():
            assert row.terminated[0] == made.terminated
        else:
            assert row.terminated[0] == (row.reward[0] == 0)


def test_rewards_that_contradict_compute_reward_are_refused(start, capsys):
    refused = "--hindsight 2: compute_reward says -1 where the environment returned -10: .*or leave"
    check_refusal(lambda: start("Silent", hindsight=2), capsys, refused)


def hindsight(args):
    agent = sac.SAC(7, 1, args)
    return sac.Hindsight(args, agent, sac.ReplayBuffer(9, 7, 1, args=args), torch.Generator())


@pytest.mark.parametrize(
    "length, wrong, refused",
    [(1, 1, False), (5, 1, False), (5, 2, True), (19, 2, True), (20, 2, False), (20, 3, True)],
)
def test_a_rounded_distance_is_no_contradiction(start, capsys, length, wrong, refused):
    """Of the rewards of an episode so many are on the other side of the limit."""
    args = sac.Args(env_id="StorageGoals-v0", hindsight=1)
    storage = hindsight(args)
    obs = np.zeros((length, 7))
    reward = np.where(np.arange(length) < wrong, -1.0, 0.0)
    if refused:
        with pytest.raises(SystemExit):
            storage.check_rewards(reward, obs, np.zeros(length, dtype=bool))
    else:
        storage.check_rewards(reward, obs, np.zeros(length, dtype=bool))
    assert ("compute_reward says" in capsys.readouterr().err) == refused


@pytest.mark.parametrize("factor, refused", [(1, False), (1.1, True)])
def test_distances_between_rounded_observations_are_no_contradiction(capsys, factor, refused):
    """Where the reward is the distance: near the goal it is mostly rounding."""
    storage = hindsight(sac.Args(env_id="StorageGoals-v0", hindsight=1))
    storage.compute_reward = lambda achieved, goal, info: -np.abs(achieved - goal).max((1, 2))
    near = 20 + np.linspace(0, 0.2, 50) ** 2
    obs = np.zeros((50, 7), np.float32)
    obs[:, ACHIEVED] = near[:, None]
    obs[:, DESIRED] = 20
    reward = -factor * (near - 20)
    if refused:
        with pytest.raises(SystemExit):
            storage.check_rewards(reward, obs, np.zeros(50, dtype=bool))
    else:
        storage.check_rewards(reward, obs, np.zeros(50, dtype=bool))
    assert ("compute_reward says" in capsys.readouterr().err) == refused


def test_normalization_counts_what_is_acted_on_and_every_copy(start):
    _, checkpoint = start("Goals", hindsight=3, normalize_obs=True)
    obs = np.array([row.obs for row in read_rows(checkpoint)], dtype=float)
    expected = [np.full(7, len(obs)), obs.sum(0), (obs**2).sum(0)]
    assert len(obs) == 4 * len(MADE)
    np.testing.assert_allclose(checkpoint["agent"]["moments"], expected, rtol=1e-12)


def test_clipped_targets_are_learned_from(start):
    _, plain = start("Goals")
    _, clipped = start("Goals", clip_targets=True)
    assert torch.equal(plain["rows"][:24], clipped["rows"][:24])  # acting does not know of it
    name = "critics.weights.0"
    assert not torch.equal(plain["agent"][name], clipped["agent"][name])


@pytest.mark.parametrize(
    "env, flags, reward",
    [
        ("Counting", {}, r"0\.\d+"),
        ("Tenfold", dict(reward_scale=0.1), "-10"),
        ("Tenfold", dict(n_step=3), "-10"),
        ("Paying", dict(hindsight=1), "2"),  # of copies
        ("Paying", {}, None),
        ("Goals", dict(action_repeat=2), None),
        ("Goals", dict(reward_scale=3), None),
    ],
    ids=str,
)
def test_rewards_that_clipped_targets_cannot_hold_are_refused(start, capsys, env, flags, reward):
    if reward is None:
        start(env, clip_targets=True, **flags)
        return
    refused = rf"--clip-targets is for rewards in \[-1, 0\], not {reward}: leave it out"
    check_refusal(lambda: start(env, clip_targets=True, **flags), capsys, refused)


def test_a_resumed_run_keeps_the_discount_in_its_sums(start, capsys):
    summed, _ = start("Counting", n_step=3)
    capsys.readouterr()
    refused = "--gamma cannot change in a run: it was 0.99"
    check_refusal(lambda: start(resume=summed, gamma=0.9), capsys, refused)
    plain, _ = start("Counting")
    start(resume=plain, gamma=0.9, total_timesteps=80)


@pytest.mark.parametrize("change", [dict(n_step=4), dict(hindsight=2)], ids=str)
def test_a_resumed_run_keeps_what_it_stores(start, capsys, change):
    folder, _ = start("Goals")
    capsys.readouterr()
    (name,) = change
    refused = f"--{name.replace('_', '-')} cannot change in a run"
    check_refusal(lambda: start(resume=folder, **change), capsys, refused)
