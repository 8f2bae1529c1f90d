"""The mathematics of SAC against independent sources: mpmath, quadrature, numbers worked out by hand, torch.optim, and
separate torch.nn networks that follow the definitions. Most of it runs in float64, so that tolerances can be tight."""

import math
from copy import deepcopy

import mpmath
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributions import Normal

import sac_continuous as sac  # for annotations; the tests have each script in its place

SCRIPTS = ["sac_continuous", "sac_dmc", "sac_ablations"]

torch.set_num_threads(1)
OBS, ACTION, ROWS = 3, 2, 5
NETWORKS = ("critic", "actor", "alpha")  # in the order of their steps
LOSSES = ("qf_loss", "actor_loss", "alpha_loss", "alpha", "qf1_values", "target_q", "entropy")


def make_agent(**flags) -> sac.SAC:
    """An agent as in the midst of training: target critics apart from the critics, no bias at zero, alpha not one."""
    torch.manual_seed(0)
    agent = sac.SAC(OBS, ACTION, sac.Args(**flags)).double()
    with torch.no_grad():
        for network in (agent.actor, agent.critics, agent.target_critics):
            for p in network.parameters():
                p += 0.05 * torch.randn_like(p)
        agent.log_alpha.fill_(-1.0)
    return agent


def make_batch(rows: int = ROWS, seed: int = 0) -> tuple[sac.Batch, torch.Tensor]:
    """A batch with ended and unended rows, and the noise of one update."""
    random = torch.Generator().manual_seed(seed)
    columns = [torch.randn(rows, width, generator=random, dtype=torch.float64) for width in (OBS, ACTION, 1, OBS)]
    obs, action, reward, next_obs = columns
    batch = sac.Batch(obs, action.tanh(), reward[:, 0], (torch.arange(rows) % 3 == 1).double(), next_obs)
    return batch, torch.randn(2, rows, ACTION, generator=random, dtype=torch.float64)


def set_policy(actor: sac.Actor, mean, log_std):
    """Make the policy this Gaussian under the tanh for every observation."""
    *_, weight, bias = actor.parameters()
    with torch.no_grad():
        weight.zero_()
        bias.copy_(torch.tensor([*mean, *log_std], dtype=torch.float64))


def set_values(critics: sac.Critics, values):
    """Make each critic this constant."""
    with torch.no_grad():
        for p in critics.parameters():
            p.zero_()
        critics.biases[-1].copy_(torch.tensor(values)[:, None, None])


def row(i: int, batch: sac.Batch, noise: torch.Tensor) -> tuple[sac.Batch, torch.Tensor]:
    return sac.Batch(*(column[i : i + 1] for column in batch)), noise[:, i : i + 1]


def gradients(optimizer: sac.Adam) -> list[torch.Tensor]:
    """What the optimizer got at its first step: its running mean is then a tenth of the gradient."""
    return [mean / 0.1 for mean in optimizer.mean]


def same(result, expected, tolerance: float = 1e-9):
    torch.testing.assert_close(list(result), list(expected), rtol=tolerance, atol=tolerance)


# The same networks and the same update as separate nn.Linear layers, torch.optim and .backward()


def perceptron(weights, biases) -> nn.Sequential:
    """nn.Linear layers that copy weights (in, out) and biases."""
    layers = []
    for weight, bias in zip(weights, biases):
        layer = nn.Linear(*weight.shape, dtype=weight.dtype)
        layer.weight.data, layer.bias.data = weight.detach().T.clone(), bias.detach().flatten().clone()
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def separate(critics: sac.Critics) -> nn.ModuleList:
    """One perceptron per critic."""
    count = len(critics.weights[0])
    columns = [([w[c] for w in critics.weights], [b[c] for b in critics.biases]) for c in range(count)]
    return nn.ModuleList(perceptron(weights, biases) for weights, biases in columns)


