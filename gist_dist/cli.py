"""The command line. Arguments and recipes are checked before torch or ray is imported."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from gist_dist.common.errors import UserError
from gist_dist.common.redact import Redacting, printable
from gist_dist.common.signals import handled
from gist_dist.common.version import __version__
from gist_dist.config import EvaluateConfig, RunConfig
from gist_dist.recipe import load_recipe, packaged_recipes, parse_section, recipe_schema

EXAMPLES = """examples:
  gist-dist train quickstart                         a packaged recipe
  gist-dist train my.yaml optim.steps=500 batch.global_size=4096
  gist-dist plan my.yaml                             what would run, before anything is spent
  gist-dist inspect my.yaml                          what a guide is worth on these data
  gist-dist mine my.yaml --output mined --negatives 5 --relative-margin 0.05
  gist-dist cotrain a.yaml b.yaml --rounds 4         two students that guide each other
  gist-dist evaluate runs/my/model --tasks STSBenchmark SciFact
  gist-dist submit my.yaml --address http://head:8265
  gist-dist report runs/my                           rebuild report.html
  gist-dist report runs/my runs/other                compare runs on one page"""

INTERRUPTED = 130
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 a UserError or an MTEB task that failed, 130 stopped by Ctrl-C or SIGTERM."""
    arguments = _parse(argv)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Redacting("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("gist_dist").setLevel(logging.INFO)
    try:
        with handled(signal.SIGTERM, signal.default_int_handler):  # a batch system's way to say ctrl-C
            return arguments.run(arguments)
    except UserError as error:
        print(f"gist-dist: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("gist-dist: interrupted; the same command does what is left", file=sys.stderr)
        return INTERRUPTED


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may also stand behind options, where argparse does not expect them."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


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
        _add_recipe(command)
        command.set_defaults(run=run)
        if name == "train":
            command.add_argument("--address", help="of a Ray cluster that this machine is part of: cluster.address")
        if name == "plan":
            command.add_argument(
                "--gpus", type=int, metavar="N", help="also estimate a step on so many GPUs, 1 to 1,024"
            )
            kinds = "a100, h100, h200, l4, a10g, t4 or cpu (default: %(default)s)"
            command.add_argument("--gpu-kind", default="h100", metavar="KIND", help=kinds)
    _add_submit(commands)
    _add_inspect(commands)
    _add_mine(commands)
    _add_cotrain(commands)
    _add_merge(commands)
    _add_sweep(commands)
    _add_cluster(commands)
    command = commands.add_parser("evaluate", help="run MTEB tasks on a model, side by side as Ray tasks")
    command.add_argument("model", help="folder of a SentenceTransformer, or Hub id")
    command.add_argument("--tasks", nargs="+", default=[], help="MTEB tasks, or folders in --local-tasks")
    suites = "such as 'MTEB(eng, v2)', or of your own: NAME for NAME.yaml in --local-tasks"
    command.add_argument("--benchmark", nargs="+", default=[], metavar="NAME", help=suites)
    only = "of tasks in several languages only the parts in these (deu, fra, ...)"
    command.add_argument("--languages", nargs="+", default=[], metavar="CODE", help=only)
    command.add_argument("--local-tasks", help="folder of task folders read instead of the Hub")
    command.add_argument("--output", default="mteb", help="folder for MTEB's result files (default: %(default)s)")
    command.add_argument("--address", help="of a Ray cluster; by default $RAY_ADDRESS or a local Ray")
    command.add_argument("--batch-size", type=int, default=64, help="texts encoded at once (default: %(default)s)")
    limit = "a task that takes longer is ended and counts as failed (default: %(default)s)"
    command.add_argument("--task-timeout", type=float, default=1440, metavar="MINUTES", help=limit)
    command.set_defaults(run=_evaluate)
    command = commands.add_parser("report", help="rebuild report.html, report.json and plots of a run; compare several")
    command.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN", help="folder of a run; several: compare them")
    command.add_argument("--out", type=Path, metavar="PAGE", help="of several runs: write there (default: beside them)")
    command.set_defaults(run=_report)
    _add_doctor(commands)
    summary = "the JSON schema of a recipe, for editors"
    command = commands.add_parser("schema", help=summary, description=f"Write {summary}; see docs/first-recipe.md.")
    command.add_argument("--output", type=Path, metavar="FILE", help="write there (default: standard output)")
    command.set_defaults(run=_schema)
    return parser


def _add_submit(commands: Any) -> None:
    summary = "the same train as a Ray job of a cluster, followed from here"
    command = commands.add_parser(
        "submit", help=summary, description=f"{summary}. Ctrl-C leaves the job running. Exit status: the job's."
    )
    _add_recipe(command, nargs="?")
    command.add_argument("--address", help="dashboard of the cluster, http://HEAD:8265 (or $RAY_API_SERVER_ADDRESS)")
    command.add_argument("--token-file", type=Path, metavar="FILE", help="holds the token; or $RAY_AUTH_TOKEN")
    command.add_argument(
        "--env", action="append", default=[], metavar="NAME", help="give the job this variable, as HF_TOKEN; repeatable"
    )
    command.add_argument("--detach", action="store_true", help="don't follow the job's log")
    actions = command.add_mutually_exclusive_group()
    for action, what in (
        ("logs", "follow the newest job of a run"),
        ("status", "what became of a run's jobs"),
        ("stop", "end a run's job, with a checkpoint"),
        ("resume", "submit a run's last recipe again"),
    ):
        actions.add_argument(f"--{action}", metavar="RUN", help=what)
    command.set_defaults(run=_submit)


def _add_doctor(commands: Any) -> None:
    summary = "what this machine or cluster has and lacks"
    command = commands.add_parser("doctor", help=summary, description=summary)
    _add_recipe(command, nargs="?")
    command.add_argument("--address", help="of a Ray cluster to look at: HEAD:6379, or http://HEAD:8265 from outside")
    command.add_argument("--token-file", type=Path, metavar="FILE", help="holds the token of a dashboard")
    command.add_argument("--output-dir", help="folder that every node should see and write (default: the recipe's)")
    command.set_defaults(run=_doctor)


def _add_recipe(command: argparse.ArgumentParser, nargs: str | None = None) -> None:
    command.add_argument(
        "recipe", nargs=nargs, help=f"a YAML file, or a packaged recipe: {', '.join(packaged_recipes())}"
    )
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace values of the recipe")


def _add_inspect(commands: Any) -> None:
    summary = "what guide, batch size, temperature and margin are worth on these data, before anything is trained"
    command = commands.add_parser("inspect", help=summary, description=summary)
    _add_recipe(command)
    rows = "looked at of each source, at most (default: 2048, fewer of long texts)"
    command.add_argument("--rows", type=int, metavar="N", help=rows)
    command.add_argument("--out", type=Path, metavar="PAGE", help="write there (default: output_dir/inspect-NAME.html)")
    command.set_defaults(run=_inspect)


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


def _add_cotrain(commands: Any) -> None:
    summary = "two students, each trained with the other as its guide, in rounds; the same command resumes"
    command = commands.add_parser("cotrain", help=summary, description=summary)
    for name in ("first", "second"):
        command.add_argument(name, metavar="RECIPE", help="a YAML file, or a packaged recipe")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace values of both recipes")
    command.add_argument("--rounds", type=int, required=True, metavar="N", help="how often each is trained")
    command.add_argument("--no-fixed", action="store_true", help="without the same steps with a fixed guide")
    command.set_defaults(run=_cotrain)


def _add_merge(commands: Any) -> None:
    summary = "one model of several fine-tunes of a common ancestor"
    command = commands.add_parser("merge", help=summary, description=summary)
    command.add_argument("models", nargs="+", metavar="MODEL", help="folder of a model or a run, or Hub id")
    command.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="a new folder for the model")
    methods = "of mergekit: linear, slerp, ties, model_stock, … (default: %(default)s)"
    command.add_argument("--method", default="linear", metavar="NAME", help=methods)
    command.add_argument("--weights", type=float, nargs="+", metavar="X", help="one for each model (default: equal)")
    command.add_argument("--base", metavar="MODEL", help="the common ancestor, for methods that need one")
    told = "a parameter of the method, such as t=0.3 of slerp"
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help=told)
    command.set_defaults(run=_merge)


