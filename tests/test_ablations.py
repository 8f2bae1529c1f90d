"""sac_ablations.py: with no variant chosen it is sac_continuous.py to the last bit.

What each variant does is held against numbers worked out by hand, plain torch.nn, mpmath, NumPy,
or the law of what is drawn. What main() makes of it is seen in runs of a few dozen steps, many of
them on Fives, whose observations and rewards count.
"""

import dataclasses
import itertools
import math
import os
import re
import signal
import sys
import tempfile
import typing
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import mpmath
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from gymnasium.spaces import Box
from helpers import (
    load,
    needs_compiler,
    only_run,
    run_forked,
    same,
    saved_args,
    wait_for_the_next_second,
    words,
)
from matplotlib.figure import Figure

import sac_ablations as sac
import sac_continuous as parent

OBS = 3
ACTION = 2
ROWS = 6
# Of an action at noise zero, mean zero and log std zero: log(2 pi) / 2 in each dimension.
ENTROPY = ACTION * 0.9189385332046727
PARENTS_FLAGS = {field.name for field in dataclasses.fields(parent.Args)}
DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(sac.Args)
    if field.name not in PARENTS_FLAGS
}


class Fives(gym.Env):
    """Observes the numbers of its episode and step; step t pays t; the fifth ends an episode.

    That end is one of the task in odd episodes and a time limit in all.
    """

    def __init__(self):
        self.observation_space = Box(-np.inf, np.inf, (2,))
        self.action_space = Box(np.float32([0, -3]), np.float32([5, 1]))
        self.episode = 0

    def reset(self, *, seed=None, options=None):
        self.episode += 1
        self.t = 0
        return np.float32([self.episode, self.t]), {}

    def step(self, action):
        self.t += 1
        ends = self.t == 5
        obs = np.float32([self.episode, self.t])
        return obs, float(self.t), ends and self.episode % 2 == 1, ends, {}


FIVES = "Fives-v0"
gym.register(FIVES, entry_point=Fives)


def named(flags):
    """Flags as the name of a test's case."""
    return ",".join(f"{key}={value}" for key, value in flags.items())


# Runs ---------------------------------------------------------------------------------------------


class Spy:
    """Notes what a run of main() does. `copies`: the agent before and after each update."""

    def __init__(self, script, patch, copies):
        self.script = script
        self.copies = copies
        self.updates = []
        self.acts = []  # those of training alone
        self.evaluations = []
        self.update = script.SAC.update
        self.act = script.SAC.act
        self.evaluate = script.evaluate
        spy = self

        class Buffer(script.ReplayBuffer):
            def __init__(self, *args):
                super().__init__(*args)
                spy.buffer = self

            def sample_index(self, *args):
                spy.priorities = self.rows[: len(self), -1].clone()
                spy.index = super().sample_index(*args)
                return spy.index

        patch.setattr(script, "ReplayBuffer", Buffer)
        patch.setattr(script.SAC, "update", lambda *args: spy.note_update(*args))
        patch.setattr(script.SAC, "act", lambda *args: spy.note_act(*args))
        patch.setattr(script, "evaluate", lambda *args, **kwargs: spy.note_returns(*args, **kwargs))

    def note_update(self, agent, batch, noise, policy_updates=1, weight=1.0, steps=1.0):
        before = deepcopy(agent) if self.copies or not self.updates else None
        rest = () if self.script is parent else (policy_updates, weight, steps)
        losses = self.update(agent, batch, noise, *rest)
        self.updates.append(
            SimpleNamespace(
                before=before,
                after=deepcopy(agent) if self.copies else agent,
                losses=losses,
                seed=torch.initial_seed(),
                batch=batch,
                noise=noise,
                policy_updates=policy_updates,
                weight=torch.as_tensor(weight).clone(),
                index=self.index,
                priorities=self.priorities,
                count=self.buffer.count,
            )
        )
        return losses

    def note_act(self, agent, obs, noise):
        action = self.act(agent, obs, noise)
        count = self.buffer.count
        self.acts.append(SimpleNamespace(count=count, obs=obs, noise=noise, action=action))
        return action

    def note_returns(self, *args, **kwargs):
        acts = self.acts.copy()
        returns, success = self.evaluate(*args, **kwargs)
        self.evaluations.append(returns)
        self.acts = acts
        return returns, success


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Function that trains with main() in an empty folder and tells what was seen there."""

    def run(env_id=FIVES, total=60, script=sac, copies=False, **flags):
        defaults = dict(learning_starts=30, batch_size=8, eval_frequency=0, threads=1, cuda=False)
        flags = defaults | flags | dict(env_id=env_id, total_timesteps=total)
        with monkeypatch.context() as patch:
            patch.chdir(tempfile.mkdtemp(dir=tmp_path))
            patch.setattr(sys, "argv", ["sac", *words(**flags)])
            patch.setattr(Figure, "savefig", lambda *_, **__: None)  # longer than the training
            patch.setattr(signal, "signal", lambda *_: None)  # Ctrl-C remains pytest's
            seen = Spy(script, patch, copies)
            script.main()
            seen.folder = only_run(Path.cwd())
        everything = seen.buffer[torch.arange(len(seen.buffer))]
        seen.stored = script.Batch(*(column.numpy() for column in everything))
        seen.final = load(seen.folder / "model.pt")["agent"]
        seen.records = script.read_records(seen.folder)
        return seen

    return run


def finite(seen):
    losses = [value for update in seen.updates for value in update.losses.values()]
    assert losses
    return all(value.isfinite().all() for value in losses)


def unchanged(seen):
    """Names of what no update changed."""
    initial = seen.updates[0].before.state_dict()
    assert initial.keys() == seen.final.keys()
    return {name for name, value in seen.final.items() if torch.equal(value, initial[name])}


# Agents and batches -------------------------------------------------------------------------------


def make_agent(**flags):
    """An agent as in the midst of training.

    Its target critics are apart from the critics and no bias is zero.
    """
    torch.manual_seed(0)
    agent = sac.SAC(OBS, ACTION, sac.Args(**dict(hidden=16, alpha=0.5) | flags)).double()
    with torch.no_grad():
        for network in (agent.actor, agent.critics, agent.target_critics):
            for p in network.parameters():
                p += 0.05 * torch.randn_like(p)
    return agent


def make_batch(rows=ROWS, policy_updates=1, seed=0):
    """A batch with ended and unended rows, and the noise of one update."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64)

    batch = sac.Batch(
        obs=normal(rows, OBS),
        action=normal(rows, ACTION).tanh(),
        reward=normal(rows),
        terminated=(torch.arange(rows) % 3 == 1).double(),
        next_obs=normal(rows, OBS),
    )
    return batch, normal(1 + policy_updates, rows, ACTION)


def set_q(critics, constants):
    """Make each critic this constant."""
    with torch.no_grad():
        for p in critics.parameters():
            p.zero_()
        critics.biases[-1].copy_(torch.tensor(constants)[:, None, None])


