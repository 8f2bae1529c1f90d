# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch==2.13.0", "gymnasium[mujoco]==1.4.0", "gymnasium[box2d]==1.4.0; python_version < '3.14'", "mujoco==3.11.0",
#   "shimmy==2.0.1", "dm-control==1.0.44", "psutil==7.2.2", "tqdm==4.70.1", "tyro==1.0.17",
#   "numpy==2.4.6; python_version >= '3.11'", "numpy==2.2.6; python_version < '3.11'", "matplotlib==3.10.9",
#   "tensorboard==2.21.0", "wandb==0.31.0", "moviepy==2.2.1",
# ]
# [tool.uv]
# override-dependencies = ["labmaze; python_version < '3.13'"]  # dm-control asks for it, but not for these tasks
# ///
"""Soft Actor-Critic with a learned temperature (Haarnoja et al. 2018, arXiv 1812.05905) on the DeepMind Control Suite.

    python sac_dmc.py --env-id walker-walk                      # train; results in runs/
    python sac_dmc.py --evaluate runs/<folder> --capture-video  # see what was learned
    python sac_dmc.py --list-tasks

This is sac_continuous.py but for the header, these lines, Args and make_env. Returns lie in [0, 1000];
only lqr has rewards that can be negative, and no end.

A policy pi maximises reward plus alpha times its own entropy. Critics Q_1..Q_C learn the soft value of an action from
replayed transitions (s, a, r, s', d), d = 1 where the task itself ended; slow copies Q' of them make the targets:

    (1)  y       = r + gamma (1 - d) (min_c Q'_c(s', a') - alpha log pi(a'|s')),   a' ~ pi(.|s')
    (2)  L_Q     = mean over critics and batch of (Q_c(s, a) - y)^2
    (3)  L_pi    = mean of alpha log pi(a|s) - min_c Q_c(s, a),   a = tanh(mean(s) + std(s) * noise)
    (4)  L_alpha = mean of -log(alpha) (log pi(a|s) + H),   H = -dim(A), the target entropy

Shapes: B batch, N environments, C critics, O observation and A action dimensions. Every count is in simulator steps.
"""

import copy, ctypes, importlib.util, json, math, os, re, shlex, shutil, signal, sys, time, warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym, numpy as np, psutil, torch, torch.nn as nn, torch.nn.functional as F, tyro
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

@dataclass
class Args:
    env_id: str = "cartpole-swingup"  # domain-task, as --list-tasks prints them
    list_tasks: bool = False  # print the tasks of the suite and stop
    action_repeat: int = 1  # simulator steps per action, rewards summed; one update per action
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
    exp_name: str = "sac_dmc"  # part of the run folder's name
    cuda: bool = True  # use a GPU when there is one
    threads: int = min(2, torch.get_num_threads())  # CPU threads of PyTorch, until other processes want the cores
    compile: Literal["auto", "on", "off"] = "auto"  # the update; auto: on a CPU, for 50,000 steps or more
    matmul_precision: Literal["auto", "highest", "high", "medium"] = "auto"  # auto: float32; medium: bfloat16 critics
    returns = "return of an episode (0 to 1000, save lqr)"  # shown by the curve
    fixed = {"env_id", "buffer_size", "action_repeat"}  # flags that a resume keeps

class Batch(NamedTuple):
    obs: torch.Tensor  # (B, O)
    action: torch.Tensor  # (B, A)
    reward: torch.Tensor  # (B,)
    terminated: torch.Tensor  # (B,) 1.0 where the task itself ended; a time limit is 0.0 and still bootstraps
    next_obs: torch.Tensor  # (B, O) the true last observation where an episode ended, never the next one's first

