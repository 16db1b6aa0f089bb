"""``python -m pyrobust_cli``: the command line, as ``torchrun -m`` wants it."""

import sys

from pyrobust_cli import main

sys.exit(main())
