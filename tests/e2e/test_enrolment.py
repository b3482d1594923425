"""From two `init`s to a joined site, through the commands that people type: no server runs."""

import io
import sys

import pytest

from client.cli import main as site_main
from client.joining import load_pinned
from client.paths import Home
from common.errors import ExitCode
from common.lock import alone
from server.cli import main as coordinator_main
from server.consortium import enrolled, load_consortium


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Return a call of either command that gives exit code and what was printed."""
    monkeypatch.chdir(tmp_path)

    def call(main, *arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return ended.value.code, said.out + said.err

    return call


def site(run, *arguments):
    return run(site_main, *arguments)


def coordinator(run, *arguments):
    return run(coordinator_main, *arguments)


def words_in(text, of):
    (line,) = [line for line in text.splitlines() if line.startswith(f"words of {of}")]
    return line.split(": ")[1]


def initialised(run, tmp_path):
    code, said = coordinator(run, "init", "hub", "--host", "fed.example.org", "--name", "lungs")
    assert (code, "fed.example.org:8443" in said, "next: fedmedgan-coordinator enrol hub" in said) == (0, True, True)
    code, said = site(run, "init", "home", "--name", "st-mary", "--data", tmp_path, "--patients", 200)
    assert (code, "next: fedmedgan-site enrol home" in said) == (0, True)


def joined(run, tmp_path):
    initialised(run, tmp_path)
    code, said = site(run, "enrol", "home")
    assert (code, "next: fedmedgan-site join home st-mary.invitation.json" in said) == (0, True)
    code, said = coordinator(run, "enrol", "hub", "st-mary.enrolment.json", "--words", words_in(said, "this site"))
    assert code == 0, said
    code, said = site(run, "join", "home", "st-mary.invitation.json", "--words", words_in(said, "the coordinator"))
    assert (code, "joined lungs at fed.example.org, port 8443, as st-mary" in said) == (0, True)


def test_from_init_to_joined(run, tmp_path):
    joined(run, tmp_path)
    assert load_pinned(tmp_path / "home").federation == "lungs"
    known = enrolled(load_consortium(tmp_path / "hub"))["st-mary"]
    assert known.node_public_key == (tmp_path / "home" / "keys" / "node.pub").read_bytes().strip()
    code, said = coordinator(run, "sites", "hub")
    assert (code, "st-mary" in said, "lungs at fed.example.org:8443" in said, "warning" in said) == (
        0,
        True,
        True,
        False,
    )


def test_words_are_compared_on_both_sides(run, tmp_path):
    initialised(run, tmp_path)
    _, said = site(run, "enrol", "home")
    wrong = " ".join(reversed(words_in(said, "this site").split()))
    for given in ((), ("--words", wrong)):
        code, _ = coordinator(run, "enrol", "hub", "st-mary.enrolment.json", *given)
        assert (code, enrolled(load_consortium(tmp_path / "hub"))) == (ExitCode.ENROLMENT, {})
    coordinator(run, "enrol", "hub", "st-mary.enrolment.json", "--words", words_in(said, "this site"))
    for given in ((), ("--words", wrong)):
        code, _ = site(run, "join", "home", "st-mary.invitation.json", *given)
        assert (code, (tmp_path / "home" / "federation.json").exists()) == (ExitCode.ENROLMENT, False)


def test_renewed_and_left(run, tmp_path):
    joined(run, tmp_path)
    before = (tmp_path / "home" / "keys" / "node.pub").read_bytes()
    assert site(run, "renew", "home")[0] == 0
    assert (tmp_path / "home" / "keys" / "node.pub").read_bytes() == before
    assert (
        coordinator(run, "enrol", "hub", "st-mary.enrolment.json")[0] == 0
    )  # the identity is known: nothing to compare
    with alone(Home(tmp_path / "home").start_lock, "`start`"):
        code, said = site(run, "join", "home", "st-mary.invitation.json")
    assert (code, "takes this up by itself" in said, "fedmedgan-site start" in said) == (0, True, False)
    after = (tmp_path / "home" / "keys" / "node.pub").read_bytes()
    assert after != before
    assert enrolled(load_consortium(tmp_path / "hub"))["st-mary"].node_public_key == after.strip()
    code, said = site(run, "leave", "home", "--yes")
    assert (code, "fedmedgan-coordinator revoke HOME st-mary" in said) == (0, True)
    assert coordinator(run, "revoke", "hub", "st-mary")[0] == 0
    code, said = site(run, "join", "home", "st-mary.invitation.json")
    assert (code, "no longer has" in said) == (ExitCode.ENROLMENT, True)
    assert site(run, "journal", "verify", "home")[0] == 0


def test_a_file_enrolled_again_is_no_new_site(run, tmp_path):
    joined(run, tmp_path)
    code, said = coordinator(run, "enrol", "hub", "st-mary.enrolment.json")
    again = "st-mary is already enrolled with this key; the invitation is written again: st-mary.invitation.json"
    assert (code, again in said) == (0, True)
    assert "is enrolled; send it" not in said
    assert site(run, "renew", "home")[0] == 0
    code, said = coordinator(run, "enrol", "hub", "st-mary.enrolment.json")
    assert (code, "st-mary is enrolled with its new node key; send it st-mary.invitation.json" in said) == (0, True)


def test_an_invitation_for_the_old_key_leaves_a_renewal_open(run, tmp_path):
    joined(run, tmp_path)
    assert site(run, "renew", "home")[0] == 0
    code, said = site(run, "join", "home", "st-mary.invitation.json")  # the one from before
    assert code == 0
    assert "for the old node key" in said
    assert "the renewal is still open" in said
    assert "fedmedgan-site enrol home" in said
    assert "joined lungs" not in said
    _, said = site(run, "doctor", "home")
    (line,) = [line for line in said.splitlines() if "keys:" in line]
    assert "the renewal is still open" in line
    assert coordinator(run, "enrol", "hub", "st-mary.enrolment.json")[0] == 0
    code, said = site(run, "join", "home", "st-mary.invitation.json")
    assert (code, "joined lungs" in said, "renewal" in said) == (0, True, False)


def test_leaving_asks_first(run, tmp_path, monkeypatch):
    joined(run, tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    code, said = site(run, "leave", "home")
    assert (code, "use --yes" in said) == (ExitCode.CONFIG, True)
    assert load_pinned(tmp_path / "home").site == "st-mary"


def test_renewing_certificates(run, tmp_path):
    joined(run, tmp_path)
    for flags in ((), ("--ca",)):
        code, said = coordinator(run, "renew", "hub", *flags)
        assert (code, "sites need nothing new" in said) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("init", "hub2", "--host", "https://fed.example.org"), ExitCode.CONFIG),
        (("init", "hub2", "--host", "a", "--port", "8444"), ExitCode.CONFIG),
        (("init", "hub", "--host", "a"), ExitCode.STORAGE),
        (("enrol", "hub", "gone.json"), ExitCode.STORAGE),
        (("enrol", "hub", "hub/ca.pem"), ExitCode.WIRE),
        (("enrol", "home", "st-mary.enrolment.json"), ExitCode.STORAGE),
        (("enrol", "hub", "st-mary.invitation.json"), ExitCode.WIRE),
        (("enrol", "hub", "st-mary.enrolment.json", "--out", "hub/ca.pem"), ExitCode.CONFIG),
        (("revoke", "hub", "st-john"), ExitCode.ENROLMENT),
    ],
)
def test_mistakes_of_a_coordinator(run, tmp_path, arguments, code):
    joined(run, tmp_path)
    before = (tmp_path / "hub" / "ca.pem").read_bytes()
    found, said = coordinator(run, *arguments)
    assert (found, said.startswith("error: ")) == (code, True), said
    assert (tmp_path / "hub" / "ca.pem").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("join", "home", "gone.json"), ExitCode.STORAGE),
        (("join", "home", "st-mary.enrolment.json"), ExitCode.WIRE),
        (("join", "home", "home/policy.toml"), ExitCode.WIRE),
        (("enrol", "home", "--out", "home/policy.toml"), ExitCode.CONFIG),
        (("enrol", "hub"), ExitCode.STORAGE),
        (("join", "home", "changed.json"), ExitCode.ENROLMENT),
        (("join", "home", "cut.json"), ExitCode.ENROLMENT),
    ],
)
def test_mistakes_of_a_site(run, tmp_path, arguments, code):
    joined(run, tmp_path)
    invitation = (tmp_path / "st-mary.invitation.json").read_text()
    (tmp_path / "changed.json").write_text(invitation.replace('"port":8', '"port":9', 1))
    (tmp_path / "cut.json").write_text(invitation[:-40])
    found, said = site(run, *arguments)
    assert (found, said.startswith("error: ")) == (code, True), said
