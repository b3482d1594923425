"""One Orthanc for all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.real_pacs import Orthanc, make_files


@pytest.fixture(scope="package")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    folder = tmp_path_factory.mktemp("orthanc")
    pacs = Orthanc(folder)
    try:
        pacs.start()
        pacs.put(make_files(folder))
        yield pacs
    finally:
        pacs.stop()
