"""Every knob of a study as frozen sections.

Values that touch privacy (:class:`Privacy`, clip norms, rates, steps, denominators) are *public constants*: they are
written down before any patient is read and are never derived from the cohort. Values that only cost time are in
:class:`Compute`.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _each_once(values: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(values)) < len(values):
        raise ValueError("each number may be given once")
    return values


def _number(value: Any) -> Any:
    """Let YAML texts such as ``1e-5`` (a string to PyYAML) and ``inf`` stand for numbers."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Number = Annotated[float, BeforeValidator(_number)]
Finite = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Positive = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, BeforeValidator(_number), Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A frozen part of the configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Grid(Section):
    """The public voxel grid that every image is brought to.

    Images live on it as ``channel *shape`` in [-1, 1], labels as ``*shape`` integers; axes are RAS+ where the input
    has a geometry. Intensities are scaled image by image, so that nothing is shared between patients.
    """

    spatial_dims: Literal[2, 3] = 3
    shape: tuple[Count, ...]
    spacing_mm: tuple[Positive, ...] | None = Field(
        None, description="None: no physical spacing (photographs); the image is resized to `shape`"
    )
    channels: Literal[1, 3] = 1
    modality: Literal["MR", "CT", "ES", "US", "OT"] = "MR"
    labels: dict[int, str] = Field(description="label value to name, 0 is the background; a public list")
    slice_axis: Literal["R", "A", "S"] | None = Field(None, description="2D from volumes: slices across this axis")
    max_slices: Count = Field(1, description="2D from volumes: at most so many slices a case, evenly spaced")
    intensity_percentiles: tuple[float, float] = (0.5, 99.5)
    release_shape_range: tuple[tuple[int, int], ...] | None = Field(
        None, description="public range of the released sizes an axis, voxels; None: the whole grid"
    )
    release_margin: Annotated[int, Field(ge=0)] = Field(5, description="voxels between the labels and a released edge")

    @property
    def classes(self) -> int:
        """Number of labels, the background included."""
        return len(self.labels)

    @property
    def mr_volumes(self) -> bool:
        """Whether images are MR volumes of one channel with a spacing, which a template of the brain may resemble."""
        return self.spatial_dims == 3 and self.channels == 1 and self.modality == "MR" and self.spacing_mm is not None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.shape) != self.spatial_dims:
            raise ValueError(f"shape has {len(self.shape)} axes, spatial_dims says {self.spatial_dims}")
        if self.spacing_mm is not None and len(self.spacing_mm) != self.spatial_dims:
            raise ValueError("spacing_mm needs one value a spatial axis")
        if sorted(self.labels) != list(range(len(self.labels))) or len(self.labels) < 2:
            raise ValueError("labels must be 0 (background), 1, 2, ... without gaps")
        if self.release_shape_range is not None:
            if len(self.release_shape_range) != self.spatial_dims:
                raise ValueError("release_shape_range needs one (low, high) a spatial axis")
            for (low, high), size in zip(self.release_shape_range, self.shape, strict=True):
                if not 1 <= low <= high <= size:
                    raise ValueError(f"release_shape_range ({low}, {high}) does not fit in a grid axis of {size}")
        return self


class Ingest(Section):
    """How the hospital's files become patients."""

    layout: Literal["auto", "dicom", "msd", "nnunet", "pairs", "mixed"] = "auto"
    split: Literal["hash", "folders"] = Field(
        "hash", description="hash: each patient by its own hash; folders: train/ and val|test/ below the input"
    )
    test_fraction: Fraction = Field(
        0.2,
        description="share of patients held back; with split folders it moves nobody, but sums over patients are "
        "divided by declared_patients times the rest",
    )
    patient_id_pattern: str | None = Field(
        None, description="regular expression on file stems whose first group is the patient (linkage rule)"
    )
    min_foreground_voxels: Annotated[int, Field(ge=0)] = 1
    min_kept_foreground: Annotated[float, Field(ge=0, le=1)] = Field(
        0.9,
        description="share of a mask that must lie within the grid, whose middle is the image's; the rest is cut off, "
        "from held-out patients' masks, too",
    )
    max_voxels: Count = Field(
        2**28,
        description="voxels times channels of an image or mask, by its header, and of the image at the grid's spacing; "
        "more is refused before it is read, or resampled",
    )
    require_labels: bool = Field(True, description="false: cases without a mask come in too, unlabelled")
    mask_threshold: int = Field(128, description="image/mask folders with two labels: mask value from which it is 1")

    @model_validator(mode="after")
    def _pattern(self) -> Self:
        if self.patient_id_pattern is not None:
            try:
                groups = re.compile(self.patient_id_pattern).groups
            except re.error as error:
                raise ValueError(f"patient_id_pattern is no regular expression: {error}") from error
            if groups < 1:
                raise ValueError("patient_id_pattern needs one group, the patient")
        return self


