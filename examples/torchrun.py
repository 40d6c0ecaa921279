"""torchrun whose restarts are safe, and that ends with its ranks' exit code, where torchrun itself says 1 for anything.

    python examples/torchrun.py --nproc-per-node 8 examples/pretrain_vlm.py RECIPE key=value

128 + the signal where this process was stopped by one (its ranks have then saved and ended), or a rank was.
"""

import os
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def run() -> int:
    # By default restarted ranks use the store of the attempt before, and may connect to the addresses that dead ranks
    # left there: gloo then hangs while it makes its groups. With this every attempt has a store of its own.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    try:
        main()
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        print(f"rank {rank} ended first, with exit code {failure.exitcode}", file=sys.stderr)
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    return 0


if __name__ == "__main__":
    code = run()
    sys.stderr.flush()
    os._exit(code)  # torchrun's record of an error would otherwise replace the code
