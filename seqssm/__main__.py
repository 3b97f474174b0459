import sys

from seqssm.cli import main

sys.exit(main())
