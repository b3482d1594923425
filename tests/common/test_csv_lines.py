"""CSV lines, and what is said of what is none."""

import pytest

from common.csv_lines import read_lines
from common.errors import IntakeError


def test_numbers_are_those_of_an_editor() -> None:
    assert read_lines(b'\xef\xbb\xbfa,b\r\n\r\n1,"x\r\ny"\r\n2,z\r\n', "It") == [
        (1, ["a", "b"]),
        (4, ["1", "x\r\ny"]),
        (5, ["2", "z"]),
    ]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"file;patient\na;1\n", "It has semicolons between its values, expected commas (in Excel"),
        (b"file\tpatient\na\t1\n", "It has tabs between"),
        (b"file,patient\n\xfc,1\n", "It is not UTF-8"),
        (b'file,patient\n"a,1\n', "It is not CSV"),
    ],
)
def test_says_what_is_wrong(data: bytes, said: str) -> None:
    with pytest.raises(IntakeError) as raised:
        read_lines(data, "It")
    assert str(raised.value).startswith(said)