def set_policy(actor, mean, log_std):
    """Make the policy this Gaussian under the tanh in each dimension, for every observation."""
    *_, weight, bias = actor.parameters()
    with torch.no_grad():
        weight.zero_()
        bias.copy_(torch.tensor([mean, log_std]).repeat_interleave(len(bias) // 2))


def constant_agent(q, target_q, **flags):
    """Constant networks; with noise zero the log-density of its actions is -ENTROPY."""
    agent = make_agent(n_critics=len(q), **flags)
    set_policy(agent.actor, 0.0, 0.0)
    set_q(agent.critics, q)
    set_q(agent.target_critics, target_q)
    return agent


def actor_of(obs_dim=OBS, action_dim=1, hidden=256, **flags):
    return sac.Actor(obs_dim, action_dim, hidden, args=sac.Args(**flags)).double()


def gradients(optimizer):
    """What the optimizer got at its first step: its running mean then is a tenth of it."""
    assert optimizer.steps == 1
    return [mean / 0.1 for mean in optimizer.mean]


def parameters(network):
    found = list(network.parameters())
    assert found
    return found


def check_law(counts, expected):
    """Pearson's chi-square within four sigmas of its mean."""
    counts = np.asarray(counts, float)
    expected = np.asarray(expected, float)
    freedom = len(counts) - 1
    distance = ((counts - expected) ** 2 / expected).sum()
    assert distance < freedom + 4 * math.sqrt(2 * freedom), (counts, expected)


def check_uniform(drawn, bound):
    """A sample of the uniform law within +-bound, by its extremes and Kolmogorov's distance."""
    drawn = drawn.detach().flatten().sort().values / bound
    most = 1 - 20 / len(drawn)  # all of them lie below it once in exp(10) samples
    assert most < drawn.max() <= 1 + 1e-6
    assert -most > drawn.min() >= -1 - 1e-6
    ranks = (torch.arange(len(drawn)) + 0.5) / len(drawn)
    assert ((drawn + 1) / 2 - ranks).abs().max() < 2 / math.sqrt(len(drawn))


# Identity -----------------------------------------------------------------------------------------

IDENTITY = dict(env_id="Hopper-v4", total=300, learning_starts=200, eval_frequency=100)
IDENTITY |= dict(eval_episodes=1, batch_size=32, log_frequency=20, checkpoint_frequency=130)
IN_OTHER_WORDS = dict(random_steps=200, alpha_lr=3e-4, target_entropy=-3.0)


@pytest.mark.slow
@pytest.mark.parametrize("num_envs", [1, 4])
def test_without_a_variant_it_is_the_parent_bit_for_bit(trained, num_envs):
    expected = trained(script=parent, num_envs=num_envs, **IDENTITY)
    del expected.records["charts/SPS"]
    for flags in ({}, DEFAULTS, IN_OTHER_WORDS):
        seen = trained(num_envs=num_envs, **IDENTITY, **flags)
        assert len(seen.updates) == seen.final["critic_optimizer.steps"] == 100
        same(seen.final, expected.final)
        same(seen.stored, expected.stored)
        assert len(seen.evaluations) == 3
        same(seen.evaluations, expected.evaluations)
        assert "losses/qf_loss" in seen.records
        del seen.records["charts/SPS"]
        same(seen.records, expected.records)


# Each value of each flag --------------------------------------------------------------------------

EACH = [
    dict(n_critics=1),
    dict(n_critics=5),
    dict(n_critics=4, critics_subset=2),
    dict(policy_frequency=2),
    dict(policy_frequency=3, compensate=False),
    dict(autotune=False),
    dict(alpha=0.2),
    dict(alpha_lr=1e-2),
    dict(target_entropy=-0.5),
    dict(target_entropy_scale=0.5),
    dict(alpha_loss="alpha"),
    dict(log_std="tanh"),
    dict(log_std_min=-0.1),
    dict(log_std_max=0.1),
    dict(heads="separate"),
    dict(tanh_correction="eps"),
    dict(scaled_log_prob=True),
    dict(policy_l2=1e-3),
    dict(hidden=64),
    dict(layers=1),
    dict(layers=3),
    dict(init="torch"),
    dict(init="orthogonal"),
    dict(init="normal"),
    dict(activation="Tanh"),
    dict(activation="ELU"),
    dict(activation="GELU"),
    dict(activation="SiLU"),
    dict(layer_norm=True),
    dict(dropout=0.1),
    dict(spectral_norm=True),
    dict(value_network=True),
    dict(reward_scale=5.0),
    dict(random_steps=0),
    dict(random_steps=50),
    dict(truncation_terminates=True),
    dict(combined_replay=True),
    dict(prioritized_replay=True),
    dict(combined_replay=True, prioritized_replay=True),
    dict(n_step=3),
    dict(hold_noise=3),
    dict(updates_per_step=0.5),
    dict(updates_per_step=2.0),
    dict(update_interval=5),
    dict(normalize_obs=True),
    dict(target_network_frequency=2),
    dict(stack=3),
    dict(action_repeat=2),
]
PLAIN = {}  # the final agent of no variant, once it is known


@pytest.mark.parametrize("flags", EACH, ids=named)
def test_each_value_of_each_flag_makes_real_updates_of_its_own(trained, flags):
    if not PLAIN:
        PLAIN.update(trained(total=42, hidden=32).final)
    seen = trained(total=42, log_frequency=10, **dict(hidden=32) | flags)
    factor = flags.get("updates_per_step", 1) / flags.get("action_repeat", 1)
    assert len(seen.updates) == factor * (12 - 12 % flags.get("update_interval", 1))
    assert finite(seen)
    assert unchanged(seen) == ({"log_alpha"} if "autotune" in flags else set())
    with pytest.raises(AssertionError):  # else it is as if the flag were not there
        same(seen.final, PLAIN)


# Those of goal environments have tests of their own, in test_storage.py.
ELSEWHERE = {"preset", "hindsight", "hindsight_strategy", "clip_targets"}


@pytest.mark.parametrize("name", sorted(DEFAULTS.keys() - ELSEWHERE))
def test_each_flag_and_each_choice_is_among_them(name):
    hint = typing.get_type_hints(sac.Args)[name]
    values = {flags[name] for flags in EACH if name in flags}
    assert values
    if typing.get_origin(hint) is typing.Literal:
        assert values == set(typing.get_args(hint)) - {DEFAULTS[name]}


# Critics ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, lowest", [(n, lowest) for n in (1, 2, 3, 5, 10) for lowest in range(n)]
)
def test_target_and_policy_take_the_minimum_over_all_critics(n, lowest):
    q = np.roll(np.arange(n) - 2.0, -lowest).tolist()
    target_q = np.roll(3 * np.arange(n) - 2.0, lowest).tolist()
    agent = constant_agent(q, target_q, gamma=0.9)
    batch, noise = make_batch()

    losses = agent.update(batch, 0 * noise)

    y = batch.reward + 0.9 * (1 - batch.terminated) * (-2 + 0.5 * ENTROPY)
    after = agent.critics.biases[-1].flatten()
    expected = {
        "losses/target_q": y.mean().item(),
        "losses/qf_loss": sum((value - y).square().mean().item() for value in q) / n,
        "losses/qf1_values": q[0],
        "losses/actor_loss": -0.5 * ENTROPY - after.min().item(),
    }
    assert {key: losses[key].item() for key in expected} == pytest.approx(expected, rel=1e-6)
    assert (after - torch.tensor(q)).abs().tolist() == pytest.approx([1e-3] * n, rel=1e-4)


class Table(nn.Module):
    """Critics that answer with these Q-values (C, B), whatever they are asked."""

    def __init__(self, q):
        super().__init__()
        self.q = nn.Parameter(q)

    def forward(self, obs, action):
        return self.q


@pytest.fixture
def subsets(request):
    """The critics behind each of 1000 targets.

    In row c of the batch critic c alone says -1: the rows where the target is -1 are the subset.
    """
    n, size = request.param
    flags = dict(n_critics=n, critics_subset=size, gamma=1.0, alpha=1e-12, layers=1)
    agent = make_agent(hidden=2, **flags)
    agent.critics = Table(torch.zeros(n, n).double())
    agent.target_critics = Table(-torch.eye(n).double())
    agent.actor_optimizer.minimize = lambda loss: None
    agent.alpha_optimizer.minimize = lambda loss: None
    agent.tau = 0.0
    zero = torch.zeros(n).double()
    obs = torch.zeros(n, OBS).double()
    drawn = []

    def minimize(loss):
        # The loss is the mean of (q - y)^2 over n critics and n rows: at q = 0 its gradient is
        # -2 y / n^2.
        y = -torch.autograd.grad(loss, agent.critics.q)[0] * n * n / 2
        same(y, y[:1].expand(n, -1), 1e-12)  # one target for all critics
        subset = tuple((y[0] < -0.5).nonzero().flatten().tolist())
        expected = [-1.0 if c in subset else 0.0 for c in range(n)]
        assert y[0].tolist() == pytest.approx(expected, abs=1e-9)
        drawn.append(subset)

    agent.critic_optimizer.minimize = minimize
    for _ in range(1000):
        agent.update(sac.Batch(obs, None, zero, zero, obs), torch.zeros(2, n, ACTION).double())
    return SimpleNamespace(n=n, size=size, drawn=drawn)


@pytest.mark.parametrize("subsets", [(2, 1), (5, 2), (4, 3), (10, 2), (3, 3)], indirect=True)
def test_the_target_is_the_minimum_over_a_subset_drawn_anew_all_of_them_as_likely(subsets):
    possible = list(itertools.combinations(range(subsets.n), subsets.size))
    counts = [subsets.drawn.count(subset) for subset in possible]
    assert sum(counts) == len(subsets.drawn) == 1000  # each was of the size asked for
    if len(counts) > 1:
        check_law(counts, [1000 / len(counts)] * len(counts))


@pytest.mark.parametrize("n, subset", [(2, 1), (5, 2), (3, 3)])
def test_with_a_subset_the_policy_follows_the_mean_of_all_critics(n, subset):
    """As in REDQ (Chen et al. 2021, arXiv 2101.05982)."""
    agent = constant_agent([3.0**c for c in range(n)], [0.0] * n, critics_subset=subset)
    batch, noise = make_batch()
    loss = agent.update(batch, 0 * noise)["losses/actor_loss"].item()
    mean_q = agent.critics.biases[-1].mean().item()
    assert loss == pytest.approx(-0.5 * ENTROPY - mean_q, rel=1e-6)


@pytest.mark.parametrize(
    "flags", [dict(n_critics=5, critics_subset=2), dict(dropout=0.2)], ids=named
)
def test_in_training_each_update_draws_its_own_subset_and_units(trained, flags):
    first, again, other = (
        [update.seed for update in trained(hidden=16, seed=seed, **flags).updates]
        for seed in (1, 1, 2)
    )
    assert len(set(first)) == 30
    assert first == again
    assert not set(first) & set(other)


# Delayed policy updates ---------------------------------------------------------------------------


def policy_updates_of(i, frequency, compensate):
    if i % frequency != 0:
        return 0
    return frequency if compensate else 1


DELAYS = pytest.mark.parametrize(
    "frequency, compensate", [(1, True), (2, True), (3, True), (2, False), (3, False)]
)


@DELAYS
def test_policy_and_temperature_wait_and_make_up_for_it_if_asked(trained, frequency, compensate):
    flags = dict(policy_frequency=frequency, compensate=compensate)
    seen = trained(hidden=16, copies=True, **flags)
    assert len(seen.updates) == 30
    for i, update in enumerate(seen.updates):
        due = policy_updates_of(i, frequency, compensate)
        steps = []
        for network in ("critic", "actor", "alpha"):
            before = getattr(update.before, f"{network}_optimizer").steps
            after = getattr(update.after, f"{network}_optimizer").steps
            steps.append((after - before).item())
        assert steps == [1, due, due]
        assert len(update.noise) == 1 + due
        assert ("losses/actor_loss" in update.losses) == (due > 0)
    made = seen.final["actor_optimizer.steps"]
    assert made == (30 if compensate else 30 // frequency)


@DELAYS
def test_only_the_policy_and_the_temperature_wait(trained, frequency, compensate):
    flags = dict(policy_frequency=frequency, compensate=compensate)
    seen = trained(hidden=16, copies=True, **flags)
    assert len(seen.updates) == 30
    for i, update in enumerate(seen.updates):
        due = policy_updates_of(i, frequency, compensate)
        for network in ("actor", "critics", "target_critics"):
            before = parameters(getattr(update.before, network))
            after = parameters(getattr(update.after, network))
            moves = due > 0 or network != "actor"
            assert all(torch.equal(a, b) != moves for a, b in zip(before, after))
        assert (update.before.log_alpha != update.after.log_alpha) == (due > 0)


def test_updates_of_the_policy_at_once_are_updates_one_after_the_other():
    """Each with its own noise, at the critics of the last step."""
    flags = dict(policy_lr=1e-2, policy_frequency=3, autotune=False)
    at_once = make_agent(**flags)
    one_by_one = make_agent(**flags)
    batch, noise = make_batch(policy_updates=3)

    losses = at_once.update(batch, noise, 3)

    first = one_by_one.update(batch, noise[:2], 1)
    one_by_one.critic_optimizer.minimize = lambda loss: None
    one_by_one.tau = 0.0
    for i in (2, 3):
        last = one_by_one.update(batch, noise[[0, i]], 1)
    same(parameters(at_once.actor), parameters(one_by_one.actor), 1e-12)
    same(losses["losses/entropy"], last["losses/entropy"], 1e-12)
    same(losses["losses/qf_loss"], first["losses/qf_loss"], 1e-12)


def test_each_of_them_moves_the_temperature_by_its_own_entropy():
    agent = make_agent(policy_frequency=3)
    batch, noise = make_batch(policy_updates=3)
    entropies = []
    step = agent.alpha_optimizer.minimize

    def minimize(loss):
        (slope,) = torch.autograd.grad(loss, agent.log_alpha, retain_graph=True)
        entropies.append(slope.item() - ACTION)
        step(loss)

    agent.alpha_optimizer.minimize = minimize
    losses = agent.update(batch, noise, 3)
    assert len(set(entropies)) == 3
    assert losses["losses/entropy"].item() == pytest.approx(entropies[-1], rel=1e-9)


def test_policy_updates_at_once_share_the_alpha_of_the_updates_beginning():
    agent = make_agent(policy_frequency=3)
    batch, noise = make_batch(policy_updates=3)
    alphas = []
    step = agent.actor_optimizer.minimize

    def minimize(loss):
        action, log_prob = agent.actor(batch.obs, noise[1 + len(alphas)])
        min_q = agent.critics(batch.obs, action).amin(0)
        alphas.append(((loss + min_q.mean()) / log_prob.mean()).item())
        step(loss)

    agent.actor_optimizer.minimize = minimize
    agent.update(batch, noise, 3)
    assert len(alphas) == 3
    assert alphas == pytest.approx([0.5] * 3, rel=1e-6)


# Temperature --------------------------------------------------------------------------------------


def test_a_fixed_temperature_is_the_one_used():
    agent = constant_agent([2.0, -3.0], [5.0, 4.0], autotune=False, alpha=0.3)
    batch, noise = make_batch()
    losses = agent.update(batch, 0 * noise)
    y = batch.reward + 0.99 * (1 - batch.terminated) * (4 + 0.3 * ENTROPY)
    lowest = agent.critics.biases[-1].min().item()
    assert losses["losses/target_q"].item() == pytest.approx(y.mean().item(), rel=1e-6)
    assert losses["losses/actor_loss"].item() == pytest.approx(-0.3 * ENTROPY - lowest)


def test_a_fixed_temperature_stays_and_has_no_loss():
    agent = make_agent(autotune=False, alpha=0.3)
    before = agent.log_alpha.item()
    for seed in range(20):
        losses = agent.update(*make_batch(seed=seed))
        assert losses["losses/alpha"].item() == pytest.approx(0.3, rel=1e-6)
        assert "losses/alpha_loss" not in losses
    assert agent.log_alpha.item() == before == pytest.approx(math.log(0.3), rel=1e-6)
    assert not any("alpha_optimizer" in name for name in agent.state_dict())


def test_metrics_of_an_update_are_not_overwritten_by_the_next_one():
    """A captured graph puts its results in the same place at each call."""
    place = torch.zeros(())
    agent = SimpleNamespace(action_dim=ACTION)
    buffer = SimpleNamespace(sample_index=lambda *_: None)

    def learn(*_):
        return {"losses/actor_loss": place.add_(1)}

    common = (sac.Args(), agent, buffer, torch.Generator(), learn)
    first, second = (sac.learn_once(*common, update) for update in (0, 1))
    assert (first["losses/actor_loss"], second["losses/actor_loss"]) == (1, 2)


@pytest.mark.parametrize("alpha", [1.0, 0.2, 3.0])
def test_learning_of_the_temperature_starts_at_alpha(alpha):
    agent = make_agent(alpha=alpha)
    losses = agent.update(*make_batch())
    assert losses["losses/alpha"].item() == pytest.approx(alpha, rel=1e-6)
    assert agent.log_alpha.item() != pytest.approx(math.log(alpha), abs=1e-5)


@pytest.mark.parametrize("alpha_lr, length", [(0.0, 0.02), (0.05, 0.05)])
def test_the_temperature_has_a_learning_rate_of_its_own(alpha_lr, length):
    agent = make_agent(alpha_lr=alpha_lr, policy_lr=0.02)
    before = deepcopy(agent)
    agent.update(*make_batch())  # Adam's first step is as long as its rate
    way = abs(agent.log_alpha - before.log_alpha).item()
    bias = parameters(agent.actor)[-1]
    old_bias = parameters(before.actor)[-1]
    assert way == pytest.approx(length, rel=1e-5)
    assert (bias - old_bias).abs().tolist() == pytest.approx([0.02] * 2 * ACTION, rel=1e-4)


@pytest.mark.parametrize(
    "flags, target",
    [
        ({}, -2),
        (dict(target_entropy_scale=0.5), -1),
        (dict(target_entropy_scale=-1.5), 3),
        (dict(target_entropy=-7.5), -7.5),
        (dict(target_entropy=0.0), 0.0),
        (dict(target_entropy=3.0), 3.0),
        (dict(target_entropy=-7.5, target_entropy_scale=0.5), -7.5),
    ],
)
@pytest.mark.parametrize(
    "alpha_loss, factor, slope", [("log-alpha", math.log(0.5), 1), ("alpha", 0.5, 0.5)]
)
def test_target_entropy_and_the_loss_of_the_temperature(flags, target, alpha_loss, factor, slope):
    agent = constant_agent([1.0, 2.0], [1.0, 2.0], alpha_loss=alpha_loss, **flags)
    batch, noise = make_batch()
    loss = agent.update(batch, 0 * noise)["losses/alpha_loss"].item()
    (gradient,) = gradients(agent.alpha_optimizer)
    assert loss == pytest.approx(factor * (ENTROPY - target), rel=1e-6)
    assert gradient.item() == pytest.approx(slope * (ENTROPY - target), rel=1e-6)


# The policy's distribution ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw, share",
    [
        (-100, 0),
        (-1, (1 - math.tanh(1)) / 2),
        (0, 0.5),
        (0.5, (1 + math.tanh(0.5)) / 2),
        (100, 1),
    ],
)
def test_tanh_moves_the_log_std_between_its_bounds(raw, share):
    actor = actor_of(log_std="tanh", log_std_min=-5, log_std_max=1)
    set_policy(actor, 0.0, raw)
    noise = torch.tensor([[1.0], [0.0]]).double()
    action, log_prob = actor(torch.ones(2, OBS).double(), noise)
    log_std = -5 + 6 * share
    assert action[0].item() == pytest.approx(math.tanh(math.exp(log_std)), rel=1e-12)
    assert log_prob[1].item() == pytest.approx(-log_std - ENTROPY / ACTION, rel=1e-12)


@pytest.mark.parametrize(
    "raw, used", [(-9, -3), (-3.1, -3), (-2.9, -2.9), (0.9, 0.9), (1.1, 1), (9, 1)]
)
def test_clamp_holds_the_log_std_within_its_bounds(raw, used):
    actor = actor_of(log_std_min=-3, log_std_max=1)
    with torch.no_grad():
        actor.layers[-1].weight.zero_()
        actor.layers[-1].bias.copy_(torch.tensor([0.0, raw], dtype=torch.float64))
    log_prob = actor(torch.ones(1, OBS).double(), torch.zeros(1, 1).double())[1]
    assert log_prob.item() == pytest.approx(-used - ENTROPY / ACTION, rel=1e-12)


@pytest.mark.parametrize("heads, outputs", [("joint", 80), ("separate", 40)])
@pytest.mark.parametrize("init", ["xavier", "torch"])
def test_separate_heads_start_as_layers_of_their_own(heads, outputs, init):
    torch.manual_seed(0)
    layers = actor_of(5, 40, 64, heads=heads, init=init).layers
    assert layers[-1].weight.shape == (80, 64)
    halves = layers[-1].weight.chunk(2)
    last_bound = math.sqrt(6 / (64 + outputs)) if init == "xavier" else 1 / 8
    first_bound = math.sqrt(6 / (5 + 64)) if init == "xavier" else 5**-0.5
    check_uniform(halves[0], last_bound)
    check_uniform(halves[1], last_bound)
    check_uniform(layers[0].weight, first_bound)


@pytest.mark.parametrize("init", ["orthogonal", "normal"])
def test_separate_heads_of_other_laws_are_two_draws(init):
    torch.manual_seed(0)
    mean, log_std = actor_of(5, 8, 64, heads="separate", init=init).layers[-1].weight.chunk(2)
    assert not torch.equal(mean, log_std)


def test_separate_orthogonal_heads_are_orthogonal_each_by_itself():
    torch.manual_seed(0)
    layer = actor_of(5, 8, 64, heads="separate", init="orthogonal").layers[-1]
    mean, log_std = layer.weight.detach().chunk(2)
    same(mean @ mean.T, torch.eye(8).double(), 1e-5)
    same(log_std @ log_std.T, torch.eye(8).double(), 1e-5)
    assert (mean @ log_std.T).abs().max() > 0.05  # of one layer of 16 rows it would be zero


@pytest.mark.parametrize("u", [-10.0, -3.0, 0.0, 0.7, 5.0, 10.0])
def test_eps_correction_is_the_formula(u):
    actor = actor_of(tanh_correction="eps")
    set_policy(actor, u, 0.0)
    noise = torch.tensor([[0.3]]).double()
    log_prob = actor(torch.ones(1, OBS).double(), noise)[1].item()
    with mpmath.workdps(40):
        mean = mpmath.mpf(actor.layers[-1].bias[0].item())
        x = mpmath.mpf(noise.item())
        slope = 1 - mpmath.tanh(mean + x) ** 2 + mpmath.mpf("1e-6")
        expected = -(x**2) / 2 - mpmath.log(2 * mpmath.pi) / 2 - mpmath.log(slope)
    assert log_prob == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize(
    "u, missing, tolerance",
    [(-10, 4.8, 0.01), (-3, 0, 1e-3), (0, 0, 1e-3), (0.7, 0, 1e-3), (10, 4.8, 0.01)],
)
def test_eps_correction_is_wrong_where_tanh_saturates(u, missing, tolerance):
    results = []
    for correction in ("softplus", "eps"):
        actor = actor_of(tanh_correction=correction)
        set_policy(actor, float(u), 0.0)
        results.append(actor(torch.ones(1, OBS).double(), torch.zeros(1, 1).double())[1].item())
    assert results[0] - results[1] == pytest.approx(missing, abs=tolerance)


@pytest.mark.parametrize(
    "env_id, scale", [("Pendulum-v1", math.log(2)), (FIVES, math.log(2.5) + math.log(2))]
)
@pytest.mark.parametrize("scaled", [False, True])
def test_scaled_log_densities_are_those_of_the_environments_actions(trained, env_id, scale, scaled):
    update = trained(env_id, scaled_log_prob=scaled, hidden=16, learning_starts=50).updates[0]
    batch = update.batch
    in_unit_box = sac.Actor(batch.obs.shape[1], batch.action.shape[1], hidden=16)
    in_unit_box.load_state_dict(update.before.actor.state_dict())

    action, log_prob = update.before.actor(batch.obs, update.noise[1])
    same_action, unscaled = in_unit_box(batch.obs, update.noise[1])

    same(action, same_action)
    same(log_prob, unscaled - scaled * scale, 1e-6)
    entropy = update.losses["losses/entropy"].item()
    assert entropy == pytest.approx(-log_prob.mean().item(), abs=1e-6)


class Wrapped(gym.Wrapper):
    """Pendulum with actions in [-1, 1] by a wrapper of its own, and one that does nothing."""

    def __init__(self):
        super().__init__(gym.make("Pendulum-v1"))
        self.action_space = Box(np.float32([-1, 3]), np.float32([1, 3]))

    def step(self, action):
        return self.env.step(2 * action[:1])


gym.register("Wrapped-v0", entry_point=Wrapped)


def test_scaled_log_densities_are_those_of_the_actions_that_the_environment_is_given(trained):
    update = trained("Wrapped-v0", scaled_log_prob=True, hidden=16, learning_starts=50).updates[0]
    assert update.before.actor.log_scale == 0


def test_policy_l2_adds_the_parameters_to_the_gradient():
    plain = make_agent()
    with_l2 = make_agent(policy_l2=0.3)
    before = deepcopy(parameters(plain.actor))
    losses = plain.update(*make_batch())
    losses_with_l2 = with_l2.update(*make_batch())
    pairs = zip(gradients(plain.actor_optimizer), before)
    same(gradients(with_l2.actor_optimizer), [slope + 0.3 * p for slope, p in pairs], 1e-9)
    squares = sum(p.square().sum() for p in before).item()
    grown = losses_with_l2["losses/actor_loss"] - losses["losses/actor_loss"]
    assert grown.item() == pytest.approx(0.15 * squares)
    same(gradients(with_l2.critic_optimizer), gradients(plain.critic_optimizer), 1e-9)


# Networks -----------------------------------------------------------------------------------------


def perceptron(weights, biases, activation, layer_norm=False):
    """nn.Linear layers that copy weights (in, out) and biases, with what comes between them."""
    layers = []
    for weight, bias in zip(weights, biases):
        layer = nn.Linear(*weight.shape, dtype=weight.dtype)
        layer.weight.data = weight.detach().T.clone()
        layer.bias.data = bias.detach().flatten().clone()
        layers.append(layer)
        if layer_norm:
            layers.append(nn.LayerNorm(weight.shape[1], elementwise_affine=False))
        layers.append(getattr(nn, activation)())
    return nn.Sequential(*layers[: -1 - layer_norm])


SHAPES = pytest.mark.parametrize(
    "hidden, layers, activation, layer_norm",
    [
        (7, 1, "Tanh", False),
        (5, 3, "ELU", False),
        (8, 2, "GELU", False),
        (9, 2, "SiLU", True),
        (6, 4, "ReLU", True),
    ],
)


@SHAPES
@pytest.mark.parametrize("network", ["critics", "target_critics"])
def test_critics_of_any_shape_equal_plain_ones(network, hidden, layers, activation, layer_norm):
    flags = dict(hidden=hidden, layers=layers, activation=activation, layer_norm=layer_norm)
    critics = getattr(make_agent(n_critics=3, **flags), network)
    batch, _ = make_batch()
    q = critics(batch.obs, batch.action)

    widths = [OBS + ACTION, *[hidden] * layers, 1]
    shapes = [(3, *fans) for fans in itertools.pairwise(widths)]
    assert [tuple(weight.shape) for weight in critics.weights] == shapes
    obs_and_action = torch.cat([batch.obs, batch.action], dim=1)
    for c in range(3):
        weights = [weight[c] for weight in critics.weights]
        biases = [bias[c] for bias in critics.biases]
        plain = perceptron(weights, biases, activation, layer_norm)
        same(q[c], plain(obs_and_action)[:, 0], 1e-12)


@SHAPES
def test_policies_of_any_shape_equal_plain_ones(hidden, layers, activation, layer_norm):
    """Layer norm is for the critics alone."""
    flags = dict(hidden=hidden, layers=layers, activation=activation, layer_norm=layer_norm)
    actor = make_agent(**flags).actor
    batch, noise = make_batch()
    action, _ = actor(batch.obs, noise[0])

    own = parameters(actor)
    assert [len(bias) for bias in own[1::2]] == [hidden] * layers + [2 * ACTION]
    plain = perceptron([weight.T for weight in own[::2]], own[1::2], activation)
    mean, log_std = plain(batch.obs).split(ACTION, dim=1)
    same(action, (mean + log_std.exp() * noise[0]).tanh(), 1e-12)


def before_and_after(critics):
    """Pairs of what hidden layers give and what the activations after them get, in time."""
    given = []
    got = []
    linear = critics.linear

    def note(x, layer):
        result = linear(x, layer)
        given.append(result.detach())
        return result

    critics.linear = note
    critics.activation.register_forward_pre_hook(lambda _, inputs: got.append(inputs[0].detach()))
    return given, got


def test_layer_norm_leaves_each_row_mean_zero_and_variance_one():
    agent = make_agent(layer_norm=True, hidden=64)
    batch, _ = make_batch()
    _, normed = before_and_after(agent.critics)
    with torch.no_grad():
        agent.critics(100 * batch.obs, batch.action)
    assert [x.shape for x in normed] == [(2, ROWS, 64)] * 2
    for x in normed:
        same(x.mean(-1), torch.zeros(2, ROWS).double(), 1e-9)
        same(x.var(-1, unbiased=False), torch.ones(2, ROWS).double(), 1e-3)


def test_layer_norm_has_no_gain_to_learn():
    assert make_agent(layer_norm=True).state_dict().keys() == make_agent().state_dict().keys()


INITS = pytest.mark.parametrize("init", ["xavier", "torch", "orthogonal", "normal"])


def matrices(init):
    """Weights (in, out) and biases of each critic, of the value network and of the policy."""
    torch.manual_seed(0)
    flags = dict(init=init, n_critics=3, hidden=128, value_network=True)
    agent = sac.SAC(20, 12, sac.Args(**flags))
    found = []
    for network in (agent.critics, agent.value):
        for weight, bias in zip(network.weights, network.biases):
            found += zip(weight.detach(), bias.detach())
    layers = [p.detach() for p in agent.actor.parameters()]
    found += zip([weight.T for weight in layers[::2]], layers[1::2])
    assert len(found) == 3 * (3 + 1 + 1)
    return found


@INITS
def test_no_two_matrices_are_one_draw(init):
    starts = {tuple(weight.flatten()[:5].tolist()) for weight, _ in matrices(init)}
    assert len(starts) == 15


@pytest.mark.parametrize("init", ["xavier", "torch"])
def test_weights_are_uniform_within_the_bound_of_their_own_matrix(init):
    for weight, _ in matrices(init):
        fan_in, fan_out = weight.shape
        bound = math.sqrt(6 / (fan_in + fan_out)) if init == "xavier" else fan_in**-0.5
        check_uniform(weight, bound)


def test_weights_start_orthogonal():
    for weight, _ in matrices("orthogonal"):
        fan_in, fan_out = weight.shape
        small = weight if fan_in <= fan_out else weight.T
        same(small @ small.T, torch.eye(len(small)), 1e-4)


def test_weights_start_as_standard_normal_numbers():
    for weight, _ in matrices("normal"):
        size = weight.numel()
        assert abs(weight.mean()) < 4 / math.sqrt(size)
        assert abs(weight.var() - 1) < 4 * math.sqrt(2 / size)


@pytest.mark.parametrize("init", ["xavier", "orthogonal", "normal"])
def test_biases_start_at_zero(init):
    assert not any(bias.any() for _, bias in matrices(init))


def test_biases_of_torch_are_uniform_within_the_bound_of_the_weights():
    for weight, bias in matrices("torch"):
        bound = len(weight) ** -0.5
        assert 0 < bias.abs().max() <= bound
        if bias.numel() >= 100:
            check_uniform(bias, bound)


@INITS
def test_targets_start_as_copies(init):
    agent = sac.SAC(OBS, ACTION, sac.Args(init=init, value_network=True))
    same(parameters(agent.target_critics), parameters(agent.critics))
    same(parameters(agent.target_value), parameters(agent.value))


@pytest.fixture
def dropped(request):
    """All uses of hidden units in one update with dropout: targets, critics, policy."""
    p = request.param
    torch.manual_seed(0)
    agent = make_agent(dropout=p, hidden=200)
    pairs = []
    critics, targets = before_and_after(agent.critics), before_and_after(agent.target_critics)
    agent.update(*make_batch(rows=64))
    for before, after in (targets, critics):
        assert len(before) == len(after)
        pairs += zip(before, after)
    return SimpleNamespace(p=p, uses=pairs, left_out=[after == 0 for _, after in pairs])


SHARES = pytest.mark.parametrize("dropped", [0.01, 0.3], indirect=True)


@SHARES
def test_dropout_is_in_each_use_of_critics_and_targets(dropped):
    assert [after.shape for _, after in dropped.uses] == [(2, 64, 200)] * 6  # two layers each
    for zeros in dropped.left_out:
        deviation = abs(zeros.double().mean() - dropped.p)
        assert deviation < 4 * math.sqrt(dropped.p * (1 - dropped.p) / zeros.numel())


@SHARES
def test_dropout_scales_up_what_stays(dropped):
    for (before, after), zeros in zip(dropped.uses, dropped.left_out):
        same(after, before / (1 - dropped.p) * ~zeros, 1e-12)


@SHARES
def test_dropout_draws_each_use_and_each_critic_by_itself(dropped):
    pairs = list(itertools.combinations(dropped.left_out, 2))
    pairs.append(dropped.left_out[0])  # its two critics
    assert len(pairs) == 16
    for a, b in pairs:
        both = (a & b).double().mean()
        assert abs(both - dropped.p**2) < 4 * dropped.p / math.sqrt(a.numel())


def test_dropout_is_not_in_the_policy():
    agent = make_agent(dropout=0.5).float()
    obs = np.random.default_rng(0).normal(size=(4, OBS))
    first, again = (agent.act(obs, torch.ones(4, ACTION)) for _ in range(2))
    same(first, again)


def test_evaluations_with_dropout_repeat():
    args = sac.Args(dropout=0.5, env_id=FIVES, eval_episodes=2)
    agent = sac.SAC(2, 2, args)
    first, again = (sac.evaluate(agent, args, step=0, stochastic=True)[0] for _ in range(2))
    same(first, again)


def test_dropout_comes_before_the_norm():
    """As in DroQ (Hiraoka et al. 2022, arXiv 2110.02034)."""
    agent = make_agent(dropout=0.3, layer_norm=True, hidden=200)
    batch, _ = make_batch()
    given, got = before_and_after(agent.critics)
    agent.critics(batch.obs, batch.action)
    assert len(given) == len(got) == 2
    for before, after in zip(given, got):
        # Units left out are the norm's picture of zero, which is the same number in all of a row.
        picture = after.mode(-1, keepdim=True).values
        left_out = after == picture
        assert 0.2 < left_out.double().mean() < 0.4
        assert not (after == 0).any()
        same(after, F.layer_norm(before / 0.7 * ~left_out, (200,)), 1e-9)


def products(critics):
    """The weights of each product of hidden layers that follows."""
    used = []
    multiply = critics.multiply

    def note(x, weight):
        used.append(weight.detach())
        return multiply(x, weight)

    critics.multiply = note
    return used


@pytest.fixture
def normed_critics():
    """Critics of three different norms in each layer, whose power iterations have come to rest."""
    critics = make_agent(spectral_norm=True, n_critics=3, layers=2).critics
    batch, _ = make_batch()
    with torch.no_grad():
        for i, weight in enumerate(critics.weights):
            weight *= torch.tensor([0.2, 1.0, 7.0]).reshape(3, 1, 1) * (1 + i)
        for _ in range(100):
            critics(batch.obs, batch.action)
    return critics


def test_spectral_norm_makes_the_largest_singular_value_of_hidden_layers_one(normed_critics):
    batch, _ = make_batch()
    used = products(normed_critics)
    normed_critics(batch.obs, batch.action)
    assert len(used) == 2
    for weight, raw in zip(used, normed_critics.weights):
        before = torch.linalg.svdvals(raw.detach())[:, 0]
        assert (before - 1).abs().min() > 0.1
        largest = torch.linalg.svdvals(weight)[:, 0].tolist()
        assert largest == pytest.approx([1.0] * 3, rel=0.01)


def test_spectral_norm_in_values_and_gradients(normed_critics):
    """The output layer is as it is; gradients run through the norm as well."""
    batch, _ = make_batch()
    critics = normed_critics
    expected = []
    for c in range(3):
        x = torch.cat([batch.obs, batch.action], dim=1)
        for weight, bias in zip(critics.weights[:-1], critics.biases[:-1]):
            norm = torch.linalg.matrix_norm(weight[c], 2)
            x = (x @ (weight[c] / norm) + bias[c]).relu()
        expected.append((x @ critics.weights[-1][c] + critics.biases[-1][c])[:, 0])
    expected = torch.stack(expected)

    q = critics(batch.obs, batch.action)

    same(q, expected, 1e-3)
    slopes = torch.autograd.grad(q.sum(), parameters(critics))
    for ours, theirs in zip(slopes, torch.autograd.grad(expected.sum(), parameters(critics))):
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_spectral_norm_follows_the_weights_in_training(trained):
    seen = trained(spectral_norm=True, hidden=32, total=80, q_lr=1e-2)
    start = seen.updates[0].before.critics
    critics = seen.updates[-1].after.critics
    used = products(critics)
    critics(torch.randn(4, 2), torch.randn(4, 2))
    assert len(used) == 2
    for layer, weight in enumerate(used):
        largest = torch.linalg.svdvals(weight)[:, 0].tolist()
        assert largest == pytest.approx([1.0] * 2, rel=0.1)
        moved = torch.linalg.svdvals(critics.weights[layer].detach())[:, 0]
        still = torch.linalg.svdvals(start.weights[layer].detach())[:, 0]
        assert (moved - still).abs().min() > 0.2, "the weights have not moved enough to tell"


@pytest.mark.parametrize("flags", [{}, dict(value_network=True)], ids=["critics", "value"])
def test_hard_copies_are_as_normed_as_their_source(flags):
    agent = make_agent(spectral_norm=True, tau=1.0, target_network_frequency=40, q_lr=1e-2, **flags)
    target = agent.target_value if flags else agent.target_critics
    for i in range(40):
        agent.update(*make_batch(seed=i))
    batch, _ = make_batch()
    used = products(target)
    target(batch.obs) if flags else target(batch.obs, batch.action)
    assert used
    for weight in used:
        largest = torch.linalg.svdvals(weight)[:, 0].tolist()
        assert largest == pytest.approx([1.0] * len(largest), rel=0.002)


# Value network ------------------------------------------------------------------------------------


def value_agent():
    """Constant networks with V = 1.5, its slow copy 4, critics 2 and -3."""
    flags = dict(value_network=True, tau=0.1, q_lr=0.25, gamma=0.9)
    # The target critics must play no part.
    agent = constant_agent([2.0, -3.0], [1e9, 1e9], **flags)
    set_q(agent.value, [1.5])
    set_q(agent.target_value, [4.0])
    return agent


def test_with_a_value_network_its_slow_copy_makes_the_target():
    agent = value_agent()
    batch, noise = make_batch()
    losses = agent.update(batch, 0 * noise)
    y = batch.reward + 0.9 * (1 - batch.terminated) * 4  # without an entropy
    expected = ((2 - y).square() + (-3 - y).square()).mean().item() / 2
    assert losses["losses/target_q"].item() == pytest.approx(y.mean().item(), rel=1e-6)
    assert losses["losses/qf_loss"].item() == pytest.approx(expected, rel=1e-6)


def test_the_value_network_learns_the_soft_value_of_the_lowest_critic():
    agent = value_agent()
    batch, noise = make_batch()
    losses = []
    step = agent.value_optimizer.minimize

    def minimize(loss):
        losses.append(loss.item())
        step(loss)

    agent.value_optimizer.minimize = minimize
    agent.update(batch, 0 * noise)
    assert losses == pytest.approx([(1.5 - (-3 + 0.5 * ENTROPY)) ** 2], rel=1e-6)
    assert agent.value.biases[-1].item() == pytest.approx(1.25, rel=1e-6)


def test_the_slow_copy_of_the_value_network_moves_by_tau_towards_the_new_one():
    agent = value_agent()
    batch, noise = make_batch()
    agent.update(batch, 0 * noise)
    expected = 4 + 0.1 * (1.25 - 4)
    assert agent.target_value.biases[-1].item() == pytest.approx(expected, rel=1e-6)


def test_the_value_network_sees_the_state_alone():
    agent = make_agent(value_network=True)
    batch, _ = make_batch()
    assert agent.value.weights[0].shape == (1, OBS, 16)
    weights = [weight[0] for weight in agent.value.weights]
    biases = [bias[0] for bias in agent.value.biases]
    same(agent.value(batch.obs), perceptron(weights, biases, "ReLU")(batch.obs)[:, 0], 1e-12)


def test_each_parameter_has_one_optimizer():
    agent = make_agent(value_network=True)
    optimized = []
    for network in ("critic", "actor", "alpha", "value"):
        optimized += getattr(agent, f"{network}_optimizer").params
    assert len({id(p) for p in optimized}) == len(optimized)  # none has two
    learned = {id(p) for p in agent.parameters() if p.requires_grad}
    assert learned == {id(p) for p in optimized}  # and none has none


def test_no_network_collects_anothers_gradients():
    agent = make_agent(value_network=True)
    networks = ("critic", "actor", "alpha", "value")
    parts = {name: getattr(agent, f"{name}_optimizer").params for name in networks}
    parts["target critics"] = parameters(agent.target_critics.requires_grad_(True))
    parts["target value"] = parameters(agent.target_value.requires_grad_(True))
    reached = {}

    def spy_on(network):
        def minimize(loss):
            reached[network] = set()
            for name, part in parts.items():
                slopes = torch.autograd.grad(loss, part, retain_graph=True, allow_unused=True)
                if any(slope is not None for slope in slopes):
                    reached[network].add(name)

        getattr(agent, f"{network}_optimizer").minimize = minimize

    for network in networks:
        spy_on(network)
    agent.update(*make_batch())

    own = {name: {name} for name in networks}
    assert reached == own | {"actor": {"actor", "critic"}}  # whose loss leads through the critics
    assert all(p.grad is None for p in agent.parameters())


# Reward and data ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_reward_scale_is_for_replay_alone(trained, scale):
    seen = trained(reward_scale=scale)
    time = seen.stored.next_obs[:, 1]
    np.testing.assert_array_equal(seen.stored.reward, scale * time)
    np.testing.assert_array_equal(seen.records["charts/episodic_return"][1], [15] * 12)


def test_reward_scale_changes_no_action_before_learning(trained):
    plain = trained()
    scaled = trained(reward_scale=5.0)
    same(scaled.stored.obs[:30], plain.stored.obs[:30])
    same(scaled.stored.action[:30], plain.stored.action[:30])


@pytest.mark.parametrize("ends", [False, True])
def test_time_limits_end_the_task_if_asked(trained, ends):
    stored = trained(truncation_terminates=ends).stored
    fifth = stored.next_obs[:, 1] == 5
    odd = stored.obs[:, 0] % 2 == 1
    assert fifth.sum() == 12
    np.testing.assert_array_equal(stored.terminated == 1, fifth & (ends | odd))


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("random_steps, first", [(-1, 30), (0, 0), (12, 12), (30, 30), (45, 45)])
def test_random_steps_are_apart_from_learning_starts(trained, random_steps, first, num_envs):
    seen = trained(random_steps=random_steps, num_envs=num_envs, hidden=16)
    assert [act.count for act in seen.acts] == list(range(first, 60, num_envs))
    acts = np.concatenate([act.action for act in seen.acts])
    np.testing.assert_array_equal(seen.stored.action[first:], acts)
    assert [update.count for update in seen.updates] == [
        step // num_envs * num_envs for step in range(30, 60)
    ]
    if first:
        assert np.abs(seen.stored.action[:first]).max() > 0.8


# Replay -------------------------------------------------------------------------------------------


def filled(added, capacity=40, chunk=3, **flags):
    """A buffer to which so many transitions came, `chunk` at a time; rewards are their numbers."""
    args = sac.Args(num_envs=chunk, **flags)
    buffer = sac.ReplayBuffer(capacity, 1, 1, args=args)
    for start in range(0, added, chunk):
        number = np.arange(start, start + chunk, dtype=float)
        buffer.add(number[:, None], number[:, None], number, number, number[:, None])
    return buffer


def priorities(buffer):
    """Those of the filled rows, to read and to write."""
    return buffer.rows[: len(buffer), -1]


@pytest.mark.parametrize("added", [3, 24, 39, 42, 75])
@pytest.mark.parametrize("prioritized", [False, True])
def test_combined_replay_adds_the_newest_of_each_environment_to_a_uniform_batch(added, prioritized):
    flags = dict(combined_replay=True, prioritized_replay=prioritized, batch_size=16)
    buffer = filled(added, **flags)
    random = torch.Generator().manual_seed(0)
    batches = [buffer[buffer.sample_index(16, random)].reward.numpy() for _ in range(300)]
    newest = {added - 1, added - 2, added - 3}
    kept = range(max(0, added - 40), added)
    counts = np.array([(np.stack(batches) == number).sum() for number in kept])
    assert counts.sum() == 300 * 16
    assert all(newest <= set(batch) for batch in batches)
    counts[-3:] -= 300
    check_law(counts, [300 * 13 / len(counts)] * len(counts))


def test_combined_replay_with_more_environments_than_rows_in_a_batch():
    buffer = filled(20, chunk=10, combined_replay=True, batch_size=4)
    batch = buffer[buffer.sample_index(4, torch.Generator())]
    assert set(batch.reward.tolist()) == {16, 17, 18, 19}


@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("num_envs, buffer_size", [(1, 1000), (4, 1000), (4, 21)])
def test_in_training_each_batch_holds_the_newest_transitions(
    trained, num_envs, buffer_size, prioritized
):
    flags = dict(num_envs=num_envs, buffer_size=buffer_size, prioritized_replay=prioritized)
    seen = trained("Pendulum-v1", combined_replay=True, hidden=16, **flags)
    assert len(seen.updates) == 30
    for update in seen.updates:
        numbers = range(update.count - num_envs, update.count)
        newest = {number % len(seen.buffer.rows) for number in numbers}
        assert newest <= set(update.index.tolist())
    assert len(set(seen.updates[-1].index.tolist())) > num_envs


PRIORITIZED = pytest.mark.parametrize("added, combined", [(24, False), (75, False), (75, True)])


def prioritized_buffer(added, combined):
    """A buffer with random priorities, and each row's probability."""
    flags = dict(combined_replay=combined, batch_size=32, total_timesteps=300)
    buffer = filled(added, prioritized_replay=True, **flags)
    errors = 5 * torch.rand(len(buffer), generator=torch.Generator().manual_seed(1))
    priorities(buffer).copy_(errors + 0.1)
    powers = (errors.double() + 0.1) ** 0.7
    return buffer, (powers / powers.sum()).numpy()


@PRIORITIZED
def test_priorities_are_probabilities(added, combined):
    buffer, probabilities = prioritized_buffer(added, combined)
    random = torch.Generator()
    counts = np.zeros(len(buffer))
    for _ in range(200):
        index = buffer.sample_index(32, random).numpy()  # with replacement, though there are more
        counts += np.bincount(index, minlength=len(buffer))
    by_priority = 32
    if combined:
        newest = (added - 1 - np.arange(3)) % 40
        counts[newest] -= 200
        by_priority = 29
    check_law(counts, 200 * by_priority * probabilities)


@PRIORITIZED
def test_weights_undo_the_probabilities(added, combined):
    buffer, probabilities = prioritized_buffer(added, combined)
    random = torch.Generator()
    beta = 0.5 + 0.5 * added / 300
    for _ in range(200):
        index = buffer.sample_index(32, random).numpy()
        weight = (len(buffer) * probabilities[index]) ** -beta
        np.testing.assert_allclose(
            buffer.importance_weights.numpy(), weight / weight.max(), rtol=1e-5
        )
        assert buffer.importance_weights.max() == 1
        assert buffer.importance_weights.dtype == torch.float32


@pytest.mark.parametrize(
    "added, repeat, copies, beta",
    [
        (3, 1, 0, 0.5 + 0.5 * 3 / 90),
        (45, 1, 0, 0.75),
        (90, 1, 0, 1.0),
        (45, 2, 0, 1.0),
        (90, 1, 1, 0.75),
    ],
)
def test_beta_goes_from_one_half_to_one(added, repeat, copies, beta):
    """With the steps made, of which hindsight stores copies."""
    flags = dict(batch_size=64, total_timesteps=90, action_repeat=repeat, hindsight=copies)
    buffer = filled(added, capacity=100, prioritized_replay=True, **flags)
    priorities(buffer).copy_(torch.linspace(0.1, 3, len(buffer)))
    index = buffer.sample_index(64, torch.Generator())
    powers = priorities(buffer)[index].double() ** 0.7
    same(buffer.importance_weights.double(), (powers / powers.min()) ** -beta, 1e-5)


def test_the_first_transitions_get_priority_one():
    assert (priorities(filled(6, prioritized_replay=True)) == 1).all()


@pytest.mark.parametrize("before", [[0.3, 0.1, 7.5, 2.0, 0.2, 0.5], [0.2] * 6])
def test_new_transitions_get_the_highest_priority_so_far(before):
    buffer = filled(6, prioritized_replay=True)
    priorities(buffer).copy_(torch.tensor(before))
    new = np.zeros((2, 1))
    buffer.add(new, new, new[:, 0], new[:, 0], new)
    assert len(buffer) == 8
    assert priorities(buffer)[6:].tolist() == pytest.approx([max(before)] * 2)
    assert buffer[torch.tensor([6])].next_obs.shape == (1, 1)


def td_errors(agent, batch, noise):
    """|Q - y| of each critic (C, B)."""
    alpha = agent.log_alpha.exp()
    next_action, log_prob = agent.actor(batch.next_obs, noise)
    next_q = agent.target_critics(batch.next_obs, next_action).min(0).values
    y = batch.reward + 0.99 * (1 - batch.terminated) * (next_q - alpha * log_prob)
    return (agent.critics(batch.obs, batch.action) - y).abs().detach()


@pytest.mark.parametrize("combined", [False, True])
def test_in_training_the_rows_drawn_take_their_errors_as_priorities(trained, combined):
    flags = dict(combined_replay=combined, n_critics=3, hidden=16, copies=True)
    seen = trained("Pendulum-v1", prioritized_replay=True, **flags)
    assert len(seen.updates) == 30
    assert (seen.updates[0].priorities == 1).all()
    later = [update.priorities for update in seen.updates[1:]] + [priorities(seen.buffer)]
    for update, after in zip(seen.updates, later):
        errors = td_errors(update.before, update.batch, update.noise[0]).mean(0)
        expected = update.priorities.clone()
        places = update.index.tolist()
        expected[update.index] = errors + 0.1
        # One that was drawn twice has either error.
        certain = [place for place in range(len(expected)) if places.count(place) < 2]
        same(after[certain], expected[certain], 1e-5)
        assert len(after) == len(expected) + 1
        assert after[-1] == after[:-1].max()


@pytest.mark.parametrize("combined", [False, True])
def test_in_training_the_loss_counts_by_the_weights_of_its_batch(trained, combined):
    flags = dict(combined_replay=combined, n_critics=3, hidden=16, copies=True)
    seen = trained("Pendulum-v1", prioritized_replay=True, **flags)
    assert len(seen.updates) == 30
    for update in seen.updates:
        powers = update.priorities[update.index].double() ** 0.7
        beta = 0.5 + 0.5 * update.count / 60
        same(update.weight.double(), (powers / powers.min()) ** -beta, 1e-5)
        errors = td_errors(update.before, update.batch, update.noise[0])
        loss = (update.weight * errors**2).mean().item()
        assert update.losses["losses/qf_loss"].item() == pytest.approx(loss, rel=1e-5)
    assert not any("td_error" in key for key in seen.records)


def test_errors_that_are_no_numbers_leave_priorities_to_draw_by():
    """So that a run that diverges lives to say so."""
    buffer = filled(6, prioritized_replay=True)
    buffer.set_priorities(torch.tensor([1, 4]), torch.tensor([math.nan, math.inf]))
    assert len(buffer.sample_index(256, torch.Generator().manual_seed(0))) == 256


def test_the_weighted_loss_by_hand():
    agent = constant_agent([2.0, -3.0], [5.0, 4.0], prioritized_replay=True)
    batch, noise = make_batch()
    weight = torch.linspace(0.2, 1, ROWS).double()
    losses = agent.update(batch, 0 * noise, 1, weight)
    y = batch.reward + 0.99 * (1 - batch.terminated) * (4 + 0.5 * ENTROPY)
    expected = (weight * ((2 - y) ** 2 + (-3 - y) ** 2) / 2).mean().item()
    slopes = torch.stack([(weight * (q - y)).mean() for q in (2.0, -3.0)])
    assert losses["losses/qf_loss"].item() == pytest.approx(expected, rel=1e-6)
    same(losses["td_error"], ((2 - y).abs() + (-3 - y).abs()) / 2, 1e-6)
    same(gradients(agent.critic_optimizer)[-1].flatten(), slopes, 1e-6)


# When updates come --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("num_envs", [1, 4])
@pytest.mark.parametrize("interval", [1, 20, 50])
@pytest.mark.parametrize("per_step", [0.5, 1.0, 2.0])
def test_number_and_moments_of_updates(trained, per_step, interval, num_envs):
    flags = dict(updates_per_step=per_step, update_interval=interval, num_envs=num_envs)
    seen = trained(total=120, learning_starts=32, hidden=4, layers=1, **flags)
    owed = 0.0
    expected = []
    for step in range(1, 121):  # one at a time; the updates of a round come before its steps
        if step > 32 and (step - 32) % interval == 0:
            owed += per_step * interval
        round_starts = (step - 1) // num_envs * num_envs
        expected += [round_starts] * int(owed)
        owed -= int(owed)
    assert [update.count for update in seen.updates] == expected
    assert len(expected) == per_step * (88 // interval * interval)


@pytest.mark.parametrize("frequency, tau", [(1, 0.1), (2, 0.1), (3, 1.0), (5, 0.3)])
@pytest.mark.parametrize("flags", [{}, dict(value_network=True)], ids=["critics", "value"])
def test_targets_rest_between_their_moves(frequency, tau, flags):
    agent = make_agent(target_network_frequency=frequency, tau=tau, **flags)
    pairs = [(agent.target_critics, agent.critics)]
    if flags:
        pairs.append((agent.target_value, agent.value))
    for i in range(1, 11):
        before = [deepcopy(parameters(target)) for target, _ in pairs]
        agent.update(*make_batch(seed=i))
        for old, (target, source) in zip(before, pairs):
            step = 0 if i % frequency else tau
            new = parameters(source)
            expected = [a + step * (b - a) for a, b in zip(old, new)]
            same(parameters(target), expected, 1e-8)
            if step in (0, 1):
                same(parameters(target), old if step == 0 else new)


# Normalized observations --------------------------------------------------------------------------

NORMALIZED = dict(env_id="Pendulum-v1", hidden=16, random_steps=20, checkpoint_frequency=25)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_normalization_has_the_moments_of_all_that_the_policy_was_fed(trained, num_envs):
    seen = trained(normalize_obs=True, num_envs=num_envs, **NORMALIZED)
    fed = seen.stored.obs.astype(float)
    moments = seen.final["moments"]
    count, mean, square = (moments / moments[0]).numpy()
    assert moments[0].tolist() == [len(fed)] * 3 == [60] * 3
    np.testing.assert_allclose(mean, fed.mean(0), rtol=1e-9)
    np.testing.assert_allclose(square - mean**2, fed.var(0), rtol=1e-9)


def test_replay_holds_what_the_environment_said(trained):
    seen = trained(normalize_obs=True, **NORMALIZED)
    plain = trained(**NORMALIZED)
    same(seen.stored.obs[:20], plain.stored.obs[:20])
    same(seen.stored.next_obs[:19], plain.stored.next_obs[:19])


def test_evaluations_are_not_counted_for_the_normalization(trained):
    seen = trained(normalize_obs=True, **NORMALIZED)
    flags = dict(eval_frequency=20, eval_episodes=1)
    evaluated = trained(normalize_obs=True, **flags, **NORMALIZED)
    assert len(evaluated.evaluations) == 3
    same(evaluated.final, seen.final)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_the_policy_acts_on_the_statistics_so_far(trained, num_envs):
    seen = trained(normalize_obs=True, num_envs=num_envs, copies=True, **NORMALIZED)
    fed = seen.stored.obs.astype(float)
    agents = {update.count: update.before for update in reversed(seen.updates)}
    checked = [act for act in seen.acts if act.count in agents]
    assert len(checked) == 30 // num_envs
    for act in checked:
        so_far = fed[: act.count + num_envs]  # this observation's included
        obs = np.clip((act.obs - so_far.mean(0)) / so_far.std(0), -5, 5)
        # The first of a round's updates starts from the agent that acted.
        action, _ = agents[act.count].actor(torch.from_numpy(obs).float(), act.noise)
        np.testing.assert_allclose(act.action, action.detach(), atol=1e-4)


def test_a_normalization_that_saw_nothing_yet_is_finite():
    """As in the checkpoint before the first step."""
    agent = sac.SAC(OBS, ACTION, sac.Args(normalize_obs=True))
    action = agent.act(np.ones((1, OBS), dtype=np.float32), torch.zeros(1, ACTION))
    assert np.isfinite(action).all()


@pytest.fixture
def observed():
    """A hundred observations, whose third dimension is constant."""
    observed = 3 + 2 * np.random.default_rng(0).normal(size=(100, OBS))
    observed[:, 2] = 0.7
    return observed


def test_normalized_observations_are_clipped(observed):
    agent = make_agent(normalize_obs=True)
    agent.observe(observed[:60])
    agent.observe(observed[60:])
    extreme = np.array([[1e6, -1e6, 0.7], [3, 4, 0.7 + 2e-6], [3, 4, 5.0]])
    result = agent.normalize(torch.from_numpy(extreme))
    std = np.maximum(observed.std(0), 1e-6)
    expected = np.clip((extreme - observed.mean(0)) / std, -5, 5)
    same(result, torch.from_numpy(expected), 1e-6)
    assert result[0].tolist() == pytest.approx([5, -5, 0], abs=1e-6)


def test_normalized_observations_are_what_updates_use(observed):
    agent = make_agent(normalize_obs=True)
    agent.observe(observed)
    batch, noise = make_batch()
    seen = []
    for network in (agent.actor, agent.critics, agent.target_critics):
        network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    agent.update(batch, noise)
    obs = agent.normalize(batch.obs)
    next_obs = agent.normalize(batch.next_obs)
    assert not torch.equal(obs, batch.obs)
    # Policy and targets; critics; policy and critics.
    same(seen, [next_obs, next_obs, obs, obs, obs])


# Stacked observations, repeated actions -----------------------------------------------------------


def test_stack_holds_the_newest_observations_and_zeros_before_the_first():
    env = sac.make_env(sac.Args(env_id=FIVES, stack=3))
    assert env.observation_space.shape == (6,)
    assert env.reset(seed=0)[0].tolist() == [0, 0, 0, 0, 1, 0]
    action = np.zeros(2, np.float32)
    assert env.step(action)[0].tolist() == [0, 0, 1, 0, 1, 1]
    assert env.step(action)[0].tolist() == [1, 0, 1, 1, 1, 2]
    assert env.step(action)[0].tolist() == [1, 1, 1, 2, 1, 3]


@pytest.mark.parametrize("num_envs", [1, 4])
def test_stacks_are_stored_whole_and_no_stack_crosses_an_episode(trained, num_envs):
    stored = trained(stack=3, num_envs=num_envs, hidden=16).stored
    obs = stored.obs.reshape(-1, num_envs, 6)
    next_obs = stored.next_obs.reshape(-1, num_envs, 6)
    rounds = len(obs)
    assert rounds == 60 // num_envs
    np.testing.assert_array_equal(next_obs[..., :4], obs[..., 2:])
    episode, t = next_obs[..., 4:].transpose(2, 0, 1)
    expected_t = np.tile(np.arange(rounds) % 5 + 1, (num_envs, 1)).T
    np.testing.assert_array_equal(t, expected_t)
    going = t[:-1] < 5
    np.testing.assert_array_equal(obs[1:][going], next_obs[:-1][going])
    first = obs[1:][~going]
    assert len(first)
    np.testing.assert_array_equal(first[:, :4], 0)
    next_episode = episode[:-1][~going] + 1
    np.testing.assert_array_equal(first[:, 4:], np.stack([next_episode, 0 * next_episode], axis=1))


@pytest.mark.parametrize("num_envs", [1, 2])
def test_action_repeat_sums_rewards_until_the_end(trained, num_envs):
    stored = trained(action_repeat=2, num_envs=num_envs, hidden=16).stored
    assert len(stored.reward) == 30
    rounds = 30 // num_envs
    for column, expected in [
        (stored.reward, [1 + 2, 3 + 4, 5]),
        (stored.obs[:, 1], [0, 2, 4]),
        (stored.next_obs[:, 1], [2, 4, 5]),
    ]:
        of_first_env = column.reshape(rounds, num_envs)[:, 0]
        np.testing.assert_array_equal(of_first_env, np.tile(expected, 10)[:rounds])
    ends = (stored.next_obs[:, 1] == 5) & (stored.obs[:, 0] % 2 == 1)
    np.testing.assert_array_equal(stored.terminated == 1, ends)


@pytest.mark.parametrize("num_envs", [1, 2])
def test_with_action_repeat_the_environments_steps_are_counted(trained, num_envs):
    flags = dict(eval_frequency=60, eval_episodes=2, log_frequency=4, learning_starts=32)
    seen = trained(action_repeat=2, num_envs=num_envs, hidden=16, **flags)
    assert seen.acts[0].count == 32 // 2  # acting begins after as many environment steps
    assert len(seen.updates) == 14  # one per action after 32 steps
    assert seen.evaluations[0].tolist() == [15, 15]
    assert set(seen.records["charts/episodic_return"][1]) == {15}
    # Three actions: one that is cut short counts as a whole.
    assert set(seen.records["charts/episodic_length"][1]) == {6}
    steps = seen.records["losses/qf_loss"][0]
    assert steps[-1] == 60
    assert (np.diff(steps) == 4).all()


# Presets ------------------------------------------------------------------------------------------

PRESETS = {
    "haarnoja": dict(
        learning_starts=1000,
        autotune=False,
        reward_scale=5,
        q_lr=3e-4,
    ),
    "stable-baselines": dict(
        random_steps=0,
        learning_starts=100,
        buffer_size=500_000,
        batch_size=64,
        hidden=64,
        q_lr=3e-4,
        heads="separate",
    ),
    "spinningup": dict(
        random_steps=10_000,
        learning_starts=1000,
        batch_size=100,
        autotune=False,
        alpha=0.2,
        policy_lr=1e-3,
        update_interval=50,
        init="torch",
        heads="separate",
    ),
    "yarats": dict(
        batch_size=1024,
        hidden=1024,
        alpha=0.1,
        log_std="tanh",
        log_std_min=-5,
        init="torch",
        policy_lr=1e-4,
        q_lr=1e-4,
        target_network_frequency=2,
    ),
    "deepunity": dict(
        activation="Tanh",
        hidden=64,
        batch_size=128,
        learning_starts=1024,
        update_interval=64,
        updates_per_step=1 / 64,
        autotune=False,
        alpha=0.2,
        q_lr=3e-4,
    ),
    "lunarlander": dict(
        value_network=True,
        hidden=200,
        batch_size=200,
        buffer_size=50_000,
        policy_lr=3e-3,
        q_lr=3e-3,
        reward_scale=40,
        autotune=False,
        learning_starts=20_000,
    ),
}
EACH_FLAG = [(name, key) for name, flags in PRESETS.items() for key in flags]


def parsed(monkeypatch, *arguments):
    """What the command line says."""
    monkeypatch.setattr(sys, "argv", ["sac_ablations.py", *arguments])
    args, _ = sac.parse_args()
    return args


def test_these_are_all_presets():
    assert PRESETS.keys() == sac.PRESETS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_other_defaults(monkeypatch, name):
    assert parsed(monkeypatch, "--preset", name) == sac.Args(preset=name, **PRESETS[name])


def test_no_preset_is_no_other_default(monkeypatch):
    assert parsed(monkeypatch, "--preset", "none") == parsed(monkeypatch) == sac.Args()


@pytest.mark.parametrize("name, key", EACH_FLAG)
def test_a_flag_beside_a_preset_wins_on_either_side(monkeypatch, name, key):
    other = "joint" if key == "heads" else getattr(sac.Args, key)
    assert other != PRESETS[name][key]
    expected = sac.Args(preset=name, **PRESETS[name] | {key: other})
    flag = words(**{key: other})
    assert parsed(monkeypatch, *flag, "--preset", name) == expected
    assert parsed(monkeypatch, "--preset", name, *flag) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_makes_real_updates(trained, name):
    total = 180 if name == "deepunity" else 102
    flags = dict(total=total, learning_starts=51, batch_size=16, log_frequency=10)
    seen = trained("Pendulum-v1", preset=name, **flags)
    assert len(seen.updates) == {"spinningup": 50, "deepunity": 2}.get(name, 51)
    assert finite(seen)
    fixed = name in ("haarnoja", "spinningup", "deepunity", "lunarlander")
    assert unchanged(seen) == ({"log_alpha"} if fixed else set())
    alpha = seen.updates[0].before.log_alpha.exp().item()
    assert alpha == pytest.approx(PRESETS[name].get("alpha", 1.0))
    assert len(seen.acts) == {"stable-baselines": 102, "spinningup": 0}.get(name, total - 51)


# Mistakes -----------------------------------------------------------------------------------------


def refusal(monkeypatch, capsys, folder, *arguments):
    """What stderr shows of a run that must not begin."""
    small = dict(total_timesteps=40, learning_starts=30, batch_size=8, eval_frequency=0)
    flags = words(env_id=FIVES, threads=1, cuda=False, **small)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["sac_ablations.py", *flags, *arguments])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as caught:
        sac.main()
    assert caught.value.code == 2
    assert not list(folder.iterdir())
    return capsys.readouterr().err


OUT_OF_BOUNDS = "n-critics=0 policy-frequency=0 hidden=0 layers=0 stack=0 update-interval=0 "
OUT_OF_BOUNDS += "action-repeat=0 target-network-frequency=0 alpha=0 alpha=-1 alpha=nan "
OUT_OF_BOUNDS += "reward-scale=0 updates-per-step=0 dropout=-0.1 dropout=1 policy-l2=-1 "
OUT_OF_BOUNDS += "critics-subset=-1 alpha-lr=-1 random-steps=-2 "
OUT_OF_BOUNDS += "target-entropy=nan target-entropy-scale=inf log-std-min=-101 log-std-max=101"


@pytest.mark.parametrize("flag", OUT_OF_BOUNDS.split())
def test_values_out_of_bounds_are_refused_in_one_line(monkeypatch, capsys, tmp_path, flag):
    name, value = flag.split("=")
    err = refusal(monkeypatch, capsys, tmp_path, f"--{flag}")
    assert err.startswith(f"error: --{name} {value}")
    assert "must be between" in err
    assert err.count("\n") == 1


def test_bounds_of_the_log_std_the_wrong_way_round_are_refused(monkeypatch, capsys, tmp_path):
    err = refusal(monkeypatch, capsys, tmp_path, "--log-std-min=1", "--log-std-max=0")
    assert err.startswith("error: --log-std-min 1.0 must not exceed --log-std-max (0.0)")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "flags, mend",
    [
        ("--update-interval=100", r"no update .*--update-interval \(100\)"),
        ("--updates-per-step=0.01", "no update .*end: raise --updates-per-step or --total-"),
        ("--total-timesteps=2e7 --target-network-frequency=2", "--target-network-frequency 2 "),
        ("--total-timesteps=2e7 --buffer-size=2e7 --prioritized-replay", "lower --buffer-size"),
        ("--critics-subset=3", r"--critics-subset 3 .*--n-critics \(2\): lower"),
        ("--value-network --critics-subset=1", "--value-network, .*or add --no-value-network"),
        ("--no-autotune --alpha-lr=1e-3", "--alpha-lr is .*leave it out or add --autotune"),
        ("--no-autotune --target-entropy=-3", "--target-entropy is .*learned temperature"),
        ("--preset=spinningup --target-entropy-scale=2", "--target-entropy-scale is "),
        ("--target-entropy=-3 --target-entropy-scale=2", "--target-entropy-scale .*leave it or"),
        ("--no-autotune --alpha-loss=alpha", "--alpha-loss is .*leave it"),
        ("--hindsight-strategy=final", "--hindsight-strategy needs .*add --hindsight 1"),
        ("--hold-noise=3 --random-steps=0", "--hold-noise .* none: raise --random-steps"),
        ("--no-compensate", "--no-compensate is .*add --policy-frequency 2"),
    ],
)
def test_what_could_not_work_is_refused_in_one_line(monkeypatch, capsys, tmp_path, flags, mend):
    err = refusal(monkeypatch, capsys, tmp_path, *flags.split())
    assert re.fullmatch(f"error: .*{mend}.*\n", err), err


