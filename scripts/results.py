"""Keep what a finished run found beside its config, and write the README's tables.

    python scripts/results.py --config configs/quickstart.yaml --run runs/quickstart
    python scripts/results.py --config configs/sweeps/arms.yaml --run runs/arms
    python scripts/results.py

The first reduces a run to configs/quickstart.result.json (an experiment's config.yaml
has result.json beside it); the second keeps the table of a sweep, of a comparison or of
the priming experiment, and a sweep's figure as configs/sweeps/arms.pareto.png. All then
write the README's tables anew from such files.
"""

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path

from jaxplan.config.reader import ConfigError, load_config

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Keep a result if one is given; then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, help="of the experiment")
    parser.add_argument("--run", type=Path, help="directory of its finished run")
    args = parser.parse_args()
    if (args.config is None) != (args.run is None):
        parser.error("--config and --run belong together")
    from jaxplan.eval.results import fill_tables, keep_result, result_path

    readme = ROOT / "README.md"
    try:
        if args.config is not None:
            config = dataclasses.asdict(load_config(args.config))
            result = keep_result(args.run, json.loads(json.dumps(config)))
            path = result_path(args.config)
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(f"kept: {path}")
            figure = args.run / "pareto.png"
            if figure.exists():
                shutil.copyfile(figure, args.config.with_suffix(".pareto.png"))
        text = readme.read_text(encoding="utf-8")
        readme.write_text(fill_tables(text, ROOT), encoding="utf-8")
    except (ConfigError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("written: README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
