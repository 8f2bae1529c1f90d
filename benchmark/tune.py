"""Tune flags of a script with Optuna, over several environments and seeds.

    python -m benchmark.tune --list                 # the search spaces, and what a trial costs
    python -m benchmark.tune cartpole --trials 50   # until 50 trials are finished; then the results

A trial is one setting, tried by a run per environment and seed. Its score is the mean over these
runs of their evaluations, scaled: the environment's `low` is 0, its `high` is 1, and less than
`low` counts as 0. A trial whose best score so far is below the median that the complete ones had at
that step is pruned: once five are complete, and not in the first half of its first run.

All trials are kept in runs/tune-SPACE.journal, which processes started side by side in one folder
share. Stopped in any way, the same command continues: the trials that were at work too, their runs
from their checkpoints. Finished trials stand in the tables of benchmark/results/tune-SPACE as well;
those that the journal lacks, on another machine for instance, are taken from there.

A space of your own is one more entry in SPACES.
"""

import shlex
import signal
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from benchmark.jobs import STEPS_PER_SECOND, continuable, cores
from benchmark.runs import RESULTS, fail
from benchmark.studies import BALANCE, CARTPOLES, OFTEN, SWINGUP

try:
    import numpy as np
    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.trial import TrialState

    from benchmark import tables
    from benchmark.trials import Env, Space, Tuning, flags_of, say
except ImportError as error:
    fail(f"{error}: pip install -r benchmark/requirements.txt")

ENOUGH = 10  # trials from which importances may mean something


SPACES = {
    "cartpole": Space(  # the hyperparameters that [1] of studies.py is about, in its ranges
        {
            BALANCE: Env(CARTPOLES[BALANCE], 360, 1000),
            SWINGUP: Env(CARTPOLES[SWINGUP], 25, 1000),
        },
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


@dataclass
class Args:
    space: Annotated[str, tyro.conf.Positional] = ""  # what to search, as --list prints it
    trials: int = 0  # finished trials wanted in all; no more than there are: the results so far
    # trials at a time, each with one run at a time; by default as many as --threads leave cores for
    jobs: int | None = None
    threads: int = 1  # CPU threads of each run
    seed: int = 1  # of the sampler
    list: bool = False  # print the spaces, and stop


# ---------------------------------------------------------------- results


def report(name: str, study: optuna.Study, space: Space, folder: Path):
    """The best settings, and tables and figures of all trials finished so far."""
    # Some may be at work in other processes.
    states = Counter(trial.state for trial in study.trials)
    counts = [f"{states[state]} {state.name.lower()}" for state in TrialState if states[state]]
    say(f"\n{name}: {', '.join(counts)}")
    if not states[TrialState.COMPLETE]:
        sys.exit("no trial is complete, so there are no best settings")
    tables.write(study, space, folder)
    table = tables.tabulate(study, space)
    best = table[table.state == "complete"].sort_values("score", ascending=False, kind="stable")
    shown = best[["trial", "score", *space.search]].head(5)
    say(shown.to_string(index=False, float_format=lambda x: f"{x:.3g}"))
    for place, x in enumerate(best.itertuples(), 1):
        if x.note:
            say(f"{x.note}: trial {x.trial}, score {x.score:.3g}, place {place} of {len(best)}")
    command = ["python", space.script, *shlex.split(space.flags), *flags_of(study.best_params)]
    say(f"best: {shlex.join(command)}")
    draw(study, folder)
    say(f"in {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def draw(study: optuna.Study, folder: Path):
    """Optuna's plots: score against each flag, and which flags tell the best trials apart."""
    # that they are experimental, and where one trial alone makes an axis without width
    warnings.filterwarnings("ignore", module="optuna|benchmark.tune", category=UserWarning)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    plots = optuna.visualization.matplotlib

    def save(axes, name: str):
        figure = np.atleast_1d(axes)[0].figure
        figure.savefig(folder / name, dpi=120, bbox_inches="tight")

    save(plots.plot_slice(study), "slices.png")
    judged = [t for t in study.trials if t.state.is_finished() and t.value is not None]
    if len(judged) < ENOUGH:
        say(f"importances need {ENOUGH} finished trials")
        return
    # Where pruned trials count, with what they had.
    every = optuna.create_study(direction="maximize")
    for t in judged:
        how = dict(params=t.params, distributions=t.distributions, value=t.value)
        every.add_trial(optuna.create_trial(**how))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
    shares = optuna.importance.get_param_importances(every, evaluator=evaluator)
    say("importances: " + ", ".join(f"{flag} {share:.2f}" for flag, share in shares.items()))
    save(plots.plot_param_importances(every, evaluator=evaluator), "importances.png")


# ---------------------------------------------------------------- the command


def print_list():
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # quiet where nobody reads on: | head
    for name, space in SPACES.items():
        steps = space.seeds * sum(env.steps for env in space.envs.values())
        hours = steps / STEPS_PER_SECOND / 3600
        cost = f"{space.seeds * len(space.envs)} runs, {steps} steps, {hours:.1f} core-hours"
        say(f"{name}: {space.script} {space.flags}; a trial that is not pruned: {cost}")
        for key, value in [*space.envs.items(), *space.search.items()]:
            say(f"    {key}: {value}")


def main():
    args = tyro.cli(Args, description=__doc__)
    if args.list:
        return print_list()
    if args.space not in SPACES:
        fail(f"no search space {args.space or 'named'}; there are {', '.join(SPACES)}")
    for flag, least in [("trials", 1), ("jobs", 1), ("threads", 1), ("seed", 0)]:
        if vars(args)[flag] is not None and vars(args)[flag] < least:
            hint = ", the number of finished trials wanted in all" if flag == "trials" else ""
            fail(f"--{flag} must be at least {least}{hint}")
    args.jobs = args.jobs or max(1, cores() // args.threads)
    space, runs = SPACES[args.space], Path.cwd() / "runs"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    tuning = Tuning(args.space, space, args, runs, RESULTS / f"tune-{args.space}")
    with continuable("benchmark.tune", f"{runs} and {RESULTS} must be folders with space"):
        (runs / "logs").mkdir(parents=True, exist_ok=True)
        with tuning.lock(wait=True):
            tuning.open()
        tuning.work()
        with tuning.lock(wait=True):  # one process at a time writes
            report(args.space, tuning.study, space, tuning.results)


if __name__ == "__main__":
    main()
