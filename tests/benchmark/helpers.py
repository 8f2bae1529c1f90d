"""What the tests of benchmark/ share: small studies, runners as their users start them, and results to compare."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmark.studies import Study

ROOT = Path(__file__).parent.parent.parent
SMALL = "--hidden 16 --learning-starts 60 --batch-size 8 --checkpoint-frequency 100 "
SMALL += "--log-frequency 20 --no-cuda"
TRAINING = f"{SMALL} --eval-frequency 0"
TWO = {"default": "", "gamma 0.9": "--gamma 0.9"}
TINY = Study({"Pendulum-v1": 900}, TWO, seeds=1, flags=TRAINING)
BROKEN = Study({"Pendulum-v1": 60}, {"x": "--tau 5 --learning-starts 50"}, seeds=1, flags=TRAINING)
MISTAKEN = Study({"Pendulum-v1": 60}, {"x": ""}, "a claim")
RUNNER = f"""
import sys
from benchmark import run, studies
Study = studies.Study
studies.STUDIES.clear()
studies.STUDIES.update(tiny={TINY!r}, also={TINY!r}, broken={BROKEN!r}, mistaken={MISTAKEN!r})
sys.argv[0] = "run"
run.main()
"""


def start_python(folder, code, *flags, options=(), environment=os.environ):
    """A program in a session of its own, as a terminal's foreground process would be."""
    return subprocess.Popen(
        [sys.executable, *options, "-c", code, *flags],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def start(folder, *flags, before="", environment=os.environ):
    """The runner, which knows the small studies."""
    return start_python(folder, before + RUNNER, *flags, environment=environment)


def weights(folder):
    """The final weights of all runs by the beginning of their folders' names; each run must have one folder."""
    found = {}
    for path in (folder / "runs").glob("*/model.pt"):
        name = path.parent.name.rsplit("__", 1)[0]
        assert name not in found, f"{name} was run twice"
        found[name] = torch.load(path, weights_only=True)["agent"]
    return found


def same(a, b):
    """Whether two folders' runs, one at least, ended with the same weights."""
    assert a
    named = {name: weights.keys() for name, weights in a.items()}
    if named != {name: weights.keys() for name, weights in b.items()}:
        return False
    return all(torch.equal(a[name][key], b[name][key]) for name in a for key in a[name])
