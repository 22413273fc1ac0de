"""What the processes of `support.run_workers` find imported: it would take each of them seconds."""

import contextlib
import gc
import importlib
import logging
import os

from gmdist.train import zero
from tests import support  # noqa: F401

os.environ["DS_ACCELERATOR"] = "cpu"
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
with contextlib.suppress(ImportError):  # the tests that need it are skipped
    import deepspeed  # noqa: F401

    zero._skip_compiler()
for name in ("boto3", "isal", "torch._dynamo", "torch.utils.tensorboard", "deepspeed.runtime.zero.stage3"):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
gc.freeze()  # what is imported is not looked through at each collection
