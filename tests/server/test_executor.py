"""What the executor keeps of a run."""

import subprocess
from pathlib import Path
from unittest.mock import create_autospec

from server.executor import Running


def test_a_token_is_not_shown() -> None:
    process = create_autospec(subprocess.Popen, instance=True)
    assert "s3cret" not in repr(Running(1, "s3cret", process, Path("lock")))
