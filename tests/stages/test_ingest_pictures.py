"""DICOM images that lie nowhere in the patient (X-rays, ultrasound, endoscopy): each instance is a picture."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from ingesting import ingested, rows
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit, generate_uid

from medsynth import config
from medsynth.config import Study
from medsynth.imaging.cohort import load_patients
from medsynth.imaging.dicom_segmentation import write_segmentation
from medsynth.imaging.dicom_writer import SeriesMeta, write_series
from medsynth.imaging.layouts import discover
from medsynth.imaging.loading import Loaded, load_case
from medsynth.imaging.transforms import to_grid

# As ingest does: every reader that MONAI registers and we never use would warn.
pytestmark = pytest.mark.filterwarnings("ignore:NvImgCodec")
DIGITAL_X_RAY = "1.2.840.10008.5.1.4.1.1.1.1"
ENDOSCOPIC = "1.2.840.10008.5.1.4.1.1.77.1.1"
CT = "1.2.840.10008.5.1.4.1.1.2"
LABELS = {0: "background", 1: "left lung", 2: "right lung"}
SIZE = (24, 16)  # columns, rows


def study(ingest: dict[str, Any] | None = None, **grid: Any) -> Study:
    return config.parse(
        {
            "name": "pictures",
            "grid": {"spatial_dims": 2, "shape": [16, 16], "labels": LABELS, **grid},
            "privacy": {"declared_patients": 16},
            "ingest": {"test_fraction": 0.5, **(ingest or {})},
            "encode": {"levels": 1},
            "masks": {"coefficients": [4, 4]},
            "train": {"appearance": {"coefficients": [2, 2]}},
        }
    )


def chest(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an image and its label map, (column, row)."""
    image = np.random.default_rng(seed).integers(100, 4000, SIZE).astype(np.uint16)
    label = np.zeros(SIZE, np.uint8)
    label[3 : 9 + seed % 3, 4:12] = 1
    label[14:21, 4:12] = 2
    return image, label


def put(
    root: Path, person: str, image: np.ndarray, label: np.ndarray | None, sop_class: str = DIGITAL_X_RAY, **header: Any
) -> Path:
    meta = SeriesMeta("DX", person, "Zyxwvut^Planted", synthetic=False, colour=image.ndim == 3)
    series = write_series(root / person / "image", image, None, meta)
    path = root / person / "image" / "00001.dcm"
    series[0].SOPClassUID = series[0].file_meta.MediaStorageSOPClassUID = sop_class
    series[0].update(header)
    series[0].save_as(path, enforce_file_format=True)
    if label is not None:
        write_segmentation(root / person / "seg.dcm", label, series, LABELS)
    return path


def loaded(source: Path, settings: Study) -> list[Loaded]:
    cases = sorted(discover(source, settings.ingest), key=lambda case: case.images)
    return [load_case(case, settings.grid, settings.ingest) for case in cases]


def test_x_rays_with_segmentations_become_a_cohort(tmp_path: Path) -> None:
    for index in range(6):
        put(tmp_path / "in", f"P{index}", *chest(index))

    assert ingested(study(), tmp_path / "in", tmp_path / "out") == []

    patients = [p for split in ("train", "test") for p in load_patients(tmp_path / "out", study().grid, split)]
    assert len(patients) == 6
    assert all(set(np.unique(patient.labels)) == {0, 1, 2} for patient in patients)


def test_image_and_mask_keep_their_pixels(tmp_path: Path) -> None:
    image, label = chest(0)
    put(tmp_path, "P0", image, label)

    (found,) = loaded(tmp_path, study())

    assert np.array_equal(found.image[0].numpy(), image.astype(np.float32))
    assert np.array_equal(found.label.numpy(), label)
    assert found.affine is None


