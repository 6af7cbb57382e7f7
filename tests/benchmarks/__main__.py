"""All benchmarks, one after the other: `make bench`. Each can also be run alone, with options (`--help`)."""

import subprocess
import sys

BENCHMARKS = ("step_speed", "loader_speed", "prepare_speed", "checkpoint_speed")


def main() -> int:
    """Runs them; the status is that of the last one that failed, 0 if none did."""
    status = 0
    for name in sys.argv[1:] or BENCHMARKS:
        print(f"=== {name}", flush=True)
        status = subprocess.run([sys.executable, "-m", f"tests.benchmarks.{name}"]).returncode or status
    return status


if __name__ == "__main__":
    sys.exit(main())
