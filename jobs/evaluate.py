"""`gmdist evaluate` for `ray job submit`: RUN [--metrics fid,kid,pr] [--num-images N], on the machine of the job."""

import sys

from gmdist.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
