"""Collect the teacher's trajectories of a config: its stage collect, and no other.

    python scripts/collect.py --config configs/quickstart.yaml [key=value ...]

A collection that was stopped goes on after its last whole shard.
"""

import sys

from train import main

if __name__ == "__main__":
    sys.exit(main(__doc__, ("collect",)))
