"""The figures of docs/walkthrough.md, each computed here: python docs/figures.py"""

import csv
import math
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

DOCS = Path(__file__).parent
DIAGNOSTICS = DOCS.parent / "benchmark/results/dmc-100k/diagnostics.csv"
matplotlib.rcParams["font.size"] = 12  # legible at half size
STYLES = ["-", "--", ":"]  # with markers and greys, so that nothing hangs on colour
GREYS = ["black", "0.35", "0.6"]


def new_figure(columns: int) -> tuple[Figure, list]:
    figure = Figure(figsize=(4.2 * columns, 3.4), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, columns)))


def save(figure: Figure, name: str):
    figure.savefig(DOCS / "figures" / f"{name}.png", dpi=110)


def tanh_density():
    """A Gaussian before and after tanh, and the logarithm of the slope in float32."""
    figure, (before, after, slope) = new_figure(3)
    u = np.linspace(-4, 4, 801)
    a = np.linspace(-0.999, 0.999, 801)
    for std, style, grey in zip((0.3, 0.8, 1.5), STYLES, GREYS):
        before.plot(u, normal_density(u, 0.5, std), style, color=grey, lw=2, label=f"std {std}")
        density = normal_density(np.arctanh(a), 0.5, std) / (1 - a**2)
        after.plot(a, density, style, color=grey, lw=2, label=f"std {std}")
    before.set(title="Gaussian sample u, mean 0.5", xlabel="u", ylabel="density", ylim=0)
    after.set(title="action a = tanh(u)", xlabel="a", ylabel="density", ylim=0)
    x = torch.linspace(0, 14, 281)
    stable = 2 * (math.log(2) - x - torch.nn.functional.softplus(-2 * x))
    guarded = (1 - x.tanh().square() + 1e-6).log()
    slope.plot(x, stable, "-", color="black", lw=2, label="exact form")
    slope.plot(x, guarded, "--", color="0.35", lw=2, label="with 1e-6 inside")
    slope.set(title="log of the slope of tanh", xlabel="u", ylabel="nats")
    for axes in (before, after, slope):
        axes.legend()
    save(figure, "tanh")


def normal_density(x: np.ndarray, mean: float, std: float) -> np.ndarray:
    return np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))


def overestimation():
    """Error of min_c Q_c at the action where it is highest; every true value is 0."""
    random = np.random.default_rng(1)
    figure, (axes,) = new_figure(1)
    actions = [1, 2, 3, 5, 10, 20, 50]
    for critics, style, grey in zip((1, 2, 5), STYLES, GREYS):
        error = []
        for count in actions:
            q = random.standard_normal((20_000, critics, count))
            error.append(q.min(axis=1).max(axis=1).mean())
        label = f"{critics} critic" + "s" * (critics > 1)
        axes.plot(actions, error, style, color=grey, marker="o", lw=2, label=label)
        print(f"{label}:", dict(zip(actions, np.round(error, 2))))
    axes.axhline(0, color="black", lw=0.8)
    axes.set(xscale="log", xlabel="actions to choose from", ylabel="error of the chosen value")
    axes.set_xticks(actions, [str(count) for count in actions])
    axes.minorticks_off()
    axes.legend()
    save(figure, "two-critics")


def time_limits():
    """Values on a circular track, with and without a bootstrap at the time limit.

    Each step pays 1 and moves one cell forward with probability 0.8. Episodes begin in cell 0 and
    are cut after 50 steps. The values solve the mean TD equations exactly.
    """
    cells, limit, gamma, forward = 50, 50, 0.99, 0.8
    move = (1 - forward) * np.eye(cells) + forward * np.roll(np.eye(cells), 1, axis=1)
    where = np.eye(cells)[0]
    visits = np.zeros(cells)
    for _ in range(limit):
        visits += where
        last = where
        where = where @ move
    cut = last / visits  # how often a transition from this cell is the last of its episode
    right = np.linalg.solve(np.eye(cells) - gamma * move, np.ones(cells))
    wrong = np.linalg.solve(np.eye(cells) - gamma * (1 - cut)[:, None] * move, np.ones(cells))
    figure, (axes,) = new_figure(1)
    axes.plot(right, "-", color="black", lw=2, label="the limit bootstraps")
    axes.plot(wrong, "--", color="0.35", lw=2, label="the limit counts as an end")
    axes.set(xlabel="cell of the track", ylabel="learned value", ylim=(0, 110))
    axes.legend(loc="center right", bbox_to_anchor=(1, 0.7))
    save(figure, "time-limits")
    print("time limit, wrong values of cells 0, 30 and 45:", wrong[[0, 30, 45]].round(1))


def temperature():
    """Entropy and temperature of the recorded runs on walker-walk."""
    curves = defaultdict(list)
    with open(DIAGNOSTICS, newline="") as file:
        for row in csv.DictReader(file):
            curves[row["record"], row["seed"]].append((int(row["step"]), float(row["value"])))
    figure, (entropy, alpha) = new_figure(2)
    for key, axes in (("losses/entropy", entropy), ("losses/alpha", alpha)):
        seeds = sorted(seed for record, seed in curves if record == key)
        for seed, style, grey in zip(seeds, STYLES, GREYS):
            steps, values = zip(*curves[key, seed])
            axes.plot(steps, values, style, color=grey, lw=1.5, label=f"seed {seed}")
        axes.set(xlabel="environment steps", xlim=0)
    entropy.axhline(-6, color="black", lw=0.8)
    entropy.annotate("target -6", (60_000, -6), (60_000, -3), arrowprops={"arrowstyle": "->"})
    entropy.set(ylabel="entropy in nats")
    alpha.set(ylabel="alpha", yscale="log")
    alpha.legend()
    save(figure, "temperature")


if __name__ == "__main__":
    (DOCS / "figures").mkdir(exist_ok=True)
    tanh_density()
    overestimation()
    time_limits()
    temperature()
