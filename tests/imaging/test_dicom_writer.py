from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.pixels import apply_windowing

from medsynth.errors import InputError
from medsynth.imaging import dicom_writer as writer
from medsynth.imaging.dicom_pair import write_pair_dicom
from medsynth.imaging.dicom_segmentation import write_segmentation

LABELS = {0: "background", 1: "Anterior", 2: "Posterior"}
META = writer.SeriesMeta("MR", "SYN1", "Synthetic^One")


def a_pair(shape: tuple[int, ...], channels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    label = np.zeros(shape, np.uint8)
    label[tuple(slice(2, 5) for _ in shape)] = 1
    label[(slice(5, 8), *[slice(2, 6) for _ in shape[1:]])] = 2
    return rng.uniform(-1, 1, (channels, *shape)).astype(np.float32), label


def read(folder: Path) -> list[pydicom.Dataset]:
    return [pydicom.dcmread(path) for path in sorted(folder.glob("*.dcm"), reverse=True)]


def ras(volume: highdicom.Volume) -> highdicom.Volume:
    return volume.to_patient_orientation("RAS")


def ras_affine(volume: highdicom.Volume) -> np.ndarray:
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine


@pytest.mark.parametrize("modality", ["MR", "CT", "US"])
def test_a_volume_comes_back_with_its_voxels_labels_and_geometry(tmp_path: Path, modality: str) -> None:
    image, label = a_pair((10, 14, 8))
    write_pair_dicom(tmp_path, image, label, (1.0, 1.5, 2.0), LABELS, "SYN1", modality)
    volume = ras(highdicom.get_volume_from_series(read(tmp_path / "SYN1" / "image")))
    np.testing.assert_allclose(volume.array / 500.0 - 1, image[0], atol=0.5 / 500 + 1e-6)
    affine = np.diag([1.0, 1.5, 2.0, 1.0])
    affine[:3, 3] = [-4.5, -9.75, -7.0]
    np.testing.assert_allclose(ras_affine(volume), affine, atol=1e-6)
    seg = highdicom.seg.segread(tmp_path / "SYN1" / "seg.dcm")
    back = seg.get_volume(combine_segments=True, allow_missing_positions=True).match_geometry(volume)
    np.testing.assert_array_equal(back.array, label)


def test_a_slice_with_spacing_keeps_it(tmp_path: Path) -> None:
    image, label = a_pair((10, 14))
    write_pair_dicom(tmp_path, image, label, (1.0, 1.5), LABELS, "SYN1", "MR")
    (dataset,) = read(tmp_path / "SYN1" / "image")
    assert dataset.PixelSpacing == [1.5, 1.0]
    np.testing.assert_array_equal(dataset.pixel_array.T[::-1, ::-1], np.rint((image[0].astype(float) + 1) * 500))
    seg = highdicom.seg.segread(tmp_path / "SYN1" / "seg.dcm")
    frames = seg.get_pixels_by_source_instance([dataset.SOPInstanceUID], combine_segments=True)
    np.testing.assert_array_equal(frames[0].T[::-1, ::-1], label)


def test_a_photograph_is_secondary_capture_without_geometry(tmp_path: Path) -> None:
    image, label = a_pair((15, 11), channels=3)
    write_pair_dicom(tmp_path, image, label, None, LABELS, "SYN1", "ES")
    (dataset,) = read(tmp_path / "SYN1" / "image")
    assert dataset.SOPClassUID == writer.SECONDARY_CAPTURE_STORAGE and dataset.ConversionType == "SYN"
    assert "ImagePositionPatient" not in dataset and dataset.PhotometricInterpretation == "RGB"
    expected = np.rint((np.moveaxis(image, 0, -1).astype(float) + 1) / 2 * 255)
    np.testing.assert_array_equal(np.swapaxes(dataset.pixel_array, 0, 1), expected)
    seg = highdicom.seg.segread(tmp_path / "SYN1" / "seg.dcm")
    frames = seg.get_pixels_by_source_instance([dataset.SOPInstanceUID], combine_segments=True)
    np.testing.assert_array_equal(frames[0].T, label)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31))
