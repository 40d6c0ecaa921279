"""Pre-train a vision-language model under torchrun.

    torchrun --nproc-per-node 8 examples/pretrain_vlm.py RECIPE key=value

The same run on local ranks without torchrun is ``mimo-megatron train RECIPE --ranks N key=value``.
"""

import sys

from mimo_megatron.train.launch import run_torchrun
from mimo_megatron.train.loop import pretrain

if __name__ == "__main__":
    sys.exit(run_torchrun(pretrain, __doc__))
