"""Options of the command `generate`, the same for whoever draws; without torch, so that a help text comes at once."""

from pathlib import Path
from typing import Annotated

import typer

Out = Annotated[Path, typer.Option(help="Where the images go; a new folder.")]
Count = Annotated[int, typer.Option(min=1, max=1_000_000, help="How many images.")]
Labels = Annotated[str, typer.Option(help="all, a class, a comma list, or clear=0.7,nodule=0.3.")]
Seed = Annotated[int, typer.Option(min=0, help="The same seed draws the same images.")]
Form = Annotated[str, typer.Option(help="png or npz.")]
