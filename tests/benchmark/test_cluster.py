"""benchmark.run --ray: on a real cluster of two nodes, disturbed or not, a study ends as on one machine left alone."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from benchmark import cluster as clusters
from benchmark.runs import Records
from tests.benchmark import helpers
from tests.benchmark.helpers import same, weights

pytest.importorskip("ray")
if sys.platform != "linux":
    pytest.skip("two nodes on one machine need all of 127.0.0.0/8", allow_module_level=True)


pytestmark = pytest.mark.slow


def start(folder, *flags, before=""):
    """The runner, which knows nothing of a cluster but its address."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return helpers.start(folder, *flags, before=before, environment=environment)


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.2", 0))
        return server.getsockname()[1]


def command_line(process):
    """Nothing for a process that is gone, or a zombie."""
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def loaded(process, library):
    with suppress(OSError):
        return library in Path(f"/proc/{process.pid}/maps").read_text()


class Node:
    """A node of one CPU. All its processes but the runs are of one session, by which they are told from another's."""

    def __init__(self, ip, head, folder):
        place = [
            "--head",
            f"--port={head.split(':')[1]}",
            f"--temp-dir={folder}",
            "--include-dashboard=false",
        ]
        if ip not in head:
            place = [f"--address={head}"]
        limits = [
            f"--node-ip-address={ip}",
            "--num-cpus=1",
            "--num-gpus=0",
            "--object-store-memory=80000000",
        ]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *place, *limits]
        # a cluster apart from the user's, and whose runs do not yield to all else, as Ray's do
        setting = dict(RAY_USAGE_STATS_ENABLED="0", RAY_TMPDIR=str(folder), RAY_worker_niceness="0")
        setting["RAY_AUTH_MODE"] = "disabled"  # whether or not the user has a token of Ray's
        setting["RAY_health_check_period_ms"] = "1000"  # a lost node is noticed sooner
        log = Path(folder, f"{ip}.txt")
        with open(log, "w") as file:
            ray = subprocess.Popen(
                command, env=os.environ | setting, stdout=file, stderr=file, start_new_session=True
            )
        self.session = ray.pid
        # For tests that are killed themselves.
        guard = ["sh", "-c", f"read _; pkill -KILL -s {self.session}"]
        self.guard = subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True)
        assert ray.wait(timeout=100) == 0, log.read_text()

    def processes(self, name=""):
        mine = set()
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                if os.getsid(process.pid) == self.session:
                    mine |= {process, *process.children(recursive=True)}
        return [process for process in mine if name in command_line(process)]

    def runs(self):
        """The process of each run, and its log."""
        return {
            process: Path(f"/proc/{process.pid}/fd/1")
            for process in self.processes("sac_ablations.py")
        }

    def kill(self):
        """All processes, as when the power goes: until none is left, for one may just have begun another."""
        while found := self.processes():
            for process in found:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(found, timeout=5)
        self.guard.communicate()


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster, its head, and what starts another node of it; all are gone afterwards for certain."""
    nodes = []
    with tempfile.TemporaryDirectory(
        prefix="ray", dir="/tmp", ignore_cleanup_errors=True
    ) as folder:  # sockets: short
        address = f"127.0.0.2:{free_port()}"

        def another():
            nodes.append(Node(f"127.0.0.{2 + len(nodes)}", address, folder))
            return nodes[-1]

        try:
            yield address, another(), another
        finally:
            for node in nodes[::-1]:
                node.kill()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The final weights of a study on this machine, without Ray."""
    folder = tmp_path_factory.mktemp("undisturbed")
    runner = helpers.start(folder, "tiny", "--jobs", "2")
    said, _ = runner.communicate(timeout=500)
    assert runner.returncode == 0, said
    return weights(folder)


def gone(processes):
    return not psutil.wait_procs(processes, timeout=30)[1]


def step_of(log):
    """The last step that the run with this log has recorded."""
    steps = [
        Records(folder).read().get("charts/SPS")
        for folder in log.parent.parent.glob(f"{log.stem}__*")
    ]
    return steps[0][-1][0] if steps and steps[0] else 0


def wait_for_run(node, runner):
    """Until a run on this node has learned, and is past some checkpoints. All runs there are stopped."""
    while runner.poll() is None:
        runs = node.runs()
        # Stopped before they are looked at: so they cannot end before they are disturbed.
        for run in runs:
            run.suspend()
        for run, log in runs.items():
            with suppress(OSError):
                if 300 <= step_of(log.resolve()) < 800:
                    return run
        for run in runs:
            run.resume()
        time.sleep(0.05)
    raise AssertionError(f"the study was over before it could be disturbed: {runner.stdout.read()}")


