"""The bundle that Flower's link keeps of a run: the server's own modules, by name, and a description of the run.

Sites never unpack it. Its hash says which code a run is of: a site may allow it by hash, and the coordinator's
executor starts no run of another one.
"""

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from flwr.cli.build import build_fab_from_files

MODULES: tuple[str, ...] = (
    "common/__init__.py",
    "common/artefact.py",
    "common/certificates.py",
    "common/config.py",
    "common/config_text.py",
    "common/crypto.py",
    "common/enrolment.py",
    "common/errors.py",
    "common/features.py",
    "common/files.py",
    "common/flower_run.py",
    "common/generate.py",
    "common/generate_options.py",
    "common/generator_step.py",
    "common/greeting.py",
    "common/lens.py",
    "common/lock.py",
    "common/look.py",
    "common/losses.py",
    "common/messages.py",
    "common/models/__init__.py",
    "common/models/dcgan.py",
    "common/models/mlp.py",
    "common/models/resnet.py",
    "common/models/unet.py",
    "common/models/vae.py",
    "common/node_keys.py",
    "common/parts.py",
    "common/passphrase.py",
    "common/plan.py",
    "common/privacy.py",
    "common/seal.py",
    "common/secure_sum.py",
    "common/sheets.py",
    "common/weights.py",
    "common/wire.py",
    "common/wording.py",
    "server/__init__.py",
    "server/aggregation.py",
    "server/app.py",
    "server/checkpoint.py",
    "server/cohort.py",
    "server/consortium.py",
    "server/deadline.py",
    "server/declared.py",
    "server/display.py",
    "server/exchange.py",
    "server/handshake.py",
    "server/ladder.py",
    "server/lens.py",
    "server/looks.py",
    "server/lost.py",
    "server/now.py",
    "server/pace.py",
    "server/quorum.py",
    "server/records.py",
    "server/registered.py",
    "server/report.py",
    "server/report_page.py",
    "server/results.py",
    "server/robust.py",
    "server/roster.py",
    "server/rounds.py",
    "server/run_folder.py",
    "server/secure_sum.py",
    "server/start.py",
    "server/warmup.py",
    "server/warmup_round.py",
)
"""What `server.app` needs, and nothing else. A test compares this list with what an import of it loads."""

_DESCRIPTION = """
[project]
name = "fedmedgan"
version = "{version}"
description = "The coordinator's round loop"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedmedgan"
fab-include = ["common/**/*.py", "server/**/*.py"]

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
consortium = ""
config = ""
out = ""
resume = false
"""


def build_bundle() -> bytes:
    """Build the bundle of the installed release.

    Returns:
        A zip archive as Flower's link takes it; the same bytes each time.

    Guarantees:
        - server_only: It holds no module of `client`, no data, no key and no configuration.
        - reproducible: The same release makes the same bytes.
    """
    root = Path(__file__).resolve().parents[1]
    files: Mapping[str, bytes | Path] = {
        "pyproject.toml": _DESCRIPTION.format(version=version("fedmedgan")).encode(),
        **{name: root / name for name in MODULES},
    }
    return build_fab_from_files(files)[0]


def bundle_hash(bundle: bytes) -> str:
    """Return the SHA-256 of a bundle in hex, as Flower names it."""
    return hashlib.sha256(bundle).hexdigest()
