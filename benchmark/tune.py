"""Tune flags of a script with Optuna, over several environments and seeds.

    python -m benchmark.tune --list                 # the search spaces, and what a trial costs
    python -m benchmark.tune cartpole --trials 50   # until 50 trials are finished; then the results

A trial is one setting, tried by a run per environment and seed. Its score is the mean over these
runs of their evaluations, scaled so that the environment's `low` is 0, which what is less counts
too, and its `high` is 1. A trial that lies below the median of the others at the same step of the
same run is pruned. All trials are kept in runs/tune-SPACE.journal, which processes started side by
side in one folder share. Stopped in any way, the same command continues: the trials that were at
work too, their runs from their checkpoints. Where there is no journal yet, it begins with the
trials in benchmark/results/tune-SPACE that are of the same script and space. A space of your own
is one more entry in SPACES.
"""

import csv
import itertools
import math
import shlex
import signal
import sys
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from benchmark.jobs import STEPS_PER_SECOND, continuable, cores
from benchmark.runs import RESULTS, ROOT, code_hash, digest, fail, same_as
from benchmark.studies import BALANCE, CARTPOLES, OFTEN, SWINGUP

try:
    import numpy as np
    import optuna
    import pandas
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.trial import FrozenTrial, TrialState

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
    # trials at a time, each with one run at a time
    jobs: int = cores()
    threads: int = 1  # CPU threads of each run
    seed: int = 1  # of the sampler
    list: bool = False  # print the spaces, and stop


# ---------------------------------------------------------------- results


def tabulate(study: optuna.Study, space: Space) -> pandas.DataFrame:
    """A row per finished trial."""
    runs = itertools.product(range(1, space.seeds + 1), space.envs)
    scores = dict.fromkeys([f"{env_id} seed {seed}" for seed, env_id in runs], math.nan)
    hashes = dict(zip(["script_hash", "space_hash"], study.study_name.split()[-2:]))
    rows = []
    for t in study.trials:
        if not t.state.is_finished():
            continue
        score = t.value if t.state == TrialState.COMPLETE else math.nan  # a pruned trial lacks runs
        row = dict(trial=t.number, state=t.state.name.lower(), score=score, steps=t.last_step or 0)
        row |= t.params | scores | t.user_attrs.get("scores", {})
        row |= dict(note=t.user_attrs.get("note", ""), versions=t.user_attrs["versions"])
        row |= dict(script=space.script) | hashes
        rows.append(row | dict(script_hash=t.user_attrs.get("script_hash", row["script_hash"])))
    return pandas.DataFrame(rows)


def tabulate_reports(study: optuna.Study) -> pandas.DataFrame:
    """A row per report of a finished trial: its score so far, by which others are pruned."""
    finished = [t for t in study.trials if t.state.is_finished()]
    reports = [(t.number, *report) for t in finished for report in t.intermediate_values.items()]
    return pandas.DataFrame(reports, columns=["trial", "step", "score"])


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def value_of(text: str, values: optuna.distributions.BaseDistribution) -> object:
    """A flag's value from the text that stands for it in a CSV file."""
    if isinstance(values, CategoricalDistribution):
        return {str(choice): choice for choice in values.choices}[text]
    return int(text) if isinstance(values, IntDistribution) else float(text)


def read_trials(space: Space, folder: Path) -> list[FrozenTrial]:
    """The trials that report() has written, as far as they are of this space and script."""
    if not (folder / "trials.csv").exists():
        return []
    scripts, own = same_as(code_hash(ROOT / space.script)), digest(str(space))
    reports = defaultdict(dict)
    try:
        for row in rows_of(folder / "reports.csv"):
            # Whose score is not known, Optuna ranks last of those pruned at that step.
            reports[row["trial"]][int(row["step"])] = float(row["score"] or "nan")
        rows = rows_of(folder / "trials.csv")
        mine = [row for row in rows if row["script_hash"] in scripts and row["space_hash"] == own]
        return [trial_of(row, reports[row["trial"]], space) for row in mine]
    except (FileNotFoundError, KeyError, ValueError) as error:
        fail(f"{folder} is damaged ({error!r}): move it away to begin anew")


def trial_of(row: dict[str, str], reports: dict[int, float], space: Space) -> FrozenTrial:
    """The trial of a row of trials.csv."""
    state = TrialState[row["state"].upper()]
    value = float(row["score"]) if state == TrialState.COMPLETE else math.nan
    if state == TrialState.PRUNED and reports:  # as Optuna has it
        value = reports[max(reports)]
    scores = {key: float(row[key]) for key in row if " seed " in key and row[key]}
    about = {key: row[key] for key in ("note", "versions", "script_hash") if row[key]}
    return optuna.create_trial(
        state=state,
        value=None if math.isnan(value) else value,
        params={flag: value_of(row[flag], values) for flag, values in space.search.items()},
        distributions=space.search,
        user_attrs=about | dict(scores=scores),
        intermediate_values=reports,
    )


def report(name: str, study: optuna.Study, space: Space, folder: Path):
    """The best settings, and a CSV and figures of all trials finished so far."""
    table = tabulate(study, space)
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / "trials.csv", index=False)
    tabulate_reports(study).to_csv(folder / "reports.csv", index=False)
    # Some may be at work in other processes.
    states = Counter(trial.state for trial in study.trials)
    counts = [f"{states[state]} {state.name.lower()}" for state in TrialState if states[state]]
    say(f"\n{name}: {', '.join(counts)}")
    if not states[TrialState.COMPLETE]:
        sys.exit("no trial is complete, so there are no best settings")
    best = table[table["state"] == "complete"]
    best = best.sort_values("score", ascending=False, kind="stable")
    shown = best[["trial", "score", *space.search]].head(5)
    say(shown.to_string(index=False, float_format=lambda x: f"{x:.3g}"))
    trials = zip(best["trial"], best["score"], best["note"])
    for place, (number, score, note) in enumerate(trials, 1):
        if note:
            say(f"{note}: trial {number}, score {score:.3g}, place {place} of {len(best)}")
    params = study.trials[best.iloc[0]["trial"]].params
    command = ["python", space.script, *shlex.split(space.flags), *flags_of(params)]
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
        if vars(args)[flag] < least:
            hint = ", the number of finished trials wanted in all" if flag == "trials" else ""
            fail(f"--{flag} must be at least {least}{hint}")
    space, runs = SPACES[args.space], Path.cwd() / "runs"
    results = RESULTS / f"tune-{args.space}"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    tuning = Tuning(args.space, space, args, runs)
    with continuable("benchmark.tune", f"{runs} and {RESULTS} must be folders with space"):
        (runs / "logs").mkdir(parents=True, exist_ok=True)
        with tuning.lock(wait=True):
            tuning.open()
            if not tuning.study.trials and (before := read_trials(space, results)):
                tuning.study.add_trials(before)
                say(f"begins with {len(before)} trials in {results}: to begin anew, move it away")
        tuning.work()
        with tuning.lock(wait=True):  # one process at a time writes
            report(args.space, tuning.study, space, results)


if __name__ == "__main__":
    main()
