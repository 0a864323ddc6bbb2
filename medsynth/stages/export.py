"""export: put the certified payload and its certificate into ``release/``, and verify it before it appears."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from medsynth import __version__, store
from medsynth.config import Study
from medsynth.errors import CertificationError
from medsynth.logs import say
from medsynth.release.marks import CERTIFICATE, PAYLOAD, PUBLIC_KEY, UNCERTIFIED
from medsynth.release.verify import verify
from medsynth.stages.inputs import config_digest, stage_inputs
from medsynth.store import Manifest
from medsynth.tracking import Tracker


def run(config: Study, inputs: Mapping[str, Path], out: Path, tracker: Tracker) -> Manifest:
    """Write ``release/``, the only folder that may leave the hospital.

    Files are copied, not linked: a release that somebody edits must not change the certificate's own copy.

    Args:
        config: the study.
        inputs: ``certificate``.
        out: the folder to write.
        tracker: unused; a release is not an experiment.

    Raises:
        CertificationError: the certificate is uncertified and the configuration does not allow that, or it was written
            by another version of medsynth.
        VerificationError: the release would not verify.
    """
    folders = stage_inputs(inputs, "certificate")
    certificate = folders["certificate"]
    manifest = store.read_manifest(certificate)
    uncertified = (certificate / PAYLOAD / UNCERTIFIED).exists()
    if uncertified and not config.export.uncertified:
        raise CertificationError(
            "the certificate folder holds no certificate: its export is refused unless the config says "
            "export.uncertified: true"
        )
    if not uncertified and not manifest.releasable:
        raise CertificationError(f"the certificate folder is {manifest.sensitivity}, and only released files may leave")
    if not uncertified and manifest.medsynth_version != __version__:
        raise CertificationError(
            f"the certificate was written by medsynth {manifest.medsynth_version}, this is {__version__}: certify again"
        )
    with store.create(out, "export", config_digest(config, "export"), folders) as folder:
        shutil.copytree(certificate / PAYLOAD, folder.path, dirs_exist_ok=True, copy_function=shutil.copyfile)
        if uncertified:
            say("exported without certificate: the release makes no privacy promise")
            return folder.finish("internal")
        for name in (CERTIFICATE, PUBLIC_KEY):
            shutil.copyfile(certificate / name, folder.path / name)
        key = certificate / PUBLIC_KEY
        finished = folder.finish("released", check=lambda path: verify(path, key).require())
        say("exported", files=len(finished.files))
        return finished
