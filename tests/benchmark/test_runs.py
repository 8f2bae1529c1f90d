"""benchmark.runs, benchmark.studies: what a run is known by, and which studies can be run and judged."""

import csv
import json
import logging
import time

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from benchmark import runs
from benchmark.jobs import Job
from benchmark.runs import runs_of
from benchmark.studies import STUDIES, Rule, Study


def test_what_studies_share_is_run_once_with_the_first(monkeypatch):
    first = Study({"Pendulum-v1": 100}, {"a": "", "b": "--tau 0.01"}, seeds=2)
    second = Study({"Pendulum-v1": 100}, {"c": "--tau 0.02", "also a": "--gamma 0.99"}, seeds=2)
    monkeypatch.setattr(runs, "STUDIES", {"first": first, "second": second})
    found = [(one.study, one.variant, one.seed) for one in runs.runs_of_all(("first", "second"))]
    assert found == [("first", label, seed) for seed in (1, 2) for label in "ab"] + [
        ("second", "c", 1),
        ("second", "c", 2),
    ]


def test_settings_tell_runs_apart_and_scripts_too():
    a, b = (
        runs_of("x", Study({"Pendulum-v1": 100}, {"v": flags}, seeds=1))[0]
        for flags in ("", "--tau 0.005")
    )
    c = runs_of("y", Study({"Pendulum-v1": 100}, {"v": "--tau 0.01"}, seeds=1))[0]
    d = runs_of("x", Study({"Pendulum-v1": 100}, {"v": ""}, seeds=1, script="sac_continuous.py"))[0]
    assert a.key == b.key and len({a.key, c.key, d.key}) == 3
    more_threads = runs_of("x", Study({"Pendulum-v1": 100}, {"v": ""}, seeds=1), threads=2)[0]
    assert a.key == more_threads.key  # their number changes no bits


def test_comments_make_no_other_version_and_code_does():
    a, b, c, d = map(
        runs.code_of,
        [
            'x = "1 # 2"  # why\n\n# more\ny = f"""{x}\n# 3"""\n',
            'x = "1 # 2"\ny = f"""{x}\n# 3"""  # because\n',
            'x = "1 # 2"\ny = f"""{x}\n# 4"""\n',
            'x = "1"\ny = f"""{x}\n# 3"""\n',
        ],
    )
    assert a == b == 'x = "1 # 2"\ny = f"""{x}\n# 3"""' and len({a, c, d}) == 3


def prove(folder, name, old, new, same=True, left_out=()):
    scripts = {"sac_ablations.py": {"old": {"code": old}, "new": {"code": new}, "same": same}}
    proof = {"scripts": scripts, "left_out": list(left_out)}
    (folder / f"{name}.json").write_text(json.dumps(proof))


def test_rows_count_through_a_chain_of_proofs(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "PROOFS", tmp_path)
    prove(tmp_path, "first", "a", "b")
    prove(tmp_path, "second", "c", "b")
    prove(tmp_path, "third", "b", "d", same=False)
    prove(tmp_path, "fourth", "d", "e")
    runs.same_as.cache_clear()
    found = {code: runs.same_as(code) for code in "abcdex"}
    runs.same_as.cache_clear()
    assert found["a"] == found["b"] == found["c"] == {"a", "b", "c"}
    assert found["d"] == found["e"] == {"d", "e"} and found["x"] == {"x"}


def test_a_mended_flag_is_not_proven_by_the_script_that_lacked_it(tmp_path, monkeypatch):
    """Both versions that have it equal that script, each with the cases of the flag left out."""
    monkeypatch.setattr(runs, "PROOFS", tmp_path)
    prove(tmp_path, "faulty", "before", "faulty", left_out=["of the flag"])
    prove(tmp_path, "mended", "before", "mended", left_out=["of the flag"])
    prove(tmp_path, "later", "mended", "later")
    runs.same_as.cache_clear()
    found = {code: runs.same_as(code) for code in ("before", "faulty", "later")}
    runs.same_as.cache_clear()
    assert found["before"] == {"before"} and found["faulty"] == {"before", "faulty"}
    assert found["later"] == {"before", "mended", "later"}


def test_flags_beside_a_preset_tell_runs_apart_even_where_they_are_the_defaults():
    default = runs.args_of("sac_ablations.py")()
    start, preset = f"--learning-starts={default.learning_starts}", "--preset=haarnoja"
    every = [(), (start,), ("--autotune",), (preset,), (preset, start), (preset, "--autotune")]
    found = [runs.hash_of_flags("sac_ablations.py", flags) for flags in every]
    assert found[0] == found[1] == found[2] and len({*found}) == 4