def test_an_update_in_the_last_round_is_one_wherever_the_round_ends():
    args = sac.Args(action_repeat=4, learning_starts=5000, total_timesteps=5002)
    sac.check_flags(args)  # does not say that no update comes
    rounds = range(0, args.total_timesteps, 4)
    assert [len(sac.updates_due(args, step)) for step in rounds] == [0] * 1250 + [1]


@pytest.mark.parametrize(
    "flags, mend",
    [
        ("--preset=spinningup --alpha-lr=1e-3", "--autotune"),
        ("--preset=lunarlander --critics-subset=2", "--no-value-network"),
    ],
)
def test_what_a_preset_brings_along_can_be_taken_back(monkeypatch, capsys, tmp_path, flags, mend):
    words = f"{flags} --total-timesteps 1e6".split()
    assert f"add {mend}\n" in refusal(monkeypatch, capsys, tmp_path, *words)
    monkeypatch.setattr(sys, "argv", ["sac_ablations.py", *words, mend])
    sac.check_flags(sac.parse_args()[0])


CHOICES = "preset init activation log-std heads tanh-correction alpha-loss".split()


@pytest.mark.parametrize("flag", CHOICES)
def test_unknown_choices_are_refused(monkeypatch, capsys, tmp_path, flag):
    assert f"--{flag}" in refusal(monkeypatch, capsys, tmp_path, f"--{flag}=unheard-of")


