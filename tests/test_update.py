"""The mathematics of SAC against independent sources.

Those are mpmath, quadrature, numbers worked out by hand, torch.optim, and separate torch.nn
networks that follow the definitions. Most of it runs in float64, so that tolerances can be tight.
"""

import math
import re
from copy import deepcopy
from types import SimpleNamespace

import gymnasium as gym
import mpmath
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import ROOT, same
from torch.distributions import Normal

OBS = 3
ACTION = 2
ROWS = 5
COLUMNS = ["obs", "action", "reward", "terminated", "next_obs"]
NETWORKS = ["critic", "actor", "alpha"]  # in the order of their steps
LOSSES = ["qf_loss", "actor_loss", "alpha_loss", "alpha", "qf1_values", "target_q", "entropy"]


def make_agent(sac, **flags):
    """An agent as in the midst of training.

    Its target critics are apart from the critics, no bias is zero, and alpha is not one.
    """
    torch.manual_seed(0)
    agent = sac.SAC(OBS, ACTION, sac.Args(**flags)).double()
    with torch.no_grad():
        for network in (agent.actor, agent.critics, agent.target_critics):
            for p in network.parameters():
                p += 0.05 * torch.randn_like(p)
        agent.log_alpha.fill_(-1.0)
    return agent


def make_batch(sac, rows=ROWS, seed=0):
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
    return batch, normal(2, rows, ACTION)


def one_row(i, batch, noise):
    return type(batch)(*(column[i : i + 1] for column in batch)), noise[:, i : i + 1]


def set_policy(actor, mean, log_std):
    """Make the policy this Gaussian under the tanh for every observation."""
    *_, weight, bias = actor.parameters()
    with torch.no_grad():
        weight.zero_()
        bias.copy_(torch.tensor([*mean, *log_std], dtype=torch.float64))


def set_q(critics, constants):
    """Make each critic this constant."""
    with torch.no_grad():
        for p in critics.parameters():
            p.zero_()
        critics.biases[-1].copy_(torch.tensor(constants)[:, None, None])


def optimizer_of(agent, network):
    return getattr(agent, f"{network}_optimizer")


def gradients(optimizer):
    """What the optimizer got at its first step: its running mean then is a tenth of it."""
    assert optimizer.steps == 1
    return [mean / 0.1 for mean in optimizer.mean]


# The same networks and update as separate nn.Linear layers, torch.optim and .backward() -----------


def perceptron(weights, biases):
    """nn.Linear layers that copy weights (in, out) and biases."""
    layers = []
    for weight, bias in zip(weights, biases):
        layer = nn.Linear(*weight.shape, dtype=weight.dtype)
        layer.weight.data = weight.detach().T.clone()
        layer.bias.data = bias.detach().flatten().clone()
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def separate(critics):
    """One perceptron per critic."""
    perceptrons = nn.ModuleList()
    for c in range(len(critics.weights[0])):
        weights = [weight[c] for weight in critics.weights]
        biases = [bias[c] for bias in critics.biases]
        perceptrons.append(perceptron(weights, biases))
    return perceptrons


def stacked(perceptrons, read=lambda p: p.detach()):
    """Parameters of separate critics, or read(parameter), in the layout of the batched ones."""
    layers = list(zip(*(network[::2] for network in perceptrons)))
    weights = [torch.stack([read(part.weight).T for part in layer]) for layer in layers]
    biases = [torch.stack([read(part.bias)[None] for part in layer]) for layer in layers]
    return weights + biases


def q_of(perceptrons, obs, action):
    obs_and_action = torch.cat([obs, action], dim=1)
    return torch.stack([network(obs_and_action)[:, 0] for network in perceptrons])


