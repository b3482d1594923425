"""`fedmedgan-site` as a person types it: what it prints, its exit codes, and never a traceback."""

import json
import shutil
import tomllib

import pytest

from client.agent import answer, open_site
from client.cli import main
from client.home import Home, load_images
from client.ledger import ChargeRequest
from client.site_config import read_site_config
from common.config_text import build_config, to_toml
from common.crypto import load_key
from common.errors import ExitCode, StorageError
from common.lock import alone, beside
from common.messages import Kind
from common.plan import plan
from common.privacy import Charge, epsilon
from tests.pinned import pin
from tests.tiny_site import warmup_request


@pytest.fixture
def run(capsys):
    """Return a call of the command that gives exit code, standard output and standard error."""

    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return ended.value.code, said.out, said.err

    return call


@pytest.fixture
def used(tiny_home, tiny_proposal):
    assert answer(open_site(tiny_home), warmup_request(proposal=tiny_proposal)).refusal is None
    return tiny_home


@pytest.fixture
def planned(tmp_path, tiny_proposal):
    path = tmp_path / "planned.toml"
    path.write_text(to_toml(build_config(tiny_proposal.model_dump(mode="json"))))
    return path


def init(run, home, *more):
    return run("init", home, "--name", "st-mary", "--data", home.parent, "--patients", 200, *more)


def test_init_writes_a_policy_that_explains_itself(run, tmp_path):
    code, out, _ = init(run, tmp_path / "home")
    assert (code, "policy.toml" in out) == (0, True)
    text = (tmp_path / "home" / "policy.toml").read_text()
    assert "# Highest probability of a patient in a private step" in text
    assert tomllib.loads(text)["may_declare"] == ["name", "patients"]
    assert "head_copy" not in (tmp_path / "home" / "site.toml").read_text()


def test_init_looks_for_the_images_and_knows_labels(run, tmp_path):
    code, _, err = run("init", tmp_path / "h", "--name", "a", "--data", tmp_path / "gone", "--patients", 200)
    assert (code, "Found nothing at --data" in err) == (ExitCode.UNREADABLE, True)
    code, _, err = init(run, tmp_path / "h", "--label", "nonsense")
    assert (code, "nonsense" in err) == (ExitCode.CONFIG, True)
    assert not (tmp_path / "h").exists()


def test_import_says_what_it_found(run, tiny_home, tiny_proposal):
    classes = tiny_proposal.image.classes
    code, out, _ = run("import", tiny_home.folder, "--classes", ",".join(classes), "--size", 28)
    found = load_images(tiny_home, classes, 28)
    assert code == 0
    assert f"imported {len(found.images)} images of {found.number_of_patients} patients\n" in out
    assert f"{classes[0]} {int((found.labels == 0).sum())}" in out
    assert "refused: nothing" in out


def test_import_in_colour(run, tiny_home, tiny_proposal):
    classes = tiny_proposal.image.classes
    assert run("import", tiny_home.folder, "--classes", ",".join(classes), "--size", 28, "--channels", 3)[0] == 0
    grey, colour = load_images(tiny_home, classes, 28), load_images(tiny_home, classes, 28, 3)
    assert (colour.images[:] == grey.images[:].repeat(3, axis=1)).all()
    code, _, err = run("import", tiny_home.folder, "--classes", ",".join(classes), "--size", 28, "--channels", 2)
    assert (code, "channels=2" in err) == (ExitCode.CONFIG, True)


def test_import_warns_of_a_class_that_nobody_has(run, tiny_home, tmp_path):
    arguments = ("import", tiny_home.folder, "--classes", "clear,opacitty", "--size", 28, "--json", tmp_path / "j")
    code, out, err = run(*arguments, "--show-files")
    found = int(out.split("by class: clear ")[1].split(",")[0])
    left = len(load_images(tiny_home, ("clear", "opacity"), 28).images) - found
    assert (code, "no image here has the class opacitty" in err) == (0, True)
    assert f"warning: {left} images have labels that are no class of the run: opacity {left}." in err
    assert "opacity" not in out + (tmp_path / "j").read_text()  # labels are headers' values: for this terminal alone
    assert (
        "labels that are no class" not in run("import", tiny_home.folder, "--classes", "opacity,clear", "--size", 28)[2]
    )


