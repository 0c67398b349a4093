"""Hostile input from seeds: every case works or ends in one UserError, and leaves nothing where it should not be.

    python tests/fuzz.py --seconds 600              all targets, each in a process of its own that may crash
    python tests/fuzz.py --target sources --seed 41 one case again, with its traceback

tests/test_hostile.py runs the first seeds of every target.
"""

import argparse
import io
import json
import logging
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hostile
import hostile_data
import numpy as np
import tiny
import zoo

from gist_dist.common.errors import UserError
from gist_dist.config import RunConfig
from gist_dist.recipe import load_recipe

CASE_SECONDS = 20
CASE_BYTES = 2**30
LONGEST_ANSWER = 5000
MARK = "EXECUTED"
"""What payloads would create in the working directory."""


class Finding(Exception):
    """What must not happen, did."""


@dataclass(frozen=True)
class Models:
    student: Path
    guide: Path


@lru_cache
def models(folder: Path) -> Models:
    return Models(tiny.save_tiny_model(folder / "student"), tiny.save_tiny_model(folder / "guide", seed=1))


@lru_cache(maxsize=8)
def loaded(kind: type, described: str) -> Any:
    """Models that many cases share, loaded once."""
    section = "student" if kind.__name__ == "Student" else "guide"
    return kind(getattr(RunConfig.model_validate_json(described), section))


# ------------------------------------------------------------------------------------------------------ what is fed


def fuzz_recipes(rng: random.Random, place: Path, shared: Path) -> str:
    """The whole of `gist-dist plan`, on a recipe with a few values, keys or bytes replaced."""
    recipe = place / "recipe.yaml"
    tree = good_recipe(place, shared)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 5))):
        hostile.change(rng, tree, protected=hostile.KEPT)
    text = hostile.dump(rng, tree)
    for _ in range(rng.choice((0, 0, 1, 3))):
        text = hostile.damage_text(rng, text)
    recipe.write_bytes(text.encode("utf-8", "surrogatepass"))
    overrides = [hostile.override(rng, tree) for _ in range(rng.choice((0, 0, 1, 2)))]
    return command("plan", str(recipe), "--", *overrides)


def fuzz_yaml(rng: random.Random, place: Path, shared: Path) -> str:
    """YAML that is no recipe, or hardly one."""
    recipe = place / "recipe.yaml"
    recipe.write_bytes(hostile.yaml_soup(rng).encode("utf-8", "surrogatepass"))
    config = load_recipe(str(recipe), [hostile.override(rng, {}) for _ in range(rng.choice((0, 1)))])
    config.model_dump(mode="json")
    return "read"


def fuzz_sources(rng: random.Random, place: Path, shared: Path) -> str:
    """Data files of every format, damaged in every way, prepared as a run would."""
    source = hostile_data.source(rng, place / "data")
    sections = {"batch": {"global_size": 2}, "data": {"sources": [source]}}
    tree = good_recipe(place, shared) | sections
    if "text" not in source.get("columns", {}) and rng.random() < 0.5:
        tree["guide"] = None
    prepare(RunConfig.model_validate(tree))
    return "prepared"


def fuzz_layouts(rng: random.Random, place: Path, shared: Path) -> str:
    """Layouts of the field's tools with cells of every shape, retrieval folders, and how text files are to be read."""
    source = hostile_data.layout(rng, place / "data")
    tree = good_recipe(place, shared) | {"batch": {"global_size": 2}, "data": {"sources": [source]}, "guide": None}
    corpus = prepare(RunConfig.model_validate(tree))
    for row in range(corpus.num_rows):
        for text in (corpus.anchors[row], corpus.positives[row], *corpus.further_of(np.array([row]))):
            if not corpus.text(int(text)).strip():
                raise Finding(f"row {row} has a blank text")
    (report,) = corpus.manifest["reports"]
    if report["rows_read"] + report["rows_added"] != report["rows_used"] + sum(report["dropped"].values()):
        raise Finding(f"rows that nobody counted: {report}")
    return "prepared"


