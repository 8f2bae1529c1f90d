"""sac_ablations.py: with no knob set it is sac_continuous.py to the last bit; each knob does what it says.

What a knob does is held against numbers worked out by hand, plain torch.nn, mpmath, NumPy, or the law of what is drawn.
What main() makes of it is seen in runs of a few dozen steps, many of them on Toy, whose observations and rewards count.
"""

import dataclasses
import itertools
import json
import math
import os
import shutil
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
from gymnasium.spaces import Box
from matplotlib.figure import Figure

import sac_ablations as sac
import sac_continuous as parent
import test_resume

torch.set_num_threads(1)
OBS, ACTION, ROWS = 3, 2, 6
ENTROPY = ACTION * 0.9189385332046727  # of an action at noise zero, mean zero and log std zero: log(2 pi) / 2 each
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
KNOBS = {
    f.name: f for f in dataclasses.fields(sac.Args) if f.name not in {f.name for f in dataclasses.fields(parent.Args)}
}


class Toy(gym.Env):
    """Observes the numbers of its episode and step; step t pays t; the fifth ends an episode, the task at odd ones."""

    observation_space, action_space = Box(-np.inf, np.inf, (2,)), Box(np.float32([0, -3]), np.float32([5, 1]))
    episode = 0

    def reset(self, *, seed=None, options=None):
        self.episode, self.t = self.episode + 1, 0
        return np.float32([self.episode, self.t]), {}

    def step(self, action):
        self.t += 1
        ends = self.t == 5
        return np.float32([self.episode, self.t]), float(self.t), ends and self.episode % 2 == 1, ends, {}


gym.register("AblationToy-v0", entry_point=Toy)
TOY = "AblationToy-v0"


def arguments(**flags) -> list[str]:
    dashed = {key.replace("_", "-"): value for key, value in flags.items()}
    return [f"--{'' if v else 'no-'}{k}" if isinstance(v, bool) else f"--{k}={v}" for k, v in dashed.items()]


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Function that trains with main() in an empty folder, at the given flags, and tells what it saw there."""

    def run(env_id=TOY, total=60, script=sac, spy=True, copies=False, **flags) -> SimpleNamespace:
        flags = dict(learning_starts=30, batch_size=8, eval_frequency=0, threads=1, cuda=False) | flags
        seen, update, act = SimpleNamespace(updates=[], acts=[], evals=[]), script.SAC.update, script.SAC.act
        evaluate = script.evaluate

        class Buffer(script.ReplayBuffer):
            def __init__(self, *args):
                super().__init__(*args)
                seen.buffer = self

            def sample(self, *args):
                seen.priorities, seen.index = self.rows[: len(self), -1].clone(), super().sample(*args)
                return seen.index

        def spy_update(agent, batch, noise, *weight):
            before = deepcopy(agent) if copies or not seen.updates else None
            losses = update(agent, batch, noise, *weight)
            after = deepcopy(agent) if copies else agent
            looks = dict(before=before, after=after, losses=losses, seed=torch.initial_seed())
            looks |= dict(batch=batch, noise=noise, index=seen.index, priorities=seen.priorities)
            looks |= dict(weight=weight[0].clone() if weight else None, count=seen.buffer.count)
            seen.updates.append(SimpleNamespace(**looks))
            return losses

        def spy_act(agent, obs, noise):
            action = act(agent, obs, noise)
            seen.acts.append(SimpleNamespace(count=seen.buffer.count, obs=obs, noise=noise, action=action))
            return action

        def spy_evaluate(*args, **kwargs):
            acts = seen.acts.copy()
            seen.evals.append(evaluate(*args, **kwargs))
            seen.acts = acts  # those of training alone
            return seen.evals[-1]

        with monkeypatch.context() as patch:
            patch.chdir(tempfile.mkdtemp(dir=tmp_path))
            patch.setattr(sys, "argv", ["sac", *arguments(env_id=env_id, total_timesteps=total, **flags)])
            patch.setattr(script, "ReplayBuffer", Buffer)
            patch.setattr(Figure, "savefig", lambda *args, **kwargs: None)  # it takes longer than the training
            patch.setattr(signal, "signal", lambda *args: None)  # Ctrl-C remains pytest's
            if spy:
                patch.setattr(script.SAC, "update", spy_update)
                patch.setattr(script.SAC, "act", spy_act)
                patch.setattr(script, "evaluate", spy_evaluate)
            script.main()
            (folder,) = (Path.cwd() / "runs").iterdir()
        seen.final = torch.load(folder / "model.pt", weights_only=True)["agent"]
        seen.rows, seen.records = seen.buffer.rows[: len(seen.buffer)], script.read_records(folder)
        seen.args, seen.folder = json.loads((folder / "args.json").read_text()), folder
        return seen

    return run


def make_agent(**knobs) -> sac.SAC:
    """An agent as in the midst of training: target critics apart from the critics, no bias at zero."""
    torch.manual_seed(0)
    agent = sac.SAC(OBS, ACTION, sac.Args(**dict(hidden=16, alpha=0.5) | knobs)).double()
    with torch.no_grad():
        for p in [*agent.actor.parameters(), *agent.critics.parameters(), *agent.target_critics.parameters()]:
            p += 0.05 * torch.randn_like(p)
    return agent


def make_batch(rows=ROWS, policy=1, seed=0) -> tuple[sac.Batch, torch.Tensor]:
    """A batch with ended and unended rows, and the noise of one update with so many of the policy."""
    random = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=random, dtype=torch.float64)
    obs, action, reward, next_obs = normal(rows, OBS), normal(rows, ACTION).tanh(), normal(rows), normal(rows, OBS)
    ended = (torch.arange(rows) % 3 == 1).double()
    return sac.Batch(obs, action, reward, ended, next_obs), normal(1 + policy, rows, ACTION)


def as_float(batch: sac.Batch, noise: torch.Tensor) -> tuple[sac.Batch, torch.Tensor]:
    return sac.Batch(*(column.float() for column in batch)), noise.float()


def set_value(critics: sac.Critics, values):
    """Make each critic this constant."""
    with torch.no_grad():
        for p in critics.parameters():
            p.zero_()
        critics.biases[-1].copy_(torch.tensor(values)[:, None, None])


def set_policy(actor: sac.Actor, mean: float, log_std: float):
    """Make the policy this Gaussian under the tanh in each dimension, for every observation."""
    *_, weight, bias = actor.parameters()
    with torch.no_grad():
        weight.zero_()
        bias.copy_(torch.tensor([mean, log_std], dtype=torch.float64).repeat_interleave(len(bias) // 2))


def steady(q, slow, **knobs) -> sac.SAC:
    """An agent of constant networks; with noise zero the log-density of its actions is -ENTROPY."""
    agent = make_agent(n_critics=len(q), **knobs)
    set_policy(agent.actor, 0.0, 0.0)
    set_value(agent.critics, q)
    set_value(agent.target_critics, slow)
    return agent


def gradients(optimizer: sac.Adam) -> list[torch.Tensor]:
    """What the optimizer got at its first step: its running mean is then a tenth of the gradient."""
    return [mean / 0.1 for mean in optimizer.mean]


def same(result, expected, tolerance=1e-9):
    torch.testing.assert_close(list(result), list(expected), rtol=tolerance, atol=tolerance)


def check_law(counts, expected):
    """Pearson's chi-square within four sigmas of its mean."""
    counts, expected, freedom = np.asarray(counts, float), np.asarray(expected, float), len(counts) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 4 * math.sqrt(2 * freedom), (counts, expected)


def check_uniform(drawn: torch.Tensor, bound: float):
    """A sample of the uniform law within +-bound, by its extremes and Kolmogorov's distance."""
    drawn = drawn.detach().flatten().sort().values / bound
    most = 1 - 20 / len(drawn)  # all of them lie below it once in exp(10) samples
    assert most < drawn.max() <= 1 + 1e-6 and -most > drawn.min() >= -1 - 1e-6
    ranks = (torch.arange(len(drawn)) + 0.5) / len(drawn)
    assert ((drawn + 1) / 2 - ranks).abs().max() < 2 / math.sqrt(len(drawn))


# Identity


