"""Pre-train a vision-language model under torchrun.

    torchrun --nproc-per-node 8 examples/pretrain_vlm.py RECIPE key=value

The same run on local ranks without torchrun is ``mimo-megatron train RECIPE --ranks N key=value``.
"""

import argparse
import sys
from pathlib import Path

from mimo_megatron.config.load import load_recipe
from mimo_megatron.errors import MimoError
from mimo_megatron.mcore.boot import RankAddress
from mimo_megatron.train.loop import pretrain


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    try:
        pretrain(RankAddress.from_environment(), load_recipe(options.recipe, options.overrides))
    except MimoError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
