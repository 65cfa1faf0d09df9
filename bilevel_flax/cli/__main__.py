"""`python -m bilevel_flax.cli`."""

from __future__ import annotations

import sys

from bilevel_flax.cli import main

sys.exit(main())
