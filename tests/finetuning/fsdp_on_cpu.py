"""Runs a script under accelerate's FSDP2 with CPU processes, which accelerate itself only does on accelerators.

accelerate launch --config_file examples/accelerate/fsdp2.yaml --num_processes 2 \\
    tests/finetuning/fsdp_on_cpu.py SCRIPT FLAGS
"""

import runpy
import sys

from accelerate.state import DistributedType, PartialState

initialize = PartialState.__init__


def as_if_on_accelerators(self, *args, **kwargs):
    initialize(self, *args, **kwargs)
    if self.distributed_type is DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU  # what FSDP is built on; devices stay the CPU's


PartialState.__init__ = as_if_on_accelerators
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
