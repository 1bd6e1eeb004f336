"""``python -m fp8gemm.cli``."""

from . import main

raise SystemExit(main())
