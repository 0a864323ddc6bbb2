"""The stages in order, skipping what is finished: the whole flow of ``medsynth run`` on one screen."""

from __future__ import annotations

import importlib
import json
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medsynth import config as configuration
from medsynth import logs, store
from medsynth.config import Study
from medsynth.devices import rank_and_size
from medsynth.errors import CertificationError, MedsynthError, StoreError
from medsynth.privacy.audit.finding import Finding
from medsynth.release import audits, keys
from medsynth.release.marks import PUBLIC_KEY
from medsynth.release.spending import round_up
from medsynth.site import signing_keys
from medsynth.stages.inputs import account_of, config_digest, open_ledger
from medsynth.store import Manifest
from medsynth.tracking import Tracker, open_tracker


@dataclass(frozen=True)
class Stage:
    """One step of the flow: a verb, the folder that it writes, the finished folders that it reads."""

    verb: str
    folder: str
    reads: tuple[str, ...]


STAGES = (
    Stage("ingest", "cohort", ()),
    Stage("encode", "autoencoder", ()),
    Stage("masks", "masks", ("cohort",)),
    Stage("train", "generator", ("cohort", "autoencoder", "masks")),
    Stage("synthesise", "synthetic", ("autoencoder", "masks", "generator")),
    Stage("segment", "segmenter", ("cohort", "autoencoder", "synthetic")),
    Stage("audit", "audit", ("cohort", "autoencoder", "masks", "generator", "synthetic")),
    Stage("evaluate", "report", ("cohort", "autoencoder", "synthetic", "segmenter", "audit")),
    Stage("certify", "certificate", ("cohort", "autoencoder", "masks", "generator", "synthetic", "audit")),
    Stage("export", "release", ("synthetic", "certificate")),
)
STUDY = "study.yaml"
"""The study that a run was last started with, all defaults filled in; internal."""
RESOURCES = "resources.json"
"""Seconds of each stage, and the most memory that the process had taken by its end; internal."""
BY_VERB = {stage.verb: stage for stage in STAGES}
CHARGING = ("masks", "train", "certify")
"""Stages that reserve in the account of the cohort, or state what it holds."""
_GROWN = "since then more was reserved for these patients than the certificate says"
_RESIGNED = "another key than the active one signed the certificate"
_SIGNED = ("certify", "export")
ASSISTED = "train"
"""The stage that the other processes of ``torchrun`` share in; they are let go after it."""


def run_study(study: Study, source: Path | None, run: Path, *, replace: bool = False) -> None:
    """Run every stage in order into ``run/<stage folder>``; finished ones are skipped.

    Args:
        study: the configuration.
        source: the hospital's folder; None when ``cohort/`` is there already.
        run: the run's folder; made when it is not there.
        replace: make stages again whose settings or inputs changed, and a certificate that is out of date.

    Raises:
        StoreError: ``run`` lies in ``source``.
        CertificationError: audits that were repeated since refuse what was certified.
        MedsynthError: what stopped a stage; the stages before it stay as they are.
    """
    _keep_apart(source, run)
    _meet_ranks()
    with store.alone_in(run, "run"):
        refuse_withdrawn(run)
        if study.privacy.private and not store.is_done(run / "certificate"):
            # nobody may be there when certify asks for a passphrase, hours from now
            keys.open_key(signing_keys(), ask=False)
        _keep_study(study, run)
        with open_tracker(study.tracking.uri, study.tracking.experiment, run, study.name) as tracker:
            tracker.params(configuration.flatten(study))
            tracker.describe(_description(study))
            for stage in STAGES:
                run_stage(study, stage, source, run, tracker, replace=replace)
                if stage.verb == ASSISTED:
                    _dismiss_ranks()
            tracker.metrics(_headline(run))


def _description(study: Study) -> str:
    """Return what the page of a run in MLflow says of it."""
    privacy = study.privacy
    promise = (
        f"At most epsilon {privacy.epsilon:g} at delta {privacy.delta:g} a patient, for "
        f"{privacy.declared_patients} declared patients."
    )
    if not privacy.private:
        promise = "**WITHOUT privacy**: nothing of it can be certified."
    elif privacy.entropy != "os":
        promise = "**Repeatable noise, for tests**: no privacy, and nothing of it can be certified."
    return (
        f"{study.description or study.name}. {promise}\n\n"
        "The metrics are those of the whole run: Dice on held-out patients by what the segmentation model was trained "
        "on, the Dice of one constant mean shape (floor), the skill (0: that floor, 1: real patients), how well images "
        "obey their label maps, and epsilon. Each stage is a child run; `evaluate` has the "
        "figures, `audit` the ROC curve. All of it was computed on patients and is **internal**."
    )


