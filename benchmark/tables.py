"""The tables of a search: written after each of its trials, and read where its journal is missing.

trials.csv has a row per finished trial, reports.csv a row per score on the way to it, by which
others are pruned.
"""

import itertools
import math
from collections import defaultdict
from pathlib import Path

import optuna
import pandas
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from benchmark.runs import ROOT, code_hash, digest, fail, same_as


def tabulate(study: optuna.Study, space) -> pandas.DataFrame:
    """A row per finished trial of a trials.Space."""
    runs = itertools.product(range(1, space.seeds + 1), space.envs)
    scores = dict.fromkeys([f"{env_id} seed {seed}" for seed, env_id in runs], math.nan)
    rows = []
    for trial in study.trials:
        if not trial.state.is_finished():
            continue
        # A pruned trial lacks runs.
        score = trial.value if trial.state == TrialState.COMPLETE else math.nan
        row = dict(trial=trial.number, state=trial.state.name.lower(), score=score)
        row["steps"] = trial.last_step or 0
        row |= {flag: text_of(trial.params[flag], kind) for flag, kind in space.search.items()}
        row |= scores | trial.user_attrs.get("scores", {})
        row |= {key: trial.user_attrs.get(key, "") for key in ("note", "versions")}
        row |= dict(script=space.script, script_hash=trial.user_attrs["script_hash"])
        rows.append(row | dict(space_hash=digest(str(space))))
    return pandas.DataFrame(rows)


def tabulate_reports(study: optuna.Study) -> pandas.DataFrame:
    rows = []
    for trial in study.trials:
        if trial.state.is_finished():
            rows += [(trial.number, *report) for report in trial.intermediate_values.items()]
    return pandas.DataFrame(rows, columns=["trial", "step", "score"])


def write(study: optuna.Study, space, folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    tables = {"reports.csv": tabulate_reports(study), "trials.csv": tabulate(study, space)}
    for name, table in tables.items():
        part = folder / f".{name}"  # so that a table is whole, whenever this ends
        table.to_csv(part, index=False)
        part.replace(folder / name)


def read(space, folder: Path) -> list[FrozenTrial]:
    """The trials in a search's tables, which must be of this space and this script."""
    if not (folder / "trials.csv").exists():
        return []
    as_text = dict(dtype=str, keep_default_na=False)
    reports = defaultdict(dict)
    try:
        for row in pandas.read_csv(folder / "reports.csv", **as_text).to_dict("records"):
            # Whose score is not known, Optuna ranks last of those pruned at that step.
            reports[row["trial"]][int(row["step"])] = float(row["score"] or "nan")
        rows = pandas.read_csv(folder / "trials.csv", **as_text)
        ours = rows.script_hash.isin(same_as(code_hash(ROOT / space.script)))
        if not (ours & (rows.space_hash == digest(str(space)))).all():
            other = f"another version of {space.script}, or another search space"
            fail(f"{folder} is of {other}: bring that back, or move the folder away to begin anew")
        return [trial_of(row, reports[row["trial"]], space) for row in rows.to_dict("records")]
    except (OSError, KeyError, ValueError, AttributeError) as error:
        fail(f"{folder} is damaged ({error!r}): bring it back, or move it away to begin anew")


def trial_of(row: dict[str, str], reports: dict[int, float], space) -> FrozenTrial:
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
        params={flag: value_of(row[flag], kind) for flag, kind in space.search.items()},
        distributions=space.search,
        user_attrs=about | dict(scores=scores),
        intermediate_values=reports,
    )


def text_of(value: object, kind: BaseDistribution) -> object:
    """What a table has for a flag's value: of several types pandas would make one."""
    return str(value) if isinstance(kind, CategoricalDistribution) else value


def value_of(text: str, kind: BaseDistribution) -> object:
    if isinstance(kind, CategoricalDistribution):
        return {str(choice): choice for choice in kind.choices}[text]
    return int(text) if isinstance(kind, IntDistribution) else float(text)
