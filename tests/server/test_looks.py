"""What a release looks at is fixed once a run."""

from pathlib import Path

import pytest

from common.config import ImageConfig
from common.errors import ConfigError, ResumeError
from server.looks import fix_look
from server.run_folder import RunFolder

IMAGE = ImageConfig(size=28, classes=("a", "b"))


def _drowns() -> str:
    raise ConfigError("too few are there now: but some were charged for the first question")


def test_same_question(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "run")
    assert fix_look(folder, IMAGE, 0, lambda: "public") == "public"
    assert fix_look(folder, IMAGE, 1, lambda: "means") == "means"
    assert fix_look(RunFolder(tmp_path, "run"), IMAGE, 0, _drowns) == "public"
    assert fix_look(folder, IMAGE, 1, _drowns) == "means"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "does not read"),
        (b"[]", "does not read"),
        (b'{"version": 1}', "does not read"),
        (b'{"version": 2, "looks": {}}', "of version 1"),
        (b'{"version": 1, "looks": {"0": "all"}}', "names all"),
    ],
)
def test_what_does_not_read_is_refused(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "looks.json").write_bytes(content)
    with pytest.raises(ResumeError, match=match):
        fix_look(RunFolder(tmp_path, "run"), IMAGE, 0, lambda: "public")
