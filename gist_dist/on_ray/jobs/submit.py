"""`gist-dist submit`: the same run as a Ray job, from a machine that need not be part of the cluster."""

import json
import os
import shlex
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet
from ray.job_submission import JobDetails, JobStatus

from gist_dist.common.errors import UserError
from gist_dist.common.redact import printable, redact
from gist_dist.common.version import __version__
from gist_dist.config import RunConfig
from gist_dist.evaluation.suites import check_evaluation
from gist_dist.on_ray.cluster.capacity import check_room
from gist_dist.on_ray.doctor.machine import required_packages
from gist_dist.on_ray.jobs.client import (
    RECIPE_KEY,
    RUN_KEY,
    STOPPED_STATUS,
    VARIABLES_KEY,
    Client,
    Log,
    ask,
    connect,
    exit_status,
    follow,
    free_id,
    id_of,
    jobs_of,
    probe_cluster,
)
from gist_dist.on_ray.jobs.package import (
    RECIPE_NAME,
    LocalSource,
    asked_places,
    check_places,
    choose_sent,
    local_sources,
    pack,
    written_folders,
)
from gist_dist.recipe import parse_config

STOP_WAIT_S = 300
"""Between Ray's SIGTERM and its SIGKILL: time to end the step and write a checkpoint."""
MAX_KEPT_RECIPE = 32 * 1024
"""Characters of a recipe that a job is told, for --resume; it goes through environment variables of its processes."""
LAST_LINES = 3


@dataclass(frozen=True)
class Target:
    """Which cluster, and what of this machine a job may have."""

    address: str
    token_file: Path | None = None
    variables: tuple[str, ...] = ()
    """Names of environment variables that a job gets with the values that they have here."""

    def connect(self) -> Client:
        return connect(self.address, self.token_file)

    def environment(self) -> dict[str, str]:
        missing = [name for name in self.variables if name not in os.environ]
        if missing:
            raise UserError(f"--env {missing[0]}: there is no such variable here; set it, or leave it out")
        return {name: os.environ[name] for name in self.variables}

    def command(self, action: str, run: str) -> str:
        return f"gist-dist submit --{action} {run} --address {self.address}"


