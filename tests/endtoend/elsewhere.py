"""Run a study on a pretended GPU, in a process of its own: ``python elsewhere.py SETTINGS.json HOSPITAL RUN``.

What torch is told of the device cannot be taken back.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pretended_gpu import count_elsewhere, pretended_gpu

from medsynth import config
from medsynth.study import run_study


def main(settings: str, hospital: str, run: str) -> None:
    study = config.parse(json.loads(Path(settings).read_text(encoding="utf-8")))
    with pretended_gpu():
        run_study(study, Path(hospital), Path(run))
    print(json.dumps({"operations": count_elsewhere()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