def fuzz_corpora(rng: random.Random, place: Path, shared: Path) -> str:
    """A prepared corpus, or one whose preparation was killed, with damaged, missing and edited files."""
    config = RunConfig.model_validate(good_recipe(place, shared))
    if is_unfinished := rng.random() < 0.5:
        with patch("gist_dist.data.corpus.merge", side_effect=UserError("killed")):
            try:
                prepare(config)
            except UserError as error:
                assert str(error) == "killed"
    else:
        expected = prepare(config)
    (folder,) = Path(config.corpora_dir).iterdir()
    for _ in range(rng.choice((1, 1, 2))):
        hostile.damage_store(rng, folder)
    corpus = prepare(config)
    if not is_unfinished and corpus.manifest["content"] != expected.manifest["content"]:
        raise Finding("a damaged corpus was opened as another one")
    for text in range(corpus.num_texts):
        corpus.text(text)
    return "opened"


def fuzz_guide_caches(rng: random.Random, place: Path, shared: Path) -> str:
    """Embeddings of a guide on disk: what is found must be what was written."""
    import numpy as np

    from gist_dist.models.guide_cache import GuideCache

    keys = np.arange(64, dtype=np.uint64).reshape(-1, 2)
    embeddings = np.linspace(-1, 1, 32 * 8, dtype=np.float16).reshape(32, 8)
    cache = GuideCache(str(place / "cache"), "guide", 8)
    for half in (slice(0, 16), slice(16, 32)):
        cache.write(keys[half], embeddings[half])
    for _ in range(rng.choice((1, 1, 2))):
        hostile.damage_store(rng, place / "cache" / "guide")
    copy = str(place / "copy") if rng.random() < 0.3 else None
    opened = GuideCache(str(place / "cache"), "guide", 8, local_copy=copy, verify=True)
    found = opened.find(keys)
    has = found >= 0
    if not np.array_equal(opened.embeddings(found[has]), embeddings[has]):
        raise Finding("embeddings that were not written")
    return f"{has.sum()} of 32 found"


def fuzz_tasks(rng: random.Random, place: Path, shared: Path) -> str:
    """Evaluation sets of one's own, and folders that stand for MTEB's tasks."""
    from gist_dist.config import EvaluateConfig
    from gist_dist.evaluation.tasks import check_tasks

    name = hostile_data.task(rng, place / "tasks")
    check_tasks(EvaluateConfig(tasks=(name,), local_tasks=str(place / "tasks")))
    return "checked"


def fuzz_checkpoints(rng: random.Random, place: Path, shared: Path) -> str:
    """After damage the newest intact checkpoint is one that was written, whole."""
    import torch

    from gist_dist.training.checkpoint import CheckpointStore, Snapshot, read_newest

    checkpoints = CheckpointStore(RunConfig.model_validate(good_recipe(place, shared)))
    written = {step: torch.full((3, 2), float(step)) for step in (1, 2)}
    for step, weight in written.items():
        tensors = {"model": {"weight": weight}, "optimizer": {"exp_avg|weight": weight}}
        checkpoints.write(Snapshot(step, tensors, {"loss": 0.5}))
    for _ in range(rng.choice((1, 1, 2, 4))):
        hostile.damage_store(rng, Path(checkpoints.place))
    found = read_newest(checkpoints, retry_seconds=0.0)
    if found is None:
        return "none left"
    if found.facts != {"step": found.step, "loss": 0.5} or found.tensors.keys() != {"model", "optimizer"}:
        raise Finding(f"a state that was not written: {found}")
    if not torch.equal(found.tensors["model"]["weight"], written[found.step]):
        raise Finding("other weights than were written")
    return f"step {found.step}"


def fuzz_reports(rng: random.Random, place: Path, shared: Path) -> str:
    """The page of a run shows texts as they are, and runs none of them."""
    from test_report import Page

    from gist_dist.report import build_report

    run = hostile_data.run_folder(rng, place / "run")
    build_report(run)
    if found := {"script", "img"} & set(Page(run).tags):
        raise Finding(f"texts became tags: {found}")
    return "built"


