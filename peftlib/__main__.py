import sys

from peftlib.cli import main

if __name__ == "__main__":
    sys.exit(main())
