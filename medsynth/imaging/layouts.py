"""How hospitals and data sets lay out their files: each layout is turned into the same list of case descriptions.

Known: a tree of DICOM series (with SEG objects), MSD (``dataset.json`` with a ``training`` list), nnU-Net raw
(``imagesTr`` with ``_0000``, ``labelsTr``), image/mask folders, and ``mixed`` (``dicom/`` beside ``nifti/``).
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from medsynth.config import Ingest
from medsynth.errors import InputError
from medsynth.imaging.refusal import CaseRefused
from medsynth.imaging.tree import files_below

Split = Literal["train", "test"]
SPLIT_FOLDERS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "test",
    "valid": "test",
    "validation": "test",
    "test": "test",
}
NIFTI = (".nii.gz", ".nii")
RASTER = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
MASK_FOLDERS = ("masks", "labels")
_MIN_DICOM_BYTES = 132  # preamble and "DICM", PS3.10 section 7.1


@dataclass(frozen=True)
class Case:
    """One image with its mask, as found; nothing has been read but headers and lists.

    Attributes:
        source: kind of file.
        person: the hospital's own identifier of the patient, "" where there is none; never leaves ingest.
        images: all files of one DICOM series, or one image file.
        labels: SEG objects or one mask file; empty where there is none.
        split: where the input's folders say so.
        label_names: value to name as the data set declares it.
        refused: reason found during discovery (see :mod:`medsynth.imaging.refusal`).
        picture: SOP Instance UID of a DICOM image without a place in the patient; "" for all others.
    """

    source: Literal["dicom", "nifti", "raster"]
    person: str
    images: tuple[Path, ...]
    labels: tuple[Path, ...] = ()
    split: Split | None = None
    label_names: Mapping[int, str] = field(default_factory=dict)
    refused: str | None = None
    picture: str = ""


def discover(root: Path, settings: Ingest) -> list[Case]:
    """List the cases below ``root``, in a stable order.

    Raises:
        InputError: no folder or one that may not be read, no known layout, no case, or ``split: folders`` without train
            and test folders.
    """
    if not root.is_dir():
        raise InputError("the input is no folder: give the folder that holds the cohort")
    try:
        return _discover(root, settings)
    except OSError as error:  # without its path, which may name a patient
        raise InputError(
            f"a folder of the input cannot be read ({error.strerror}): give the user who runs this the right to read it"
        ) from None


def _discover(root: Path, settings: Ingest) -> list[Case]:
    if settings.split == "hash":
        cases = list(_cases(root, settings.layout, settings))
    else:
        cases = [
            replace(case, split=split)
            for folder, split in _split_folders(root)
            for case in _cases(folder, settings.layout, settings)
        ]
    if not cases:
        raise InputError(
            "no case found in the input: expected DICOM series, MSD or nnU-Net (dataset.json), or images/ beside masks/"
        )
    return cases


def detect(root: Path) -> str:
    """Name the layout of a folder.

    Raises:
        InputError: none of the known layouts.
    """
    if (root / "dicom").is_dir() and (root / "nifti").is_dir():
        return "mixed"
    if (root / "dataset.json").is_file():
        return "msd" if _description(root).get("training") else "nnunet"
    if (root / "imagesTr").is_dir():
        return "nnunet"
    if _pair_folders(root):
        return "pairs"
    if any(_looks_like_dicom(path) for path in files_below(root)):
        return "dicom"
    raise InputError(
        "the input has no known layout: expected DICOM series, MSD or nnU-Net (dataset.json), images/ beside masks/, "
        "or dicom/ beside nifti/"
    )


def stem(path: Path) -> str:
    """Return a file's name without its imaging suffix; an accent is one letter however it is stored (macOS has two)."""
    for suffix in (*NIFTI, *RASTER):
        if path.name.lower().endswith(suffix):
            return unicodedata.normalize("NFC", path.name[: -len(suffix)])
    return unicodedata.normalize("NFC", path.stem)


def _cases(root: Path, layout: str, settings: Ingest) -> Iterator[Case]:
    yield from _READERS[detect(root) if layout == "auto" else layout](root, settings)


def _split_folders(root: Path) -> list[tuple[Path, Split]]:
    found = [(p, SPLIT_FOLDERS[p.name.lower()]) for p in sorted(root.iterdir()) if p.name.lower() in SPLIT_FOLDERS]
    if {split for _, split in found} != {"train", "test"}:
        raise InputError("ingest.split is 'folders': the input needs a folder train/ and a folder val/ or test/")
    return found


def _person(name: str, settings: Ingest) -> str:
    """Apply the linkage rule: the first group of ``patient_id_pattern``, or the whole name."""
    if settings.patient_id_pattern is None:
        return name
    match = re.search(settings.patient_id_pattern, name)
    return (match.group(1) or "") if match else ""


def _dicom(root: Path, settings: Ingest) -> Iterator[Case]:
    from medsynth.imaging.dicom_series import Series, find_series, images_of

    findings = find_series(root)
    labels: dict[Series, list[Path]] = {series: [] for series in findings.images}
    refused: dict[Series, str] = {}
    for segmentation in findings.segmentations:
        try:
            images = images_of(segmentation, findings.images)
        except CaseRefused as refusal:
            yield Case("dicom", segmentation.patient, segmentation.files, refused=refusal.reason)
            continue
        for image in images:
            labels[image] += segmentation.files
            if segmentation.suspect:
                refused.setdefault(image, "truncated_dicom")
    for series in findings.images:
        if series.voxels > settings.max_voxels:
            refused.setdefault(series, "too_large")
        if series.synthetic:
            refused.setdefault(series, "synthetic")
        if series.disputed:
            refused.setdefault(series, "disputed_picture")
        reason = "truncated_dicom" if series.suspect else refused.get(series)
        masks = tuple(labels[series])
        yield Case("dicom", series.patient, series.files, masks, refused=reason, picture=series.picture)
    for path in findings.unreadable:
        yield Case("dicom", "", (path,), refused="truncated_dicom")
    for folder in findings.closed:
        yield Case("dicom", "", (folder,), refused="unreadable_folder")


