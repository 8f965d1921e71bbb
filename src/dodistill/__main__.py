"""`python -m dodistill`."""

import sys

from .commands.cli import main

sys.exit(main())