def _add_sweep(commands: Any) -> None:
    summary = "many runs of a recipe on Ray Tune, compared with statistics; the same command resumes"
    command = commands.add_parser("sweep", help=summary, description=summary)
    _add_recipe(command)
    told = "YAML: arms, values, seeds, contrasts; see docs/sweeps.md"
    command.add_argument("--over", type=Path, required=True, metavar="FILE", help=told)
    command.set_defaults(run=_sweep)


def _add_cluster(commands: Any) -> None:
    command = commands.add_parser("cluster", help="manifests for Kubernetes, Slurm, AWS and Google Cloud")
    render = command.add_subparsers(metavar="COMMAND", required=True).add_parser(
        "render", help="write the manifest that runs a recipe", description="Write the manifest that runs a recipe."
    )
    targets = ("kuberay", "kuberay-cluster", "slurm", "aws", "gcp", "values")
    render.add_argument("target", choices=targets, help="values: the values that the others take, to edit")
    render.add_argument("recipe", nargs="?", help="a YAML file, or a packaged recipe")
    render.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace values of the recipe")
    render.add_argument("--values", metavar="FILE", help="images, sizes, storage and spot; see docs/cluster.md")
    render.add_argument("--out", type=Path, metavar="FILE", help="write there (default: standard output)")
    render.set_defaults(run=_render)


