"""It learns: a run short enough for every change, far above what an idle policy can reach."""

import pytest
from helpers import COMPILER, only_run, run_forked

pytestmark = [pytest.mark.slow, pytest.mark.only("sac_continuous")]
FLAGS = "--env-id Pendulum-v1 --total-timesteps 5000 --learning-starts 1000 --batch-size 64 "
FLAGS += "--eval-frequency 5000 --threads 1 --no-cuda"


def test_pendulum_is_swung_up(sac, tmp_path):
    """By compiled updates where there is a compiler; test_compile.py says they are the others."""
    compile = "on" if COMPILER else "off"
    ended = run_forked(tmp_path, sac, f"{FLAGS} --num-envs 4 --compile {compile}")
    assert ended.code == 0, ended.err
    ((_,), (returns,)) = sac.read_records(only_run(tmp_path))["eval/episodic_return"]
    assert returns > -300  # a random policy gets about -1200, a perfect one about -150
