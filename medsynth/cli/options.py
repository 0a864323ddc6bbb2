"""Arguments and options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[Path, typer.Argument(help="the study, a YAML file", metavar="CONFIG")]
Source = Annotated[
    Path | None,
    typer.Option("--input", help="the hospital's folder: DICOM, MSD, nnU-Net or image pairs; ingest reads it"),
]
Run = Annotated[Path, typer.Option("--out", help="the run folder; stage folders are made in it")]
Replace = Annotated[bool, typer.Option("--replace", help="make finished stages again whose settings changed")]
Override = Annotated[
    list[str] | None, typer.Option("--set", help="one value of the configuration, e.g. --set privacy.epsilon=3")
]
