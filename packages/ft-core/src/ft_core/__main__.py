"""``python -m ft_core``: the same as ``ft``."""

import sys

from ft_core.cli import main

sys.exit(main())
