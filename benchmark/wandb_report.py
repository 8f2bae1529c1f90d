"""A study's report on Weights & Biases: the text of benchmark/report.py, curves of tracked runs."""

import re

import wandb
import wandb_workspaces.reports.v2 as wr

from benchmark.runs import RETURN, fail, runs_of
from benchmark.studies import Study


def build(entity: str, project: str, name: str, study: Study, text: str) -> wr.Report:
    """The report, not yet saved.

    A line per variant and environment: the mean of its seeds, with the standard error.
    """
    text = re.sub(r"!\[.*\]\(.*\)\n\n", "", text)  # the images are files beside the text
    title, text = text.split("\n", 1)
    blocks = []
    for env_id in study.envs:
        here = [run for run in runs_of(name, study) if run.env_id == env_id]
        keys = {run.variant: sorted(run.keys) for run in here}
        # The key of a run is its experiment's name: those shared with other studies are found too.
        # All runs of a set have the environment in common: grouped by it, they make one line.
        runsets = []
        for label, known in keys.items():
            which = dict(filters=f"Config('exp_name') in {known}", groupby=["config.env_id"])
            runsets.append(wr.Runset(entity, project, name=label, **which))
        curve = wr.LinePlot(
            title=env_id,
            x="Step",
            y=[RETURN],
            title_x="environment steps",
            title_y="return, deterministic policy",
            groupby_aggfunc="mean",
            groupby_rangefunc="stderr",
            layout=wr.Layout(w=24, h=12),
        )
        blocks += [wr.H2(env_id), wr.PanelGrid(runsets=runsets, panels=[curve])]
    blocks = [wr.MarkdownBlock(text.strip()), *blocks]
    return wr.Report(project, entity, title=title.lstrip("# ")[:128], blocks=blocks, width="fluid")


def log_in(target: str) -> list[str]:
    """Entity and project, once it is sure that there is someone to publish as."""
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", target):
        fail(f"--wandb {target} must be ENTITY/PROJECT")
    try:
        known = wandb.login(prompt=False)
    except Exception as error:  # no network, or a key that is none
        fail(f"--wandb {target}: {error}; run `wandb login`")
    if not known:
        fail(f"--wandb {target} needs `wandb login`")
    return target.split("/")


def publish(report: wr.Report) -> str:
    """Save it, and say where."""
    try:
        return report.save().url
    except Exception as error:  # whatever the server, the network or the rights have against it
        fail(f"--wandb {report.entity}/{report.project}: {error}")
