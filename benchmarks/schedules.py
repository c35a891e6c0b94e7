"""The nine schedules of the paper and three controls, three seeds each, on the tiny model: 36 runs in 40 minutes.

    python benchmarks/schedules.py [--dir WORK_FOLDER] [--steps N] [--slots 2] [--time-limit 40m]

Runs the sweep `schedules` (the same command again goes on with what is left) and writes leaderboard.csv,
leaderboard.json, sweep.png and sweep.html to benchmarks/results/<hardware>/schedules. Validations during training take
the same 8,192 tokens everywhere; one step is added so that the last of them is the run's last step but one.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from transmamba.bench.kernels import results_folder
from transmamba.machine import describe_device

STEPS = 160
EVERY = 20
OVERRIDES = (
    *("model=tiny", "data.seq_len=512", "train.global_batch=2", f"validation.every={EVERY}", "validation.tokens=8192"),
    *("sample.prompt=", "wandb.mode=disabled"),
)


def main(argv: list[str]) -> int:
    """Run the sweep, then report; returns the sweep's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/sweeps/schedules"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"a multiple of {EVERY}; one is added")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--time-limit", default="40m")
    options = parser.parse_args(argv)
    if options.steps < 2 * EVERY or options.steps % EVERY:
        parser.error(f"--steps {options.steps}: give a multiple of {EVERY}, at least {2 * EVERY}")
    transmamba = str(Path(sys.executable).parent / "transmamba")
    sweep = [transmamba, "sweep", "schedules", "--dir", str(options.dir)]
    asked = ["--schedules", "v1..v9", "--controls", "--seeds", str(options.seeds)]
    where = ["--slots", str(options.slots), "--time-limit", options.time_limit]
    code = subprocess.run([*sweep, *asked, *where, "--", *OVERRIDES, f"train.steps={options.steps + 1}"]).returncode
    if not (options.dir / "sweep.json").exists():
        return code
    results = Path(__file__).parent / "results"
    out = options.out or results_folder(results, describe_device(torch.device("cpu"))) / "schedules"
    subprocess.run([transmamba, "sweep", "show", "schedules", *sweep[3:], "--out", str(out)], check=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