def fuzz_runs(rng: random.Random, place: Path, shared: Path) -> str:
    """The folder of a run with damaged, missing and edited files: its report, its card, a comparison with it."""
    from gist_dist.report import read_run, summarize
    from gist_dist.report.model_card import write_model_card
    from gist_dist.report.page import render_report

    run = hostile_data.damaged_run(rng, place / "run")
    what = rng.random()
    if what < 0.15:
        return command("report", str(run))
    if what < 0.3:
        good = hostile_data.plain_run(place / "good", 3)
        return command("report", *map(str, rng.choice(((run, good), (good, run)))), "--out", str(place / "both.html"))
    if what < 0.5:
        write_model_card(run)
        return "carded"
    found = read_run(run)
    contents = summarize(found)
    json.dumps(contents, allow_nan=False, ensure_ascii=False).encode()
    render_report(found, contents, [])
    return "shown"


def fuzz_models(rng: random.Random, place: Path, shared: Path) -> str:
    """A student of tests/zoo.py, with damaged, missing and edited files: it is trained as it is saved, or refused."""
    from gist_dist.config import StudentConfig
    from gist_dist.models.encoder import Student, save_model

    kind = zoo.drawn(rng)
    folder = zoo.save(place / "model", kind)
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        hostile.damage_store(rng, folder)
    student = Student(StudentConfig(model=str(folder), save_dtype=rng.choice(("fp32", "checkpoint"))))
    try:
        save_model(student, place / "saved")
    except UserError as error:
        raise Finding(f"{kind}: {error}") from error
    return "equal"


TARGETS: dict[str, Callable[[random.Random, Path, Path], str]] = {
    name.removeprefix("fuzz_"): function for name, function in list(globals().items()) if name.startswith("fuzz_")
}


# ------------------------------------------------------------------------------------------------------ how it is run


def good_recipe(place: Path, shared: Path) -> dict[str, Any]:
    """Of rows in a file of its own."""
    place.mkdir(parents=True, exist_ok=True)
    rows = [{"anchor": f"amber {a} {b}", "positive": f"basin {b} {a}"} for a in tiny.WORDS[:4] for b in tiny.WORDS[:4]]
    path = tiny.write_jsonl(place / "pairs.jsonl", rows)
    used = models(shared)
    sections = {"batch": {"global_size": 4}, "cluster": {"address": "127.0.0.1:1"}}
    tree = tiny.recipe(place / "out", used.student, used.guide, path, **sections)
    return RunConfig.model_validate(tree).model_dump(mode="json")


def prepare(config: RunConfig) -> Any:
    from gist_dist.data.corpus import prepare
    from gist_dist.models.encoder import Guide, Student
    from gist_dist.on_ray.tasks.triplets import resolve_classification

    student = loaded(Student, config.model_dump_json(include={"name", "student", "data"}))
    guide = (
        loaded(Guide, config.model_dump_json(include={"name", "student", "guide", "data"})) if config.guide else None
    )
    return prepare(resolve_classification(config, student, guide), student, guide, progress=lambda line: None)


def command(*arguments: str) -> str:
    """`gist-dist` in this process. UserError for its one sentence."""
    from gist_dist.cli import main

    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(list(arguments))
    if "Traceback" in err.getvalue() or status not in (0, 1):
        raise Finding(f"status {status}: {err.getvalue()[-2000:]}")
    if status == 0:
        return "done"
    said = [line for line in err.getvalue().splitlines() if line.startswith("gist-dist: ")]
    if len(said) != 1:
        raise Finding(f"{len(said)} answers: {err.getvalue()[-2000:]}")
    raise UserError(err.getvalue().partition("gist-dist: ")[2])


