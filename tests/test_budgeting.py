"""`medsynth budget`: the accounts of a site, their limits, and plans before anything is read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from medsynth import budgeting, config, store
from medsynth.cli import verbs
from medsynth.config import Study
from medsynth.errors import (
    BudgetError,
    ConfigError,
    InputError,
    MedsynthError,
    PrivacyError,
    StoreError,
    VerificationError,
)
from medsynth.imaging.deidentify import References, key_id, write_references
from medsynth.privacy.accounting import Event, epsilon
from medsynth.privacy.budget import plan_budget
from medsynth.privacy.ledger import Ledger
from medsynth.privacy.mechanism import GaussianSum
from medsynth.privacy.scale_law import ScaleLaw
from medsynth.release.spending import round_up
from medsynth.site import accounts, site_home, site_key
from medsynth.stages.inputs import account_of, open_ledger

SUM = GaussianSum("pose", 6, clip_norm=4.0, noise_multiplier=1.5, denominator=200.0)
ALONE = epsilon([SUM.event()], 1e-4)


def budget(*words: str | Path) -> Result:
    return CliRunner().invoke(verbs.app, ["budget", *map(str, words)])


def shown(*words: str | Path) -> str:
    result = budget(*words)
    assert result.exit_code == 0, result
    return str(result.stdout)


def refused(*words: str | Path) -> MedsynthError:
    error = budget(*words).exception
    assert isinstance(error, MedsynthError), error
    return error


def make_run(run: Path, *people: str) -> Ledger:
    with store.create(run / "cohort", "ingest", "0" * 64) as folder:
        write_references(folder.path, References(key_id(site_key()), frozenset(people)))
        folder.finish("private")
    return open_ledger({"ledger": run / "ledger.jsonl", "account": account_of(run).folder})


def reserve(ledger: Ledger, run: Path, **more: Any) -> str:
    return ledger.reserve(
        "masks",
        [SUM],
        **{
            "epsilon": 8.0,
            "delta": 1e-4,
            "noise_source": "os",
            "config_digest": "c" * 64,
            "parents": {"cohort": store.read_manifest(run / "cohort").digest},
            **more,
        },
    )


@pytest.fixture(autouse=True)
def _fewer_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgeting, "COMPARED", ())  # each takes a second


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def study(tiny_settings: dict[str, Any]) -> Study:
    return config.parse(
        {**tiny_settings, "privacy": {**tiny_settings["privacy"], "epsilon": 1, "declared_patients": 200}}
    )  # quick to account


@pytest.fixture
def path(study: Study, tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(config.dump(study), encoding="utf-8")
    return path


def test_show_tells_spent_reserved_and_left_by_study(run: Path, tmp_path: Path) -> None:
    assert "no account yet" in shown("show")
    ledger, other = make_run(run, "a1" * 32), make_run(tmp_path / "other", "a1" * 32, "b2" * 32)
    assert "nothing was reserved" in shown("show", run)
    ledger.complete(reserve(ledger, run), {"statistics": "d" * 64})
    reserve(other, tmp_path / "other")
    both = epsilon([SUM.event()] * 2, 1e-4)
    text = shown("show", run)
    assert text.count("(this run)") == 1
    assert f"together: epsilon {round_up(both):.3f} at delta 0.0001; finished {round_up(ALONE):.3f}" in text
    assert "limit: none" in text
    most = round_up(both) + 1
    assert f"limit epsilon {most:g}" in shown("limit", run, f"{most}")
    assert "left about 1.000" in shown("show", tmp_path / "other")
    shown("limit", run, f"{most - 0.0004}")
    assert "left about 0.999" in shown("show", tmp_path / "other")  # never more than there is
    assert "limit: none" in (shown("limit", run, "inf") and shown("show"))


def test_show_prints_no_patient_and_no_number_of_them(run: Path) -> None:
    people = [f"{number:064x}" for number in range(12_347)]
    reserve(make_run(run, *people), run)
    text = shown("show") + shown("show", run)
    assert not any(name in text for name in people) and "12347" not in text


def test_cohorts_that_share_nobody_are_shown_apart(run: Path, tmp_path: Path) -> None:
    reserve(make_run(run, "a1" * 32), run)
    reserve(make_run(tmp_path / "other", "b2" * 32), tmp_path / "other")
    assert len(re.findall(r"^account ", shown("show"), re.MULTILINE)) == 2
    assert len(re.findall(r"^account ", shown("show", run), re.MULTILINE)) == 1


def test_a_limit_stops_the_next_reservation_and_takes_the_account_by_name(run: Path) -> None:
    ledger = make_run(run, "a1" * 32)
    assert isinstance(refused("limit", run, "5"), InputError)  # no study to take delta from
    assert "at delta 1e-05" in shown("limit", run, "5", "--delta", "1e-5")
    reserve(ledger, run)
    name = account_of(run).id
    shown("limit", name[:8], str(ALONE + 0.01))
    with pytest.raises(BudgetError, match="medsynth budget limit"):
        reserve(ledger, run)
    assert "names 0 accounts" in str(refused("limit", "no-such-account", "5"))


@pytest.mark.parametrize(("most", "delta"), [("0", "1e-4"), ("nan", "1e-4"), ("5", "0"), ("5", "1"), ("5", "nan")])
def test_a_limit_that_is_none_is_refused(run: Path, most: str, delta: str) -> None:
    make_run(run, "a1" * 32)
    error = refused("limit", run, most, "--delta", delta)
    assert isinstance(error, PrivacyError) and "a limit needs" in str(error)


def test_a_broken_chain_is_told_with_what_to_do(run: Path) -> None:
    reserve(make_run(run, "a1" * 32), run)
    for path in (run / "ledger.jsonl", next(accounts().glob("*/account.jsonl"))):
        whole = path.read_bytes()
        path.write_bytes(whole.replace(b"1.5", b"9.5"))
        error = refused("show", run)
        assert isinstance(error, VerificationError) and "restore the file from a copy" in str(error)
        path.write_bytes(whole)
    assert ALONE > 0 and f"{round_up(ALONE):.3f}" in shown("show", run)


def test_a_ledger_of_another_cohort_is_told(run: Path, tmp_path: Path) -> None:
    reserve(make_run(run, "a1" * 32), run)
    make_run(tmp_path / "other", "b2" * 32)
    (tmp_path / "other" / "ledger.jsonl").write_bytes((run / "ledger.jsonl").read_bytes())
    error = refused("show", tmp_path / "other")
    assert isinstance(error, PrivacyError) and "new run folder" in str(error)


def test_a_folder_that_is_no_run_is_told(tmp_path: Path) -> None:
    assert isinstance(refused("show", tmp_path), StoreError)
    assert not (site_home() / "accounts").exists() or list(accounts().glob("*/")) == []


def test_a_cohort_without_references_is_to_be_ingested_again(run: Path) -> None:
    with store.create(run / "cohort", "ingest", "0" * 64) as folder:
        folder.finish("private")
    assert "run ingest again" in str(refused("show", run))


def test_a_plan_reads_nothing_and_leaves_nothing(path: Path) -> None:
    text = shown("plan", path)
    assert "epsilon 1 at delta 0.0001 for 200 declared patients" in text
    assert all(name in text for name in ("masks", "appearance", "training", "together"))
    assert not site_home().exists()


def test_a_plan_goes_from_epsilon_to_noise_and_back(path: Path, study: Study) -> None:
    wanted = plan_budget(study.privacy.model_copy(update={"epsilon": 0.5}), study.train, study.masks)
    assert f"{wanted.training_noise_multiplier:.4g}" in shown("plan", path, "--epsilon", "0.5", "--parameters", "5")
    noise = str(wanted.training_noise_multiplier)
    back = shown("plan", path, "--set", "privacy.epsilon=0.5", "--noise", noise, "--parameters", "5")
    assert f"{round_up(wanted.epsilon):.3f}" in back
    little = shown("plan", path, "--set", "privacy.epsilon=0.5", "--noise", "2", "--parameters", "5")
    assert "this costs more than the budget" in little
    assert "at epsilon 0.5 " not in little, "advice is for what the noise costs"
    dear = shown("plan", path, "--noise", "900", "--parameters", "5")
    assert re.search(r"advice: with 200 patients at epsilon 0\.\d+ ", dear)


def test_a_plan_goes_from_noise_and_epsilon_to_steps(path: Path, study: Study) -> None:
    text = shown("plan", path, "--epsilon", "1", "--noise", "40", "--parameters", "5")
    row = next(line for line in text.splitlines() if "training" in line and "40 " in line)
    steps = int(re.findall(r"\d+", row)[1])
    train = study.train.model_copy(update={"steps": steps})
    assert plan_budget(study.privacy, train, study.masks).training_noise_multiplier == pytest.approx(40, rel=0.01)


def law(error: float) -> ScaleLaw:
    """Return a law in which more parameters add more, up to 0.6 of skill."""
    return ScaleLaw(0.4, 0.2, 0.0, half=50.0, exponent=0.0, power=1.0, error=error, parameters=(1_000, 10_000, 100_000))


def test_a_plan_gives_one_advice_by_the_law_of_scale(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgeting, "MEASURED", law(error=10.0))
    text = shown("plan", path, "--parameters", "5000")
    assert "advice: with 200 patients at epsilon 1 use DP statistics alone (train.steps 0)" in text
    assert "nothing that can be told from 0; no epsilon up to 50 helps" in text and "statistics alone │" in text
    monkeypatch.setattr(budgeting, "MEASURED", law(error=0.01))
    text = shown("plan", path, "--parameters", "10000")
    assert re.search(r"10,000 \(asked for\): DP-SGD is expected to add 0\.\d\d of skill", text)
    assert re.search(r"advice: .* train up to 100,000 parameters \(the most that were measured, expected", text)
    assert re.search(r"│ 100,000 +│", text) and "d*" not in text and text.count("advice") == 1


def test_parameters_lead_to_the_epsilon_that_they_want(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgeting, "MEASURED", law(error=0.2))
    few = ("plan", path, "--parameters", "10000")
    found = re.search(r"about epsilon ([\d.]+) is needed", shown(*few))
    assert found is not None
    needed = float(found[1])
    assert "is expected to add 0." in shown(*few, "--epsilon", str(needed * 1.3))
    assert "nothing that can be told" in shown(*few, "--epsilon", str(needed / 1.3))


def test_a_study_without_private_steps_is_not_advised_on_parameters(path: Path) -> None:
    text = shown("plan", path, "--set", "train.steps=0")
    assert "train.steps is 0" in text and "--steps" in text and "advice" not in text and "statistics alone" not in text


def test_a_plan_counts_the_parameters_of_the_studys_own_model(path: Path) -> None:
    few, all_of_them = (shown("plan", path, "--set", f"train.trainable={kind}") for kind in ("bias_norm", "all"))
    counts = [int(re.search(r"trainable parameters: ([\d,]+)", t)[1].replace(",", "")) for t in (few, all_of_them)]  # type: ignore[index]
    assert 0 < counts[0] < counts[1] / 10


def test_a_sweep_is_planned_as_a_whole(path: Path) -> None:
    text = shown("plan", path, "--set", "privacy.trials=4", "--parameters", "5")
    assert "in each of 4 trials" in text
    once, four = (
        float(found) for found in re.findall(r"training +│ ([\d.]+)", shown("plan", path, "--parameters", "5") + text)
    )
    assert four == pytest.approx(2 * once, rel=0.05)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--epsilon", "0"), "epsilon must be above 0"),
        (("--epsilon", "-1"), "epsilon must be above 0"),
        (("--epsilon", "nan"), "epsilon must be above 0"),
        (("--epsilon", "-inf"), "epsilon must be above 0"),
        (("--epsilon", "inf"), r"must be named '\*-nonprivate'"),
        (("--delta", "0"), "delta must be above 0"),
        (("--delta", "nan"), "delta must be above 0"),
        (("--delta", "0.5"), r"above 1/\(10 N\) = 0.0005 for 200 declared patients: lower it"),
        (("--delta", "0.005"), r"above 1/\(10 N\)"),
        (("--noise", "0"), "--noise must be a number above 0"),
        (("--noise", "-1"), "--noise must be a number above 0"),
        (("--noise", "nan"), "--noise must be a number above 0"),
        (("--noise", "inf"), "--noise must be a number above 0"),
        (("--steps", "-1"), r"train\.steps"),
        (("--steps", "1000001"), r"train\.steps: .*less than or equal to 1000000"),
        (("--parameters", "0"), "--parameters must be at least 1"),
        (("--set", "train.sampling_rate=1.5"), r"train\.sampling_rate: .*less than or equal to 1"),
        (("--set", "train.sampling_rate=0"), r"train\.sampling_rate: .*greater than 0"),
        (("--set", "privacy.trials=0"), r"privacy\.trials"),
    ],
)
def test_a_plan_of_nonsense_is_refused(path: Path, words: tuple[str, ...], message: str) -> None:
    error = refused("plan", path, *words)
    assert isinstance(error, ConfigError) and re.search(message, str(error)), error


def test_a_study_without_privacy_has_nothing_to_plan(path: Path) -> None:
    error = refused("plan", path, "--set", "name=tiny-nonprivate", "--epsilon", "inf")
    assert isinstance(error, ConfigError) and "never certified" in str(error)


def test_an_access_without_privacy_is_shown_and_not_added(run: Path) -> None:
    ledger = make_run(run, "a1" * 32)
    ledger.reserve(
        "train",
        [Event("nonprivate")],
        epsilon=float("inf"),
        delta=1e-4,
        noise_source="os",
        config_digest="c" * 64,
        parents={},
    )
    text = shown("show", run)
    assert "open: read patients without a mechanism" in text and "together: epsilon 0.000" in text


def test_a_folder_that_is_no_run_is_called_that(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(StoreError, match="is no run"):
            budgeting.show(folder)
