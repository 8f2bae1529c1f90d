"""Named studies: what to run, and the rules by which a claim is judged, fixed before its runs.

    python -m benchmark.run --list

A study of your own is one more entry in STUDIES. A claim that begins with [1] is that source's:
rules.py names them.
"""

from benchmark.rules import Rule, Study, each

BALANCE, SWINGUP = "shimmy:dm_control/cartpole-balance-v0", "shimmy:dm_control/cartpole-swingup-v0"
WALKER, LANDER = "shimmy:dm_control/walker-walk-v0", "LunarLanderContinuous-v3"
REACH, CAR = "gymnasium_robotics:FetchReach-v4", "MountainCarContinuous-v0"
CARTPOLES = {BALANCE: 30_000, SWINGUP: 50_000}  # as far as the figures of [1] go
# In short runs. Their episodes end there anyway.
OFTEN = "--eval-frequency 5000 --checkpoint-frequency 10000"
SWINGUP_AND_HOPPER = {SWINGUP: 50_000, "Hopper-v4": 100_000}
SOLVED = 800.0  # of 1000, on swingup
LANDED = 200.0  # from where Gymnasium counts the landing as solved
FEWER_LANDERS = "to land: a last evaluation of 200 or more; planned with five seeds, reduced to "
FEWER_LANDERS += "three before the first run"
MUJOCO = ["Hopper-v4", "Walker2d-v4", "HalfCheetah-v4", "Ant-v4", "Humanoid-v4"]
SUITE = ["cartpole-balance", "cartpole-swingup", "ball_in_cup-catch", "walker-walk", "cheetah-run"]
SUITE += ["finger-spin", "hopper-stand", "pendulum-swingup", "reacher-easy", "walker-run"]
LANDER_OF_3 = "--policy-lr 3e-3 --q-lr 3e-3 --hidden 200 --batch-size 200 --buffer-size 50000 "
LANDER_OF_3 += "--no-autotune --value-network"
# Those of Stable-Baselines3, where they differ from ours; SBX starts with other weights.
SETTINGS_OF_SB3 = "--learning-starts 100 --q-lr 3e-4 --init torch"
THREE = ["HalfCheetah-v4", "Hopper-v4", "Walker2d-v4"]
FOUR = ["walker-walk", "cartpole-swingup", "ball_in_cup-catch", "cartpole-balance"]
PENDULUM = "--learning-starts 1000 --eval-frequency 2000 --eval-episodes 100"
SHORTER = "on Hopper three seeds of 100,000 steps (planned: five of 300,000), as both are long"
AFTERWARDS = "the rule was written after earlier runs had shown the effect, and before these"
# Trial 25 of the search over cartpole, rounded.
TUNED = "--gamma 0.988 --tau 0.138 --alpha 4.82e-4 --policy-lr 2.15e-4 --q-lr 1.5e-3 --hidden 88 "
TUNED += "--layers 4 --init torch"
ALPHAS = {f"alpha {a}": f"--no-autotune --alpha {a}" for a in (0.1, 0.2, 0.35, 1.0)}
GAMMAS = {f"gamma {gamma}": f"--gamma {gamma}" for gamma in (0.99, 0.8, 0.86, 0.9, 0.95)}
ADVICE_OF_4 = {
    "PER and CER": "--prioritized-replay --combined-replay",
    "normalized observations": "--normalize-obs",
    "spectral norm": "--spectral-norm",
}

