"""`python -m unweave` is the command line."""

import sys

from unweave.cli import main

sys.exit(main())
