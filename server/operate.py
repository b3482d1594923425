"""`fedmedgan-coordinator run`, `resume` and `stop`: runs are submitted to the link, followed and ended.

Torch takes seconds to import: this module does without. Out of scope: asking the link (server/control), what a run does
(server/app).
"""

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from common.config import MAX_SITES, Config
from common.config_text import build_config, read_config
from common.errors import ConfigError, ExitCode, FederationError, ResumeError
from common.lock import alone, is_held
from common.wording import counted
from server import control
from server.consortium import Consortium, enrolled, load_consortium
from server.run_folder import RunFolder, is_complete, next_folder, prepare_run
from server.status import COMPLETED, stand, under_way, without_process
from server.status_text import STOPPED, failure, how_it_ended

SUBMIT_S = 60.0
"""How long a `run` or `resume` waits for another one's submission, which takes seconds."""
END_S, LOOK_S = 60.0, 0.2
"""How long `stop` waits for a run's process: it hears of its end within half a minute, and writes what it has begun."""

UNMASKED = (
    "with a number the sites share the noise of a release, and nothing in this release masks the part of a single "
    "site, which has too little. Set it to 'all', or take fedmedgan-simulate."
)
"""Why a run with shared noise is none for real sites."""

HomeArgument = Annotated[Path, typer.Argument(help="The coordinator's home.")]
DetachOption = Annotated[bool, typer.Option("--detach", help="Do not follow the run.")]


def add_commands(app: typer.Typer) -> None:
    """Add this module's commands to `fedmedgan-coordinator`."""
    for command in (run, resume, stop):
        app.command()(command)


def run(
    home: HomeArgument,
    config: Annotated[Path, typer.Argument(help="A TOML file of the run.")],
    start: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a generator to start from that saw public images alone, as `fedmedgan-simulate pretrain` "
            "makes one of phantoms.",
            show_default=False,
        ),
    ] = None,
    detach: DetachOption = False,
) -> None:
    """Start a run with the enrolled sites and follow it. Ctrl-C ends the following, not the run."""
    consortium = load_consortium(home.absolute())
    proposed = _proposed(consortium, config)
    put_start = _starter(start, proposed)

    def submit(client: control.ControlHttpClient) -> tuple[Path, int]:
        _require_idle(consortium, client)
        folder = next_folder(consortium.runs)
        put_start(folder)  # before it is a run that could be resumed
        file = prepare_run(folder, proposed)
        return folder, control.submit(client, consortium.folder, file, folder, resume=False)

    _start_run(consortium, submit, detach)


def resume(
    home: HomeArgument,
    folder: Annotated[Path, typer.Argument(help="The run that ended early: its name or its folder.")],
    detach: DetachOption = False,
) -> None:
    """Go on with a run from its last whole round, and follow it."""
    consortium = load_consortium(home.absolute())
    path = folder_of(consortium, folder)
    require_run(path)
    if is_complete(path):
        raise ResumeError(f"The run of {path} is complete: see its report.html. There is nothing to go on with.")

    def submit(client: control.ControlHttpClient) -> tuple[Path, int]:
        _require_idle(consortium, client, path)
        begun = (path / "run.json").exists()  # else it ended before it had an id: it begins anew
        return path, control.submit(client, consortium.folder, path / "config.toml", path, begun)

    _start_run(consortium, submit, detach)


def stop(
    home: HomeArgument,
    run: Annotated[
        Path | None, typer.Argument(help="One run, its name or folder; all when left out.", show_default=False)
    ] = None,
) -> None:
    """Stop the runs under way, and wait for their processes' end; `resume` goes on with them.

    A run goes on from its last whole round.
    """
    consortium = load_consortium(home.absolute())
    with control.connect(consortium) as client:
        active = [one for one in control.list_runs(client, consortium.folder) if one.status != control.FINISHED]
        chosen = [one for one in active if run is None or one.folder == folder_of(consortium, run)]
        if run is not None and not chosen:
            raise ResumeError(f"{run} is not under way. `fedmedgan-coordinator status {home}` lists the runs.")
        for one in chosen:
            control.stop_run(client, one.run_id)
        for one in chosen:
            ended = _wait_for_end(consortium, one)
            print(_stopped(consortium, control.read_run(client, consortium.folder, one.run_id), ended), flush=True)
    if not chosen:
        print("no run is under way")


def _wait_for_end(consortium: Consortium, run: control.RunStatus) -> bool:
    """Wait for the process of a run that was stopped; return whether it has ended in time."""
    deadline = time.monotonic() + END_S
    if told := _has_process(consortium, run):
        print(f"waiting for the process of {run.name} to end", flush=True)
    while told and _has_process(consortium, run):
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_S)
    return True


def _stopped(consortium: Consortium, run: control.RunStatus, ended: bool) -> str:
    """Say what became of a run that was to be stopped: its results may have been written meanwhile."""
    if is_complete(run.folder):
        return _completed(run.folder)
    if run.outcome != STOPPED:
        (standing,) = stand([], [run], time.time())[1]
        return how_it_ended(standing, consortium.folder)
    home = shlex.quote(str(consortium.folder))
    again = f"fedmedgan-coordinator resume {home} {run.name}"
    if not ended:
        return f"stopped {run.name}; its process has not ended yet. To go on when it has: {again}"
    return f"stopped {run.name}; to go on: {again}"


