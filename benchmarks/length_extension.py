"""Length extension, a worked example: train at 512 tokens, continue the same run at 2048 with another schedule.

    python benchmarks/length_extension.py RUN_FOLDER [--steps N] [--more M] [OVERRIDE ...]

The first N steps read windows of 512 tokens with the schedule v9. Then the run goes on for M steps at four times the
length: `resume.allow=[seq_len,transpoint]` says that both may differ from the checkpoint. The first layers keep the
points that they were trained with and the later ones move up into the new length; v9 itself, which scales with it,
would move them all by four. Prints the validation losses, each in windows of the length that it was trained with.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

SHORT, LONG = 512, 2048
# v9 at 512 tokens is [0, 8, 16, 32, 64, 128, 256, inf].
LONGER_POINTS = "[0,8,16,32,128,512,1024,inf]"
# The learning rate stays up until the second part's end, where it decays.
FIRST = ("transpoint=v9", "optim.schedule=constant")
THEN = (f"transpoint.points={LONGER_POINTS}", "resume=must", "resume.allow=[seq_len,transpoint]", "optim.schedule=wsd")


def main(argv: list[str]) -> int:
    """Train, extend, report; returns the exit code of the part that failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=60, help=f"at {SHORT} tokens")
    parser.add_argument("--more", type=int, default=20, help=f"at {LONG} tokens")
    options, overrides = parser.parse_known_args(argv)
    parts = (
        (SHORT, options.steps, FIRST),
        (LONG, options.steps + options.more, THEN),
    )
    for seq_len, steps, own in parts:
        lengths = [f"data.seq_len={seq_len}", f"train.steps={steps}", "train.global_batch=4"]
        command = [sys.executable, "-m", "transmamba.train", *lengths, *own, *overrides, f"run.dir={options.run}"]
        code = subprocess.run(command).returncode
        if code:
            return code
    for line in report(options.run, options.steps):
        print(line)
    return 0


def report(run: Path, n_short: int) -> list[str]:
    """The validations of a run, one line each; the first `n_short` steps had short windows."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = []
    for record in records:
        seq_len = SHORT if record["step"] <= n_short else LONG
        for name, held in record.get("validation", {}).items():
            lines.append(f"step {record['step']:>4}, windows of {seq_len:>4}: {name} loss {held['loss']:.4f}")
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