def _msd(root: Path, settings: Ingest) -> Iterator[Case]:
    """Medical Segmentation Decathlon (Antonelli et al. 2022): ``labels`` maps a value to its name."""
    description = _description(root)
    names = {int(value): str(name) for value, name in dict(description.get("labels") or {}).items()}
    for listed in description.get("training") or []:
        entry = {"image": listed} if isinstance(listed, str) else listed
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
            raise InputError("dataset.json of the input: each entry of 'training' needs a text 'image' (and 'label')")
        image = root / entry["image"]
        label = (root / entry["label"],) if entry.get("label") else ()
        yield Case("nifti", _person(stem(image), settings), (image,), label, label_names=names)


def _nnunet(root: Path, settings: Ingest) -> Iterator[Case]:
    """nnU-Net v2 raw (documentation/dataset_format.md): ``labels`` maps a name to its value."""
    description = _description(root) if (root / "dataset.json").is_file() else {}
    labels = dict(description.get("labels") or {})
    names = {value: str(name) for name, value in labels.items() if isinstance(value, int)}
    channels: dict[str, list[Path]] = {}
    for path in _files(root / "imagesTr"):
        channels.setdefault(re.sub(r"_\d{4}$", "", stem(path)), []).append(path)
    masks = _by_name(root / "labelsTr")
    for name, images in channels.items():
        case = _with_mask(images[0], name, masks, settings)
        refused = "channel_mismatch" if len(images) > 1 else case.refused
        yield replace(case, images=tuple(images), label_names=names, refused=refused)
    yield from _without_image(masks, channels.keys(), settings)
    yield from _of_no_known_kind(root / "imagesTr")


def _by_name(*folders: Path) -> dict[str, list[Path]]:
    """Return the files of folders by their names without suffix."""
    found: dict[str, list[Path]] = {}
    for folder in folders:
        for path in _files(folder):
            found.setdefault(stem(path), []).append(path)
    return found


def _with_mask(image: Path, name: str, masks: Mapping[str, list[Path]], settings: Ingest) -> Case:
    """Return an image with the mask of its name; which of several is meant, nobody knows."""
    found = masks.get(name, [])
    refused = "several_masks" if len(found) > 1 else None
    return Case(_kind(image), _person(name, settings), (image,), tuple(found), refused=refused)


def _without_image(masks: Mapping[str, list[Path]], images: Collection[str], settings: Ingest) -> Iterator[Case]:
    """A misspelt name leaves a mask without image beside an image without mask: both are told."""
    for name, found in masks.items():
        if name not in images:
            yield from (Case(_kind(mask), _person(name, settings), (mask,), refused="no_image") for mask in found)


def _of_no_known_kind(folder: Path) -> Iterator[Case]:
    """What lies among the images and is none that can be read is told: it may be a patient's."""
    for path in _listed(folder):
        if not _readable(path):
            yield Case("raster", "", (path,), refused="unknown_kind")


def _pairs(root: Path, settings: Ingest) -> Iterator[Case]:
    for folder in _pair_folders(root):
        masks = _by_name(*(folder / name for name in MASK_FOLDERS))
        for image in _files(folder / "images"):
            yield _with_mask(image, stem(image), masks, settings)
        yield from _without_image(masks, {stem(image) for image in _files(folder / "images")}, settings)
        yield from _of_no_known_kind(folder / "images")


def _mixed(root: Path, settings: Ingest) -> Iterator[Case]:
    yield from _dicom(root / "dicom", settings)
    yield from _cases(root / "nifti", "auto", settings)


_READERS: Mapping[str, Callable[[Path, Ingest], Iterator[Case]]] = {
    "dicom": _dicom,
    "msd": _msd,
    "nnunet": _nnunet,
    "pairs": _pairs,
    "mixed": _mixed,
}


def _pair_folders(root: Path) -> list[Path]:
    """Return ``root`` or those of its train/val/test folders that hold images beside masks."""
    folders = [root, *(p for p in sorted(root.iterdir()) if p.name.lower() in SPLIT_FOLDERS)]
    return [f for f in folders if (f / "images").is_dir() and any((f / name).is_dir() for name in MASK_FOLDERS)]


def _files(folder: Path) -> list[Path]:
    return [path for path in _listed(folder) if _readable(path)]


def _listed(folder: Path) -> list[Path]:
    """Return what a folder holds, hidden files left out; nothing where there is no folder."""
    return sorted(path for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []


def _readable(path: Path) -> bool:
    return path.name.lower().endswith((*NIFTI, *RASTER))


def _kind(path: Path) -> Literal["nifti", "raster"]:
    return "nifti" if path.name.lower().endswith(NIFTI) else "raster"


def _description(root: Path) -> dict[str, Any]:
    try:
        description = json.loads((root / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError("dataset.json of the input cannot be read: it must be valid JSON") from None
    if not isinstance(description, dict):
        raise InputError("dataset.json of the input must be a JSON object")
    return description


def _looks_like_dicom(path: Path) -> bool:
    if path.suffix.lower() in (".dcm", ".dicom", ".ima"):
        return True
    try:
        with path.open("rb") as handle:
            return handle.read(_MIN_DICOM_BYTES)[128:] == b"DICM"
    except OSError:
        return False