def stacked(perceptrons, read=lambda p: p) -> list[torch.Tensor]:
    """Parameters of separate critics, or read(parameter), in the layout of the batched ones."""
    layers = list(zip(*(network[::2] for network in perceptrons)))
    weights = [torch.stack([read(part.weight).T for part in layer]) for layer in layers]
    return weights + [torch.stack([read(part.bias)[None] for part in layer]) for layer in layers]


def values(perceptrons, obs, action) -> torch.Tensor:
    return torch.stack([network(torch.cat([obs, action], dim=1))[:, 0] for network in perceptrons])


def reference(agent: sac.SAC, args: sac.Args):
    """An update by the definitions, on copies of the networks: returns the function and the networks it moves."""
    layers = list(agent.actor.parameters())
    policy = perceptron([w.T for w in layers[::2]], layers[1::2])
    critics, targets = separate(agent.critics), separate(agent.target_critics)
    log_alpha = nn.Parameter(agent.log_alpha.detach().clone())
    learned = dict(critic=critics.parameters(), actor=policy.parameters(), alpha=[log_alpha])
    rates = dict(critic=args.q_lr, actor=args.policy_lr, alpha=args.policy_lr)
    optimizers = {name: torch.optim.Adam(learned[name], lr=rates[name]) for name in NETWORKS}

    def sample(obs, noise):
        mean, log_std = policy(obs).split(ACTION, dim=1)
        u = mean + log_std.exp() * noise
        density = Normal(mean, log_std.exp()).log_prob(u).exp() / (1 - u.tanh() ** 2)  # of tanh(u), by its slope
        return u.tanh(), density.prod(dim=1).log()

    def step(name, loss):
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        loss.backward()
        optimizers[name].step()
        read = {"critic": lambda: stacked(critics, lambda p: p.grad), "alpha": lambda: [log_alpha.grad.clone()]}
        return read.get(name, lambda: [p.grad.clone() for p in policy.parameters()])()

    def update(batch, noise):
        alpha, gradient = log_alpha.detach().exp(), {}
        next_action, next_log_prob = sample(batch.next_obs, noise[0])
        one, other = values(targets, batch.next_obs, next_action)
        bootstrapped = batch.reward + args.gamma * (torch.minimum(one, other) - alpha * next_log_prob)
        y = torch.where(batch.terminated == 1, batch.reward, bootstrapped).detach()
        q = values(critics, batch.obs, batch.action)
        critic_loss = (F.mse_loss(q[0], y) + F.mse_loss(q[1], y)) / 2
        gradient["critic"] = step("critic", critic_loss)

        action, log_prob = sample(batch.obs, noise[1])
        one, other = values(critics, batch.obs, action)  # critics that have made their step
        actor_loss = alpha * log_prob.mean() - torch.minimum(one, other).mean()
        gradient["actor"] = step("actor", actor_loss)

        alpha_loss = -(log_alpha * (log_prob.detach() - ACTION)).mean()
        gradient["alpha"] = step("alpha", alpha_loss)
        with torch.no_grad():
            for target, p in zip(targets.parameters(), critics.parameters()):
                target.copy_((1 - args.tau) * target + args.tau * p)
        results = (critic_loss, actor_loss, alpha_loss, alpha, q[0].mean(), y.mean(), -log_prob.mean())
        return {name: value.item() for name, value in zip(LOSSES, results)}, gradient

    return update, policy, critics, targets, log_alpha


# The policy


def density_of_tanh(mean, log_std, noise):
    """Log-density of a = tanh(u) at u = mean + std noise, in 60 digits: 1 - tanh(20)^2 needs 18 of them."""
    u, std = mean + mpmath.exp(log_std) * noise, mpmath.exp(log_std)
    normal = mpmath.exp(-(((u - mean) / std) ** 2) / 2) / (std * mpmath.sqrt(2 * mpmath.pi))
    return mpmath.log(normal / (1 - mpmath.tanh(u) ** 2))