def test_import_and_check_with_no_class_that_is_there(run, tiny_home, tmp_path):
    source = read_site_config(tiny_home).data
    check = ("check", source, "--classes", "Clear,Opacity", "--report", tmp_path / "seen")
    for command in (("import", tiny_home.folder, "--classes", "Clear,Opacity", "--size", 28), check):
        code, _, err = run(*command)
        assert (code, "run: 2 labels, shown on a terminal alone or with --show-files. " in err) == (ExitCode.DATA, True)
        code, _, err = run(*command, "--show-files")
        assert code == ExitCode.DATA
        named = err.split("labels that are no class of the run: ")[1].split(".")[0]
        assert sorted(one.split()[0] for one in named.split(", ")) == ["clear", "opacity"]
        assert "capitals" in err


def test_init_with_a_copy_of_the_head(run, tmp_path):
    home, copy = Home(tmp_path / "home"), tmp_path / "elsewhere" / "head.json"
    copy.parent.mkdir()
    assert init(run, home.folder, "--head-copy", copy)[0] == 0
    assert tomllib.loads((home.folder / "site.toml").read_text())["head_copy"] == str(copy)
    assert copy.read_bytes() == (home.ledger / "ledger.head.json").read_bytes()
    for command in (("ledger",), ("budget",), ("journal", "verify")):
        assert run(*command, home.folder)[0] == 0
    copy.rename(copy.with_suffix(".away"))
    for command in (("ledger",), ("budget",), ("journal", "verify")):
        code, _, err = run(*command, home.folder)
        assert (code, "is missing. Mount its disk" in err) == (ExitCode.STORAGE, True)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("gone/head.json", "mount its disk, or make the folder"),
        (".", "a file in it"),
        ("other.json", "another home's"),
        ("other.json/head.json", "make the folder"),
    ],
)
def test_a_copy_that_cannot_be_kept_leaves_nothing(run, tmp_path, where, said):
    (tmp_path / "other.json").write_text("{}")
    code, _, err = init(run, tmp_path / "home", "--head-copy", tmp_path / where)
    assert (code, said in err, (tmp_path / "home").exists()) == (ExitCode.CONFIG, True, False), err
    assert (tmp_path / "other.json").read_text() == "{}"


def test_an_init_that_broke_off_takes_its_copy_up(run, tmp_path):
    home, copy = Home(tmp_path / "home"), tmp_path / "head.json"
    assert init(run, home.folder, "--head-copy", copy)[0] == 0
    home.policy.unlink()  # written last
    assert init(run, home.folder, "--head-copy", copy)[0] == 0


def test_a_copy_inside_the_home_or_relative_is_refused(run, tmp_path):
    home = tmp_path / "home"
    code, _, err = init(run, home, "--head-copy", home / "head.json")
    assert (code, "outside the home" in err) == (ExitCode.CONFIG, True)
    assert init(run, home)[0] == 0
    (home / "site.toml").write_text('data = "/"\nhead_copy = "../head.json"\n')
    code, _, err = run("ledger", home)
    assert (code, "absolute path for head_copy" in err) == (ExitCode.CONFIG, True)


def test_a_home_put_back_from_a_backup_is_refused_where_there_is_a_copy(run, used, tmp_path):
    copy, backup = tmp_path / "head.json", tmp_path / "backup"
    shutil.copytree(used.folder, backup)
    for home in (used.folder, backup):
        text = (home / "site.toml").read_text()
        (home / "site.toml").write_text(text + f'head_copy = "{copy}"\n')
    copy.write_bytes((used.ledger / "ledger.head.json").read_bytes())  # as the message for a missing copy says
    ledger = open_site(used).ledger
    assert run("ledger", backup)[0] == 0
    ledger.charge(ChargeRequest("run-2", 1, Kind.TRAIN, "ab"), Charge(100.0, 1.0, 1), 8.0, 1e-5)
    shutil.rmtree(used.folder)
    shutil.copytree(backup, used.folder)
    for command in (("ledger",), ("budget",), ("journal", "verify")):
        code, _, err = run(*command, used.folder)
        assert (code, "an older state was put back" in err) == (ExitCode.STORAGE, True)
    with pytest.raises(StorageError, match="an older state was put back"):
        open_site(used)


