from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest

from medsynth.errors import InputError
from medsynth.imaging import phantom_hospital as hospital

PATIENTS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantoms") / "hospital"
    hospital.write_hospital(out, PATIENTS, seed=3)
    return out


def nifti(folder: Path, kind: str, index: int) -> np.ndarray:
    return np.asarray(nib.load(folder / "nifti" / kind / f"phantom_{index:03d}.nii.gz").dataobj)


def series_of(folder: Path, patient: int) -> list[Path]:
    return sorted((folder / "dicom" / f"PH{patient:05d}").glob("*-T1"))


def test_half_of_the_patients_are_dicom_and_the_broken_come_on_top(folder: Path) -> None:
    listed = json.loads((folder / "nifti" / "dataset.json").read_text())
    dicom = sorted(path.name for path in (folder / "dicom").iterdir())
    assert dicom == [f"PH{index:05d}" for index in (0, 1, 2, 3, PATIENTS, PATIENTS + 1)]
    assert len(listed["training"]) == listed["numTraining"] == PATIENTS // 2 + 4
    assert listed["labels"] == {"0": "background", "1": "Anterior", "2": "Posterior"}
    for case in listed["training"]:
        assert (folder / "nifti" / case["image"]).is_file() and (folder / "nifti" / case["label"]).is_file()


def test_a_patient_has_one_or_two_scans_under_one_identity(folder: Path) -> None:
    counts = Counter(len(series_of(folder, patient)) for patient in range(4))
    assert counts == {1: 2, 2: 2}
    headers = [pydicom.dcmread(next(path.glob("*.dcm"))) for path in series_of(folder, 1)]
    assert len({(header.PatientID, str(header.PatientName), header.PatientBirthDate) for header in headers}) == 1
    assert len({header.StudyInstanceUID for header in headers}) == len({h.SeriesInstanceUID for h in headers}) == 2


def test_headers_look_like_a_hospitals(folder: Path) -> None:
    header = pydicom.dcmread(series_of(folder, 0)[0] / "00001.dcm")
    assert str(header.PatientName) == "Phantom^Alice"
    assert header.InstitutionName == "Phantom General Hospital"
    assert len(header.StudyDate) == 8 and "SyntheticData" not in header
    assert len({hospital.patient_name(index) for index in range(200)}) == 200


@pytest.mark.parametrize("patient", range(4))
def test_good_series_hold_the_scan_and_its_labels_in_one_geometry(folder: Path, patient: int) -> None:
    scan = series_of(folder, patient)[0]
    datasets = [pydicom.dcmread(path) for path in scan.glob("*.dcm")]
    volume = highdicom.get_volume_from_series(datasets).to_patient_orientation("RAS")
    expected, label = hospital._scan(hospital.anatomy_of(3, patient), 3, patient, 0)
    np.testing.assert_array_equal(volume.array, expected)
    np.testing.assert_allclose(volume.spacing, (2, 2, 2), atol=1e-6)
    seg = highdicom.seg.segread(scan.with_name(scan.name.replace("T1", "labels")) / "seg.dcm")
    back = seg.get_volume(combine_segments=True, allow_missing_positions=True)
    matched = back.match_geometry(volume)
    np.testing.assert_array_equal(matched.array, label)
    assert [item.SegmentLabel for item in seg.SegmentSequence] == ["Anterior", "Posterior"]


@pytest.mark.parametrize("order", hospital._PLANES)
def test_turning_to_the_scanners_axes_moves_no_voxel_in_space(order: tuple[int, int, int]) -> None:
    image = np.arange(60, dtype=np.uint16).reshape(3, 4, 5)
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    affine[:3, 3] = [-7, 5, 11]
    turned, label, there = hospital._as_acquired(image, (image % 3).astype(np.uint8), affine, list(order))
    np.testing.assert_array_equal(label, turned % 3)
    for at, value in np.ndenumerate(turned):
        here = np.argwhere(image == value)[0]
        np.testing.assert_allclose(there @ [*at, 1], affine @ [*here, 1])


def test_the_front_part_lies_in_front_and_is_a_bit_brighter(folder: Path) -> None:
    for index in range(4, PATIENTS):
        image, label = nifti(folder, "imagesTr", index), nifti(folder, "labelsTr", index)
        assert np.argwhere(label == 1)[:, 1].mean() > np.argwhere(label == 2)[:, 1].mean() + 3
        assert image[label == 1].mean() > image[label == 2].mean() > image[label == 0].mean()
        assert min((label == 1).sum(), (label == 2).sum()) > 100


def test_the_same_seed_writes_the_same_voxels(folder: Path, tmp_path: Path) -> None:
    hospital.write_hospital(tmp_path / "again", PATIENTS, seed=3)
    hospital.write_hospital(tmp_path / "other", PATIENTS, seed=4)
    names = sorted(path.relative_to(folder) for path in folder.rglob("*.dcm") if "seg" not in path.name)
    assert names == sorted(
        path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*.dcm") if "seg" not in path.name
    )
    assert all((folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)
    np.testing.assert_array_equal(nifti(folder, "imagesTr", 5), nifti(tmp_path / "again", "imagesTr", 5))
    assert not np.array_equal(nifti(folder, "imagesTr", 5), nifti(tmp_path / "other", "imagesTr", 5))


def test_each_broken_case_is_broken_as_announced(folder: Path) -> None:
    truncated, gapped = (sorted(series_of(folder, PATIENTS + k)[0].glob("*.dcm")) for k in (0, 1))
    whole = max(path.stat().st_size for path in truncated)
    assert [path.stat().st_size < 0.9 * whole for path in truncated].count(True) == 1
    numbers = [int(pydicom.dcmread(path).InstanceNumber) for path in gapped]
    assert len(numbers) == numbers[-1] - 1
    with pytest.raises(ValueError, match=r"spac|volume|regular"):
        highdicom.get_volume_from_series([pydicom.dcmread(path) for path in gapped])
    first = PATIENTS + 2
    assert np.isnan(nifti(folder, "imagesTr", first)).any()
    assert nifti(folder, "labelsTr", first + 1).max() == 0
    assert nifti(folder, "imagesTr", first + 2).shape != nifti(folder, "labelsTr", first + 2).shape
    assert np.ptp(nifti(folder, "imagesTr", first + 3)) == 0
    assert len(hospital.BROKEN) == 6


def test_it_refuses_to_mix_with_something_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        hospital.write_hospital(tmp_path, 4, seed=0)
    with pytest.raises(InputError, match="at least 2"):
        hospital.write_hospital(tmp_path / "new", 1, seed=0)
