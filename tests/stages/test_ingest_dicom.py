"""DICOM volumes as archives really hold them: what other programs leave out, write twice, or put beside the images."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from highdicom.seg import SegmentAlgorithmTypeValues, SegmentationTypeValues, SegmentDescription
from highdicom.seg import Segmentation as Written
from ingesting import AFFINE, LABELS, SHAPE, ingested, picture, put_dicom, rows, study
from pydicom.encaps import encapsulate
from pydicom.sr.codedict import codes
from pydicom.uid import JPEGLosslessSV1, RLELossless, generate_uid

from medsynth.imaging import dicom, dicom_labels, dicom_series
from medsynth.imaging.deidentify import explain
from medsynth.imaging.dicom_segmentation import write_segmentation
from medsynth.imaging.dicom_writer import SeriesMeta, write_series
from medsynth.imaging.layouts import Case, discover
from medsynth.imaging.loading import Loaded, load_case
from medsynth.imaging.refusal import CaseRefused
from medsynth.imaging.transforms import to_grid

# As ingest does: every reader that MONAI registers and we never use would warn.
pytestmark = pytest.mark.filterwarnings("ignore:NvImgCodec")

STORAGE = "1.2.840.10008.5.1.4.1.1."
UNLABELLED = study({"require_labels": False})


def found(source: Path) -> list[Case]:
    return sorted(discover(source, UNLABELLED.ingest), key=lambda case: case.images)


def only(source: Path) -> Loaded:
    (case,) = found(source)
    return load_case(case, UNLABELLED.grid, UNLABELLED.ingest)


def put(folder: Path, person: str, image: np.ndarray, affine: np.ndarray = AFFINE) -> list[pydicom.Dataset]:
    meta = SeriesMeta(modality="MR", patient_id=person, patient_name="Zyxwvut^Planted", synthetic=False)
    return write_series(folder, image, affine, meta)


def mask_on(slices: list[int]) -> np.ndarray:
    label = np.zeros(SHAPE, np.uint8)
    label[2:6, 3:7, slices] = 1
    return label


def forget_spacing(path: Path, thickness: float | None = None) -> None:
    """Take Spacing Between Slices out of a segmentation; it is required in few."""
    dataset = pydicom.dcmread(path)
    for group in (*dataset.SharedFunctionalGroupsSequence, *dataset.PerFrameFunctionalGroupsSequence):
        for measures in group.get("PixelMeasuresSequence", []):
            measures.pop("SpacingBetweenSlices", None)
            if thickness is not None:
                measures.SliceThickness = thickness
    dataset.pop("DimensionOrganizationType", None)
    dataset.save_as(path)


def in_world(label: np.ndarray, affine: np.ndarray) -> set[tuple[float, ...]]:
    return {tuple(place) for place in np.round(np.argwhere(label) @ affine[:3, :3].T + affine[:3, 3], 3)}


@pytest.mark.parametrize("slices", [[2], [2, 3, 4], [1, 3, 5], [2, 6]])
def test_a_segmentation_marks_no_slice_that_it_leaves_out(tmp_path: Path, slices: list[int]) -> None:
    """Its slices lie as far from each other as the image's where it does not say, not as its frames do."""
    label = mask_on(slices)
    write_segmentation(tmp_path / "seg.dcm", label, put(tmp_path / "image", "A", picture(0)[0]), LABELS)
    forget_spacing(tmp_path / "seg.dcm")

    loaded = only(tmp_path)

    assert loaded.affine is not None
    assert in_world(loaded.label.numpy(), loaded.affine) == in_world(label, AFFINE)


