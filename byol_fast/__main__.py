"""``python -m byol_fast``: the same as the command ``byol-fast``."""

import sys

from .cli import main

sys.exit(main())
