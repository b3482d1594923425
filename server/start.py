"""What a run starts from: with secure-sum its cohort, and the generator that was trained on public data before, if any.

That generator stands in `start/` of the run folder. Out of scope: training one (simulations/pretrain).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import final

from torch import nn

from common.artefact import load_generator, save_generator
from common.config import Config
from common.errors import ConfigError
from common.files import make_folder
from common.messages import Arrays
from server.cohort import Declared, fix_cohort
from server.rounds import Members
from server.run_folder import RunFolder

_NAME = "start"


@final
@dataclass(frozen=True)
class Beginning:
    """What the first round depends on.

    Attributes:
        run_id: The run, as the sites know it.
        cohort: With secure-sum the sites that take part with their declared patients; empty with local training.
        weights: Of a generator that was trained on public data; None: random ones.
    """

    run_id: str
    cohort: Declared
    weights: Arrays | None


def begin(folder: RunFolder, config: Config, members: Members) -> Beginning:
    """Read what a run starts from, and fix its cohort.

    Raises:
        ConfigError: The generator is of another model or of other images.
        WireError: A file of the generator is damaged.
        FederationError: With secure-sum nobody may take part.
        ResumeError: `cohort.json` does not read.
    """
    return Beginning(folder.run_id, fix_cohort(folder, config, members), read_start(folder, config))


def write_start(run: Path, generator: nn.Module, config: Config) -> None:
    """Put a generator into a run's folder as the one to start from.

    Raises:
        StorageError: A file could not be written.
    """
    save_start(run / _NAME, generator, config)


def save_start(path: Path, generator: nn.Module, config: Config) -> None:
    """Write a generator that saw public images alone, in the form in which `load_start` reads it.

    Args:
        path: The folder; made.
        generator: The generator.
        config: Of the run that shall start from it.

    Raises:
        StorageError: A file could not be written.
    """
    save_generator(make_folder(path), generator, config, "public", 0, {})


def has_start(run: Path) -> bool:
    """Tell whether a generator to start from stands in a run's folder, whole."""
    return (run / _NAME / "generator.json").exists()


def read_start(folder: RunFolder, config: Config) -> Arrays | None:
    """Read the weights that a run starts from, or None where it starts from random ones.

    Raises:
        ConfigError: They are of another model or of other images.
        WireError: A file is damaged.
    """
    if not has_start(folder.path):
        return None
    generator = load_start(folder.path / _NAME, config)
    return {f"generator.{name}": parameter.detach().numpy() for name, parameter in generator.named_parameters()}


def load_start(path: Path, config: Config) -> nn.Module:
    """Load a generator that a run could start from.

    Args:
        path: Holds generator.safetensors and generator.json.
        config: The run's configuration, with its classes.

    Raises:
        ConfigError: It is of another model or of other images, or learned from patients: what it cost them would be
            forgotten.
        ResumeError: No generator stands there.
        WireError: A file is damaged.
    """
    generator, info = load_generator(path)
    if info.epsilon_by_site:
        raise ConfigError(
            f"Expected in {path} a generator that saw public images alone, got that of a run with the patients of "
            f"{', '.join(sorted(info.epsilon_by_site))}. Make one with `fedmedgan-simulate pretrain`."
        )
    images = (info.image.size, info.image.channels, len(info.image.classes))
    wanted = (config.image.size, config.image.channels, len(config.image.classes))
    if info.model != config.model or images != wanted:
        raise ConfigError(
            f"Expected in {path} a generator of model {config.model.name} for (size, channels, classes) "
            f"= {wanted} with the widths of the run, got {info.model.name} for {images}. Remove the folder, or train "
            "one for this run."
        )
    return generator
