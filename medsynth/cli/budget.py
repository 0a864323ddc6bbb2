"""``medsynth budget``: what cohorts have spent, their limits, and plans of studies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medsynth.cli.options import Config, Override

budget_app = typer.Typer(no_args_is_help=True, help="What cohorts have spent, their limits, and plans of studies.")


@budget_app.command("show")
def budget_show(
    run_folder: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="a run folder; without it all cohorts")
    ] = None,
) -> None:
    """Print what the studies of each cohort reserved, how much of it is unfinished, and what is left.

    Example: medsynth budget show RUN
    """
    from medsynth.budgeting import show

    show(run_folder)


@budget_app.command("limit")
def budget_limit(
    target: Annotated[str, typer.Argument(metavar="ACCOUNT|RUN", help="a run folder, or an account that `show` lists")],
    epsilon: Annotated[float, typer.Argument(metavar="EPSILON", help="for all studies together; inf lifts the limit")],
    delta: Annotated[float | None, typer.Option("--delta", help="default: the smallest that the studies use")] = None,
) -> None:
    """Set what all studies of a cohort may cost together; a study beyond it stops before it reads a patient.

    Example: medsynth budget limit RUN 10 --delta 1e-4
    """
    from medsynth.budgeting import limit

    limit(target, epsilon, delta)


@budget_app.command("plan")
def budget_plan(
    config: Config,
    epsilon: Annotated[float | None, typer.Option("--epsilon", help="budget; default: the study's")] = None,
    delta: Annotated[float | None, typer.Option("--delta", help="failure probability; default: the study's")] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", help="training steps, at most 1,000,000; with --epsilon and --noise they are computed"),
    ] = None,
    noise: Annotated[
        float | None, typer.Option("--noise", help="noise multiplier of the training; without it, it is computed")
    ] = None,
    parameters: Annotated[
        int | None, typer.Option("--parameters", help="trainable parameters; default: those of the study's model")
    ] = None,
    override: Override = None,
) -> None:
    """Print what a study would cost, before anything is read, and what to train: noise, steps, epsilon, parameters.

    Example: medsynth budget plan configs/demo.yaml --epsilon 3
    """
    from medsynth.budgeting import Asked, plan
    from medsynth.config import parse_overrides

    plan(config, parse_overrides(override or []), Asked(epsilon, delta, steps, noise, parameters))
