"""A study: its sections together, read from a YAML file; unknown keys are refused with their path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from medsynth.errors import ConfigError
from medsynth.sections import (
    Appearance,
    Audit,
    Compute,
    Encode,
    Evaluate,
    Export,
    Grid,
    Ingest,
    Labelling,
    Masks,
    Phantoms,
    Privacy,
    Section,
    Segment,
    SegmenterRecipe,
    Shares,
    Synthesise,
    Tracking,
    Train,
)

__all__ = [
    "Appearance",
    "Audit",
    "Compute",
    "Encode",
    "Evaluate",
    "Export",
    "Grid",
    "Ingest",
    "Labelling",
    "Masks",
    "Phantoms",
    "Privacy",
    "Segment",
    "SegmenterRecipe",
    "Shares",
    "Study",
    "Synthesise",
    "Tracking",
    "Train",
    "dump",
    "flatten",
    "load",
    "parse",
    "parse_overrides",
]


class Study(Section):
    """A whole study: one YAML file."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    description: str = ""
    seed: int = Field(0, description="everything random except privacy noise and privacy sampling")
    grid: Grid
    privacy: Privacy
    ingest: Ingest = Ingest()
    encode: Encode = Encode()
    masks: Masks = Masks()
    train: Train = Train()
    synthesise: Synthesise = Synthesise()
    segment: Segment = Segment()
    evaluate: Evaluate = Evaluate()
    audit: Audit = Audit()
    export: Export = Export()
    compute: Compute = Compute()
    tracking: Tracking = Tracking()

    @property
    def declared_in_training(self) -> float:
        """Return how many of the declared patients train: public; sums over patients are divided by it."""
        return self.privacy.declared_patients * (1 - self.ingest.test_fraction)

    @property
    def denoiser_counts(self) -> bool:
        """Return whether a denoiser learns from patients or renders pairs; else it knows nobody and shows nothing."""
        return bool(self.train.steps) or not self.synthesise.drafts_alone

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        dims = self.grid.spatial_dims
        for name, value in (
            ("masks.coefficients", self.masks.coefficients),
            ("train.appearance.coefficients", self.train.appearance.coefficients),
        ):
            if value is not None and len(value) != dims:
                raise ValueError(f"{name} has {len(value)} axes, grid.spatial_dims says {dims}")
        factor = 2**self.encode.levels
        if any(size % factor for size in self.grid.shape):
            raise ValueError(f"grid.shape must divide by 2^encode.levels = {factor}")
        if self.encode.codec == "kl" and len(self.encode.channels) != self.encode.levels + 1:
            raise ValueError("encode.channels needs encode.levels + 1 entries")
        if self.train.appearance.enabled and not self.train.pretrain_steps and not self.synthesise.drafted:
            raise ValueError("train.appearance.enabled pays for drafts that train.pretrain_steps 0 never uses")
        taught = self.train.pretrain_steps or self.train.steps
        if self.synthesise.drafts and not taught and not self.synthesise.drafts_alone:
            raise ValueError(
                "synthesise.drafts leaves pairs to a denoiser that nothing teaches: set synthesise.start to 0"
            )
        if self.synthesise.drafted and not self.train.appearance.enabled:
            raise ValueError(
                "synthesise.start below 1, or synthesise.drafts, needs drafts of train.appearance: enable it"
            )
        if self.train.appearance.template_centre_mm is not None:
            if not self.grid.mr_volumes:
                raise ValueError("train.appearance.template_centre_mm is for MR volumes of one channel with a spacing")
            if self.train.appearance.factors:
                raise ValueError("train.appearance.template_centre_mm guesses no factors: set one of both alone")
        if self.train.appearance.texture == "lit_surface" and (dims != 2 or not self.train.appearance.factors):
            raise ValueError(
                "train.appearance.texture lit_surface needs grid.spatial_dims 2 and train.appearance.factors above 0"
            )
        if self.train.appearance.texture == "lit_surface" and min(self.grid.shape) < 2:
            raise ValueError("train.appearance.texture lit_surface needs a grid.shape of at least 2 pixels an axis")
        if self.privacy.private and self.train.mirrored:
            raise ValueError("train.mirrored is for training without privacy, at privacy.epsilon inf alone")
        if not self.privacy.private and not self.name.endswith("-nonprivate"):
            raise ValueError("a study with privacy.epsilon inf must be named '*-nonprivate'")
        if self.privacy.private and self.masks.covariance == "full":
            raise ValueError("masks.covariance full drowns in noise at a finite privacy.epsilon: use diagonal")
        if self.grid.slice_axis is not None and dims != 2:
            raise ValueError("grid.slice_axis is for spatial_dims 2")
        if dims != 2 and set(self.export.formats) == {"png"}:
            raise ValueError("export.formats png is for grid.spatial_dims 2: nothing would be written")
        names = {name for value, name in self.grid.labels.items() if value > 0}
        unknown = sorted((self.synthesise.volume_scale.keys() | self.synthesise.volume_median.keys()) - names)
        if unknown:
            raise ValueError(f"synthesise asks for a volume of {', '.join(unknown)}, which grid.labels does not hold")
        return self

    @model_validator(mode="after")
    def _drafts_may_mix_patients(self) -> Self:
        if not self.train.appearance.mixed_patients:
            return self
        if self.privacy.private:
            raise ValueError(
                "train.appearance.mixed_patients bounds no patient's share: use it with privacy.epsilon inf alone"
            )
        if not self.train.appearance.enabled:
            raise ValueError("train.appearance.mixed_patients needs train.appearance.enabled")
        if self.train.appearance.factors:
            raise ValueError("train.appearance.mixed_patients is for distributions: train.appearance.factors must be 0")
        return self

    @model_validator(mode="after")
    def _pairs_may_be_labelled_anew(self) -> Self:
        if not self.train.labelling.networks:
            return self
        if self.privacy.private:
            raise ValueError(
                "train.labelling.networks bounds no patient's share: use it with privacy.epsilon inf alone"
            )
        if self.synthesise.volume_scale or self.synthesise.volume_median:
            raise ValueError(
                "synthesise.volume_scale and volume_median ask for label maps, and train.labelling.networks draws them "
                "anew from images: use one of both"
            )
        return self

    @model_validator(mode="after")
    def _segmenters_fit(self) -> Self:
        recipes: dict[str, SegmenterRecipe] = {"segment": self.segment}
        if self.train.labelling.networks:
            recipes["train.labelling"] = self.train.labelling
        for name, recipe in recipes.items():
            divisor = 2 ** (len(recipe.channels) - 1)  # every level but the last halves the image's axes
            if any(size % divisor for size in self.grid.shape):
                raise ValueError(
                    f"{name}.channels has {len(recipe.channels)} levels: grid.shape must divide by {divisor}"
                )
        return self

    @model_validator(mode="after")
    def _denoiser_fits(self) -> Self:
        train, levels = self.train, len(self.train.channels)
        if train.attention_levels is not None and len(train.attention_levels) != levels:
            raise ValueError("train.attention_levels needs one entry a level of train.channels")
        if any(width % train.norm_groups for width in train.channels):
            raise ValueError("train.channels must divide by train.norm_groups")
        attends = (*(train.attention_levels or (False,) * levels)[:-1], True)
        if any(width % train.head_channels for width, there in zip(train.channels, attends, strict=True) if there):
            raise ValueError(
                "train.channels must divide by train.head_channels where attention is: at the last, and where "
                "train.attention_levels says so"
            )
        if train.steps or train.pretrain_steps:
            # Every level but the last halves the latent's axes; a token of cross-attention stands for two positions.
            halvings = max(levels - 1, 1 if train.conditioning == "cross_attention" else 0)
            divisor = 2 ** (self.encode.levels + halvings)
            if any(size % divisor for size in self.grid.shape):
                raise ValueError(
                    f"grid.shape must divide by {divisor}: codec halves it {self.encode.levels} times, the denoiser "
                    f"of {levels} levels with train.conditioning '{train.conditioning}' {halvings} times more"
                )
        return self