def test_any_rotated_affine_survives(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0] * rng.uniform(0.3, 4, 3)
    affine[:3, 3] = rng.uniform(-200, 200, 3)
    image = rng.integers(0, 4000, (6, 5, 4)).astype(np.uint16)
    folder = tmp_path_factory.mktemp("series")
    writer.write_series(folder, image, affine, META)
    volume = highdicom.get_volume_from_series(read(folder))
    ours = {tuple(np.round((affine @ [*at, 1])[:3], 2) + 0.0): int(image[at]) for at in np.ndindex(image.shape)}
    theirs = ras_affine(volume)
    back = {tuple(np.round((theirs @ [*at, 1])[:3], 2) + 0.0): v for at, v in np.ndenumerate(volume.array.astype(int))}
    worst = max(min(np.abs(np.subtract(a, b)).max() for b in back if back[b] == v) for a, v in ours.items())
    assert worst < 0.02


def test_everything_synthetic_is_marked_and_carries_nothing_of_a_patient(tmp_path: Path) -> None:
    image, label = a_pair((10, 14, 8))
    write_pair_dicom(tmp_path, image, label, (1.0, 1.0, 1.0), LABELS, "SYN1", "MR")
    for path in tmp_path.rglob("*.dcm"):
        dataset = pydicom.dcmread(path)
        assert dataset.SyntheticData == "YES" and dataset.PatientIdentityRemoved == "YES"
        assert dataset.DeidentificationMethod and dataset.BurnedInAnnotation == "NO"
        (equipment,) = dataset.ContributingEquipmentSequence
        assert equipment.Manufacturer == "medsynth" and equipment.SoftwareVersions
        assert equipment.PurposeOfReferenceCodeSequence[0].CodeValue == "109100"
        assert dataset.PatientID == "SYN1" and "^" in str(dataset.PatientName)
        assert dataset.ImageType[0] == "DERIVED"
        assert not any(element.tag.is_private for element in dataset.iterall())
        dates = {str(element.value) for element in dataset.iterall() if element.VR in ("DA", "DT")}
        assert dates <= {"", writer.PUBLIC_DATE}
        if dataset.Modality == "MR":
            assert dataset.ImageType[:2] == ["DERIVED", "SECONDARY"] and "SourceImageSequence" not in dataset


@pytest.mark.parametrize("modality", ["MR", "CT", "US"])
def test_the_window_shows_the_whole_grey_range(tmp_path: Path, modality: str) -> None:
    image, label = a_pair((10, 14))
    image[0, 0, :2] = -1, 1
    write_pair_dicom(tmp_path, image, label, (1.0, 1.5), LABELS, "SYN1", modality)
    (dataset,) = read(tmp_path / "SYN1" / "image")
    assert (dataset.WindowCenter, dataset.WindowWidth) == (500, 1000)
    shown = apply_windowing(dataset.pixel_array, dataset)
    assert shown.min() == 0 and shown.max() == 2**16 - 1
    # PS3.3 C.11.2.1.2.1: of 1001 levels only the two at the top look alike
    assert len(np.unique(shown)) >= len(np.unique(dataset.pixel_array)) - 1


def test_colour_and_plain_series_get_no_window(tmp_path: Path) -> None:
    image, label = a_pair((15, 11), channels=3)
    write_pair_dicom(tmp_path, image, label, None, LABELS, "SYN1", "ES")
    writer.write_series(tmp_path / "plain", np.zeros((4, 4, 2), np.uint16), np.eye(4), META)
    for dataset in [*read(tmp_path / "SYN1" / "image"), *read(tmp_path / "plain")]:
        assert "WindowCenter" not in dataset and "WindowWidth" not in dataset


def test_dates_and_institution_never_reach_a_synthetic_header(tmp_path: Path) -> None:
    meta = writer.SeriesMeta(
        "MR", "SYN1", "Synthetic^One", study_date="20190203", birth_date="19500101", sex="F", institution="Charity"
    )
    writer.write_series(tmp_path, np.zeros((4, 4, 2), np.uint16), np.eye(4), meta)
    for path in tmp_path.glob("*.dcm"):
        raw = path.read_bytes()
        assert not any(text in raw for text in (b"20190203", b"19500101", b"Charity"))