# Compiled -----------------------------------------------------------------------------------------

TRACED = [
    dict(n_critics=5, critics_subset=2, target_network_frequency=2, tau=1.0),
    dict(policy_frequency=3, layers=1, init="torch"),
    dict(value_network=True, activation="SiLU", layers=3),
    dict(spectral_norm=True, activation="ELU", init="orthogonal"),
    dict(dropout=0.1, layer_norm=True, activation="GELU", heads="separate"),
    dict(autotune=False, log_std="tanh", tanh_correction="eps", policy_l2=1e-3)
    | dict(alpha_loss="alpha", activation="Tanh"),
    dict(normalize_obs=True, prioritized_replay=True),
    dict(n_step=3, clip_targets=True),
]


@pytest.fixture
def traced(monkeypatch):
    """torch.compile traces and runs the graphs as they are: all of compiling but the C++."""
    compile = torch.compile
    functions = []

    def traced_compile(function, *, fullgraph, dynamic, options):
        functions.append(function)
        return compile(function, backend="aot_eager", fullgraph=fullgraph, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", traced_compile)
    yield functions
    torch._dynamo.reset()
    torch._dynamo.config.trace_autograd_ops = False


def learner(agent, args, compiled):
    """learn() and act() of an agent with a buffer of 20 rows, and the buffer."""
    buffer = sac.ReplayBuffer(20, OBS, ACTION, args=args)
    batch, _ = make_batch(rows=20)
    steps = np.arange(len(batch.obs)) % args.n_step + 1
    buffer.add(*(column.numpy() for column in batch), steps)
    if args.prioritized_replay:
        buffer.importance_weights.copy_(torch.linspace(0.1, 1, ROWS))
    how = dataclasses.replace(args, compile="on" if compiled else "off")
    return *sac.compile_update(how, agent, buffer), buffer


@pytest.mark.slow
@pytest.mark.parametrize("flags", TRACED, ids=named)
def test_every_variant_traces_whole_and_computes_the_same(flags, traced):
    args = sac.Args(hidden=16, batch_size=ROWS, **flags)
    torch.manual_seed(0)
    agent = sac.SAC(OBS, ACTION, args)
    agent.actor.log_scale = 0.5
    if args.normalize_obs:
        agent.observe(np.random.default_rng(0).normal(size=(9, OBS)))
    compiled_agent = deepcopy(agent)
    learn, act, _ = learner(agent, args, compiled=False)
    compiled_learn, compiled_act, _ = learner(compiled_agent, args, compiled=True)
    policy_updates = [3, 0, 0, 3] if args.policy_frequency == 3 else [1, 1]

    for step, number in enumerate(policy_updates):
        random = torch.Generator().manual_seed(step)
        noise = torch.randn((1 + number, ROWS, ACTION), generator=random)
        index = torch.randint(20, (ROWS,), generator=random)
        torch.manual_seed(step)
        expected = learn(index, noise, number)
        torch.manual_seed(step)
        losses = compiled_learn(index, noise, number)
        same(losses, expected, 1e-4)

    pairs = zip(agent.named_parameters(), compiled_agent.parameters())
    for (name, expected), parameter in pairs:
        torch.testing.assert_close(parameter, expected, rtol=1e-2, atol=1e-4, msg=name)
    obs = np.ones((2, OBS), dtype=np.float32)
    noise = torch.ones(2, ACTION)
    same(compiled_act(obs, noise), compiled_agent.act(obs, noise), 1e-5)
    assert len(traced) == 2


OUTSIDE = "n_critics alpha alpha_lr target_entropy target_entropy_scale log_std_min log_std_max "
OUTSIDE += "hidden compensate scaled_log_prob reward_scale random_steps truncation_terminates "
OUTSIDE += "combined_replay updates_per_step update_interval stack action_repeat preset "
OUTSIDE += "hindsight hindsight_strategy hold_noise"


@pytest.mark.parametrize("name", sorted(DEFAULTS.keys() - set(OUTSIDE.split())))
def test_every_flag_of_the_agent_is_among_the_traced(name):
    """The others are numbers, or act on environments, replay and the number of updates."""
    assert any(name in flags for flags in TRACED)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    "flags",
    [
        dict(n_critics=5, critics_subset=2),
        # A policy that acts there need be no graph a second time: none does.
        dict(policy_frequency=2, prioritized_replay=True, combined_replay=True)
        | dict(layers=1, random_steps=60),
    ],
    ids=named,
)
def test_compiled_for_real(tmp_path, flags):
    shared = dict(env_id="Pendulum-v1", total_timesteps=42, log_frequency=10, hidden=32)
    shared |= dict(checkpoint_frequency=20, learning_starts=30, batch_size=8, threads=1)
    shared |= dict(eval_frequency=0, cuda=False)
    ends = []
    for how in ("off", "on"):
        folder = tmp_path / how
        folder.mkdir()
        result = run_forked(folder, sac, " ".join(words(compile=how, **shared, **flags)))
        assert result.code == 0, result.err
        assert saved_args(only_run(folder))["compile"] == how
        ends.append(load(only_run(folder) / "checkpoint.pt"))
    eager, compiled = ends
    for name in ("critic_optimizer.steps", "actor_optimizer.steps"):
        assert compiled["agent"][name] == eager["agent"][name] == 12
    assert all(value.isfinite().all() for value in compiled["agent"].values())
    columns = 3 + 1 + 1 + 1 + 3  # without priorities
    same(compiled["rows"][:30, :columns], eager["rows"][:30, :columns])
    if "critics_subset" not in flags:  # compiled code draws numbers of its own
        weights = [name for name in eager["agent"] if "optimizer" not in name]
        assert weights
        for name in weights:
            expected = eager["agent"][name]
            torch.testing.assert_close(compiled["agent"][name], expected, rtol=0.02, atol=1e-3)


