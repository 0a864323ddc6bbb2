"""Configurations: typos are named, contradictions are refused, and what is printed can be read again."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from medsynth import config
from medsynth.config import Privacy
from medsynth.errors import ConfigError


def with_value(settings: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(settings)
    *above, last = path.split(".")
    section = changed
    for name in above:
        section = section.setdefault(name, {})
    section[last] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("privcy", {}, "privcy: unknown key, did you mean 'privacy'"),
        ("privacy.epsilom", 3, "privacy.epsilom: unknown key, did you mean 'epsilon'"),
        ("privacy.shares.mask", 1, "privacy.shares.mask: unknown key, did you mean 'masks'"),
        ("encode.zzz", 1, "encode.zzz: unknown key; known: codec"),
        ("train.steps", "many", "train.steps: Input should be a valid integer"),
        ("train.sampling_rate", 1.5, "train.sampling_rate: Input should be less than or equal to 1"),
        ("privacy.epsilon", 0, "privacy: epsilon must be above 0"),
        ("privacy.epsilon", ".nan", "privacy.epsilon"),
        ("privacy.delta", 0.01, "delta 0.01 is above 1/(10 N) = 0.00625 for 16 declared patients"),
        ("privacy.entropy", "fixed", "privacy.entropy"),
        ("grid.shape", [16, 16, 16], "shape has 3 axes, spatial_dims says 2"),
        ("grid.shape", [16, 15], "grid.shape must divide by 2^encode.levels = 2"),
        ("grid.labels", {0: "none", 2: "organ"}, "without gaps"),
        ("grid.release_shape_range", [[4, 20], [4, 16]], "does not fit in a grid axis of 16"),
        ("masks.coefficients", [4, 4, 4], "masks.coefficients has 3 axes"),
        ("masks.covariance", "full", "use diagonal"),
        ("train.appearance.mixed_patients", 5, "bounds no patient's share: use it with privacy.epsilon inf alone"),
        ("train.appearance.template_centre_mm", [0, 0, 0], "MR volumes of one channel with a spacing"),
        ("train.appearance.template_centre_mm", [0, 0, ".nan"], "train.appearance.template_centre_mm"),
        ("train.appearance.template_centre_mm", [0, 0], "train.appearance.template_centre_mm"),
        ("train.appearance.texture", "lit_surface", "needs grid.spatial_dims 2 and train.appearance.factors above 0"),
        ("train.channels", [8, 6], "must divide by train.norm_groups"),
        ("train.attention_levels", [True], "one entry a level"),
        ("train.head_channels", 3, "must divide by train.head_channels where attention is"),
        ("train.conditioning", "film", "train.conditioning: Input should be 'concat', 'spade' or 'cross_attention'"),
        ("train.conditioning", "cross_attention", None),
        ("grid.shape", [16, 14], "grid.shape must divide by 4: codec halves it 1 times, the denoiser of 2 levels"),
        ("encode.codec", "kl", None),
        ("encode", {"codec": "kl", "levels": 1, "channels": [8]}, "encode.levels + 1"),
        ("ingest.patient_id_pattern", "no-group", "needs one group"),
        ("ingest.patient_id_pattern", "(", "no regular expression"),
        ("name", "Tiny Study", "name: "),
        ("export.formats", [], "export.formats: Tuple should have at least 1 item"),
        ("export.formats", ["png"], None),
        ("segment.seeds", [0, 0], "segment.seeds: each number may be given once"),
        ("synthesise.volume_scale", {"organ": 0}, "synthesise.volume_scale.organ: Input should be greater than 0"),
        ("synthesise.volume_scale", {"liver": 2}, "a volume of liver, which grid.labels does not hold"),
        ("synthesise.volume_median", {"background": 2}, "a volume of background"),
        (
            "synthesise",
            {"volume_scale": {"organ": 2}, "volume_median": {"organ": 2}},
            "both name organ: one request a label",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_path(
    path: str, value: Any, message: str | None, tiny_settings: dict[str, Any]
) -> None:
    raw = with_value(tiny_settings, path, value)
    if message is None:
        config.parse(raw)
        return
    with pytest.raises(ConfigError) as caught:
        config.parse(raw, "study.yaml")
    assert message in str(caught.value) and "'study.yaml' has 1 problem(s)" in str(caught.value)


def test_pictures_of_volumes_are_no_release() -> None:
    grid = {"spatial_dims": 3, "shape": [16, 16, 16], "labels": {0: "none", 1: "organ"}}
    raw: dict[str, Any] = {"name": "volumes", "grid": grid, "privacy": {"epsilon": 8, "declared_patients": 16}}
    config.parse({**raw, "export": {"formats": ["nifti", "png"]}})
    with pytest.raises(ConfigError, match=r"export\.formats png is for grid\.spatial_dims 2"):
        config.parse({**raw, "export": {"formats": ["png"]}})


def test_all_problems_are_said_at_once(tiny_settings: dict[str, Any]) -> None:
    raw = with_value(with_value(tiny_settings, "train.stepz", 1), "synthesise.pairs", 0)
    with pytest.raises(ConfigError, match=r"2 problem\(s\)[\s\S]*train.stepz[\s\S]*synthesise.pairs"):
        config.parse(raw)


def test_an_infinite_epsilon_needs_its_name_and_survives_a_round_trip(tiny_settings: dict[str, Any]) -> None:
    raw = with_value(tiny_settings, "privacy.epsilon", math.inf)
    with pytest.raises(ConfigError, match="-nonprivate"):
        config.parse(raw)
    study = config.parse({**raw, "name": "tiny-nonprivate"})
    assert not study.privacy.private
    text = config.dump(study)
    assert "epsilon: .inf" in text and config.parse(yaml.safe_load(text)) == study


def test_mixed_patients_are_not_for_factors(tiny_settings: dict[str, Any]) -> None:
    raw = {**with_value(tiny_settings, "privacy.epsilon", math.inf), "name": "tiny-nonprivate"}
    raw = with_value(raw, "train.appearance.mixed_patients", 5)
    assert config.parse(raw).train.appearance.mixed_patients == 5
    with pytest.raises(ConfigError, match=r"mixed_patients needs train\.appearance\.enabled"):
        config.parse(with_value(raw, "train.appearance.enabled", False))
    with pytest.raises(ConfigError, match=r"train\.appearance\.factors must be 0"):
        config.parse(with_value(raw, "train.appearance.factors", 4))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("privacy.epsilon", 8.0, r"train\.labelling\.networks bounds no patient's share"),
        ("synthesise.volume_scale", {"organ": 2.0}, r"use one of both"),
        ("synthesise.volume_median", {"organ": 9.0}, r"use one of both"),
        ("train.labelling.channels", [4, 4, 4, 4, 4, 4], r"grid\.shape must divide by 32"),
    ],
)
def test_networks_label_pairs_without_privacy_and_not_where_volumes_are_asked_for(
    path: str, value: Any, words: str, tiny_settings: dict[str, Any]
) -> None:
    raw = {**with_value(tiny_settings, "privacy.epsilon", math.inf), "name": "tiny-nonprivate"}
    raw = with_value(raw, "train.labelling", {"networks": 2, "channels": [4, 8]})
    assert config.parse(raw).train.labelling.networks == 2
    with pytest.raises(ConfigError, match=words):
        config.parse(with_value(raw, path, value))


@pytest.mark.parametrize(
    ("channels", "words"),
    [([4, 4, 4, 4, 4, 4], r"segment\.channels has 6 levels: grid\.shape must divide by 32"), ([4], "at least 2 items")],
)
def test_a_segmentation_network_that_cannot_be_built_is_refused_before_the_first_stage(
    channels: list[int], words: str, tiny_settings: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=words):
        config.parse(with_value(tiny_settings, "segment.channels", channels))


def test_mirrored_patients_are_for_training_without_privacy(tiny_settings: dict[str, Any]) -> None:
    raw = with_value(tiny_settings, "train.mirrored", True)
    with pytest.raises(ConfigError, match=r"train\.mirrored is for training without privacy"):
        config.parse(raw)
    assert config.parse({**with_value(raw, "privacy.epsilon", math.inf), "name": "tiny-nonprivate"}).train.mirrored


def test_drafts_among_the_pairs_need_an_appearance_and_are_a_use_of_it(tiny_settings: dict[str, Any]) -> None:
    quick = with_value(tiny_settings, "train.pretrain_steps", 0)
    with pytest.raises(ConfigError, match=r"train\.pretrain_steps 0 never uses"):
        config.parse(quick)
    taught = with_value(with_value(tiny_settings, "synthesise.drafts", 0.5), "synthesise.pairs", 9)
    assert config.parse(taught).synthesise.drafted and config.parse(taught).synthesise.drawn_drafts == 4
    with pytest.raises(ConfigError, match="a denoiser that nothing teaches"):
        config.parse(with_value(with_value(taught, "train.pretrain_steps", 0), "train.steps", 0))
    for name, value in (("drafts", 1.0), ("start", 0.0)):
        drafts = with_value(with_value(quick, f"synthesise.{name}", value), "train.steps", 0)
        assert config.parse(drafts).synthesise.drafts_alone
    with pytest.raises(ConfigError, match=r"synthesise\.drafts, needs drafts of train\.appearance"):
        config.parse(with_value(with_value(quick, "synthesise.drafts", 0.5), "train.appearance.enabled", False))


def test_delta_is_free_without_privacy(tiny_settings: dict[str, Any]) -> None:
    raw = with_value(with_value(tiny_settings, "privacy.epsilon", math.inf), "privacy.delta", 0.5)
    assert config.parse({**raw, "name": "tiny-nonprivate"}).privacy.delta == 0.5


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "0.00001"])
def test_numbers_that_yaml_takes_for_texts_are_numbers(
    text: str, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(tiny_settings).replace("delta: 0.0001", f"delta: {text}"))
    assert config.load(path).privacy.delta == 1e-5
    assert config.load(path, config.parse_overrides([f"encode.learning_rate={text}"])).encode.learning_rate == 1e-5


def test_what_is_printed_is_read_as_the_same_study(tiny_settings: dict[str, Any]) -> None:
    study = config.parse(tiny_settings)
    assert config.parse(yaml.safe_load(config.dump(study))) == study


def test_every_leaf_has_a_dotted_path(tiny_settings: dict[str, Any]) -> None:
    leaves = config.flatten(config.parse(tiny_settings))
    assert leaves["privacy.shares.masks"] == "1.0" and leaves["grid.shape"] == "[16, 16]"
    assert not any("{" in value and value != "{}" for value in leaves.values())


def test_what_is_told_of_a_study_names_no_password_of_its_tracking(tiny_settings: dict[str, Any]) -> None:
    study = config.parse({**tiny_settings, "tracking": {"uri": "https://user:secret@example.org"}})
    assert not any("secret" in value for value in config.flatten(study).values())


def test_overrides_replace_values_and_make_sections(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in tiny_settings.items() if k != "export"}))
    wanted = config.parse_overrides(["privacy.epsilon=3", "export.dicom_pairs=2", "grid.shape=[8, 8]"])
    study = config.load(path, wanted)
    assert (study.privacy.epsilon, study.export.dicom_pairs, study.grid.shape) == (3, 2, (8, 8))


@pytest.mark.parametrize("text", ["privacy.epsilon", "=3", "privacy.epsilon=[", "name.deeper=1", "privacy.nothing=1"])
def test_an_override_that_makes_no_sense_is_a_config_error(
    text: str, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(tiny_settings))
    with pytest.raises(ConfigError):
        config.load(path, config.parse_overrides([text]))


@pytest.mark.parametrize(("text", "message"), [("a: [", "no valid YAML"), ("- 1", "mapping"), (None, "cannot read")])
def test_a_file_that_is_no_study_is_said_without_its_folder(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        config.load(path)
    assert str(tmp_path) not in str(caught.value)


def test_a_key_that_is_given_twice_is_refused(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    """YAML would take the last, and with it another epsilon."""
    path, text = tmp_path / "study.yaml", yaml.safe_dump(tiny_settings)
    path.write_text(f"{text}\nprivacy: {{epsilon: 50, declared_patients: 40}}\n")
    with pytest.raises(ConfigError, match="'privacy' is given twice"):
        config.load(path)
    path.write_text(text.replace("privacy:\n", "privacy:\n  epsilon: 3\n  'epsilon': 4\n"))
    with pytest.raises(ConfigError, match="'epsilon' is given twice"):
        config.load(path)
    path.write_text("name: &name tiny\nbase: &base {a: 1}\nother: {<<: *base, a: 2}\n? [1]\n: 2\n")
    with pytest.raises(ConfigError, match="no valid YAML"):
        config.load(path)
    path.write_text("shared: &shared {a: 1, b: 2}\nname: {<<: *shared, a: 2}\n")
    with pytest.raises(ConfigError, match="problem"):  # merging is no repetition
        config.load(path)
    path.write_text("x: {base: &A {a: 1}, b: &B {<<: *A, a: 2}}\nc: {<<: *B, a: 3}\nloop: &L [*L]\n")
    with pytest.raises(ConfigError, match="problem"):
        config.load(path)
    for text in ("grid: !!map foo", "grid: !!map [1]"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="no valid YAML"):
            config.load(path)
    with pytest.raises(ConfigError, match="no valid YAML"):
        config.parse_overrides(["privacy={epsilon: 3, epsilon: 4}"])


def test_a_file_that_is_no_utf8_is_said(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_bytes("name: für".encode("latin-1"))
    with pytest.raises(ConfigError, match="save it as UTF-8"):
        config.load(path)


def test_sections_are_frozen(tiny_settings: dict[str, Any]) -> None:
    study = config.parse(tiny_settings)
    with pytest.raises(ValidationError):
        study.privacy.epsilon = 100.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("section", "name", "value", "message"),
    [
        ("privacy", "epsilon", 0, "epsilon must be above 0, got 0"),
        ("privacy", "epsilon", -3, "epsilon must be above 0"),
        ("privacy", "epsilon", "nan", "epsilon must be above 0, got nan: 1 to 10 are usual"),
        ("privacy", "epsilon", "-inf", "epsilon must be above 0"),
        ("privacy", "delta", 0, r"at most 1/\(10 N\), got 0"),
        ("privacy", "delta", 1, r"at most 1/\(10 N\), got 1"),
        ("privacy", "delta", "nan", "got nan"),
        ("privacy", "delta", 0.0625, r"above 1/\(10 N\) = 0.00625 for 16 declared patients: lower it"),  # 1/N
        ("privacy", "delta", 0.007, r"above 1/\(10 N\)"),
        ("privacy", "trials", 0, "privacy.trials"),
        ("privacy", "declared_patients", 0, "privacy.declared_patients"),
        ("train", "sampling_rate", 0, "train.sampling_rate"),
        ("train", "sampling_rate", 1.5, "train.sampling_rate"),
        ("train", "sampling_rate", "nan", "train.sampling_rate"),
        ("train", "clip_norm", 0, "train.clip_norm"),
    ],
)
def test_a_promise_that_is_none_is_refused_with_what_to_do(
    tiny_settings: dict[str, Any], section: str, name: str, value: object, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config.parse({**tiny_settings, section: {**tiny_settings[section], name: value}})


@pytest.mark.parametrize(("values", "message"), [({"epsilon": 1e6}, "use .inf"), ({"delta": 1e-300}, "delta 1e-300")])
def test_a_promise_that_no_accountant_can_keep_is_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Privacy.model_validate({"declared_patients": 200, **values})
    assert Privacy(epsilon=1000, delta=1e-30, declared_patients=200).private
