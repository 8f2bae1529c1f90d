"""benchmark.same_bits: what is equal passes, what differs by a flag's value is found, and both are recorded."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from benchmark import same_bits

ROOT = Path(same_bits.__file__).parent.parent
TINY = "--env-id Pendulum-v1 --total-timesteps 250 --batch-size 8 --checkpoint-frequency 100 --eval-frequency 0 --log-frequency 20"
CASES = [same_bits.Case("tiny", "sac_continuous.py", f"{TINY} --compile off")]


@pytest.fixture
def changed(tmp_path):
    """A folder with the scripts as they are, but for another default of tau."""
    folder = tmp_path / "changed"
    folder.mkdir()
    for script in same_bits.SCRIPTS:
        shutil.copy(ROOT / script, folder)
    text = (folder / "sac_continuous.py").read_text()
    assert text.count("tau: float = 0.005") == 1
    (folder / "sac_continuous.py").write_text(
        text.replace("tau: float = 0.005", "tau: float = 0.006")
    )
    return folder


def compare(monkeypatch, *flags, cases=CASES):
    monkeypatch.setattr(same_bits, "CASES", cases)
    monkeypatch.setattr(sys, "argv", ["same_bits", *map(str, flags)])
    with pytest.raises(SystemExit) as stop:
        same_bits.main()
    return stop.value.code


@pytest.mark.slow
def test_a_script_computes_what_it_computes(monkeypatch, tmp_path, capsys):
    record = tmp_path / "made" / "record.json"
    assert compare(monkeypatch, ROOT, ROOT, "--record", record) == 0
    assert "sac_continuous.py, tiny: " in capsys.readouterr().out
    proof = json.loads(record.read_text())
    assert proof["scripts"]["sac_continuous.py"]["same"] is True
    # Of the agent 48; replay, random stream and step.
    assert proof["cases"][0]["tensors"] == 51 and proof["cases"][0]["scalars"] > 10


@pytest.mark.parametrize(
    "key, said", [("losses/alpha", "losses/alpha: up to 1 apart"), ("charts/SPS", "")]
)
def test_all_scalars_must_agree_but_the_speed(monkeypatch, tmp_path, key, said):
    state = dict(agent={"a": torch.ones(2)}, rows=torch.ones(1), random=torch.ones(1), step=1)
    told = iter([{key: [(1, 2.0)]}, {key: [(1, 3.0)]}])
    monkeypatch.setattr(same_bits, "train", lambda *_: (state, next(told)))
    outcome = same_bits.compare(CASES[0], Path("old"), Path("new"), tmp_path)
    assert outcome.difference == said


def test_a_part_of_the_cases_proves_nothing(monkeypatch, tmp_path):
    cases = [same_bits.Case(name, "sac_continuous.py", "") for name in ("one", "other")]
    monkeypatch.setattr(same_bits, "CASES", cases)
    path = tmp_path / "record.json"
    args = same_bits.Args(str(ROOT), str(ROOT))
    for made, same in ((cases, True), (cases[:1], False)):
        outcomes = [same_bits.Outcome(case, 1, 1, "") for case in made]
        same_bits.record(path, args, ROOT, ROOT, outcomes)
        assert json.loads(path.read_text())["scripts"]["sac_continuous.py"]["same"] is same


@pytest.mark.parametrize("case", same_bits.CASES, ids=lambda case: f"{case.script} {case.name}")
def test_the_scripts_of_today_take_every_case(case):
    assert same_bits.takes(ROOT / case.script, case)


def test_cases_with_flags_that_the_old_script_lacks_are_left_out(monkeypatch, tmp_path, capsys):
    """None of its results can have them, so they are no reason against it."""
    text = (ROOT / "sac_continuous.py").read_text()
    assert text.count("    num_envs: int") == 1
    (tmp_path / "sac_continuous.py").write_text(
        text.replace("    num_envs: int", "    n_envs: int")
    )
    more = same_bits.Case("three", "sac_continuous.py", f"{TINY} --num-envs 3")
    cases = [*CASES, more]
    done = []

    def compare_nothing(case, *_):
        done.append(case)
        return same_bits.Outcome(case, 1, 1, "")

    monkeypatch.setattr(same_bits, "compare", compare_nothing)
    for old, expected in ((tmp_path, CASES), (ROOT, cases)):
        done.clear()
        record = tmp_path / "record.json"
        flags = [old, ROOT, "--record", record]
        assert compare(monkeypatch, *flags, cases=cases) == 0
        assert done == expected
        assert ("three: left out" in capsys.readouterr().out) == (old == tmp_path)
        assert json.loads(record.read_text())["scripts"]["sac_continuous.py"]["same"] is True


def test_a_flag_that_only_a_case_left_out_has_is_not_proven(monkeypatch, tmp_path):
    old, record = tmp_path / "old", tmp_path / "record.json"
    old.mkdir()
    (old / "sac_continuous.py").write_text("class Args:\n    tau: float = 1\n    seed: int = 1\n")
    both, new = (
        same_bits.Case(name, "sac_continuous.py", flags)
        for name, flags in (("both", "--tau 1"), ("new", "--seed 2 --threads 3"))
    )
    args = same_bits.Args(str(old), str(ROOT))
    for first, same in ((both, False), (both._replace(flags="--tau 1 --seed 3"), True)):
        monkeypatch.setattr(same_bits, "CASES", [first, new])
        outcomes = [same_bits.Outcome(first, 1, 1, "")]
        same_bits.record(record, args, old, ROOT, outcomes)
        proof = json.loads(record.read_text())
        assert proof["scripts"]["sac_continuous.py"]["same"] is same
        assert proof["left_out"] == ["new"]


def test_another_default_is_not_the_same_though_all_cases_agree(monkeypatch, changed, capsys):
    """A case that gives the flag itself cannot see it, but rows are known by what is not default."""
    record = changed / "record.json"
    monkeypatch.setattr(same_bits, "compare", lambda case, *_: same_bits.Outcome(case, 1, 1, ""))
    text = (changed / "sac_ablations.py").read_text()
    assert text.count('"--batch-size 64 --hidden 64') == 1
    changed.joinpath("sac_ablations.py").write_text(
        text.replace('"--batch-size 64 --hidden 64', '"--batch-size 32 --hidden 64')
    )
    cases = [case._replace(script=script) for case in CASES for script in same_bits.SCRIPTS]
    assert compare(monkeypatch, ROOT, changed, "--record", record, cases=cases) == 1
    said = capsys.readouterr().out
    assert "sac_continuous.py: tau has another default\n" in said
    assert "sac_ablations.py: --preset stable-baselines has another default\n" in said
    found = json.loads(record.read_text())["scripts"]
    assert [found[script]["same"] for script in same_bits.SCRIPTS] == [False, True, False]
    assert compare(monkeypatch, ROOT, changed, cases=cases) == 1  # without a record too


def test_without_its_environment_hindsight_is_not_proven(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(same_bits.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(same_bits, "compare", lambda case, *_: same_bits.Outcome(case, 1, 1, ""))
    record = tmp_path / "record.json"
    assert compare(monkeypatch, ROOT, ROOT, "--record", record, cases=same_bits.CASES) == 1
    said = capsys.readouterr().out
    assert "hindsight: left out, it needs requirements-robotics.txt" in said
    assert said.endswith(f"{record} proves nothing of sac_ablations.py\n")
    proof = json.loads(record.read_text())
    assert [script["same"] for script in proof["scripts"].values()] == [True, True, False]
    assert "hindsight" not in [case["name"] for case in proof["cases"]]


@pytest.mark.slow
def test_another_tau_is_found(monkeypatch, changed, tmp_path, capsys):
    record = tmp_path / "record.json"
    assert compare(monkeypatch, ROOT, changed, "--record", record) == 1
    assert "agent.log_alpha: up to" in capsys.readouterr().out
    assert json.loads(record.read_text())["scripts"]["sac_continuous.py"]["same"] is False


def test_a_tensor_that_one_side_lacks_is_found():
    same = {"a": torch.ones(2)}
    assert same_bits.first_difference(same, {"a": torch.ones(2)}) == ""
    assert same_bits.first_difference(same, same | {"b": torch.ones(1)}) == "b only in the new one"
    assert "float64" in same_bits.first_difference(same, {"a": torch.ones(2).double()})


@pytest.mark.parametrize(
    "flags, answer",
    [
        (["no-such-commit", "."], "neither"),
        ([".", ".", "--cases", "x"], "--cases"),
        (["{tmp_path}", "."], "nothing to compare"),
    ],
)
def test_mistakes_get_one_line(flags, answer, monkeypatch, tmp_path, capsys):
    for script in same_bits.SCRIPTS:
        (tmp_path / script).write_text("class Args:\n    seed: int = 1\n")
    assert compare(monkeypatch, *(flag.format(tmp_path=tmp_path) for flag in flags)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error:") and answer in said and said.count("\n") == 1