class Reference:
    """An update by the definitions, on copies of an agent's networks."""

    def __init__(self, agent, args):
        layers = list(agent.actor.parameters())
        self.args = args
        self.policy = perceptron([weight.T for weight in layers[::2]], layers[1::2])
        self.critics = separate(agent.critics)
        self.targets = separate(agent.target_critics)
        self.log_alpha = nn.Parameter(agent.log_alpha.detach().clone())
        self.optimizers = {
            "critic": torch.optim.Adam(self.critics.parameters(), lr=args.q_lr),
            "actor": torch.optim.Adam(self.policy.parameters(), lr=args.policy_lr),
            "alpha": torch.optim.Adam([self.log_alpha], lr=args.policy_lr),
        }
        self.gradients = {}

    def sample(self, obs, noise):
        mean, log_std = self.policy(obs).split(ACTION, dim=1)
        u = mean + log_std.exp() * noise
        slope = 1 - u.tanh() ** 2
        density = Normal(mean, log_std.exp()).log_prob(u).exp() / slope
        return u.tanh(), density.prod(dim=1).log()

    def step(self, name, loss):
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        loss.backward()
        self.optimizers[name].step()
        self.gradients[name] = {
            "critic": lambda: stacked(self.critics, lambda p: p.grad.clone()),
            "actor": lambda: [p.grad.clone() for p in self.policy.parameters()],
            "alpha": lambda: [self.log_alpha.grad.clone()],
        }[name]()

    def update(self, batch, noise):
        """The losses by name, as floats."""
        alpha = self.log_alpha.detach().exp()
        next_action, next_log_prob = self.sample(batch.next_obs, noise[0])
        one, other = q_of(self.targets, batch.next_obs, next_action)
        next_value = torch.minimum(one, other) - alpha * next_log_prob
        bootstrapped = batch.reward + self.args.gamma * next_value
        y = torch.where(batch.terminated == 1, batch.reward, bootstrapped).detach()
        q = q_of(self.critics, batch.obs, batch.action)
        critic_loss = (F.mse_loss(q[0], y) + F.mse_loss(q[1], y)) / 2
        self.step("critic", critic_loss)

        action, log_prob = self.sample(batch.obs, noise[1])
        one, other = q_of(self.critics, batch.obs, action)  # critics that have made their step
        actor_loss = alpha * log_prob.mean() - torch.minimum(one, other).mean()
        self.step("actor", actor_loss)

        alpha_loss = -(self.log_alpha * (log_prob.detach() - ACTION)).mean()
        self.step("alpha", alpha_loss)

        tau = self.args.tau
        with torch.no_grad():
            for target, p in zip(self.targets.parameters(), self.critics.parameters()):
                target.copy_((1 - tau) * target + tau * p)
        results = {
            "qf_loss": critic_loss,
            "actor_loss": actor_loss,
            "alpha_loss": alpha_loss,
            "alpha": alpha,
            "qf1_values": q[0].mean(),
            "target_q": y.mean(),
            "entropy": -log_prob.mean(),
        }
        return {name: value.item() for name, value in results.items()}


# The policy ---------------------------------------------------------------------------------------


def density_of_tanh(mean, log_std, noise):
    """Log-density of a = tanh(u) at u = mean + std noise; 1 - tanh(20)^2 needs 18 digits."""
    std = mpmath.exp(log_std)
    u = mean + std * noise
    normal = mpmath.exp(-(((u - mean) / std) ** 2) / 2) / (std * mpmath.sqrt(2 * mpmath.pi))
    return mpmath.log(normal / (1 - mpmath.tanh(u) ** 2))