def test_budget_shows_spent_left_and_by_run(run, used, tmp_path):
    code, out, _ = run("budget", used.folder, "--json", tmp_path / "budget.json")
    tree = json.loads((tmp_path / "budget.json").read_text())
    assert code == 0
    assert f"spent: epsilon {tree['spent']:.3f} of 8 at delta 1e-05; left: {tree['left']:.3f}" in out
    assert [(one["run_id"], one["releases"]) for one in tree["runs"]] == [("run-1", 1)]
    assert "run-1" in out
    assert tree["forecast"] is None


def test_budget_says_what_a_planned_run_would_cost_and_how_far_it_gets(run, tiny_home, used, planned, tmp_path):
    code, out, _ = run("budget", used.folder, "--config", planned, "--json", tmp_path / "budget.json")
    forecast = json.loads((tmp_path / "budget.json").read_text())["forecast"]
    assert code == 0
    assert "planned run: sample rate 0.1000, noise of the warm-up" in out
    assert "policy: allows it; the budget allows a part of it" in out
    assert (forecast["warmup"], forecast["whole"], forecast["rounds_planned"]) == (True, False, 3)
    assert f"this site can join: the warm-up and {forecast['rounds']} of 3 rounds; then spent: epsilon" in out


def test_budget_of_the_whole_of_a_part_and_of_nothing(run, tiny_home, planned):
    code, out, _ = run("budget", tiny_home.folder, "--config", planned)
    assert (code, "policy: allows it\n" in out, "this site can join: the whole run" in out) == (0, True, True)
    text = tiny_home.policy.read_text()
    tiny_home.policy.write_text(text.replace("max_sample_rate = 0.5", "max_sample_rate = 0.05"))
    code, out, _ = run("budget", tiny_home.folder, "--config", planned)
    assert code == ExitCode.PRIVACY
    assert "policy: refuses it: Expected sample rate=0.1 <= 0.05 (max_sample_rate)" in " ".join(out.split())
    assert "this site can join: nothing of it; then spent: epsilon 0.000" in out


@pytest.mark.parametrize(
    ("share", "code", "verdict", "extent"),
    [
        (0.9, 0, "allows it; the budget allows a part of it", "2 of 3 rounds, not the warm-up"),
        (0.5, ExitCode.PRIVACY, "allows it; the budget allows nothing of it", "nothing of it"),
    ],
)
def test_budget_says_when_the_warm_up_is_over_it(run, tiny_home, planned, tiny_proposal, share, code, verdict, extent):
    site = open_site(tiny_home)
    site.ledger.charge(ChargeRequest("earlier", 1, Kind.TRAIN, "digest"), Charge(0.65, 1.0, 1), 8.0, 1e-5)
    left = 8.0 - site.ledger.spent(1e-5)
    config = build_config(tiny_proposal.model_dump(mode="json"), {"warmup.share": share})
    planned.write_text(to_toml(config))
    ended, out, _ = run("budget", tiny_home.folder, "--config", planned)
    alone = epsilon([plan(config, 40).charge_of_warmup()], 1e-5)
    assert f"over budget: the warm-up alone asks for epsilon {alone:.3f}, {left:.3f} is left" in out
    assert (ended, f"policy: {verdict}\n" in out) == (code, True), out
    assert f"this site can join: {extent}; then spent" in out
    assert len(site.ledger.entries) == 1


def test_budget_says_whether_the_images_are_imported(run, tiny_home, tiny_proposal, tmp_path):
    """Without them the site takes no part, whatever policy and budget allow."""
    tree, path, written = tiny_proposal.model_dump(mode="json"), tmp_path / "planned.toml", tmp_path / "budget.json"
    told = {
        1: (0, "images: imported", "this site can join: the whole run; then", True),
        3: (ExitCode.DATA, "images: NOT imported", "this site can join: nothing until its images are imported", False),
    }
    for channels, (code, images, joins, there) in told.items():
        path.write_text(to_toml(build_config(tree, {"image.channels": channels})))
        ended, out, _ = run("budget", tiny_home.folder, "--config", path, "--json", written)
        assert (ended, images in out, joins in out) == (code, True, True), out
        assert json.loads(written.read_text())["images_imported"] is there
    assert "then the whole run; then spent" in out
    assert f"import {tiny_home.folder} --classes clear,opacity --size 28 --channels 3" in out
    path.write_text(to_toml(build_config(tree, {"image.classes": ()})))
    ended, out, _ = run("budget", tiny_home.folder, "--config", path, "--json", written)
    assert (ended, "names no classes" in out) == (0, True)
    assert json.loads(written.read_text())["images_imported"] is None