def _say(lines: Iterable[str]) -> None:
    """Names of sources and the like come from data, and stay within their line."""
    for line in lines:
        print(printable(line).replace("\n", "\\n"))


def _recipe(arguments: argparse.Namespace) -> RunConfig:
    return load_recipe(arguments.recipe, arguments.overrides)


def _train(arguments: argparse.Namespace) -> int:
    if arguments.address:
        if arguments.address.startswith(("http://", "https://")):
            raise UserError(f"--address {arguments.address} is a dashboard: `gist-dist submit` sends a run there")
        arguments.overrides = [*arguments.overrides, f"cluster.address={arguments.address}"]
    config = _recipe(arguments)
    print(f"gist_dist {__version__}: {config.name} -> {config.run_dir}", file=sys.stderr, flush=True)
    from gist_dist.live import live_view
    from gist_dist.on_ray.driver import Stopped, train_and_evaluate

    try:
        with live_view(config.name, config.run_dir):
            summary = train_and_evaluate(config)
    except Stopped as stopped:
        print(f"gist-dist: {stopped}; the same command resumes", file=sys.stderr)
        return INTERRUPTED
    _say(["", *summary.lines()])
    return 1 if summary.num_failed else 0


def _plan(arguments: argparse.Namespace) -> int:
    config = _recipe(arguments)
    print(f"gist_dist {__version__}: planning {config.name}", file=sys.stderr, flush=True)
    from gist_dist.planning.cost_model import check_gpus, plan_lines

    if arguments.gpus is not None:
        check_gpus(arguments.gpus, arguments.gpu_kind)
    from gist_dist.live import live_view
    from gist_dist.models.precision import settled
    from gist_dist.on_ray.driver import prepare
    from gist_dist.planning.preview import preview

    config = settled(config.absolute_paths())
    with live_view(config.name):
        planned = preview(config, *prepare(config))
    _say(planned.lines())
    if arguments.gpus is not None:
        _say(plan_lines(planned, arguments.gpus, arguments.gpu_kind))
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    config = _recipe(arguments).absolute_paths()
    print(f"gist_dist {__version__}: inspecting {config.name}", file=sys.stderr, flush=True)
    from gist_dist.planning.inspect import check_inspect, inspect

    check_inspect(config, arguments.rows)
    from gist_dist.live import live_view
    from gist_dist.models.precision import settled
    from gist_dist.on_ray.driver import prepare
    from gist_dist.report.inspection import write_inspection

    with live_view(config.name):
        config = settled(config)
        inspected = inspect(config, *prepare(config, clustered=False), arguments.rows)
    page = arguments.out or Path(config.output_dir) / f"inspect-{config.name}.html"
    _say([*inspected.lines(), *write_inspection(inspected.contents, page)])
    return 0