COMMITTED = sorted(path.parent.name for path in runs.RESULTS.glob("[!.]*/returns.csv"))
OLDER = {"F5", "quick", "knobs", "walker"}  # have rows of earlier versions, as the pages say


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_rows_count_for_the_scripts_of_today(name):
    """A changed docstring is enough to orphan them: then a proof has to join both versions."""
    mine = {(key, str(run.seed)) for run in runs_of(name, STUDIES[name]) for key in run.keys}
    with open(runs.RESULTS / name / "returns.csv", newline="") as file:
        found = {(row["key"], row["seed"]) for row in csv.DictReader(file)}
    assert found and bool(found - mine) == (name in OLDER)


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_rows_say_what_they_were_made_with(name):
    with open(runs.RESULTS / name / "runs.csv", newline="") as file:
        finished = [row for row in csv.DictReader(file) if row["state"] == "finished"]
    assert finished
    for row in finished:
        assert all(row[column] for column in ("commit", "versions", "hardware", "command"))


def test_there_are_committed_rows():
    assert {"mujoco", "peers"} <= {*COMMITTED} and OLDER <= {*COMMITTED}


def test_a_run_of_an_equal_script_is_taken_for_one_of_this(tmp_path, monkeypatch):
    run = runs_of("x", Study({"Pendulum-v1": 100}, {"v": "--tau 0.01"}, seeds=1))[0]
    settings, code = run.key.split(".")
    folder = tmp_path / f"Pendulum-v1__{settings}.0123456789__1__5"
    folder.mkdir()
    (folder / "model.pt").touch()
    assert not run.finished(tmp_path)
    monkeypatch.setattr(runs, "same_as", lambda code: {code, "0123456789"})
    assert run.finished(tmp_path) and run.folder(tmp_path) == folder


def test_an_environment_without_a_version_is_found_under_its_newest(tmp_path):
    run = runs_of("x", Study({"Pendulum": 100}, {"v": "--tau 0.01"}, seeds=1))[0]
    for folder in (f"Pendulum-v1__{run.key}__1__7", f"Pendulum-v1__{run.key}__11__8"):
        (tmp_path / folder).mkdir()
    assert run.folder(tmp_path) == tmp_path / f"Pendulum-v1__{run.key}__1__7"


def test_the_newest_folder_is_the_one_begun_last_and_a_finished_one_comes_first(
    tmp_path, monkeypatch
):
    run = runs_of("x", Study({"Pendulum-v1": 100}, {"v": "--tau 0.01"}, seeds=1))[0]
    settings, code = run.key.split(".")
    monkeypatch.setattr(runs, "same_as", lambda code: {code, "ffffffffff"})
    names = (f"{settings}.ffffffffff__1__8", f"{run.key}__1__9", f"{run.key}__1__10")
    first, second, third = (tmp_path / f"Pendulum-v1__{name}" for name in names)
    for folder in (first, second, third):
        folder.mkdir()
    assert run.folder(tmp_path) == third
    (second / "model.pt").touch()
    assert run.folder(tmp_path) == second
    copy = third.with_name(f"{third.name}.bak")
    copy.mkdir()
    (copy / "model.pt").touch()
    assert run.folder(tmp_path) == second


def test_a_resumed_run_is_read_without_a_warning(tmp_path, caplog):
    """Its later records go: it goes on from a checkpoint before them."""
    logging.getLogger("tensorboard").setLevel(logging.NOTSET)
    with SummaryWriter(tmp_path) as writer:
        for step in (100, 200, 300):
            writer.add_scalar("charts/SPS", 1, step)
    records = runs.Records(tmp_path)
    assert len(records.read()["charts/SPS"]) == 3
    time.sleep(1.1)  # TensorBoard reads files in the order of their seconds
    with SummaryWriter(tmp_path, purge_step=200, filename_suffix=".resumed") as writer:
        writer.add_scalar("charts/SPS", 2, 200)
    assert records.read()["charts/SPS"] == [(100, 1), (200, 2)]
    assert not caplog.records


