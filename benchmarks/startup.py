"""C5: how long `fat5 --help` takes, and what `import fat5` adds to `import torch`; a fresh process each.

python benchmarks/startup.py [--repeats 15]
"""

import argparse
import subprocess
import sys

import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    commands = {
        "fat5 --help": ["-m", "fat5", "--help"],
        "import torch": ["-c", "import torch"],
        "import both": ["-c", "import torch, fat5"],
    }

    def run(words: list[str]) -> None:
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)

    seconds = measure.interleaved({name: lambda w=words: run(w) for name, words in commands.items()}, arguments.repeats)
    rows = [measure.row("startup", name, "time", values, "s") for name, values in seconds.items()]
    added = seconds["import both"] - seconds["import torch"]
    rows.append(measure.row("startup", "import fat5", "time added to import torch", added, "s"))
    measure.save("startup", rows)


if __name__ == "__main__":
    main()