@pytest.mark.parametrize("mean", [0.0, 1.25, -4.0])
@pytest.mark.parametrize("std", [0.1, 0.5, 1.0, 6.0])
@pytest.mark.parametrize("u", [-20.0, -9.0, -1.0, 0.3, 5.0, 12.0, 20.0])
def test_log_prob_and_its_gradients_match_mpmath(mean, std, u):
    actor = sac.Actor(OBS, 1)  # float32, as in training
    set_policy(actor, [mean], [math.log(std)])
    bias = list(actor.parameters())[-1]
    noise = torch.tensor([[(u - mean) / std]], requires_grad=True)
    action, log_prob = actor(torch.ones(1, OBS), noise)
    by_bias, by_noise = torch.autograd.grad(log_prob.sum(), [bias, noise])

    with mpmath.workdps(60):
        point = [mpmath.mpf(x) for x in (*bias.tolist(), noise.item())]  # as float32 has them
        assert action.item() == pytest.approx(float(mpmath.tanh(point[0] + mpmath.exp(point[1]) * point[2])), rel=1e-5)
        assert log_prob.item() == pytest.approx(float(density_of_tanh(*point)), rel=1e-6, abs=1e-5)
        slopes = [mpmath.diff(density_of_tanh, point, order) for order in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert [*by_bias.tolist(), by_noise.item()] == pytest.approx([float(s) for s in slopes], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("mean", [0.0, -1.0, 1.5])
@pytest.mark.parametrize("std", [0.05, 0.5, 1.5])
def test_density_of_actions_integrates_to_one_and_is_that_of_the_samples(mean, std):
    actor = sac.Actor(OBS, 1).double()
    set_policy(actor, [mean], [math.log(std)])
    middles = (torch.arange(20_000, dtype=torch.float64)[:, None] + 0.5) / 20_000
    obs = torch.ones(len(middles), OBS, dtype=torch.float64)
    with torch.no_grad():
        a, da = -(math.pi * middles).cos(), (math.pi * middles).sin() * math.pi / 20_000  # dense towards both ends
        density = actor(obs, (a.atanh() - mean) / std)[1].exp()[:, None]
        samples = actor(obs, torch.special.ndtri(middles))[0]  # at noise of equal probability
    assert (density * da).sum().item() == pytest.approx(1, abs=1e-6)
    for power in (1, 2):
        assert (density * a**power * da).sum().item() == pytest.approx((samples**power).mean().item(), abs=1e-5)


@pytest.mark.parametrize("log_std, used", [(-100, -20), (-20.5, -20), (-19.5, -19.5), (1.9, 1.9), (2.1, 2), (100, 2)])
def test_log_std_is_held_between_minus_20_and_2(log_std, used):
    actor = sac.Actor(OBS, 1).double()
    set_policy(actor, [0.0], [log_std])
    action, log_prob = actor(torch.ones(2, OBS).double(), torch.tensor([[1.0], [0.0]]).double())
    assert action[0].item() == pytest.approx(math.tanh(math.exp(used)), rel=1e-12)
    assert log_prob[1].item() == pytest.approx(-used - math.log(2 * math.pi) / 2, rel=1e-12)


def test_act_gives_the_actions_of_the_policy_and_zero_noise_the_mode():
    torch.manual_seed(0)
    agent = sac.SAC(OBS, ACTION, sac.Args())
    set_policy(agent.actor, [0.4, -0.7], [-1.0, 0.5])
    obs, noise = np.random.default_rng(0).normal(size=(4, OBS)), torch.randn(4, ACTION)
    u = np.array([0.4, -0.7]) + np.exp([-1.0, 0.5]) * noise.numpy()
    result = agent.act(obs, noise)
    assert isinstance(result, np.ndarray) and result.shape == (4, ACTION)
    np.testing.assert_allclose(result, np.tanh(u), atol=1e-6)
    np.testing.assert_allclose(agent.act(obs, 0 * noise), np.tanh([[0.4, -0.7]] * 4), atol=1e-6)


# The critics


@pytest.mark.parametrize("count", [1, 2, 5])
def test_batched_critics_equal_separate_networks_in_values_and_gradients(count):
    torch.manual_seed(0)
    critics = sac.Critics(OBS, ACTION, hidden=32, count=count).double()
    for bias in critics.biases:
        nn.init.normal_(bias)
    batch, _ = make_batch()
    perceptrons, weights = separate(critics), torch.randn(count, ROWS).double()
    q, expected = critics(batch.obs, batch.action), values(perceptrons, batch.obs, batch.action)
    assert q.shape == (count, ROWS)
    same(q, expected, 1e-13)
    for result in (q, expected):
        (result.square() * weights).sum().backward()
    same([p.grad for p in critics.parameters()], stacked(perceptrons, lambda p: p.grad), 1e-12)


def test_medium_precision_rounds_the_hidden_products_of_the_critics_alone():
    exact, rounded = (make_agent(matmul_precision=name) for name in ("highest", "medium"))
    rounded.load_state_dict(exact.state_dict())
    batch, noise = make_batch()
    for network in ("critics", "target_critics"):
        critics, close = getattr(rounded, network), lambda x: x.bfloat16().double()  # 8 bits are left of 24
        x = torch.cat([batch.obs, batch.action], dim=1).expand(2, -1, -1)
        for weight, bias in zip(critics.weights[:-1], critics.biases[:-1]):
            x = (close(close(x) @ close(weight)) + bias).relu()
        expected = (x @ critics.weights[-1] + critics.biases[-1]).squeeze(-1)
        q, true = (getattr(agent, network)(batch.obs, batch.action) for agent in (rounded, exact))
        off, rounding = (q - expected).norm(), (q - true).norm()
        assert off < 0.3 * rounding, "sums that end on the other side of a bound may be rounded the other way"
        assert 1e-4 * true.norm() < rounding < 0.02 * true.norm() and q.dtype == torch.float64
    assert torch.equal(*(agent.actor(batch.obs, noise[0])[0] for agent in (rounded, exact)))
    for agent in (rounded, exact):
        agent.update(batch, noise)
    assert all(tensor.dtype == torch.float64 for tensor in rounded.state_dict().values())
    for network in ("critic_optimizer", "actor_optimizer"):  # the first means are a tenth of the gradients
        for ours, true in zip(getattr(rounded, network).mean, getattr(exact, network).mean):
            assert 0 < (ours - true).norm() < 0.3 * true.norm()


def check_xavier(weight):
    """A sample of the uniform law within +-sqrt(6 / (fan_in + fan_out)), by its extremes and Kolmogorov's distance."""
    drawn = weight.detach().flatten().sort().values / math.sqrt(6 / sum(weight.shape))
    assert 0.95 < drawn.max() <= 1 and -0.95 > drawn.min() >= -1
    ranks = (torch.arange(len(drawn)) + 0.5) / len(drawn)
    assert ((drawn + 1) / 2 - ranks).abs().max() < 2 / math.sqrt(len(drawn))


@pytest.mark.parametrize("obs_dim, action_dim", [(3, 1), (17, 6), (300, 20)])
def test_networks_start_xavier_uniform_each_critic_by_itself(obs_dim, action_dim):
    torch.manual_seed(0)
    agent = sac.SAC(obs_dim, action_dim, sac.Args())
    for weight in agent.critics.weights:
        for critic in weight:
            check_xavier(critic)
        assert (weight[0] != weight[1]).float().mean() > 0.99
    layers = list(agent.actor.parameters())
    for weight in layers[::2]:
        check_xavier(weight)
    assert all((bias == 0).all() for bias in [*agent.critics.biases, *layers[1::2]])
    same(agent.target_critics.parameters(), agent.critics.parameters(), 0)


# The update


def test_losses_and_steps_by_hand():
    """Constant networks: every number below can be had with pencil and paper."""
    flags = dict(gamma=0.9, tau=0.1, q_lr=0.25, policy_lr=0.01)
    agent = sac.SAC(1, 1, sac.Args(**flags)).double()
    set_policy(agent.actor, [0.0], [0.0])  # noise 0: u = 0, a = 0, log pi = -log(2 pi) / 2
    set_values(agent.critics, [2.0, -3.0])
    set_values(agent.target_critics, [5.0, 4.0])
    nn.init.constant_(agent.log_alpha, math.log(0.5))
    one, zero = torch.ones(2, 1).double(), torch.zeros(2, 2, 1).double()
    batch = sac.Batch(one, one, torch.tensor([1.0, -2.0]).double(), torch.tensor([0.0, 1.0]).double(), one)
    losses = agent.update(batch, zero)

    entropy = 0.9189385332046727  # log(2 pi) / 2
    y = 1 + 0.9 * (4 + 0.5 * entropy)  # of the first row; of the second -2, its reward
    expected = dict(target_q=(y - 2) / 2, qf1_values=2, entropy=entropy, alpha=0.5)
    expected |= dict(qf_loss=((2 - y) ** 2 + (2 + 2) ** 2 + (-3 - y) ** 2 + (-3 + 2) ** 2) / 4)
    expected |= dict(actor_loss=-0.5 * entropy - -2.75)  # Adam's first step is its rate long: Q is 1.75, -2.75 by now
    expected |= dict(alpha_loss=math.log(0.5) * (entropy + 1))
    assert {key: value.item() for key, value in losses.items()} == pytest.approx(
        {f"losses/{key}": value for key, value in expected.items()}, rel=1e-7
    )
    assert agent.critics.biases[-1].flatten().tolist() == pytest.approx([1.75, -2.75], rel=1e-7)
    assert agent.target_critics.biases[-1].flatten().tolist() == pytest.approx([4.675, 3.325], rel=1e-7)
    assert agent.log_alpha.item() == pytest.approx(math.log(0.5) - 0.01, rel=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_match_the_reference(name):
    args = sac.Args()
    agent, data = make_agent(), make_batch()
    expected, _ = reference(agent, args)[0](*data)
    losses = agent.update(*data)
    assert set(losses) == {f"losses/{name}" for name in LOSSES}
    value = losses[f"losses/{name}"]
    assert value.shape == () and not value.requires_grad
    assert value.item() == pytest.approx(expected[name], rel=1e-10)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_match_the_reference(name):
    agent, data = make_agent(), make_batch()
    _, expected = reference(agent, sac.Args())[0](*data)
    agent.update(*data)
    same(gradients(getattr(agent, f"{name}_optimizer")), expected[name])


def test_a_series_of_updates_follows_the_reference():
    """Ten updates with fast learning, so that what an update leaves behind for the next is checked too."""
    flags = dict(gamma=0.8, tau=0.3, policy_lr=2e-3, q_lr=5e-3)
    agent = make_agent(**flags)
    update, policy, critics, targets, log_alpha = reference(agent, sac.Args(**flags))
    for seed in range(10):
        expected, _ = update(*make_batch(seed=seed))
        losses = agent.update(*make_batch(seed=seed))
        assert [losses[f"losses/{name}"].item() for name in LOSSES] == pytest.approx(list(expected.values()), rel=1e-6)
    same(agent.actor.parameters(), policy.parameters(), 1e-6)
    same(agent.critics.parameters(), stacked(critics), 1e-6)
    same(agent.target_critics.parameters(), stacked(targets), 1e-6)
    same([agent.log_alpha], [log_alpha], 1e-6)


@pytest.mark.parametrize("i", range(ROWS))
def test_target_is_the_reward_alone_where_the_task_ended_and_bootstraps_elsewhere(i):
    agent, (batch, noise) = make_agent(), row(i, *make_batch())
    ended, going = batch._replace(terminated=torch.ones(1).double()), batch._replace(terminated=torch.zeros(1).double())
    expected, _ = reference(agent, sac.Args())[0](going, noise)
    target_of_ended = deepcopy(agent).update(ended, noise)["losses/target_q"].item()
    assert target_of_ended == batch.reward.item()  # to the last bit: neither value nor entropy of the next state
    target_of_going = agent.update(going, noise)["losses/target_q"].item()
    assert target_of_going == pytest.approx(expected["target_q"], rel=1e-12)
    assert abs(target_of_going - target_of_ended) > 0.01


@pytest.mark.parametrize("tau", [0.005, 0.3, 1.0])
def test_target_critics_move_by_tau_towards_the_new_critics(tau):
    agent = make_agent(tau=tau)
    old = deepcopy(agent.target_critics)
    agent.update(*make_batch())
    pairs = zip(old.parameters(), agent.critics.parameters())
    # sac_ablations.py has tau in float32, as the weights are in training
    same(agent.target_critics.parameters(), [p + tau * (new - p) for p, new in pairs], 1e-8)


def test_every_network_learns_and_nothing_collects_gradients():
    agent = sac.SAC(OBS, ACTION, sac.Args())
    before = deepcopy(agent)
    agent.update(*(sac.Batch(*(x.float() for x in make_batch()[0])), make_batch()[1].float()))
    for (name, old), new in zip(before.named_parameters(), agent.parameters()):
        assert not torch.equal(old, new), f"{name} did not change"
        assert new.grad is None, f"{name} collects gradients"
    assert not any(p.requires_grad for p in agent.target_critics.parameters())


def test_each_loss_reaches_its_own_parameters_and_no_constant_of_it():
    agent = make_agent()
    parts = dict(critic=agent.critics.parameters(), actor=agent.actor.parameters(), alpha=[agent.log_alpha])
    parts = {name: list(part) for name, part in parts.items()}
    parts["target"] = list(agent.target_critics.requires_grad_(True).parameters())  # would let a gradient through
    reached = {}

    def spy(name):
        def minimize(loss):
            slopes = {k: torch.autograd.grad(loss, p, retain_graph=True, allow_unused=True) for k, p in parts.items()}
            reached[name] = {part for part, slope in slopes.items() if any(s is not None for s in slope)}

        getattr(agent, f"{name}_optimizer").minimize = minimize

    for name in NETWORKS:
        spy(name)
    agent.update(*make_batch())
    # the policy's loss leads through the critics; that it does not move them is for the next test
    assert reached == {"critic": {"critic"}, "actor": {"actor", "critic"}, "alpha": {"alpha"}}


def test_critics_move_in_their_own_step_alone():
    agent, after = make_agent(), []
    step = agent.critic_optimizer.minimize

    def minimize(loss):
        step(loss)
        after.extend(deepcopy(list(agent.critics.parameters())))

    agent.critic_optimizer.minimize = minimize
    agent.update(*make_batch())
    same(agent.critics.parameters(), after, 0)


def test_shapes():
    actor, critics = sac.Actor(OBS, ACTION), sac.Critics(OBS, ACTION, hidden=8, count=4)
    buffer = sac.ReplayBuffer(10, OBS, ACTION)
    ones = np.ones((3, max(OBS, ACTION)))
    buffer.add(ones[:, :OBS], ones[:, :ACTION], ones[:, 0], ones[:, 0] > 0, ones[:, :OBS])
    batch = buffer[buffer.sample(ROWS, torch.Generator())]
    assert [tuple(x.shape) for x in batch] == [(ROWS, OBS), (ROWS, ACTION), (ROWS,), (ROWS,), (ROWS, OBS)]
    action, log_prob = actor(batch.obs, torch.zeros(ROWS, ACTION))
    assert action.shape == (ROWS, ACTION) and log_prob.shape == (ROWS,)
    assert critics(batch.obs, action).shape == (4, ROWS)


def test_a_batch_is_the_mean_of_its_rows():
    """One row alone cannot be broadcast wrongly: (B,) against (B, 1) would couple the rows and end the equality."""
    agent, data = make_agent(q_lr=0.0), make_batch()  # critics at rest, as their step would couple the rows as well
    whole, rows = deepcopy(agent), [deepcopy(agent) for _ in range(ROWS)]
    losses, parts = whole.update(*data), [rows[i].update(*row(i, *data)) for i in range(ROWS)]
    for key, value in losses.items():
        assert value.item() == pytest.approx(np.mean([part[key].item() for part in parts]), rel=1e-12), key
    for name in (f"{network}_optimizer" for network in NETWORKS):
        each = zip(*(gradients(getattr(part, name)) for part in rows))
        same(gradients(getattr(whole, name)), [torch.stack(g).mean(0) for g in each], 1e-12)


def test_order_of_rows_does_not_matter():
    agent, (batch, noise) = make_agent(), make_batch()
    other, order = deepcopy(agent), torch.tensor([3, 0, 4, 1, 2])
    expected, losses = agent.update(batch, noise), other.update(sac.Batch(*(x[order] for x in batch)), noise[:, order])
    same(losses.values(), expected.values(), 1e-12)
    for name in (f"{network}_optimizer" for network in NETWORKS):
        same(gradients(getattr(other, name)), gradients(getattr(agent, name)), 1e-12)


@pytest.mark.parametrize("i", range(ROWS))
@pytest.mark.parametrize("column", sac.Batch._fields)
def test_every_entry_of_a_batch_matters(column, i):
    agent, (batch, noise) = make_agent(), make_batch()
    batch = batch._replace(terminated=torch.zeros(ROWS).double())  # an ended row rightly ignores its next observation
    changed = getattr(batch, column).clone()
    changed[i] = 1 - changed[i]
    before = deepcopy(agent).update(batch, noise)
    after = agent.update(batch._replace(**{column: changed}), noise)
    touched = {"obs": {"qf1_values", "entropy"}, "action": {"qf1_values"}}.get(column, {"target_q"})
    for key in ("qf1_values", "entropy", "target_q"):
        assert (before[f"losses/{key}"] != after[f"losses/{key}"]) == (key in touched), key
    assert before["losses/qf_loss"] != after["losses/qf_loss"]


def test_noise_decides_everything_random_and_each_half_has_its_place():
    agent, (batch, noise) = make_agent(), make_batch()
    first, again, *others = [deepcopy(agent) for _ in range(4)]
    losses, repeated = first.update(batch, noise), again.update(batch, noise)
    same(repeated.values(), losses.values(), 0)
    same(again.state_dict().values(), first.state_dict().values(), 0)
    for half, other in enumerate(others):
        changed = noise.clone()
        changed[half] += 0.5
        results = other.update(batch, changed)
        same_target, same_entropy = (results[f"losses/{k}"] == losses[f"losses/{k}"] for k in ("target_q", "entropy"))
        assert (bool(same_target), bool(same_entropy)) == (half == 1, half == 0)
        assert results["losses/actor_loss"] != losses["losses/actor_loss"]


# The temperature


@pytest.mark.parametrize("action_dim", [1, 2, 17])
def test_target_entropy_is_minus_the_number_of_actions(action_dim):
    assert sac.SAC(OBS, action_dim, sac.Args()).target_entropy == -action_dim


@pytest.mark.parametrize("std, target, direction", [
    (1e-4, None, 1),  # almost deterministic: entropy far below -dim(A)
    (0.8, None, -1),  # almost uniform: entropy about dim(A) log 2
    (0.8, 3.0, 1),  # no policy on (-1, 1) reaches an entropy above dim(A) log 2
    (1e-4, -100.0, -1),
])  # fmt: skip
def test_alpha_rises_below_the_target_entropy_and_falls_above(std, target, direction):
    agent = make_agent()
    set_policy(agent.actor, [0.0] * ACTION, [math.log(std)] * ACTION)
    agent.target_entropy = agent.target_entropy if target is None else target
    before = agent.log_alpha.item()
    for seed in range(8):
        losses = agent.update(*make_batch(seed=seed))
        assert direction * (agent.target_entropy - losses["losses/entropy"].item()) > 0, "not the case meant"
        after = agent.log_alpha.item()
        assert direction * (after - before) > 1e-5
        before = after


# The optimizer


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1.0, 1e4])  # the smallest is where eps counts
def test_adam_equals_that_of_torch_over_50_steps(scale, dtype, tolerance):
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((), (7,), (3, 4, 5))]
    theirs = deepcopy(ours)
    optimizer, expected = sac.Adam(ours, 1e-3), torch.optim.Adam(theirs, lr=1e-3)
    optimizer = optimizer.to(dtype)
    for _ in range(50):
        slopes = [scale * torch.randn_like(p) for p in ours]
        optimizer.minimize(sum((p * slope).sum() for p, slope in zip(ours, slopes)))
        for p, slope in zip(theirs, slopes):
            p.grad = slope
        expected.step()
        same(ours, theirs, tolerance)


