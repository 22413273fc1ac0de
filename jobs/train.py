"""`gmdist train` for `ray job submit`: CONFIG [key=value ...], on the cluster that the job was submitted to."""

import sys

from gmdist.cli import main

if __name__ == "__main__":
    config, *overrides = sys.argv[1:] or ["--help"]
    sys.exit(main(["train", config, *(["cluster.address=auto"] if overrides or config != "--help" else []), *overrides]))
