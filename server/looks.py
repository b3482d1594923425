"""What each release of a warm-up looks at: fixed before the first site is asked for it, for every later attempt too.

What would be clear depends on who is there, and a site answers one question a round. If a second attempt, or a resumed
run, asked for another map, because a site came or went, those that were charged by the first could not be heard any
more. Out of scope: choosing the map (server/lens).
"""

from collections.abc import Callable

from common.config import ImageConfig
from common.errors import ResumeError
from common.look import look_dims
from server.run_folder import RunFolder, read_fixed, write_fixed

_KEY = "looks"


def fix_look(folder: RunFolder, image: ImageConfig, number: int, choose: Callable[[], str]) -> str:
    """Return what the release of a round looks at: what was fixed before, else what is chosen now, which is kept.

    Args:
        folder: The run's.
        image: What an image is.
        number: Of the round.
        choose: Says what is clear with the sites that are there; not asked where it is fixed.

    Raises:
        ConfigError: What `choose` raises where nothing is clear.
        ResumeError: `looks.json` does not read.
        StorageError: It cannot be written.

    Guarantees:
        - same_question: Every attempt at a round looks at the same, whoever comes and goes, and after a crash too.
    """
    fixed = _read(folder, image)
    if str(number) not in fixed:
        fixed[str(number)] = choose()
        write_fixed(folder.looks, _KEY, fixed)
    return fixed[str(number)]


def _read(folder: RunFolder, image: ImageConfig) -> dict[str, str]:
    looks = read_fixed(folder.looks, _KEY, str)
    if unknown := set(looks.values()) - look_dims(image).keys():
        raise ResumeError(
            f"looks.json names {', '.join(sorted(unknown))}, which this release does not know. Resume with the release "
            "that wrote it."
        )
    return looks
