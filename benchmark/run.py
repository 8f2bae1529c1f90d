"""Run the studies of benchmark/studies.py, several runs at a time.

    python -m benchmark.run --list         # the studies, and roughly what they cost
    python -m benchmark.run F5 F4          # one after the other; what they share is run once
    python -m benchmark.run F1 --jobs 4    # four runs at a time, each with one thread
    python -m benchmark.run F1 --ray auto  # on the Ray cluster of this machine
    python -m benchmark.run F1 --again     # even what the committed results have

Stop it with Ctrl-C, or lose it in any other way: started again, it continues. What is finished,
here or in the committed results, is not run again. What was stopped goes on from its checkpoint. A
run that fails is tried once more and then reported, while the others go on. Several runners may
share a folder, on one machine or on many: each run is locked while it is run.
"""

import functools
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from benchmark.jobs import STEPS_PER_SECOND, Job, continuable, cores, execute
from benchmark.runs import check, fail, runs_of, runs_of_all
from benchmark.studies import STUDIES


@dataclass
class Args:
    studies: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # names, as --list prints them
    list: bool = False  # print the studies, with steps and hours, and stop
    variants: tuple[str, ...] = ()  # run only these variants, by their labels
    jobs: int | None = None  # runs at a time; None: as this machine has cores, or the cluster room
    threads: int = 1  # CPU threads of each run
    # host:port of a Ray cluster, or auto; its nodes share this folder and the repository
    ray: str = ""
    cpus: float | None = None  # CPUs that a run takes on the cluster; None: as many as threads
    gpus: float = 0  # GPUs that a run takes on the cluster, or a fraction of one
    again: bool = False  # run even what the committed results have; runs/ still counts
    track: bool = False  # to Weights & Biases, grouped by study and tagged by variant


def print_list():
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # quiet where nobody reads on: | head
    for name, study in STUDIES.items():
        runs = runs_of(name, study)
        steps = sum(run.steps for run in runs)
        hours = steps / STEPS_PER_SECOND / 3600
        cost = f"{len(runs)} runs, {steps / 1e6:.1f}M steps, about {hours:.1f} core-hours"
        print(f"{name:8} {cost}\n         {study.claim or study.note or 'a benchmark'}")


def check_flags(args: Args):
    check(args.studies)
    labels = {label for name in args.studies for label in STUDIES[name].variants}
    if unknown := set(args.variants) - labels:
        fail(f"--variants {unknown.pop()}: there are {', '.join(sorted(labels))}")
    for name, number in (("jobs", args.jobs), ("threads", args.threads)):
        if number is not None and number < 1:
            fail(f"--{name} must be at least 1")
    if args.gpus > 1 and args.gpus % 1:
        fail("--gpus must be a whole number, or a fraction of one")


def main():
    args = tyro.cli(Args, description=__doc__)
    if args.list:
        return print_list()
    check_flags(args)
    room, job = lambda: args.jobs or max(1, cores() // args.threads), Job
    if args.ray:
        from benchmark.cluster import Cluster, ClusterJob

        cpus = args.threads if args.cpus is None else args.cpus
        cluster = Cluster(args.ray, CPU=cpus, GPU=args.gpus)
        room = lambda: min(cluster.room(), args.jobs or sys.maxsize)
        job = functools.partial(ClusterJob, cluster=cluster)
    runs = Path.cwd() / "runs"
    grid = runs_of_all(args.studies, args.threads, args.variants)
    todo = [run for run in grid if not (run.finished(runs) or run.committed() and not args.again)]
    before = len(grid) - len(todo)
    print(f"{len(grid)} runs, {before} finished before", flush=True)
    with continuable("benchmark.run", f"{runs} must be a folder with space"):
        failed = execute([job(run) for run in todo], room, runs, args.track, before)
    if failed:
        counts = f"{len(failed)} of {len(grid)} runs failed"
        sys.exit(f"{counts}, the others are finished: see {runs / 'logs'}")
    names = " ".join(args.studies)
    print(f"{len(grid)} of {len(grid)} runs finished. Next: python -m benchmark.report {names}")


if __name__ == "__main__":
    main()