@pytest.mark.parametrize("num_envs", [1, 4])
def test_without_a_knob_it_is_the_parent_bit_for_bit(train, num_envs):
    flags = dict(env_id="Hopper-v4", total=300, learning_starts=80, num_envs=num_envs, eval_frequency=100)
    flags |= dict(eval_episodes=1, batch_size=32, log_frequency=20, checkpoint_frequency=130)
    expected = train(script=parent, **flags)
    defaults = {name: knob.default for name, knob in KNOBS.items()}
    in_other_words = dict(random_steps=80, alpha_lr=3e-4, target_entropy=-3.0)
    for knobs in ({}, defaults, in_other_words):
        seen = train(**flags, **knobs)
        assert seen.final["critic_optimizer.steps"] == 220
        assert seen.final.keys() == expected.final.keys()
        assert all(torch.equal(value, expected.final[name]) for name, value in seen.final.items())
        assert torch.equal(seen.rows, expected.rows)
        np.testing.assert_array_equal(seen.evals, expected.evals)
        assert seen.records.keys() == expected.records.keys()
        for key in seen.records.keys() - {"charts/SPS"}:
            np.testing.assert_array_equal(seen.records[key], expected.records[key])


# Each value of each knob

EACH = [dict(n_critics=1), dict(n_critics=5), dict(n_critics=4, critics_subset=2), dict(policy_frequency=2)]
EACH += [dict(policy_frequency=3, compensate=False), dict(autotune=False), dict(alpha=0.2), dict(alpha_lr=1e-2)]
EACH += [dict(target_entropy=-0.5), dict(target_entropy_scale=0.5), dict(alpha_loss="alpha"), dict(log_std="tanh")]
EACH += [dict(log_std_min=-0.1), dict(log_std_max=0.1), dict(heads="separate"), dict(tanh_correction="eps")]
EACH += [dict(scaled_log_prob=True), dict(policy_l2=1e-3), dict(hidden=64), dict(layers=1), dict(layers=3)]
EACH += [dict(init=name) for name in ("torch", "orthogonal", "normal")]
EACH += [dict(activation=name) for name in ("Tanh", "ELU", "GELU", "SiLU")]
EACH += [dict(layer_norm=True), dict(dropout=0.1), dict(spectral_norm=True), dict(value_network=True)]
EACH += [dict(reward_scale=5.0), dict(random_steps=0), dict(random_steps=50), dict(truncation_terminates=True)]
EACH += [dict(combined_replay=True), dict(prioritized_replay=True), dict(combined_replay=True, prioritized_replay=True)]
EACH += [dict(updates_per_step=0.5), dict(updates_per_step=2.0), dict(update_interval=5), dict(normalize_obs=True)]
EACH += [dict(target_network_frequency=2), dict(stack=3), dict(action_repeat=2)]
RUNS = {}  # those of no knob


@pytest.mark.parametrize("knobs", EACH, ids=lambda knobs: ",".join(f"{k}={v}" for k, v in knobs.items()))
def test_each_value_of_each_knob_makes_real_updates_of_its_own(train, knobs):
    if "plain" not in RUNS:
        RUNS["plain"] = train(total=42, hidden=32).final
    seen = train(total=42, log_frequency=10, **dict(hidden=32) | knobs)
    factor = knobs.get("updates_per_step", 1) / knobs.get("action_repeat", 1)
    assert len(seen.updates) == factor * (12 - 12 % knobs.get("update_interval", 1))
    assert all(value.isfinite().all() for u in seen.updates for value in u.losses.values())
    initial = seen.updates[0].before.state_dict()
    still = {name for name, value in seen.final.items() if torch.equal(value, initial[name])}
    assert still == ({"log_alpha"} if "autotune" in knobs else set())
    plain = RUNS["plain"]
    assert seen.final.keys() != plain.keys() or any(
        value.shape != plain[name].shape or not torch.equal(value, plain[name]) for name, value in seen.final.items()
    ), "as if the knob were not there"


def test_each_knob_and_each_choice_is_among_them():
    hints = typing.get_type_hints(sac.Args)
    for name, knob in KNOBS.items():
        values = {knobs[name] for knobs in EACH if name in knobs}
        choices = set(typing.get_args(hints[name])) if typing.get_origin(hints[name]) is typing.Literal else {None}
        assert name == "preset" or values and (choices == {None} or values == choices - {knob.default}), name


# Critics


@pytest.mark.parametrize("n", [1, 2, 3, 5, 10])
def test_target_and_policy_take_the_minimum_over_all_critics(n):
    batch, noise = make_batch()
    for lowest in range(n):
        q, slow = (np.roll(np.arange(n) * scale - 2.0, place).tolist() for scale, place in [(1, -lowest), (3, lowest)])
        agent = steady(q, slow, gamma=0.9)
        losses = agent.update(batch, 0 * noise)
        y = batch.reward + 0.9 * (1 - batch.terminated) * (-2 + 0.5 * ENTROPY)
        stepped = agent.critics.biases[-1].flatten()
        expected = dict(target_q=y.mean(), qf_loss=sum((value - y).square().mean() for value in q) / n)
        expected = {key: value.item() for key, value in expected.items()}
        expected |= dict(qf1_values=q[0], actor_loss=-0.5 * ENTROPY - stepped.min().item())
        assert {key: losses[f"losses/{key}"].item() for key in expected} == pytest.approx(expected, rel=1e-6)
        assert (stepped - torch.tensor(q)).abs().tolist() == pytest.approx([1e-3] * n, rel=1e-4)


class Table(nn.Module):
    """Critics that answer with these Q-values (C, B), whatever they are asked."""

    def __init__(self, q: torch.Tensor):
        super().__init__()
        self.q = nn.Parameter(q)

    def forward(self, obs, action):
        return self.q


@pytest.mark.parametrize("n, subset", [(2, 1), (5, 2), (4, 3), (10, 2), (3, 3)])
def test_the_target_is_the_minimum_over_a_subset_drawn_anew_all_of_them_as_likely(n, subset):
    """In row c of the batch critic c alone says -1: the rows where the target is -1 are the subset."""
    agent = make_agent(n_critics=n, critics_subset=subset, gamma=1.0, alpha=1e-12, hidden=2, layers=1)
    agent.critics, agent.target_critics = Table(torch.zeros(n, n).double()), Table(-torch.eye(n).double())
    agent.actor_optimizer.minimize = agent.alpha_optimizer.minimize = lambda loss: None
    agent.tau, counts, zero, drawn = 0.0, {}, torch.zeros(n).double(), []
    batch = sac.Batch(torch.zeros(n, OBS).double(), None, zero, zero, torch.zeros(n, OBS).double())

    def minimize(loss):
        y = -torch.autograd.grad(loss, agent.critics.q)[0] * n * n / 2
        same(y, y[:1].expand(n, -1), 1e-12)  # one target for all critics
        drawn.append(tuple((y[0] < -0.5).nonzero().flatten().tolist()))
        assert y[0].tolist() == pytest.approx([-1.0 if c in drawn[-1] else 0.0 for c in range(n)], abs=1e-9)

    agent.critic_optimizer.minimize = minimize
    for _ in range(1000):
        agent.update(batch, torch.zeros(2, n, ACTION).double())
    counts = [drawn.count(chosen) for chosen in itertools.combinations(range(n), subset)]
    assert sum(counts) == 1000  # each was of the size asked for
    if len(counts) > 1:
        check_law(counts, [1000 / len(counts)] * len(counts))


@pytest.mark.parametrize("n, subset", [(2, 1), (5, 2), (3, 3)])
def test_with_a_subset_the_policy_follows_the_mean_of_all_critics(n, subset):
    """As in REDQ (Chen et al. 2021, arXiv 2101.05982)."""
    agent, (batch, noise) = steady([3.0**c for c in range(n)], [0.0] * n, critics_subset=subset), make_batch()
    loss = agent.update(batch, 0 * noise)["losses/actor_loss"].item()
    assert loss == pytest.approx(-0.5 * ENTROPY - agent.critics.biases[-1].mean().item(), rel=1e-6)


@pytest.mark.parametrize("knobs", [dict(n_critics=5, critics_subset=2), dict(dropout=0.2)], ids=str)
def test_in_training_each_update_draws_its_own_subset_and_units(train, knobs):
    first, again, other = (train(hidden=16, seed=seed, **knobs) for seed in (1, 1, 2))
    assert len({u.seed for u in first.updates}) == 30
    assert [u.seed for u in first.updates] == [u.seed for u in again.updates]
    assert not {u.seed for u in first.updates} & {u.seed for u in other.updates}


# Delay