class Shares(Section):
    """How the squared Gaussian privacy parameter mu^2 is split between the mechanisms that run; any total."""

    masks: Positive = 1.0
    appearance: Positive = 1.0
    training: Positive = 1.0


_LARGEST_EPSILON = 1000.0
_SMALLEST_DELTA = 1e-30


class Privacy(Section):
    """The promise: (epsilon, delta) for the unit patient under add-or-remove-one-patient."""

    epsilon: Number = Field(8.0, description="up to 1000, or `.inf`: trains without privacy and can never be certified")
    delta: Number = Field(1e-4, description="at least 1e-30, at most 1/(10 `declared_patients`)")
    declared_patients: Count = Field(description="public, declared size of the cohort; sets delta and denominators")
    trials: Count = Field(
        1, description="studies of a declared sweep: the noise lets so many fit into epsilon, and the claim charges all"
    )
    shares: Shares = Shares()
    entropy: Literal["os", "test_only"] = Field("os", description="test_only taints the ledger for good")

    @property
    def private(self) -> bool:
        """Whether training is differentially private at all."""
        return math.isfinite(self.epsilon)

    @model_validator(mode="after")
    def _budget(self) -> Self:
        if not self.epsilon > 0:
            raise ValueError(
                f"epsilon must be above 0, got {self.epsilon:g}: 1 to 10 are usual, `.inf` is a study without privacy"
            )
        if _LARGEST_EPSILON < self.epsilon < math.inf:
            raise ValueError(
                f"epsilon {self.epsilon:g} promises nothing, and no noise can be planned for it: 1 to 10 are usual; "
                "use .inf for a study without privacy"
            )
        if 0 < self.delta < _SMALLEST_DELTA:
            raise ValueError(
                f"delta {self.delta:g} is below {_SMALLEST_DELTA:g}, where no accountant is exact: 1/(10 N) is usual"
            )
        if not 0 < self.delta < 1:
            raise ValueError(
                f"delta must be above 0 and at most 1/(10 N), got {self.delta:g}: that is "
                f"{1 / (10 * self.declared_patients):g} for {self.declared_patients} declared patients"
            )
        if self.private and self.delta > 1 / (10 * self.declared_patients):
            raise ValueError(
                f"delta {self.delta:g} is above 1/(10 N) = {1 / (10 * self.declared_patients):g} "
                f"for {self.declared_patients} declared patients: lower it"
            )
        return self


class Phantoms(Section):
    """Public procedural phantoms: the only images that pre-training ever sees."""

    count: Count = 256
    seed: int = 0


class Encode(Section):
    """The latent codec."""

    codec: Literal["kl", "wavelet"] = "wavelet"
    levels: Annotated[int, Field(ge=1, le=4)] = Field(2, description="each halves the latent's axes")
    latent_channels: Count = Field(4, description="kl only; the wavelet has channels * 2^(dims * levels)")
    channels: tuple[Count, ...] = Field((32, 64, 64), description="kl only; its length is levels + 1")
    steps: Count = 600
    batch_size: Count = 8
    learning_rate: Positive = 1e-3
    kl_weight: Number = Field(1e-6, ge=0)
    train_on: Literal["phantoms"] = Field("phantoms", description="patients never train the codec")
    phantoms: Phantoms = Phantoms()


class Masks(Section):
    """The generator of label maps."""

    source: Literal["statistics", "public_shapes"] = "statistics"
    coefficients: tuple[Count, ...] = Field((8, 10, 8), description="low-frequency coefficients kept an axis")
    band_voxels: Positive = Field(2.0, description="signed distances are truncated at this many voxels")
    covariance: Literal["diagonal", "full"] = Field(
        "diagonal", description="full: pose and shape are drawn together, for studies without privacy"
    )
    mean_clip_norm: Positive | None = Field(None, description="None: the 90 % quantile over public phantoms")
    spread_clip_norm: Positive | None = Field(
        None,
        description="None: 0.6 of that of the means, enough for one organ; where labels lie anywhere, about as much",
    )
    min_component_voxels: Annotated[int, Field(ge=0)] = 8
    roughness: Annotated[Number, Field(ge=0, le=2)] = Field(
        0.0,
        description="voxels (standard deviation) by which drawn surfaces are ragged, as those that people outline are",
    )
    reader_steps: Annotated[int, Field(ge=0)] = Field(
        0,
        description="of a network that learns from phantoms to read a noisy mean shape of one organ, where noise is "
        "large enough to matter; 0: each voxel is read by itself",
    )


