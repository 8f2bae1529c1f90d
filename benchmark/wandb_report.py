"""A study's report on Weights & Biases: the text and tables of benchmark/report.py, and curves of the tracked runs."""

import re

import wandb
import wandb_workspaces.reports.v2 as wr

from benchmark.run import fail, runs_of
from benchmark.studies import Study


def build(entity: str, project: str, name: str, study: Study, text: str) -> wr.Report:
    """The report, not yet saved. A line per variant and environment: the mean of its seeds, with the standard error."""
    text = re.sub(r"!\[.*\]\(.*\)\n\n", "", text)  # the images are files beside the text
    title, text = text.split("\n", 1)
    blocks = []
    for env_id in study.envs:
        keys = {run.variant: run.key for run in runs_of(name, study) if run.env_id == env_id}
        # what a run is known by is its experiment's name: runs shared with other studies are found, other versions not
        known = lambda key: dict(filters=f"Config('exp_name') = '{key}'", groupby=["config.exp_name"])
        runsets = [wr.Runset(entity, project, name=label, **known(key)) for label, key in keys.items()]
        curve = wr.LinePlot(
            title=env_id,
            x="Step",
            y=["eval/episodic_return"],
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
