"""One verb a stage, and those around them; where the command line begins and errors end."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medsynth import accidents
from medsynth.cli.budget import budget_app
from medsynth.cli.keys import keys_app
from medsynth.cli.options import Config, Override, Replace, Run, Source
from medsynth.devices import rank_and_size, share_cores
from medsynth.errors import MedsynthError, UnexpectedError, VerificationError

if TYPE_CHECKING:
    from medsynth.config import Study

app = typer.Typer(
    name="medsynth",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Differentially private synthesis of medical image and segmentation pairs.\n\n"
    "Example: medsynth run configs/demo.yaml --input HOSPITAL --out RUN",
)
config_app = typer.Typer(no_args_is_help=True, help="Look at configurations.")
app.add_typer(config_app, name="config")
app.add_typer(keys_app, name="keys")
app.add_typer(budget_app, name="budget")


@app.command()
def run(config: Config, out: Run, source: Source = None, replace: Replace = False, override: Override = None) -> None:
    """Run all stages, skipping finished ones.

    Example: medsynth run configs/hippocampus-3d.yaml --input HOSPITAL --out RUN
    """
    from medsynth.study import run_study
    from medsynth.summary import summary

    study = _load(config, override)
    if _assists(study, out):
        return
    with accidents.kept_in(out):
        run_study(study, source, out, replace=replace)
        print(summary(study, out))


def _stage_command(verb: str, what: str) -> None:
    def command(
        config: Config, out: Run, source: Source = None, replace: Replace = False, override: Override = None
    ) -> None:
        from medsynth.study import run_verb

        study = _load(config, override)
        if _assists(study, out):
            return
        with accidents.kept_in(out):
            run_verb(study, verb, source, out, replace=replace)

    given = "--input HOSPITAL --out RUN" if verb == "ingest" else "--out RUN"
    command.__doc__ = f"{what}\n\nExample: medsynth {verb} configs/demo.yaml {given}"
    app.command(name=verb)(command)


for _verb, _what in (
    ("ingest", "Read the hospital's files into RUN/cohort (give --input)."),
    ("encode", "Make the latent codec from public phantoms: RUN/autoencoder."),
    ("masks", "Release mask statistics and make the label map generator: RUN/masks."),
    ("train", "Train the denoiser under patient-level privacy: RUN/generator."),
    ("synthesise", "Render image and label pairs: RUN/synthetic."),
    ("segment", "Train segmentation models on real, synthetic and mixed pairs: RUN/segmenter."),
    ("evaluate", "Measure Dice on held-out patients and write the internal report: RUN/report."),
    ("certify", "Check the ledger and sign the certificate: RUN/certificate."),
    ("export", "Assemble the release: RUN/release."),
):
    _stage_command(_verb, _what)


@app.command()
def audit(run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="the run folder")]) -> None:
    """Audit a run's mechanisms and results (again), each beside a positive control; internal.

    Example: medsynth audit RUN
    """
    from medsynth.errors import CertificationError
    from medsynth.privacy.audit.finding import refusals
    from medsynth.study import audit_again, refuse_withdrawn
    from medsynth.summary import print_findings

    with accidents.kept_in(run_folder):
        findings = audit_again(run_folder)
    print_findings(findings)
    if reasons := refusals(findings):
        refuse_withdrawn(run_folder)  # it says more where something was certified
        raise CertificationError("the release of this run may not go out:\n" + "\n".join(f"  - {r}" for r in reasons))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="finished runs of one cohort and split")],
    out: Annotated[Path, typer.Option("--out", help="a folder of its own; compare/ and mlflow/ are made in it")],
    numbers: Annotated[
        str | None, typer.Option("--numbers", help="real patients to train on; default 1,2,4,8,20,all")
    ] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", help="of every training; default 0,1,2")] = None,
    tolerance: Annotated[
        float | None, typer.Option("--tolerance", help="of surface Dice, mm; default: the coarsest side of a voxel")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="a quarter of the steps, numbers 1,4,all, seed 0: to try it, not to quote")
    ] = False,
    replace: Replace = False,
    override: Override = None,
) -> None:
    """Measure what pairs are worth beside real patients, strong augmentation and random contrasts; internal.

    A killed comparison goes on with the same command.

    Example: medsynth compare RUN-8 RUN-3 RUN-1 --out COMPARISON --seeds 0,1,2
    """
    from medsynth import comparing
    from medsynth.config import parse_overrides

    settings = comparing.parse_settings(numbers, seeds, tolerance, quick)
    with accidents.kept_in(out):
        result = comparing.compare(runs, out, settings, parse_overrides(override or []), replace=replace)
        comparing.show(result, out)


@app.command()
def doctor(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="the run folder, finished or not")],
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead of a table")] = False,
) -> None:
    """Say what limits a run's quality, from measured figures, and what to change; internal.

    Example: medsynth doctor RUN
    """
    from medsynth.doctor.examination import doctor as examine

    examine(run_folder, as_json=as_json)


@app.command()
def phantom(
    out: Annotated[Path, typer.Option("--out", help="a new folder")],
    patients: Annotated[
        int, typer.Option("--patients", min=2, help="usable patients; six broken cases come on top")
    ] = 40,
    seed: Annotated[int, typer.Option("--seed", help="the same seed gives the same voxels")] = 0,
) -> None:
    """Write a phantom hospital: DICOM series with SEG, NIfTI, several scans a patient, a few broken cases.

    Example: medsynth phantom --out build/hospital --patients 40 --seed 0
    """
    from medsynth.errors import StoreError
    from medsynth.imaging.phantom_hospital import write_hospital

    try:
        if out.exists() and any(out.iterdir()):
            raise StoreError("the phantom hospital needs a new or empty folder: choose another --out")
        write_hospital(out, patients, seed)
    except OSError as error:
        raise StoreError(
            f"cannot write the phantom hospital: {error.strerror}; name an --out folder that you can write to"
        ) from error
    print(f"phantom hospital of {patients} patients written")


@app.command()
def verify(
    release: Annotated[Path, typer.Argument(metavar="RELEASE", help="the release folder")],
    key: Annotated[
        Path | None, typer.Option("--key", help="the hospital's public key, received by another way")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead of lines")] = False,
) -> None:
    """Check a release offline: signature, every digest, the ledger's chain, epsilon computed again.

    Example: medsynth verify RUN/release --key public.pem
    """
    import json

    from medsynth.release.verify import verify as check

    report = check(release, key)
    print(json.dumps(report.as_json(), indent=1) if as_json else "\n".join(report.lines()))
    if not report.ok:
        raise typer.Exit(VerificationError.exit_code)


@app.command()
def quarantine(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="the run folder")],
    source: Annotated[Path, typer.Option("--input", help="the hospital's folder")],
) -> None:
    """Print which files the references in RUN/cohort/quarantine.csv stand for (terminal only, nothing is stored).

    Example: medsynth quarantine RUN --input HOSPITAL
    """
    from medsynth.imaging.deidentify import explain

    for reference, path in explain(run_folder / "cohort", source).items():
        print(f"{reference}  {path}")


@config_app.command("show")
def config_show(config: Config, override: Override = None) -> None:
    """Print a study with all defaults filled in.

    Example: medsynth config show configs/demo.yaml
    """
    from medsynth.config import dump

    print(dump(_load(config, override)), end="")


def _load(path: Path, override: list[str] | None) -> Study:
    from medsynth import config
    from medsynth.privacy.budget import plan_features

    return plan_features(config.load(path, config.parse_overrides(override or [])))


def _assists(study: Study, out: Path) -> bool:
    """Whether this process only assists in training, another one doing the rest; if so, it has done that."""
    if not _is_assistant():
        return False
    from medsynth.study import assist_study

    with accidents.kept_in(out):
        assist_study(study, out)
    return True


def _is_assistant() -> bool:
    """Whether ``torchrun`` started this process beside the one that carries the command out."""
    return rank_and_size()[0] > 0


def main() -> None:
    """Run the command line; an error prints one message and exits with its class's code, never a traceback."""
    try:
        _run()
    except SystemExit as ended:
        with contextlib.suppress(MedsynthError):  # torchrun's variables are no numbers: that was said, nobody assists
            if _is_assistant():
                accidents.end_at_once(ended)
        raise


def _run() -> None:
    accidents.protect_process()
    share_cores()
    try:
        if _is_assistant() and sys.argv[1:2] not in (["run"], ["train"]):
            return
        if rank_and_size()[1] == 1:  # others may be asked while they wait for each other, which no exception ends
            accidents.stop_when_asked()
        app()
    except accidents.Stopped as stopped:
        print("medsynth: stopped by a signal: finished stages stay, the same command goes on", file=sys.stderr)
        sys.exit(stopped.code)
    except Exception as error:
        ours = error if isinstance(error, MedsynthError) else accidents.lacking(error)
        print(f"medsynth: {ours or accidents.describe(error)}", file=sys.stderr)
        sys.exit(ours.exit_code if ours else UnexpectedError.exit_code)
