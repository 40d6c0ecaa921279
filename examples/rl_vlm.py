"""Reinforcement learning of a vision-language model under torchrun.

    torchrun --nproc-per-node 8 examples/rl_vlm.py RECIPE key=value

The same run on local ranks without torchrun is ``mimo-megatron rl RECIPE --ranks N key=value``.
"""

import sys

from mimo_megatron.rl.start import reinforce
from mimo_megatron.train.launch import run_torchrun

if __name__ == "__main__":
    sys.exit(run_torchrun(reinforce, __doc__))