def test_a_segmentation_on_thicker_slices_than_the_image_s_is_read_as_it_is(tmp_path: Path) -> None:
    fine = AFFINE @ np.diag([1, 1, 0.5, 1])
    fine[2, 3] -= 0.5  # two of its slices in each of the other's
    image = np.repeat(picture(0)[0], 2, axis=2)
    coarse = put(tmp_path / "coarse", "A", picture(0)[0])
    write_segmentation(tmp_path / "seg.dcm", mask_on([2, 3]), coarse, LABELS)
    write_segmentation(tmp_path / "gap.dcm", mask_on([1, 2, 5]), coarse, LABELS)
    forget_spacing(tmp_path / "seg.dcm", thickness=2.0)
    forget_spacing(tmp_path / "gap.dcm", thickness=2.0)

    def read(name: str) -> np.ndarray:
        return dicom_labels.read_segmentation([tmp_path / name], image.shape, fine, UNLABELLED.grid, 10**6)

    assert sorted({int(z) for z in np.argwhere(read("seg.dcm"))[:, 2]}) == [4, 5, 6, 7]
    with pytest.raises(CaseRefused, match="Spacing Between Slices"):
        read("gap.dcm")


@pytest.mark.parametrize("slices", [[1, 2, 5], [2]])
def test_slices_that_overlap_are_no_thick_ones(tmp_path: Path, slices: list[int]) -> None:
    label = mask_on(slices)
    label[2:4, 8:10, slices[0]] = 2
    write_segmentation(tmp_path / "seg.dcm", label, put(tmp_path / "image", "A", picture(0)[0]), LABELS)
    forget_spacing(tmp_path / "seg.dcm", thickness=5.0)

    loaded = only(tmp_path)

    assert loaded.affine is not None
    assert in_world(loaded.label.numpy(), loaded.affine) == in_world(label, AFFINE)


def test_slices_that_overlap_and_leave_out_every_other_are_refused(tmp_path: Path) -> None:
    write_segmentation(tmp_path / "seg.dcm", mask_on([1, 3, 5]), put(tmp_path / "image", "A", picture(0)[0]), LABELS)
    forget_spacing(tmp_path / "seg.dcm", thickness=5.0)

    with pytest.raises(CaseRefused, match="Spacing Between Slices"):
        only(tmp_path)


def test_probabilities_mark_from_a_half_on(tmp_path: Path) -> None:
    image, label = picture(0)
    described = SegmentDescription(
        segment_number=1,
        segment_label="organ",
        segmented_property_category=codes.SCT.AnatomicalStructure,
        segmented_property_type=codes.SCT.AnatomicalStructure,
        algorithm_type=SegmentAlgorithmTypeValues.MANUAL,
    )
    Written(
        source_images=put(tmp_path / "image", "A", image),
        pixel_array=np.where(np.moveaxis(label, (0, 1, 2), (2, 1, 0)) > 0, 0.6, 0.4),
        segmentation_type=SegmentationTypeValues.FRACTIONAL,
        segment_descriptions=[described],
        series_instance_uid=generate_uid(),
        series_number=2,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="none",
        manufacturer_model_name="none",
        software_versions="1",
        device_serial_number="1",
        max_fractional_value=100,
    ).save_as(tmp_path / "seg.dcm")

    loaded = only(tmp_path)

    assert loaded.affine is not None
    assert in_world(loaded.label.numpy(), loaded.affine) == in_world(label, AFFINE)


def also_names(path: Path, other: pydicom.Dataset) -> None:
    dataset = pydicom.dcmread(path)
    more = copy.deepcopy(dataset.ReferencedSeriesSequence[0])
    more.SeriesInstanceUID = other.SeriesInstanceUID
    more.ReferencedInstanceSequence = [more.ReferencedInstanceSequence[0]]
    more.ReferencedInstanceSequence[0].ReferencedSOPInstanceUID = other.SOPInstanceUID
    dataset.ReferencedSeriesSequence.append(more)
    dataset.save_as(path)


@pytest.mark.parametrize("seed", range(3))  # which comes first is drawn with the identifiers
def test_of_two_volumes_that_a_segmentation_names_its_own_frame_of_reference_decides(tmp_path: Path, seed: int) -> None:
    image, label = picture(seed)
    first = put(tmp_path / "first", "A", image)
    second = put(tmp_path / "second", "A", image[::-1].copy())
    write_segmentation(tmp_path / "seg.dcm", label, second, LABELS)
    also_names(tmp_path / "seg.dcm", first[0])

    assert [(case.images[0].parent.name, len(case.labels)) for case in found(tmp_path)] == [("first", 0), ("second", 1)]