@pytest.mark.parametrize("dies", ["node", "raylet", "worker"])
def test_a_node_that_dies_loses_nothing(dies, cluster, undisturbed, tmp_path):
    address, _, another = cluster
    node = another()
    runner = start(tmp_path, "tiny", "--ray", address)
    run = wait_for_run(node, runner)
    log = node.runs()[run].resolve()
    if dies == "node":
        node.kill()
    else:
        node.processes({"raylet": "raylet/raylet", "worker": "ray::on_node"}[dies])[0].kill()
    if dies == "worker":
        with open(log.with_suffix(".lock")) as lock:
            # Free when the run is dead; then held, as by one on a node cut off.
            fcntl.flock(lock, fcntl.LOCK_EX)
            finished = list(tmp_path.glob(f"runs/{log.stem}__*/model.pt"))
            assert not finished, "the run outlives the worker that began it"
            deadline = time.time() + 100
            while not any(
                loaded(process, "libtorch") for process in node.processes("ray::on_node")
            ):
                assert time.time() < deadline, "no second attempt"
                time.sleep(0.1)
            time.sleep(5)  # it knows the run's key, for which it loads the script, and would begin
            assert not node.runs(), "the second attempt does not wait for the first"
    assert gone([run])
    said, _ = runner.communicate(timeout=500)
    node.kill()
    assert runner.returncode == 0 and said.count("done: tiny Pendulum-v1") == 2, said
    ours = ("2 runs", "done", "2 of 2")  # nothing of Ray's
    assert all(line.startswith(ours) for line in said.splitlines()), said
    assert same(weights(tmp_path), undisturbed)
    folders = list(tmp_path.glob("runs/Pendulum*"))
    assert len(folders) == 2  # the lost run was continued, not begun anew
    logs = "".join(path.read_text() for path in log.parent.glob("*.txt"))
    assert "task" not in logs.lower()  # nor counted as failed
    if dies == "node":
        runner = start(tmp_path, "tiny", "--ray", address)
        said, _ = runner.communicate(timeout=100)
        assert runner.returncode == 0 and said.startswith("2 runs, 2 finished before\n2 of 2 "), (
            said
        )
        assert list(tmp_path.glob("runs/Pendulum*")) == folders


def test_a_runner_that_is_stopped_or_killed_continues(cluster, undisturbed, tmp_path):
    address, head, _ = cluster
    flags = ["tiny", "--ray", address, "--cpus", "0.5"]
    runner = start(tmp_path, *flags)
    wait_for_run(head, runner)
    runs = head.runs()  # one, or two of half a CPU each
    os.killpg(runner.pid, signal.SIGINT)
    for run in runs:
        run.resume()
    said, _ = runner.communicate(timeout=60)
    assert runner.returncode == 1 and said.splitlines()[-1].endswith(
        f"benchmark.run {' '.join(flags)}"
    ), said
    assert "Traceback" not in said
    assert not any(run.is_running() for run in runs)  # it has waited for them
    assert "--resume" in "".join(path.read_text() for path in tmp_path.glob("runs/logs/*.txt"))
    runner = start(tmp_path, *flags)
    wait_for_run(head, runner)
    runs = head.runs()
    runner.kill()
    runner.communicate()
    assert gone(runs) and len(weights(tmp_path)) < 2
    runner = start(tmp_path, *flags)
    said, _ = runner.communicate(timeout=500)
    assert runner.returncode == 0, said
    assert same(weights(tmp_path), undisturbed) and len(list(tmp_path.glob("runs/Pendulum*"))) == 2


def test_a_run_that_fails_twice_is_reported(cluster, tmp_path):
    runner = start(tmp_path, "broken", "--ray", cluster[0])
    said, _ = runner.communicate(timeout=500)
    assert (
        runner.returncode == 1 and said.count("failed with exit code 2") == 1 and "--tau" in said
    ), said
    (log,) = tmp_path.glob("runs/logs/*.txt")
    assert log.read_text().count("error: ") == 2


@pytest.mark.parametrize(
    "flags, answer",
    [
        (["--gpus", "1"], "no node has the 1 CPUs and 1 GPUs that a run takes"),
        (["--threads", "3"], "no node has the 3 CPUs and 0 GPUs that a run takes"),
        (["--cpus", "0"], "no node has the 0 CPUs"),
        (["--gpus", "1.5"], "--gpus must be a whole number"),
    ],
)
def test_what_no_node_has_is_said_at_once(flags, answer, cluster, tmp_path):
    runner = start(tmp_path, "tiny", "--ray", cluster[0], *flags)
    said, _ = runner.communicate(timeout=100)
    assert (
        runner.returncode == 2
        and said.startswith("error:")
        and answer in said
        and said.count("\n") == 1
    ), said
    assert not list(tmp_path.iterdir())


def test_rays_own_reason_is_told(monkeypatch, capsys):
    def refused(command, **_):
        raise subprocess.CalledProcessError(
            1, command, stderr=b"Traceback\nRuntimeError: another version of Ray\n"
        )

    monkeypatch.setattr(clusters.subprocess, "run", refused)
    monkeypatch.setattr(clusters.os, "environ", dict(os.environ))
    with pytest.raises(SystemExit) as stop:
        clusters.Cluster("auto", CPU=1, GPU=0)
    said = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and said == "error: no Ray cluster answers at auto: RuntimeError: another version of Ray\n"
    )


@pytest.mark.parametrize("address", ["127.0.0.2:{port}", "127.0.0.2"])
def test_an_address_nobody_answers_gets_one_line(address, tmp_path):
    address, began = address.format(port=free_port()), time.time()
    runner = start(tmp_path, "tiny", "--ray", address)
    said, _ = runner.communicate(timeout=500)
    assert runner.returncode == 2 and said == f"error: no Ray cluster answers at {address}\n"
    assert time.time() < began + 60  # Ray itself gives up after minutes
    assert not list(tmp_path.iterdir())


def test_without_ray_the_one_line_says_how_to_install_it(tmp_path):
    runner = start(
        tmp_path, "tiny", "--ray", "auto", before="import sys\nsys.modules['ray'] = None\n"
    )
    said, _ = runner.communicate(timeout=100)
    assert (
        runner.returncode == 2
        and said == "error: --ray needs Ray: pip install -r benchmark/requirements-ray.txt\n"
    )