def test_budget_of_a_joined_site_allows_no_unmasked_shares(run, tiny_home, planned, tiny_proposal):
    tiny_home.policy.write_text(
        tiny_home.policy.read_text().replace("allow_unmasked_shares = false", "allow_unmasked_shares = true")
    )
    together = {"train.algorithm": "secure-sum", "train.steps_per_round": 1, "privacy.colluding_sites": 0}
    planned.write_text(to_toml(build_config(tiny_proposal.model_dump(mode="json"), together)))
    command = ("budget", tiny_home.folder, "--config", planned, "--cohort-sites", 4, "--cohort-patients", 1000)
    code, out, _ = run(*command)
    assert (code, "policy: allows it" in out) == (0, True), out
    pin(tiny_home)
    code, out, _ = run(*command)
    assert (code, "policy: refuses it" in out) == (ExitCode.PRIVACY, True), out


def test_budget_reads_what_print_config_writes(run, tiny_home, tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(to_toml(build_config({})))
    code, out, _ = run("budget", tiny_home.folder, "--config", path)
    assert (code, "policy: refuses it" in out) == (ExitCode.PRIVACY, True)  # ten epsilon and everybody in each step


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (b"[privacy]\nepsilom = 3.0\n", ExitCode.CONFIG, "nearest known key is privacy.epsilon"),
        (b"[privacy\n", ExitCode.CONFIG, "not TOML"),
        (b"\xff\xfe", ExitCode.CONFIG, "not TOML"),
        (b"[federation]\nrounds = 100000\n[train]\nsteps_per_round = 100000\n", ExitCode.CONFIG, "steps"),
        (b"[privacy]\nepsilon = 1e-9\n", ExitCode.CONFIG, "No noise multiplier"),
        (None, ExitCode.STORAGE, "Could not read"),
    ],
)
def test_budget_explains_bad_configurations(run, tiny_home, tmp_path, content, code, words):
    path = tmp_path / "planned.toml"
    if content is not None:
        path.write_bytes(content)
    ended, _, err = run("budget", tiny_home.folder, "--config", path)
    assert (ended, words in err) == (code, True)


def test_budget_explains_bad_homes_and_paths(run, tiny_home, tmp_path):
    assert run("budget", tmp_path / "none")[0] == ExitCode.CONFIG
    assert run("budget", tiny_home.folder, "--config", tmp_path)[0] == ExitCode.STORAGE
    assert run("budget", tiny_home.folder, "--json", tmp_path / "none" / "budget.json")[0] == ExitCode.STORAGE
    assert run("budget", tiny_home.folder, "--jsom", "x")[0] == ExitCode.USAGE
    (tiny_home.ledger / "ledger.jsonl").write_bytes(b"{}\n")
    assert run("budget", tiny_home.folder)[0] == ExitCode.STORAGE
    tiny_home.policy.write_text("max_epsilom = 1\n")
    assert run("budget", tiny_home.folder)[0] == ExitCode.CONFIG


def test_journal_show_verify_and_export(run, used, tmp_path):
    code, out, _ = run("journal", "show", used.folder)
    assert (code, "verified; 1 releases" in out) == (0, True)
    code, out, _ = run("journal", "verify", used.folder)
    assert (code, out) == (0, "verified; 1 releases, 1 charges, 1 stored replies\n")
    code, out, _ = run("journal", "export", used.folder, tmp_path / "export")
    key = out.split()[-1]
    assert (code, len(key)) == (0, 64)
    code, out, _ = run("journal", "verify", tmp_path / "export", "--key", key)
    assert (code, out) == (0, f"verified; 1 releases, signed by {key}\n")
    assert run("journal", "verify", tmp_path / "export")[0] == 0
    code, _, err = run("journal", "verify", tmp_path / "export", "--key", "00" * 32)
    assert (code, "not by --key" in err) == (ExitCode.STORAGE, True)


