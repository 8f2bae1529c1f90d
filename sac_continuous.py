# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch==2.13.0", "gymnasium[mujoco]==1.4.0", "gymnasium[box2d]==1.4.0; python_version < '3.14'", "mujoco==3.11.0",
#   "shimmy==2.0.1", "dm-control==1.0.44; python_version < '3.13'", "psutil==7.2.2", "tqdm==4.70.1", "tyro==1.0.17",
#   "numpy==2.4.6; python_version >= '3.11'", "numpy==2.2.6; python_version < '3.11'", "matplotlib==3.10.9",
#   "tensorboard==2.21.0", "wandb==0.31.0", "moviepy==2.2.1",
# ]
# ///
"""Soft Actor-Critic with a learned temperature (Haarnoja et al. 2018, arXiv 1812.05905), in one file.

    python sac_continuous.py --env-id Hopper-v4                      # train; results in runs/
    python sac_continuous.py --evaluate runs/<folder> --capture-video  # watch what was learned

A policy pi maximises reward plus alpha times its own entropy. Critics Q_1..Q_C learn the soft value of an action from
replayed transitions (s, a, r, s', d), d = 1 where the task itself ended; slow copies Q' of them make the targets:

    (1)  y       = r + gamma (1 - d) (min_c Q'_c(s', a') - alpha log pi(a'|s')),   a' ~ pi(.|s')
    (2)  L_Q     = mean over critics and batch of (Q_c(s, a) - y)^2
    (3)  L_pi    = mean of alpha log pi(a|s) - min_c Q_c(s, a),   a = tanh(mean(s) + std(s) * noise)
    (4)  L_alpha = mean of -log(alpha) (log pi(a|s) + H),         H = -dim(A), the target entropy

Shapes: B batch, N environments, C critics, O observation and A action dimensions. Every count is in environment steps.
"""

import ctypes
import json
import math
import os
import re
import shutil
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import psutil
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "Hopper-v4"  # any Gymnasium environment with bounded Box actions (also "module:name")
    seed: int = 1  # of weights, noise, sampling and environments
    total_timesteps: int = 1_000_000  # environment steps in all, summed over --num-envs
    num_envs: int = 1  # environments stepped together; there is one update per environment step all the same
    buffer_size: int = 1_000_000  # transitions kept for replay
    gamma: float = 0.99  # discount per step
    tau: float = 0.005  # share of the critics that moves into the target critics at each update
    batch_size: int = 256  # transitions per update
    learning_starts: int = 5_000  # steps of uniformly random actions before the first update
    policy_lr: float = 3e-4  # Adam's learning rate of the policy and of the temperature
    q_lr: float = 1e-3  # Adam's learning rate of the critics
    eval_frequency: int = 10_000  # steps between evaluations of the deterministic policy; 0 for none
    eval_episodes: int = 10  # episodes per evaluation, cut at 10,000 steps if the environment has no end
    checkpoint_frequency: int = 50_000  # steps between checkpoints; environments start afresh at each, for exact resume
    log_frequency: int = 1_000  # steps between records of losses and speed
    resume: Path | None = None  # run folder to continue; its flags hold unless given anew
    evaluate: Path | None = None  # run folder whose policy to evaluate instead of training
    capture_video: bool = False  # record the first episode of each evaluation as mp4
    track: bool = False  # mirror the records to Weights & Biases
    wandb_project_name: str = "one-file-sac"  # project there
    wandb_entity: str | None = None  # team there
    exp_name: str = "sac_continuous"  # part of the run folder's name
    cuda: bool = True  # use a GPU when there is one
    threads: int = min(2, torch.get_num_threads())  # CPU threads of PyTorch; 1 when several runs share a machine
    compile: bool = False  # compile the update: a minute or less of waiting, then faster
    matmul_precision: Literal["auto", "highest", "high", "medium"] = "auto"  # auto: fastest kind with float32's accuracy