class ReplayBuffer:
    """Ring of the newest `capacity` transitions on `device`, one float32 row each, columns in the order of Batch."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device="cpu"):
        self.widths = [obs_dim, action_dim, 1, 1, obs_dim]
        self.rows = torch.empty(capacity, sum(self.widths), device=device)  # memory is taken as rows fill
        self.count = 0  # transitions ever added

    def __len__(self) -> int:
        return min(self.count, len(self.rows))

    def add(self, obs, action, reward, terminated, next_obs):
        """Store N transitions: arrays (N, O), (N, A), (N,), (N,), (N, O)."""
        columns = (obs, action, reward[:, None], terminated[:, None], next_obs)
        for row in torch.from_numpy(np.concatenate(columns, axis=1, dtype=np.float32)):
            self.rows[self.count % len(self.rows)] = row
            self.count += 1

    def sample(self, batch_size: int, generator: torch.Generator) -> torch.Tensor:
        """Places (B,) of transitions, drawn uniformly with replacement."""
        return torch.randint(len(self), (batch_size,), generator=generator, device=self.rows.device)

    def __getitem__(self, index: torch.Tensor) -> Batch:
        """The transitions at the places `index` (B,)."""
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
        """Actions (B, A) and their log-densities (B,) from standard normal noise (B, A); zero noise: the mean."""
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
        widths = [obs_dim + action_dim, hidden, hidden, 1]
        self.weights = nn.ParameterList([torch.empty(count, *fans) for fans in zip(widths, widths[1:])])
        self.biases = nn.ParameterList([torch.zeros(count, 1, width) for width in widths[1:]])
        self.product_dtype = None  # of the hidden layers' products; None: that of the weights, which stay as they are
        for critic_weight in (w for weight in self.weights for w in weight.data):  # by itself: Xavier is for matrices
            nn.init.xavier_uniform_(critic_weight)

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Q-values (C, B) of observations (B, O) and actions (B, A)."""
        x = torch.cat([obs, action], dim=-1).expand(len(self.weights[0]), -1, -1)
        for weight, bias in list(zip(self.weights, self.biases))[:-1]:
            x = (x.to(self.product_dtype) @ weight.to(self.product_dtype) + bias).relu_()
        return (x * self.weights[-1].mT).sum(-1) + self.biases[-1].squeeze(-1)  # for one output faster than a product

class Adam(nn.Module):
    """Adam (Kingma & Ba 2015, arXiv 1412.6980). torch.optim's cannot be part of one compiled graph; this one can."""

    def __init__(self, parameters, lr: float):
        super().__init__()
        self.targets, self.lr = list(parameters), lr
        self.mean, self.square = (nn.ParameterList(map(torch.zeros_like, self.targets)) for _ in range(2))
        self.requires_grad_(False).register_buffer("steps", torch.zeros(()))

    @torch.no_grad()
    def minimize(self, loss: torch.Tensor, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8):
        """One step down the gradient of `loss` in these parameters alone: no other network gets a gradient."""
        gradients = torch.autograd.grad(loss, self.targets)
        self.steps += 1
        step_size, square_scale = self.lr / (1 - beta1**self.steps), (1 - beta2**self.steps).sqrt()
        for p, gradient, mean, square in zip(self.targets, gradients, self.mean, self.square):
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            p.sub_((mean / square.sqrt().div_(square_scale).add_(eps)).mul_(step_size))

