"""Beside peers from pip: `make parity` installs them. Without them there is nothing here to collect."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("diffusers") else ["test_*.py"]
