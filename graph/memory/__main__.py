"""`python -m graph.memory`"""

import sys

from graph.memory.store import main

if __name__ == "__main__":
    sys.exit(main())