def _render(arguments: argparse.Namespace) -> int:
    from gist_dist.planning.manifests import default_values, load_values, render

    if arguments.target == "values":
        text = default_values()
    elif arguments.recipe is None:
        raise UserError(f"cluster render {arguments.target}: name a recipe")
    else:
        text = render(arguments.target, _recipe(arguments), load_values(arguments.values))
    return _write(text, arguments.out, "--out")


def _schema(arguments: argparse.Namespace) -> int:
    return _write(recipe_schema(), arguments.output, "--output")


def _write(text: str, file: Path | None, option: str) -> int:
    """To standard output without a file."""
    if file is None:
        sys.stdout.write(text)
        return 0
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{option} {file}: can't be written: {error.strerror}") from None
    return 0


def _precompute(arguments: argparse.Namespace) -> int:
    config = _recipe(arguments)
    print(f"gist_dist {__version__}: guide embeddings for {config.name}", file=sys.stderr, flush=True)
    from gist_dist.live import live_view
    from gist_dist.on_ray.driver import precompute_only

    with live_view(config.name):
        lines = precompute_only(config)
    _say(lines)
    return 0


def _mine(arguments: argparse.Namespace) -> int:
    config = _recipe(arguments)
    print(
        f"gist_dist {__version__}: hard negatives for {config.name} -> {arguments.output}", file=sys.stderr, flush=True
    )
    from gist_dist.data.mining import MineOptions
    from gist_dist.live import live_view
    from gist_dist.on_ray.tasks.mine import mine

    options = {field.name: getattr(arguments, field.name) for field in fields(MineOptions)}
    with live_view(config.name):
        mined = mine(config, MineOptions(**options), arguments.output)
    _say(mined.lines())
    return 0


def _cotrain(arguments: argparse.Namespace) -> int:
    pair = [load_recipe(recipe, arguments.overrides) for recipe in (arguments.first, arguments.second)]
    names = " and ".join(config.name for config in pair)
    print(f"gist_dist {__version__}: {names}, {arguments.rounds} rounds", file=sys.stderr, flush=True)
    from gist_dist.live import live_view
    from gist_dist.on_ray.cotrain import cotrain
    from gist_dist.on_ray.driver import Stopped

    try:
        with live_view(names):
            rounds = cotrain(pair[0], pair[1], arguments.rounds, with_fixed=not arguments.no_fixed)
    except Stopped as stopped:
        print(f"gist-dist: {stopped}; the same command resumes", file=sys.stderr)
        return INTERRUPTED
    _say(rounds.lines())
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    parameters = {}
    for setting in arguments.set:
        name, _, value = setting.partition("=")
        try:
            parameters[name] = float(value)
        except ValueError:
            raise UserError(f"--set {setting}: NAME=NUMBER, such as t=0.3") from None
    from gist_dist.models.merge import METHODS, merge_models

    if arguments.method not in METHODS:
        raise UserError(f"--method {arguments.method}: one of {', '.join(METHODS)}")
    options = arguments.weights, arguments.base, parameters
    folder = merge_models(arguments.models, arguments.output.absolute(), arguments.method, *options)
    _say([f"model    {folder}", f"to compare it with its parts: gist-dist evaluate {folder} --tasks …"])
    return 0


