"""One rank of a test: the scenario in each mode of the folder's ``modes.json``; rank 0 writes what it found."""

import json
import os
import sys
from pathlib import Path

import numpy as np

from tests.parallel.scenario import answers, forward, run_config


def main(folder):
    modes = json.loads((folder / "modes.json").read_text())
    for name, parallel in modes.items():
        run = run_config(**parallel)
        found, tokens = forward(run), answers(run)
        if os.environ["RANK"] == "0":
            np.savez(folder / f"{name}.npz", **found)
            (folder / f"{name}.json").write_text(json.dumps(tokens))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
