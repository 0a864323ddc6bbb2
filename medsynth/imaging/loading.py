"""Read one case of the hospital through MONAI's ``LoadImage``, and check it before anything is computed from it."""

from __future__ import annotations

import functools
import hashlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
import torch
from monai.data.image_reader import ImageReader, NibabelReader, PILReader
from monai.transforms.io.array import LoadImage
from PIL import Image, ImageOps

from medsynth.config import Grid, Ingest
from medsynth.imaging.dicom import HighdicomReader, is_deep
from medsynth.imaging.dicom_labels import label_value, read_picture_segmentation, read_segmentation
from medsynth.imaging.layouts import Case
from medsynth.imaging.refusal import CaseRefused, refusing

AFFINE_TOLERANCE_MM = 0.1
"""Image and mask were often written by different programs, which round their affines differently."""
_LOSSY = (".jpg", ".jpeg")
_LUMINANCE = torch.tensor([19595.0, 38470.0, 7471.0], dtype=torch.float64)
"""Weights of red, green and blue in a grey value, ITU-R BT.601, in parts of 2^16 as Pillow has them."""
_DEEP = ("I;16", "I;16L", "I;16B", "I", "F")
"""Pillow's names of grey images with more than 8 bits."""


@dataclass(frozen=True)
class Loaded:
    """A case as the hospital stores it.

    Attributes:
        image: (channel, *native) float32.
        label: (*native) uint8; all zero where the case has no mask.
        affine: 4 x 4, voxel to RAS+ mm; None for a photograph, or a picture whose pixels have no known size.
        labelled: whether a mask was given.
        stored: the image's values whatever the grid's channels: by them a site knows it again in another study.
    """

    image: torch.Tensor
    label: torch.Tensor
    affine: np.ndarray | None
    labelled: bool
    stored: torch.Tensor

    @property
    def content(self) -> str:
        """SHA-256 of the voxels in RAS order: the same for the same picture in DICOM and in NIfTI."""
        array = self.image.numpy()
        if self.affine is not None and array.ndim == 4:
            turn = nib.orientations.io_orientation(self.affine)
            array = nib.orientations.apply_orientation(np.moveaxis(array, 0, -1), turn)
        shape = ",".join(map(str, array.shape))
        return hashlib.sha256(shape.encode() + np.ascontiguousarray(array, dtype="<f4").tobytes()).hexdigest()

    @property
    def values(self) -> str:
        """SHA-256 of the sorted voxel values: the same however the picture is turned, mirrored or stored."""
        array = np.sort(self.stored.numpy(), axis=None)
        return hashlib.sha256(np.ascontiguousarray(array, dtype="<f4").tobytes()).hexdigest()


def load_case(case: Case, grid: Grid, settings: Ingest) -> Loaded:
    """Read image and mask of a case.

    Raises:
        CaseRefused: with the reason why it cannot be used.
    """
    if case.refused is not None:
        raise CaseRefused(case.refused)
    if not case.person:
        raise CaseRefused("no_patient_id")
    if settings.require_labels and not case.labels:
        raise CaseRefused("no_label")
    image, affine, stored = _image(case, grid, settings.max_voxels)
    if not bool(torch.isfinite(image).all()):
        raise CaseRefused("non_finite")
    if float(image.min()) == float(image.max()):
        raise CaseRefused("constant_image")
    label = _label(case, image, affine, grid, settings)
    return Loaded(image, label, affine, bool(case.labels), stored)


def _image(case: Case, grid: Grid, max_voxels: int) -> tuple[torch.Tensor, np.ndarray | None, torch.Tensor]:
    """Return image, affine and the values as they are stored."""
    if case.source == "raster":
        return _photograph(case.images[0], grid.channels, max_voxels)
    if case.picture:
        return _picture(case, grid)
    if case.source == "dicom":
        array, affine = _read([str(p) for p in case.images], HighdicomReader())
    else:
        array, affine = _nifti(case.images[0], max_voxels)
    if array.ndim not in (2, 3, 4):
        raise CaseRefused("multiple_frames")
    image = _channel_first(array) if array.ndim == 4 else array[None]
    return image, affine, image