@pytest.mark.parametrize("args", [None, "", "{}"])
def test_a_run_that_ended_before_it_wrote_its_flags_is_not_finished(args, tmp_path):
    run = runs_of("x", Study({"Pendulum-v1": 100}, {"v": ""}, seeds=1))[0]
    folder = tmp_path / f"Pendulum-v1__{run.key}__1__5"
    folder.mkdir()
    if args is not None:
        (folder / "args.json").write_text(args)
    assert runs.read(run, tmp_path).about["state"] == "not finished, at step 0"
    (folder / "model.pt").touch()
    assert runs.read(run, tmp_path).about["state"] == "finished"


def test_a_run_that_goes_on_from_its_start_has_recorded_nothing_yet(tmp_path):
    """Stopped before its first checkpoint. TensorBoard keeps the names of what is gone."""
    with SummaryWriter(tmp_path) as writer:
        writer.add_scalar("charts/SPS", 1, 100)
    time.sleep(1.1)  # TensorBoard reads files in the order of their seconds
    with SummaryWriter(tmp_path, purge_step=1, filename_suffix=".resumed") as writer:
        writer.add_scalar("charts/episodic_return", 2, 40)
    records = runs.Records(tmp_path)
    assert records.read() == {"charts/episodic_return": [(40, 2)]}
    assert records.events.Tags()["scalars"] == ["charts/SPS", "charts/episodic_return"]