def submit(config: RunConfig, target: Target, watch: bool = True) -> int:
    """Check everything that can be checked from here, start the job and follow it. The exit status is the job's.

    UserError for whatever would end the job at its start, and while another job of this run is running.
    """
    local = _check_here(config)
    environment = target.environment() | {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
    client = target.connect()
    _refuse_second(client, config.name, target)
    sent = choose_sent(config, local, _look_there(client, config))
    with tempfile.TemporaryDirectory(prefix="gist-dist-job-") as folder:
        runtime_env = pack(config, sent, Path(folder)) | {"env_vars": environment}
        job = ask(
            client,
            lambda: client.submit_job(
                entrypoint=f"exec python -m gist_dist.cli train {RECIPE_NAME}",
                submission_id=free_id(client, config.name),
                runtime_env=runtime_env,
                metadata=_metadata(config, target.variables),
            ),
        )
    num_files = sum(len(source.files) for source in sent)
    taken = f", with {num_files} data file{'s' * (num_files > 1)} of this machine" if num_files else ""
    print(f"submitted as job {job}{taken}; results: {config.output_dir}/{config.name} on the cluster", flush=True)
    if not watch:
        print(f"follow it: {target.command('logs', config.name)}")
        return 0
    return _follow(client, config.name, job, target)


def _check_here(config: RunConfig) -> list[LocalSource]:
    """The recipe, its tasks and the data that are on this machine, which it gives."""
    check_places(config)
    local = local_sources(config)
    choose_sent(config, [source for source in local if not source.is_absolute], _as_if_all_there(config))
    if not config.evaluate.local_tasks or Path(config.evaluate.local_tasks).is_dir():
        check_evaluation(config.evaluate, config.watched)
    return local


def _look_there(client: Client, config: RunConfig) -> dict[str, list[int]]:
    """UserError for packages, room or writable folders that the cluster lacks; gives what it has of asked_places."""
    requirements = required_packages()
    folders = {key: folder for key, folder in written_folders(config).items() if "://" not in folder}
    places = asked_places(config)
    wanted = {"packages": list(requirements), "places": places, "folders": list(folders.values())}
    found = probe_cluster(client, wanted)
    _check_found(found, requirements, folders, client.get_address())
    check_room(config.cluster, found["nodes"], found["groups"])
    return {place: found["places"][place] for place in places}


def resume(run: str, target: Target, watch: bool = True) -> int:
    """Submit a run's last recipe again; it goes on from its last checkpoint."""
    kept = _latest(target.connect(), run).metadata or {}
    recipe, variables = kept.get(RECIPE_KEY), kept.get(VARIABLES_KEY, "").split()
    if not recipe:
        raise UserError(f"run '{run}': its job does not hold the recipe; submit that again, which resumes the run")
    target = replace(target, variables=tuple(dict.fromkeys([*variables, *target.variables])))
    return submit(parse_config(json.loads(recipe), f"the recipe of run '{run}'"), target, watch)


def submit_doctor(config: RunConfig | None, output_dir: str | None, target: Target) -> int:
    """`gist-dist doctor` as a job on the head of the cluster."""
    client = target.connect()
    command = ["python", "-m", "gist_dist.cli", "doctor", *([RECIPE_NAME] if config else [])]
    command += ["--output-dir", output_dir] if output_dir else []
    with tempfile.TemporaryDirectory(prefix="gist-dist-job-") as folder:
        runtime_env = pack(config, [], Path(folder)) | {"env_vars": target.environment()}
        job = ask(
            client,
            lambda: client.submit_job(
                entrypoint=f'exec {shlex.join(command)} --address "$RAY_ADDRESS"',
                submission_id=f"gist-dist-doctor-{uuid.uuid4().hex[:12]}",
                runtime_env=runtime_env,
            ),
        )
    details = follow(client, job)
    _tell_end(job, details)
    return exit_status(details)


def logs(run: str, target: Target) -> int:
    """Show the log of the newest job from its start, and follow it. The exit status is the job's."""
    client = target.connect()
    return _follow(client, run, id_of(_latest(client, run)), target)


def stop(run: str, target: Target) -> int:
    """Have the newest job end with a checkpoint, and wait for it."""
    client = target.connect()
    job = _latest(client, run)
    if job.status.is_terminal():
        print(f"job {job.submission_id} of run '{run}' is over: {job.status}")
        return 0
    log = Log()
    log.shown = len(ask(client, lambda: client.get_job_logs(id_of(job))))
    ask(client, lambda: client.stop_job(id_of(job)))
    print(f"stopping job {job.submission_id}: it ends its step and writes a checkpoint", flush=True)
    ended = follow(client, id_of(job), log)
    print(f"job {job.submission_id}: {ended.status}; resume it: {target.command('resume', run)}")
    return 0


def status(run: str, target: Target) -> int:
    """Print what has become of a run's jobs, and the end of the newest log."""
    client = target.connect()
    _latest(client, run)
    for job in jobs_of(client, run):
        print(f"{job.submission_id}  {job.status}  {_times(job)}{_code(job)}")
    log = ask(client, lambda: client.get_job_logs(id_of(job)))
    for line in log.splitlines()[-LAST_LINES:]:
        print(f"  {printable(line)}")
    return 0


def _as_if_all_there(config: RunConfig) -> dict[str, list[int]]:
    """What choose_sent() is told of a cluster before it is asked: then only what can't be there is its concern."""
    return {place: [1, 0] for place in asked_places(config)}


def _refuse_second(client: Client, run: str, target: Target) -> None:
    running = [job for job in jobs_of(client, run) if not job.status.is_terminal()]
    if running:
        raise UserError(
            f"run '{run}' is {str(running[-1].status).lower()} as job {running[-1].submission_id}; follow it with "
            f"`{target.command('logs', run)}`, or end it with --stop"
        )


def _check_found(
    found: dict[str, Any], requirements: dict[str, SpecifierSet], folders: dict[str, str], address: str
) -> None:
    for name, version in found["packages"].items():
        if version is None or not requirements[name].contains(version, prereleases=True):
            has = f"has {name} {version}" if version else f"lacks {name}"
            raise UserError(
                f"{address}: the cluster {has}, and gist_dist {__version__} needs {name}{requirements[name]}; use an "
                "image with gist_dist installed (gist-dist doctor --address tells all that is missing)"
            )
    for key, folder in folders.items():
        if refusal := found["folders"][folder]:
            raise UserError(f"{key} = {folder}: on the head of the cluster, {refusal}; choose shared storage with room")


def _metadata(config: RunConfig, variables: Sequence[str]) -> dict[str, str]:
    """The recipe is kept for --resume, unless it is long or holds a secret, which others could then read."""
    tree = config.model_dump(mode="json")
    recipe = json.dumps(tree)
    is_kept = len(recipe) <= MAX_KEPT_RECIPE and redact(tree) == tree
    kept = {RUN_KEY: config.name, VARIABLES_KEY: " ".join(variables), "gist_dist_version": __version__}
    return kept | ({RECIPE_KEY: recipe} if is_kept else {})


def _follow(client: Client, run: str, job: str, target: Target) -> int:
    try:
        details = follow(client, job)
    except KeyboardInterrupt:
        print(f"\ndetached; job {job} goes on. Follow it: {target.command('logs', run)}\nEnd it: ", end="")
        print(target.command("stop", run))
        return STOPPED_STATUS
    _tell_end(job, details)
    return exit_status(details)


def _tell_end(job: str, details: JobDetails) -> None:
    """What the log does not hold: that it is all, and why a driver was never started."""
    if details.status == JobStatus.FAILED and details.driver_exit_code is None:
        print(f"job {job} failed: {' '.join((details.message or 'no reason given').split())[-1000:]}")
    print(f"job {job}: {details.status}")


def _latest(client: Client, run: str) -> JobDetails:
    jobs = jobs_of(client, run)
    if not jobs:
        raise UserError(f"{client.get_address()}: no job of a run '{run}' was submitted there since it was started")
    return jobs[-1]


def _times(job: JobDetails) -> str:
    started, ended = (t and datetime.fromtimestamp(t / 1000) for t in (job.start_time, job.end_time))
    text = f"submitted {started:%Y-%m-%d %H:%M:%S}" if started else ""
    return f"{text}, ended {ended:%Y-%m-%d %H:%M:%S}" if ended else text


def _code(job: JobDetails) -> str:
    return f", exit status {job.driver_exit_code}" if job.driver_exit_code is not None else ""