def test_journal_verify_exits_with_a_code(run, used, tmp_path):
    (reply,) = used.replies.glob("*.reply")
    whole = reply.read_bytes()
    reply.write_bytes(whole[:-1])
    code, _, err = run("journal", "verify", used.folder)
    assert (code, "do not agree" in err, "does not read" in err) == (ExitCode.STORAGE, True, True)
    reply.write_bytes(whole)
    assert run("journal", "verify", used.folder)[0] == 0
    (used.journal / "journal.jsonl").write_bytes(b"")
    for command in ("show", "verify"):
        assert run("journal", command, used.folder)[0] == ExitCode.STORAGE
    assert run("journal", "export", used.folder, tmp_path / "export")[0] == ExitCode.STORAGE
    assert run("journal", "verify", tmp_path / "none")[0] == ExitCode.STORAGE
    (tmp_path / "text").write_text("hello")
    assert run("journal", "verify", tmp_path / "text")[0] == ExitCode.WIRE


OVER_THE_POLICY = [("journal", "export", "{home}", "{policy}"), ("budget", "{home}", "--json", "{policy}")]


@pytest.mark.parametrize("arguments", OVER_THE_POLICY)
def test_nothing_is_written_over_the_home(run, tiny_home, arguments):
    before = tiny_home.policy.read_bytes()
    named = {"{home}": tiny_home.folder, "{policy}": tiny_home.policy}
    code, _, error = run(*(named.get(argument, argument) for argument in arguments))
    assert (code, "outside the home folder" in " ".join(error.split())) == (ExitCode.CONFIG, True)
    assert tiny_home.policy.read_bytes() == before


def test_journal_verify_of_a_home_heeds_the_key(run, used):
    signer = load_key(used.key).verify_key.to_bytes().hex()
    assert run("journal", "verify", used.folder, "--key", signer.upper())[0] == 0
    assert run("journal", "verify", used.folder, "--key", "ab" * 32)[0] == ExitCode.STORAGE


def test_serve_answers_nobody_without_a_pinned_coordinator(run, tiny_home, tmp_path):
    """Before `join` and after `leave` there is nobody whose signature could be asked for."""
    code, _, error = run("serve", tiny_home.folder, "--socket", tmp_path / "s")
    assert (code, "join" in error) == (ExitCode.ENROLMENT, True)
    assert not (tmp_path / "s").exists()


def test_leave_waits_for_what_still_runs(run, tiny_home):
    pin(tiny_home)
    agent = beside(tiny_home.serve_lock)
    for held in (alone(tiny_home.start_lock, "one"), alone(tiny_home.relay_lock, "one"), agent):
        with held:
            code, _, error = run("leave", tiny_home.folder, "--yes")
        assert (code, "Stop them first" in error, tiny_home.federation.exists()) == (ExitCode.STORAGE, True, True)
    assert run("leave", tiny_home.folder, "--yes")[0] == 0


def test_serve_in_a_folder_that_is_no_home_says_so(run, tmp_path):
    code, _, error = run("serve", tmp_path / "nope", "--socket", tmp_path / "s")
    assert (code, "Traceback" in error) == (ExitCode.STORAGE, False)


def test_init_closes_an_open_folder(run, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    home.chmod(0o777)
    assert init(run, home)[0] == 0
    assert home.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("open_", [".", "policy.toml", "keys", "federation.json", "logs", "ledger/ledger.head.json"])
def test_a_home_that_others_can_write_is_not_served(run, tiny_home, open_):
    """By the agent, by `start`, by the relay: whoever can write there could put another policy or coordinator."""
    pin(tiny_home)
    (tiny_home.folder / open_).chmod(0o766)
    for command in (["serve", tiny_home.folder, "--socket", tiny_home.socket], ["start", tiny_home.folder]):
        code, _, said = run(*command)
        assert (code, "chmod go-w" in said) == (ExitCode.STORAGE, True), said
    assert not tiny_home.socket.exists()