def test_a_segmentation_in_another_frame_of_reference_belongs_to_nobody(tmp_path: Path) -> None:
    image, label = picture(0)
    path = tmp_path / "seg.dcm"
    dataset = write_segmentation(path, label, put(tmp_path / "image", "A", image), LABELS)
    dataset.FrameOfReferenceUID = generate_uid()
    dataset.save_as(path)

    assert [(len(case.labels), case.refused) for case in found(tmp_path)] == [(0, None), (0, "geometry_mismatch")]


@pytest.mark.parametrize("seed", range(3))
def test_a_segmentation_that_names_another_patient_s_image_does_not_decide_about_it(tmp_path: Path, seed: int) -> None:
    for person in "AB":
        put_dicom(tmp_path, person, seed + ord(person))
    images = [pydicom.dcmread(next((tmp_path / person / "image").iterdir())) for person in "AB"]
    also_names(tmp_path / "B" / "seg" / "seg.dcm", images[0])
    assert [(case.person, len(case.labels), case.refused) for case in found(tmp_path)] == [
        ("A", 1, None),
        ("B", 1, None),
    ]

    shutil.rmtree(tmp_path / "B" / "image")

    assert [(case.person, len(case.labels), case.refused) for case in found(tmp_path)] == [
        ("A", 1, None),
        ("B", 0, "patient_mismatch"),
    ]


def round_field(shape: tuple[int, int, int], outside: int) -> np.ndarray:
    hounsfield = np.random.default_rng(0).normal(40, 100, shape)
    hounsfield[:, :4] = -1000
    x, y = np.mgrid[: shape[0], : shape[1]]
    beyond = (x - shape[0] / 2) ** 2 + (y - shape[1] / 2) ** 2 > (shape[0] / 2) ** 2
    stored = (hounsfield + 1024).clip(0, 4000).astype(np.int16)
    stored[beyond] = outside
    return stored


@pytest.mark.parametrize("written", ["SS", "US"])  # programs write signed values as if they were none
def test_padding_around_a_round_field_sets_no_contrast(tmp_path: Path, written: str) -> None:
    grids = []
    for name, outside in (("air", 24), ("padded", -2000)):
        put(tmp_path / name, name, round_field((32, 32, 8), outside))
        for path in (tmp_path / name).iterdir():
            dataset = pydicom.dcmread(path)
            dataset.RescaleIntercept, dataset.RescaleSlope = "-1024", "1"
            if name == "padded":
                dataset.add_new("PixelPaddingValue", written, outside if written == "SS" else 2**16 + outside)
            dataset.save_as(path)
        loaded = only(tmp_path / name)
        assert float(loaded.image.min()) == -1000
        grid = study(shape=[32, 32, 8]).grid
        grids.append(to_grid(loaded.image, loaded.label, loaded.affine, grid, 0.0)[0].numpy())

    assert np.array_equal(*grids)


def padded(path: Path, value: int = 5000) -> pydicom.Dataset:
    """Put one pixel of padding into a slice."""
    dataset = pydicom.dcmread(path)
    values = np.frombuffer(dataset.PixelData, "<i2").copy()
    values[0] = value
    dataset.PixelData = values.tobytes()
    dataset.add_new("PixelPaddingValue", "SS", value)
    dataset.save_as(path)
    return dataset


