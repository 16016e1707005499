import sys

from torchreach.check.check import main

sys.exit(main())
