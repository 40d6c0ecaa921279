"""``python -m mimo_megatron.cli``: the command without an installation."""

import sys

from mimo_megatron.cli import main

sys.exit(main())
