"""Evaluate the arms of a config: its stages evaluate and report, and no other.

    python scripts/evaluate.py --config configs/experiments/expert/config.yaml

Trained arms must have been trained in the same run directory.
"""

import sys

from train import main

if __name__ == "__main__":
    sys.exit(main(__doc__, ("evaluate", "report")))