def folder_of(consortium: Consortium, run: Path) -> Path:
    """Return the folder of a run that is given by its name, or by a path to its folder from the home or from here.

    By whatever way it is reached, a run of the home has the one path by which the link lists it.
    """
    places = (consortium.runs / run, consortium.folder / run, run.absolute())
    found = next((place for place in places if (place / "config.toml").exists()), None)
    if found is None:
        return places[0 if run.name == str(run) else 2]
    known = (file.parent for file in consortium.runs.glob("*/config.toml"))
    return next((folder for folder in known if folder.samefile(found)), found.resolve())


def require_run(path: Path) -> None:
    """Refuse a folder that is none of a run.

    Raises:
        ResumeError: It has no configuration.
    """
    if not (path / "config.toml").exists():
        raise ResumeError(
            f"{path} is no folder of a run. Name one as `fedmedgan-coordinator status HOME` does (run-0001), or its "
            "folder."
        )


def _proposed(consortium: Consortium, file: Path) -> Config:
    """Read the configuration of a run with the sites that are enrolled and not revoked."""
    sites = [name for name, site in enrolled(consortium).items() if not site.revoked]
    home = shlex.quote(str(consortium.folder))
    if not sites:
        raise ConfigError(f"No site is enrolled. Enrol one: fedmedgan-coordinator enrol {home} FILE")
    tree = read_config(file)
    needed = build_config(tree, {"simulation.sites": MAX_SITES}).federation.min_sites
    if needed > len(sites):
        raise ConfigError(
            f"Expected federation.min_sites of at most {len(sites)}, got {needed}: "
            f"{counted(len(sites), 'site is', 'sites are')} enrolled and not revoked ({', '.join(sites)}). Lower it, "
            f"or enrol more: fedmedgan-coordinator enrol {home} FILE"
        )
    proposed = build_config(tree, {"simulation.sites": len(sites)})
    if not proposed.image.classes:
        raise ConfigError("Expected image.classes: sites have to know what to import. Name them in the configuration.")
    if proposed.privacy.colluding_sites != "all":
        given = proposed.privacy.colluding_sites
        raise ConfigError(f"Expected privacy.colluding_sites = 'all' between machines, got {given}: {UNMASKED}")
    return proposed


def _starter(start: Path | None, proposed: Config) -> Callable[[Path], None]:
    """Return what puts the generator to start from into a run's folder, once it was seen to fit the run."""
    if start is None:
        if proposed.simulation.start != "none":
            raise ConfigError(
                f"simulation.start = '{proposed.simulation.start}' is read by the simulator alone. Make the generator "
                "with `fedmedgan-simulate pretrain CONFIG --out FOLDER`, then add --start FOLDER."
            )
        return lambda _: None
    from server.start import load_start, write_start  # with torch, which no other run waits for here

    generator = load_start(start, proposed)
    return lambda folder: write_start(folder, generator, proposed)


def _require_idle(consortium: Consortium, client: control.ControlHttpClient, resumed: Path | None = None) -> None:
    """Refuse a second run beside one under way: each would wait for the other's sites, and both spend budget."""
    runs = control.list_runs(client, consortium.folder)
    alive = under_way(runs, without_process(consortium, runs))
    # Of the run itself the link may believe for a while that it runs on, after the coordinator went down around it.
    busy = [
        one for one in alive if one.folder != resumed or one.status != control.RUNNING or _has_process(consortium, one)
    ]
    home = shlex.quote(str(consortium.folder))
    if busy:
        name, own = busy[0].name, busy[0].folder == resumed
        raise FederationError(
            f"{name} is under way {'already' if own else 'with these sites'}. Wait for its end (fedmedgan-coordinator "
            f"status {home}), or end it: fedmedgan-coordinator stop {home} {name}"
        )
    if resumed is not None and is_held(RunFolder(resumed, "").lock):
        raise FederationError(f"{resumed.name} was stopped, and its process has not ended yet. Try again in a minute.")


def _has_process(consortium: Consortium, run: control.RunStatus) -> bool:
    return is_held(consortium.run_lock(run.run_id))


def _is_gone(lock: Path) -> bool:
    return lock.exists() and not is_held(lock)


def _start_run(
    consortium: Consortium, submit: Callable[[control.ControlHttpClient], tuple[Path, int]], detach: bool
) -> None:
    """Submit a run and follow it. From the look at what is under way until the link lists it nobody else submits."""
    with control.connect(consortium) as client:
        with alone(consortium.submitting, "`run` or `resume`", SUBMIT_S):
            folder, run_id = submit(client)
        print(f"{folder.name} in {folder}", flush=True)
        if detach:
            return
        try:
            for text in control.follow(client, run_id, lambda: _is_gone(consortium.run_lock(run_id))):
                print(text, end="", flush=True)
            ended = control.read_run(client, consortium.folder, run_id)
        except KeyboardInterrupt:
            home = shlex.quote(str(consortium.folder))
            print(f"\nthe run goes on; to end it: fedmedgan-coordinator stop {home} {folder.name}", file=sys.stderr)
            sys.exit(ExitCode.INTERRUPTED)  # not typer.Exit, after which the command line says that it was stopped
    if ended.outcome == COMPLETED:
        return
    if not is_complete(folder):
        (standing,) = stand([], [ended], time.time(), without_process(consortium, [ended]))[1]
        raise failure(standing, consortium.folder)
    print(_completed(folder))  # a stop may come when the results are written, or somebody has resumed it


def _completed(folder: Path) -> str:
    return f"{folder.name} was completed meanwhile: see {folder / 'report.html'}"
