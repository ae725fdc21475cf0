"""One rank of `dsv2 preflight`, as torchrun starts it."""

import argparse
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from dsv2_train.cli.preflight.suite import TIMEOUT_S, require_preflight
from dsv2_train.config.load import check, read_values
from dsv2_train.distributed import env as environment


@record
def main() -> int:
    """Entry of `python -m dsv2_train.cli.preflight.rank`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="a resolved config.yaml")
    # What is open in it, such as the data, is nothing that a preflight reads.
    config, _ = check(read_values(parser.parse_args().config))
    env = environment.start(TIMEOUT_S)
    require_preflight(config, env)
    environment.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