def run_verb(study: Study, verb: str, source: Path | None, run: Path, *, replace: bool = False) -> None:
    """Run one stage into ``run`` (see :func:`run_study`)."""
    _keep_apart(source, run)
    if verb == ASSISTED:
        _meet_ranks()
    with store.alone_in(run, "run"):
        if verb in _SIGNED:
            refuse_withdrawn(run)
        _keep_study(study, run)
        with open_tracker(study.tracking.uri, study.tracking.experiment, run, study.name) as tracker:
            tracker.describe(_description(study))
            run_stage(study, BY_VERB[verb], source, run, tracker, replace=replace)
    if verb == ASSISTED:
        _dismiss_ranks()


def _keep_apart(source: Path | None, run: Path) -> None:
    """Refuse a run in the hospital's folder: its release would be read as patients the next time."""
    if source is not None and run.resolve().is_relative_to(source.resolve()):
        raise StoreError("the run folder lies in the hospital's folder: choose an --out outside of --input")


def assist_study(study: Study, run: Path) -> None:
    """Help rank 0, another process of the same ``torchrun``, with private training steps, until it needs no help.

    Args:
        study: the configuration that rank 0 was given.
        run: the run's folder; read, not written.

    Raises:
        MedsynthError: rank 0 has ended, or this process was given something else than rank 0.
    """
    from medsynth.privacy.distributed import open_ranks
    from medsynth.stages import private_training

    ranks = open_ranks()
    inputs = {name: run / name for name in BY_VERB[ASSISTED].reads}
    while (call := ranks.await_call()) is not None:
        private_training.assist(study, inputs, ranks, call)


def audit_again(run: Path) -> list[Finding]:
    """Audit a finished run with the study that is stored in it; only a repetition that refuses the release is kept.

    Args:
        run: the run's folder.

    Returns:
        What was found this time.

    Raises:
        StoreError: the folder holds no study, or the run has not come as far as its audit.
    """
    study = configuration.load(stored_study(run))
    stage, out = BY_VERB["audit"], run / BY_VERB["audit"].folder
    if not store.is_done(out):
        run_verb(study, stage.verb, None, run)
        return audits.read_findings(out)
    if _changes(study, stage, store.read_manifest(out), run):
        raise StoreError("'audit' was made from other settings or inputs: finish the run first (medsynth run)")
    with store.alone_in(run, "run"), tempfile.TemporaryDirectory(dir=run, prefix=".audit-") as scratch:
        again = Path(scratch) / stage.folder
        module = importlib.import_module(f"medsynth.stages.{stage.verb}")
        inputs = {name: run / name for name in stage.reads} | {"ledger": run / "ledger.jsonl"}
        module.run(study, inputs, again, Tracker())
        findings = audits.read_findings(again)
        if audits.refusals(again, store.read_manifest(run / "synthetic").digest):
            with store.set_aside(out):
                again.rename(out)
    return findings


def run_stage(
    study: Study, stage: Stage, source: Path | None, run: Path, tracker: Tracker, *, replace: bool = False
) -> Manifest:
    """Run one stage unless its finished folder was made from the same settings and inputs.

    A certificate is made again, too, when ``replace`` is set and the active key is not the one that signed it, or more
    was reserved for its patients since; the latter without ``replace`` as long as nothing was released.

    Raises:
        StoreError: the folder was made from others, and ``replace`` is not set.
    """
    out = run / stage.folder
    store.settle(out, replace=replace)
    if store.is_done(out):
        manifest = store.read_manifest(out)
        changed = _changes(study, stage, manifest, run)
        grown = not changed and stage.verb == "certify" and _spent_since(manifest, run)
        aged = [_GROWN] * grown + [_RESIGNED] * (not changed and stage.verb == "certify" and _key_replaced(out))
        again = replace or (grown and not (run / "release").exists())
        if not changed and not (aged and again):
            told = "".join(f"; {why}" for why in aged) + (": --replace certifies again" if aged else "")
            logs.say(f"{stage.verb}: finished before, skipped{told}")
            return manifest
        if changed and not replace:
            raise StoreError(
                f"'{stage.folder}' was made from other {' and '.join(changed)}: pass --replace to make it again "
                "(privacy that was spent stays spent), or use a new run folder"
            )
    inputs = {name: run / name for name in stage.reads} | {"ledger": run / "ledger.jsonl", "keys": signing_keys()}
    if source is not None:
        inputs["source"] = source
    if stage.verb in CHARGING and store.is_done(run / "cohort"):
        inputs["account"] = account_of(run).folder
    logs.say(f"{stage.verb}: started")
    started = time.monotonic()
    module = importlib.import_module(f"medsynth.stages.{stage.verb}")
    with store.set_aside(out), tracker.stage(stage.verb) as nested:
        manifest = module.run(study, inputs, out, nested)
        elapsed_s = time.monotonic() - started
        nested.metrics({"elapsed_s": elapsed_s})
        _keep_resources(run, stage.verb, elapsed_s)
        for name, parent in manifest.parents.items():
            nested.dataset(name, parent, "input")
        nested.params({"output": stage.folder, "digest": manifest.digest, "sensitivity": manifest.sensitivity})
    logs.say(f"{stage.verb}: finished", elapsed_s=round(elapsed_s, 1), sensitivity=manifest.sensitivity)
    return manifest


