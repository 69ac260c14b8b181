"""`python -m fat5 VERB …`, as `torchrun -m fat5 pretrain …` needs it."""

import sys

from fat5.cli.main import main

sys.exit(main())