class SAC(nn.Module):
    """The agent: every tensor that learning changes; state_dict() is all of it, optimizers included."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.gamma, self.tau, self.target_entropy = args.gamma, args.tau, -float(action_dim)
        self.actor, self.critics = Actor(obs_dim, action_dim), Critics(obs_dim, action_dim)
        self.critics.product_dtype = torch.bfloat16 if args.matmul_precision == "medium" else None
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(()))
        self.actor_optimizer = Adam(self.actor.parameters(), args.policy_lr)
        self.critic_optimizer = Adam(self.critics.parameters(), args.q_lr)
        self.alpha_optimizer = Adam([self.log_alpha], args.policy_lr)

    def update(self, batch: Batch, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """One step of all networks, with standard normal noise (2, B, A); returns 0-d tensors to log, on the device."""
        alpha = self.log_alpha.detach().exp()
        with torch.no_grad():
            next_action, next_log_prob = self.actor(batch.next_obs, noise[0])
            next_value = self.target_critics(batch.next_obs, next_action).amin(0) - alpha * next_log_prob
            target_q = batch.reward + self.gamma * (1 - batch.terminated) * next_value  # (1)
        q = self.critics(batch.obs, batch.action)
        critic_loss = (q - target_q).square().mean()  # (2)
        self.critic_optimizer.minimize(critic_loss)
        losses = {"qf_loss": critic_loss, "qf1_values": q[0].mean(), "target_q": target_q.mean(), "alpha": alpha}

        action, log_prob = self.actor(batch.obs, noise[1])
        actor_loss = (alpha * log_prob - self.critics(batch.obs, action).amin(0)).mean()  # (3)
        self.actor_optimizer.minimize(actor_loss)
        entropy = -log_prob.detach().mean()
        alpha_loss = self.log_alpha * (entropy - self.target_entropy)  # (4)
        self.alpha_optimizer.minimize(alpha_loss)
        losses |= {"actor_loss": actor_loss, "alpha_loss": alpha_loss, "entropy": entropy}
        with torch.no_grad():
            for target, source in zip(self.target_critics.parameters(), self.critics.parameters()):
                target.lerp_(source, self.tau)
        return {f"losses/{name}": value.detach() for name, value in losses.items()}

    @torch.no_grad()
    def act(self, obs: np.ndarray, noise: torch.Tensor) -> np.ndarray:
        """Actions (N, A) in (-1, 1) for observations (N, O) and standard normal noise (N, A)."""
        return self.actor(torch.as_tensor(obs, dtype=torch.float32, device=noise.device), noise)[0].cpu().numpy()

def fail(message: str):
    """End the program for a mistake of its user: one line, exit code 2."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)

def make_env(args: Args, video: Path | None = None) -> gym.Env:
    """One task with flat observations (O,) and actions (A,) in [-1, 1]; first episode to mp4 at path `video`."""
    import difflib

    warnings.filterwarnings("ignore", message=".*(Overwriting|script_method)")
    try:
        from dm_control import suite
        from shimmy import DmControlCompatibilityV0
    except ImportError as error:
        by_hand = "dm-env dm-tree glfw lxml pyopengl pyparsing requests scipy shimmy"  # all but labmaze
        by_hand = f"pip install --no-deps dm-control==1.0.44 && pip install {by_hand}"
        fail(f"{error}: pip install shimmy dm-control; from Python 3.13 on, where labmaze is missing: {by_hand}")
    tasks = {f"{domain}-{task}": (domain, task) for domain, task in suite.ALL_TASKS}
    if args.list_tasks:
        print(*tasks, sep="\n")
        sys.exit()
    if (name := re.sub(r"^(shimmy:)?(dm_control/)?|-v0$", "", args.env_id)) not in tasks:
        closest = ", ".join(difflib.get_close_matches(name, tasks, 3, 0))
        fail(f"--env-id {args.env_id}: no such task, the closest are {closest}; --list-tasks prints all")
    if args.action_repeat < 1:
        fail("--action-repeat must be at least 1")

    def build(seed: int) -> gym.Env:
        task = suite.load(*tasks[name], task_kwargs={"random": seed})
        return DmControlCompatibilityV0(task, "rgb_array" if video else None, dict(height=480, width=640, camera_id=0))

    class Task(gym.Wrapper):
        def reset(self, *, seed: int | None = None, options: dict | None = None):
            if seed is not None:  # built anew: some tasks draw their model from the seed, and not the state alone
                self.env.close()
                self.env = build(seed)
            return self.env.reset()

        def step(self, action: np.ndarray):
            total = 0.0
            for _ in range(args.action_repeat):
                obs, reward, terminated, truncated, info = self.env.step(action)
                total += reward
                if terminated or truncated:
                    break
            return obs, total, terminated, truncated, info

    try:
        env = Task(build(0))
        if env.action_space.high.max() == 1e10:  # lqr alone has no limits; nearly all other tasks have these
            env.action_space = gym.spaces.Box(-1, 1, env.action_space.shape)
        if video:
            env.reset()
            env.render()
            once = dict(episode_trigger=lambda episode: episode == 0, name_prefix=video.name, disable_logger=True)
            env = gym.wrappers.RecordVideo(env, str(video.parent), **once)
    except Exception as error:  # renderers raise what they like
        fail(f"--env-id {args.env_id}{' --capture-video' if video else ''}: {error}")
    box = env.action_space
    if not (isinstance(box, gym.spaces.Box) and box.dtype.kind == "f" and np.isfinite(box.high - box.low).all()):
        fail(f"--env-id {args.env_id}: SAC needs continuous actions (a float Box) with finite bounds, not {box}")
    low, high = box.low, box.high  # the clip takes away what rounding adds at the bounds
    rescale = lambda a: np.clip(low + (a.reshape(box.shape) + 1) / 2 * (high - low), low, high).astype(box.dtype)
    env = gym.wrappers.TransformAction(env, rescale, gym.spaces.Box(-1, 1, (math.prod(box.shape),), np.float32))
    return gym.wrappers.FlattenObservation(env)  # flat ones too: it copies, and some environments reuse their arrays