# Learning


@pytest.mark.only("sac_continuous")  # it takes long, and the update was held against the reference above
def test_bandit_learns_the_best_tanh_gaussian():
    """Reward -(a - 0.6)^2, one step per episode, alpha held: the best policy of this family is found by quadrature.

    Its objective E[r] + alpha H is missed by less than 0.0005, where the policy of the start misses it by about 0.5.
    """
    aim, alpha = 0.6, 0.2
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / weights.sum()

    def objective(mean, std):
        u = np.asarray(mean)[..., None] + np.asarray(std)[..., None] * nodes
        reward = -((np.tanh(u) - aim) ** 2 @ weights)
        entropy = np.log(std) + 0.5 * np.log(2 * np.pi * np.e) - 2 * np.log(np.cosh(u)) @ weights
        return reward + alpha * entropy

    mean, std, width = 0.0, 1.0, 0.95
    for _ in range(8):  # ever finer grids around the best point so far
        grid = np.meshgrid(mean + width * np.linspace(-2, 2, 41), std * (1 + width * np.linspace(-1, 1, 41)))
        best = objective(*grid).argmax()
        mean, std, width = grid[0].flat[best], grid[1].flat[best], width / 4

    torch.manual_seed(0)
    agent = sac.SAC(1, 1, sac.Args())
    nn.init.constant_(agent.log_alpha, math.log(alpha))
    agent.alpha_optimizer.minimize = lambda loss: None
    ones, policies = torch.ones(64, 1), []
    for step in range(1000):
        if step % 25 == 0:  # mean and standard deviation under the tanh, from the actions at noise -1 and 1
            low, high = np.arctanh(agent.act(np.ones((2, 1)), torch.tensor([[-1.0], [1.0]])).astype(float))[:, 0]
            policies.append(((low + high) / 2, (high - low) / 2))
        action = torch.rand(64, 1) * 2 - 1
        agent.update(sac.Batch(ones, action, -(action[:, 0] - aim).square(), ones[:, 0], ones), torch.randn(2, 64, 1))
    learned_mean, learned_std = np.mean(policies[-20:], axis=0)  # half of them: a policy under Adam never rests
    assert objective(mean, std) - objective(*policies[0]) > 0.2
    assert -1e-9 <= objective(mean, std) - objective(learned_mean, learned_std) < 0.0005
    expected, learned = np.tanh(mean + std * nodes) @ weights, np.tanh(learned_mean + learned_std * nodes) @ weights
    assert learned == pytest.approx(expected, abs=0.02)
    assert learned_std == pytest.approx(std, rel=0.05)
