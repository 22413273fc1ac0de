"""`gmdist sample` for `ray job submit`: RUN --out s3://bucket/prefix [...], over the cluster of the job."""

import sys

from gmdist.cli import main

if __name__ == "__main__":
    # After the user's own overrides would be too late to let them choose another cluster.
    run, others = sys.argv[1:2], sys.argv[2:]
    sys.exit(main(["sample", *run, *(["cluster.address=auto"] if run else []), *others]))
