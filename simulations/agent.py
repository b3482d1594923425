"""`python -m simulations.agent RUN PARTITION SOCKET`: a virtual hospital's agent as a process of its own.

Started by the ClientApp under `flwr run .` (client/virtual); ends when its standard input closes.
"""

import logging
import sys
import threading
from pathlib import Path

from client.agent import open_site
from client.home import Home
from client.serve import serve
from common.config_text import build_config, read_config
from common.errors import ConfigError
from simulations.hospitals import build_hospitals, draw_federation, simulated_secrets, site_name


def main(arguments: list[str]) -> None:
    """Build the run's virtual hospitals when they are not yet there, and serve one of them."""
    out, partition, path = Path(arguments[0]), int(arguments[1]), Path(arguments[2])
    logging.basicConfig(filename=out / f"agent-{partition}.log", format="%(asctime)s %(levelname)s %(message)s")
    config = build_config(read_config(out / "config.toml"))
    if config.simulation.missing_share > 0:
        raise ConfigError(
            "Sites cannot be made to miss rounds under `flwr run`. Use `fedmedgan-simulate --engine flower`."
        )
    for _ in build_hospitals(draw_federation(config), out):
        pass
    stop = threading.Event()
    threading.Thread(target=_stop_at_end_of_input, args=(stop,), daemon=True).start()
    home = Home(out / "hospitals" / site_name(partition))
    serve(open_site(home, simulated_secrets(config.federation.seed, partition)), path, stop)


def _stop_at_end_of_input(stop: threading.Event) -> None:
    sys.stdin.buffer.read()
    stop.set()


if __name__ == "__main__":
    main(sys.argv[1:])
