"""Ingest: the hospital's files become pseudonymous patients on the study's grid; what cannot be used is quarantined."""

from __future__ import annotations

import contextlib
import csv
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from medsynth import accidents, logs
from medsynth.config import Study
from medsynth.errors import InputError, MedsynthError
from medsynth.imaging.cohort import CASE_COLUMNS, CASES_FILE, write_case
from medsynth.imaging.deidentify import (
    QUARANTINE_FILE,
    Pseudonyms,
    References,
    create_pseudonyms,
    key_id,
    reference_person,
    reference_picture,
    relative,
    write_references,
)
from medsynth.imaging.layouts import Case, discover
from medsynth.imaging.refusal import REASONS, CaseRefused
from medsynth.randomness import derive_seed
from medsynth.site import site_key
from medsynth.stages.inputs import config_digest
from medsynth.store import Manifest, create
from medsynth.tracking import Tracker

if TYPE_CHECKING:
    from torch import Tensor

    from medsynth.imaging.loading import Loaded

_SEED_SPAN = 1 << 63
_OF_NO_IMAGE = ("no_image", "patient_mismatch")  # of masks whose image is elsewhere
QUARANTINE_COLUMNS = ("ref", "ordinal", "kind", "reason", "message")


@dataclass(frozen=True)
class Row:
    """One line of ``cases.csv``."""

    case_id: str
    patient_id: str
    split: str
    source: str
    records: int
    labelled: bool
    content: str = field(repr=False)


@dataclass(frozen=True)
class Outcome:
    """What became of the cases, in the order of discovery."""

    rows: tuple[Row, ...]
    refused: tuple[tuple[Case, CaseRefused], ...]
    references: frozenset[str] = field(repr=False)

    @property
    def reasons(self) -> Counter[str]:
        """How many cases were refused for which reason."""
        return Counter(refusal.reason for _, refusal in self.refused)


def run(config: Study, inputs: Mapping[str, Path], out: Path, tracker: Tracker) -> Manifest:
    """Read the hospital's folder and write the cohort.

    Args:
        config: the study.
        inputs: ``"source"``: the hospital's folder.
        out: the cohort folder to make.
        tracker: gets two counts and nothing else.

    Raises:
        InputError: nothing usable in the input, or a split with an empty side.
        StoreError: ``out`` exists or cannot be written, or the site's key cannot.
    """
    source = inputs.get("source")
    if source is None:
        raise InputError(
            "no cohort was given: add --input with the hospital's folder (DICOM, MSD, nnU-Net or image pairs)"
        )
    with create(out, "ingest", config_digest(config, "ingest")) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # readers warn with the values of headers, which may name a patient
        cases = discover(source, config.ingest)
        _warn_of_twins(cases)
        names, key = create_pseudonyms(folder.path), site_key()
        outcome = _read_all(config, cases, source, folder.path, names, key)
        _check(config, outcome)
        write_references(folder.path, References(key_id(key), outcome.references))
        _write_csv(folder.path / CASES_FILE, CASE_COLUMNS, [_as_text(row) for row in outcome.rows])
        refusals = _refusals(outcome.refused, source, names)
        _write_csv(folder.path / QUARANTINE_FILE, QUARANTINE_COLUMNS, refusals)
        patients = len({row.patient_id for row in outcome.rows})
        reasons = dict(sorted(outcome.reasons.items()))
        logs.say("ingest", patients=patients, cases=len(outcome.rows), quarantined=len(outcome.refused), **reasons)
        tracker.metrics({"patients": patients, "quarantined": len(outcome.refused)})
        details = {"patients": patients, "cases": len(outcome.rows), "quarantined": reasons}
        return folder.finish("private", details=details)


def split_of(person: str, config: Study) -> str:
    """Return the split of a person from the study's seed and that person alone: nobody else's arrival moves it."""
    draw = derive_seed(config.seed, "split", person) / _SEED_SPAN
    return "test" if draw < config.ingest.test_fraction else "train"


def _warn_of_twins(cases: Sequence[Case]) -> None:
    """Say how many identifiers differ in upper and lower case alone: a person under two of them counts twice."""
    people = {case.person for case in cases}
    twins = len(people) - len({person.casefold() for person in people})
    if twins:
        logs.say(
            "ingest: identifiers that differ in upper and lower case alone count as different patients: make them one "
            "where they are one person's",
            more_than_one=twins,
        )


