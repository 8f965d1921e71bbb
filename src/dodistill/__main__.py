"""`python -m dodistill`."""

import sys

from .cli import main

sys.exit(main())