class Batch(NamedTuple):
    obs: torch.Tensor  # (B, O)
    action: torch.Tensor  # (B, A)
    reward: torch.Tensor  # (B,)
    terminated: torch.Tensor  # (B,) 1.0 where the task itself ended; a time limit is 0.0 and still bootstraps
    next_obs: torch.Tensor  # (B, O) the true last observation where an episode ended, never the next one's first


class ReplayBuffer:
    """Ring of the newest `capacity` transitions on `device`, one float32 row each, in the order of Batch."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device="cpu"):
        self.widths = [obs_dim, action_dim, 1, 1, obs_dim]
        self.rows = torch.empty(capacity, sum(self.widths), device=device)  # memory is taken as rows fill
        self.count = 0  # transitions ever added

    def __len__(self) -> int:
        return min(self.count, len(self.rows))

    def add(self, obs, action, reward, terminated, next_obs):
        """Store N transitions: arrays (N, O), (N, A), (N,), (N,), (N, O)."""
        columns = (obs, action, reward[:, None], terminated[:, None], next_obs)
        rows = torch.from_numpy(np.concatenate(columns, axis=1, dtype=np.float32))
        self.rows[(self.count + torch.arange(len(rows))) % len(self.rows)] = rows.to(self.rows.device)
        self.count += len(rows)

    def sample(self, batch_size: int, generator: torch.Generator) -> Batch:
        """Draw transitions uniformly, with replacement."""
        index = torch.randint(len(self), (batch_size,), generator=generator, device=self.rows.device)
        obs, action, reward, terminated, next_obs = self.rows[index].split(self.widths, dim=1)
        return Batch(obs, action, reward.squeeze(1), terminated.squeeze(1), next_obs)


class Actor(nn.Module):
    """Policy over actions in (-1, 1)^A: tanh of a Gaussian with state-dependent mean and standard deviation."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int = 256):
        super().__init__()
        hidden_layers = [nn.Linear(obs_dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
        self.layers = nn.Sequential(*hidden_layers, nn.Linear(hidden, 2 * action_dim))
        for layer in self.layers[::2]:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, obs: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Actions (B, A) and their log-densities (B,) from standard normal noise (B, A); zero noise gives the mode."""
        mean, log_std = self.layers(obs).chunk(2, dim=-1)
        log_std = log_std.clamp(-20, 2)
        u = mean + log_std.exp() * noise
        log_prob_u = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        # log(1 - tanh(u)^2), in the form that neither overflows nor loses its gradient where tanh saturates
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))
        return u.tanh(), (log_prob_u - log_slope).sum(-1)


class Critics(nn.Module):
    """C independent Q-networks in one: each layer is a single batched product."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int = 256, count: int = 2):
        super().__init__()
        sizes = [(obs_dim + action_dim, hidden), (hidden, hidden), (hidden, 1)]
        self.weights = nn.ParameterList([torch.empty(count, fan_in, fan_out) for fan_in, fan_out in sizes])
        self.biases = nn.ParameterList([torch.zeros(count, 1, fan_out) for _, fan_out in sizes])
        for weight in self.weights:
            for critic_weight in weight:  # one critic at a time: of a 3-d tensor Xavier would misread the fans
                nn.init.xavier_uniform_(critic_weight)

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Q-values (C, B) of observations (B, O) and actions (B, A)."""
        x = torch.cat([obs, action], dim=-1).expand(len(self.weights[0]), -1, -1)
        x = F.relu(torch.baddbmm(self.biases[0], x, self.weights[0]))
        x = F.relu(torch.baddbmm(self.biases[1], x, self.weights[1]))
        return torch.baddbmm(self.biases[2], x, self.weights[2]).squeeze(-1)


class Adam(nn.Module):
    """Adam (Kingma & Ba 2015, arXiv 1412.6980). torch.optim's cannot be part of one compiled graph; this one can."""

    def __init__(self, parameters, lr: float):
        super().__init__()
        self.parameters_, self.lr = list(parameters), lr
        self.mean = nn.ParameterList([torch.zeros_like(p) for p in self.parameters_]).requires_grad_(False)
        self.square = nn.ParameterList([torch.zeros_like(p) for p in self.parameters_]).requires_grad_(False)
        self.register_buffer("steps", torch.zeros(()))

    @torch.no_grad()
    def minimize(self, loss: torch.Tensor, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8):
        """One step down the gradient of `loss` in these parameters alone: no other network gets a gradient."""
        gradients = torch.autograd.grad(loss, self.parameters_)
        self.steps += 1
        step_size, square_scale = self.lr / (1 - beta1**self.steps), (1 - beta2**self.steps).sqrt()
        for p, gradient, mean, square in zip(self.parameters_, gradients, self.mean, self.square):
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            p.sub_((mean / square.sqrt().div_(square_scale).add_(eps)).mul_(step_size))


class SAC(nn.Module):
    """The agent: every tensor that learning changes; state_dict() is all of it, optimizers included."""

    def __init__(self, obs_dim: int, action_dim: int, gamma=0.99, tau=0.005, policy_lr=3e-4, q_lr=1e-3):
        super().__init__()
        self.gamma, self.tau, self.target_entropy = gamma, tau, -float(action_dim)
        self.actor = Actor(obs_dim, action_dim)
        self.critics = Critics(obs_dim, action_dim)
        self.target_critics = Critics(obs_dim, action_dim).requires_grad_(False)
        self.target_critics.load_state_dict(self.critics.state_dict())
        self.log_alpha = nn.Parameter(torch.zeros(()))
        self.actor_optimizer = Adam(self.actor.parameters(), policy_lr)
        self.critic_optimizer = Adam(self.critics.parameters(), q_lr)
        self.alpha_optimizer = Adam([self.log_alpha], policy_lr)

    def update(self, batch: Batch, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """One step of critics, policy, temperature and target critics; noise: (2, B, A), standard normal.

        Returns 0-d tensors to log, still on the device: reading one on the host would wait for the whole update.
        """
        alpha = self.log_alpha.detach().exp()

        with torch.no_grad():
            next_action, next_log_prob = self.actor(batch.next_obs, noise[0])
            next_value = self.target_critics(batch.next_obs, next_action).amin(0) - alpha * next_log_prob
            target_q = batch.reward + self.gamma * (1 - batch.terminated) * next_value  # (1)
        q = self.critics(batch.obs, batch.action)
        critic_loss = (q - target_q).square().mean()  # (2)
        self.critic_optimizer.minimize(critic_loss)

        action, log_prob = self.actor(batch.obs, noise[1])
        actor_loss = (alpha * log_prob - self.critics(batch.obs, action).amin(0)).mean()  # (3)
        self.actor_optimizer.minimize(actor_loss)

        entropy = -log_prob.detach().mean()
        alpha_loss = self.log_alpha * (entropy - self.target_entropy)  # (4)
        self.alpha_optimizer.minimize(alpha_loss)

        with torch.no_grad():
            for target, source in zip(self.target_critics.parameters(), self.critics.parameters()):
                target.lerp_(source, self.tau)
        losses = {"qf_loss": critic_loss, "actor_loss": actor_loss, "alpha_loss": alpha_loss, "alpha": alpha}
        losses |= {"qf1_values": q[0].mean(), "target_q": target_q.mean(), "entropy": entropy}
        return {f"losses/{name}": value.detach() for name, value in losses.items()}

    @torch.no_grad()
    def act(self, obs: np.ndarray, noise: torch.Tensor) -> np.ndarray:
        """Actions (N, A) in (-1, 1) for observations (N, O) and standard normal noise (N, A)."""
        return self.actor(torch.as_tensor(obs, dtype=torch.float32, device=noise.device), noise)[0].cpu().numpy()


def fail(message: str):
    """End the program for a mistake of its user: one line, exit code 2."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)


def make_env(env_id: str, video: Path | None = None) -> gym.Env:
    """One environment with flat observations and actions (A,) in [-1, 1], mapped to the bounds of each dimension.

    With `video`, a path without suffix, its first episode is recorded there as mp4.
    """
    warnings.filterwarnings("ignore", message=".*is out of date")  # v4 is meant: the published results are on it
    try:
        env = gym.make(env_id, render_mode="rgb_array" if video else None, disable_env_checker=True)
    except Exception as error:  # whatever a third party's constructor raises; Gymnasium's own errors suggest names
        needs = {"shimmy": "shimmy dm-control", "dm_control": "shimmy dm-control", "Box2D": "'gymnasium[box2d]'"}
        hints = [f" (pip install {package})" for word, package in needs.items() if word in str(error)] + [""]
        fail(f"--env-id {env_id}: {error}{hints[0]}")
    box = env.action_space
    if not (isinstance(box, gym.spaces.Box) and box.dtype.kind == "f" and np.isfinite([box.low, box.high]).all()):
        fail(f"--env-id {env_id}: SAC needs continuous actions (a float Box) with finite bounds, this one has {box}")
    if not isinstance(env.observation_space, gym.spaces.Box) or len(env.observation_space.shape) != 1:
        env = gym.wrappers.FlattenObservation(env)
    low, high = box.low.astype(np.float64), box.high.astype(np.float64)

    def rescale(action):  # the clip takes away what rounding adds at the bounds
        return np.clip(low + (action.reshape(box.shape) + 1) / 2 * (high - low), low, high).astype(box.dtype)

    env = gym.wrappers.TransformAction(env, rescale, gym.spaces.Box(-1, 1, (math.prod(box.shape),), np.float32))
    if video:
        options = dict(name_prefix=video.name, episode_trigger=lambda episode: episode == 0, disable_logger=True)
        env = gym.wrappers.RecordVideo(env, str(video.parent), **options)
    return env


def make_vector_env(makers: list, seed: tuple[int, ...]) -> tuple[gym.vector.VectorEnv, np.ndarray]:
    """Environments stepped together and their first observations (N, O), each with its own seed drawn from `seed`."""
    # Gymnasium's default autoreset spends a step on the reset, with the action ignored: a transition that never was.
    envs = gym.vector.SyncVectorEnv(makers, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    return envs, envs.reset(seed=np.random.SeedSequence(seed).generate_state(len(makers)).tolist())[0]


def evaluate(agent: SAC, args: Args, step: int, stochastic: bool = False, video: Path | None = None) -> np.ndarray:
    """Returns (E,) of one episode in each of E = --eval-episodes new environments; touches nothing that trains."""
    makers = [partial(make_env, args.env_id, video)] + [partial(make_env, args.env_id)] * (args.eval_episodes - 1)
    envs, obs = make_vector_env(makers, (args.seed, step, 1))
    device = agent.log_alpha.device
    generator = torch.Generator(device).manual_seed(args.seed)
    returns, running = np.zeros(envs.num_envs), np.ones(envs.num_envs, dtype=bool)
    for _ in range(10_000):
        noise = torch.randn(envs.action_space.shape, generator=generator, device=device) * stochastic
        obs, reward, terminated, truncated, _ = envs.step(agent.act(obs, noise))
        returns += reward * running
        running &= ~(terminated | truncated)
        if not running.any():
            break
    envs.close()
    return returns


def save(state: dict, path: Path):
    """Write to a temporary name, flush to disk, then rename: at every instant one whole file stands at `path`."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save wraps what the disk said in a RuntimeError
        temporary.unlink(missing_ok=True)
        sys.exit(f"error: {path} was not written, the one before stays: {str(error).splitlines()[0]}")


def load(folder: Path) -> dict:
    """The checkpoint of a run; memory-mapped, so that only what is used is read."""
    try:
        return torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file shows itself as almost anything
        fail(f"{folder / 'checkpoint.pt'} is missing or damaged, start a new run: {str(error).splitlines()[0]}")


def read_records(folder: Path) -> dict[str, np.ndarray]:
    """Scalars of a run by key, from TensorBoard's own files, resumes accounted for: rows of steps and of values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {key: np.array([(e.step, e.value) for e in events.Scalars(key)]).T for key in events.Tags()["scalars"]}


def plot(folder: Path, title: str):
    """Draw learning_curve.png from the run's records."""
    from matplotlib.figure import Figure

    records, figure = read_records(folder), Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel="environment steps", ylabel="return of an episode")
    if "charts/episodic_return" in records:
        axes.plot(*records["charts/episodic_return"], color="0.7", lw=0.8, label="training, stochastic policy")
    if "eval/episodic_return" in records:
        (steps, mean), (_, std) = records["eval/episodic_return"], records["eval/episodic_return_std"]
        axes.errorbar(steps, mean, std, marker="o", capsize=2, label="evaluation, deterministic policy (mean, std)")
    axes.legend()
    figure.savefig(folder / "learning_curve.png", dpi=120)


def parse_args() -> Args:
    """Flags of the command line, over those of the run with --resume and --evaluate; impossible ones end the program."""
    args = tyro.cli(Args)
    if folder := args.resume or args.evaluate:
        try:
            saved = json.loads((folder / "args.json").read_text())
            args = tyro.cli(Args, default=Args(**saved))
        except (OSError, ValueError, TypeError) as error:
            fail(f"{folder} is not a whole run folder ({error}): name one that holds args.json and checkpoint.pt")
        changed = [key for key in saved if saved[key] != getattr(args, key)]
        for key in {"env_id", "buffer_size"} & set(changed):
            fail(f"{folder} is a run with --{key.replace('_', '-')} {saved[key]}: leave this flag out")
        if args.resume and changed:
            print(f"warning: continues with other values of {', '.join(changed)}", file=sys.stderr)

    least = dict.fromkeys("total_timesteps num_envs buffer_size batch_size eval_episodes".split(), 1)
    least |= dict(checkpoint_frequency=1, log_frequency=1, threads=1, seed=0, learning_starts=0, eval_frequency=0)
    rules = [(getattr(args, key) >= n, f"--{key.replace('_', '-')} must be {n} or more") for key, n in least.items()]
    rules += [
        (0 <= args.gamma <= 1, "--gamma must lie in [0, 1]"),
        (0 < args.tau <= 1, "--tau must be above 0 and at most 1"),
        (0 < args.policy_lr < math.inf, "--policy-lr must be a positive number"),
        (0 < args.q_lr < math.inf, "--q-lr must be a positive number"),
        (args.learning_starts < args.total_timesteps, "--learning-starts must be below --total-timesteps"),
        (args.batch_size <= args.buffer_size, "--batch-size is larger than --buffer-size: lower it or raise the other"),
        (args.num_envs <= args.buffer_size, "--num-envs is larger than --buffer-size: lower it or raise the other"),
        (not args.compile or shutil.which(os.environ.get("CXX", "g++")), "--compile needs a C++ compiler: install g++"),
        (not args.capture_video or find_spec("moviepy"), "--capture-video needs moviepy: pip install moviepy"),
        (not args.track or find_spec("wandb"), "--track needs wandb: pip install wandb"),
    ]
    for message in (message for holds, message in rules if not holds):
        fail(message)
    return args


def main():
    args = parse_args()
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if sys.platform == "linux":  # keep freed memory: page faults for memory given back are half the time of an update
        for option, value in ((-1, 2**30), (-3, 2**25)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of glibc
            getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)(option, value)
    torch.set_num_threads(args.threads)
    precision = {"cpu": "medium", "cuda": "highest"}[device.type]  # medium is oneDNN, on a CPU twice as fast as MKL here
    torch.set_float32_matmul_precision(precision if args.matmul_precision == "auto" else args.matmul_precision)
    x = torch.rand(256, 256)
    if args.matmul_precision == "auto" and (x @ x - x.double() @ x.double()).abs().max() > 1e-3:
        torch.set_float32_matmul_precision("highest")  # this CPU (one with AMX) would have rounded to bfloat16
    if not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a screen

    env = make_env(args.env_id)
    obs_dim, action_dim = math.prod(env.observation_space.shape), math.prod(env.action_space.shape)
    if args.capture_video:
        try:
            picture = gym.make(args.env_id, render_mode="rgb_array", disable_env_checker=True)
            picture.reset()
            picture.render()
        except Exception as error:  # any of the many ways in which graphics can be missing
            fail(f"--capture-video: this machine cannot render {args.env_id} ({error}): leave the flag out")
    torch.manual_seed(args.seed)
    agent = SAC(obs_dim, action_dim, args.gamma, args.tau, args.policy_lr, args.q_lr).to(device)
    state = load(args.resume or args.evaluate) if args.resume or args.evaluate else {"step": 0, "best": -math.inf}
    agent.load_state_dict(state.get("agent", agent.state_dict()))
    if args.evaluate:
        for name in ("deterministic", "stochastic"):
            video = args.evaluate / "videos" / f"step-{state['step']}-{name}" if args.capture_video else None
            returns = evaluate(agent, args, state["step"], name == "stochastic", video)
            print(f"{name} policy: return {returns.mean():.2f} +- {returns.std():.2f} over {len(returns)} episodes")
        return

    capacity = min(args.buffer_size, max(args.total_timesteps, state["step"]) + args.num_envs)
    needed = capacity * (2 * obs_dim + action_dim + 2) * 4  # bytes
    free = psutil.virtual_memory().available if device.type == "cpu" else torch.cuda.mem_get_info()[0]
    if needed > free:
        fail(f"--buffer-size {args.buffer_size} takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: lower it")
    if args.track and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        if not wandb.login(prompt=False):
            fail("--track needs a login: run `wandb login`, or set WANDB_MODE=offline")
    print(f"{args.env_id}: {obs_dim} observations, {action_dim} actions, up to {needed / 1e9:.2f} GB of replay; {device}")
    train(args, agent, ReplayBuffer(capacity, obs_dim, action_dim, device), state)


def train(args: Args, agent: SAC, buffer: ReplayBuffer, state: dict):
    """The loop, from the step in `state` to --total-timesteps."""
    device, n_envs, action_dim = agent.log_alpha.device, args.num_envs, int(-agent.target_entropy)
    step, best, losses = state["step"], state["best"], {}
    random = torch.Generator(device).manual_seed(args.seed)  # the one stream of everything random but the environments
    versions = dict(python=sys.version, torch=torch.__version__, numpy=np.__version__, gymnasium=gym.__version__)
    versions |= dict(device=str(device), threads=args.threads, cpu=torch.backends.cpu.get_cpu_capability())
    folder = args.resume
    if folder:
        buffer.rows[: len(state["rows"])], buffer.count = state["rows"], step
        if state["versions"] != versions:
            print(f"warning: begun with {state['versions']}: will not be bit for bit the same", file=sys.stderr)
        if state["versions"]["device"] == str(device):
            random.set_state(state["random"])
    else:
        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns() // 10**6}"
        folder = Path("runs", re.sub(r"[^\w.-]+", "-", name))
        folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(asdict(args) | {"resume": None, "evaluate": None}, indent=2))
    script = Path(__file__)
    if not args.resume:
        shutil.copy(script, folder)
    run = None
    if args.track:
        import wandb

        tracked = max((steps[-1] for steps, _ in read_records(folder).values()), default=-1)
        run = wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, name=folder.name, id=folder.name,
                         resume="allow", dir=folder, config=asdict(args))
        run.save(folder / script.name, base_path=folder, policy="now")
    writer = SummaryWriter(folder, purge_step=step + 1 if args.resume else None)

    def record(scalars: dict):
        for key, value in scalars.items():
            writer.add_scalar(key, value, step)
        writer.flush()  # first, so that TensorBoard's last step, read at a resume, is never before wandb's
        if run and step > tracked:
            run.log(scalars, step=step)

    def due(frequency: int) -> bool:
        return frequency > 0 and (step // frequency > (step - n_envs) // frequency or step >= args.total_timesteps)

    def checkpoint():
        stop_if_not_finite(agent.state_dict())
        rows = torch.from_numpy(buffer.rows[: len(buffer)].cpu().numpy())  # a view of the filled rows alone
        state = dict(agent=agent.state_dict(), rows=rows, step=step, best=best, random=random.get_state(), versions=versions)
        save(state, folder / "checkpoint.pt")

    def stop_if_not_finite(tensors: dict[str, torch.Tensor]):
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                sys.exit(f"error: {name} is not finite at step {step}; the last good checkpoint stays in {folder}")

    update = agent.update
    if args.compile:
        print("compiling the update, for up to a minute")
        torch._dynamo.config.trace_autograd_ops = True  # gradients inside the one graph
        update = torch.compile(agent.update, fullgraph=True)
    makers, shape = [partial(make_env, args.env_id)] * n_envs, (n_envs, action_dim)
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=None, dynamic_ncols=True)
    mark_step, mark_time, last, said = step, time.time(), math.nan, 0.0
    if not args.resume:
        checkpoint()
    envs, obs = make_vector_env(makers, (args.seed, step, 0))
    returns, lengths = np.zeros(n_envs), np.zeros(n_envs)
    try:
        while step < args.total_timesteps:
            if step < args.learning_starts:
                action = (torch.rand(shape, generator=random, device=device) * 2 - 1).cpu().numpy()
            else:
                action = agent.act(obs, torch.randn(shape, generator=random, device=device))
            next_obs, reward, terminated, truncated, infos = envs.step(action)
            done, true_next_obs = terminated | truncated, next_obs.copy()
            if done.any():
                true_next_obs[done] = np.stack(infos["final_obs"][done])
            buffer.add(obs, action, reward, terminated, true_next_obs)
            obs, step, returns, lengths = next_obs, step + n_envs, returns + reward, lengths + 1
            if done.any():
                last = returns[done].mean()
                best = max(best, last)
                record({"charts/episodic_return": last, "charts/episodic_length": lengths[done].mean()})
                returns[done] = lengths[done] = 0

            for _ in range(min(n_envs, step - args.learning_starts)):  # as many updates as steps
                batch = buffer.sample(args.batch_size, random)
                losses = update(batch, torch.randn((2, args.batch_size, action_dim), generator=random, device=device))

            bar.update(n_envs)
            if due(args.log_frequency):
                stop_if_not_finite(losses)
                now = time.time()
                sps = (step - mark_step) / (now - mark_time)
                mark_step, mark_time = step, now
                record({name: value.item() for name, value in losses.items()} | {"charts/SPS": sps})
                bar.set_postfix_str(f"return {last:.1f} best {best:.1f}")
                if bar.disable and now - said > 10:
                    said, left = now, (args.total_timesteps - step) / sps
                    print(f"step {step} | {sps:.0f} steps/s | {left / 60:.0f} min left | return {last:.1f} best {best:.1f}", flush=True)
            if due(args.eval_frequency):
                video = folder / "videos" / f"step-{step}" if args.capture_video else None
                result = evaluate(agent, args, step, video=video)
                record({"eval/episodic_return": result.mean(), "eval/episodic_return_std": result.std()})
                if run and video:
                    run.log({"eval/video": wandb.Video(f"{video}-episode-0.mp4", format="mp4")}, step=step)
                bar.write(f"step {step}: evaluation {result.mean():.1f} +- {result.std():.1f}")
            if due(args.checkpoint_frequency):
                checkpoint()
                envs.close()
                envs, obs = make_vector_env(makers, (args.seed, step, 0))
                returns, lengths = np.zeros(n_envs), np.zeros(n_envs)
    except KeyboardInterrupt:
        bar.close()
        print(f"stopped at step {step}; to continue: python {sys.argv[0]} --resume {folder}", file=sys.stderr)
        sys.exit(130)
    bar.close()
    writer.close()
    save({"agent": agent.state_dict()}, folder / "model.pt")
    plot(folder, f"{args.env_id}, seed {args.seed}")
    if run:
        run.finish()
    print(f"done: {folder}")


if __name__ == "__main__":
    main()
