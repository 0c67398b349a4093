"""How fast is a corpus prepared, and in how much memory?

    python benchmarks/prepare.py [--rows 2000000] [--model FOLDER] [--guide FOLDER] [--folder FOLDER]

Random words of the model's vocabulary, in texts as long as questions (anchors) and sentences (positives), a fifth of
the positives repeated, as parquet files of 131,072 rows. The corpus is prepared twice: in one process on one core, and
on a local Ray with two tasks; each in a process of its own. Core seconds are what the driver and the tasks had of the
processor, so that a busy machine does not change them. Peak memory is the resident set of the driver and of the
largest task, with what was there before (imports, the model) beside it; merged arrays are mapped, not held. Writes
benchmarks/results/prepare.json and prints a Markdown table.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).parent
MODEL = HERE.parent / "quickstart/models/minilm-2-layers"
ROWS_PER_FILE = 2**17


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--guide", type=Path, help="with another tokenizer or limit, texts are tokenized twice")
    parser.add_argument("--folder", type=Path, help="for rows and corpora; by default a temporary one")
    parser.add_argument("--one", choices=["process", "ray"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments)))
        return
    if not arguments.model.is_dir():
        sys.exit(f"{arguments.model} is missing: run `python examples/quickstart.py` first, or give --model")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        write_rows(Path(folder) / "rows", arguments.rows, arguments.model)
        results = []
        for how in ("process", "ray"):
            command = [sys.executable, __file__, "--one", how, "--rows", str(arguments.rows), "--folder", folder]
            command += [
                "--model",
                str(arguments.model),
                *(["--guide", str(arguments.guide)] if arguments.guide else []),
            ]
            environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
            print(row(results[-1]) if len(results) > 1 else header() + row(results[-1]), flush=True)
    from gist_dist.runs.folder import describe_environment

    document = {"results": results, "environment": describe_environment(), "machine": platform.machine()}
    (HERE / "results" / "prepare.json").write_text(json.dumps(document, indent=1) + "\n")


def header() -> str:
    names = (
        "how",
        "rows",
        "texts",
        "seconds",
        "core seconds",
        "merging s",
        "rows/core s",
        "driver GB (before)",
        "task GB",
    )
    return f"| {' | '.join(names)} |\n{'|---' * len(names)}|\n"


def row(result: dict) -> str:
    task = f"{result['task_bytes'] / 1e9:.2f}" if result["task_bytes"] else "-"
    return (
        f"| {result['how']} | {result['rows']:,} | {result['texts']:,} | {result['seconds']:.0f} | "
        f"{result['core_seconds']:.0f} | {result['merge_seconds']:.1f} | {result['rows_per_core_second']:,.0f} | "
        f"{result['driver_bytes'] / 1e9:.2f} ({result['before_bytes'] / 1e9:.2f}) | {task} |"
    )


def write_rows(folder: Path, num_rows: int, model: Path) -> None:
    from transformers import AutoTokenizer

    folder.mkdir()
    words = np.array([w for w in sorted(AutoTokenizer.from_pretrained(str(model)).get_vocab()) if w.isalpha()])
    rng = np.random.default_rng(0)

    def texts(count: int, median: float, spread: float) -> list[str]:
        lengths = np.clip(rng.lognormal(np.log(median), spread, count), 2, 200).astype(int)
        # Frequent words are short and many, as in language.
        chosen = words[(len(words) * rng.random(lengths.sum()) ** 3).astype(int)].tolist()
        ends = np.cumsum(lengths).tolist()
        return [" ".join(chosen[i:j]) for i, j in zip([0, *ends], ends, strict=False)]

    common = np.array(texts(max(1, num_rows // 20), 15, 0.5), dtype=object)
    for number, start in enumerate(range(0, num_rows, ROWS_PER_FILE)):
        count = min(ROWS_PER_FILE, num_rows - start)
        positives = np.array(texts(count, 15, 0.5), dtype=object)
        repeated = rng.random(count) < 0.2
        positives[repeated] = rng.choice(common, int(repeated.sum()))
        table = pa.table({"anchor": texts(count, 10, 0.4), "positive": pa.array(positives, pa.string())})
        pq.write_table(table, folder / f"rows-{number:03d}.parquet")


def measure(arguments: argparse.Namespace) -> dict:
    from gist_dist.config import ClusterConfig
    from gist_dist.data import corpus as module
    from gist_dist.models.encoder import Guide, Student
    from gist_dist.on_ray.cluster.connect import connected
    from gist_dist.on_ray.tasks.prepare import run_in_tasks
    from gist_dist.recipe import parse_config

    config = parse_config(
        {
            "name": "prepare",
            "output_dir": str(arguments.folder / arguments.one),
            "student": {"model": str(arguments.model), "max_tokens": 128},
            "guide": {"model": str(arguments.guide)} if arguments.guide else None,
            "data": {"sources": [{"path": str(arguments.folder / "rows")}]},
        }
    )
    student, guide = Student(config.student), Guide(config.guide) if config.guide else None
    merge, merge_seconds = module.merge, []

    def timed_merge(*given):
        started = time.perf_counter()
        merged = merge(*given)
        merge_seconds.append(time.perf_counter() - started)
        return merged

    module.merge = timed_merge
    say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    before, cores, tasks = peak_bytes(), 1, Tasks()
    if arguments.one == "ray":
        with connected(ClusterConfig()) as resources:
            cores = min(2, int(resources["CPU"]))
            tasks.start()
            started, own = time.perf_counter(), time.process_time()
            corpus = module.prepare(config, student, guide, say, lambda job, tick: run_in_tasks(job, tick, cores))
            seconds, core_seconds = time.perf_counter() - started, time.process_time() - own
            tasks.stop()
    else:
        started, own = time.perf_counter(), time.process_time()
        corpus = module.prepare(config, student, guide, say)
        seconds, core_seconds = time.perf_counter() - started, time.process_time() - own
    core_seconds += sum(tasks.core_seconds.values())
    return {
        "how": f"Ray, {cores} tasks" if arguments.one == "ray" else "one process",
        "rows": corpus.num_rows,
        "texts": corpus.num_texts,
        "tokens": int(corpus.student_lengths.sum()),
        "seconds": seconds,
        "merge_seconds": merge_seconds[0],
        "core_seconds": core_seconds,
        "rows_per_core_second": corpus.num_rows / core_seconds,
        "driver_bytes": peak_bytes(),
        "before_bytes": before,
        "task_bytes": tasks.peak,
        "corpus_bytes": sum(size for _, size in corpus.manifest["files"].values()),
        "content": corpus.manifest["content"],
    }


class Tasks(threading.Thread):
    """Watches Ray's worker processes: the peak memory of the largest, and what each had of the processor."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.core_seconds, self.over = 0, dict[str, float](), threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.5):
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    if (process / "cmdline").read_bytes().startswith(b"ray::") and descends(process):
                        self.peak = max(self.peak, peak_bytes(process))
                        ticks = (process / "stat").read_text().rsplit(")", 1)[1].split()[11:13]
                        self.core_seconds[process.name] = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
                except (OSError, ValueError, IndexError):
                    continue  # it has ended

    def stop(self) -> None:
        self.over.set()
        self.join()


def descends(process: Path) -> bool:
    """From this process, and not from another Ray on the machine."""
    while process.name != "1":
        if process.name == str(os.getpid()):
            return True
        process = process.with_name((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
    return False


def peak_bytes(process: Path = Path("/proc/self")) -> int:
    """Largest resident set so far."""
    (line,) = [line for line in (process / "status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
