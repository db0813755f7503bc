import sys

from benchmarks.drift.cli import main

if __name__ == "__main__":  # spawned workers import this module under another name
    sys.exit(main())
