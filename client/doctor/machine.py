"""The checks of the machine: disk, memory, GPU, versions, the socket. Numbers are rough and public: no patient's."""

import re
import socket
import stat
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch

from client.channel import read_frame, unpack_reply
from client.doctor.findings import Finding, failed, passed, to_do, warned
from client.operate import MAX_SOCKET_BYTES
from client.policy import Policy
from common.config import ImageConfig, ModelConfig
from common.errors import ExitCode, WireError
from common.models import build

GIB = 1 << 30
FAIL_DISK_BYTES, WARN_DISK_BYTES = 256 << 20, 2 * GIB
"""A round writes its reply, up to 32 MiB, and lines of the books; logs rotate."""
BASE_BYTES = GIB
"""Python, torch and the accountant, measured at about 0.6 GiB, rounded up."""
COPIES = 8
"""Of both networks' weights at once: weights, gradients, moments, averages, the request and the reply."""
CHUNK_IMAGES = 64
"""Of as many images the gradients may be held at a time."""
IMAGE_COPIES = 2
AGENT_WAIT_S = 5.0


def check_disk(free_bytes: int) -> Finding:
    """Check that the home's disk takes some runs' replies and books."""
    said = f"{free_bytes / GIB:.1f} GiB free"
    fix = "Free space: a full disk stops the site before anything is charged."
    if free_bytes < FAIL_DISK_BYTES:
        return failed("disk", f"{said}.", fix, ExitCode.STORAGE)
    return warned("disk", f"{said}.", fix) if free_bytes < WARN_DISK_BYTES else passed("disk", said)


def check_memory(available_bytes: int | None, needed_bytes: int) -> Finding:
    """Compare what is available with what the largest allowed model and the images come to, roughly."""
    said = f"about {needed_bytes / GIB:.1f} GiB for the largest allowed model and the images"
    if available_bytes is None:
        return warned("memory", f"{said}; what is available is not known here.", "Compare it with the machine's.")
    said += f", {available_bytes / GIB:.1f} GiB available"
    if available_bytes < needed_bytes:
        fix = "End other programs, add memory, or take models or sizes from allowed_models and allowed_image_sizes."
        return warned("memory", f"{said}.", fix)
    return passed("memory", said)


def check_gpu(built_for: str | None, devices: Sequence[str]) -> Finding:
    """Say what torch finds; without a GPU everything works, slower.

    Args:
        built_for: The CUDA version that torch was built for; None for a CPU build.
        devices: Names of the GPUs that the driver offers.
    """
    if devices:
        return passed("gpu", f"{', '.join(devices)}; CUDA {built_for}")
    if built_for is None:
        return warned(
            "gpu", "this torch is built for the CPU alone.", "Fine for small models; else install torch+CUDA."
        )
    fix = "Fine for small models. If there is a GPU, see `nvidia-smi`: its driver may be missing or too old."
    return warned("gpu", f"torch is built for CUDA {built_for} and finds no device.", fix)


def check_flower(installed: str | None, wanted: str | None) -> Finding:
    """Check that the installed Flower is the release that this version of fedmedgan is made for, as everywhere."""
    if installed is None:
        return failed("flower", "not installed.", "Run: pip install fedmedgan", ExitCode.MISSING_EXTRA)
    if wanted is None:
        return warned("flower", f"{installed}; which is wanted is not known.", "Install fedmedgan by pip.")
    if installed != wanted:
        fix = f"Its internals are used, so run: pip install flwr=={wanted}"
        return failed("flower", f"{installed} is installed, {wanted} is wanted.", fix, ExitCode.CONFIG)
    return passed("flower", f"{installed}, the release that every fedmedgan of this version uses")


def check_socket(path: Path, wait_s: float = AGENT_WAIT_S) -> Finding:
    """Check the socket's path and mode, and whether an agent answers. It is told nothing, and charges nothing."""
    name = "socket"
    if (length := len(bytes(path))) > MAX_SOCKET_BYTES:
        fix = "Name a shorter one to `start`: --socket /run/fedmedgan/agent.sock"
        return failed(name, f"its path has {length} bytes, over {MAX_SOCKET_BYTES}.", fix, ExitCode.CONFIG)
    if not path.exists():
        return to_do(name, f"no agent runs at {path}.", "Start it: fedmedgan-site start HOME")
    if not path.is_socket():
        return failed(name, f"{path} is something else.", "Remove it, or name another.", ExitCode.STORAGE)
    if (mode := stat.S_IMODE(path.stat().st_mode)) & 0o007:
        fix = f"Run: chmod 660 {path}"
        return failed(name, f"anybody on this machine can ask the agent (mode {mode:03o}).", fix, ExitCode.STORAGE)
    try:
        _ask_nothing(path, wait_s)
    except TimeoutError:
        fix = "It may be at work on a round; look again, and see logs/agent.log."
        return warned(name, f"the agent does not answer in {wait_s:g} s.", fix)
    except ConnectionError:
        return to_do(name, "an agent that was killed left it behind.", "Start it: fedmedgan-site start HOME")
    except WireError:
        fix = "Install one release on both sides, and start again."
        return failed(name, "what answers is no agent of this release.", fix, ExitCode.WIRE)
    return passed(name, f"an agent answers at {path}, mode {mode:03o}")


def needed_bytes(rules: Policy, images_bytes: int) -> int:
    """Return about how much memory the agent needs, with the default widths of the largest model that is allowed."""
    image = ImageConfig(size=max(rules.allowed_image_sizes), channels=max(rules.allowed_channels))
    most = 0
    for name in rules.allowed_models:
        pair = build(ModelConfig(name=name), image, 2, torch.Generator().manual_seed(0))
        networks = (pair.generator, pair.discriminator)
        generator, discriminator = (sum(weights.numel() for weights in net.parameters()) for net in networks)
        most = max(most, COPIES * (generator + discriminator) + CHUNK_IMAGES * discriminator)
    return BASE_BYTES + 4 * most + IMAGE_COPIES * images_bytes


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return how much memory this machine, or the container that this runs in, has left; None where it is not told."""
    found = [_machines(root / "proc/meminfo"), _containers(root / "sys/fs/cgroup")]
    return min((one for one in found if one is not None), default=None)


def installed_flower() -> str | None:
    """Return the installed release of Flower, without importing it."""
    try:
        return version("flwr")
    except PackageNotFoundError:
        return None


def wanted_flower() -> str | None:
    """Return the release of Flower that this package pins."""
    try:
        pinned = (re.fullmatch(r"flwr==([\w.]+)", line) for line in requires("fedmedgan") or ())
    except PackageNotFoundError:
        return None
    return next((match[1] for match in pinned if match), None)


def devices() -> list[str]:
    """Return the names of the GPUs that torch can use."""
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def _ask_nothing(path: Path, wait_s: float) -> None:
    """Ask for nothing: the agent says that this does not decode, which shows that it is there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(wait_s)
        connection.connect(str(path))
        connection.shutdown(socket.SHUT_WR)
        unpack_reply(read_frame(connection, wait_s))


def _machines(meminfo: Path) -> int | None:
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def _containers(group: Path) -> int | None:
    try:
        return int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no container, or "max"
        return None
