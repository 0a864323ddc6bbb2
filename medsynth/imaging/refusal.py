"""Why a single case is refused: the reason codes of the quarantine list."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from medsynth.errors import InputError

REASONS: dict[str, str] = {
    "unreadable_file": "the file cannot be read: copy it again from the source",
    "unreadable_folder": "this folder, in which patients may be, may not be read: let the user who runs this read it",
    "truncated_dicom": "a DICOM file of this series is cut short or unreadable: send the series again",
    "no_decoder": "no installed decoder knows how its pixels are compressed: export it uncompressed or as JPEG 2000, "
    "or install one that pydicom finds (python-gdcm for lossless JPEG)",
    "too_large": "image or mask has more voxels than ingest.max_voxels, as they are or at the grid's spacing: correct "
    "the spacing if it is wrong, crop, or raise the limit if memory allows",
    "missing_slice": "the slices of this series leave a gap: send the series again, complete",
    "multiple_frames": "several images at one position (time points, echoes): export one image a series",
    "irregular_geometry": "the slices differ in orientation, spacing or distance: send a regular volume",
    "no_geometry": "the objects hold no position, orientation or pixel spacing: export the series with its geometry "
    "(X-rays and photographs need none where grid.spatial_dims is 2 and grid.slice_axis is not set)",
    "no_label": "no mask belongs to this image: add one (DICOM SEG or files; RTSTRUCT is not read), or set "
    "ingest.require_labels to false",
    "several_masks": "several masks have this image's name, and none says which is meant: keep one",
    "unknown_kind": "it lies among the images and is none that can be read (NIfTI, PNG, JPEG, TIFF, BMP): convert it",
    "synthetic": "this series says that it is synthetic (0008,001C), which is no patient: remove it from the input",
    "no_image": "this segmentation belongs to no image of the input: add the image or remove it",
    "shape_mismatch": "image and mask differ in shape, or the mask reaches outside of the image",
    "geometry_mismatch": "image and mask of the same shape lie at different places, or in different frames of "
    "reference (0020,0052): resample the mask to the image",
    "sparse_mask": "the segmentation leaves slices out and does not say how far they lie apart: export it again with "
    "Spacing Between Slices (0018,0088)",
    "unplaced_mask": "the segmentation's frames do not name this image as what they lie on, pixel on pixel, or it "
    "cannot be read: export it again",
    "disputed_picture": "several files that differ say that they are this image (0008,0018): keep the right one",
    "unknown_label": "the mask holds a label that grid.labels does not name: use the names that the input declares",
    "overlapping_labels": "two segments claim the same voxel with different labels: keep one label a voxel",
    "empty_label": "the mask has fewer foreground voxels than ingest.min_foreground_voxels",
    "outside_grid": "less of the mask than ingest.min_kept_foreground lies within the grid around the image's middle: "
    "enlarge grid.shape, crop the image around what is segmented, or lower the limit",
    "non_finite": "the image or its mask holds NaN or infinite voxels",
    "constant_image": "the image has no contrast: its intensity percentiles are equal",
    "channel_mismatch": "the image has another number of channels than grid.channels",
    "dimension_mismatch": "the image has another number of axes than the grid (2D from volumes needs grid.slice_axis)",
    "duplicate_content": "the same pixels came under another patient id: decide whose they are and link the ids",
    "patient_mismatch": "the segmentation names an image of another patient",
    "patient_in_both_splits": "this patient is in the training folder too: keep each patient in one folder",
    "no_patient_id": "no patient id (0010,0020), two of them in one series, or a file name that "
    "ingest.patient_id_pattern does not match",
    "unforeseen": "reading it failed in a way that nobody foresaw: look at the files, and report the place in our code",
}
"""Reason code to what it means and what to do; both are fixed texts, so no identifier can slip in."""


class CaseRefused(InputError):
    """One case cannot be used; the stage writes it to the quarantine list and goes on.

    Args:
        reason: a key of :data:`REASONS`.
        detail: what may be said of it anywhere; no value of the case.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(REASONS[reason] + (f" ({detail})" if detail else ""))
        self.reason = reason


@contextlib.contextmanager
def refusing(reason: str) -> Iterator[None]:
    """Refuse the case for whatever a library raises: damaged files make readers raise nearly anything.

    A machine that is out of memory is not the case's fault.
    """
    try:
        yield
    except (CaseRefused, MemoryError):
        raise
    except Exception as error:
        raise CaseRefused(reason) from error
