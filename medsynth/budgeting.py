"""``medsynth budget``: what each cohort of the site has spent, its limit, and what a study would cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medsynth import config
from medsynth.config import Study
from medsynth.errors import ConfigError, InputError, StoreError
from medsynth.privacy.account import Account, counted_events, limits_of
from medsynth.privacy.accounting import epsilon
from medsynth.privacy.accounts import Accounts
from medsynth.privacy.budget import BudgetPlan, gaussian_epsilon, most_steps, plan_at_noise, plan_budget, plan_features
from medsynth.privacy.chain import Record
from medsynth.privacy.ledger import Ledger, study_of, taints_of, trials_of
from medsynth.privacy.scale_law import MEASURED, reach
from medsynth.release.spending import round_up
from medsynth.site import accounts
from medsynth.stages.inputs import account_of
from medsynth.store import is_done

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

COMPARED = (1.0, 3.0, 8.0)
"""Budgets that a plan is shown for beside its own."""
_LARGEST_EPSILON = 50  # that is worth naming
_OPEN = "open"
_COLUMNS = 110
_SHORT = 8  # characters of an identifier that are shown; more are accepted


@dataclass(frozen=True)
class Asked:
    """What was asked of a plan beside its configuration; None takes the configuration's value, or computes it.

    Attributes:
        noise: noise multiplier of each DP-SGD step.
        parameters: trainable parameters.
    """

    epsilon: float | None = None
    delta: float | None = None
    steps: int | None = None
    noise: float | None = None
    parameters: int | None = None


def show(run: Path | None) -> None:
    """Print the accounts of the site, or the one of a run.

    Raises:
        VerificationError: the chain of an account, or of the run's ledger, is broken.
        PrivacyError: the run's ledger belongs to another cohort.
        StoreError: the folder is no run, or MEDSYNTH_HOME cannot be used.
    """
    console = _console()
    own = ""
    if run is not None:
        require_run(run)
        opened, own = [account_of(run)], study_of(Ledger(run / "ledger.jsonl").entries())
    else:
        opened = list(_current(Accounts(accounts())).values())
    if not opened:
        console.print("this site has no account yet: nothing was reserved under this MEDSYNTH_HOME")
    for account in opened:
        _print_account(console, account, own)


def limit(target: str, most: float, delta: float | None) -> None:
    """Set what all studies of a cohort may cost together.

    Args:
        target: a run folder, or the (beginning of the) name of an account.
        most: epsilon; infinite lifts the limit.
        delta: its failure probability; None takes the smallest that the cohort's studies use.

    Raises:
        InputError: no such account, or no study to take delta from.
        PrivacyError: no budget.
    """
    if Path(target).is_dir():
        require_run(Path(target))
    account = account_of(Path(target)) if Path(target).is_dir() else _find(target)
    used = [line["delta"] for line in account.lines() if line["type"] == "reserve"]
    if delta is None and not used:
        raise InputError("no study was charged to this account yet: give --delta, at most 1/(10 N) for N patients")
    chosen = delta if delta is not None else min(used)
    account.limit(most, chosen)
    what = "no limit" if math.isinf(most) else f"limit epsilon {most:g} at delta {chosen:g}"
    _console().print(f"account {account.id[:_SHORT]}: {what}, for all studies of these patients together")


def require_run(run: Path) -> None:
    """Refuse a folder that is no run.

    Raises:
        StoreError: it has no finished ``cohort/``.
    """
    if not is_done(run / "cohort"):
        raise StoreError("this folder is no run: it has no finished cohort/; give the folder that `medsynth run` wrote")


def plan(path: Path, overrides: dict[str, object], asked: Asked) -> None:
    """Print what a study would cost: noise, steps, epsilon and trainable parameters from each other.

    Raises:
        ConfigError: the configuration or an option contradicts itself.
        BudgetError: no noise fits the budget.
    """
    if asked.noise is not None and not (math.isfinite(asked.noise) and asked.noise > 0):
        raise ConfigError(f"--noise must be a number above 0, got {asked.noise:g}: 0.5 to 20 are usual")
    if asked.parameters is not None and asked.parameters < 1:
        raise ConfigError(f"--parameters must be at least 1, got {asked.parameters}")
    chosen = {"privacy.epsilon": asked.epsilon, "privacy.delta": asked.delta, "train.steps": asked.steps}
    given = overrides | {name: value for name, value in chosen.items() if value is not None}
    study = plan_features(config.load(path, given))
    if not study.privacy.private:
        raise ConfigError("a study with privacy.epsilon inf adds no noise and is never certified: plan with --epsilon")
    if asked.noise is not None and not study.train.steps:
        raise ConfigError("--noise is that of the training, and train.steps is 0: give --steps")
    if asked.noise is not None and asked.epsilon is not None and asked.steps is None:
        steps = most_steps(study.privacy, study.train, study.masks, asked.noise)
        study = study.model_copy(update={"train": study.train.model_copy(update={"steps": steps})})
    _print_plan(_console(), study, _planned(study, asked.noise), asked)


def trainable_parameters(study: Study) -> int:
    """Return how many parameters patients would move, by building the study's own model (fresh weights)."""
    from medsynth.diffusion.generator import build_generator
    from medsynth.models.autoencoder import build_codec
    from medsynth.stages.private_training import choose_trainable

    return choose_trainable(
        study.train, build_generator(study.grid, study.train, build_codec(study.grid, study.encode))
    )


