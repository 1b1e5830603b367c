"""How long `vlmbatch --help` takes, next to a Python that does nothing.

    python benchmarks/cli_startup.py [--runs 20]

The two take turns, so that a busy machine slows both down alike. Times are wall clock, in seconds,
of the console script beside this interpreter, or of `python -m vlmbatch` where there is none.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    runs = parser.parse_args().runs

    script = Path(sys.executable).with_name("vlmbatch")
    help_ = [str(script)] if script.exists() else [sys.executable, "-m", "vlmbatch"]
    commands = {
        "vlmbatch --help": [*help_, "--help"],
        "python -c pass": [sys.executable, "-c", "pass"],
    }

    times: dict[str, list[float]] = {name: [] for name in commands}
    for command in commands.values():
        seconds(command)  # not counted: fills the disk cache, writes the .pyc files
    for _ in range(runs):
        for name, command in commands.items():
            times[name].append(seconds(command))

    for name, taken in times.items():
        print(
            f"{name:16}  median {statistics.median(taken):.3f} s"
            f"  (fastest {min(taken):.3f}, slowest {max(taken):.3f}, {runs} runs)"
        )
    ours, reference = (statistics.median(taken) for taken in times.values())
    print(f"{'ratio':16}  {ours / reference:.1f}")


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    taken = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed with exit code {done.returncode}:\n{done.stderr}")
    return taken


if __name__ == "__main__":
    main()