def test_uids_are_fresh_unless_a_source_is_given(tmp_path: Path) -> None:
    image, label = a_pair((10, 14, 8))
    for name in ("a", "b"):
        write_pair_dicom(tmp_path / name, image, label, (1.0, 1.0, 1.0), LABELS, "SYN1", "MR")
    uids = [str(pydicom.dcmread(path).SOPInstanceUID) for path in tmp_path.rglob("*.dcm")]
    assert len(set(uids)) == len(uids) == 18
    first, second = writer.seeded_uids("x"), writer.seeded_uids("x")
    drawn = [first() for _ in range(5)]
    assert drawn == [second() for _ in range(5)] and len(set(drawn)) == 5
    assert all(pydicom.uid.UID(uid).is_valid for uid in drawn) and writer.seeded_uids("y")() != drawn[0]


def test_an_empty_mask_is_written(tmp_path: Path) -> None:
    series = writer.write_series(tmp_path / "image", np.ones((4, 5, 3), np.uint16), np.eye(4), META)
    write_segmentation(tmp_path / "seg.dcm", np.zeros((4, 5, 3), np.uint8), series, LABELS)
    assert not highdicom.seg.segread(tmp_path / "seg.dcm").pixel_array.any()


SHEARED = np.eye(4) + np.pad(np.array([[0, 0.2, 0.0]]), ((0, 3), (0, 1)))


@pytest.mark.parametrize(
    ("image", "affine", "message"),
    [
        (np.zeros((4, 4, 2)), np.eye(4), "float64"),
        (np.zeros((4, 4, 2, 2), np.uint8), np.eye(4), "neither"),
        (np.zeros((4, 4, 2), np.uint8), None, "without an affine"),
        (np.zeros((4, 4, 2), np.uint8), SHEARED, "sheared"),
        (np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4)), "invertible"),
        (np.zeros((4, 4, 2), np.uint8), np.full((4, 4), np.nan), "finite"),
    ],
)
def test_what_cannot_be_written_is_refused(
    tmp_path: Path, image: np.ndarray, affine: np.ndarray | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        writer.write_series(tmp_path / "series", image, affine, META)
    assert not (tmp_path / "series").exists()


def test_labels_that_do_not_belong_to_the_series_are_refused(tmp_path: Path) -> None:
    series = writer.write_series(tmp_path / "image", np.ones((4, 5, 3), np.uint16), np.eye(4), META)
    bad = tmp_path / "seg.dcm"
    with pytest.raises(InputError, match=r"\[7\] have no name"):
        write_segmentation(bad, np.full((4, 5, 3), 7, np.uint8), series, LABELS)
    with pytest.raises(InputError, match="does not lie"):
        write_segmentation(bad, np.ones((5, 4, 3), np.uint8), series, LABELS)
    with pytest.raises(InputError, match="without gaps"):
        write_segmentation(bad, np.ones((4, 5, 3), np.uint8), series, {1: "a", 3: "b"})
    with pytest.raises(InputError, match="fit each other"):
        write_pair_dicom(tmp_path, np.zeros((1, 4, 4)), np.zeros((4, 5), int), None, LABELS, "S", "OT")
    assert not bad.exists()


@pytest.mark.parametrize(
    ("shape", "channels", "modality"), [((9, 9, 8), 1, "MR"), ((9, 9, 8), 1, "CT"), ((9, 9), 3, "ES")]
)
def test_dciodvfy_finds_no_error(tmp_path: Path, shape: tuple[int, ...], channels: int, modality: str) -> None:
    oracle = shutil.which("dciodvfy")
    if oracle is None:
        pytest.skip("dicom3tools is not installed")
    image, label = a_pair(shape, channels)
    spacing = (1.0,) * 3 if len(shape) == 3 else None
    write_pair_dicom(tmp_path, image, label, spacing, LABELS, "SYN1", modality)
    for path in (tmp_path / "SYN1" / "image" / "00001.dcm", tmp_path / "SYN1" / "seg.dcm"):
        said = subprocess.run([oracle, str(path)], capture_output=True, text=True, check=False).stderr.splitlines()
        # Releases of dicom3tools before 2024 do not know Synthetic Data (0008,001C).
        assert [line for line in said if line.startswith("Error") and "0x0008,0x001c" not in line] == []
