"""The folder of the page is looked at before hours of reading."""

from pathlib import Path

import pytest

from client.intake.page import SHEET, make_page_folder
from common.errors import StorageError


@pytest.mark.parametrize("name", ["report.html", SHEET])
def test_a_folder_in_the_place_of_a_file_is_told_first(tmp_path: Path, name: str) -> None:
    make_page_folder(tmp_path)
    (tmp_path / name).mkdir()
    with pytest.raises(StorageError, match=f"{name}.*is a folder"):
        make_page_folder(tmp_path)
