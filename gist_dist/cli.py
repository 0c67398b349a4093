"""The command line. Arguments and recipes are checked before torch or ray is imported."""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from gist_dist import __version__
from gist_dist.config import EvaluateConfig, RunConfig, load_recipe, packaged_recipes
from gist_dist.errors import UserError

EXAMPLES = """examples:
  gist-dist train quickstart                         a packaged recipe
  gist-dist train my.yaml optim.steps=500 batch.global_size=4096
  gist-dist plan my.yaml                             what would run, before anything is spent
  gist-dist mine my.yaml --output mined --negatives 5 --relative-margin 0.05
  gist-dist evaluate runs/my/model --tasks STSBenchmark SciFact
  gist-dist report runs/my                           rebuild report.html"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 a UserError or an MTEB task that failed, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("gist_dist").setLevel(logging.INFO)
    try:
        return arguments.run(arguments)
    except UserError as error:
        print(f"gist-dist: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("gist-dist: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gist-dist",
        description="Fine-tune text-embedding models with a guide, at any batch size, on a Ray cluster.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gist_dist {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, run, summary in (
        ("train", _train, "train, evaluate and report; the same command resumes"),
        ("plan", _plan, "show what would run: rows, batches, chunks, padding, memory; trains nothing"),
        ("precompute", _precompute, "guide embeddings of the whole corpus, kept for guide.mode=cache"),
    ):
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("recipe", help=f"a YAML file, or a packaged recipe: {', '.join(packaged_recipes())}")
        command.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace values of the recipe")
        command.set_defaults(run=run)
    _add_mine(commands)
    command = commands.add_parser("evaluate", help="run MTEB tasks on a model, side by side as Ray tasks")
    command.add_argument("model", help="folder of a SentenceTransformer, or Hub id")
    command.add_argument("--tasks", nargs="+", required=True, help="MTEB tasks, or folders in --local-tasks")
    command.add_argument("--local-tasks", help="folder of task folders read instead of the Hub")
    command.add_argument("--output", default="mteb", help="folder for MTEB's result files (default: %(default)s)")
    command.add_argument("--address", help="of a Ray cluster; by default $RAY_ADDRESS or a local Ray")
    command.add_argument("--batch-size", type=int, default=64, help="texts encoded at once (default: %(default)s)")
    command.set_defaults(run=_evaluate)
    command = commands.add_parser("report", help="rebuild report.html, report.json and plots of a run")
    command.add_argument("run_dir", type=Path, metavar="RUN", help="folder of the run")
    command.set_defaults(run=_report)
    command = commands.add_parser("doctor", help="what this machine or cluster has and lacks")
    command.add_argument("--address", help="of a Ray cluster to look at")
    command.set_defaults(run=_doctor)
    return parser


def _add_mine(commands: Any) -> None:
    summary = "hard negatives for every row, written as sources that a recipe can use"
    command = commands.add_parser("mine", help=summary, description=summary)
    command.add_argument("recipe", help="a YAML file, or a packaged recipe; its guide scores")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace values of the recipe")
    command.add_argument("--output", type=Path, required=True, help="new folder for the sources")
    command.add_argument("--model", help="Hub id or folder of the model that scores, in place of the recipe's guide")
    command.add_argument(
        "--negatives", type=int, default=3, metavar="K", help="added to each row (default: %(default)s)"
    )
    for flag, what in (
        ("absolute-margin", "a negative scores at most the positive's score less this"),
        ("relative-margin", "a negative scores at most the positive's score less this share of it"),
        ("min-score", "a negative scores at least this"),
        ("max-score", "a negative scores at most this"),
    ):
        command.add_argument(f"--{flag}", type=float, metavar="X", help=what)
    command.add_argument("--min-rank", type=int, default=0, metavar="N", help="so many of the nearest are skipped")
    command.add_argument("--max-rank", type=int, metavar="N", help="so many of the nearest are looked at")
    pool = "search the positives of all rows, or their hard negatives too (default: %(default)s)"
    command.add_argument("--pool", choices=("positives", "all"), default="positives", help=pool)
    sampling = "take the nearest, or a seeded draw from the rank range (default: %(default)s)"
    command.add_argument("--sampling", choices=("top", "random"), default="top", help=sampling)
    command.set_defaults(run=_mine)


def _recipe(arguments: argparse.Namespace) -> RunConfig:
    return load_recipe(arguments.recipe, arguments.overrides)


def _train(arguments: argparse.Namespace) -> int:
    config = _recipe(arguments)
    print(f"gist_dist {__version__}: {config.name} -> {config.run_dir}", file=sys.stderr, flush=True)
    from gist_dist.on_ray.driver import train_and_evaluate

    summary = train_and_evaluate(config)
    print("\n" + "\n".join(summary.lines()))
    return 1 if summary.num_failed else 0


def _plan(arguments: argparse.Namespace) -> int:
    config = _recipe(arguments)
    print(f"gist_dist {__version__}: planning {config.name}", file=sys.stderr, flush=True)
    from gist_dist.on_ray.driver import prepare
    from gist_dist.preview import preview

    config = config.absolute_paths()
    print("\n".join(preview(config, *prepare(config)).lines()))
    return 0


def _precompute(arguments: argparse.Namespace) -> int:
    config = _recipe(arguments)
    print(f"gist_dist {__version__}: guide embeddings for {config.name}", file=sys.stderr, flush=True)
    from gist_dist.on_ray.driver import precompute_only

    print("\n".join(precompute_only(config)))
    return 0


def _mine(arguments: argparse.Namespace) -> int:
    config = _recipe(arguments)
    print(
        f"gist_dist {__version__}: hard negatives for {config.name} -> {arguments.output}", file=sys.stderr, flush=True
    )
    from gist_dist.mining import MineOptions
    from gist_dist.on_ray.mine import mine

    options = {field.name: getattr(arguments, field.name) for field in fields(MineOptions)}
    print("\n".join(mine(config, MineOptions(**options), arguments.output).lines()))
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    evaluate = EvaluateConfig(
        tasks=tuple(arguments.tasks),
        local_tasks=str(Path(arguments.local_tasks).absolute()) if arguments.local_tasks else None,
        batch_size=arguments.batch_size,
    )
    from gist_dist.on_ray.evaluation import evaluate_one_model

    failures = evaluate_one_model(arguments.model, evaluate, Path(arguments.output).absolute(), arguments.address)
    return 1 if failures else 0


def _report(arguments: argparse.Namespace) -> int:
    from gist_dist.report import build_report

    print("\n".join(build_report(arguments.run_dir.absolute()).lines()))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from gist_dist.on_ray.doctor import examine

    verdict = examine(arguments.address)
    print("\n".join(verdict.lines()))
    return 0 if verdict.healthy else 1


if __name__ == "__main__":
    sys.exit(main())
