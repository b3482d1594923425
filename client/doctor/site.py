"""The checks of a site's home: files, policy, images, books, membership. Names of images are never shown."""

import stat
from datetime import datetime, timedelta
from pathlib import Path

from client import policy as policies
from client.doctor.findings import Finding, failed, passed, to_do, warned
from client.home import Home, imported_forms, require_books
from client.home import check_imported as look_at_imported
from client.intake import Reason, scan
from client.intake.refusals import describe
from client.joining import MAX_NODE_KEY_FILE_BYTES, has_joined, load_pinned, public_node_key, read_node_key
from client.ledger import read_ledger
from client.paths import require_closed_home
from client.policy import Policy
from client.relay_state import why_ended
from client.site_config import head_copy, read_site_config
from client.trust import extra_ca, read_bundles
from client.verify import verify_home
from common.certificates import read_authority, validity
from common.crypto import is_sealed, load_verify_key
from common.errors import ExitCode, IntakeError, UnreadableSource
from common.files import read_credential
from common.plan import delta_warning

LOW_BUDGET = 0.1
"""Share of max_epsilon; with less left a run may end early for this site."""
AHEAD = timedelta(days=90)
"""How long before its end a certificate is spoken of."""


def check_home(home: Home) -> Finding:
    """Check that the home is there and its owner's alone."""
    name = "home"
    if not home.policy.exists():
        fix = "Name the folder that `fedmedgan-site init` made, or make one."
        return failed(name, f"{home.folder} is no site's home.", fix, ExitCode.STORAGE)
    folders = [home.folder, home.key.parent, home.ledger, home.journal, home.replies, home.log.parent]
    missing = [folder.name for folder in folders if not folder.is_dir()]
    if missing:
        fix = "Restore them from a backup; `logs` may be made anew."
        return failed(name, f"folders are gone: {', '.join(missing)}.", fix, ExitCode.STORAGE)
    open_ = [folder for folder in folders if stat.S_IMODE(folder.stat().st_mode) & 0o077]
    if open_:
        fix = f"Run: chmod 700 {' '.join(map(str, open_))}"
        return failed(name, "others can enter it.", fix, ExitCode.STORAGE)
    require_closed_home(home)  # what `start` refuses
    return passed(name, f"{home.folder}, for its owner alone")


def check_keys(home: Home) -> Finding:
    """Check that both keys read and only their owner can read them."""
    load_verify_key(home.key)
    kept = "with" if is_sealed(home.key) else "without"
    if _has_left(home):
        return passed("keys", f"identity ({kept} a passphrase) read, mode 600; no node key, see joined")
    read_node_key(home.folder)
    if home.next_key.exists():
        fix = "Send the coordinator what `fedmedgan-site enrol` writes, and `join` with the file that comes back."
        return warned("keys", "the renewal is still open: the new node key waits for an invitation of its own.", fix)
    return passed("keys", f"identity ({kept} a passphrase) and node key read, mode 600")


def check_policy(home: Home) -> Finding:
    """Check that the policy reads and lets the site take part at all."""
    rules = policies.load(home.policy)
    policies.check_hello(rules)
    said = f"{rules.site} declares {rules.declared_patients} patients, epsilon {rules.max_epsilon:g} in all"
    if rules.declared_patients < rules.min_patients:
        fix = "Take more patients, or lower min_patients."
        return failed("policy", f"{said}; fewer than its min_patients = {rules.min_patients}.", fix, ExitCode.PRIVACY)
    if rules.allow_unmasked_shares:
        fix = "Set it to false: it is for simulations, and voids the guarantee at a real site."
        return failed("policy", "allow_unmasked_shares is true.", fix, ExitCode.PRIVACY)
    if warning := delta_warning(rules.delta, rules.declared_patients):
        return warned("policy", f"{said}; {warning}.", "Mend delta in policy.toml before the first run.")
    return passed("policy", said)


