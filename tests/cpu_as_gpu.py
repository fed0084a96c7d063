"""Starts a program with processes on CPUs that accelerate takes for GPUs, where alone it turns FSDP on.

accelerate launch --config_file FILE --num_processes 2 tests/cpu_as_gpu.py recipes/vqa.py --use_cpu
"""

import json
import os
import runpy
import sys
from functools import wraps
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType


@wraps(PartialState.__init__)
def as_gpu(self, *args, init=PartialState.__init__, **kwargs):
    init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = as_gpu
if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    import deepspeed

    # its reductions over shared memory are compiled on first use, which takes two minutes; gloo reduces without them
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
if "LAUNCHED_WITH" in os.environ:
    # what the launcher has set, for a test that starts the same without it
    Path(os.environ["LAUNCHED_WITH"]).write_text(json.dumps(dict(os.environ)))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
