"""Who may take part, as the coordinator's home has it at this moment."""

from pathlib import Path

import pytest

from common.errors import StorageError
from common.files import write_atomic
from server.registered import read_nodes, read_registered, write_nodes
from tests.coordinator_home import enrol, make_home


def test_names_of_nodes_read_back(tmp_path: Path) -> None:
    home = make_home(tmp_path / "hub")
    assert read_nodes(home) == {}
    write_nodes(home, {2**63 + 1: "st-mary"})
    assert read_nodes(home) == {2**63 + 1: "st-mary"}


@pytest.mark.parametrize("content", ["", "[1]", '{"one": "st-mary"}', "\xff"])
def test_a_list_of_nodes_that_does_not_read_says_what_to_do(tmp_path: Path, content: str) -> None:
    home = make_home(tmp_path / "hub")
    write_atomic(home.nodes, content.encode("latin-1"))
    with pytest.raises(StorageError, match=r"nodes\.json does not read\. Delete it and restart the coordinator"):
        read_nodes(home)


def test_who_is_revoked_or_enrolled_shows_at_the_next_look(tmp_path: Path) -> None:
    home = make_home(tmp_path / "hub")
    enrol(home, "st-anne")
    key = enrol(home, "st-mary")
    assert set(read_registered(home).trust.sites) == {"st-anne", "st-mary"}
    enrol(home, "st-mary", revoked=True, key=key)
    enrol(home, "st-john")
    assert set(read_registered(home).trust.sites) == {"st-anne", "st-john"}