@pytest.mark.parametrize("frequency, compensate", [(1, True), (2, True), (3, True), (2, False), (3, False)])
def test_policy_and_temperature_wait_and_make_up_for_it_if_asked(train, frequency, compensate):
    seen = train(policy_frequency=frequency, compensate=compensate, hidden=16, copies=True)
    at_once, steps = frequency if compensate else 1, []
    for i, u in enumerate(seen.updates):
        due = at_once * (i % frequency == 0)
        steps.append([getattr(u.after, f"{name}_optimizer").steps.item() for name in ("critic", "actor", "alpha")])
        assert np.subtract(steps[-1], steps[-2] if i else 0).tolist() == [1, due, due]
        assert len(u.noise) == 1 + due
        for part in ("actor", "critics", "target_critics"):
            pairs = zip(getattr(u.before, part).parameters(), getattr(u.after, part).parameters())
            assert all(torch.equal(a, b) != (due > 0 or part != "actor") for a, b in pairs)
        assert (u.before.log_alpha == u.after.log_alpha) == (due == 0)
        assert ("losses/actor_loss" in u.losses) == (due > 0)
    assert len(steps) == 30 and steps[-1][1] == (30 if compensate else 30 // frequency)


def test_updates_of_the_policy_at_once_are_updates_one_after_the_other():
    """Each with its own noise, at the critics of the last step; alpha is that of the update's beginning."""
    at_once, one_by_one = (make_agent(policy_lr=1e-2, policy_frequency=3) for _ in range(2))
    batch, noise = make_batch(policy=3)
    losses = at_once.update(batch, noise)
    first = one_by_one.update(batch, noise[:2])
    one_by_one.critic_optimizer.minimize = lambda loss: None
    one_by_one.tau, temperature = 0.0, one_by_one.log_alpha
    for i in (2, 3):
        one_by_one.log_alpha = nn.Parameter(torch.tensor(0.5).log().double())  # the policy's; the true one apart
        one_by_one.alpha_optimizer.targets = [temperature]
        one_by_one.alpha_optimizer.minimize, step = lambda loss: None, one_by_one.alpha_optimizer.minimize
        last = one_by_one.update(batch, noise[[0, i]])
        one_by_one.alpha_optimizer.minimize = step
        one_by_one.alpha_optimizer.minimize(temperature * (last["losses/entropy"] + ACTION))
    same(at_once.actor.parameters(), one_by_one.actor.parameters(), 1e-12)
    same([at_once.log_alpha], [temperature], 1e-12)
    same([losses["losses/entropy"], losses["losses/qf_loss"]], [last["losses/entropy"], first["losses/qf_loss"]], 1e-12)


# Temperature


def test_a_fixed_temperature_stays_and_is_the_one_used():
    agent, (batch, noise) = steady([2.0, -3.0], [5.0, 4.0], autotune=False, alpha=0.3), make_batch()
    before, y = agent.log_alpha.item(), batch.reward + 0.99 * (1 - batch.terminated) * (4 + 0.3 * ENTROPY)
    losses = agent.update(batch, 0 * noise)
    assert losses["losses/target_q"].item() == pytest.approx(y.mean().item(), rel=1e-6)
    assert losses["losses/actor_loss"].item() == pytest.approx(-0.3 * ENTROPY - agent.critics.biases[-1].min().item())
    for seed in range(20):
        assert agent.update(*make_batch(seed=seed))["losses/alpha"].item() == pytest.approx(0.3, rel=1e-6)
    assert agent.log_alpha.item() == before == pytest.approx(math.log(0.3), rel=1e-6)


@pytest.mark.parametrize("alpha", [1.0, 0.2, 3.0])
def test_learning_of_the_temperature_starts_at_alpha(alpha):
    agent = make_agent(alpha=alpha)
    assert agent.update(*make_batch())["losses/alpha"].item() == pytest.approx(alpha, rel=1e-6)
    assert agent.log_alpha.item() != pytest.approx(math.log(alpha), abs=1e-5)


@pytest.mark.parametrize("alpha_lr, length", [(0.0, 0.02), (0.05, 0.05)])
def test_the_temperature_has_a_learning_rate_of_its_own(alpha_lr, length):
    agent = make_agent(alpha_lr=alpha_lr, policy_lr=0.02)
    before = deepcopy(agent)
    agent.update(*make_batch())  # Adam's first step is as long as its rate
    assert abs(agent.log_alpha - before.log_alpha).item() == pytest.approx(length, rel=1e-5)
    bias, old = list(agent.actor.parameters())[-1], list(before.actor.parameters())[-1]
    assert (bias - old).abs().tolist() == pytest.approx([0.02] * 2 * ACTION, rel=1e-4)


@pytest.mark.parametrize(
    "knobs, target",
    [({}, -2), (dict(target_entropy_scale=0.5), -1), (dict(target_entropy_scale=-1.5), 3)]
    + [(dict(target_entropy=t), t) for t in (-7.5, 0.0, 3.0)]
    + [(dict(target_entropy=-7.5, target_entropy_scale=0.5), -7.5)],
)
@pytest.mark.parametrize("factor", ["log-alpha", "alpha"])
def test_target_entropy_and_the_loss_of_the_temperature(knobs, target, factor):
    agent = steady([1.0, 2.0], [1.0, 2.0], alpha_loss=factor, **knobs)
    batch, noise = make_batch()
    loss = agent.update(batch, 0 * noise)["losses/alpha_loss"].item()
    assert loss == pytest.approx((0.5 if factor == "alpha" else math.log(0.5)) * (ENTROPY - target), rel=1e-6)
    slope = (0.5 if factor == "alpha" else 1) * (ENTROPY - target)
    assert gradients(agent.alpha_optimizer)[0].item() == pytest.approx(slope, rel=1e-6)


# Head


@pytest.mark.parametrize("raw, share", [(-100, 0), (-1, (1 - math.tanh(1)) / 2), (0, 0.5), (0.5, None), (100, 1)])
def test_tanh_moves_the_log_std_between_its_bounds(raw, share):
    share = (math.tanh(raw) + 1) / 2 if share is None else share
    actor = sac.Actor(OBS, 1, knobs=sac.Args(log_std="tanh", log_std_min=-5, log_std_max=1)).double()
    set_policy(actor, 0.0, raw)
    action, log_prob = actor(torch.ones(2, OBS).double(), torch.tensor([[1.0], [0.0]]).double())
    assert action[0].item() == pytest.approx(math.tanh(math.exp(-5 + 6 * share)), rel=1e-12)
    assert log_prob[1].item() == pytest.approx(-(-5 + 6 * share) - ENTROPY / ACTION, rel=1e-12)


@pytest.mark.parametrize("raw, used", [(-9, -3), (-3.1, -3), (-2.9, -2.9), (0.9, 0.9), (1.1, 1), (9, 1)])
def test_clamp_holds_the_log_std_within_its_bounds(raw, used):
    actor = sac.Actor(OBS, 1, knobs=sac.Args(log_std_min=-3, log_std_max=1)).double()
    set_policy(actor, 0.0, raw)
    log_prob = actor(torch.ones(1, OBS).double(), torch.zeros(1, 1).double())[1]
    assert log_prob.item() == pytest.approx(-used - ENTROPY / ACTION, rel=1e-12)


@pytest.mark.parametrize("heads, init", [*itertools.product(["joint", "separate"], ["xavier", "torch"])])
def test_separate_heads_start_as_layers_of_their_own(heads, init):
    torch.manual_seed(0)
    actor = sac.Actor(5, 40, 64, sac.Args(heads=heads, init=init))
    outputs = 40 if heads == "separate" else 80
    for half in actor.layers[-1].weight.chunk(2):
        check_uniform(half, math.sqrt(6 / (64 + outputs)) if init == "xavier" else 1 / 8)
    check_uniform(actor.layers[0].weight, math.sqrt(6 / (5 + 64)) if init == "xavier" else 5**-0.5)
    assert actor.layers[-1].weight.shape == (80, 64)


@pytest.mark.parametrize("init", ["orthogonal", "normal"])
def test_separate_heads_of_other_laws(init):
    torch.manual_seed(0)
    actor = sac.Actor(5, 8, 64, sac.Args(heads="separate", init=init))
    mean, log_std = actor.layers[-1].weight.detach().chunk(2)
    assert not torch.equal(mean, log_std)
    if init == "orthogonal":
        same(mean @ mean.T, torch.eye(8), 1e-5)
        same(log_std @ log_std.T, torch.eye(8), 1e-5)
        assert (mean @ log_std.T).abs().max() > 0.05  # of one layer of 16 rows it would be zero


@pytest.mark.parametrize("u", [-10.0, -3.0, 0.0, 0.7, 5.0, 10.0])
def test_eps_correction_is_the_formula_and_wrong_where_tanh_saturates(u):
    actors = [sac.Actor(OBS, 1, knobs=sac.Args(tanh_correction=name)).double() for name in ("eps", "softplus")]
    for actor in actors:
        set_policy(actor, u, 0.0)
    obs, noise = torch.ones(1, OBS).double(), torch.tensor([[0.3]]).double()
    with mpmath.workdps(40):
        x = mpmath.mpf(noise.item())
        slope = 1 - mpmath.tanh(u + x) ** 2 + mpmath.mpf("1e-6")
        expected = -(x**2) / 2 - mpmath.log(2 * mpmath.pi) / 2 - mpmath.log(slope)
    assert actors[0](obs, noise)[1].item() == pytest.approx(float(expected), rel=1e-9)
    eps, exact = (actor(obs, 0 * noise)[1].item() for actor in actors)
    if abs(u) == 10:
        assert exact - eps == pytest.approx(4.8, abs=0.01)
    elif abs(u) < 4:
        assert exact == pytest.approx(eps, abs=1e-3)


@pytest.mark.parametrize("env_id, scale", [("Pendulum-v1", math.log(2)), (TOY, math.log(2.5) + math.log(2))])
def test_scaled_log_densities_are_those_of_the_environments_actions(train, env_id, scale):
    for scaled in (False, True):
        (u, *_) = train(env_id, scaled_log_prob=scaled, hidden=16, learning_starts=50).updates
        plain = sac.Actor(*map(lambda column: column.shape[1], u.batch[:2]), hidden=16)  # knows no environment
        plain.load_state_dict(u.before.actor.state_dict())
        (a, log_prob), (b, unscaled) = u.before.actor(u.batch.obs, u.noise[1]), plain(u.batch.obs, u.noise[1])
        assert torch.equal(a, b)
        same(log_prob, unscaled - scaled * scale, 1e-6)
        assert u.losses["losses/entropy"].item() == pytest.approx(-log_prob.mean().item(), abs=1e-6)


def test_policy_l2_adds_the_parameters_to_the_gradient():
    plain, with_l2, data = make_agent(), make_agent(policy_l2=0.3), make_batch()
    parameters = deepcopy(list(plain.actor.parameters()))
    losses, more = plain.update(*data), with_l2.update(*data)
    pairs = zip(gradients(plain.actor_optimizer), parameters)
    same(gradients(with_l2.actor_optimizer), [gradient + 0.3 * p for gradient, p in pairs])
    squares = sum(p.square().sum() for p in parameters).item()
    grown = (more["losses/actor_loss"] - losses["losses/actor_loss"]).item()
    assert grown == pytest.approx(0.15 * squares)
    same(gradients(with_l2.critic_optimizer), gradients(plain.critic_optimizer))


# Networks


def plain_layers(weights, biases, activation, layer_norm=False) -> nn.Sequential:
    """nn.Linear layers that copy weights (in, out) and biases, with what comes between them."""
    layers = []
    for weight, bias in zip(weights, biases):
        layer = nn.Linear(*weight.shape, dtype=weight.dtype)
        layer.weight.data, layer.bias.data = weight.detach().T.clone(), bias.detach().flatten().clone()
        norm = [nn.LayerNorm(weight.shape[1], elementwise_affine=False)] if layer_norm else []
        layers += [layer, *norm, getattr(nn, activation)()]
    return nn.Sequential(*layers[: -1 - layer_norm])


@pytest.mark.parametrize(
    "hidden, layers, activation, layer_norm",
    [(7, 1, "Tanh", False), (5, 3, "ELU", False), (8, 2, "GELU", False), (9, 2, "SiLU", True), (6, 4, "ReLU", True)],
)
def test_networks_of_any_shape_equal_plain_ones(hidden, layers, activation, layer_norm):
    knobs = dict(hidden=hidden, layers=layers, activation=activation, layer_norm=layer_norm, n_critics=3)
    agent, (batch, noise) = make_agent(**knobs), make_batch()
    x = torch.cat([batch.obs, batch.action], dim=1)
    for critics in (agent.critics, agent.target_critics):
        assert [tuple(w.shape) for w in critics.weights] == [
            (3, *fans) for fans in itertools.pairwise([OBS + ACTION] + [hidden] * layers + [1])
        ]
        for c, q in enumerate(critics(batch.obs, batch.action)):
            weights, biases = ([p[c] for p in part] for part in (critics.weights, critics.biases))
            same(q, plain_layers(weights, biases, activation, layer_norm)(x)[:, 0], 1e-12)
    parameters = list(agent.actor.parameters())
    assert [len(bias) for bias in parameters[1::2]] == [hidden] * layers + [2 * ACTION]
    policy = plain_layers([w.T for w in parameters[::2]], parameters[1::2], activation)
    mean, log_std = policy(batch.obs).split(ACTION, dim=1)
    same(agent.actor(batch.obs, noise[0])[0], (mean + log_std.exp() * noise[0]).tanh(), 1e-12)


def test_layer_norm_leaves_each_row_mean_zero_and_variance_one():
    agent, (batch, _), normed = make_agent(layer_norm=True, hidden=64), make_batch(), []
    norms = [module for module in agent.critics.modules() if isinstance(module, nn.LayerNorm)]
    assert not list(norms[0].parameters()) and not any(isinstance(m, nn.LayerNorm) for m in agent.actor.modules())
    norms[0].register_forward_hook(lambda module, inputs, output: normed.append(output))
    with torch.no_grad():
        agent.critics(100 * batch.obs, batch.action)
    assert len(normed) == 2 and normed[0].shape == (2, ROWS, 64)
    for output in normed:
        same(output.mean(-1), torch.zeros(2, ROWS).double(), 1e-9)
        same(output.var(-1, unbiased=False), torch.ones(2, ROWS).double(), 1e-3)


@pytest.mark.parametrize("init", ["xavier", "torch", "orthogonal", "normal"])
def test_initial_laws_of_each_critic_by_itself_and_of_the_policy(init):
    torch.manual_seed(0)
    agent = sac.SAC(20, 12, sac.Args(init=init, n_critics=3, hidden=128, value_network=True))
    actor = list(agent.actor.parameters())
    matrices = [
        (w[c], b[c])
        for net in (agent.critics, agent.critics.value)
        for w, b in zip(net.weights, net.biases)
        for c in range(len(w))
    ]
    assert len({tuple(weight.flatten().tolist()[:5]) for weight, _ in matrices}) == len(matrices) == 12
    for weight, bias in [*matrices, *((w.T, b) for w, b in zip(actor[::2], actor[1::2]))]:  # (in, out)
        if init in ("xavier", "torch"):
            bound = math.sqrt(6 / sum(weight.shape)) if init == "xavier" else weight.shape[0] ** -0.5
            check_uniform(weight, bound)
        if init == "orthogonal":
            small = weight if weight.shape[0] <= weight.shape[1] else weight.T
            same(small @ small.T, torch.eye(len(small)), 1e-4)
        if init == "normal":
            size = weight.numel()
            assert abs(weight.mean()) < 4 / math.sqrt(size) and abs(weight.var() - 1) < 4 * math.sqrt(2 / size)
        if init == "torch":
            assert 0 < bias.abs().max() <= weight.shape[0] ** -0.5
            if bias.numel() >= 100:
                check_uniform(bias, weight.shape[0] ** -0.5)
        else:
            assert not bias.any()
    same(agent.target_critics.parameters(), agent.critics.parameters(), 0)


@pytest.mark.parametrize("p", [0.01, 0.3])
def test_dropout_leaves_out_its_share_of_hidden_units_anew_at_each_use(p):
    torch.manual_seed(0)
    agent, (batch, noise), uses = make_agent(dropout=p, hidden=200), make_batch(rows=64), []
    for critics in (agent.critics, agent.target_critics):
        (module,) = [module for module in critics.modules() if isinstance(module, nn.Dropout)]
        module.register_forward_hook(lambda module, inputs, output: uses.append((inputs[0].detach(), output.detach())))
    agent.update(batch, noise)
    assert [output.shape for _, output in uses] == [(2, 64, 200)] * 6  # target, critics, policy: two layers each
    left_out = [output == 0 for _, output in uses]
    for (before, after), zeros in zip(uses, left_out):
        assert abs(zeros.double().mean() - p) < 4 * math.sqrt(p * (1 - p) / zeros.numel())
        same(after, before / (1 - p) * ~zeros, 1e-12)
    for a, b in [*itertools.combinations(left_out, 2), (left_out[0][0], left_out[0][1])]:
        assert abs((a & b).double().mean() - p * p) < 4 * math.sqrt(p * p / a.numel())  # independent
    obs = np.random.default_rng(0).normal(size=(4, OBS))
    np.testing.assert_array_equal(*(agent.float().act(obs, torch.ones(4, ACTION)) for _ in range(2)))
    agent, args = sac.SAC(2, 2, sac.Args(dropout=p)), sac.Args(dropout=p, env_id=TOY, eval_episodes=2)
    np.testing.assert_array_equal(*(sac.evaluate(agent, args, step=0, stochastic=True) for _ in range(2)))


def test_dropout_comes_before_the_norm():
    """As in DroQ (Hiraoka et al. 2022, arXiv 2110.02034)."""
    agent, (batch, _), uses = make_agent(dropout=0.3, layer_norm=True), make_batch(), []
    (norm,) = [module for module in agent.critics.modules() if isinstance(module, nn.LayerNorm)]
    norm.register_forward_hook(lambda module, inputs, output: uses.append(inputs[0]))
    agent.critics(batch.obs, batch.action)
    assert len(uses) == 2 and all((before == 0).any() for before in uses)


def test_spectral_norm_makes_the_largest_singular_value_of_each_critics_hidden_layers_one(monkeypatch):
    agent, (batch, _), used = make_agent(spectral_norm=True, n_critics=3, layers=2), make_batch(), []
    critics, product = agent.critics, torch.Tensor.__matmul__
    with torch.no_grad():
        for i, weight in enumerate(critics.weights):
            weight *= torch.tensor([0.2, 1.0, 7.0]).reshape(3, 1, 1) * (1 + i)  # not one norm for all
        for _ in range(100):
            critics(batch.obs, batch.action)
    spy = lambda x, weight: used.append(weight) or product(x, weight)
    monkeypatch.setattr(torch.Tensor, "__matmul__", spy)
    q = critics(batch.obs, batch.action)
    monkeypatch.undo()
    used = used[4::5]  # of the five products of a layer the last; the others find the singular value
    for weight, raw in zip(used, critics.weights):
        largest, before = torch.linalg.svdvals(weight.detach())[:, 0], torch.linalg.svdvals(raw.detach())[:, 0]
        assert largest.tolist() == pytest.approx([1.0] * 3, rel=0.01) and (before - 1).abs().min() > 0.1
    x, singular = torch.cat([batch.obs, batch.action], dim=1), lambda w: torch.linalg.matrix_norm(w, 2)
    expected = []  # the output layer as it is; gradients run through the norm as well
    for c in range(3):
        y = x
        for weight, bias in zip(critics.weights[:-1], critics.biases[:-1]):
            y = (y @ (weight[c] / singular(weight[c])) + bias[c]).relu()
        expected.append((y @ critics.weights[-1][c] + critics.biases[-1][c])[:, 0])
    same(q, expected, 1e-3)
    parameters = list(critics.parameters())
    slopes = [torch.autograd.grad(value.sum(), parameters) for value in (q, torch.stack(expected))]
    for ours, theirs in zip(*slopes):
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_spectral_norm_follows_the_weights_in_training(train):
    seen = train(spectral_norm=True, hidden=32, total=80, q_lr=1e-2)
    critics, weights = seen.updates[-1].after.critics, []
    x = (torch.randn(4, 2), torch.randn(4, 2))
    with pytest.MonkeyPatch.context() as patch:
        product = torch.baddbmm
        patch.setattr(torch, "baddbmm", lambda bias, x, weight: weights.append(weight) or product(bias, x, weight))
        critics(*x)
    for weight in weights:
        assert torch.linalg.svdvals(weight.detach())[:, 0].tolist() == pytest.approx([1.0] * 2, rel=0.1)


# Value network


def test_value_network_by_hand():
    agent = steady([2.0, -3.0], [1e9, 1e9], value_network=True, tau=0.1, q_lr=0.25, gamma=0.9)
    set_value(agent.critics.value, [1.5])
    set_value(agent.target_critics.value, [4.0])
    (batch, noise), lost, step = make_batch(), [], agent.value_optimizer.minimize
    agent.value_optimizer.minimize = lambda loss: (lost.append(loss.item()), step(loss))
    losses = agent.update(batch, 0 * noise)
    y = batch.reward + 0.9 * (1 - batch.terminated) * 4  # the target critics' 1e9 plays no part, nor does entropy
    assert losses["losses/target_q"].item() == pytest.approx(y.mean().item(), rel=1e-6)
    expected = ((2 - y).square() + (-3 - y).square()).mean().item() / 2
    assert losses["losses/qf_loss"].item() == pytest.approx(expected, rel=1e-6)
    assert lost == pytest.approx([(1.5 - (-3 + 0.5 * ENTROPY)) ** 2], rel=1e-6)
    assert agent.critics.value.biases[-1].item() == pytest.approx(1.25, rel=1e-6)
    assert agent.target_critics.value.biases[-1].item() == pytest.approx(4 + 0.1 * (1.25 - 4), rel=1e-6)


def test_value_network_sees_the_state_alone_and_no_network_collects_anothers_gradients():
    agent = make_agent(value_network=True)
    assert agent.critics.value.weights[0].shape == (1, OBS, 16)
    parts = {name: list(getattr(agent, f"{name}_optimizer").targets) for name in ("critic", "actor", "alpha", "value")}
    named = {id(p): name for name, part in parts.items() for p in part}
    assert len(named) == sum(map(len, parts.values()))  # none has two optimizers
    assert {id(p) for p in agent.parameters() if p.requires_grad} == set(named)  # and none has none
    parts["slow"] = list(agent.target_critics.requires_grad_(True).parameters())
    reached = {}

    def spy(name):
        def minimize(loss):
            slopes = {k: torch.autograd.grad(loss, p, retain_graph=True, allow_unused=True) for k, p in parts.items()}
            reached[name] = {part for part, slope in slopes.items() if any(s is not None for s in slope)}

        getattr(agent, f"{name}_optimizer").minimize = minimize

    for name in ("critic", "actor", "alpha", "value"):
        spy(name)
    agent.update(*make_batch())
    assert reached == {"critic": {"critic"}, "actor": {"actor", "critic"}, "alpha": {"alpha"}, "value": {"value"}}
    assert all(p.grad is None for p in agent.parameters())


# Reward and data


def test_reward_scale_is_for_replay_alone(train):
    plain, scaled = train(), train(reward_scale=5.0)
    for seen, scale in ((plain, 1), (scaled, 5)):
        rewards, times = seen.rows[:, 4].numpy(), seen.rows[:, 7].numpy()
        np.testing.assert_array_equal(rewards, scale * times)
        np.testing.assert_array_equal(seen.records["charts/episodic_return"][1], [15] * 12)
    assert torch.equal(plain.rows[:30, :4], scaled.rows[:30, :4])


@pytest.mark.parametrize("ends", [False, True])
def test_time_limits_end_the_task_if_asked(train, ends):
    rows = train(truncation_terminates=ends).rows.numpy()
    fifth, odd = rows[:, 7] == 5, rows[:, 0] % 2 == 1
    assert fifth.sum() == 12
    np.testing.assert_array_equal(rows[:, 5] == 1, fifth & (ends | odd))


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("random_steps, first", [(-1, 30), (0, 0), (12, 12), (30, 30), (45, 45)])
def test_random_steps_are_apart_from_learning_starts(train, random_steps, first, num_envs):
    seen = train(random_steps=random_steps, num_envs=num_envs, hidden=16)
    assert [act.count for act in seen.acts] == list(range(first, 60, num_envs))
    np.testing.assert_array_equal(seen.rows[first:, 2:4], np.concatenate([act.action for act in seen.acts]))
    assert [u.count for u in seen.updates] == [t // num_envs * num_envs for t in range(30, 60)]
    if first:
        assert seen.rows[:first, 2:4].abs().max() > 0.8


# Replay


def filled(added: int, capacity=40, chunk=3, **knobs) -> sac.ReplayBuffer:
    """A buffer to which so many transitions came, `chunk` at a time; the reward is a transition's number."""
    buffer = sac.ReplayBuffer(capacity, 1, 1, knobs=sac.Args(num_envs=chunk, **knobs))
    for start in range(0, added, chunk):
        n = np.arange(start, start + chunk, dtype=float)
        buffer.add(n[:, None], n[:, None], n, n, n[:, None])
    return buffer


@pytest.mark.parametrize("added", [3, 24, 39, 42, 75])
@pytest.mark.parametrize("prioritized", [False, True])
def test_combined_replay_adds_the_newest_of_each_environment_to_a_uniform_batch(added, prioritized):
    buffer = filled(added, combined_replay=True, prioritized_replay=prioritized, batch_size=16)
    generator = torch.Generator().manual_seed(0)
    batches = [buffer[buffer.sample(16, generator)].reward.numpy() for _ in range(300)]
    counts = np.array([(np.stack(batches) == n).sum() for n in range(max(0, added - 40), added)])
    assert counts.sum() == 300 * 16
    assert all({added - 1, added - 2, added - 3} <= set(batch) for batch in batches)
    counts[-3:] -= 300
    check_law(counts, [300 * 13 / len(counts)] * len(counts))


def test_combined_replay_with_more_environments_than_rows_in_a_batch():
    buffer = filled(20, chunk=10, combined_replay=True, batch_size=4)
    assert set(buffer[buffer.sample(4, torch.Generator())].reward.tolist()) == {16, 17, 18, 19}


@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("num_envs, buffer_size", [(1, 1000), (4, 1000), (4, 21)])
def test_in_training_each_batch_holds_the_newest_transitions(train, num_envs, buffer_size, prioritized):
    flags = dict(num_envs=num_envs, buffer_size=buffer_size, prioritized_replay=prioritized)
    seen = train("Pendulum-v1", combined_replay=True, hidden=16, **flags)
    assert len(seen.updates) == 30
    for u in seen.updates:
        newest = {n % len(seen.buffer.rows) for n in range(u.count - num_envs, u.count)}
        assert newest <= set(u.index.tolist())
    assert len(set(seen.updates[-1].index.tolist())) > num_envs


@pytest.mark.parametrize("added, combined", [(24, False), (75, False), (75, True)])
def test_priorities_are_chances_and_weights_undo_them(added, combined):
    total = 300
    buffer = filled(added, prioritized_replay=True, combined_replay=combined, batch_size=32, total_timesteps=total)
    errors, generator = torch.rand(len(buffer), generator=torch.Generator().manual_seed(1)) * 5, torch.Generator()
    buffer.rows[: len(buffer), -1] = errors + 0.1
    chances = (errors.double() + 0.1) ** 0.7
    chances, counts, rest = (chances / chances.sum()).numpy(), np.zeros(len(buffer)), 32 - 3 * combined
    for _ in range(200):
        index = buffer.sample(32, generator).numpy()  # with replacement, though there are more
        counts += np.bincount(index, minlength=len(buffer))
        weight = (len(buffer) * chances[index]) ** -(0.5 + 0.5 * added / total)
        np.testing.assert_allclose(buffer.weight.numpy(), weight / weight.max(), rtol=1e-5)
        assert buffer.weight.max() == 1 and buffer.weight.dtype == torch.float32
    if combined:
        counts[(added - 1 - np.arange(3)) % 40] -= 200
    check_law(counts, 200 * rest * chances)


@pytest.mark.parametrize("added, repeat, beta", [(3, 1, 0.5 + 0.5 * 3 / 90), (45, 1, 0.75), (90, 1, 1.0), (45, 2, 1.0)])
def test_beta_goes_from_one_half_to_one(added, repeat, beta):
    knobs = dict(prioritized_replay=True, batch_size=64, total_timesteps=90, action_repeat=repeat)
    buffer = filled(added, capacity=100, **knobs)
    buffer.rows[: len(buffer), -1] = torch.linspace(0.1, 3, len(buffer))
    index = buffer.sample(64, torch.Generator())
    chances = buffer.rows[index, -1].double() ** 0.7
    same(buffer.weight.double(), (chances / chances.min()) ** -beta, 1e-5)


def test_new_transitions_get_the_highest_priority_so_far():
    buffer = filled(6, prioritized_replay=True)
    assert (buffer.rows[:6, -1] == 1).all()
    buffer.rows[:6, -1] = torch.tensor([0.3, 0.1, 7.5, 2.0, 0.2, 0.5])
    new = np.zeros((2, 1))
    buffer.add(new, new, new[:, 0], new[:, 0], new)
    assert buffer.rows[6:8, -1].tolist() == [7.5, 7.5] and buffer[torch.tensor([6])].next_obs.shape == (1, 1)
    buffer.rows[:8, -1] = 0.2
    buffer.add(new, new, new[:, 0], new[:, 0], new)
    assert buffer.rows[8:10, -1].tolist() == pytest.approx([0.2, 0.2])


@pytest.mark.parametrize("combined", [False, True])
def test_in_training_the_rows_drawn_take_their_errors_as_priorities(train, combined):
    flags = dict(combined_replay=combined, n_critics=3, hidden=16, copies=True)
    seen = train("Pendulum-v1", prioritized_replay=True, **flags)
    assert (seen.updates[0].priorities == 1).all() and seen.rows.shape == (60, 3 + 1 + 1 + 1 + 3 + 1)
    for u, after in zip(seen.updates, [*(u.priorities for u in seen.updates[1:]), seen.rows[:, -1]]):
        with torch.no_grad():
            next_action, log_prob = u.before.actor(u.batch.next_obs, u.noise[0])
            slow = u.before.target_critics(u.batch.next_obs, next_action).min(0).values
            y = u.batch.reward + 0.99 * (1 - u.batch.terminated) * (slow - u.before.log_alpha.exp() * log_prob)
            errors = (u.before.critics(u.batch.obs, u.batch.action) - y).abs()
        expected, places = u.priorities.clone(), u.index.tolist()
        for place, error in zip(places, errors.mean(0)):
            expected[place] = error + 0.1
        once = torch.tensor([places.count(n) < 2 for n in range(len(expected))])  # twice drawn has either error
        same(after[: len(expected)][once], expected[once], 1e-5)
        assert len(after) == len(expected) + 1 and after[-1] == after[:-1].max()
        chances = u.priorities[u.index].double() ** 0.7
        same(u.weight.double(), (chances / chances.min()) ** -(0.5 + 0.5 * u.count / 60), 1e-5)
        loss = (u.weight * (errors**2)).mean()
        assert u.losses["losses/qf_loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert not any("td_error" in key for key in seen.records)


def test_the_weighted_loss_by_hand():
    agent, (batch, noise) = steady([2.0, -3.0], [5.0, 4.0], prioritized_replay=True), make_batch()
    weight = torch.linspace(0.2, 1, ROWS).double()
    losses = agent.update(batch, 0 * noise, weight)
    y = batch.reward + 0.99 * (1 - batch.terminated) * (4 + 0.5 * ENTROPY)
    expected = (weight * ((2 - y) ** 2 + (-3 - y) ** 2) / 2).mean().item()
    assert losses["losses/qf_loss"].item() == pytest.approx(expected, rel=1e-6)
    same(losses["losses/td_error"], ((2 - y).abs() + (-3 - y).abs()) / 2, 1e-6)
    slopes = [2 * (weight * (q - y)).mean() / 2 for q in (2.0, -3.0)]
    same(gradients(agent.critic_optimizer)[-1].flatten(), slopes, 1e-6)


# Updates


@pytest.mark.parametrize("num_envs", [1, 4])
@pytest.mark.parametrize("interval", [1, 20, 50])
@pytest.mark.parametrize("per_step", [0.5, 1.0, 2.0])
def test_number_and_moments_of_updates(train, per_step, interval, num_envs):
    flags = dict(learning_starts=32, total=120, hidden=4, layers=1)
    seen = train(updates_per_step=per_step, update_interval=interval, num_envs=num_envs, **flags)
    owed, expected = 0.0, []
    for step in range(1, 121):  # one at a time; the updates of a round come before its steps
        if step > 32 and (step - 32) % interval == 0:
            owed += per_step * interval
        expected += [(step - 1) // num_envs * num_envs] * int(owed)
        owed -= int(owed)
    assert [u.count for u in seen.updates] == expected
    assert len(expected) == per_step * (88 // interval * interval)


@pytest.mark.parametrize("frequency, tau", [(1, 0.1), (2, 0.1), (3, 1.0), (5, 0.3)])
def test_targets_rest_between_their_moves(frequency, tau):
    agent = make_agent(target_network_frequency=frequency, tau=tau)
    for i in range(1, 11):
        old = deepcopy(agent.target_critics)
        agent.update(*make_batch(seed=i))
        pairs = list(zip(old.parameters(), agent.critics.parameters()))
        if i % frequency:
            same(agent.target_critics.parameters(), old.parameters(), 0)
        else:
            same(agent.target_critics.parameters(), [a + tau * (b - a) for a, b in pairs], 1e-8)
        if tau == 1 and i % frequency == 0:
            same(agent.target_critics.parameters(), agent.critics.parameters(), 0)


# Normalizer


@pytest.mark.parametrize("num_envs", [1, 3])
def test_normalizer_has_the_moments_of_all_that_the_policy_was_fed(train, num_envs):
    flags = dict(
        env_id="Pendulum-v1", num_envs=num_envs, hidden=16, random_steps=20, checkpoint_frequency=25, copies=True
    )
    seen = train(normalize_obs=True, **flags)
    evaluated = train(normalize_obs=True, eval_frequency=20, eval_episodes=1, **flags)
    for name, value in seen.final.items():
        assert torch.equal(value, evaluated.final[name]), name
    fed = seen.rows[:, :3].double().numpy()  # raw: replay holds what the environment said
    plain = train(**flags)
    np.testing.assert_array_equal(plain.rows[:20, :3], fed[:20])
    count, mean, square = (seen.final["moments"] / seen.final["moments"][0]).numpy()
    assert seen.final["moments"][0].tolist() == [len(fed)] * 3 == [60] * 3
    np.testing.assert_allclose(mean, fed.mean(0), rtol=1e-9)
    np.testing.assert_allclose(square - mean**2, fed.var(0), rtol=1e-9)

    for act in seen.acts:  # with the statistics so far, this observation's included
        so_far = fed[: act.count + num_envs]
        expected = np.clip((act.obs - so_far.mean(0)) / so_far.std(0), -5, 5)
        agents = [u.before for u in seen.updates if u.count == act.count]  # the first is the one that acted
        if agents:
            action, _ = agents[0].actor(torch.from_numpy(expected).float(), act.noise)
            np.testing.assert_allclose(act.action, action.detach(), atol=1e-4)


def test_a_normalizer_that_saw_nothing_yet_is_finite():
    """As in the checkpoint before the first step."""
    agent = sac.SAC(OBS, ACTION, sac.Args(normalize_obs=True))
    assert np.isfinite(agent.act(np.ones((1, OBS), dtype=np.float32), torch.zeros(1, ACTION))).all()


def test_normalized_observations_are_clipped_and_what_updates_use():
    agent, (batch, noise), seen = make_agent(normalize_obs=True), make_batch(), []
    observed = 3 + 2 * np.random.default_rng(0).normal(size=(100, OBS))
    observed[:, 2] = 0.7  # a constant
    agent.moments += torch.from_numpy(np.stack([observed**0, observed, observed**2]).sum(1))
    extreme = np.array([[1e6, -1e6, 0.7], [3, 4, 0.7 + 2e-6], [3, 4, 5.0]])
    expected = np.clip((extreme - observed.mean(0)) / np.maximum(observed.std(0), 1e-6), -5, 5)
    same(agent.normalize(torch.from_numpy(extreme)), torch.from_numpy(expected), 1e-6)
    assert agent.normalize(torch.from_numpy(extreme))[0].tolist() == pytest.approx([5, -5, 0], abs=1e-6)
    for network in (agent.actor, agent.critics, agent.target_critics):
        network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    agent.update(batch, noise)
    obs, next_obs = (agent.normalize(x) for x in (batch.obs, batch.next_obs))
    same(seen, [next_obs, next_obs, obs, obs, obs], 0)  # policy and targets; critics; policy and critics
    assert not torch.equal(obs, batch.obs)


# Stack and repeat


def test_stack_holds_the_newest_observations_and_zeros_before_the_first(train):
    env = sac.make_env(sac.Args(env_id=TOY, stack=3))
    assert env.observation_space.shape == (6,)
    assert env.reset(seed=0)[0].tolist() == [0, 0, 0, 0, 1, 0]
    assert [env.step(np.zeros(2, np.float32))[0].tolist() for _ in range(3)] == [
        [0, 0, 1, 0, 1, 1],
        [1, 0, 1, 1, 1, 2],
        [1, 1, 1, 2, 1, 3],
    ]
    for num_envs in (1, 4):
        seen = train(stack=3, num_envs=num_envs, hidden=16)
        rows = seen.rows.numpy().reshape(-1, num_envs, 16)  # 6 + 2 + 1 + 1 + 6
        obs, next_obs = rows[..., :6], rows[..., 10:]
        np.testing.assert_array_equal(next_obs[..., :4], obs[..., 2:])
        episode, t = next_obs[..., 4:].transpose(2, 0, 1)
        np.testing.assert_array_equal(t, np.tile(np.arange(len(rows)) % 5 + 1, (num_envs, 1)).T)
        going = t[:-1] < 5
        np.testing.assert_array_equal(obs[1:][going], next_obs[:-1][going])
        first = obs[1:][~going]
        np.testing.assert_array_equal(first[:, :4], 0)
        np.testing.assert_array_equal(first[:, 4:], np.stack([episode[:-1][~going] + 1, 0 * first[:, 5]], axis=1))


@pytest.mark.parametrize("num_envs", [1, 2])
def test_action_repeat_sums_rewards_until_the_end_and_counts_environment_steps(train, num_envs):
    flags = dict(eval_frequency=60, eval_episodes=2, log_frequency=4, learning_starts=32)
    seen = train(action_repeat=2, num_envs=num_envs, hidden=16, **flags)
    rows = seen.rows.numpy().reshape(-1, num_envs, 8)  # 2 + 2 + 1 + 1 + 2
    assert len(seen.rows) == 30 and len(seen.updates) == 14  # one per action after 32 steps
    np.testing.assert_array_equal(rows[:, 0, 4], np.tile([1 + 2, 3 + 4, 5], 10)[: len(rows)])
    np.testing.assert_array_equal(rows[:, 0, 7], np.tile([2, 4, 5], 10)[: len(rows)])
    np.testing.assert_array_equal(rows[:, 0, 1], np.tile([0, 2, 4], 10)[: len(rows)])
    np.testing.assert_array_equal(rows[..., 5] == 1, (rows[..., 7] == 5) & (rows[..., 0] % 2 == 1))
    assert seen.acts[0].count == 32 // 2  # acting and updating begin after as many environment steps
    assert seen.evals[0].tolist() == [15, 15] and set(seen.records["charts/episodic_return"][1]) == {15}
    assert set(seen.records["charts/episodic_length"][1]) == {6}  # of three actions: one cut short counts as a whole
    steps = seen.records["losses/qf_loss"][0]
    assert steps[-1] == 60 and (np.diff(steps) == 4).all()


# Presets

PRESETS = {
    "haarnoja": dict(learning_starts=1000, autotune=False, reward_scale=5, q_lr=3e-4),
    "stable-baselines": dict(random_steps=0, learning_starts=100, buffer_size=500_000, batch_size=64, hidden=64)
    | dict(q_lr=3e-4, heads="separate"),
    "spinningup": dict(random_steps=10_000, learning_starts=1000, batch_size=100, autotune=False, alpha=0.2)
    | dict(policy_lr=1e-3, update_interval=50, init="torch", heads="separate"),
    "yarats": dict(batch_size=1024, hidden=1024, alpha=0.1, log_std="tanh", log_std_min=-5, init="torch")
    | dict(policy_lr=1e-4, q_lr=1e-4, target_network_frequency=2),
}


def parsed(monkeypatch, *flags) -> sac.Args:
    """What main() makes of its command line."""

    class Parsed(Exception):
        pass

    def stop(args, *_):
        raise Parsed(args)

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["sac_ablations.py", *flags])
        patch.setattr(sac, "make_env", stop)
        with pytest.raises(Parsed) as caught:
            sac.main()
    return caught.value.args[0]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_other_defaults(monkeypatch, name):
    assert PRESETS.keys() == sac.PRESETS.keys()
    assert parsed(monkeypatch, "--preset", name) == sac.Args(preset=name, **PRESETS[name])
    for key, value in PRESETS[name].items():  # a flag beside it wins, on either side
        other = "joint" if key == "heads" else getattr(sac.Args, key)
        for flags in [[*arguments(**{key: other}), "--preset", name], ["--preset", name, *arguments(**{key: other})]]:
            assert parsed(monkeypatch, *flags) == sac.Args(preset=name, **PRESETS[name] | {key: other}), key
        assert value != other
    assert parsed(monkeypatch, "--preset", "none") == sac.Args()


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_makes_real_updates(train, name):
    seen = train("Pendulum-v1", preset=name, total=102, learning_starts=51, batch_size=16, log_frequency=10)
    assert len(seen.updates) == (50 if name == "spinningup" else 51)
    assert all(value.isfinite().all() for u in seen.updates for value in u.losses.values())
    still = {key for key, value in seen.final.items() if torch.equal(value, seen.updates[0].before.state_dict()[key])}
    assert still == ({"log_alpha"} if name in ("haarnoja", "spinningup") else set())
    assert seen.updates[0].before.log_alpha.exp().item() == pytest.approx(PRESETS[name].get("alpha", 1.0))
    assert len(seen.acts) == {"stable-baselines": 102, "spinningup": 0}.get(name, 51)


# Mistakes


def refusal(monkeypatch, capsys, folder, *flags) -> str:
    """What stderr shows of a run that must not begin."""
    monkeypatch.chdir(folder)
    small = dict(
        env_id=TOY, total_timesteps=40, learning_starts=30, batch_size=8, eval_frequency=0, threads=1, cuda=False
    )
    monkeypatch.setattr(sys, "argv", ["sac_ablations.py", *arguments(**small), *flags])
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    with pytest.raises(SystemExit) as caught:
        sac.main()
    assert caught.value.code == 2 and not list(folder.iterdir())
    return capsys.readouterr().err


BELOW = ["n-critics=0", "policy-frequency=0", "hidden=0", "layers=0", "stack=0", "update-interval=0", "action-repeat=0"]
BELOW += ["target-network-frequency=0", "alpha=0", "alpha=-1", "alpha=nan", "reward-scale=0", "updates-per-step=0"]
BELOW += ["dropout=-0.1", "dropout=1", "policy-l2=-1", "critics-subset=-1", "critics-subset=3", "alpha-lr=-1"]


@pytest.mark.parametrize("flag", BELOW)
def test_values_out_of_bounds_are_refused_in_one_line(monkeypatch, capsys, tmp_path, flag):
    err = refusal(monkeypatch, capsys, tmp_path, f"--{flag}")
    assert err.startswith("error: ") and err.count("\n") == 1 and f"--{flag.split('=')[0]} must lie in" in err


CHOICES = ["preset", "init", "activation", "log-std", "heads", "tanh-correction", "alpha-loss"]


@pytest.mark.parametrize("flag", CHOICES)
def test_unknown_choices_are_refused(monkeypatch, capsys, tmp_path, flag):
    assert f"--{flag}" in refusal(monkeypatch, capsys, tmp_path, f"--{flag}=unheard-of")


# Compiled and resumed

TRACED = [
    dict(n_critics=5, critics_subset=2, target_network_frequency=2, tau=1.0),
    dict(policy_frequency=3, layers=1, init="torch"),
    dict(value_network=True, activation="SiLU", layers=3),
    dict(spectral_norm=True, activation="ELU", init="orthogonal"),
    dict(dropout=0.1, layer_norm=True, activation="GELU", heads="separate"),
    dict(autotune=False, log_std="tanh", tanh_correction="eps", policy_l2=1e-3, alpha_loss="alpha", activation="Tanh"),
    dict(normalize_obs=True, prioritized_replay=True),
]


@pytest.mark.parametrize("knobs", TRACED, ids=lambda knobs: ",".join(knobs))
@torch._dynamo.config.patch(trace_autograd_ops=True)
def test_every_knob_traces_whole_and_computes_the_same(knobs):
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = sac.SAC(OBS, ACTION, sac.Args(hidden=16, **knobs))
    eager.actor.log_scale = 0.5
    if knobs.get("normalize_obs"):
        eager.moments += torch.tensor([[9.0], [2.0], [9.0]]).double()
    traced = deepcopy(eager)
    update = torch.compile(traced.update, backend="aot_eager", fullgraph=True, dynamic=False)
    for step, policy in enumerate([3, 0, 0, 3] if "policy_frequency" in knobs else [1, 1]):
        batch, noise = as_float(*make_batch(policy=policy, seed=step))
        weight, results = torch.linspace(0.1, 1, ROWS), []
        for function in (eager.update, update):
            torch.manual_seed(step)
            results.append(function(batch, noise, weight))
        for name, loss in results[0].items():
            torch.testing.assert_close(results[1][name], loss, rtol=1e-4, atol=1e-5, msg=name)
    assert results[0].keys() == results[1].keys()
    for (name, a), b in zip(eager.named_parameters(), traced.parameters()):
        torch.testing.assert_close(b, a, rtol=1e-2, atol=1e-4, msg=name)
    act = torch.compile(traced.act, backend="aot_eager", fullgraph=True, dynamic=False)
    np.testing.assert_allclose(act(batch.obs.numpy(), noise[0]), traced.act(batch.obs.numpy(), noise[0]), atol=1e-5)
    torch._dynamo.reset()


def test_every_knob_of_the_agent_is_among_the_traced():
    """The others act on environments, replay and the number of updates, outside of what is compiled."""
    outside = "n_critics alpha alpha_lr target_entropy target_entropy_scale log_std_min log_std_max hidden compensate "
    outside += "scaled_log_prob reward_scale random_steps truncation_terminates combined_replay updates_per_step "
    outside += "update_interval stack action_repeat preset"
    assert {*outside.split(), *(key for knobs in TRACED for key in knobs)} >= set(KNOBS)


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
@pytest.mark.parametrize(
    "knobs",
    [
        dict(n_critics=5, critics_subset=2),
        # of the policy that acts there need be no graph a second time
        dict(policy_frequency=2, prioritized_replay=True, combined_replay=True, layers=1, random_steps=60),
    ],
    ids=lambda knobs: ",".join(knobs),
)
def test_compiled_for_real(train, knobs):
    flags = dict(env_id="Pendulum-v1", total=42, log_frequency=10, hidden=32, checkpoint_frequency=20)
    try:
        compiled = train(compile="on", spy=False, **flags, **knobs)
    finally:
        torch._dynamo.reset()
        torch._dynamo.config.trace_autograd_ops = False
    eager = train(compile="off", spy=False, **flags, **knobs)
    assert compiled.args["compile"] == "on"
    for name in ("critic_optimizer.steps", "actor_optimizer.steps"):
        assert compiled.final[name] == eager.final[name] == 12
    assert all(value.isfinite().all() for value in compiled.final.values())
    assert torch.equal(compiled.rows[:30, :9], eager.rows[:30, :9])
    if "critics_subset" not in knobs:  # compiled code draws numbers of its own
        for name, value in eager.final.items():
            if "optimizer" not in name:
                torch.testing.assert_close(compiled.final[name], value, rtol=0.02, atol=1e-3, msg=name)


STATEFUL = [
    "--prioritized-replay --combined-replay --num-envs 2",
    "--normalize-obs --stack 3 --action-repeat 2 --random-steps 150",
    "--spectral-norm --preset yarats --hidden 16",
    "--dropout 0.1 --n-critics 5 --critics-subset 2 --layer-norm",
    "--value-network --truncation-terminates --reward-scale 2 --env-id Hopper-v4",  # episodes that end, for the best
    "--policy-frequency 2 --target-network-frequency 3 --update-interval 20 --updates-per-step 0.7 --num-envs 4",
]


@pytest.mark.parametrize("knobs", STATEFUL)
def test_killed_and_resumed_is_never_killed(tmp_path, knobs):
    knobs = f"--hidden 16 --eval-frequency 0 {knobs}"
    whole = test_resume.run_through(tmp_path / "whole", "Pendulum-v1", knobs, "sac_ablations")
    stride = math.prod(n for n in (2, 4) for flag in ("num-envs", "action-repeat") if f"--{flag} {n}" in knobs)
    folder = tmp_path / "killed"
    folder.mkdir()
    run = lambda *args: test_resume.run(folder, *args, script="sac_ablations")
    dead, kills = -signal.SIGKILL, [(test_resume.die_at_step, steps // stride) for steps in (100, 100, 100)]
    assert run(f"--env-id Pendulum-v1 {test_resume.FLAGS} {knobs}", kills[0]) == dead  # back to step 60
    (run_folder,) = folder.glob("runs/*")
    for kill in kills[1:]:  # back to steps 120 and 180; updates began at 120
        assert run(f"--resume {run_folder}", kill) == dead, (folder / "log.txt").read_text()
    assert run(f"--resume {run_folder}") == 0, (folder / "log.txt").read_text()
    assert "warning:" not in (folder / "log.txt").read_text()
    test_resume.assert_same(whole, test_resume.result(folder))
    assert whole[1]["losses/qf_loss"].size > 0