def check_data(home: Home, rules: Policy) -> Finding:
    """Scan the data folder as `import` does, without decoding a pixel: how much is usable, what is skipped and why.

    A site that has imported its images takes part without them.
    """
    try:
        finding = _scanned(home, rules)
    except (IntakeError, UnreadableSource) as error:
        finding = failed("data", str(error), "", error.exit_code)
    if finding.exit_code in (ExitCode.DATA, ExitCode.UNREADABLE) and imported_forms(home):
        return warned("data", finding.said, "They are needed for the next import; what is imported is used without.")
    return finding


def _scanned(home: Home, rules: Policy) -> Finding:
    site = read_site_config(home)
    found = scan(home.folder / site.data, site.label, site.intake)
    usable = [record for record in found.records if record.label is not None]
    patients, refused = len({record.patient for record in usable}), dict(found.refused)
    if unlabelled := len(found.records) - len(usable):
        refused[Reason.NO_LABEL] = refused.get(Reason.NO_LABEL, 0) + unlabelled
    skipped = sum(refused.values())
    said = f"{len(usable)} images of {patients} patients; skipped: {describe(refused) if refused else 'nothing'}"
    said += " (exact counts, for this site's eyes alone)."
    if patients < rules.min_patients:
        fix = f"The policy's min_patients is {rules.min_patients}: add patients, or mend what is skipped."
        return failed("data", said, fix, ExitCode.DATA)
    if skipped > len(usable):
        return warned("data", said, "More is skipped than used: mend the reason, or name another folder in site.toml.")
    if not rules.declared_patients / 2 <= patients <= rules.declared_patients * 2:
        fix = f"declared_patients is {rules.declared_patients}: far from that, noise and learning fit badly."
        return warned("data", said, fix)
    return passed("data", said)


def check_imported(home: Home) -> Finding:
    """Check that training sets are imported, whole, and their owner's alone."""
    forms = imported_forms(home)
    if not forms:
        fix = f"Once the coordinator tells the classes: fedmedgan-site import {home.folder} --classes A,B --size 32"
        return to_do("imported", "no training set.", fix)
    look_at_imported(home)
    paths = sorted(home.folder.glob("vault-*/*"))
    if open_ := [str(path) for path in paths if stat.S_IMODE(path.stat().st_mode) & 0o077]:
        return failed("imported", "others can read images.", f"Run: chmod 600 {' '.join(open_)}", ExitCode.STORAGE)
    sets = (f"{form.size} px x {form.channels} ({', '.join(form.classes)})" for form in forms)
    return passed("imported", "; ".join(sets))


def check_records(home: Home) -> Finding:
    """Verify ledger, journal and stored replies, each and against each other."""
    require_books(home)
    found = verify_home(home, load_verify_key(home.key))
    if found.findings:
        fix = "Start nothing here. Keep the home as it is, and see `fedmedgan-site journal verify`."
        return failed("records", f"they do not agree: {'; '.join(found.findings)}.", fix, ExitCode.STORAGE)
    return passed("records", f"verified; {found.releases} releases, {found.charges} charges")


def check_budget(home: Home, rules: Policy) -> Finding:
    """Say what is left of the data set's budget."""
    require_books(home)
    spent = read_ledger(home.ledger, load_verify_key(home.key), head_copy(home)).spent(rules.delta)
    left = max(0.0, rules.max_epsilon - spent)
    said = f"epsilon {left:.3f} of {rules.max_epsilon:g} left at delta {rules.delta:g}"
    if spent > rules.max_epsilon:
        said += f", {spent:.3f} is spent: every request is refused"
    if left <= 0:
        fix = "This data set can release nothing more; only the privacy officer can raise max_epsilon."
        return failed("budget", f"{said}.", fix, ExitCode.PRIVACY)
    if left < LOW_BUDGET * rules.max_epsilon:
        return warned("budget", f"{said}.", "See what a run would take: fedmedgan-site budget HOME --config FILE")
    return passed("budget", said)


