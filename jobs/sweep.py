"""`gmdist sweep` for `ray job submit`: CONFIG [key=value ...], on the cluster that the job was submitted to."""

import sys

from gmdist.cli import main

if __name__ == "__main__":
    # After the user's own overrides would be too late to let them choose another cluster.
    config, overrides = sys.argv[1:2], sys.argv[2:]
    sys.exit(main(["sweep", *config, *(["cluster.address=auto"] if config else []), *overrides]))