def _read_yaml(text: str) -> Any:
    """Return what a YAML text holds; a key that is given twice, of which YAML takes the last, is a YAMLError."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        _refuse_repeated(node, set())
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _refuse_repeated(node: yaml.Node | None, seen: set[int]) -> None:
    """Look at a tree before anything is built, which moves merged keys into the nodes that merge them."""
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        given: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in given:
                    raise yaml.MarkedYAMLError(problem=f"'{key.value}' is given twice", problem_mark=key.start_mark)
                given.add(key.value)
            _refuse_repeated(value, seen)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_repeated(value, seen)


def load(path: Path, overrides: dict[str, Any] | None = None) -> Study:
    """Read a study from a YAML file.

    Args:
        path: the YAML file.
        overrides: values by dotted path that replace the file's, e.g. ``{"privacy.epsilon": 3}``.

    Raises:
        ConfigError: unreadable file, unknown key, wrong type or a contradiction; the message names the dotted path.
    """
    try:
        raw = _read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read configuration '{path.name}': {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"configuration '{path.name}' is no UTF-8 text: save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"configuration '{path.name}' is no valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"configuration '{path.name}' must be a mapping of sections")
    for dotted, value in (overrides or {}).items():
        _set(raw, dotted.split("."), value)
    return parse(raw, path.name)


def parse(raw: dict[str, Any], name: str = "configuration") -> Study:
    """Validate a mapping as a study (see :func:`load`)."""
    try:
        return Study.model_validate(raw)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc'])) or 'study'}: {_explain(e)}" for e in error.errors()]
        raise ConfigError("\n".join([f"'{name}' has {len(lines)} problem(s):", *lines])) from None


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """Return values by dotted path from texts such as ``privacy.epsilon=3`` (the value is YAML).

    Raises:
        ConfigError: a text without ``=``, or a value that is no valid YAML.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set takes name=value, got '{pair}'")
        try:
            values[name] = _read_yaml(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {name}: the value is no valid YAML") from error
    return values


def dump(study: Study) -> str:
    """Return the study, defaults filled in, as YAML."""
    return yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def flatten(study: Study) -> dict[str, str]:
    """Return every leaf of the study by dotted path, as text, but those of ``tracking``, which may hold a password."""

    def walk(prefix: str, value: Any) -> dict[str, str]:
        if isinstance(value, dict) and value:
            return {k: v for key, child in value.items() for k, v in walk(f"{prefix}.{key}", child).items()}
        return {prefix.removeprefix("."): str(value)}

    return walk("", study.model_dump(mode="json", exclude={"tracking"}))


def _set(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"'{'.'.join(keys)}' cannot be set: '{key}' is a value and not a section")
    tree[keys[-1]] = value


def _explain(error: Any) -> str:
    if error["type"] != "extra_forbidden":
        return str(error["msg"]).removeprefix("Value error, ")
    section: Any = Study
    for key in error["loc"][:-1]:
        section = getattr(section.model_fields.get(key), "annotation", None)
        if section is None:
            break
    import difflib

    known = list(section.model_fields) if section is not None else []
    close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
    return "unknown key" + (f", did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}")
