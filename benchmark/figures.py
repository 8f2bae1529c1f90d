"""The figures of a report: learning curves over steps and over time, and what the networks did."""

import itertools

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogFormatterSciNotation, MaxNLocator

from benchmark.judge import DECIDING, Rows, estimate, published_finals, short
from benchmark.runs import DIAGNOSTICS
from benchmark.studies import Study

LINES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3))]
MARKERS = "os^vDPX"
STYLES = [  # told apart without colours too
    dict(color=f"C{i}", linestyle=LINES[i % 6], marker=MARKERS[i % 7], markersize=4)
    for i in range(6 * 7)
]


def style_of(number: int) -> dict:
    """Of the variant, or the seed, of this number, from 1 on."""
    return STYLES[(int(number) - 1) % len(STYLES)]


def hours_of(rows: Rows) -> pd.Series:
    """Hours until each evaluation; of runs whose rows do not say, in proportion to the steps."""
    at = ["env_id", "variant", "seed", "key"]
    whole = rows.runs.drop_duplicates(at).set_index(at).reindex(columns=["hours"]).hours
    table = rows.returns.reindex(columns=[*at, "step", "hours"])
    share = table.step / table.groupby(at).step.transform("max")
    return table.hours.fillna(share * whole.reindex(pd.MultiIndex.from_frame(table[at])).to_numpy())


def draw_variant(
    axes, place: int, runs: pd.DataFrame, hours: pd.Series | None, style: dict, label: str
):
    """A variant's curve over steps and over hours, if known, and what its runs ended with."""
    over_steps, over_hours, ends = axes
    mean, low, high = estimate(lambda x: x.mean(axis=(0, 1)), runs.to_numpy().T)
    if len(runs.columns) < DECIDING:  # no interval, as in the table
        low = high = mean
    for panel, x in ((over_steps, runs.index), (over_hours, hours)):
        if x is not None:
            panel.plot(x, mean, **style, label=label)
            panel.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    last = runs.iloc[-1]
    ends.plot(last, [place] * len(last), "o", markerfacecolor="none", color="0.5")
    error = [[mean[-1] - low[-1]], [high[-1] - mean[-1]]]
    ends.errorbar(mean[-1], place, xerr=error, fmt="|k", capsize=4, ms=14)


def draw_environment(axes, study: Study, rows: Rows, env_id: str, reference: pd.DataFrame):
    """Learning curves over steps and over hours, and beside them what each run ended with."""
    over_steps, over_hours, ends = axes
    mine = rows.returns.assign(hours=hours_of(rows))
    mine = mine[mine.env_id == env_id]
    places = study.variants_in(env_id)
    for label, style in zip(study.variants, itertools.cycle(STYLES)):
        table = mine[mine.variant == label]
        runs = table.pivot(index="step", columns="seed", values="return").dropna()
        if len(runs):
            hours = table.groupby("step").hours.median()[runs.index]  # one may have had to wait
            draw_variant(axes, places.index(label), runs, hours, style, label)
    markers = dict(zip(sorted(reference.label.unique()), itertools.cycle("*X^sP")))
    published = reference[reference.env_id == short(env_id)]
    published = published[published.step <= study.envs[env_id]]
    as_long = published_finals(study, reference, env_id)
    for label, points in published.groupby("label"):
        runs = points.pivot_table(index="step", columns="seed", values="return").dropna()
        # Runs that were not evaluated at the same steps have no interval, and no common end.
        if label in as_long and runs.index.max() == points.step.max():
            style = dict(color="0.5", linestyle=(0, (4, 2)), marker=markers[label], markersize=3)
            draw_variant(axes, len(places), runs, None, style, label)
            places.append(label)
        else:
            means = points.groupby("step")["return"].mean()
            over_steps.plot(means.index, means, markers[label], color="0.4", label=label)
    name_axes(over_steps, study, env_id, title=short(env_id), xlabel="environment steps")
    name_axes(over_hours, study, env_id, title="over time", xlabel="hours of a run")
    if mine.hours.isna().all():
        over_hours.set(title="hours were not recorded")
        over_hours.set_axis_off()
    ends.set(title="at the end", xlabel="return: runs, their mean, its 95 % interval")
    ends.xaxis.set_major_locator(MaxNLocator(5))
    ends.set_yticks(range(len(places)), places)
    ends.set_ylim(len(places) - 0.5, -0.5)


def name_axes(axes, study: Study, env_id: str, **names: str):
    axes.xaxis.set_major_locator(MaxNLocator(5))
    if "steps" in names["xlabel"]:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 250k, 1M
    axes.set(ylabel="return, deterministic policy", **names)
    if "dm_control" in env_id or study.script == "sac_dmc.py":
        axes.set(ylabel="return (0 to 1000), deterministic policy", ylim=(0, 1050))