def _changes(study: Study, stage: Stage, manifest: Manifest, run: Path) -> Sequence[str]:
    changed = []
    if manifest.config_digest != config_digest(study, stage.verb):
        changed.append("settings")
    parents = {name: store.read_manifest(run / name).digest for name in manifest.parents if (run / name).exists()}
    if parents != dict(manifest.parents):
        changed.append("inputs")
    return changed


def refuse_withdrawn(run: Path) -> None:
    """Stop where audits of the certified pairs, repeated since, refuse them: what went out verifies still.

    Raises:
        CertificationError: says why, and what to do with certificate and release.
    """
    certificate, audit = run / "certificate", run / "audit"
    if not (store.is_done(certificate) and store.is_done(audit)):
        return
    signed, pairs = store.read_manifest(certificate), store.read_manifest(audit).parents.get("synthetic")
    if not signed.details.get("certified") or pairs != signed.parents["synthetic"]:
        return  # nothing was promised, or the audits are of other pairs
    if reasons := audits.refusals(audit, pairs):
        raise CertificationError(
            "since this run was certified, its audits refuse the release: hand out nothing more of it, tell whoever "
            "has it, and remove certificate/ and release/ of the run folder:\n" + "\n".join(f"  - {r}" for r in reasons)
        )


def _spent_since(manifest: Manifest, run: Path) -> bool:
    """Whether this or another study of the same patients reserved more since a certificate was signed."""
    if not manifest.details.get("certified"):
        return False
    ledger = open_ledger({"ledger": run / "ledger.jsonl", "account": account_of(run).folder})
    others = ledger.account.others(ledger.entries()).state if ledger.account is not None else ""
    return (ledger.head, others) != (manifest.details["ledger"], manifest.details["account"])


def _key_replaced(certificate: Path) -> bool:
    """Whether another key than the active one signed a certificate; no key signed one that is marked UNCERTIFIED."""
    path = certificate / PUBLIC_KEY
    if not path.is_file():
        return False
    try:
        return path.read_bytes() != keys.public(signing_keys())
    except MedsynthError:  # half of a key, none or nonsense: signing again says what is wrong
        return True


def _headline(run: Path) -> dict[str, float]:
    """Return what studies are compared by, for the parent run (internal, like the report that it is read from)."""
    path = run / "report" / "report.json"
    if not path.is_file():
        return {}
    report = json.loads(path.read_text(encoding="utf-8"))
    values = {f"dice/{name}": found["mean"] for name, found in report["dice"].items()}
    values |= {f"skill/{name}": found.get("skill") for name, found in report["dice"].items() if name != "real_only"}
    values |= {"floor": report["floor"]["mean"]}
    values |= {"epsilon": round_up(report["epsilon"])} if report["epsilon"] != "inf" else {}
    values |= {"agreement": report["agreement"]["mean"]} if report["agreement"] else {}
    return {name: value for name, value in values.items() if isinstance(value, float)}


def stored_study(run: Path) -> Path:
    """Return the file of the study that a run was last started with.

    Raises:
        StoreError: the run folder holds none.
    """
    path = run / STUDY
    if not path.is_file():
        raise StoreError(f"the run folder holds no {STUDY}: run a stage of its study first")
    return path


def _keep_study(study: Study, run: Path) -> None:
    """Store the study in the run, so that its audits can be run again without the configuration at hand."""
    store.write_bytes(run / STUDY, configuration.dump(study).encode())


def _keep_resources(run: Path, verb: str, elapsed_s: float) -> None:
    path = run / RESOURCES
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    peak_kib = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    kept[verb] = {
        "elapsed_s": round(elapsed_s, 1),
        "peak_memory_gib": round(peak_kib / 2**20, 2),
        "machine_memory_gib": round(_machine_memory() / 2**30, 2),
    }
    store.write_bytes(path, (json.dumps(kept, indent=1) + "\n").encode())


def _machine_memory() -> int:
    """Return the bytes that this process may use: those of the machine, or of its container (cgroup v2)."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return machine


def _meet_ranks() -> None:
    """Join the processes that ``torchrun`` started, before hours of work of which they would see nothing."""
    if rank_and_size()[1] > 1:
        from medsynth.privacy.distributed import open_ranks

        open_ranks()


def _dismiss_ranks() -> None:
    if rank_and_size()[1] > 1:
        from medsynth.privacy.distributed import open_ranks

        open_ranks().call(None)