class Appearance(Section):
    """Statistics of images given their label maps, which dress the label maps of pre-training."""

    enabled: bool = Field(
        True, description="needs train.pretrain_steps, synthesise.start below 1, or synthesise.drafts"
    )
    coefficients: tuple[Count, ...] | None = Field(
        None, description="cosines an axis of the position; None: planned from the grid, the declared patients, epsilon"
    )
    levels: Count = Field(6, description="cosines of the grey value, whose distribution is learnt at each position")
    factors: Annotated[int, Field(ge=0)] = Field(
        0, description="at most so many directions in which patients' images differ as a whole; 0: none, for crops"
    )
    texture: Literal["noise", "lit_surface"] = Field(
        "noise",
        description="what drafts with factors show beside light and contrast; lit_surface: public scenes of a wall "
        "with folds and coloured patches, a dome over each connected foreground and seldom one without a label, under "
        "a lamp at the camera, for endoscopy",
    )
    mixed_patients: Annotated[int, Field(ge=0)] = Field(
        0,
        description="without privacy alone: what so many patients show beside these distributions is mixed in each "
        "draft, with its covariance from voxel to voxel; 0: a public random field",
    )
    template_centre_mm: tuple[Finite, Finite, Finite] | None = Field(
        None,
        description="for T1-weighted MRI of the brain: where the organ's centre lies in the public MNI152 template "
        "(RAS+), which is the guess that noisy statistics are pulled to; None: no template",
    )
    clip_norm: Positive = Field(
        1.0, description="of a patient's vector; below what any has (hippocampus MRI 1.3 to 2.2) each counts alike"
    )

    @property
    def cosines(self) -> tuple[int, ...]:
        """Return ``coefficients``, which must be named or planned (``medsynth.privacy.budget.plan_features``)."""
        if self.coefficients is None:
            raise ValueError("train.appearance.coefficients is not planned yet")
        return self.coefficients


class SegmenterRecipe(Section):
    """A segmentation network and how it is trained."""

    channels: Annotated[tuple[Count, ...], Field(min_length=2)] = (16, 32, 64, 128)
    steps: Count = 600
    batch_size: Count = 4
    learning_rate: Positive = 2e-3
    augment: bool = True
    largest_component: bool = Field(
        False,
        description="predictions keep their largest connected part alone: for a foreground that is one organ or lesion",
    )


class Labelling(SegmenterRecipe):
    """Networks, trained on patients, that say what generated images show."""

    networks: Annotated[int, Field(ge=0, le=20)] = Field(
        0,
        description="without privacy alone: so many networks outline each image anew, and what they say together takes "
        "the place of the label map that it was drawn for; 0: pairs keep their label maps",
    )


MOST_STEPS = 1_000_000
"""Of a private training; far more are never worth their noise, and to account them would fill the memory."""


class Train(Section):
    """The mask-conditioned latent denoiser."""

    conditioning: Literal["concat", "spade", "cross_attention"] = Field(
        "concat", description="how the label map reaches the network: beside its input, in its norms, as tokens"
    )
    channels: Annotated[tuple[Count, ...], Field(min_length=1)] = (64, 96)
    attention_levels: tuple[bool, ...] | None = Field(
        None, description="levels that attend; None: none, with cross_attention the deepest; the middle always does"
    )
    res_blocks: Count = 1
    norm_groups: Count = 16
    head_channels: Count = 32
    noise_steps: Count = 1000
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = "squaredcos_cap_v2"
    mask_dropout: Fraction = Field(0.1, description="rate of dropped masks, for classifier-free guidance")
    ema_decay: Fraction = 0.999
    pretrain_steps: Annotated[int, Field(ge=0)] = 1000
    pretrain_batch_size: Count = 8
    pretrain_learning_rate: Positive = 1e-3
    pretrain_phantoms: Count = 400
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="of the network in pre-training, training without privacy and sampling; private steps are float32",
    )
    trainable: Literal["all", "bias_norm", "lora"] = "all"
    lora_rank: Count = 4
    steps: Annotated[int, Field(ge=0, le=MOST_STEPS)] = Field(1500, description="on patients; at most 1,000,000")
    learning_rate: Positive = 1e-3
    batch_size: Count = Field(4, description="only for epsilon inf; a private run samples patients at `sampling_rate`")
    mirrored: bool = Field(
        False,
        description="without privacy alone: the denoiser meets patients' images mirrored, and squares turned, at "
        "random; for photographs, where left may be right",
    )
    sampling_rate: Annotated[float, BeforeValidator(_number), Field(gt=0, le=1)] = 0.25
    clip_norm: Positive | None = Field(None, description="None: the median over public phantoms")
    draws: Count = Field(4, description="noise draws a patient averaged before the clip")
    max_records: Count = Field(1, description="at most so many slices or scans a patient and step")
    backend: Literal["bookkeeping", "unit", "opacus"] = "bookkeeping"
    appearance: Appearance = Appearance()
    labelling: Labelling = Labelling()


