"""Runs on the nodes of a Ray cluster that share a folder and the repository, by path."""

import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmark.jobs import Job
from benchmark.runs import ROOT, Run, fail


def find(address: str):
    """Fail if nobody answers at an address, host:port or auto: Ray itself waits for minutes."""
    probe = [sys.executable, "-c", "import ray, sys; ray.init(sys.argv[1])", address]
    try:
        if address != "auto":
            host, port = address.rsplit(":", 1)
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        subprocess.run(probe, capture_output=True, check=True, timeout=30)
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines()
        fail(f"no Ray cluster answers at {address}: {said[-1] if said else error}")
    except (OSError, ValueError, subprocess.TimeoutExpired):
        fail(f"no Ray cluster answers at {address}")


class Cluster:
    """A Ray cluster, and the shares of it that each run takes."""

    def __init__(self, address: str, **shares: float):
        # Ray's own messages are skipped, all of them: the overview tells what there is to tell.
        os.environ |= dict(RAY_DEDUP_LOGS_SKIP_REGEX=".", RAY_USAGE_STATS_ENABLED="0")
        try:
            import ray
        except ImportError:
            fail("--ray needs Ray: pip install -r benchmark/requirements-ray.txt")
        find(address)
        ray.init(address, log_to_driver=False, logging_level="ERROR")
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's own tells of stack frames
        self.ray = ray
        self.shares = shares
        if self.room() < 1:
            needs = f"{shares['CPU']:g} CPUs and {shares['GPU']:g} GPUs"
            fail(f"--ray {address}: no node has the {needs} that a run takes")

    def room(self) -> int:
        """For how many runs at a time, on the nodes that are there now."""

        def fits(have: dict) -> int:
            shares = [(have.get(key, 0), share) for key, share in self.shares.items() if share]
            return min((int(there / share + 1e-6) for there, share in shares), default=0)

        return sum(fits(node["Resources"]) for node in self.ray.nodes() if node["Alive"])

    def submit(self, run: Run, runs: Path, track: bool):
        def on_node(root: str, run: tuple) -> int:  # defined here, so that Ray sends its code
            sys.path.insert(0, root)
            from benchmark.jobs import Job, execute
            from benchmark.runs import Run

            if not (runs / "logs").is_dir():
                raise FileNotFoundError(
                    f"{runs} is not on {socket.gethostname()}: all nodes must share it"
                )
            # Ray blocks this signal, and the run would inherit that.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            # This waits if what a lost node left has the run still. Second tries are the sender's.
            failed = execute([Job(Run(*run), tries=1)], lambda: 1, runs, track)
            return failed[0].process.returncode if failed else 0

        # A task whose node dies begins anew on another.
        options = dict(num_cpus=self.shares["CPU"], num_gpus=self.shares["GPU"], max_retries=-1)
        return self.ray.remote(**options)(on_node).remote(str(ROOT), tuple(run))


@dataclass
class ClusterJob(Job):
    """A run on some node of a cluster, a process as far as the pool sees."""

    cluster: Cluster | None = None

    def launch(self, runs: Path, track: bool, lock: IO, log: IO):
        self.process = self
        self.task = self.cluster.submit(self.run, runs, track)

    def poll(self) -> int | None:
        return self.wait() if self.cluster.ray.wait([self.task], timeout=0)[0] else None

    def send_signal(self, _):
        self.cluster.ray.cancel(self.task)  # `execute` on the node sees Ctrl-C

    def wait(self) -> int:
        try:
            return self.cluster.ray.get(self.task)
        except self.cluster.ray.exceptions.TaskCancelledError:
            return 1
        except Exception as error:  # what the node lacks, or trouble of Ray's own
            with open(self.log, "a") as log:
                print(error, file=log)
            return 1
