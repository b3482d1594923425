"""What decoders' processes answer is checked where it is read: a file may have taken one of them over."""

import json
from pathlib import Path
from typing import Any

import pytest

from client.intake import IntakeRules
from client.intake.headers import MAX_VALUE
from client.intake.labels import TagLabel
from client.intake.pixels import MAX_PIXELS
from client.intake.requests import ask_header, ask_volume

RULES = IntakeRules(max_frames=100, frames="all")
HEADER = {"patient": ["", "P1"], "label": "x", "frames": 100, "facts": {"Rows": "8"}, "seen": ["s", "d"]}
LONG = "9" * (MAX_VALUE + 1)


def header(**changed: Any) -> bytes:
    return b"+" + json.dumps(list((HEADER | changed).values())).encode()


@pytest.mark.parametrize(
    "changed",
    [
        {"frames": 101},
        {"frames": 10**30},
        {"frames": 1},
        {"frames": True},
        {"patient": ["", LONG]},
        {"patient": [LONG, "P"]},
        {"label": LONG},
        {"facts": {"Rows": "9" * 5000}},
        {"seen": [LONG, ""]},
        {"seen": ["", LONG]},
    ],
)
def test_a_header_beyond_the_limits_is_no_reply(changed: dict[str, Any]) -> None:
    unpack = ask_header(Path("a"), None, TagLabel(tag=""), RULES).unpack
    assert unpack(header(), 1)[0].frames == 100  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="not a header"):
        unpack(header(**changed), 1)


@pytest.mark.parametrize(
    "axes", [[101, [8, 8], "s"], [10**30, [8, 8], "s"], [9, [MAX_PIXELS, 2], "s"], [9, [8, 0], "s"], [9, [8, 8], LONG]]
)
def test_axes_beyond_the_limits_are_no_reply(axes: list[Any]) -> None:
    unpack = ask_volume(Path("a"), RULES).unpack
    assert unpack(b"+" + json.dumps([100, [MAX_PIXELS, 1], "s"]).encode(), 1)
    with pytest.raises(ValueError, match="not the axes"):
        unpack(b"+" + json.dumps(axes).encode(), 1)