def test_padding_of_many_slices_is_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask of the volume a slice of it would take more memory than any machine has."""
    for path in put_dicom(tmp_path, "A", 0).iterdir():
        padded(path)
    volumes, looked = [], dicom._beside

    def beside(stored: np.ndarray, padding: Any) -> np.ndarray:
        volumes.append(stored.ndim == 3)
        return looked(stored, padding)

    monkeypatch.setattr(dicom, "_beside", beside)
    assert float(only(tmp_path).image.max()) < 5000
    assert sum(volumes) == 1


def test_slices_that_are_padded_differently_are_all_padded(tmp_path: Path) -> None:
    paths = sorted(put_dicom(tmp_path, "A", 0).iterdir())
    for path in paths[:3]:
        padded(path, -6000)
    for path in paths[3:]:
        padded(path, -5000)

    image = only(tmp_path).image

    assert 0 <= float(image.min()) < float(image.max()) < 1000


@pytest.mark.parametrize("inverted", [False, True])
def test_padding_is_found_however_it_is_said(tmp_path: Path, inverted: bool) -> None:
    """With an empty limit of its range; in values that are shown inverted."""
    for path in put_dicom(tmp_path, "A", 0).iterdir():
        dataset = padded(path)
        dataset.add_new("PixelPaddingRangeLimit", "SS", None)
        dataset.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
        dataset.save_as(path)

    image = only(tmp_path).image

    assert float(image.max() - image.min()) < 1000


def test_a_slice_with_frame_groups_and_a_position_is_a_slice(tmp_path: Path) -> None:
    for path in put_dicom(tmp_path, "A", 0).iterdir():
        dataset = pydicom.dcmread(path)
        dataset.PerFrameFunctionalGroupsSequence = [pydicom.Dataset()]
        dataset.save_as(path)
    assert only(tmp_path).image.shape == (1, *SHAPE)


def in_frames(folder: Path, sop_class: str, frames: int) -> None:
    """Write the first slices of a volume as one object with its geometry in functional groups (PS3.3 C.7.6.16)."""
    slices = put(folder.parent / "slices", "A", picture(0)[0])[:frames]
    shutil.rmtree(folder.parent / "slices")
    dataset = copy.deepcopy(slices[0])
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = sop_class
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        dataset.pop(keyword, None)
    dataset.NumberOfFrames, dataset.PixelData = frames, b"".join(one.PixelData for one in slices)
    organisation, index, shared = (pydicom.Dataset() for _ in range(3))
    organisation.DimensionOrganizationUID = index.DimensionOrganizationUID = generate_uid()
    index.DimensionIndexPointer, index.FunctionalGroupPointer = 0x00200032, 0x00209113
    dataset.DimensionOrganizationSequence, dataset.DimensionIndexSequence = [organisation], [index]
    measures, plane = pydicom.Dataset(), pydicom.Dataset()
    measures.PixelSpacing, measures.SliceThickness = slices[0].PixelSpacing, "2"
    plane.ImageOrientationPatient = slices[0].ImageOrientationPatient
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    dataset.SharedFunctionalGroupsSequence, groups = [shared], []
    for number, one in enumerate(slices, start=1):
        group, position, content = (pydicom.Dataset() for _ in range(3))
        position.ImagePositionPatient = one.ImagePositionPatient
        content.DimensionIndexValues = [number]
        group.PlanePositionSequence, group.FrameContentSequence = [position], [content]
        groups.append(group)
    dataset.PerFrameFunctionalGroupsSequence = groups
    folder.mkdir(parents=True)
    dataset.save_as(folder / "frames.dcm", enforce_file_format=True)


@pytest.mark.parametrize("sop_class", ["4.1", "2.1", "6.2", "7.3"])  # Enhanced MR, CT, US; Secondary Capture
@pytest.mark.parametrize("frames", [8, 1])
def test_geometry_in_functional_groups_is_seen(tmp_path: Path, sop_class: str, frames: int) -> None:
    in_frames(tmp_path / "in", STORAGE + sop_class, frames)
    assert only(tmp_path / "in").image.shape == (1, *SHAPE[:2], frames)


def test_what_has_pixels_and_is_no_image_is_passed_over(tmp_path: Path) -> None:
    put_dicom(tmp_path, "A", 0)
    in_frames(tmp_path / "dose", STORAGE + "481.2", 8)  # RT Dose
    assert [len(case.labels) for case in found(tmp_path)] == [1]


def test_a_volume_that_came_twice_counts_once(tmp_path: Path) -> None:
    folder = put_dicom(tmp_path / "in", "A", 0)
    shutil.copytree(folder, tmp_path / "in" / "again")
    assert len(only(tmp_path / "in").image[0, 0, 0]) == SHAPE[2]


@pytest.mark.parametrize("packed", [False, True])
def test_a_slice_without_preamble_is_not_lost(tmp_path: Path, packed: bool) -> None:
    last = sorted(put_dicom(tmp_path / "in", "A", 0).iterdir())[-1]
    if packed:
        dataset = pydicom.dcmread(last)
        dataset.compress(RLELossless, generate_instance_uid=False)
        dataset.save_as(last)
    plain = only(tmp_path / "in")
    last.with_suffix("").write_bytes(last.read_bytes()[132:])
    last.unlink()
    (tmp_path / "in" / "readme").write_text("no DICOM")

    assert only(tmp_path / "in").content == plain.content


def test_packed_pixels_without_a_word_how_are_refused(tmp_path: Path) -> None:
    path = sorted(put_dicom(tmp_path / "in", "A", 0).iterdir())[-1]
    dataset = pydicom.dcmread(path)
    dataset.compress(RLELossless, generate_instance_uid=False)
    dataset.save_as(path)
    raw = path.read_bytes()
    path.write_bytes(raw[raw.index(b"\x08\x00\x05\x00") :])  # as group 8 begins

    with pytest.raises(CaseRefused, match="no installed decoder"):
        only(tmp_path / "in")


def test_pixels_that_nothing_can_unpack_have_a_reason_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = next(put_dicom(tmp_path, "A", 0).iterdir())
    dataset = pydicom.dcmread(path)
    dataset.PixelData = encapsulate([b"\xff\xd8\xff\xc3" + bytes(50) + b"\xff\xd9"])
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    dataset.save_as(path)
    monkeypatch.setattr(
        dicom, "get_decoder", lambda syntax: pytest.fail("asked") if syntax != JPEGLosslessSV1 else NONE
    )

    with pytest.raises(CaseRefused, match="no installed decoder"):
        only(tmp_path)


class _None:
    is_available = False


NONE = _None()


@pytest.mark.parametrize("reading", ["_volume", "read_datasets"])
def test_a_machine_out_of_memory_is_not_the_patient_s_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reading: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise MemoryError

    for index in range(6):
        put_dicom(tmp_path / "in", f"P{index}", index)
    monkeypatch.setattr(dicom.hd if reading == "_volume" else dicom, INNER[reading], full)

    with pytest.raises(MemoryError):
        ingested(study(), tmp_path / "in", tmp_path / "out")


INNER = {"_volume": "get_volume_from_series", "read_datasets": "read_instance"}


def test_names_that_are_no_unicode_cost_nobody(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for index in range(6):
        put_dicom(source, f"P{index}", index)
    (source / "P1").rename(Path(str(source) + "/M\udcfcller"))
    sorted(put_dicom(source, "gap", 21).iterdir())[3].unlink()

    assert ingested(study(), source, tmp_path / "out") == ["missing_slice"]
    assert len(rows(tmp_path / "out" / "cases.csv")) == 6
    assert len(explain(tmp_path / "out", source)) == 1


def test_broken_files_of_both_folders_are_nobody_s_in_both(tmp_path: Path) -> None:
    for number, folder in enumerate(("train", "test")):
        for index in range(3):
            put_dicom(tmp_path / "in" / folder, f"{folder}{index}", 10 * number + index)
        (tmp_path / "in" / folder / "garbage.dcm").write_bytes(b"garbage" * 100)

    assert ingested(study({"split": "folders"}), tmp_path / "in", tmp_path / "out") == ["truncated_dicom"] * 2


def test_a_stray_segmentation_in_the_training_folder_takes_no_test_patient_away(tmp_path: Path) -> None:
    for number, folder in enumerate(("train", "test")):
        for index in range(3):
            put_dicom(tmp_path / "in" / folder, f"{folder}{index}", 10 * number + index)
    path = tmp_path / "in" / "train" / "train0" / "seg" / "seg.dcm"
    dataset = pydicom.dcmread(path)
    dataset.PatientID, dataset.SOPInstanceUID = "test0", generate_uid()
    dataset.save_as(path.with_name("stray.dcm"))

    assert ingested(study({"split": "folders"}), tmp_path / "in", tmp_path / "out") == ["patient_mismatch"]


def test_a_file_of_zeros_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such are raw volumes; a reader of headers takes each eight of them for an element."""
    (tmp_path / "raw").write_bytes(bytes(2**12))
    monkeypatch.setattr(dicom_series, "read_partial", lambda *_, **__: pytest.fail("zeros were read as a header"))
    assert not dicom_series.find_series(tmp_path).images
