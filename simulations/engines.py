"""The two ways to run a federation on this machine: in this process, or on Flower's simulation runtime (Ray).

Both run the same ServerApp and the same ClientApp over the same virtual hospitals.
"""

import functools
import logging
import os
import warnings
from pathlib import Path

from flwr.app import Context, RecordDict
from flwr.serverapp import Grid, ServerApp

from client.app import make_app as make_client_app
from client.channel import Transport
from common.config import Config
from common.errors import FedmedganError, MissingExtra
from server.app import Job, run
from server.app import make_app as make_server_app
from simulations.faults import missing_at_times
from simulations.hospitals import connect
from simulations.local_grid import LocalGrid
from simulations.pretrain import put_start


def run_job(job: Job) -> None:
    """Run a prepared job with the engine that its configuration names.

    Raises:
        FedmedganError: Whatever the round loop raises.
    """
    put_start(job.config, job.folder.path)
    client_app = make_client_app(functools.partial(find_hospital, job.folder.path.absolute(), job.config))
    if job.config.performance.engine == "local":
        grid = LocalGrid(client_app, job.config.simulation.sites)
        context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
        make_server_app(job)(grid, context)
        return
    from flwr.simulation import run_simulation

    failures: list[FedmedganError] = []
    # A cluster that RAY_ADDRESS names has its own number of cores; on this machine it is ours to say.
    cores = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": job.config.performance.parallel_sites}
    backend = {
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        "init_args": {**cores, "log_to_driver": False},
    }
    run_simulation(
        server_app=_keeping_failures(job, failures),
        client_app=client_app,
        num_supernodes=job.config.simulation.sites,
        backend_config=backend,  # type: ignore[arg-type]
    )
    if failures:
        raise failures[0]


def check_engine(config: Config) -> None:
    """Check that the engine can run, before anything is written.

    Raises:
        MissingExtra: The flower engine is asked for and Ray is not installed.
    """
    if config.performance.engine == "local":
        return
    _quiet_flower()
    try:
        import ray  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise MissingExtra(
            "The flower engine needs Ray: pip install 'fedmedgan[ray]', or use --engine local"
        ) from error


def find_hospital(out: Path, config: Config, context: Context) -> Transport:
    """Return the way to the virtual hospital of a node; what Ray's actors call too."""
    partition = int(context.node_config["partition-id"])
    return missing_at_times(connect(out, config, partition), config, partition)


def _keeping_failures(job: Job, failures: list[FedmedganError]) -> ServerApp:
    """Make a ServerApp whose errors reach the caller: Flower's runtime would replace them by its own."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:  # pyright: ignore[reportUnusedFunction]
        del context
        try:
            run(grid, job)
        except FedmedganError as error:
            failures.append(error)

    return app


def _quiet_flower() -> None:
    """Switch off Flower's telemetry, update check and notices: nothing leaves this machine."""
    os.environ |= {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    logging.getLogger("flwr").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="ray|flwr")
