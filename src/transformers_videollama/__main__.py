"""`python -m transformers_videollama` is the command `videollama`."""

import sys

from .cli import main

sys.exit(main())
