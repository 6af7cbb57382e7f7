"""All benchmarks, one after the other: `make bench`. One alone takes its options behind its name:

make bench ARGS="step_speed --sequence-length 512 1024"     (python -m tests.benchmarks step_speed --help)
"""

import subprocess
import sys
from pathlib import Path

BENCHMARKS = ("loader_speed", "prepare_speed", "checkpoint_speed", "step_speed")  # the one that takes hours comes last


def main() -> int:
    """Runs them; the status is that of the last one that failed, 0 if none did."""
    given = sys.argv[1:]
    first_option = next((index for index, word in enumerate(given) if word.startswith("-")), len(given))
    names, options = given[:first_option] or list(BENCHMARKS), given[first_option:]
    unknown = [name for name in names if not Path(__file__).with_name(f"{name}.py").exists()]
    if unknown or (options and len(names) != 1):
        print(f"error: name some of {', '.join(BENCHMARKS)}, or one of them and its options behind it", file=sys.stderr)
        return 2
    status = 0
    for name in names:
        print(f"=== {name}", flush=True)
        status = subprocess.run([sys.executable, "-m", f"tests.benchmarks.{name}", *options]).returncode or status
    return status


if __name__ == "__main__":
    sys.exit(main())
