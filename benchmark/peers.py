"""Train with Stable-Baselines3 or SBX as the scripts do: their main flags, evaluations, records.

    python benchmark/peers.py --library stable-baselines3 --env-id Hopper-v4
    python benchmark/peers.py --library sbx --env-id Hopper-v4 --total-timesteps 100000

What they need is installed on first use, in a virtual environment of its own. Hyperparameters are
their defaults. An evaluation is ours: as many new environments with the same seeds, one episode in
each, the deterministic policy. The run folder has the same shape, so that `benchmark.run` and
`benchmark.report` treat it as one more script's. There are no checkpoints: what was stopped begins
anew.
"""

import fcntl
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent
LOSSES = {  # their records: our keys; a loss may be scaled otherwise than ours
    "train/critic_loss": "losses/qf_loss",
    "train/actor_loss": "losses/actor_loss",
    "train/ent_coef": "losses/alpha",
    "train/ent_coef_loss": "losses/alpha_loss",
}


@dataclass
class Args:
    library: Literal["stable-baselines3", "sbx"] = "stable-baselines3"
    algorithm: Literal["SAC", "TD3", "DDPG", "PPO"] = "SAC"
    env_id: str = "Hopper-v4"  # any Gymnasium environment with bounded Box actions
    seed: int = 1  # of weights, noise, sampling and environments
    total_timesteps: int = 1_000_000  # environment steps in all
    eval_frequency: int = 10_000  # steps between evaluations of the deterministic policy
    eval_episodes: int = 10  # episodes per evaluation
    log_frequency: int = 1_000  # steps between records of losses and speed
    exp_name: str = "peers"  # part of the run folder's name
    threads: int = 1  # CPU threads


def python_of_peers() -> str:
    """The interpreter of the peers' virtual environment, which is made on first use."""
    folder = ROOT / ".venv-peers"
    python, complete = folder / "bin" / "python", folder / "complete"
    with open(ROOT / ".venv-peers.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several runs may want it at once
        requirements = ROOT / "benchmark" / "requirements-peers.txt"
        wanted = requirements.read_text()
        if not complete.exists() or complete.read_text() != wanted:
            print("making .venv-peers, once", flush=True)
            install = [python, "-m", "pip", "install", "--quiet", "-r", requirements]
            for command in ([sys.executable, "-m", "venv", folder], install):
                if subprocess.run(command).returncode:
                    print(
                        f"error: pip install -r {requirements} failed, see above", file=sys.stderr
                    )
                    sys.exit(2)
            complete.write_text(wanted)
    return str(python)


def limit_threads(threads: int):
    """Before any library counts the cores: PyTorch's threads, and XLA's."""
    os.environ |= dict(OMP_NUM_THREADS=str(threads), NPROC=str(threads), CUDA_VISIBLE_DEVICES="")
    if threads == 1:
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"


def make_env(args: Args):
    import gymnasium as gym

    env = gym.make(args.env_id, disable_env_checker=True)
    return (
        gym.wrappers.FlattenObservation(env) if len(env.observation_space.shape or ()) != 1 else env
    )


def evaluate(model, args: Args, step: int):
    """Returns (E,) of an episode in each of E new environments, seeded as the scripts seed them."""
    import gymnasium as gym
    import numpy as np

    makers = [lambda: make_env(args)] * args.eval_episodes
    envs = gym.vector.SyncVectorEnv(makers, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    seeds = np.random.SeedSequence((args.seed, step, 1)).generate_state(len(makers)).tolist()
    obs, _ = envs.reset(seed=seeds)
    returns, running = np.zeros(len(makers)), np.ones(len(makers), dtype=bool)
    steps = 0
    while running.any() and steps < 10_000:
        action, _ = model.predict(obs, deterministic=True)
        obs, reward, terminated, truncated, _ = envs.step(action)
        returns += reward * running
        running &= ~(terminated | truncated)
        steps += 1
    envs.close()
    return returns


def watcher(args: Args, writer):
    """A callback that records what the scripts record, when they do."""
    from stable_baselines3.common.callbacks import BaseCallback

    class Watcher(BaseCallback):
        def _on_training_start(self):
            self.since = (0, time.time())

        def due(self, frequency: int) -> bool:
            step = self.num_timesteps
            return frequency > 0 and (step % frequency == 0 or step == args.total_timesteps)

        def record(self, **scalars: float):
            for key, value in scalars.items():
                writer.add_scalar(key, value, self.num_timesteps)
            writer.flush()

        def _on_step(self) -> bool:
            step = self.num_timesteps
            for info in self.locals["infos"]:
                if episode := info.get("episode"):
                    length = {"charts/episodic_length": episode["l"]}
                    self.record(**{"charts/episodic_return": episode["r"]}, **length)
            if self.due(args.log_frequency):
                now = (step, time.time())
                speed = (now[0] - self.since[0]) / (now[1] - self.since[1])
                self.since = now
                told = self.model.logger.name_to_value
                losses = {ours: told[theirs] for theirs, ours in LOSSES.items() if theirs in told}
                self.record(**losses, **{"charts/SPS": speed})
            if self.due(args.eval_frequency):
                returns = evaluate(self.model, args, step)
                spread = {"eval/episodic_return_std": returns.std()}
                self.record(**{"eval/episodic_return": returns.mean()}, **spread)
                print(
                    f"step {step}: evaluation {returns.mean():.1f} +- {returns.std():.1f}",
                    flush=True,
                )
            return step < args.total_timesteps

    return Watcher()


def versions(args: Args) -> dict:
    import torch

    packages = ["stable-baselines3", "torch", "numpy", "gymnasium", "mujoco"]
    packages += ["sbx-rl", "jax"] if args.library == "sbx" else []
    processor = torch.cpu.get_capabilities()["cpu_name"]
    about = {"python": platform.python_version()} | {name: version(name) for name in packages}
    return about | dict(processor=processor, gpu=False)


def train(args: Args):
    import torch
    from torch.utils.tensorboard import SummaryWriter

    torch.set_num_threads(args.threads)
    library = importlib.import_module(args.library.replace("-", "_"))
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns() // 10**6}"
    folder = Path("runs", re.sub(r"[^\w.-]+", "-", name))
    folder.mkdir(parents=True)
    shutil.copy(__file__, folder)
    (folder / "args.json").write_text(json.dumps(asdict(args), indent=2))
    (folder / "versions.json").write_text(json.dumps(versions(args), indent=2))
    # SBX computes with JAX, which has no such flag
    device = {} if args.library == "sbx" else {"device": "cpu"}
    algorithm = getattr(library, args.algorithm)
    model = algorithm("MlpPolicy", make_env(args), seed=args.seed, **device)
    model.learn(args.total_timesteps, callback=watcher(args, SummaryWriter(folder)))
    model.save(folder / "model.tmp")
    saved = next(folder.glob("model.tmp*"))
    saved.rename(folder / "model.pt")  # as of the scripts: there once the run is finished
    print(f"done: {folder}")


def main():
    args = tyro.cli(Args, description=__doc__)
    if importlib.util.find_spec("stable_baselines3") and importlib.util.find_spec("sbx"):
        limit_threads(args.threads)
        train(args)
    else:
        python = python_of_peers()
        os.execv(python, [python, *sys.argv])  # the same process: who stops us stops the training


if __name__ == "__main__":
    main()