def _read_all(config: Study, cases: Sequence[Case], source: Path, out: Path, names: Pseudonyms, key: bytes) -> Outcome:
    rows: list[Row] = []
    references: set[str] = set()
    refused: list[tuple[Case, CaseRefused]] = []
    owner_of: dict[str, str] = {}
    trained = {case.person for case in cases if case.split == "train" and case.refused not in _OF_NO_IMAGE} - {""}
    for case in logs.progress(cases, "ingest", total=len(cases)):
        try:
            if case.split == "test" and case.person in trained:
                raise CaseRefused("patient_in_both_splits")
            row, values = _read_one(config, case, relative(case.images[0], source), out, names, owner_of)
            rows.append(row)
            references.add(reference_picture(key, values))
            # Names of files are no identity: two hospitals both have a case_001.
            references |= {reference_person(key, case.person)} if case.source == "dicom" else set()
        except CaseRefused as refusal:
            refused.append((case, refusal))
    return Outcome(tuple(rows), tuple(refused), frozenset(references))


def _read_one(
    config: Study, case: Case, place: str, out: Path, names: Pseudonyms, owner_of: dict[str, str]
) -> tuple[Row, str]:
    """Load, check and write one case; return its row and the digest of its voxel values.

    ``owner_of`` (content to person) is the caller's register and is added to.
    """
    with _refusing_unforeseen():
        loaded, images, labels = _on_grid(config, case)
        content, values = loaded.content, loaded.values
    if owner_of.setdefault(content, case.person) != case.person:
        raise CaseRefused("duplicate_content")
    case_id = names.case(place)
    write_case(out, case_id, images, labels, config.grid)
    row = Row(
        case_id=case_id,
        patient_id=names.patient(case.person),
        split=case.split or split_of(case.person, config),
        source=case.source,
        records=len(images),
        labelled=loaded.labelled,
        content=content,
    )
    return row, values


def _on_grid(config: Study, case: Case) -> tuple[Loaded, Tensor, Tensor]:
    """Return a case as the hospital stores it, and its images and label maps on the study's grid."""
    from medsynth.imaging.loading import load_case
    from medsynth.imaging.transforms import resampled_voxels, to_grid

    loaded = load_case(case, config.grid, config.ingest)
    wanted = config.ingest.min_foreground_voxels
    if loaded.labelled and int((loaded.label > 0).sum()) < wanted:
        raise CaseRefused("empty_label")
    voxels = resampled_voxels(loaded.label.shape, loaded.affine, config.grid) * config.grid.channels
    if voxels > config.ingest.max_voxels:
        raise CaseRefused("too_large")  # one wrong spacing would ask for more memory than any machine has
    images, labels = to_grid(loaded.image, loaded.label, loaded.affine, config.grid, config.ingest.min_kept_foreground)
    if loaded.labelled and int((labels > 0).sum()) < wanted:
        raise CaseRefused("empty_label")
    return loaded, images, labels


@contextlib.contextmanager
def _refusing_unforeseen() -> Iterator[None]:
    """Refuse the case at hand, not the cohort, for what nobody foresaw; a machine out of memory is not its fault."""
    try:
        yield
    except (MedsynthError, MemoryError):
        raise
    except OSError as error:
        raise CaseRefused("unreadable_file") from error
    except Exception as error:
        if "can't allocate memory" in str(error):  # torch's way to say it, by a RuntimeError
            raise
        raise CaseRefused("unforeseen", accidents.describe(error)) from error


def _check(config: Study, outcome: Outcome) -> None:
    found = "; ".join(f"{count} x {reason} ({REASONS[reason]})" for reason, count in outcome.reasons.most_common())
    if not outcome.rows:
        raise InputError(f"no usable case among {len(outcome.refused)} found: {found}")
    splits = {row.split for row in outcome.rows}
    if splits != {"train", "test"}:
        have = ", ".join(sorted(splits))
        raise InputError(
            f"all usable patients fell into '{have}': "
            + (
                "at least two patients are needed"
                if len({row.patient_id for row in outcome.rows}) == 1
                else f"change ingest.test_fraction (now {config.ingest.test_fraction:g}) or seed (now {config.seed})"
                if config.ingest.split == "hash"
                else "the train folder and the val or test folder each need at least one usable case"
            )
            + (f". {len(outcome.refused)} were refused: {found}" if found else "")
        )


def _refusals(refused: Sequence[tuple[Case, CaseRefused]], source: Path, names: Pseudonyms) -> list[dict[str, str]]:
    return [
        {
            "ref": names.reference(relative(case.images[0], source)),
            "ordinal": str(ordinal),
            "kind": case.source,
            "reason": refusal.reason,
            "message": str(refusal),
        }
        for ordinal, (case, refusal) in enumerate(refused, start=1)
    ]


def _as_text(row: Row) -> dict[str, str]:
    return {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in asdict(row).items()}


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