def _planned(study: Study, noise: float | None) -> BudgetPlan:
    if noise is None:
        return plan_budget(study.privacy, study.train, study.masks)
    return plan_at_noise(study.privacy, study.train, study.masks, noise)


def _print_plan(console: Console, study: Study, found: BudgetPlan, asked: Asked) -> None:
    privacy = study.privacy
    sweep = f", in each of {privacy.trials} trials" if privacy.trials > 1 else ""
    console.print(
        f"{study.name}: budget epsilon {privacy.epsilon:g} at delta {privacy.delta:g} for {privacy.declared_patients} "
        f"declared patients{sweep}"
    )
    console.print(_mechanisms(found, privacy.trials))
    if study.train.appearance.enabled:
        features = " x ".join(map(str, study.train.appearance.cosines))
        console.print(f"appearance is told by {features} cosines of the position (train.appearance.coefficients)")
    if found.epsilon > privacy.epsilon:
        console.print(f"this costs more than the budget: it needs privacy.epsilon {found.epsilon:g}")
    console.print(_advice(study, found, asked))
    console.print(_comparison(study))


def _mechanisms(found: BudgetPlan, trials: int) -> Table:
    table = _table("mechanism", "noise multiplier", "releases", "sampling rate", "epsilon")
    for stage, events in found.events.items():
        for event in events:
            cost = epsilon([event] * trials, found.delta)
            numbers = (
                f"{event.noise_multiplier:.4g}",
                f"{event.count}",
                f"{event.sampling_rate:g}",
                f"{round_up(cost):.3f}",
            )
            table.add_row(stage, *numbers)
    table.add_row("together", "", "", "", f"{round_up(found.epsilon):.3f}")
    return table


def _advice(study: Study, found: BudgetPlan, asked: Asked) -> str:
    """Return what the law of scale says of the planned training; it knows phantoms, not these patients."""
    if not study.train.steps:
        return "train.steps is 0: no parameter is trained on patients (plan a training with --steps)"
    privacy, count = study.privacy, asked.parameters or trainable_parameters(study)
    whose = "asked for" if asked.parameters else f"train.trainable: {study.train.trainable}"
    reached, spent = _reach(study, found), privacy.epsilon if asked.noise is None else found.epsilon
    most = MEASURED.most_parameters(reached)
    advice = "use DP statistics alone (train.steps 0), no DP-SGD"
    if most is not None:
        bound = "the most that were measured, " if most == MEASURED.parameters[-1] else ""
        gain = MEASURED.expected(reached, most)
        advice = f"train up to {most:,} parameters ({bound}expected to add {gain:.2f} of skill); fewer add less"
    return "\n".join(
        (
            f"trainable parameters: {count:,} ({whose}): DP-SGD {_verdict(study, found, count)}",
            f"advice: with {privacy.declared_patients} patients at epsilon {spent:g} {advice}",
            f"by the law of scale, measured on phantom cohorts and good to {MEASURED.error:.2f} of skill: "
            "docs/explanation/scale-law.md",
        )
    )


def _verdict(study: Study, found: BudgetPlan, count: int) -> str:
    """Return what so many parameters are expected to gain, and the epsilon at which they would gain anything."""
    reached, privacy = _reach(study, found), study.privacy
    gain = MEASURED.expected(reached, count)
    if gain > MEASURED.error:
        return f"is expected to add {gain:.2f} of skill"
    # With much noise a step the reach is proportional to mu, whose square adds up over trials.
    mu = found.mu * math.sqrt(privacy.trials) * MEASURED.least_reach(count) / reached
    needed = gaussian_epsilon(mu, privacy.delta) if math.isfinite(mu) else math.inf
    other = (
        f"about epsilon {needed:.2g} is needed"
        if needed <= _LARGEST_EPSILON
        else f"no epsilon up to {_LARGEST_EPSILON} helps"
    )
    return f"is expected to add nothing that can be told from 0; {other}"