STUDIES = {
    "F1": Study(
        CARTPOLES,
        GAMMAS,
        "[1] A higher discount is more stable: 0.8 drops on balance; on swingup 0.86 drops and 0.9 "
        "is best",
        (
            Rule(BALANCE, "gamma 0.8", "below", "gamma 0.99"),
            Rule(SWINGUP, "gamma 0.86", "below", "gamma 0.9"),
            *each([SWINGUP], ["gamma 0.8", "gamma 0.95", "gamma 0.99"], "below", "gamma 0.9"),
        ),
        flags=OFTEN,
    ),
    "F2": Study(
        CARTPOLES,
        GAMMAS,
        "[1] The time per step falls with a higher discount",
        each([*CARTPOLES], ["gamma 0.99"], "above", "gamma 0.8", "steps per second"),
        flags=OFTEN,
        note="the runs of F1; on a machine whose load varies the speeds vary too. Those of gamma "
        "0.99 on swingup are shared with F4 and F5 and were made before the others; on balance all "
        "took turns",
    ),
    "F3": Study(
        CARTPOLES,
        {f"tau {tau}": f"--tau {tau}" for tau in (0.005, 0.01, 0.05, 0.1, 0.5)},
        "[1] On swingup tau 0.01 and 0.05 fail, on balance 0.005 is the most stable",
        each([SWINGUP], ["tau 0.01", "tau 0.05"], "below", SOLVED)
        + each([BALANCE], ["tau 0.01", "tau 0.05"], "below", "tau 0.005"),
        flags=OFTEN,
        note="0.1 and 0.5 are not in the source; to fail, and to be less stable, is judged by the "
        "return at the end",
    ),
    "F4": Study(
        {SWINGUP: 50_000},
        {"alpha learned": ""}
        | {f"alpha {a}": f"--no-autotune --alpha {a}" for a in (0.01, 0.074, 0.2)},
        "[1] No fixed alpha solves swingup, a learned one does",
        each([SWINGUP], ["alpha 0.01", "alpha 0.074", "alpha 0.2"], "below", SOLVED)
        + each([SWINGUP], ["alpha learned"], "above", SOLVED),
        flags=OFTEN,
    ),
    "F5": Study(
        {SWINGUP: 50_000},
        {f"alpha from {alpha}": f"--alpha {alpha}" for alpha in (1.0, 0.0001, 0.05, 0.07, 0.08)},
        "[1] The initial alpha is critical on swingup: 0 never learns, 0.05 is slower than 0.07, "
        "0.08 fails",
        each([SWINGUP], ["alpha from 0.0001", "alpha from 0.08"], "below", SOLVED)
        + each([SWINGUP], ["alpha from 0.05"], "below", "alpha from 0.07"),
        flags=OFTEN,
        note="0.0001 stands for 0, which has no logarithm; slower: by the return at the end",
    ),
    "F6": Study(
        CARTPOLES,
        {f"{n} layers": f"--layers {n}" for n in (2, 1, 3, 4)},
        "[1] Each added hidden layer does worse",
        tuple(
            Rule(e, f"{n} layers", "below", f"{n - 1} layers") for e in CARTPOLES for n in (2, 3, 4)
        ),
        flags=OFTEN,
    ),
    "F7": Study(
        CARTPOLES,
        {f"{x} weights": f"--init {x}" for x in ("xavier", "orthogonal", "normal", "torch")},
        "[1] Orthogonal initial weights are dramatically better than normal ones",
        each([*CARTPOLES], ["orthogonal weights"], "above", "normal weights"),
        flags=OFTEN,
        note="normal: N(0, 1), the default of nn.init.normal_; the source names no variance",
    ),
    "F8": Study(
        CARTPOLES,
        {
            "rates 3e-4, 1e-3": "",
            "rates 2e-3, 6e-3": "--policy-lr 2e-3 --q-lr 6e-3",
            "rates 3e-4, 3e-4": "--q-lr 3e-4",
            "rates 1e-3, 1e-3": "--policy-lr 1e-3",
        },
        "[1] Learning rates of 2e-3 (policy) and 6e-3 (critics) are best",
        tuple(
            Rule(env_id, "rates 2e-3, 6e-3", "above", f"rates {other}")
            for env_id in CARTPOLES
            for other in ("3e-4, 1e-3", "3e-4, 3e-4", "1e-3, 1e-3")
        ),
        flags=OFTEN,
        note="the source does not say on which task",
    ),
    "F9": Study(
        {WALKER: 100_000},
        {"default": ""},
        "[1] On walker walk alpha grows exponentially and the losses explode",
        (Rule(WALKER, "default", "below", 200.0),),
        note="an exploding run stays near the return of random actions, about 40",
        diagnostics=True,
    ),
    "F10": Study(
        dict.fromkeys(MUJOCO, 1_000_000),
        {"alpha learned": ""} | ALPHAS,
        "[2] The best fixed alpha differs per task: high on Hopper, low on HalfCheetah; learned is "
        "worst on Humanoid",
        (
            Rule("Hopper-v4", "alpha 1.0", "above", "alpha 0.1"),
            Rule("HalfCheetah-v4", "alpha 0.1", "above", "alpha 1.0"),
            Rule("Ant-v4", "alpha 0.2", "above", "alpha 1.0"),
            *each(["Humanoid-v4"], [*ALPHAS], "above", "alpha learned"),
        ),
    ),
    "F11": Study(
        dict.fromkeys(MUJOCO, 1_000_000),
        {f"{n} critics": f"--n-critics {n}" for n in (2, 1, 3, 5, 8, 10)},
        "[2] 2 critics are far better than 1; 3 better still on Hopper, Walker2d and Ant; 5, 8 and "
        "10 no better than 1",
        each(MUJOCO, ["2 critics"], "above", "1 critics")
        + each(["Hopper-v4", "Walker2d-v4", "Ant-v4"], ["3 critics"], "above", "2 critics")
        + each(MUJOCO, ["5 critics", "8 critics", "10 critics"], "like", "1 critics"),
    ),
    "F12": Study(
        dict.fromkeys(MUJOCO, 1_000_000),
        {f"delay {k}": f"--policy-frequency {k}" for k in (1, 2, 3, 5, 8)},
        "[2] The delay of the policy's updates makes little difference",
        each(MUJOCO, ["delay 2", "delay 3", "delay 5", "delay 8"], "like", "delay 1"),
    ),
    "F13": Study(
        dict.fromkeys(MUJOCO, 1_000_000),
        {
            "clamp": "",
            "tanh": "--log-std tanh --log-std-min -5",
            "separate heads": "--heads separate",
        },
        "[2] Log std by clamp or tanh, one last layer or two: they behave alike",
        each(MUJOCO, ["tanh", "separate heads"], "like", "clamp"),
    ),
    "F14": Study(
        {LANDER: 250_000},
        {f"reward scale {scale}": f"--reward-scale {scale}" for scale in (40, 1, 5, 20)},
        "[3] With a fixed temperature only a reward scale of 40 lands, of 1, 5, 20 and 40",
        each([LANDER], ["reward scale 40"], "above", LANDED)
        + each([LANDER], ["reward scale 1", "reward scale 5", "reward scale 20"], "below", LANDED),
        flags=f"{LANDER_OF_3} --learning-starts 20000",
        seeds=3,
        note=FEWER_LANDERS,
    ),
    "F15": Study(
        {LANDER: 250_000},
        {f"start {start}": f"--learning-starts {start}" for start in (20_000, 300, 10_000)},
        "[3] 20,000 transitions before learning succeed, 300 and 10,000 fail more often than not",
        each([LANDER], ["start 20000"], "above", LANDED)
        + each([LANDER], ["start 300", "start 10000"], "below", LANDED),
        flags=f"{LANDER_OF_3} --reward-scale 40",
        seeds=3,
        note=FEWER_LANDERS,
    ),
    "F16": Study(
        SWINGUP_AND_HOPPER,
        {"no value network": "", "value network": "--value-network"},
        "[3] A separate value network can stabilise learning",
        each([*SWINGUP_AND_HOPPER], ["value network"], "above", "no value network"),
        seeds_in={"Hopper-v4": 3},
        note="an argument in the source, not an experiment; judged by the return at the end; "
        f"{SHORTER}",
    ),
    "F17": Study(
        SWINGUP_AND_HOPPER,
        {"default": ""} | ADVICE_OF_4,
        "[4] Prioritized with combined replay, normalized observations and spectral norm help",
        each([*SWINGUP_AND_HOPPER], [*ADVICE_OF_4], "above", "default"),
        seeds_in={"Hopper-v4": 3},
        note=f"advice in the source, without an experiment on SAC; {SHORTER}",
    ),
    "knobs": Study(
        {SWINGUP: 20_000},
        {"default": "", "1 critic": "--n-critics 1", "5 critics": "--n-critics 5"}
        | {"alpha 0.2": "--no-autotune --alpha 0.2", "delay 2": "--policy-frequency 2"},
        seeds=3,
        flags="--eval-frequency 2000 --compile on",
        diagnostics=True,
        note="what do the number of critics, a fixed temperature and delayed policy updates do?",
    ),
    "walker": Study(
        {WALKER: 50_000},
        {
            "default": "",
            "eps correction": "--tanh-correction eps",
            "log std by tanh, [-5, 2]": "--log-std tanh --log-std-min -5",
            "1 critic": "--n-critics 1",
            "truncation terminates": "--truncation-terminates",
            "rates 1e-3": "--policy-lr 1e-3 --q-lr 1e-3",
            "all but tanh": "--tanh-correction eps --n-critics 1 --truncation-terminates "
            "--policy-lr 1e-3 --q-lr 1e-3",
        },
        seeds=2,
        diagnostics=True,
        note="what keeps walker walk from the explosion that [1] reports (F9)? Log std in [-20, 2] "
        "is the default",
    ),
    "bfloat16": Study(
        {"HalfCheetah-v4": 50_000},
        {"float32": "", "bfloat16": "--matmul-precision medium"},
        "The critics' products in bfloat16 learn what those in float32 learn",
        (Rule("HalfCheetah-v4", "bfloat16", "like", "float32"),),
        seeds=10,
        flags=OFTEN,
        diagnostics=True,
        note="our own question: they make the update faster on processors that have such products",
    ),
    "layer-norm": Study(
        dict.fromkeys(THREE, 100_000),
        {"default": "", "layer norm": "--layer-norm"},
        "Layer normalization of the critics helps",
        each(THREE, ["layer norm"], "above", "default"),
        seeds=3,
        note="our own question",
    ),
    "n-step": Study(
        dict.fromkeys(THREE, 100_000),
        {"default": "", "n-step 3": "--n-step 3"},
        "Targets of three rewards help",
        each(THREE, ["n-step 3"], "above", "default"),
        seeds=3,
        note="our own question; a run of n-step 3 on HalfCheetah was paused for 77 minutes",
    ),
    "tau": Study(
        CARTPOLES,
        {f"tau {tau}": f"--tau {tau}" for tau in (0.005, 0.05)},
        "Faster target critics, tau 0.05 in place of 0.005, make learning faster on cartpole",
        each([*CARTPOLES], ["tau 0.05"], "above", "tau 0.005", "return over training"),
        first_seed=6,
        flags=OFTEN,
        note="our own question: F3 suggested it with seeds 1 to 5, so these are other seeds; "
        "return over training is the mean of all evaluations",
    ),
    "tuned": Study(
        CARTPOLES,
        {"default": "", "tuned": TUNED},
        "The best of 30 settings that benchmark.tune tried on cartpole learns faster there",
        each([*CARTPOLES], ["tuned"], "above", "default", "return over training"),
        first_seed=6,
        flags=OFTEN,
        note="our own question; the default's runs are those of tau, known before the rule",
    ),
    "hindsight": Study(
        {REACH: 8_000},
        {"no hindsight": "", "hindsight": "--hindsight 4"},
        "Hindsight makes FetchReach learnable in 8,000 steps",
        (Rule(REACH, "hindsight", "above", "no hindsight"),),
        seeds=3,
        flags="--gamma 0.95 --policy-lr 1e-3 --alpha 0.2 --hidden 64 --learning-starts 1000 "
        "--eval-frequency 1000",
        diagnostics=True,
        note=f"hyperparameters that suit sparse rewards, the same for both; {AFTERWARDS}",
    ),
    "mountain-car": Study(
        {CAR: 15_000},
        {"new action each step": "", "held for 30 steps": "--hold-noise 30"},
        "Random actions that are held make MountainCarContinuous learnable in 15,000 steps",
        (Rule(CAR, "held for 30 steps", "above", "new action each step"),),
        seeds=10,
        flags="--hidden 64 --eval-frequency 5000",
        note=f"our own question; {AFTERWARDS}",
    ),
    "mujoco": Study(
        dict.fromkeys([*MUJOCO, "Swimmer-v4"], 1_000_000),
        {"default": "", "gamma 0.999": "--gamma 0.999"},
        script="sac_continuous.py",
        only={"gamma 0.999": "Swimmer-v4"},
        note="one million steps; Swimmer with a discount of 0.999 too, as it is known to learn "
        "little with 0.99",
    ),
    "dmc": Study(dict.fromkeys(SUITE, 500_000), {"default": ""}, script="sac_dmc.py"),
    "presets": Study(
        dict.fromkeys(MUJOCO, 1_000_000),
        {"ours": ""}
        | {p: f"--preset {p}" for p in ("haarnoja", "stable-baselines", "spinningup", "yarats")},
        note="all five in this implementation: their settings, not their code",
    ),
    "peers": Study(
        {"HalfCheetah-v4": 100_000},
        {
            "this project": "--no-cuda",
            "Stable-Baselines3": "benchmark/peers.py --library stable-baselines3",
            "SBX": "benchmark/peers.py --library sbx",
            "this project, SB3's settings": f"sac_ablations.py --no-cuda {SETTINGS_OF_SB3}",
        },
        script="sac_continuous.py",
        seeds=3,
        note="beside other libraries, each with its own defaults and one thread; the last variant "
        "was added when the results of the others were known",
    ),
    "quick": Study(
        {"HalfCheetah-v4": 100_000, "Hopper-v4": 100_000, "Pendulum-v1": 10_000},
        {"default": ""},
        script="sac_continuous.py",
        seeds=3,
        flags_in={"Pendulum-v1": PENDULUM},
        seeds_in={"Pendulum-v1": 5},
        note="a benchmark of about an hour on two cores",
    ),
    "dmc-100k": Study(
        dict.fromkeys(FOUR, 100_000),
        {"default": ""},
        script="sac_dmc.py",
        seeds=3,
        diagnostics=True,
        note="a benchmark of about two hours on two cores",
    ),
}