def test_without_git_history_a_script_is_uncommitted(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    (tmp_path / "script.py").touch()
    assert runs.commit_of(tmp_path / "script.py") == "uncommitted"
    monkeypatch.setenv("PATH", "")
    assert runs.commit_of(tmp_path / "script.py") == "uncommitted"


def test_a_flag_with_its_default_makes_no_other_run(monkeypatch):
    a, b, c = (
        runs_of("x", Study({"Pendulum-v1": 100}, {"v": flags}, seeds=1))[0]
        for flags in ("", "--gamma 0.99 --compile on --log-frequency 7", "--gamma 0.98")
    )
    assert a.key == b.key != c.key


def test_variants_may_be_of_one_environment_or_of_another_script():
    study = Study(
        {"A": 10, "B": 20},
        {"ours": "", "theirs": "benchmark/peers.py --library sbx", "for B": "--tau 0.1"},
        only={"for B": "B"},
        flags_in={"A": "--gamma 0.9"},
        seeds=1,
        seeds_in={"B": 2},
    )
    found = [(run.env_id, run.variant, run.seed, run.script) for run in runs_of("x", study)]
    ours, theirs = "sac_ablations.py", "benchmark/peers.py"
    both = [("B", "ours", 1, ours), ("B", "theirs", 1, theirs), ("B", "for B", 1, ours)]
    again = [(env_id, label, 2, script) for env_id, label, _, script in both]
    assert found == [("A", "ours", 1, ours), ("A", "theirs", 1, theirs), *both, *again]
    assert ["--gamma" in run.flags for run in runs_of("x", study)[:3]] == [True, True, False]


@pytest.mark.parametrize("name", STUDIES)
def test_studies_can_be_run_and_their_rules_judged(name):
    study = STUDIES[name]
    assert study.mistake() is None
    # A key is of all settings: the script takes the flags.
    keys = {(run.env_id, run.key) for run in runs_of(name, study)}
    grid = {(run.env_id, run.variant) for run in runs_of(name, study)}
    assert len(keys) == len(grid)  # no two variants are the same


def test_a_script_that_does_not_exist_is_named(monkeypatch, capsys):
    study = Study({"Pendulum-v1": 100}, {"ours": "", "mine": "my_sak.py --tau 0.01"})
    monkeypatch.setattr(runs, "STUDIES", {"x": study})
    with pytest.raises(SystemExit) as end:
        runs.check(("x",))
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said == "error: study x names my_sak.py, and there is no such script here\n"


def test_a_script_that_changes_while_a_runner_is_at_work_ends_it(tmp_path, monkeypatch, capsys):
    """Its results would be filed under the key of the code before."""
    script = tmp_path / "script.py"
    script.write_text((runs.ROOT / "sac_continuous.py").read_text())
    (run,) = runs_of("x", Study({"Pendulum-v1": 100}, {"v": ""}, seeds=1, script=str(script)))
    started = []
    monkeypatch.setattr(Job, "launch", lambda job, *_: started.append(job))
    folder = tmp_path / "runs"
    assert Job(run).start(folder, track=False)
    script.write_text(script.read_text() + "\n# A comment computes nothing.\n")
    assert Job(run).start(folder, track=False)
    script.write_text(script.read_text().replace("0.99", "0.98"))
    with pytest.raises(SystemExit) as end:
        Job(run).start(folder, track=False)
    said = capsys.readouterr().err
    assert end.value.code == 2 and len(started) == 2
    assert said == f"error: {script} has changed since this runner started: start it again\n"


def test_the_versions_that_a_run_noted_are_read(tmp_path):
    noted = dict(
        python="3.11.7",
        torch="2.13.0",
        numpy="2.4.6",
        gymnasium="1.4.0",
        processor="AMD EPYC",
        gpu=True,
    )
    torch.save({"versions": noted}, tmp_path / "checkpoint.pt")
    versions = "python 3.11.7 torch 2.13.0 numpy 2.4.6 gymnasium 1.4.0"
    assert runs.versions_of(tmp_path) == dict(versions=versions, hardware="AMD EPYC with a GPU")


def test_a_run_whose_checkpoint_was_deleted_has_no_versions_to_tell(tmp_path):
    assert runs.versions_of(tmp_path) == dict(versions=None, hardware=None)


A_RULE = Rule("E", "a", "above", "b")


@pytest.mark.parametrize(
    "changes, answer",
    [
        ({}, None),
        (dict(rules=[Rule("E", "a", "below", 200)]), None),
        (dict(claim="", rules=()), None),
        (dict(rules=()), "a claim without rules"),
        (dict(claim=""), "rules without a claim"),
        (
            dict(rules=[A_RULE, A_RULE._replace(env_id="F")]),
            "for F, which is none of its environments: E",
        ),
        (
            dict(rules=[A_RULE, A_RULE._replace(variant="c")]),
            "for c, which is none of its variants: a, b",
        ),
        (
            dict(rules=[A_RULE, A_RULE._replace(other="c")]),
            "for c, which is none of its variants: a, b",
        ),
        (dict(rules=[A_RULE, A_RULE._replace(other="a")]), "a with itself"),
        (
            dict(rules=[A_RULE._replace(relation="abvoe")]),
            "relation abvoe, which is none of above, below, like",
        ),
        (
            dict(rules=[A_RULE._replace(measure="speed")]),
            "measure speed, which is none of return, return over training, steps per second",
        ),
        (dict(seeds=0), "a seed at least"),
        (dict(flags="--seed 1"), "has --seed among its flags, which the runner gives"),
        (dict(flags="--total_timesteps=9"), "has --total_timesteps among"),
        (dict(flags_in={"E": "--tau 1 --threads 2"}), "has --threads among"),
        (dict(variants={"a": "", "b": "my_sac.py --env-id F"}), "has --env-id among"),
        (dict(flags="--eval-frequency 5 --seed-of-mine 1"), None),
        (dict(envs={}), "an environment"),
        (dict(variants={}), "a variant"),
        (dict(only={"c": "E"}), "names c, which is none of a, b"),
        (dict(envs={"E": 9, "F": 9}, only={"a": "E", "b": "E"}), "has no variant that runs in F"),
        (dict(only={"a": "F"}), "names F, which is none of E"),
        (dict(flags_in={"F": "--num-envs 2"}), "names F, which is none of E"),
        (dict(seeds_in={"F": 3}), "names F, which is none of E"),
        (dict(envs={"E": 100, "F": 100}, only={"b": "F"}), "for b in E, where it does not run"),
        (dict(seeds=2), "for E, which needs 3 seeds"),
        (dict(seeds_in={"E": 2}), "for E, which needs 3 seeds"),
        (dict(seeds=2, seeds_in={"E": 3}), None),
    ],
)
def test_mistakes_in_a_study_are_named(changes, answer):
    study = dict(
        envs={"E": 100}, variants={"a": "", "b": "--tau 0.1"}, claim="a claim", rules=[A_RULE]
    )
    found = Study(**study | changes).mistake()
    assert found is None if answer is None else answer in found


def test_two_variants_with_the_same_settings_are_refused(monkeypatch, capsys):
    """They would be one run, told twice and compared with itself."""
    twice = {"default": "", "tau 0.005": "--tau 0.005"}
    monkeypatch.setattr(runs, "STUDIES", {"x": Study({"Pendulum-v1": 900}, twice)})
    with pytest.raises(SystemExit) as ended:
        runs.check(("x",))
    assert ended.value.code == 2
    said = "error: study x: default and tau 0.005 have the same settings\n"
    assert capsys.readouterr().err == said