def _sweep(arguments: argparse.Namespace) -> int:
    config = _recipe(arguments)
    from gist_dist.live import live_view
    from gist_dist.on_ray.driver import Stopped
    from gist_dist.on_ray.sweep import sweep
    from gist_dist.on_ray.sweep_plan import load_sweep

    over = load_sweep(arguments.over)
    print(f"gist_dist {__version__}: {config.name} over {over.name}", file=sys.stderr, flush=True)
    try:
        with live_view(over.name):
            swept = sweep(config, over)
    except Stopped as stopped:
        print(f"gist-dist: {stopped}; the same command resumes", file=sys.stderr)
        return INTERRUPTED
    _say(["", *swept.lines()])
    return 1 if swept.num_failed else 0


def _evaluate(arguments: argparse.Namespace) -> int:
    local_tasks = str(Path(arguments.local_tasks).absolute()) if arguments.local_tasks else None
    options = {"tasks": arguments.tasks, "local_tasks": local_tasks, "batch_size": arguments.batch_size}
    options |= {"task_timeout_minutes": arguments.task_timeout}
    options |= {"benchmark": arguments.benchmark, "languages": arguments.languages}
    evaluate = parse_section(EvaluateConfig, options, "gist-dist evaluate")
    if not evaluate.is_wanted:
        raise UserError("evaluate: nothing to score; name --tasks or a --benchmark")
    from gist_dist.live import live_view
    from gist_dist.on_ray.tasks.evaluation import evaluate_one_model

    output = Path(arguments.output).absolute()
    with live_view(arguments.model):
        failures = evaluate_one_model(arguments.model, evaluate, output, arguments.address)
    return 1 if failures else 0


def _report(arguments: argparse.Namespace) -> int:
    if arguments.out and len(arguments.run_dirs) == 1:
        raise UserError("--out is for a comparison; the report of one run is written in its folder")
    if len(arguments.run_dirs) > 1:
        from gist_dist.report.compare import compare_runs

        _say(compare_runs(arguments.run_dirs, arguments.out).lines())
        return 0
    from gist_dist.report import build_report

    _say(build_report(arguments.run_dirs[0].absolute()).lines())
    return 0


def _submit(arguments: argparse.Namespace) -> int:
    action = next((a for a in ("logs", "status", "stop", "resume") if getattr(arguments, a)), None)
    if (action is None) == (arguments.recipe is None):
        raise UserError("submit takes a recipe, or one of --logs, --status, --stop and --resume with a run's name")
    config = None if action else _recipe(arguments)
    known = [os.environ.get(name, "") for name in ADDRESS_VARIABLES]
    address = arguments.address or next((a for a in known if a.startswith("http")), None)
    if not address:
        raise UserError("--address is missing: the dashboard of the cluster, such as http://HEAD:8265")
    from gist_dist.on_ray.jobs import submit

    target = submit.Target(address, arguments.token_file, tuple(arguments.env))
    if config:
        print(f"gist_dist {__version__}: {config.name} -> {address}", file=sys.stderr, flush=True)
        return submit.submit(config, target, watch=not arguments.detach)
    assert action is not None
    if action == "resume":
        return submit.resume(arguments.resume, target, watch=not arguments.detach)
    return getattr(submit, action)(getattr(arguments, action), target)


def _doctor(arguments: argparse.Namespace) -> int:
    config = _recipe(arguments) if arguments.recipe else None
    if arguments.address and arguments.address.startswith(("http://", "https://")):
        from gist_dist.on_ray.jobs.submit import Target, submit_doctor

        return submit_doctor(config, arguments.output_dir, Target(arguments.address, arguments.token_file))
    from gist_dist.on_ray.doctor.examine import examine

    verdict = examine(arguments.address, config, arguments.output_dir)
    _say(verdict.lines())
    return 0 if verdict.healthy else 1


if __name__ == "__main__":
    sys.exit(main())