def test_each_picture_of_a_series_takes_its_own_mask(tmp_path: Path) -> None:
    frontal, lateral = chest(1), chest(2)
    put(tmp_path, "a", *frontal)
    uid = pydicom.dcmread(tmp_path / "a" / "image" / "00001.dcm").SeriesInstanceUID
    put(tmp_path, "b", lateral[0], None, SeriesInstanceUID=uid)
    second_image = pydicom.dcmread(tmp_path / "b" / "image" / "00001.dcm")
    write_segmentation(tmp_path / "b" / "seg.dcm", lateral[1], [second_image], LABELS)
    for path in tmp_path.rglob("*.dcm"):
        dataset = pydicom.dcmread(path)
        dataset.PatientID = "P0"
        dataset.save_as(path)

    first, second = loaded(tmp_path, study())

    assert np.array_equal(first.label.numpy(), frontal[1])
    assert np.array_equal(second.label.numpy(), lateral[1])
    assert {case.person for case in discover(tmp_path, study().ingest)} == {"P0"}


def test_a_segmentation_of_one_picture_is_not_the_other_ones(tmp_path: Path) -> None:
    path = put(tmp_path, "P0", *chest(1))
    other = pydicom.dcmread(path)
    other.SOPInstanceUID = other.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    other.save_as(path.with_name("00002.dcm"))

    cases = sorted(discover(tmp_path, study().ingest), key=lambda case: case.images)

    assert [len(case.labels) for case in cases] == [1, 0]


def test_an_inverted_x_ray_is_turned_as_viewers_show_it(tmp_path: Path) -> None:
    image, label = chest(0)
    put(tmp_path, "P0", image, label, PhotometricInterpretation="MONOCHROME1")

    (found,) = loaded(tmp_path, study())

    shown = found.image[0].numpy()
    assert np.corrcoef(shown.ravel(), image.ravel())[0, 1] == pytest.approx(-1)


@pytest.mark.parametrize("keyword", ["PixelSpacing", "ImagerPixelSpacing"])
def test_a_grid_in_millimetres_takes_the_size_of_the_pixels(tmp_path: Path, keyword: str) -> None:
    image, label = chest(0)
    put(tmp_path, "P0", image, label, **{keyword: ["0.5", "0.25"]})  # rows 0.5 mm, columns 0.25 mm
    settings = study(spacing_mm=[0.5, 0.5], shape=[16, 16])

    (found,) = loaded(tmp_path, settings)
    _, labels = to_grid(found.image, found.label, found.affine, settings.grid)

    # 24 columns of 0.25 mm are 12 of the grid's, 16 rows of 0.5 mm are 16.
    assert int((labels[0] > 0).any(1).sum()) == pytest.approx((6 + 7) / 2, abs=1)
    assert int((labels[0] > 0).any(0).sum()) == 8