def _picture(case: Case, grid: Grid) -> tuple[torch.Tensor, np.ndarray | None, torch.Tensor]:
    """Return a DICOM picture with the grid's channels, and the size of its pixels.

    Values are those of :func:`_photograph`, so that the same picture is known again as a PNG.
    """
    if grid.spatial_dims != 2 or grid.slice_axis is not None:
        raise CaseRefused("no_geometry")
    array, affine = _read([str(p) for p in case.images], HighdicomReader())
    stored = array[None] if array.ndim == 2 else _channel_first(array)
    deep, image = is_deep(case.images[0]), stored
    if len(stored) < grid.channels:
        image = stored.expand(grid.channels, -1, -1).contiguous()
    elif len(stored) > grid.channels:
        image = _luminance(stored, deep)
    if not deep:
        stored = stored.expand(3, -1, -1)
    return image, affine if np.isfinite(affine).all() else None, stored


def _luminance(colour: torch.Tensor, deep: bool) -> torch.Tensor:
    """Return the grey values of a picture (3, *native), rounded as Pillow rounds those of 8 bits."""
    grey = torch.tensordot(_LUMINANCE, colour.double(), 1)[None] / 2**16
    return (grey if deep else (grey + 0.5).floor()).float()


def _photograph(path: Path, channels: int, max_voxels: int) -> tuple[torch.Tensor, None, torch.Tensor]:
    """Return a raster image with so many channels, and its values in colour.

    Grey values of more than 8 bits are kept: Pillow would cut them off at 255.
    """
    stored = _raster(path, lambda image: image if image.mode in _DEEP else _opaque(image).convert("RGB"), max_voxels)
    if stored.ndim == 2:
        return stored.expand(channels, -1, -1).contiguous(), None, stored
    colour = _channel_first(stored)
    image = colour if channels == 3 else _raster(path, lambda image: _opaque(image).convert("L"), max_voxels)[None]
    return image, None, colour


def _channel_first(array: torch.Tensor) -> torch.Tensor:
    if array.shape[-1] not in (1, 3):
        raise CaseRefused("multiple_frames")
    return array.movedim(-1, 0).contiguous()


@functools.cache
def _loader() -> LoadImage:
    # every reader that MONAI registers here and we never use would warn about a missing GPU decoder
    logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)
    return LoadImage(image_only=True, dtype=np.float32)


def _read(path: Any, reader: ImageReader) -> tuple[torch.Tensor, np.ndarray]:
    """Load by MONAI; whatever a damaged file makes a reader raise becomes one reason."""
    with refusing("unreadable_file"):
        loaded: Any = _loader()(path, reader=reader)  # given at run time, its own exceptions come through
    return loaded.as_tensor().float(), np.asarray(loaded.affine, dtype=np.float64)


def _refuse_too_large(announced: Callable[[], int], max_voxels: int) -> None:
    """Refuse a file by its header, before its voxels are unfolded."""
    with refusing("unreadable_file"):
        try:
            voxels = announced()
        except Image.DecompressionBombError:
            raise CaseRefused("too_large") from None
    if voxels > max_voxels:
        raise CaseRefused("too_large")


def _raster(path: Path, converter: Callable[[Any], Any], max_voxels: int) -> torch.Tensor:
    """Read a raster file as its EXIF orientation says, as every viewer shows it."""

    def announced() -> int:
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise CaseRefused("multiple_frames")
            return math.prod(image.size) * len(image.getbands())

    _refuse_too_large(announced, max_voxels)
    return _read(str(path), PILReader(converter=lambda image: converter(ImageOps.exif_transpose(image))))[0]


