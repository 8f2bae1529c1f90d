"""What a study is: a grid of runs, the rules by which its claim is judged, whose claim it is."""

import re
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

DECIDING = 3  # runs of a variant, without which no rule is judged
# What the study says elsewhere, or the runner.
RUNNERS = re.compile(
    r"(?<!\S)--(env[-_]id|total[-_]timesteps|seed|threads|exp[-_]name|resume|evaluate)(?![\w-])"
)

# By what their claims begin with.
SOURCES = {
    "[1]": "Parham, Starklit and Böbel, Implementation and Hyperparameter Optimization of the "
    "Soft-Actor-Critic Algorithm, a project at the Technical University of Denmark, "
    "<https://github.com/davelbit/DTU-RL-Sample-Efficiency>",
    "[2]": "Soft Actor-Critic: Reimplementation and Experiments, a blog post that compares four "
    "implementations",
    "[3]": "Coupal, Deep Reinforcement Learning: Soft Actor-Critic, Université Laval 2020, with a "
    "value network on LunarLander, <https://github.com/RedLeader962/LectureDirigeDRLimplementation>",
    "[4]": "Ciobanu, Policy Gradient Methods: Insights and Optimization Strategies, a thesis at "
    "the West University of Timișoara 2024, SAC and PPO in a game engine, "
    "<https://github.com/smtmRadu/DeepUnity>",
}


class Rule(NamedTuple):
    """What must hold in one environment: `variant` is ... `other`, at the end of training.

    "Return over training" is the mean of all evaluations instead: how fast it learns. "Like" is
    within 10 % of `other`. judge.decide() says when a rule is confirmed or refuted.
    """

    env_id: str
    variant: str
    relation: Literal["above", "below", "like"]
    other: str | float  # a variant, or a number
    measure: Literal["return", "return over training", "steps per second"] = "return"


@dataclass(frozen=True)
class Study:
    """A grid of runs: environments by variants by seeds.

    Its claim is confirmed if all rules are, and refuted if one is.
    """

    envs: dict[str, int]  # environment: steps
    variants: dict[str, str]  # label: flags, perhaps after a script; the first is the baseline
    claim: str = ""  # what the source says; a study without is a benchmark
    rules: tuple[Rule, ...] = ()
    script: str = "sac_ablations.py"
    seeds: int = 5
    first_seed: int = 1  # a later one in studies that confirm what the first ones suggested
    flags: str = ""  # of all its runs
    note: str = ""  # where the study differs from its source
    diagnostics: bool = False  # report temperature, entropy, Q, losses, successes too
    only: dict[str, str] = field(default_factory=dict)  # variant: its one environment, if not all
    flags_in: dict[str, str] = field(default_factory=dict)  # environment: flags of its runs
    seeds_in: dict[str, int] = field(default_factory=dict)  # environment: how many, if not `seeds`

    def variants_in(self, env_id: str) -> list[str]:
        return [label for label in self.variants if self.only.get(label, env_id) == env_id]

    def seeds_of(self, env_id: str) -> range:
        return range(self.first_seed, self.first_seed + self.seeds_in.get(env_id, self.seeds))

    def mistake(self) -> str | None:
        """What keeps its claim from being judged; the flags are the script's to check."""
        if not (self.envs and self.variants and self.seeds > 0):
            return "needs an environment, a variant and a seed at least"
        for flags in (self.flags, *self.flags_in.values(), *self.variants.values()):
            if found := RUNNERS.search(flags):
                return f"has {found[0]} among its flags, which the runner gives"
        if bool(self.claim) != bool(self.rules):
            lacks = "a claim without rules to judge it by"
            return f"has {'rules without a claim' if self.rules else lacks}"
        environments = [*self.flags_in, *self.seeds_in, *self.only.values()]
        for names, known in ((environments, self.envs), (self.only, self.variants)):
            for name in names:
                if name not in known:
                    return f"names {name}, which is none of {', '.join(known)}"
        for env_id in self.envs:
            if not self.variants_in(env_id):
                return f"has no variant that runs in {env_id}"
        return next(filter(None, map(self.mistake_of, self.rules)), None)

    def mistake_of(self, rule: Rule) -> str | None:
        if rule.env_id not in self.envs:
            known = ", ".join(self.envs)
            return f"has a rule for {rule.env_id}, which is none of its environments: {known}"
        for label in (rule.variant, rule.other):
            if isinstance(label, str) and label not in self.variants:
                known = ", ".join(self.variants)
                return f"has a rule for {label}, which is none of its variants: {known}"
            if isinstance(label, str) and label not in self.variants_in(rule.env_id):
                return f"has a rule for {label} in {rule.env_id}, where it does not run"
        if len(self.seeds_of(rule.env_id)) < DECIDING:
            return f"has a rule for {rule.env_id}, which needs {DECIDING} seeds to be judged"
        for word, kind in ((rule.relation, "relation"), (rule.measure, "measure")):
            if word not in (words := get_args(Rule.__annotations__[kind])):
                return f"has a rule with the {kind} {word}, which is none of {', '.join(words)}"
        if rule.variant == rule.other:
            return f"has a rule that compares {rule.variant} with itself"


def each(envs: list, variants: list, relation: str, other: str | float, measure="return") -> tuple:
    return tuple(
        Rule(env, variant, relation, other, measure) for env in envs for variant in variants
    )
