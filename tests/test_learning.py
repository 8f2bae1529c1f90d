"""It learns: a run short enough for every change, far above what an idle policy can reach."""

import os
import shutil

import pytest
from helpers import only_run, run_forked

pytestmark = [pytest.mark.slow, pytest.mark.only("sac_continuous")]
FLAGS = "--env-id Pendulum-v1 --total-timesteps 5000 --learning-starts 1000 --batch-size 64 "
FLAGS += "--eval-frequency 5000 --threads 1"


@pytest.mark.parametrize("num_envs, compile", [(1, "on"), (4, "off")])
def test_pendulum_is_swung_up(sac, num_envs, compile, tmp_path):
    if compile == "on" and not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("no C++ compiler")
    flags = f"{FLAGS} --num-envs {num_envs} --compile {compile}"
    ended = run_forked(tmp_path, sac, flags)
    assert ended.code == 0, ended.err
    ((_,), (returns,)) = sac.read_records(only_run(tmp_path))["eval/episodic_return"]
    assert returns > -300  # a random policy gets about -1200, a perfect one about -150
