"""`python -m fxlora` is the `fxlora` command."""

import sys

from fxlora.cli import main

sys.exit(main())
