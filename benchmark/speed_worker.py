"""Train SAC with one library, without end, and count environment steps: for benchmark/speed.py.

    python speed_worker.py LIBRARY ENV_ID THREADS COUNTER [flags of the script ...]

LIBRARY is a script of this project, "stable_baselines3" or "sbx". COUNTER is a file of 8 bytes, a
memory-mapped int64: all libraries are measured by the same count, made in the environment's own
`step`. It needs numpy and gymnasium only, because it runs in the peers' virtual environment too.
"""

import os
import runpy
import sys
import warnings

library, env_id, threads, counter_path, *flags = sys.argv[1:]
cores = sorted(os.sched_getaffinity(0))[: int(threads)] if hasattr(os, "sched_getaffinity") else []
if cores:  # before any library counts the cores
    os.sched_setaffinity(0, cores)

import gymnasium as gym
import numpy as np

counter = np.memmap(counter_path, np.int64, "r+", shape=(1,))
env_class = gym.envs.registration.load_env_creator(gym.spec(env_id).entry_point)
env_step = env_class.step


def counted_step(self, action):
    counter[0] += 1
    return env_step(self, action)


env_class.step = counted_step
warnings.filterwarnings("ignore")
if library.endswith(".py"):
    sys.argv = [library, "--env-id", env_id, *flags]
    runpy.run_path(library, run_name="__main__")
elif library == "env":  # the environment alone
    env = gym.make(env_id)
    env.action_space.seed(1)
    env.reset(seed=1)
    while True:
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()
else:
    import torch

    # SBX computes with XLA, which takes as many threads as it may use cores.
    torch.set_num_threads(int(threads))
    algorithm = __import__(library).SAC
    # These are their defaults, said here all the same.
    sizes = dict(batch_size=256, train_freq=1, gradient_steps=1)
    sizes |= dict(policy_kwargs={"net_arch": [256, 256]})
    algorithm("MlpPolicy", env_id, seed=1, **sizes).learn(total_timesteps=10**9)
