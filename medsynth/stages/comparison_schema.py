"""What ``compare.json`` holds; ``compare.schema.json`` beside it is the JSON schema of these classes."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _known(value: Any) -> Any:
    """Let what cannot be computed be null: JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _epsilon(value: Any) -> Any:
    return "inf" if isinstance(value, float) and math.isinf(value) else value


Number = Annotated[float | None, BeforeValidator(_known)]
Epsilon = Annotated[float | Literal["inf"], BeforeValidator(_epsilon)]
Kind = Literal["real_only", "strong_augmentation", "synthetic_only", "random_contrast", "mixed", "floor"]


class Part(BaseModel):
    """A frozen part of the file; null stands for what cannot be computed."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Measured(Part):
    """A mean over patients (label agreement: over pairs) with 95 % bootstrap intervals."""

    mean: Number
    ci95: tuple[Number, Number] = Field(description="patients drawn again, seeds averaged")
    ci95_with_seeds: tuple[Number, Number] = Field(description="patients and seeds drawn again, crossed")


class Scores(Part):
    """A measure over all labels (each patient's mean over its labels) and by label name."""

    all_labels: Measured
    per_label: dict[str, Measured]


class TrainingSet(Part):
    """What a segmentation model reaches on the held-out patients, by what it was trained on."""

    kind: Kind
    run: str | None = Field(description="label of the run whose pairs or label maps were used")
    real_patients: int = Field(description="train patients used; they are nested within a seed")
    synthetic_images: int
    dice: Scores
    surface_dice: Scores = Field(description="share of both surfaces within `protocol.tolerance`")
    hd95: Scores = Field(description="95 % Hausdorff distance in `protocol.distance_unit`")
    skill: Measured = Field(description="(Dice - floor) / (Dice of all real patients - floor)")
    relative_to_real: Measured = Field(description="Dice / Dice of all real patients")
    dice_by_seed: dict[str, Number]


class Fidelity(Part):
    """How the crowd of synthetic images differs from the train patients'; beside it, held-out patients as yardstick."""

    mmd: Number = Field(description="squared maximum mean discrepancy in features of our own network")
    mmd_held_out: Number
    fid: Number = Field(description="squared Fréchet distance in the same features, both crowds of `fid_images` images")
    fid_held_out: Number
    fid_images: int
    similarity: str = Field(description="how the next two were measured: MS-SSIM, or SSIM where there is no room")
    similarity_within_synthetic: Number = Field(description="near 1: all images are alike")
    similarity_within_real: Number


class Memorisation(Part):
    """Whether synthetic images are nearer to train patients than held-out patients are."""

    median_ratio: Number = Field(description="distance to the nearest train image over that of held-out patients")
    nearer_than_held_out_p5: Number = Field(description="share nearer than the nearest 5 % of held-out patients")
    copies: Number = Field(description="share of pairs nearer to a train patient than to any held-out one")
    copies_ci95: tuple[Number, Number]
    copies_by_chance: Number = Field(description="the same when patients change sides at random")


class Run(Part):
    """One of the runs that are compared."""

    label: str
    study: str
    epsilon: Epsilon = Field(description="what the study was planned for")
    spent: Epsilon = Field(description="what its ledger composes to")
    delta: float
    pairs: int
    synthetic: str = Field(description="digest of its synthetic/ folder")
    agreement: Scores = Field(
        description="Dice between what images were drawn for and what nets of all real patients see"
    )
    agreement_pairs: int
    labellers: int = Field(
        0, description="networks that labelled the pairs anew; agreement is with what images were drawn for"
    )
    fidelity: Fidelity
    memorisation: Memorisation


class Protocol(Part):
    """How everything was trained and measured; the same for every training set."""

    quick: bool = Field(description="shortened trainings: to try the command, not to quote")
    seeds: tuple[int, ...]
    numbers: tuple[int, ...]
    steps: int
    batch_size: int
    learning_rate: float
    channels: tuple[int, ...]
    bootstrap: int
    tolerance: float = Field(description="of surface Dice, in `distance_unit`")
    distance_unit: Literal["mm", "pixels"]
    train_patients: int
    held_out_patients: int


class Comparison(Part):
    """The whole file; internal, like everything that was measured on held-out patients."""

    schema_version: Literal[1] = 1
    medsynth_version: str
    protocol: Protocol
    floor: TrainingSet = Field(description="one constant mean shape for everybody: looks at no image")
    runs: tuple[Run, ...]
    training_sets: tuple[TrainingSet, ...]

    @property
    def real(self) -> TrainingSet:
        """What all real patients teach: the yardstick of skill."""
        real = [one for one in self.training_sets if one.kind == "real_only"]
        return max(real, key=lambda one: one.real_patients)
