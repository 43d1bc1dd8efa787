"""One process a host, started by mpirun or srun before those of a run, meets the others: python -m sharding.probe. Imports no jax.

So a coordinator that is missing or not reached, a port that is taken, a name that leads nowhere and another version on some host are said
before anything is loaded. What is wrong is a line on stderr that begins with MARK.
"""

import sys

from sharding.distributed import detect
from sharding.errors import LaunchError
from sharding.network import split_address
from sharding.rendezvous import meet

MARK = "jaxinfer-probe: "
SECONDS = 4.0  # that the others may take to come once a process is there, so that all is said within ten


def main() -> int:
    try:
        launch = detect()
        if launch is not None:
            host, port = split_address(launch.coordinator)
            meet(host, port, process=launch.process, processes=launch.processes, timeout=SECONDS)
    except LaunchError as error:
        print(f"{MARK}{error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