# Killed and resumed -------------------------------------------------------------------------------

RESUMED = "--env-id Pendulum-v1 --total-timesteps 300 --learning-starts 120 --batch-size 16 "
RESUMED += (
    "--checkpoint-frequency 60 --log-frequency 20 --threads 1 --hidden 16 --eval-frequency 0 "
)
RESUMED += "--no-cuda"


def kill_at_step(n):
    """Sabotage: the process dies when it stores for the n-th time."""

    def sabotage(script):
        add = script.ReplayBuffer.add
        calls = []

        def sabotaged(*args):
            calls.append(args)
            if len(calls) == n:
                os.kill(os.getpid(), signal.SIGKILL)
            add(*args)

        script.ReplayBuffer.add = sabotaged

    return sabotage


def end_of(folder):
    """The last checkpoint of a run, and its TensorBoard curves but for the speed."""
    records = sac.read_records(only_run(folder))
    del records["charts/SPS"]
    assert records["losses/qf_loss"].size
    return load(only_run(folder) / "checkpoint.pt"), records


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, stride",
    [
        ("--prioritized-replay --combined-replay --num-envs 2", 2),
        ("--normalize-obs --stack 3 --action-repeat 2 --random-steps 150", 2),
        ("--spectral-norm --preset yarats --hidden 16", 1),
        ("--dropout 0.1 --n-critics 5 --critics-subset 2 --layer-norm", 1),
        # With episodes that end.
        ("--value-network --truncation-terminates --reward-scale 2 --env-id Hopper-v4", 1),
        (
            "--policy-frequency 2 --target-network-frequency 3 --update-interval 28 "
            "--updates-per-step 0.7 --num-envs 4",
            4,
        ),
    ],
)
def test_killed_and_resumed_is_never_killed(tmp_path, flags, stride):
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    kill = kill_at_step(100 // stride)

    result = run_forked(whole, sac, f"{RESUMED} {flags}")
    assert result.code == 0, result.err
    assert run_forked(killed, sac, f"{RESUMED} {flags}", kill).code == -signal.SIGKILL
    resume = f"--resume {only_run(killed)}"
    for _ in range(2):  # from step 60, then from step 120, where updates began
        wait_for_the_next_second(only_run(killed))
        assert run_forked(killed, sac, resume, kill).code == -signal.SIGKILL
    wait_for_the_next_second(only_run(killed))
    result = run_forked(killed, sac, resume)

    assert result.code == 0, result.err
    # Checkpoints 60 steps apart cut the episodes: that is said at each start, and nothing else is.
    warnings = re.findall(r"warning: (.*)", result.out + result.err)
    assert [line for line in warnings if " cuts episodes of " not in line] == []
    assert end_of(whole)[0]["step"] == 300
    same(end_of(killed), end_of(whole))
