"""Search spaces: which flags of a script to tune, and on what.

    python -m benchmark.tune --list

A space of your own is one more entry in SPACES.
"""

from dataclasses import dataclass
from typing import NamedTuple

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from benchmark.studies import BALANCE, CARTPOLES, OFTEN, SWINGUP


class Env(NamedTuple):
    steps: int
    low: float  # the return that scores 0, such as that of random actions
    high: float  # the return that scores 1


@dataclass(frozen=True)
class Space:
    envs: dict[str, Env]
    search: dict[str, BaseDistribution]  # flag: its values; True and False are given as --flag and --no-flag
    script: str = "sac_ablations.py"
    seeds: int = 2
    flags: str = ""  # of all its runs; their evaluations make the score
    last: int = 0  # evaluations of a run that count, from its end; 0: all of them, so that learning fast counts too


SPACES = {
    "cartpole": Space(  # the hyperparameters that [1] of studies.py is about, in its ranges
        {BALANCE: Env(CARTPOLES[BALANCE], 360, 1000), SWINGUP: Env(CARTPOLES[SWINGUP], 25, 1000)},
        {
            "--gamma": FloatDistribution(0.8, 0.99),
            "--tau": FloatDistribution(0.005, 0.5, log=True),
            "--alpha": FloatDistribution(1e-4, 1, log=True),
            "--policy-lr": FloatDistribution(1e-4, 1e-2, log=True),
            "--q-lr": FloatDistribution(1e-4, 1e-2, log=True),
            "--hidden": IntDistribution(32, 512, log=True),
            "--layers": IntDistribution(1, 4),
            "--init": CategoricalDistribution(["xavier", "orthogonal", "normal", "torch"]),
        },
        flags=OFTEN,
    ),
}
