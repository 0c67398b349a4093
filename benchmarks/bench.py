"""A short version of every benchmark, one after another: `make bench`.

    python benchmarks/bench.py                      about 20 minutes on 2 cores; with a GPU, 8 more
    python benchmarks/bench.py step ceiling         some of them

Results go to benchmarks/results/short (not in git), with a README.md of one line a claim; those of the long runs beside
it stay. At such small sizes, on a machine that may do other things as well, they show directions and no last tenths.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
from harness import RESULTS, ROOT, say

HERE = Path(__file__).parent
SHORT = {
    "loss_stage": "--sizes 256 512 4096 --repeats 3 --memory-at 16384",
    "step": "--data short --sizes 128 256 --repeats 2 --mini-batch-sizes 32 64",
    "guide": "--guides minilm --data short --rows 256 --repeats 2",
    "ceiling": "--data short --rows 128 --plain-rows 64 --repeats 3",
    "workers": "--data short --rows 256 --repeats 2",
    "batch_scaling": "--steps-sizes 32 512 2048 --sizes 32 256 --rows 3072 --tasks STSBenchmark --repeats 2",
}
"""Script → flags."""


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("benchmarks", nargs="*", metavar="BENCHMARK", help=", ".join([*SHORT, "gpu"]))
    flags.add_argument("--results", type=Path, default=RESULTS / "short")
    flags.add_argument("--work", type=Path, default=ROOT / "runs" / "bench")
    arguments = flags.parse_args()
    if unknown := set(arguments.benchmarks) - {*SHORT, "gpu"}:
        flags.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join([*SHORT, 'gpu'])}")
    folders = ["--results", str(arguments.results), "--work", str(arguments.work)]
    commands = {
        name: [sys.executable, str(HERE / f"{name}.py"), *given.split(), *folders] for name, given in SHORT.items()
    }
    if torch.cuda.is_available():
        commands["gpu"] = [str(HERE / "gpu.sh"), str(arguments.results)]
    failed = []
    for name in arguments.benchmarks or commands:
        say(f"== {name}")
        started = time.monotonic()
        if subprocess.run(commands[name], check=False).returncode:
            failed.append(name)
        say(f"== {name} took {time.monotonic() - started:.0f} s")
    print((arguments.results / "README.md").read_text())
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