@pytest.mark.parametrize(("channels", "stored"), [(1, 3), (3, 1)])
def test_colour_and_grey_come_as_the_grid_asks_for(tmp_path: Path, channels: int, stored: int) -> None:
    grey, label = chest(0)
    eight = (grey // 16).astype(np.uint8)
    colour = np.stack([eight, eight // 2, 255 - eight], -1)
    put(tmp_path, "P0", eight if stored == 1 else colour, label, ENDOSCOPIC)

    (found,) = loaded(tmp_path, study(channels=channels))

    assert found.image.shape == (channels, *SIZE)
    if stored == 3:
        luminance = np.asarray(Image.fromarray(colour).convert("L"), np.float32)
        assert np.abs(found.image[0].numpy() - luminance).max() <= 1


def test_a_photograph_in_jpeg_has_the_colours_of_every_viewer(tmp_path: Path) -> None:
    across = np.linspace(0, 255, SIZE[0])[:, None] + np.zeros(SIZE[1])
    colour = np.stack([across, 255 - across, np.full(SIZE, 40.0)], -1).astype(np.uint8)
    path = put(tmp_path, "P0", colour, chest(0)[1], ENDOSCOPIC)
    coded = io.BytesIO()
    Image.fromarray(np.swapaxes(colour, 0, 1)).save(coded, "JPEG", quality=95)
    dataset = pydicom.dcmread(path)
    dataset.PixelData = encapsulate([coded.getvalue()])
    dataset["PixelData"].is_undefined_length = True
    dataset.PhotometricInterpretation, dataset.file_meta.TransferSyntaxUID = "YBR_FULL_422", JPEGBaseline8Bit
    dataset.save_as(path)

    (found,) = loaded(tmp_path, study(channels=3))

    assert np.abs(found.image.numpy() - np.moveaxis(colour, -1, 0)).mean() < 6


def without_source(path: Path) -> None:
    dataset = pydicom.dcmread(path)
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        del frame.DerivationImageSequence
    dataset.save_as(path)


def smaller(path: Path) -> None:
    image, label = chest(0)
    put(path.parent.parent / "elsewhere", "P9", image[:20], label[:20])
    other = pydicom.dcmread(path.parent.parent / "elsewhere" / "P9" / "seg.dcm")
    dataset = pydicom.dcmread(path)
    other.PatientID, other.ReferencedSeriesSequence = dataset.PatientID, dataset.ReferencedSeriesSequence
    other.save_as(path)
    shutil.rmtree(path.parent.parent / "elsewhere")


@pytest.mark.parametrize(("spoil", "reason"), [(without_source, "unplaced_mask"), (smaller, "shape_mismatch")])
def test_a_mask_that_cannot_lie_on_its_picture_is_quarantined(tmp_path: Path, spoil: Any, reason: str) -> None:
    for index in range(6):
        put(tmp_path / "in", f"P{index}", *chest(index))
    spoil(tmp_path / "in" / "P2" / "seg.dcm")

    assert ingested(study(), tmp_path / "in", tmp_path / "out") == [reason]


def test_films_are_no_pictures(tmp_path: Path) -> None:
    for index in range(6):
        put(tmp_path / "in", f"P{index}", *chest(index))
    path = tmp_path / "in" / "P3" / "image" / "00001.dcm"
    dataset = pydicom.dcmread(path)
    dataset.NumberOfFrames = 2
    dataset.PixelData = dataset.PixelData * 2
    dataset.save_as(path)

    assert ingested(study(), tmp_path / "in", tmp_path / "out") == ["multiple_frames"]


def test_slices_that_lost_their_place_are_one_case_and_none_of_pictures(tmp_path: Path) -> None:
    for index in range(6):
        put(tmp_path / "in", f"P{index}", *chest(index))
    path = put(tmp_path / "in", "P9", chest(9)[0], None, CT)
    second = pydicom.dcmread(path)
    second.SOPInstanceUID = second.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    second.save_as(path.with_name("00002.dcm"))

    assert ingested(study({"require_labels": False}), tmp_path / "in", tmp_path / "out") == ["no_geometry"]


def in_one_series(tmp_path: Path, *pairs: tuple[np.ndarray, np.ndarray], people: tuple[str, ...] = ()) -> list[Path]:
    """Write pictures of one series, and their segmentations as instances of another one."""
    paths, series, masks = [], generate_uid(), generate_uid()
    for number, (image, label) in enumerate(pairs):
        path = put(tmp_path, f"{number}", image, label, SeriesInstanceUID=series)
        for each in (path, tmp_path / f"{number}" / "seg.dcm"):
            dataset = pydicom.dcmread(each)
            dataset.PatientID = people[number] if people else "P0"
            if each != path:
                dataset.SeriesInstanceUID = masks
                dataset.ReferencedSeriesSequence[0].SeriesInstanceUID = series
            dataset.save_as(each)
        paths.append(path)
    return paths


def test_segmentations_of_one_series_keep_their_own_pictures(tmp_path: Path) -> None:
    image, label = chest(2)
    pairs = chest(1), (image[:20], label[:20])
    in_one_series(tmp_path, *pairs)

    for found, (image, label) in zip(loaded(tmp_path, study()), pairs, strict=True):
        assert np.array_equal(found.image[0].numpy(), image.astype(np.float32))
        assert np.array_equal(found.label.numpy(), label)


def test_patients_that_share_a_series_by_mistake_do_not_decide_about_one_another(tmp_path: Path) -> None:
    in_one_series(tmp_path, chest(1), chest(2), people=("P0", "P1"))

    cases = discover(tmp_path, study().ingest)

    assert [(case.person, len(case.labels), case.refused) for case in cases] == [("P0", 1, None), ("P1", 1, None)]


def test_a_segmentation_of_an_image_that_was_not_sent_is_nobody_elses(tmp_path: Path) -> None:
    frontal, _ = in_one_series(tmp_path, chest(1), chest(2))
    frontal.unlink()

    cases = discover(tmp_path, study().ingest)

    assert sorted((case.refused or "", len(case.labels)) for case in cases) == [("", 1), ("no_image", 0)]


def test_a_segmentation_follows_its_picture_under_another_series(tmp_path: Path) -> None:
    image, label = chest(0)
    path = put(tmp_path, "P0", image, label)
    dataset = pydicom.dcmread(path)
    dataset.SeriesInstanceUID = generate_uid()
    dataset.save_as(path)

    (found,) = loaded(tmp_path, study())

    assert np.array_equal(found.label.numpy(), label)


def test_a_volume_keeps_its_segmentation_that_lists_a_capture_too(tmp_path: Path) -> None:
    image, label = np.stack([chest(i)[0] for i in range(3)], -1), np.stack([chest(i)[1] for i in range(3)], -1)
    meta = SeriesMeta("MR", "P0", "Zyxwvut^Planted", synthetic=False)
    series = write_series(tmp_path / "volume", image, np.eye(4), meta)
    segmentation = write_segmentation(tmp_path / "seg.dcm", label, series, LABELS)
    capture = pydicom.dcmread(put(tmp_path, "P0", chest(5)[0], None, "1.2.840.10008.5.1.4.1.1.7"))
    more, item = pydicom.Dataset(), pydicom.Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = capture.SOPClassUID, capture.SOPInstanceUID
    more.SeriesInstanceUID, more.ReferencedInstanceSequence = capture.SeriesInstanceUID, [item]
    segmentation.ReferencedSeriesSequence.append(more)
    segmentation.save_as(tmp_path / "seg.dcm")

    cases = discover(tmp_path, study().ingest)

    assert {bool(case.picture): len(case.labels) for case in cases} == {False: 1, True: 0}


def elsewhere(dataset: pydicom.Dataset) -> None:
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        frame.DerivationImageSequence[0].SourceImageSequence[0].SpatialLocationsPreserved = "REORIENTED_ONLY"


def told_for_all(dataset: pydicom.Dataset) -> None:
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        dataset.SharedFunctionalGroupsSequence[0].DerivationImageSequence = frame.DerivationImageSequence
        del frame.DerivationImageSequence


@pytest.mark.parametrize(("change", "refused"), [(elsewhere, ["unplaced_mask"]), (told_for_all, [])])
def test_masks_of_other_programs(tmp_path: Path, change: Any, refused: list[str]) -> None:
    for index in range(6):
        put(tmp_path / "in", f"P{index}", *chest(index))
    path = tmp_path / "in" / "P2" / "seg.dcm"
    dataset = pydicom.dcmread(path)
    change(dataset)
    dataset.save_as(path)

    assert ingested(study(), tmp_path / "in", tmp_path / "out") == refused


def test_an_x_ray_with_a_position_is_shown_like_one_without(tmp_path: Path) -> None:
    image, label = chest(0)
    put(tmp_path, "P0", image, label)
    position = {"ImagePositionPatient": [0, 0, 0], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
    put(tmp_path, "P1", image, None, PixelSpacing=["1", "1"], FrameOfReferenceUID=generate_uid(), **position)

    plain, placed = loaded(tmp_path, study({"require_labels": False}))

    assert np.array_equal(plain.image.numpy(), placed.image.numpy())


def test_a_picture_that_came_twice_counts_once_and_one_that_differs_is_quarantined(tmp_path: Path) -> None:
    for index in range(6):
        put(tmp_path / "in", f"P{index}", *chest(index))
    for person in ("P1", "P2"):
        path = tmp_path / "in" / person / "image" / "00001.dcm"
        shutil.copy(path, path.with_name("00002.dcm"))
    other = pydicom.dcmread(path)
    other.PixelData = other.PixelData[::-1]
    other.save_as(path)

    assert ingested(study(), tmp_path / "in", tmp_path / "out") == ["disputed_picture"] * 2
    assert len(rows(tmp_path / "out" / "cases.csv")) == 5


def test_pictures_of_two_patients_under_one_identifier_do_not_decide_about_one_another(tmp_path: Path) -> None:
    paths = in_one_series(tmp_path, chest(1), chest(2), people=("P0", "P1"))
    uid = pydicom.dcmread(paths[0]).SOPInstanceUID
    for path in paths:  # as a broken de-identifier leaves them
        dataset = pydicom.dcmread(path)
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = uid
        dataset.save_as(path)
        mask = path.parent.parent / "seg.dcm"
        segmentation = pydicom.dcmread(mask)
        segmentation.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0].ReferencedSOPInstanceUID = uid
        for frame in segmentation.PerFrameFunctionalGroupsSequence:
            frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID = uid
        segmentation.save_as(mask)

    cases = discover(tmp_path, study().ingest)

    assert [(case.person, len(case.labels), case.refused) for case in cases] == [("P0", 1, None), ("P1", 1, None)]
    for found, seed in zip(loaded(tmp_path, study()), (1, 2), strict=True):
        assert np.array_equal(found.label.numpy(), chest(seed)[1])


@pytest.mark.parametrize("shape", ["INVERSE", "IDENTITY"])
def test_inversion_and_padding_are_as_viewers_have_them(tmp_path: Path, shape: str) -> None:
    image, label = chest(0)
    image[:5] = 0
    header = {"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": shape, "PixelRepresentation": 0}
    put(tmp_path, "P0", image, label, PixelPaddingValue=0, **header)

    (found,) = loaded(tmp_path, study())

    shown = found.image[0].numpy()
    assert np.corrcoef(shown[5:].ravel(), image[5:].ravel())[0, 1] == pytest.approx(-1)
    assert (shown[:5] == shown.min()).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("colours", [1, 3])
def test_a_picture_is_the_same_in_dicom_and_in_png(tmp_path: Path, channels: int, colours: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3)).astype(np.uint8)
    image = image if colours == 3 else image[..., 0]
    label = chest(0)[1]
    put(tmp_path / "d", "P0", image, label, ENDOSCOPIC)
    for folder, array in (("images", image), ("masks", label)):
        (tmp_path / "p" / folder).mkdir(parents=True)
        Image.fromarray(np.swapaxes(array, 0, 1)).save(tmp_path / "p" / folder / "a.png")

    ((first,), (second,)) = (loaded(tmp_path / kind, study(channels=channels)) for kind in "dp")

    assert first.values == second.values and first.content == second.content
    assert np.array_equal(first.label, second.label)


def test_colours_of_a_palette_count_before_they_are_unfolded(tmp_path: Path) -> None:
    put(tmp_path, "P0", *chest(0), PhotometricInterpretation="PALETTE COLOR")

    (case,) = discover(tmp_path, study({"max_voxels": 2 * SIZE[0] * SIZE[1]}).ingest)

    assert case.refused == "too_large"


@pytest.mark.parametrize(
    ("name", "tag", "garbage"),
    [
        ("image/00001.dcm", b"\x10\x00\x20\x00LO", b"\x10\x00\x20\x00L)"),  # Patient ID in no known form
        ("seg.dcm", b"\x08\x00\x55\x11UI", b"\x08\x00\x55\x11L)"),  # Referenced SOP Instance UID likewise
        ("image/00001.dcm", b"5.1.4.1.1.1.1", b"5.1.4\\1.1.1.1"),  # two SOP classes
    ],
)
def test_one_damaged_byte_of_a_header_costs_one_patient_not_the_cohort(
    tmp_path: Path, name: str, tag: bytes, garbage: bytes
) -> None:
    for index in range(6):
        put(tmp_path / "in", f"P{index}", *chest(index))
    path = tmp_path / "in" / "P2" / name
    raw = path.read_bytes()
    at = raw.rindex(tag)
    path.write_bytes(raw[:at] + garbage + raw[at + len(tag) :])

    assert ingested(study(), tmp_path / "in", tmp_path / "out")
    assert len(rows(tmp_path / "out" / "cases.csv")) == 5
