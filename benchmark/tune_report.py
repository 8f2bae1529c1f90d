"""What benchmark.tune prints and plots: the best settings, the importance of each flag, and slices."""

import math
import shlex
import sys
from collections import Counter
from pathlib import Path

import optuna
import pandas
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState

from benchmark.spaces import Space

ENOUGH = 10  # trials from which importances may mean something


def flags_of(params: dict) -> list[str]:
    pairs = [([k] if v else [f"--no-{k[2:]}"]) if isinstance(v, bool) else [k, str(v)] for k, v in params.items()]
    return sum(pairs, [])


def say(message: str):
    print(message, flush=True)


def report(name: str, study: optuna.Study, space: Space, folder: Path):
    """The best settings, and a CSV and figures of all trials finished so far."""
    finished = [trial for trial in study.trials if trial.state.is_finished()]
    scores = [f"{env_id} seed {seed}" for seed in range(1, space.seeds + 1) for env_id in space.envs]
    rows = []
    for t in finished:
        score = t.value if t.state == TrialState.COMPLETE else math.nan  # that of a pruned trial lacks runs
        row = {"trial": t.number, "state": t.state.name.lower(), "score": score, "steps": t.last_step or 0}
        row |= t.params | dict.fromkeys(scores, math.nan) | t.user_attrs.get("scores", {})
        row |= {"note": t.user_attrs.get("note", ""), "versions": t.user_attrs["versions"], "script": space.script}
        rows.append(row | dict(zip(["script_hash", "space_hash"], study.study_name.split()[-2:])))
    table = pandas.DataFrame(rows)
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / "trials.csv", index=False)
    states = Counter(trial.state for trial in study.trials)  # some may be at work in other processes
    say(f"\n{name}: " + ", ".join(f"{states[state]} {state.name.lower()}" for state in TrialState if states[state]))
    if not states[TrialState.COMPLETE]:
        sys.exit("no trial is complete, so there are no best settings")
    best = table[table["state"] == "complete"].sort_values("score", ascending=False, kind="stable")
    shown = best[["trial", "score", *space.search]].head(5)
    say(shown.to_string(index=False, float_format=lambda x: f"{x:.3g}"))
    for place, (number, score, note) in enumerate(zip(best["trial"], best["score"], best["note"]), 1):
        if note:
            say(f"{note}: trial {number}, score {score:.3g}, place {place} of {len(best)}")
    params = study.trials[best.iloc[0]["trial"]].params
    say("best: " + shlex.join(["python", space.script, *shlex.split(space.flags), *flags_of(params)]))
    judged = [trial for trial in finished if trial.value is not None]
    draw_slices(folder / "slices.png", space, judged)
    if len(judged) < ENOUGH:
        say(f"importances need {ENOUGH} finished trials")
    else:
        draw_importances(folder / "importances.png", judged)
    say(f"in {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def draw_slices(path: Path, space: Space, trials: list[FrozenTrial]):
    """Score against value, a panel per flag."""
    columns = min(4, len(space.search))
    rows = math.ceil(len(space.search) / columns)
    figure = Figure(figsize=(3 * columns, 2.6 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    complete, pruned = ([t for t in trials if t.state == s] for s in (TrialState.COMPLETE, TrialState.PRUNED))
    best, scores = max(complete, key=lambda t: t.value), [t.value for t in complete]
    for ax, (flag, values) in zip(panels.flat, space.search.items()):
        at = {t.number: t.params[flag] for t in trials}
        if choices := getattr(values, "choices", None):  # side by side, their trials a little apart
            at = {number: choices.index(x) + (0.618 * number % 1 - 0.5) / 2 for number, x in at.items()}
            names = [str(choice) for choice in choices]
            ax.set_xticks(range(len(names)), names, rotation=20 if len("".join(names)) > 20 else 0)
            ax.set_xlim(-0.5, len(choices) - 0.5)
        elif values.log:
            ax.set_xscale("log", base=2 if isinstance(values.low, int) else 10)
            ax.xaxis.set_major_formatter("{x:g}")
        lines = ax.plot([at[t.number] for t in complete], scores, "o", color="0.5", mec="white", label="complete")
        to_bottom = dict(transform=ax.get_xaxis_transform(), label="pruned (no score)")
        lines += ax.plot([at[t.number] for t in pruned], [0.05] * len(pruned), "x", color="0.2", ms=5, **to_bottom)
        label = f"best: trial {best.number}"
        lines += ax.plot(at[best.number], best.value, "*", color="black", mec="white", ms=15, label=label)
        ax.set(xlabel=flag)
    span = max(scores) - min(scores) or 1
    panels[0, 0].set_ylim(min(scores) - 0.2 * span, max(scores) + 0.1 * span)  # shared
    for ax in panels[:, 0]:
        ax.set_ylabel("score")
    for ax in panels.flat[len(space.search) :]:
        ax.remove()
    figure.legend(handles=lines, loc="outside lower center", ncols=3 if columns > 1 else 1, frameon=False)
    figure.savefig(path, dpi=120)


def draw_importances(path: Path, trials: list[FrozenTrial]):
    """What tells the best quarter of all trials, the pruned among them, from the rest."""
    study = optuna.create_study(direction="maximize")  # where pruned trials count, with what they had reached
    for t in trials:
        study.add_trial(optuna.create_trial(params=t.params, distributions=t.distributions, value=t.value))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
    shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    say("importances: " + ", ".join(f"{flag} {share:.2f}" for flag, share in shares.items()))
    figure = Figure(figsize=(6, 1 + 0.35 * len(shares)), layout="constrained")
    ax = figure.subplots()
    ax.bar_label(ax.barh([*shares], [*shares.values()], color="0.5"), fmt="%.2f", padding=3)
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.set_xlabel(f"importance for the best quarter of {len(trials)} trials (PED-ANOVA), sum 1")
    figure.savefig(path, dpi=120)
