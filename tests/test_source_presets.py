"""The presets of sac_ablations.py that stand for a source's own SAC are what the source says."""

import sys

import pytest

import sac_ablations as sac

# Ciobanu 2024, table 3.1: tanh, 2 layers of 64, Adam at 3e-4, discount 0.99, batch 128, a buffer of
# 1e6, one update every 64 steps after 1024 steps, entropy coefficient 0.2, smoothing 5e-3.
DEEPUNITY = dict(
    activation="Tanh",
    layers=2,
    hidden=64,
    policy_lr=3e-4,
    q_lr=3e-4,
    gamma=0.99,
    batch_size=128,
    buffer_size=1_000_000,
    update_interval=64,
    updates_per_step=1 / 64,
    learning_starts=1024,
    autotune=False,
    alpha=0.2,
    tau=0.005,
)
# Coupal 2020: a value network, 2 layers of 200 with ReLU, learning rate 0.003, discount 0.99,
# batch 200, a buffer of 50,000 with at least 20,000 of them before it learns, reward scale 40.
LUNARLANDER = dict(
    value_network=True,
    activation="ReLU",
    layers=2,
    hidden=200,
    policy_lr=3e-3,
    q_lr=3e-3,
    gamma=0.99,
    batch_size=200,
    buffer_size=50_000,
    learning_starts=20_000,
    reward_scale=40.0,
    autotune=False,
    alpha=1.0,
    tau=0.005,
)
EXPECTED = {"deepunity": DEEPUNITY, "lunarlander": LUNARLANDER}


def parse(monkeypatch, *words) -> sac.Args:
    monkeypatch.setattr(sys, "argv", ["sac_ablations.py", *words])
    args, _ = sac.parse_args()
    return args


@pytest.mark.parametrize("name", EXPECTED)
def test_a_preset_is_its_source_and_otherwise_the_defaults(monkeypatch, name):
    assert parse(monkeypatch, "--preset", name) == sac.Args(preset=name, **EXPECTED[name])


@pytest.mark.parametrize("name", EXPECTED)
def test_a_flag_beside_it_wins(monkeypatch, name):
    for words in (["--hidden", "32", "--preset", name], ["--preset", name, "--hidden", "32"]):
        assert parse(monkeypatch, *words).hidden == 32


def test_deepunity_updates_once_every_64_steps_after_1024(monkeypatch):
    args = parse(monkeypatch, "--preset", "deepunity")
    steps = (1024, 1087, 1088, 1152, 1024 + 6400)
    updates = {step: sac.updates_until(args, step) for step in steps}
    assert updates == {1024: 0, 1087: 0, 1088: 1, 1152: 2, 1024 + 6400: 100}