@pytest.mark.parametrize("mean", [0.0, 1.25, -4.0])
@pytest.mark.parametrize("std", [0.1, 0.5, 1.0, 6.0])
@pytest.mark.parametrize("u", [-20.0, -9.0, -1.0, 0.3, 5.0, 12.0, 20.0])
def test_log_prob_and_its_gradients_match_mpmath(sac, mean, std, u):
    actor = sac.Actor(OBS, 1)  # float32, as in training
    set_policy(actor, [mean], [math.log(std)])
    bias = list(actor.parameters())[-1]
    noise = torch.tensor([[(u - mean) / std]], requires_grad=True)

    action, log_prob = actor(torch.ones(1, OBS), noise)
    by_bias, by_noise = torch.autograd.grad(log_prob.sum(), [bias, noise])

    with mpmath.workdps(60):
        point = [mpmath.mpf(x) for x in (*bias.tolist(), noise.item())]  # as float32 has them
        expected_action = float(mpmath.tanh(point[0] + mpmath.exp(point[1]) * point[2]))
        expected_log_prob = float(density_of_tanh(*point))
        orders = [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
        slopes = [float(mpmath.diff(density_of_tanh, point, order)) for order in orders]
    assert action.item() == pytest.approx(expected_action, rel=1e-5)
    assert log_prob.item() == pytest.approx(expected_log_prob, rel=1e-6, abs=1e-5)
    assert [*by_bias.tolist(), by_noise.item()] == pytest.approx(slopes, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("mean", [0.0, -1.0, 1.5])
@pytest.mark.parametrize("std", [0.05, 0.5, 1.5])
def test_density_of_actions_integrates_to_one_and_is_that_of_the_samples(sac, mean, std):
    actor = sac.Actor(OBS, 1).double()
    set_policy(actor, [mean], [math.log(std)])
    middles = (torch.arange(20_000, dtype=torch.float64)[:, None] + 0.5) / 20_000
    obs = torch.ones(len(middles), OBS, dtype=torch.float64)
    a = -(math.pi * middles).cos()  # dense towards both ends
    da = (math.pi * middles).sin() * math.pi / 20_000

    with torch.no_grad():
        density = actor(obs, (a.atanh() - mean) / std)[1].exp()[:, None]
        samples = actor(obs, torch.special.ndtri(middles))[0]  # at noise of equal probability

    assert (density * da).sum().item() == pytest.approx(1, abs=1e-6)
    for power in (1, 2):
        moment = (density * a**power * da).sum().item()
        assert moment == pytest.approx((samples**power).mean().item(), abs=1e-5)


@pytest.mark.parametrize(
    "log_std, used",
    [(-100, -20), (-20.5, -20), (-19.5, -19.5), (1.9, 1.9), (2.1, 2), (100, 2)],
)
def test_log_std_is_held_between_minus_20_and_2(sac, log_std, used):
    actor = sac.Actor(OBS, 1).double()
    set_policy(actor, [0.0], [log_std])
    noise = torch.tensor([[1.0], [0.0]]).double()

    action, log_prob = actor(torch.ones(2, OBS).double(), noise)

    assert action[0].item() == pytest.approx(math.tanh(math.exp(used)), rel=1e-12)
    assert log_prob[1].item() == pytest.approx(-used - math.log(2 * math.pi) / 2, rel=1e-12)


@pytest.mark.parametrize("obs_dim, nats", [(11, 0.6), (111, 0.2)])
def test_a_new_policy_is_as_random_as_the_walkthrough_says(sac, obs_dim, nats):
    entropies = []
    for seed in range(20):
        torch.manual_seed(seed)
        actor = sac.Actor(obs_dim, ACTION)
        with torch.no_grad():
            _, log_prob = actor(torch.randn(1000, obs_dim), torch.randn(1000, ACTION))
        entropies.append(-log_prob.mean().item() / ACTION)

    assert np.mean(entropies) == pytest.approx(nats, abs=0.05)
    page = " ".join((ROOT / "docs" / "walkthrough.md").read_text().split())
    assert re.search(rf"\b{obs_dim} [^.]* it has {nats}\b", page)


def test_act_gives_the_actions_of_the_policy_and_zero_noise_the_mode(sac):
    torch.manual_seed(0)
    agent = sac.SAC(OBS, ACTION, sac.Args())
    set_policy(agent.actor, [0.4, -0.7], [-1.0, 0.5])
    obs = np.random.default_rng(0).normal(size=(4, OBS))
    noise = torch.randn(4, ACTION)

    action = agent.act(obs, noise)
    mode = agent.act(obs, 0 * noise)

    u = np.array([0.4, -0.7]) + np.exp([-1.0, 0.5]) * noise.numpy()
    assert isinstance(action, np.ndarray)
    assert action.shape == (4, ACTION)
    np.testing.assert_allclose(action, np.tanh(u), atol=1e-6)
    np.testing.assert_allclose(mode, np.tanh([[0.4, -0.7]] * 4), atol=1e-6)


# The critics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5])
def test_batched_critics_equal_separate_networks_in_values_and_gradients(sac, count):
    torch.manual_seed(0)
    critics = sac.Critics(OBS, ACTION, hidden=32, n_critics=count).double()
    for bias in critics.biases:
        nn.init.normal_(bias)
    perceptrons = separate(critics)
    batch, _ = make_batch(sac)
    weights = torch.randn(count, ROWS).double()

    q = critics(batch.obs, batch.action)
    expected = q_of(perceptrons, batch.obs, batch.action)
    for result in (q, expected):
        (result.square() * weights).sum().backward()

    assert q.shape == (count, ROWS)
    same(q, expected, 1e-13)
    slopes = [p.grad for p in critics.parameters()]
    same(slopes, stacked(perceptrons, lambda p: p.grad), 1e-12)


def agent_of_precision(sac, name):
    """An agent as main() makes it, with that --matmul-precision, in the midst of training."""
    spaces = dict(
        observation_space=gym.spaces.Box(-1, 1, (OBS,)),
        action_space=gym.spaces.Box(-1, 1, (ACTION,)),
    )
    args = sac.Args(matmul_precision=name)
    agent = sac.make_agent(args, SimpleNamespace(**spaces), torch.device("cpu"), None).double()
    agent.load_state_dict(make_agent(sac).state_dict())
    return agent


def to_bfloat16(x):
    return x.bfloat16().double()  # 8 bits are left of 24


@pytest.mark.parametrize("network", ["critics", "target_critics"])
def test_medium_precision_rounds_the_hidden_products_of_the_critics(sac, network):
    batch, _ = make_batch(sac)
    critics = getattr(agent_of_precision(sac, "medium"), network)
    x = torch.cat([batch.obs, batch.action], dim=1).expand(2, -1, -1)
    for weight, bias in zip(critics.weights[:-1], critics.biases[:-1]):
        x = (to_bfloat16(to_bfloat16(x) @ to_bfloat16(weight)) + bias).relu()
    expected = (x @ critics.weights[-1] + critics.biases[-1]).squeeze(-1)

    q = critics(batch.obs, batch.action)

    exact = getattr(agent_of_precision(sac, "highest"), network)(batch.obs, batch.action)
    rounding = (q - exact).norm()
    assert q.dtype == torch.float64
    assert 1e-4 * exact.norm() < rounding < 0.02 * exact.norm()
    # Sums that end on the other side of a bound may be rounded the other way.
    assert (q - expected).norm() < 0.3 * rounding


def test_medium_precision_leaves_the_policy_as_it_is(sac):
    batch, noise = make_batch(sac)
    exact = agent_of_precision(sac, "highest").actor(batch.obs, noise[0])
    rounded = agent_of_precision(sac, "medium").actor(batch.obs, noise[0])
    same(rounded, exact)


def test_with_medium_precision_weights_stay_exact_and_gradients_close(sac):
    data = make_batch(sac)
    exact = agent_of_precision(sac, "highest")
    rounded = agent_of_precision(sac, "medium")

    exact.update(*data)
    rounded.update(*data)

    assert all(tensor.dtype == torch.float64 for tensor in rounded.state_dict().values())
    for network in ("critic", "actor"):
        ours = gradients(optimizer_of(rounded, network))
        theirs = gradients(optimizer_of(exact, network))
        pairs = list(zip(ours, theirs))
        assert len(pairs) == 6
        for close, true in pairs:
            assert 0 < (close - true).norm() < 0.3 * true.norm()


def check_xavier(weight):
    """A sample of the uniform law within +-sqrt(6 / (fan_in + fan_out)).

    Held against it by its extremes and Kolmogorov's distance.
    """
    drawn = weight.detach().flatten().sort().values / math.sqrt(6 / sum(weight.shape))
    assert 0.95 < drawn.max() <= 1
    assert -0.95 > drawn.min() >= -1
    ranks = (torch.arange(len(drawn)) + 0.5) / len(drawn)
    assert ((drawn + 1) / 2 - ranks).abs().max() < 2 / math.sqrt(len(drawn))


SIZES = pytest.mark.parametrize("obs_dim, action_dim", [(3, 1), (17, 6), (300, 20)])


@SIZES
def test_critics_start_xavier_uniform_each_by_itself(sac, obs_dim, action_dim):
    torch.manual_seed(0)
    critics = sac.SAC(obs_dim, action_dim, sac.Args()).critics
    assert len(critics.weights) == len(critics.biases) == 3
    for weight in critics.weights:
        assert len(weight) == 2
        check_xavier(weight[0])
        check_xavier(weight[1])
        assert (weight[0] != weight[1]).float().mean() > 0.99
    assert all((bias == 0).all() for bias in critics.biases)


@SIZES
def test_the_policy_starts_xavier_uniform(sac, obs_dim, action_dim):
    torch.manual_seed(0)
    layers = list(sac.SAC(obs_dim, action_dim, sac.Args()).actor.parameters())
    assert len(layers) == 6
    for weight in layers[::2]:
        check_xavier(weight)
    assert all((bias == 0).all() for bias in layers[1::2])


def test_target_critics_start_as_copies(sac):
    agent = sac.SAC(OBS, ACTION, sac.Args())
    same(list(agent.target_critics.parameters()), list(agent.critics.parameters()))
    pairs = zip(agent.target_critics.parameters(), agent.critics.parameters())
    assert not any(a.data_ptr() == b.data_ptr() for a, b in pairs)
    assert not any(p.requires_grad for p in agent.target_critics.parameters())


# The update ---------------------------------------------------------------------------------------


def update_by_hand(sac):
    """Agent and losses after an update of constant networks: a pencil will do for every number."""
    agent = sac.SAC(1, 1, sac.Args(gamma=0.9, tau=0.1, q_lr=0.25, policy_lr=0.01)).double()
    set_policy(agent.actor, [0.0], [0.0])  # noise 0: u = 0, a = 0, log pi = -log(2 pi) / 2
    set_q(agent.critics, [2.0, -3.0])
    set_q(agent.target_critics, [5.0, 4.0])
    nn.init.constant_(agent.log_alpha, math.log(0.5))
    one = torch.ones(2, 1).double()
    batch = sac.Batch(
        obs=one,
        action=one,
        reward=torch.tensor([1.0, -2.0]).double(),
        terminated=torch.tensor([0.0, 1.0]).double(),
        next_obs=one,
    )
    losses = agent.update(batch, torch.zeros(2, 2, 1).double())
    return agent, {key: value.item() for key, value in losses.items()}


def test_losses_by_hand(sac):
    _, losses = update_by_hand(sac)
    entropy = 0.9189385332046727  # log(2 pi) / 2
    y = 1 + 0.9 * (4 + 0.5 * entropy)  # of the first row; of the second -2, its reward
    assert losses == pytest.approx(
        {
            "losses/target_q": (y - 2) / 2,
            "losses/qf1_values": 2,
            "losses/entropy": entropy,
            "losses/alpha": 0.5,
            "losses/qf_loss": ((2 - y) ** 2 + (2 + 2) ** 2 + (-3 - y) ** 2 + (-3 + 2) ** 2) / 4,
            # Adam's first step is as long as its rate: Q is 1.75 and -2.75 by now.
            "losses/actor_loss": -0.5 * entropy - -2.75,
            "losses/alpha_loss": math.log(0.5) * (entropy + 1),
        },
        rel=1e-7,
    )


def test_steps_by_hand(sac):
    agent, _ = update_by_hand(sac)
    q = agent.critics.biases[-1].flatten().tolist()
    target_q = agent.target_critics.biases[-1].flatten().tolist()
    assert q == pytest.approx([1.75, -2.75], rel=1e-7)
    assert target_q == pytest.approx([4.675, 3.325], rel=1e-7)
    assert agent.log_alpha.item() == pytest.approx(math.log(0.5) - 0.01, rel=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_match_the_reference(sac, name):
    agent = make_agent(sac)
    data = make_batch(sac)
    expected = Reference(agent, sac.Args()).update(*data)

    losses = agent.update(*data)

    assert set(losses) == {f"losses/{name}" for name in LOSSES}
    value = losses[f"losses/{name}"]
    assert value.shape == ()
    assert not value.requires_grad
    assert value.item() == pytest.approx(expected[name], rel=1e-10)


@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_match_the_reference(sac, network):
    agent = make_agent(sac)
    data = make_batch(sac)
    reference = Reference(agent, sac.Args())
    reference.update(*data)

    agent.update(*data)

    same(gradients(optimizer_of(agent, network)), reference.gradients[network], 1e-9)


def test_a_series_of_updates_follows_the_reference(sac):
    """Ten updates with fast learning: what an update leaves behind for the next is checked too."""
    flags = dict(gamma=0.8, tau=0.3, policy_lr=2e-3, q_lr=5e-3)
    agent = make_agent(sac, **flags)
    reference = Reference(agent, sac.Args(**flags))
    for seed in range(10):
        expected = reference.update(*make_batch(sac, seed=seed))
        losses = agent.update(*make_batch(sac, seed=seed))
        results = {name: losses[f"losses/{name}"].item() for name in LOSSES}
        assert results == pytest.approx(expected, rel=1e-6)
    same(list(agent.actor.parameters()), list(reference.policy.parameters()), 1e-6)
    same(list(agent.critics.parameters()), stacked(reference.critics), 1e-6)
    same(list(agent.target_critics.parameters()), stacked(reference.targets), 1e-6)
    same(agent.log_alpha, reference.log_alpha, 1e-6)


@pytest.mark.parametrize("i", range(ROWS))
def test_the_target_is_the_reward_alone_where_the_task_ended(sac, i):
    batch, noise = one_row(i, *make_batch(sac))
    ended = batch._replace(terminated=torch.ones(1).double())
    target_q = make_agent(sac).update(ended, noise)["losses/target_q"]
    # To the last bit: neither value nor entropy of the next state.
    assert target_q.item() == batch.reward.item()


@pytest.mark.parametrize("i", range(ROWS))
def test_the_target_bootstraps_where_the_task_went_on(sac, i):
    agent = make_agent(sac)
    batch, noise = one_row(i, *make_batch(sac))
    going = batch._replace(terminated=torch.zeros(1).double())
    expected = Reference(agent, sac.Args()).update(going, noise)["target_q"]

    target_q = agent.update(going, noise)["losses/target_q"].item()

    assert target_q == pytest.approx(expected, rel=1e-12)
    assert abs(target_q - batch.reward.item()) > 0.01


@pytest.mark.parametrize("tau", [0.005, 0.3, 1.0])
def test_target_critics_move_by_tau_towards_the_new_critics(sac, tau):
    agent = make_agent(sac, tau=tau)
    old = deepcopy(agent.target_critics)
    agent.update(*make_batch(sac))
    pairs = zip(old.parameters(), agent.critics.parameters())
    expected = [p + tau * (new - p) for p, new in pairs]
    same(list(agent.target_critics.parameters()), expected, 1e-8)


def test_every_network_learns_and_nothing_collects_gradients(sac):
    agent = sac.SAC(OBS, ACTION, sac.Args())
    before = deepcopy(agent)
    batch, noise = make_batch(sac)

    agent.update(sac.Batch(*(column.float() for column in batch)), noise.float())

    pairs = list(zip(before.named_parameters(), agent.parameters()))
    assert len(pairs) > 3 * 6
    for (name, old), new in pairs:
        assert not torch.equal(old, new), f"{name} did not change"
        assert new.grad is None, f"{name} collects gradients"


def test_each_loss_reaches_its_own_parameters_and_no_constant_of_it(sac):
    agent = make_agent(sac)
    parts = {
        "critic": list(agent.critics.parameters()),
        "actor": list(agent.actor.parameters()),
        "alpha": [agent.log_alpha],
        # These would let a gradient through.
        "target": list(agent.target_critics.requires_grad_(True).parameters()),
    }
    reached = {}

    def spy_on(network):
        def minimize(loss):
            reached[network] = set()
            for name, part in parts.items():
                slopes = torch.autograd.grad(loss, part, retain_graph=True, allow_unused=True)
                if any(slope is not None for slope in slopes):
                    reached[network].add(name)

        optimizer_of(agent, network).minimize = minimize

    for network in NETWORKS:
        spy_on(network)
    agent.update(*make_batch(sac))

    # The policy's loss leads through the critics; that it does not move them is for the next test.
    assert reached == {"critic": {"critic"}, "actor": {"actor", "critic"}, "alpha": {"alpha"}}


def test_critics_move_in_their_own_step_alone(sac):
    agent = make_agent(sac)
    after_their_step = []
    step = agent.critic_optimizer.minimize

    def minimize(loss):
        step(loss)
        after_their_step.extend(deepcopy(list(agent.critics.parameters())))

    agent.critic_optimizer.minimize = minimize
    agent.update(*make_batch(sac))

    assert len(after_their_step) == 6
    same(list(agent.critics.parameters()), after_their_step)


def test_shapes(sac):
    actor = sac.Actor(OBS, ACTION)
    critics = sac.Critics(OBS, ACTION, hidden=8, n_critics=4)
    buffer = sac.ReplayBuffer(10, OBS, ACTION)
    ones = np.ones(3)
    buffer.add(np.ones((3, OBS)), np.ones((3, ACTION)), ones, ones > 0, np.ones((3, OBS)))

    batch = buffer[buffer.sample_index(ROWS, torch.Generator())]
    action, log_prob = actor(batch.obs, torch.zeros(ROWS, ACTION))
    q = critics(batch.obs, action)

    assert batch.obs.shape == batch.next_obs.shape == (ROWS, OBS)
    assert batch.action.shape == action.shape == (ROWS, ACTION)
    assert batch.reward.shape == batch.terminated.shape == log_prob.shape == (ROWS,)
    assert q.shape == (4, ROWS)


def test_a_batch_is_the_mean_of_its_rows(sac):
    """One row alone cannot be broadcast wrongly: (B,) against (B, 1) would couple the rows."""
    agent = make_agent(sac, q_lr=0.0)  # critics at rest: their step would couple the rows as well
    data = make_batch(sac)
    whole = deepcopy(agent)
    rows = [deepcopy(agent) for _ in range(ROWS)]

    losses = whole.update(*data)
    parts = [rows[i].update(*one_row(i, *data)) for i in range(ROWS)]

    assert len(losses) == len(LOSSES)
    for key, value in losses.items():
        mean = np.mean([part[key].item() for part in parts])
        assert value.item() == pytest.approx(mean, rel=1e-12), key
    for network in NETWORKS:
        of_rows = zip(*(gradients(optimizer_of(row, network)) for row in rows))
        expected = [torch.stack(slopes).mean(0) for slopes in of_rows]
        same(gradients(optimizer_of(whole, network)), expected, 1e-12)


def test_order_of_rows_does_not_matter(sac):
    agent = make_agent(sac)
    other = deepcopy(agent)
    batch, noise = make_batch(sac)
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = sac.Batch(*(column[order] for column in batch))

    losses = agent.update(batch, noise)
    other_losses = other.update(shuffled, noise[:, order])

    same(other_losses, losses, 1e-12)
    for network in NETWORKS:
        ours = gradients(optimizer_of(agent, network))
        same(gradients(optimizer_of(other, network)), ours, 1e-12)


def test_these_are_the_columns_of_a_batch(sac):
    assert list(sac.Batch._fields) == COLUMNS


@pytest.mark.parametrize("i", range(ROWS))
@pytest.mark.parametrize("column", COLUMNS)
def test_every_entry_of_a_batch_matters(sac, column, i):
    agent = make_agent(sac)
    other = deepcopy(agent)
    batch, noise = make_batch(sac)
    # An ended row rightly ignores its next observation.
    batch = batch._replace(terminated=torch.zeros(ROWS).double())
    changed = getattr(batch, column).clone()
    changed[i] = 1 - changed[i]

    losses = agent.update(batch, noise)
    other_losses = other.update(batch._replace(**{column: changed}), noise)

    touched = {"obs": {"qf1_values", "entropy"}, "action": {"qf1_values"}}.get(column, {"target_q"})
    for key in ("qf1_values", "entropy", "target_q"):
        differs = bool(losses[f"losses/{key}"] != other_losses[f"losses/{key}"])
        assert differs == (key in touched), key
    assert losses["losses/qf_loss"] != other_losses["losses/qf_loss"]


def test_noise_decides_everything_random(sac):
    agent = make_agent(sac)
    again = deepcopy(agent)
    data = make_batch(sac)

    torch.manual_seed(1)
    losses = agent.update(*data)
    torch.manual_seed(2)
    repeated = again.update(*data)

    same(repeated, losses)
    same(again.state_dict(), agent.state_dict())


@pytest.mark.parametrize(
    "half, moved, unmoved", [(0, "target_q", "entropy"), (1, "entropy", "target_q")]
)
def test_each_half_of_the_noise_has_its_place(sac, half, moved, unmoved):
    agent = make_agent(sac)
    other = deepcopy(agent)
    batch, noise = make_batch(sac)
    changed = noise.clone()
    changed[half] += 0.5

    losses = agent.update(batch, noise)
    other_losses = other.update(batch, changed)

    assert other_losses[f"losses/{moved}"] != losses[f"losses/{moved}"]
    assert other_losses[f"losses/{unmoved}"] == losses[f"losses/{unmoved}"]
    assert other_losses["losses/actor_loss"] != losses["losses/actor_loss"]


# The temperature ----------------------------------------------------------------------------------


@pytest.mark.parametrize("action_dim", [1, 2, 17])
def test_target_entropy_is_minus_the_number_of_actions(sac, action_dim):
    assert sac.SAC(OBS, action_dim, sac.Args()).target_entropy == -action_dim


@pytest.mark.parametrize(
    "std, target, direction",
    [
        (1e-4, None, 1),  # almost deterministic: entropy far below -dim(A)
        (0.8, None, -1),  # almost uniform: entropy about dim(A) log 2
        (0.8, 3.0, 1),  # no policy on (-1, 1) reaches an entropy above dim(A) log 2
        (1e-4, -100.0, -1),
    ],
)
def test_alpha_rises_below_the_target_entropy_and_falls_above(sac, std, target, direction):
    agent = make_agent(sac)
    set_policy(agent.actor, [0.0] * ACTION, [math.log(std)] * ACTION)
    if target is not None:
        agent.target_entropy = target
    aim = -ACTION if target is None else target
    for seed in range(8):
        before = agent.log_alpha.item()
        entropy = agent.update(*make_batch(sac, seed=seed))["losses/entropy"].item()
        assert direction * (aim - entropy) > 0, "not the case meant"
        assert direction * (agent.log_alpha.item() - before) > 1e-5


# The optimizer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1.0, 1e4])  # the smallest is where eps counts
def test_adam_equals_that_of_torch_over_50_steps(sac, scale, dtype, tolerance):
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((), (7,), (3, 4, 5))]
    theirs = deepcopy(ours)
    optimizer = sac.Adam(ours, 1e-3).to(dtype)
    expected = torch.optim.Adam(theirs, lr=1e-3)
    for _ in range(50):
        slopes = [scale * torch.randn_like(p) for p in ours]
        optimizer.minimize(sum((p * slope).sum() for p, slope in zip(ours, slopes)))
        for p, slope in zip(theirs, slopes):
            p.grad = slope
        expected.step()
        same(ours, theirs, tolerance)


# Learning -----------------------------------------------------------------------------------------


class Bandit:
    """Reward -(a - 0.6)^2, one step per episode, at a fixed alpha, for tanh-Gaussian policies."""

    aim = 0.6
    alpha = 0.2

    def __init__(self):
        nodes, weights = np.polynomial.hermite_e.hermegauss(60)
        self.nodes = nodes
        self.weights = weights / weights.sum()

    def objective(self, mean, std):
        """E[r] + alpha H of policies, by quadrature."""
        mean = np.asarray(mean)
        std = np.asarray(std)
        u = mean[..., None] + std[..., None] * self.nodes
        reward = -((np.tanh(u) - self.aim) ** 2 @ self.weights)
        entropy_of_u = np.log(std) + 0.5 * np.log(2 * np.pi * np.e)
        entropy = entropy_of_u - 2 * np.log(np.cosh(u)) @ self.weights
        return reward + self.alpha * entropy

    def mean_action(self, mean, std):
        return np.tanh(mean + std * self.nodes) @ self.weights

    def best_policy(self):
        """Mean and std, by ever finer grids around the best point so far."""
        mean = 0.0
        std = 1.0
        width = 0.95
        for _ in range(8):
            means = mean + width * np.linspace(-2, 2, 41)
            stds = std * (1 + width * np.linspace(-1, 1, 41))
            grid = np.meshgrid(means, stds)
            best = self.objective(*grid).argmax()
            mean = grid[0].flat[best]
            std = grid[1].flat[best]
            width /= 4
        return mean, std


def policy_of(agent):
    """Mean and std under the tanh, from the actions at noise -1 and 1."""
    actions = agent.act(np.ones((2, 1)), torch.tensor([[-1.0], [1.0]]))
    low, high = np.arctanh(actions.astype(float))[:, 0]
    return (low + high) / 2, (high - low) / 2


@pytest.mark.slow
@pytest.mark.only("sac_continuous")  # the update of the others was held against the reference above
def test_bandit_learns_the_best_tanh_gaussian(sac):
    """Its objective is missed by less than 0.0005; the policy of the start misses it by 0.5."""
    bandit = Bandit()
    torch.manual_seed(0)
    agent = sac.SAC(1, 1, sac.Args())
    nn.init.constant_(agent.log_alpha, math.log(bandit.alpha))
    agent.alpha_optimizer.minimize = lambda loss: None
    ones = torch.ones(64, 1)
    policies = []

    for step in range(1000):
        if step % 25 == 0:
            policies.append(policy_of(agent))
        action = torch.rand(64, 1) * 2 - 1
        reward = -(action[:, 0] - bandit.aim).square()
        agent.update(sac.Batch(ones, action, reward, ones[:, 0], ones), torch.randn(2, 64, 1))

    best = bandit.best_policy()
    learned = np.mean(policies[-20:], axis=0)  # half of them: a policy under Adam never rests
    assert bandit.objective(*best) - bandit.objective(*policies[0]) > 0.2
    assert -1e-9 <= bandit.objective(*best) - bandit.objective(*learned) < 0.0005
    assert bandit.mean_action(*learned) == pytest.approx(bandit.mean_action(*best), abs=0.02)
    assert learned[1] == pytest.approx(best[1], rel=0.05)