def add_legend(figure: Figure, columns: int):
    pairs = [pair for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels())]
    lines = {label: line for line, label in pairs}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=columns)


def draw_returns(study: Study, rows: Rows, reference: pd.DataFrame) -> Figure:
    """A row of panels per environment in which a run is finished."""
    begun = [env_id for env_id in study.envs if env_id in set(rows.returns.env_id)]
    figure = Figure(figsize=(15, 1 + 3.6 * len(begun)), layout="constrained")
    panels = figure.subplots(len(begun), 3, squeeze=False)
    for axes, env_id in zip(panels, begun):
        draw_environment(axes, study, rows, env_id, reference)
    add_legend(figure, 3)
    return figure


def draw_seeds(study: Study, rows: Rows, reference: pd.DataFrame) -> Figure:
    """A panel per environment and a line per run; what is published dashed, or as points."""
    begun = [env_id for env_id in study.envs if env_id in set(rows.returns.env_id)]
    columns = len(begun) if len(begun) < 4 else 2
    lines = -(-len(begun) // columns)
    figure = Figure(figsize=(5 * columns, 1 + 3.6 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    markers = dict(zip(sorted(reference.label.unique()), itertools.cycle("*X^sP")))
    with_seeds = sorted(reference[reference.seed.notna()].label.unique())
    dashes = dict(zip(with_seeds, itertools.cycle(["--", ":", "-."])))
    for axes, env_id in zip(panels, begun):
        published = reference[reference.env_id == short(env_id)]
        published = published[published.step <= study.envs[env_id]]
        for (label, _), run in published.groupby(["label", "seed"]):
            axes.plot(run.step, run["return"], dashes[label], color="0.7", label=label)
        steps = study.envs[env_id]
        beside = [*published[published.seed.isna()].groupby("label")]
        for i, (label, means) in enumerate(beside):
            # Beside our last evaluations, which would hide them.
            places = means.step.where(means.step < steps, steps * (1.05 + 0.05 * i))
            axes.plot(places, means["return"], markers[label], color="0.4", label=label)
        for seed, run in rows.returns[rows.returns.env_id == env_id].groupby("seed"):
            style = style_of(seed) | dict(linestyle="-", label=f"this script, seed {seed}")
            axes.plot(run.step, run["return"], **style)
        name_axes(axes, study, env_id, title=short(env_id), xlabel="environment steps")
        if beside:
            # A strip of its own, for these are no later steps.
            axes.axvspan(1.025 * steps, 2 * steps, color="0.93")
            axes.set_xlim(right=(1.1 + 0.05 * len(beside)) * steps)
            axes.set_xticks(np.linspace(0, steps, 5))
            axes.set_title(f"means at {steps:,}", loc="right", fontsize="small", color="0.4")
    for axes in panels[len(begun) :]:
        axes.set_axis_off()
    add_legend(figure, 3 if columns > 2 else 2)
    return figure


def draw_diagnostics(study: Study, rows: Rows) -> Figure:
    """What to look at when learning diverges: a panel per record."""
    first = "return, deterministic policy"
    returns = rows.returns.rename(columns={"return": "value"}).assign(record=first)
    table = pd.concat([returns, rows.diagnostics.replace({"record": DIAGNOSTICS})])
    made = set(zip(table.env_id, table.record))
    pairs = itertools.product(study.envs, [first, *DIAGNOSTICS.values()])
    drawn = [pair for pair in pairs if pair in made]
    lines = -(-len(drawn) // 3)
    figure = Figure(figsize=(14, 1 + 3.25 * lines), layout="constrained")
    panels = iter(figure.subplots(lines, 3, squeeze=False).flat)
    for (env_id, record), axes in zip(drawn, panels):
        draw_record(axes, study, table[table.record == record], env_id, record)
    for axes in panels:
        axes.set_axis_off()
    add_legend(figure, 4)
    return figure


def draw_record(axes, study: Study, table: pd.DataFrame, env_id: str, record: str):
    """A style per variant, or per seed where there is one variant alone."""
    places = {label: place for place, label in enumerate(study.variants, 1)}
    for (label, seed), run in table[table.env_id == env_id].groupby(["variant", "seed"]):
        alone = len(places) == 1
        style = dict(markersize=2, linewidth=1, label=f"seed {seed}" if alone else label)
        style = style_of(seed if alone else places[label]) | style
        axes.plot(run.step, run.value.astype(float), **style)
    axes.set(title=f"{short(env_id)}: {record}", xlabel="environment steps")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if "alpha" in record or "critics" in record:
        axes.set_yscale("log")
        # A range of less than two powers of ten has labels between them too.
        axes.yaxis.set_minor_formatter(LogFormatterSciNotation(minor_thresholds=(2, 0.5)))