def make_vector_env(makers: list, seed: tuple[int, ...]) -> tuple[gym.vector.VectorEnv, np.ndarray]:
    """Environments stepped together and their first observations (N, O), each with its own seed drawn from `seed`."""
    # Gymnasium's default autoreset spends a step on the reset, with the action ignored: a transition that never was
    envs = gym.vector.SyncVectorEnv(makers, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    return envs, envs.reset(seed=np.random.SeedSequence(seed).generate_state(len(makers)).tolist())[0]

def evaluate(agent: SAC, args: Args, step: int, stochastic: bool = False, video: Path | None = None) -> np.ndarray:
    """Returns (E,) of one episode in each of E = --eval-episodes new environments; touches nothing that trains."""
    makers = [lambda: make_env(args, video)] + [lambda: make_env(args)] * (args.eval_episodes - 1)
    envs, obs = make_vector_env(makers, (args.seed, step, 1))
    generator = torch.Generator(agent.log_alpha.device).manual_seed(args.seed)
    returns, running, steps = np.zeros(envs.num_envs), np.ones(envs.num_envs, dtype=bool), 0
    while running.any() and steps < 10_000:
        noise = torch.randn(envs.action_space.shape, generator=generator, device=generator.device) * stochastic
        obs, reward, terminated, truncated, _ = envs.step(agent.act(obs, noise))
        returns, running, steps = returns + reward * running, running & ~(terminated | truncated), steps + 1
    envs.close()
    return returns

def save(state: dict, path: Path):
    """Write to a temporary name, flush to disk, then rename: at every instant one whole file stands at `path`."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file), file.flush(), os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save wraps what ended it, a disk or Ctrl-C, in a RuntimeError
        said = f"error: {path} was not written, the one before it stays: {error.__context__ or error}".splitlines()[0]
        sys.exit(error.__context__.code if isinstance(error.__context__, SystemExit) else said)
    finally:
        temporary.unlink(missing_ok=True)

def read_records(folder: Path) -> dict[str, np.ndarray]:
    """Scalars of a run by key, from its TensorBoard files, resumes accounted for: arrays of steps and values (2, n)."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {key: np.array([(e.step, e.value) for e in events.Scalars(key)]).T for key in events.Tags()["scalars"]}

def main():
    args, state = tyro.cli(Args), {"step": 0, "best": math.nan}
    if folder := args.resume or args.evaluate:
        mode = "--resume" if args.resume else "--evaluate"
        try:
            saved = json.loads((folder / "args.json").read_text())
            args = tyro.cli(Args, default=Args(**saved))  # flags given anew win
            state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # a damaged file shows itself as almost anything
            fail(f"{mode} {folder} is missing or damaged, name another or start anew: {error}".splitlines()[0])
        changed = {key for key in saved if saved[key] != getattr(args, key)} - {"resume", "evaluate"}
        for key in changed & args.fixed:
            fail(f"{mode} {folder}: --{key.replace('_', '-')} {saved[key]} must stay")

    os.environ.setdefault("MUJOCO_GL", "egl" if sys.platform == "linux" else "glfw")  # renders without a screen
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    env = make_env(args, Path("probe") if args.capture_video else None)
    cpu, gpu, mujoco = torch.cpu.get_capabilities(), torch.cuda.is_available(), sys.modules.get("mujoco")  # if used
    versions = f"{sys.version} {' '.join(m.__version__ for m in (torch, np, gym, mujoco) if m)} {cpu['cpu_name']} {gpu}"
    another = versions != state.setdefault("versions", versions)
    if args.resume and (changed or another):
        print("warning: not bit for bit the run begun, changed:", *sorted(changed) or ["versions"], file=sys.stderr)
    device = torch.device("cuda" if args.cuda and gpu else "cpu")
    obs_dim, action_dim, n_envs = env.observation_space.shape[0], env.action_space.shape[0], args.num_envs
    stride = n_envs * args.action_repeat  # environment steps per round of the loop
    gigabytes = min(args.buffer_size, args.total_timesteps) * (2 * obs_dim + action_dim + 2) * 4e-9
    free = 1e-9 * (psutil.virtual_memory().available if device.type == "cpu" else torch.cuda.mem_get_info()[0])
    track, online = args.track and not args.evaluate, os.environ.get("WANDB_MODE", "online") == "online"
    wandb = importlib.import_module("wandb") if track and importlib.util.find_spec("wandb") else None
    counts = "total_timesteps learning_starts buffer_size num_envs batch_size eval_episodes log_frequency threads"
    limits = dict.fromkeys(counts.split(), (1, math.inf)) | dict.fromkeys(["tau", "policy_lr", "q_lr"], (1e-9, 1))
    limits |= dict(gamma=(0, 1), seed=(0, 2**63 - 1), checkpoint_frequency=(1, math.inf), eval_frequency=(0, math.inf))
    limits["learning_starts"] = (1, args.total_timesteps - 1)
    limits["num_envs"] = (1, min(args.learning_starts, args.buffer_size))  # the first update needs transitions
    for holds, message in [
        *((a <= vars(args)[k] <= b, f"--{k.replace('_', '-')} must lie in [{a}, {b}]") for k, (a, b) in limits.items()),
        (not (args.resume and args.evaluate), "--resume or --evaluate, one at a time: leave one out"),
        (args.batch_size <= args.buffer_size, "--batch-size must not exceed --buffer-size: lower it or raise that"),
        (args.evaluate or gigabytes <= free, f"--buffer-size takes {gigabytes:.1f} GB, {free:.1f} are free: lower it"),
        (not track or wandb, "--track needs wandb: pip install wandb"),
        (not (wandb and online) or wandb.login(prompt=False), "--track needs `wandb login`, or WANDB_MODE=offline"),
    ]:
        if not holds:
            fail(message)

    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):  # page faults can be half of an eager update:
        ctypes.CDLL(None).mallopt(-1, 2**30), ctypes.CDLL(None).mallopt(-3, 2**25)  # keep freed memory (trim, mmap)
    # "medium" is oneDNN on a CPU, twice as fast as MKL at these sizes and as exact, but with AMX it rounds to bfloat16
    auto = "medium" if device.type == "cpu" and cpu["architecture"] == "x86_64" and not cpu["amx_tile"] else "highest"
    torch.set_float32_matmul_precision(auto if args.matmul_precision == "auto" else args.matmul_precision)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    agent = SAC(obs_dim, action_dim, args).to(device)
    agent.load_state_dict(state.get("agent", agent.state_dict()))
    step, best, last, losses = state["step"], state["best"], math.nan, {}
    if args.evaluate:
        for name in ("deterministic", "stochastic"):
            video = args.evaluate / "videos" / f"step-{step}-{name}" if args.capture_video else None
            returns = evaluate(agent, args, step, name == "stochastic", video)
            print(f"{name} policy: return {returns.mean():.2f} +- {returns.std():.2f} over {len(returns)} episodes")
        return
    print(f"{args.env_id}: {obs_dim} observations, {action_dim} actions, up to {gigabytes:.2f} GB of replay, {device}")
    compiled = args.compile == "on" or args.compile == "auto" and device.type == "cpu" and args.total_timesteps >= 50000
    if compiled:
        print("compiling the update, for up to a minute", flush=True)
        try:
            torch.compile(lambda x: x + 1)(torch.ones(64, device=device))
        except Exception:  # no compiler, no Python headers, no Triton: each has its own way to say so
            compiled = False
            print("no C++ compiler that works: the update runs uncompiled, which is slower", flush=True)
    args.compile = "on" if compiled else "off"  # resumed, a run goes on as it began, whatever its new length
    buffer = ReplayBuffer(min(args.buffer_size, max(args.total_timesteps, step) + n_envs), obs_dim, action_dim, device)
    random = torch.Generator(device).manual_seed(args.seed)  # of everything random but the environments
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns() // 10**6}"
    folder = args.resume or Path("runs", re.sub(r"[^\w.-]+", "-", name))
    if args.resume:
        buffer.rows[: len(state["rows"])], buffer.count = state["rows"], step // args.action_repeat
        if len(state["random"]) == len(random.get_state()):  # not so on another kind of device
            random.set_state(state["random"])
    else:
        folder.mkdir(parents=True)
        shutil.copy(__file__, folder)
    if not args.resume or changed:
        (folder / "args.json").write_text(json.dumps(vars(args) | {"resume": None, "evaluate": None}, indent=2))
    if wandb:
        tracked = max((steps[-1] for steps, _ in read_records(folder).values()), default=-1)
        names = dict(project=args.wandb_project_name, entity=args.wandb_entity, name=folder.name, id=folder.name)
        run = wandb.init(**names, resume="allow", dir=folder.resolve(), config=vars(args))
        run.save(folder / Path(__file__).name, base_path=folder, policy="now")
    writer = SummaryWriter(folder, purge_step=step + 1 if args.resume else None)
    learn, act = lambda index, noise: agent.update(buffer[index], noise), agent.act
    if compiled:
        torch._dynamo.reset()  # with guards skipped, the graph of another run in this process would pass for ours
        torch._dynamo.config.trace_autograd_ops = True  # gradients inside the one graph
        torch._dynamo.mark_static_address(buffer.rows)  # CUDA graphs read it where it lies
        options = {"triton.cudagraphs" if device.type == "cuda" else "cpp_wrapper": True}  # what it costs to call them
        options["guard_filter_fn"] = torch.compiler.skip_all_guards_unsafe  # nothing it would look at changes here
        learn, act = (torch.compile(f, fullgraph=True, dynamic=False, options=options) for f in (learn, act))
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=None, dynamic_ncols=True)
    timer, envs, seen = (step, time.time()), None, np.full(3, -math.inf)
    resume = shlex.join(["python", sys.argv[0], "--resume", str(folder)])
    signal.signal(signal.SIGINT, lambda *_: (bar.close(), sys.exit(f"stopped, to continue: {resume}")))

    def due(frequency: int) -> bool:
        return frequency > 0 and (step // frequency > (step - stride) // frequency or step >= args.total_timesteps)

    def record(scalars: dict):
        for key, value in scalars.items():
            writer.add_scalar(key, value, step)
        writer.flush()  # first, so that TensorBoard's last step, read at a resume, is never before wandb's
        if wandb and step > tracked:
            run.log(scalars, step=step)

    # how many threads compute changes no bits, but graphs are compiled for one number of them
    use = lambda threads: (torch.set_num_threads(threads), torch._dynamo.reset())
    while True:
        if envs is None or due(args.checkpoint_frequency):
            if envs is not None or not args.resume:
                rows = torch.from_numpy(buffer.rows[: len(buffer)].cpu().numpy())  # the filled rows alone, no copy
                state |= dict(agent=agent.state_dict(), rows=rows, random=random.get_state(), step=step, best=best)
                save(state, folder / "checkpoint.pt")
            if step >= args.total_timesteps:
                break
            # environments cannot be saved: every run, resumed or not, makes them anew at its checkpoints
            envs, obs = make_vector_env([lambda: make_env(args)] * n_envs, (args.seed, step, 0))
            returns, lengths = np.zeros((2, n_envs))
            if torch.get_num_threads() != args.threads:
                use(args.threads)
        if step < args.learning_starts:
            action = (torch.rand((n_envs, action_dim), generator=random, device=device) * 2 - 1).cpu().numpy()
        else:
            action = act(obs, torch.randn((n_envs, action_dim), generator=random, device=device))
        for _ in range(min(n_envs, step + stride - args.learning_starts)):  # as many updates as actions
            noise = torch.randn((2, args.batch_size, action_dim), generator=random, device=device)
            losses |= learn(buffer.sample(args.batch_size, random), noise)  # a GPU does it while the environments step
        if torch.get_num_threads() > 1 and time.time() > seen[0] + 2:  # 100 times slower than one if others work
            now = np.array([time.time(), time.process_time(), psutil.Process().num_ctx_switches().involuntary])
            (seconds, computed, displaced), seen = now - seen, now
            if seconds < 5 and computed < 0.75 * args.threads * seconds and displaced > 50 * seconds:
                bar.write("other processes want the cores: one thread until the next checkpoint")
                use(1)
        next_obs, reward, terminated, truncated, infos = envs.step(action)
        done, true_next_obs = terminated | truncated, next_obs.copy()
        step, returns, lengths = step + stride, returns + reward, lengths + args.action_repeat
        if done.any():
            true_next_obs[done] = np.stack(infos["final_obs"][done])
            last, best = returns[done].mean(), np.fmax(best, returns[done].mean()).item()
            record({"charts/episodic_return": last, "charts/episodic_length": lengths[done].mean()})
            returns[done] = lengths[done] = 0
        buffer.add(obs, action, reward, terminated, true_next_obs)
        obs = next_obs
        bar.update(stride)
        if due(args.log_frequency) or due(args.checkpoint_frequency):
            replay = {"replay": buffer.rows[: len(buffer)].sum()} if due(args.checkpoint_frequency) else {}
            for name, value in (losses | agent.state_dict() | replay).items():
                if not value.isfinite().all():
                    sys.exit(f"error: {name} is not finite at step {step}; the last good checkpoint stays in {folder}")
            speed, timer = (step - timer[0]) / (time.time() - timer[1]), (step, time.time())
            record({name: value.item() for name, value in losses.items()} | {"charts/SPS": speed})
            bar.set_postfix_str(news := f"return {last:.1f}, best {best:.1f}")
            if bar.disable:
                minutes = (args.total_timesteps - step) / speed / 60
                print(f"step {step}, {speed:.0f} steps/s, {minutes:.0f} minutes left, {news}", flush=True)
        if due(args.eval_frequency):
            video = folder / "videos" / f"step-{step}" if args.capture_video else None
            result = evaluate(agent, args, step, video=video)
            record({"eval/episodic_return": result.mean(), "eval/episodic_return_std": result.std()})
            if wandb and video and step > tracked:
                run.log({"eval/video": wandb.Video(f"{video}-episode-0.mp4", format="mp4")}, step=step)
            bar.write(f"step {step}: evaluation {result.mean():.1f} +- {result.std():.1f}")
    bar.close()
    save({"agent": agent.state_dict()}, folder / "model.pt")
    axes, records = Figure(figsize=(8, 5), layout="constrained").subplots(), read_records(folder)
    for key in sorted(records.keys() & {"charts/episodic_return", "eval/episodic_return"}):
        axes.plot(*records[key], ".-", label=key)
        axes.legend()
    axes.set(title=folder.name, xlabel="environment steps", ylabel=args.returns)
    axes.figure.savefig(folder / "learning_curve.png", dpi=120)
    print(f"done: {folder}")

if __name__ == "__main__":
    main()
