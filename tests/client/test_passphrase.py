"""The passphrase of an identity key at the command line: where it comes from, who asks, who need not, what is said."""

import getpass
import io
import os
import sys
import warnings

import pytest

from client import passphrase
from client.entry import main
from client.home import Home, create_home
from client.passphrase import obtain
from client.site_config import SiteConfig
from common.crypto import is_sealed, load_key
from common.errors import ExitCode, PassphraseError, StorageError
from common.files import write_atomic
from common.lock import alone, beside, is_held
from common.passphrase import _COST, Passphrase
from tests.pinned import pin
from tests.tiny_site import POLICY

WORDS, OTHER = "correct horse battery staple", "another one, and as long"


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """An eighth of the memory and the time for each key."""
    monkeypatch.setitem(_COST, "log2_n", 14)


class Person:
    """Types what it was told to, at a terminal; nothing else is typed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prompts: list[str] = []
        self.types: list[str] = []
        self.terminal = io.StringIO()
        self.terminal.isatty = lambda: True
        monkeypatch.setattr(sys, "stdin", self.terminal)
        monkeypatch.setattr(getpass, "getpass", self._type)
        monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)

    def _type(self, prompt: str) -> str:
        self.prompts.append(prompt)
        return self.types.pop(0)

    def at(self, *types: str) -> None:
        self.prompts, self.types = [], list(types)


@pytest.fixture
def person(monkeypatch: pytest.MonkeyPatch) -> Person:
    return Person(monkeypatch)


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """No terminal; getpass would open the terminal of whoever runs the tests."""
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(getpass, "getpass", lambda _prompt: pytest.fail("asked"))
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)


@pytest.fixture
def run(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert WORDS not in said.out + said.err
        assert OTHER not in said.out + said.err
        return ended.value.code, said.out + said.err

    return call


@pytest.fixture
def sealed(tmp_path) -> Home:
    return create_home(tmp_path / "home", SiteConfig(data=str(tmp_path)), POLICY, Passphrase(WORDS))


@pytest.fixture
def credential(nobody, tmp_path, monkeypatch):
    """Hand a passphrase over as a service manager does."""

    def hand_over(text: str) -> None:
        folder = tmp_path / "credentials"
        folder.mkdir(mode=0o700, exist_ok=True)
        write_atomic(folder / "passphrase", text.encode(), 0o600)
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))

    return hand_over


def init(run, home, *more):
    return run("init", home, "--name", "st-mary", "--data", home.parent, "--patients", 200, *more)


def test_init_asks_twice(run, person, tmp_path):
    home = Home(tmp_path / "home")
    person.at(WORDS, WORDS)
    assert init(run, home.folder, "--passphrase")[0] == 0
    assert len(person.prompts) == 2
    assert load_key(home.key, lambda: Passphrase(WORDS)).verify_key


@pytest.mark.parametrize(("typed", "said"), [(("short", "short"), "12 characters"), ((WORDS, OTHER), "differ")])
def test_init_makes_nothing_of_a_bad_passphrase(run, person, tmp_path, typed, said):
    person.at(*typed)
    code, text = init(run, tmp_path / "home", "--passphrase")
    assert (code, said in text, (tmp_path / "home").exists()) == (ExitCode.PASSPHRASE, True, False)


def test_init_without_a_terminal_makes_nothing(run, nobody, tmp_path):
    code, text = init(run, tmp_path / "home", "--passphrase")
    assert (code, "terminal" in text, (tmp_path / "home").exists()) == (ExitCode.PASSPHRASE, True, False)


def test_set_change_and_remove(run, person, tmp_path):
    home = create_home(tmp_path / "home", SiteConfig(data=str(tmp_path)), POLICY)
    identity = load_key(home.key).to_bytes()
    person.at(WORDS, WORDS)
    code, said = run("passphrase", home.folder)
    assert (code, "passphrase set" in said, "lost" in said, is_sealed(home.key)) == (0, True, True, True)
    person.at(WORDS, OTHER, OTHER)
    assert "passphrase changed" in run("passphrase", home.folder)[1]
    assert load_key(home.key, lambda: Passphrase(OTHER)).to_bytes() == identity
    person.at(WORDS)
    code, said = run("passphrase", home.folder, "--remove")
    assert (code, "does not open" in said, is_sealed(home.key)) == (ExitCode.PASSPHRASE, True, True)
    person.at(OTHER)
    assert run("passphrase", home.folder, "--remove")[0] == 0
    assert load_key(home.key).to_bytes() == identity
    assert "nothing was changed" in run("passphrase", home.folder, "--remove")[1]
    assert home.key.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("runs", ["start", "agent"])
def test_nothing_is_changed_while_the_agent_runs(run, person, sealed, runs):
    """After a crash it would be started anew with the passphrase from before, and everything would end."""
    before = sealed.key.read_bytes()
    person.at(WORDS, OTHER, OTHER)
    for more in ((), ("--remove",)):
        with alone(sealed.start_lock, "`start`") if runs == "start" else beside(sealed.serve_lock):
            code, said = run("passphrase", sealed.folder, *more)
        assert (code, "Stop it first" in said, person.prompts) == (ExitCode.STORAGE, True, [])
    assert sealed.key.read_bytes() == before
    assert run("passphrase", sealed.folder)[0] == 0


def test_an_agent_that_serves_says_so(run, sealed, credential, tmp_path, monkeypatch):
    seen = []
    pin(sealed)
    credential(WORDS)
    monkeypatch.setattr("client.cli.serve", lambda *_: seen.append(is_held(sealed.serve_lock, shared=True)))
    monkeypatch.setattr("client.cli.log_to", lambda _: None)
    monkeypatch.setattr("client.cli.signal.signal", lambda *_: None)
    assert run("serve", sealed.folder, "--socket", tmp_path / "s")[0] == 0
    assert (seen, is_held(sealed.serve_lock, shared=True)) == ([True], False)


def test_what_only_verifies_asks_nobody(run, nobody, sealed, tmp_path):
    for command in (("ledger",), ("budget",), ("journal", "show"), ("journal", "verify")):
        code, said = run(*command, sealed.folder)
        assert code == 0, said
    assert run("journal", "export", sealed.folder, tmp_path / "export")[0] == 0
    assert "identity (with a passphrase)" in run("doctor", sealed.folder)[1]


def test_what_signs_asks_once(run, person, sealed, tmp_path):
    out = tmp_path / "enrolment.json"
    person.at(WORDS)
    assert run("enrol", sealed.folder, "--out", out)[0] == 0
    assert len(person.prompts) == 1
    before = out.read_bytes()
    person.at(OTHER)
    code, said = run("enrol", sealed.folder, "--out", out)
    assert (code, "does not open" in said, out.read_bytes() == before) == (ExitCode.PASSPHRASE, True, True)


def test_nobody_is_kept_waiting(run, nobody, sealed, tmp_path):
    pin(sealed)
    for command in (("enrol",), ("serve", "--socket", tmp_path / "s"), ("passphrase",)):
        code, said = run(command[0], sealed.folder, *command[1:])
        assert (code, "LoadCredentialEncrypted=passphrase" in said) == (ExitCode.PASSPHRASE, True), said


def test_the_credential_is_taken_before_anybody_is_asked(run, credential, sealed, tmp_path):
    pin(sealed)
    credential(WORDS + "\n")
    assert run("enrol", sealed.folder, "--out", tmp_path / "enrolment.json")[0] == 0
    credential(OTHER)
    code, said = run("serve", sealed.folder, "--socket", tmp_path / "s")
    assert (code, "does not open" in said) == (ExitCode.PASSPHRASE, True)
    (tmp_path / "credentials" / "passphrase").chmod(0o644)
    code, said = run("serve", sealed.folder, "--socket", tmp_path / "s")
    assert (code, "chmod 600" in said) == (ExitCode.STORAGE, True)


def test_a_key_without_a_passphrase_needs_no_credential(run, credential, tmp_path):
    credential("never looked at: too short to be wrong, and no key needs it")
    home = create_home(tmp_path / "home", SiteConfig(data=str(tmp_path)), POLICY)
    assert run("enrol", home.folder, "--out", tmp_path / "enrolment.json")[0] == 0


def test_a_pipe_is_read_once_and_closed(nobody):
    reading, writing = os.pipe()
    os.write(writing, WORDS.encode())
    os.close(writing)
    assert obtain(reading) == Passphrase(WORDS)
    with pytest.raises(PassphraseError, match=f"descriptor {reading}"):
        obtain(reading)


def test_a_terminal_that_shows_what_is_typed_is_not_used(person, monkeypatch):
    def shown(_prompt: str) -> str:
        warnings.warn("can not control echo", getpass.GetPassWarning, stacklevel=1)
        return WORDS

    monkeypatch.setattr(getpass, "getpass", shown)
    with pytest.raises(PassphraseError, match="cannot hide"):
        obtain()


def test_start_opens_the_key_before_it_starts_anything(run, nobody, credential, sealed, monkeypatch):
    monkeypatch.setattr("client.operate.load_pinned", lambda _home: None)
    monkeypatch.setattr("client.operate.supervise", lambda *_: pytest.fail("started"))
    code, said = run("start", sealed.folder)
    assert (code, "no terminal" in said) == (ExitCode.PASSPHRASE, True)
    credential(OTHER)
    code, said = run("start", sealed.folder)
    assert (code, "does not open" in said) == (ExitCode.PASSPHRASE, True)


def test_an_init_that_broke_off_goes_on_with_its_passphrase(sealed, tmp_path):
    sealed.policy.unlink()
    with pytest.raises(PassphraseError):
        create_home(sealed.folder, SiteConfig(data=str(tmp_path)), POLICY, Passphrase(OTHER))
    create_home(sealed.folder, SiteConfig(data=str(tmp_path)), POLICY, Passphrase(WORDS))
    assert is_sealed(sealed.key)


def test_an_init_that_broke_off_before_a_passphrase_was_wanted_gets_one(tmp_path):
    home = create_home(tmp_path / "home", SiteConfig(data=str(tmp_path)), POLICY)
    home.policy.unlink()
    create_home(home.folder, SiteConfig(data=str(tmp_path)), POLICY, Passphrase(WORDS))
    assert is_sealed(home.key)


def test_others_may_not_read_a_sealed_key(sealed):
    sealed.key.chmod(0o644)
    with pytest.raises(StorageError, match="chmod 600"):
        passphrase.load_identity(sealed)