def run_case(target: str, seed: int, box: Path, shared: Path) -> str:
    """Of one case what came of it: "refused: …" or that it worked. Finding for anything else."""
    place = box / "a" / "b" / "work"  # what climbs two folders is still seen
    place.mkdir(parents=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    with inside(place):
        try:
            outcome = TARGETS[target](random.Random(f"{target} {seed}"), place, shared)
        except UserError as error:
            outcome = f"refused: {error}"
            check_answer(str(error))
        except Finding:
            raise
        except Exception as error:
            raise Finding(f"{type(error).__name__}: {error}\n{traceback.format_exc()}") from error
    if (seconds := time.monotonic() - started) > CASE_SECONDS:
        raise Finding(f"took {seconds:.0f} s")
    if (grown := 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)) > CASE_BYTES:
        raise Finding(f"took {grown / 1e9:.1f} GB")
    if strays := [path for path in box.rglob("*") if place not in (path, *path.parents) and path not in place.parents]:
        raise Finding(f"left {strays[0]}")
    if list(box.rglob(MARK)):
        raise Finding("a payload was executed")
    return outcome


def check_answer(answer: str) -> None:
    lines = answer.strip().splitlines()
    if not answer.strip() or len(answer) > LONGEST_ANSWER:
        raise Finding(f"an answer of {len(answer)} characters: {answer[:500]}")
    if len(lines) > 5:  # a recipe's first five mistakes
        raise Finding(f"an answer of {len(lines)} lines: {answer[:500]}")
    for sign in ("Traceback", "object at 0x", "NoneType' object"):
        if sign in answer:
            raise Finding(f"an answer from the machine room: {answer[:500]}")


@contextmanager
def inside(folder: Path) -> Any:
    was = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(was)


def run_seeds(target: str, seeds: range, seconds: float, told: Path | None = None) -> tuple[Counter[str], list[str]]:
    """Outcomes, and findings with their seeds."""
    logging.getLogger("gist_dist").setLevel(logging.ERROR)
    outcomes, findings = Counter[str](), list[str]()
    with tempfile.TemporaryDirectory() as folder:
        shared, ends = Path(folder) / "shared", time.monotonic() + seconds
        models(shared)
        for seed in seeds:
            if time.monotonic() > ends:
                break
            if told:
                told.write_text(str(seed))
            try:
                outcomes[run_case(target, seed, Path(folder) / f"case-{seed}", shared).partition(":")[0]] += 1
            except Finding as finding:
                findings.append(f"{target} --seed {seed}: {finding}")
            subprocess.run(["rm", "-rf", str(Path(folder) / f"case-{seed}")], check=True)
    return outcomes, findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--seed", type=int, help="one case, with its outcome")
    parser.add_argument("--first", type=int, default=0, help="seed to begin with")
    parser.add_argument("--seconds", type=float, default=600, help="for all targets together (default: %(default)s)")
    parser.add_argument("--told", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    targets = arguments.target or list(TARGETS)
    if arguments.seed is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(run_case(targets[0], arguments.seed, Path(folder) / "case", Path(folder) / "shared"))
        return 0
    if arguments.told:
        outcomes, findings = run_seeds(
            targets[0], range(arguments.first, sys.maxsize), arguments.seconds, arguments.told
        )
        print(json.dumps([dict(outcomes), findings]))
        return 0
    return report(targets, arguments.first, arguments.seconds / len(targets))


def report(targets: list[str], first: int, seconds: float) -> int:
    """Every target in a process of its own; exit status 1 if anything was found."""
    failed = False
    for target in targets:
        with tempfile.TemporaryDirectory() as folder:
            told = Path(folder) / "seed"
            options = ["--target", target, "--first", str(first), "--seconds", str(seconds), "--told", str(told)]
            done = subprocess.run([sys.executable, __file__, *options], capture_output=True, text=True)
            if done.returncode:
                seed = told.read_text() if told.exists() else "?"
                outcomes, findings = {}, [f"{target} --seed {seed}: exit {done.returncode}: {done.stderr[-3000:]}"]
            else:
                outcomes, findings = json.loads(done.stdout.splitlines()[-1])
        counts = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(outcomes.items()))
        print(f"{target}: {counts or 'nothing'}; {len(findings)} findings", flush=True)
        for finding in findings[:10]:
            print(f"  --target {finding}", flush=True)
        failed |= bool(findings)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