class Synthesise(Section):
    """The pairs that are rendered."""

    pairs: Count = 200
    scheduler: Literal["ddpm", "ddim", "pndm", "dpm-solver++", "unipc"] = "dpm-solver++"
    steps: Count = 10
    start: Fraction = Field(
        1.0, description="1: from noise; less: from drafts of train.appearance, noised so far; 0: the drafts themselves"
    )
    drafts: Fraction = Field(
        0.0, description="share of the pairs that are drafts themselves; the others begin at `start`"
    )
    guidance: Number = Field(1.0, ge=0, description="1: as conditioned; above: classifier-free guidance")
    batch_size: Count = 8
    volume_scale: dict[str, Positive] = Field(
        {}, description="label name to a factor on its volume in every pair; labels not named keep theirs"
    )
    volume_median: dict[str, Positive] = Field(
        {}, description="label name to its median volume over the pairs, mm^3 (mm^2 in 2D, pixels without spacing)"
    )

    @property
    def drawn_drafts(self) -> int:
        """Return how many pairs are drafts themselves."""
        return self.pairs if self.start == 0 else round(self.pairs * self.drafts)

    @property
    def drafts_alone(self) -> bool:
        """Whether every pair is a draft: no denoiser makes any."""
        return self.drawn_drafts == self.pairs

    @property
    def drafted(self) -> bool:
        """Whether any pair is a draft of the appearance statistics, or begins from one."""
        return self.start < 1 or self.drafts > 0

    @model_validator(mode="after")
    def _one_request_a_label(self) -> Self:
        both = sorted(self.volume_scale.keys() & self.volume_median.keys())
        if both:
            raise ValueError(f"volume_scale and volume_median both name {', '.join(both)}: one request a label")
        return self


class Segment(SegmenterRecipe):
    """The downstream segmentation model; one recipe for real, synthetic and mixed training."""

    regimes: tuple[Literal["real_only", "synthetic_only", "mixed", "reconstructed"], ...] = Field(
        ("real_only", "synthetic_only", "mixed"),
        description="reconstructed: patients passed through the codec, the most that pairs in its latents can teach",
    )
    seeds: Annotated[tuple[int, ...], AfterValidator(_each_once)] = (0,)


class Evaluate(Section):
    """The internal report."""

    bootstrap: Count = 2000
    montage: Count = 6
    agreement_pairs: Count = Field(64, description="synthetic pairs that the real-trained net segments")


class Audit(Section):
    """What is tried to falsify the claim, on mechanisms and on the results; internal."""

    record_replay: bool = Field(True, description="the study's mechanisms with and without one patient, same noise")
    gradients: bool = Field(True, description="norms of the trained model against a naive loop")
    step: bool = Field(True, description="one step of each mechanism, with and without a canary")
    one_run: bool = Field(True, description="many canaries through one whole training")
    generator: bool = Field(True, description="membership inference on the denoiser and on drafts")
    pairs: bool = Field(True, description="membership inference and copy detection on the synthetic pairs alone")
    neighbours: Annotated[int, Field(ge=1)] = Field(2, description="real patients that record-replay takes out")
    repeats: Annotated[int, Field(ge=50_000)] = Field(50_000, description="runs of a step with, and as many without")
    canaries: Annotated[int, Field(ge=100)] = Field(20_000, description="at most; as many as the claim needs are taken")
    patients: Annotated[int, Field(ge=2)] = Field(40, description="at most so many of each side meet the generator")
    bootstrap: Annotated[int, Field(ge=100)] = Field(
        1000, description="samples behind each 95 % interval; copies are judged by 10,000 permutations besides"
    )


class Export(Section):
    """The release."""

    formats: Annotated[tuple[Literal["nifti", "dicom", "png"], ...], Field(min_length=1)] = Field(
        ("nifti", "dicom"), description="one at least; png is written of two-dimensional pairs alone"
    )
    dicom_pairs: Count = Field(
        20, description="pairs that are also written as DICOM series + SEG; all where no other format holds them"
    )
    uncertified: bool = Field(False, description="allow a release without certificate, marked UNCERTIFIED")
    dataset_name: str = "Synthetic"
    licence: str = "CC-BY-4.0"


class Compute(Section):
    """What only costs time; no privacy knob lives here."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Field(ge=0)] = Field(0, description="0: one a core that the process may use")
    workers: Count = Field(2, description="processes side by side where a stage can use them")


class Tracking(Section):
    """MLflow; embedded in the run folder unless a tracking URI is given."""

    uri: str | None = None
    experiment: str = "medsynth"
