"""The theory behind the scripts: soft policy iteration, and what the scripts' own updates come to.

On a finite problem soft policy iteration reaches the optimum that soft value iteration finds
independently. On a continuous problem small enough for quadrature, critics and policy trained by
the script's own updates approach the soft-optimal Q and policy. With a fault they do not.

    python tests/test_theory.py docs/figures/soft-optimal.png  # the figure of the walkthrough
"""

import functools
import sys
import types
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))  # for the command above
import sac_continuous

# A finite problem: soft policy iteration ----------------------------------------------------------

STATES, ACTIONS, GAMMA, ALPHA = 6, 3, 0.9, 0.4


def finite_problem() -> tuple[np.ndarray, np.ndarray]:
    """Rewards (S, A) and transition probabilities (S, A, S); what is missing to 1 is an end."""
    random = np.random.default_rng(0)
    reward = random.normal(size=(STATES, ACTIONS))
    going_on = random.uniform(0.5, 1, size=(STATES, ACTIONS, 1))
    return reward, going_on * random.dirichlet(np.full(STATES, 0.5), size=(STATES, ACTIONS))


def soft_value_iteration(reward: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """The soft-optimal Q (S, A) to 30 digits, by V(s) = alpha log sum_a exp(Q(s, a) / alpha)."""
    with mpmath.workdps(40):
        alpha, gamma = mpmath.mpf(ALPHA), mpmath.mpf(GAMMA)
        value = [mpmath.mpf(0)] * STATES
        change = mpmath.mpf(1)
        while change > mpmath.mpf(10) ** -30:
            q = [
                [
                    mpmath.mpf(reward[s, a]) + gamma * mpmath.fdot(probability[s, a], value)
                    for a in range(ACTIONS)
                ]
                for s in range(STATES)
            ]
            new = [alpha * mpmath.log(sum(mpmath.exp(x / alpha) for x in row)) for row in q]
            change = max(abs(a - b) for a, b in zip(new, value))
            value = new
        return np.array([[float(x) for x in row] for row in q])


def evaluate_policy(policy, reward, probability, sign=1.0) -> np.ndarray:
    """Q (S, A) of a policy (S, A): the solution of the linear soft Bellman equations.

    The value of a state is that of its actions plus `sign` times alpha times the entropy.
    """
    entropy = -(policy * np.log(policy)).sum(1)
    to_next = np.einsum("sat,tb->satb", probability, policy).reshape(STATES * ACTIONS, -1)
    constant = (reward + GAMMA * probability @ (sign * ALPHA * entropy)).reshape(-1)
    identity = np.eye(STATES * ACTIONS)
    return np.linalg.solve(identity - GAMMA * to_next, constant).reshape(STATES, ACTIONS)


def improve_policy(q: np.ndarray) -> np.ndarray:
    """The policy (S, A) in proportion to exp(Q / alpha)."""
    weight = np.exp((q - q.max(1, keepdims=True)) / ALPHA)
    return weight / weight.sum(1, keepdims=True)


def soft_policy_iteration(sign=1.0) -> list[np.ndarray]:
    """The policies (S, A) of 30 improvements, from the uniform one on."""
    reward, probability = finite_problem()
    policies = [np.full((STATES, ACTIONS), 1 / ACTIONS)]
    for _ in range(30):
        q = evaluate_policy(policies[-1], reward, probability, sign)
        policies.append(improve_policy(q))
    return policies


def test_soft_policy_iteration_reaches_the_optimum_that_soft_value_iteration_finds():
    reward, probability = finite_problem()
    optimum = soft_value_iteration(reward, probability)
    last = soft_policy_iteration()[-1]
    np.testing.assert_allclose(evaluate_policy(last, reward, probability), optimum, atol=1e-12)
    np.testing.assert_allclose(last, improve_policy(optimum), atol=1e-12)


def test_each_improvement_raises_q_everywhere_until_nothing_is_left_to_gain():
    values = [evaluate_policy(policy, *finite_problem()) for policy in soft_policy_iteration()]
    gains = np.diff(values, axis=0)
    assert gains.min() > -1e-12
    assert gains[0].min() > 1e-3
    assert abs(gains[-1]).max() < 1e-12


def test_with_the_wrong_sign_of_the_entropy_the_iteration_ends_below_the_optimum():
    reward, probability = finite_problem()
    optimum = soft_value_iteration(reward, probability)
    policies = soft_policy_iteration(sign=-1.0)
    np.testing.assert_allclose(policies[-1], policies[-2], atol=1e-12)
    shortfall = optimum - evaluate_policy(policies[-1], reward, probability)
    assert shortfall.min() > 0.01


# A continuous problem: what the script's updates come to ------------------------------------------
#
# The state x is a number, and so is the action a. The task ends at random, more often to the right,
# so that its end costs what would have come; a time limit cuts each episode after five steps.

TEMPERATURE, DISCOUNT, TIME_LIMIT = 0.25, 0.8, 5
STATE_GRID = np.linspace(-2.5, 2.5, 1001)  # no state leaves [-2.5, 2.5]
NODES, WEIGHTS = np.polynomial.legendre.leggauss(64)  # actions in [-1, 1]
SHOWN = np.linspace(-1, 1, 21)  # where the results are compared


def next_state(x, a):
    return 0.8 * x + 0.5 * a


def reward(x, a):
    return 1.5 - (next_state(x, a) - 0.3) ** 2


def end_probability(x, a):
    return 0.8 / (1 + np.exp(-4 * (next_state(x, a) - 0.2)))


@functools.cache
def optimal_value() -> np.ndarray:
    """V*(x) on STATE_GRID, by soft value iteration; integrals over actions by quadrature."""
    x = STATE_GRID[:, None]
    value = np.zeros(len(STATE_GRID))
    for _ in range(200):
        later = (1 - end_probability(x, NODES)) * np.interp(next_state(x, NODES), STATE_GRID, value)
        q = reward(x, NODES) + DISCOUNT * later
        value = TEMPERATURE * np.log(np.exp(q / TEMPERATURE) @ WEIGHTS)
    return value


def optimal_q(x, a):
    going_on = 1 - end_probability(x, a)
    value = np.interp(next_state(x, a), STATE_GRID, optimal_value())
    return reward(x, a) + DISCOUNT * going_on * value


def optimal_log_density(x, a):
    value = np.interp(x, STATE_GRID, optimal_value())
    return (optimal_q(x, a) - value) / TEMPERATURE


def fill(buffer, flags: str):
    """Episodes of uniformly random actions; `flags` says what is stored as terminated."""
    random = np.random.default_rng(0)
    x = random.uniform(-1.5, 1.5, len(buffer.rows) // TIME_LIMIT)
    for t in range(TIME_LIMIT):
        a = random.uniform(-1, 1, len(x))
        terminated = random.random(len(x)) < end_probability(x, a)
        truncated = np.full(len(x), t == TIME_LIMIT - 1)
        stored = {
            "right": terminated,
            "truncated taken for terminated": terminated | truncated,
            "terminated taken for truncated": np.zeros(len(x), bool),
        }[flags]
        following = next_state(x, a)
        buffer.add(x[:, None], a[:, None], reward(x, a), stored, following[:, None])
        x = following[~terminated]


def script_with(change: tuple[str, str] | None) -> types.ModuleType:
    """sac_continuous.py, with one piece of its text replaced by another."""
    text = Path(sac_continuous.__file__).read_text()
    if change:
        assert text.count(change[0]) == 1
        text = text.replace(*change)
    module = types.ModuleType("changed_script")
    module.__file__ = sac_continuous.__file__
    sys.modules["changed_script"] = module  # dataclasses look there
    exec(compile(text, module.__file__, "exec"), module.__dict__)
    return module


def train_from_replay(change=None, flags="right", updates=1200):
    """The agent after so many of the script's own updates, temperature fixed, networks 64 wide."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    script = script_with(change)
    script.Actor = functools.partial(script.Actor, hidden=64)
    script.Critics = functools.partial(script.Critics, hidden=64)
    args = script.Args(gamma=DISCOUNT, tau=0.02, policy_lr=1e-3, q_lr=2e-3)
    agent = script.SAC(1, 1, args)
    agent.log_alpha.data.fill_(np.log(TEMPERATURE))
    agent.alpha_optimizer.lr = 0.0
    buffer = script.ReplayBuffer(50_000, 1, 1)
    fill(buffer, flags)
    random = torch.Generator().manual_seed(0)
    for update in range(updates):
        # A falling learning rate, so that what is left is the method's error and not noise.
        for optimizer, lr in [(agent.actor_optimizer, 1e-3), (agent.critic_optimizer, 2e-3)]:
            optimizer.lr = lr * min(1.0, 2 * (1 - update / updates))
        batch = buffer[buffer.sample_index(256, random)]
        agent.update(batch, torch.randn((2, 256, 1), generator=random))
    return agent


@torch.no_grad()
def learned_q(agent, x, a) -> np.ndarray:
    x, a = np.broadcast_arrays(x, a)
    columns = [torch.tensor(y.reshape(-1, 1), dtype=torch.float32) for y in (x, a)]
    return agent.critics(*columns).mean(0).numpy().reshape(x.shape)


def q_error(agent) -> float:
    """Root mean square error of Q over states and actions, in standard deviations of Q*."""
    x, a = SHOWN[:, None], SHOWN[None, :]
    truth = optimal_q(x, a)
    return np.sqrt(np.mean((learned_q(agent, x, a) - truth) ** 2)) / truth.std()


@torch.no_grad()
def policy_divergence(agent) -> float:
    """The mean over states of KL(pi || pi*) in nats, by Gauss-Hermite quadrature."""
    noise, weight = np.polynomial.hermite_e.hermegauss(40)
    x = np.repeat(SHOWN, len(noise))
    columns = [x, np.tile(noise, len(SHOWN))]
    columns = [torch.tensor(y[:, None], dtype=torch.float32) for y in columns]
    action, log_density = agent.actor(*columns)
    optimal = optimal_log_density(x, action.squeeze(1).double().numpy())
    difference = (log_density.numpy() - optimal).reshape(len(SHOWN), -1)
    return float((difference @ weight / weight.sum()).mean())


@functools.cache
def least_divergence() -> float:
    """The smallest mean of KL(pi || pi*) over policies that are Gaussians under a tanh."""
    noise, weight = np.polynomial.hermite_e.hermegauss(40)
    mean = np.linspace(-2, 2, 81)[:, None, None]
    log_std = np.linspace(-2, 1, 61)[:, None]
    u = mean + np.exp(log_std) * noise
    log_slope = 2 * (np.log(2) - u - np.logaddexp(0, -2 * u))
    log_density = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi) - log_slope
    divergences = []
    for x in SHOWN:
        difference = log_density - optimal_log_density(x, np.tanh(u))
        divergences.append((difference @ weight / weight.sum()).min())
    return float(np.mean(divergences))


FAULTS = {
    "wrong sign in the target": dict(
        change=("next_q - alpha * next_log_prob", "next_q + alpha * next_log_prob")
    ),
    "no entropy in the target": dict(change=("next_q - alpha * next_log_prob", "next_q")),
    "wrong sign in the policy's loss": dict(
        change=("(alpha * log_prob - min_q).mean()", "(-alpha * log_prob - min_q).mean()")
    ),
    "terminated taken for truncated": dict(flags="terminated taken for truncated"),
    "truncated taken for terminated": dict(flags="truncated taken for terminated"),
}


@pytest.mark.slow
def test_the_scripts_updates_approach_the_soft_optimal_q_and_policy():
    agent = train_from_replay()
    assert q_error(agent) < 0.08
    # The optimal policy is no Gaussian under a tanh: what counts is the distance to the best one.
    assert least_divergence() < policy_divergence(agent) < least_divergence() + 0.01


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_with_a_fault_they_do_not(fault):
    agent = train_from_replay(**FAULTS[fault])
    assert q_error(agent) > 0.16
    assert policy_divergence(agent) > least_divergence() + 0.012


def plot(path: str):
    """Q, policy and soft value: by quadrature, learned, and learned with the wrong sign."""
    learned = train_from_replay()
    faulty = train_from_replay(**FAULTS["wrong sign in the target"])
    left, middle, right = Figure(figsize=(12, 4), layout="constrained").subplots(1, 3)
    a = np.linspace(-0.995, 0.995, 200)
    for color, x in zip(("C0", "C1", "C2"), (-0.8, 0.0, 0.8)):
        left.plot(a, optimal_q(x, a), color, label=f"x = {x:g}")
        left.plot(a, learned_q(learned, x, a), color, ls="--")
        left.plot(a, learned_q(faulty, x, a), color, ls=":")
        middle.plot(a, np.exp(optimal_log_density(x, a)), color)
        middle.plot(*density(learned, x), color, ls="--")
        middle.plot(*density(faulty, x), color, ls=":")
    left.set(title="Q(x, a)", xlabel="action a")
    left.legend()
    middle.set(title="density of the policy at x", xlabel="action a")
    right.plot(SHOWN, np.interp(SHOWN, STATE_GRID, optimal_value()), "k", label="soft-optimal")
    right.plot(SHOWN, soft_value(learned), "k--", label="learned")
    right.plot(SHOWN, soft_value(faulty), "k:", label="learned, wrong sign of the entropy")
    right.set(title="soft value V(x)", xlabel="state x")
    right.legend()
    left.figure.savefig(path, dpi=120)


@torch.no_grad()
def density(agent, x: float) -> tuple[np.ndarray, np.ndarray]:
    """Actions in rising order and the policy's density at them."""
    noise = torch.linspace(-5, 5, 400)[:, None]
    action, log_density = agent.actor(torch.full_like(noise, x), noise)
    return action.squeeze(1).numpy(), log_density.exp().numpy()


@torch.no_grad()
def soft_value(agent) -> np.ndarray:
    """E[Q - alpha log pi] (len(SHOWN),) of the learned Q and policy."""
    noise, weight = np.polynomial.hermite_e.hermegauss(40)
    values = []
    for x in SHOWN:
        columns = torch.tensor(noise[:, None], dtype=torch.float32)
        action, log_density = agent.actor(torch.full_like(columns, float(x)), columns)
        q = learned_q(agent, np.full(len(noise), x), action.squeeze(1).numpy())
        values.append((q - TEMPERATURE * log_density.numpy()) @ weight / weight.sum())
    return np.array(values)


if __name__ == "__main__":
    plot(sys.argv[1])
