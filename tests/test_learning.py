"""It learns: a run short enough for every change, and far above what a policy that does not learn can reach."""

import os
import shutil
import sys

import pytest

import sac_continuous as sac


@pytest.mark.parametrize("num_envs, compile", [(1, "off"), (1, "on"), (4, "off")])
def test_pendulum_is_swung_up(num_envs, compile, tmp_path, monkeypatch):
    if compile == "on" and not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("no C++ compiler")
    flags = "--env-id Pendulum-v1 --total-timesteps 6000 --learning-starts 1000 --eval-frequency 6000 --threads 1"
    monkeypatch.chdir(tmp_path)
    flags += f" --num-envs {num_envs} --compile {compile}"
    monkeypatch.setattr(sys, "argv", ["sac_continuous.py", *flags.split()])
    sac.main()
    (folder,) = tmp_path.glob("runs/*")
    ((_,), (returns,)) = sac.read_records(folder)["eval/episodic_return"]
    assert returns > -300  # a random policy gets about -1200, a perfect one about -150