def _nifti(path: Path, max_voxels: int) -> tuple[torch.Tensor, np.ndarray]:
    def announced() -> int:
        return math.prod(cast(nib.spatialimages.SpatialImage, nib.load(path)).shape)

    _refuse_too_large(announced, max_voxels)
    array, affine = _read(str(path), NibabelReader())
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise CaseRefused("no_geometry")
    return array, affine


def _label(case: Case, image: torch.Tensor, affine: np.ndarray | None, grid: Grid, settings: Ingest) -> torch.Tensor:
    shape = tuple(image.shape[1:])
    if not case.labels:
        return torch.zeros(shape, dtype=torch.uint8)
    if case.picture:
        found = read_picture_segmentation(case.labels, shape, case.picture, grid, settings.max_voxels)
        return torch.from_numpy(found)
    if case.source == "dicom":
        assert affine is not None  # a series without geometry was refused by its reader
        return torch.from_numpy(read_segmentation(case.labels, shape, affine, grid, settings.max_voxels))
    path = case.labels[0]
    if path.name.lower().endswith((".nii", ".nii.gz")):
        values, placed = _nifti(path, settings.max_voxels)
        if tuple(values.shape) != shape:
            raise CaseRefused("shape_mismatch")
        if affine is not None and _farthest_mm(affine, placed, shape) > AFFINE_TOLERANCE_MM:
            raise CaseRefused("geometry_mismatch")
        return _renamed(values, case, grid)
    values = _raster(path, _grey, settings.max_voxels)
    if tuple(values.shape) != shape:
        raise CaseRefused("shape_mismatch")
    if case.label_names:
        return _renamed(values, case, grid)
    return _thresholded(values, path, grid, settings.mask_threshold)


def _grey(image: Any) -> Any:
    """Keep indices and grey values; a coloured mask becomes its luminance.

    Indices into a palette of greys alone are none of labels: programs number black and white as they like.
    """
    if image.mode == "P":
        palette = image.getpalette("RGB") or []
        used = {tuple(palette[3 * index : 3 * index + 3]) for _, index in image.getcolors()}
        return image.convert("L") if all(len(set(colour)) == 1 for colour in used) else image
    return image if image.mode in ("L", *_DEEP) else _opaque(image).convert("L")


def _opaque(image: Any) -> Any:
    """Put what is transparent on black: the colours that a file keeps under it are seen by nobody."""
    if not image.has_transparency_data:
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))


def _farthest_mm(first: np.ndarray, second: np.ndarray, shape: tuple[int, ...]) -> float:
    """Return how far apart two affines put the corners of a volume, mm."""
    sizes = [*shape, 1, 1][:3]
    corners = np.array([[x, y, z, 1] for x in (0, sizes[0] - 1) for y in (0, sizes[1] - 1) for z in (0, sizes[2] - 1)])
    return float(np.abs(corners @ (first - second).T)[:, :3].max())


def _renamed(values: torch.Tensor, case: Case, grid: Grid) -> torch.Tensor:
    """Translate the data set's label values into the grid's, by name where it declares names."""
    label = torch.zeros(values.shape, dtype=torch.uint8)
    for value in torch.unique(values).tolist():
        if not math.isfinite(value):
            raise CaseRefused("non_finite")
        if value != int(value):
            raise CaseRefused("unknown_label")
        if value != 0:
            label[values == value] = label_value(case.label_names.get(int(value), ""), int(value), grid)
    return label


def _thresholded(values: torch.Tensor, path: Path, grid: Grid, threshold: int) -> torch.Tensor:
    """Read a raster mask: grey values are labels, or, with two labels, foreground from ``threshold`` on."""
    found = set(torch.unique(values).tolist())
    lossy = path.suffix.lower() in _LOSSY
    if found <= set(grid.labels) and not (lossy and grid.classes == 2):
        return values.to(torch.uint8)
    if grid.classes > 2 or (not lossy and max(found) < threshold):
        raise CaseRefused("unknown_label")
    return (values >= threshold).to(torch.uint8)