def _reach(study: Study, found: BudgetPlan) -> float:
    batch = study.train.sampling_rate * study.declared_in_training
    return reach(found.training_noise_multiplier, batch, study.train.steps)


def _comparison(study: Study) -> Table:
    table = _table("epsilon", "masks", "appearance", "training", "train up to", title="noise multipliers, by budget")
    for value in sorted({*COMPARED, study.privacy.epsilon}):
        found = plan_budget(study.privacy.model_copy(update={"epsilon": value}), study.train, study.masks)
        noises = (found.masks_noise_multiplier, found.appearance_noise_multiplier, found.training_noise_multiplier)
        shown = [f"{noise:.4g}" if noise else "-" for noise in noises]
        table.add_row(f"{value:g}", *shown, _most(study, found))
    return table


def _most(study: Study, found: BudgetPlan) -> str:
    if not study.train.steps:
        return "-"
    most = MEASURED.most_parameters(_reach(study, found))
    return f"{most:,}" if most else "statistics alone"


def _print_account(console: Console, account: Account, own: str) -> None:
    """Print what an account holds: public values, never a patient nor how many there are."""
    lines = account.lines()
    reserved = [line for line in lines if line["type"] == "reserve"]
    console.print(f"account {account.id[:_SHORT]}")
    if not reserved:
        console.print("  nothing was reserved for these patients yet")
        return
    delta = min(line["delta"] for line in reserved)
    table = _table("study", "since", "stages", "epsilon", "unfinished", "trials", "certified")
    for study in dict.fromkeys(line["study"] for line in reserved):
        table.add_row(*_study_row(study, lines, delta, study == own))
    console.print(table)
    done = {line["entry"] for line in lines if line["type"] == "complete"}
    finished = [line for line in reserved if line["entry"] in done]
    spent, all_of_it = (round_up(epsilon(counted_events(some), delta)) for some in (finished, reserved))
    console.print(f"  together: epsilon {all_of_it:.3f} at delta {delta:g}; finished {spent:.3f}, the rest is reserved")
    if taints_of(reserved):
        console.print(f"  {_OPEN}: read patients without a mechanism, or with repeatable noise; no number covers that")
    _print_limits(console, lines, reserved)
    if any(line["type"] == "recover" for line in lines):
        console.print("  restored from the ledgers of runs: a study whose run was not opened since is missing")


def _print_limits(console: Console, lines: Sequence[Record], reserved: Sequence[Record]) -> None:
    limits = limits_of(lines)
    for most, delta in limits:
        over = round_up(round_up(epsilon(counted_events(reserved), delta)) - most)
        console.print(f"  limit: epsilon {most:g} at delta {delta:g}; left about {max(0.0, -over):.3f}")
    if not limits:
        console.print("  limit: none, everything is counted and stated (set one with: medsynth budget limit)")


def _study_row(study: str, lines: Sequence[Record], delta: float, own: bool) -> tuple[str, ...]:
    done = {line["entry"] for line in lines if line["type"] == "complete"}
    mine = [line for line in lines if line["type"] == "reserve" and line["study"] == study]
    released = [line for line in lines if line["type"] == "release" and line["study"] == study]
    cost = f"{round_up(epsilon(counted_events(mine), delta)):.3f}"
    return (
        study[:_SHORT] + (" (this run)" if own else ""),
        str(mine[0]["at"])[:16].replace("T", " "),
        ", ".join(dict.fromkeys(line["stage"] for line in mine)),
        _OPEN if taints_of(mine) else cost,
        ", ".join(line["stage"] for line in mine if line["entry"] not in done) or "-",
        str(max(trials_of(line) for line in mine)),
        f"epsilon {released[-1]['epsilon']:g}" if released else "no",
    )


def _current(site: Accounts) -> dict[str, Account]:
    with site.locked():
        return {name: Account(site.root / name) for name in site.ids() if site.current(name) == name}


def _find(name: str) -> Account:
    found = [account for key, account in _current(Accounts(accounts())).items() if key.startswith(name.lower())]
    if len(found) != 1 or not name:
        raise InputError(
            f"'{name}' names {len(found)} accounts and no folder: give a run folder, or one of those that `medsynth "
            "budget show` lists"
        )
    return found[0]


def _table(*columns: str, title: str | None = None) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    return table


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, _COLUMNS)  # a batch job has no terminal, and tables should not be cut there
    return console