def check_bundles(home: Home) -> Finding:
    """Show the list of bundles whose runs the relay serves."""
    listed = read_bundles(home.bundles)
    if listed is None:
        return passed("bundles", "any (no bundles.txt); none is ever opened or imported here")
    if not listed:
        fix = "Add the digest that the coordinator tells, or remove the file."
        return warned("bundles", "bundles.txt lists none: every run is refused.", fix)
    return passed("bundles", f"only {', '.join(sorted(listed))}")


def check_joined(home: Home, now: datetime) -> Finding:
    """Check the pinned invitation and that its node key is the one here.

    How long an invitation may be accepted no longer matters once it was.
    """
    if _has_left(home):
        fix = (
            f"To come back: send what `fedmedgan-site enrol {home.folder}` writes; the coordinator runs `enrol` with "
            "--readmit; a call; then `join` with the file that comes back, and `start`."
        )
        said = "this site has left its federation, and its node key is destroyed."
        return failed("joined", said, fix, ExitCode.ENROLMENT)
    if not has_joined(home.folder):
        fix = f"Send what `fedmedgan-site enrol {home.folder}` writes; `join` with the file that comes back."
        return failed("joined", "no federation yet.", fix, ExitCode.ENROLMENT)
    pinned = load_pinned(home.folder)
    if public_node_key(home.folder) != pinned.node_key:
        fix = "Send the coordinator what `fedmedgan-site enrol` writes now, and `join` with the file that comes back."
        return failed("joined", "the node key here is not the one that is enrolled.", fix, ExitCode.ENROLMENT)
    ends = read_authority(pinned.ca_pem, now).ends
    said = f"{pinned.site} of {pinned.federation}; its certificate authority holds until {ends:%Y-%m-%d}"
    if ends - now < AHEAD:
        fix = "The coordinator runs `fedmedgan-coordinator renew --ca`, and sends a new invitation."
        return warned("joined", f"{said}.", fix)
    return passed("joined", said)


def _has_left(home: Home) -> bool:
    """Tell whether `leave` was run: `init` makes a node key, and only `leave` takes it away with what was pinned."""
    handed = read_credential(home.node_key.name, MAX_NODE_KEY_FILE_BYTES)
    there = (home.federation, home.node_key, home.node_pub)
    return home.key.exists() and not (handed or any(path.exists() for path in there))


def check_relay(home: Home) -> Finding:
    """Say what the last relay said when it ended by itself: the link alone knows whether it lets this site in."""
    why, state = why_ended(home.relay_state), home.relay_state
    if why and state.stat().st_mtime >= home.federation.stat().st_mtime:
        fix = "Ask the coordinator whether this site is let in. After another `join`: fedmedgan-site start."
        return failed("relay", f"the last one ended: {why}", fix, ExitCode.FEDERATION)
    return passed("relay", "no refusal since the site joined")


def check_extra_ca(home: Home, now: datetime) -> Finding:
    """Say whether the relay trusts another authority, for a proxy that inspects TLS, and until when it holds."""
    extra = extra_ca(home)
    if not extra:
        return passed("extra CA", "none; the pinned authority alone is trusted")
    ends = min(validity(one).ends for one in extra)
    said = f"the relay trusts {len(extra)} beside the pinned one, until {ends:%Y-%m-%d}; its holder reads the link"
    fix = "Put the proxy's new root certificate in the file that extra_ca of site.toml names, or remove extra_ca."
    if ends <= now:
        return failed("extra CA", f"{said}: over.", fix, ExitCode.CONFIG)
    return warned("extra CA", f"{said}.", fix) if ends - now < AHEAD else passed("extra CA", said)


def images_bytes(home: Home) -> int:
    """Return how many bytes the largest imported training set has."""
    vaults = [sum(path.stat().st_size for path in one.iterdir()) for one in Path(home.folder).glob("vault-*")]
    return max(vaults, default=0)
