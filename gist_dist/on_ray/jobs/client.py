"""Ray jobs seen from outside the cluster, over HTTP: a client whose requests end, a log followed through breaks."""

import asyncio
import json
import logging
import os
import shlex
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import requests
from aiohttp import ClientError
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from gist_dist.common.errors import UserError
from gist_dist.common.text import one_line
from gist_dist.on_ray.jobs import probe

logger = logging.getLogger(__name__)
T = TypeVar("T")

CONNECT_S, ANSWER_S, UPLOAD_S = 5, 8, 60
"""How long to wait for a connection, for an answer, and for the answer to what changes something."""
SILENCE_S = 60
"""A log that says nothing for so long may be a connection that is dead without anybody saying so."""
PATIENCE_S = 600
"""How long a head may be away before this command stops following a job; the job itself goes on."""
PROBE_S = 120
STOPPED_STATUS = 130
RUN_KEY, RECIPE_KEY, VARIABLES_KEY = "gist_dist_run", "gist_dist_recipe", "gist_dist_variables"
"""In the metadata of a job."""

for _module in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging"):
    logging.getLogger(f"ray.{_module}").setLevel(logging.WARNING)  # they tell every step of an upload


class Client(JobSubmissionClient):
    """Ray's, with a limit to each request: without one, a head that is stopped is waited for without end."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        limits = (CONNECT_S, ANSWER_S if method == "GET" else UPLOAD_S)
        return super()._do_request(method, endpoint, **{"timeout": limits} | options)


def connect(address: str, token_file: Path | None = None) -> Client:
    """The cluster whose dashboard is at an http(s) address. UserError within seconds if it does not answer.

    The token is that of the file, or else what Ray finds (RAY_AUTH_MODE=token with RAY_AUTH_TOKEN or
    RAY_AUTH_TOKEN_PATH); it goes into a header and nowhere else.
    """
    if "://" not in address:
        address = f"http://{address}"
    if not address.startswith(("http://", "https://")):
        raise UserError(f"--address {address}: jobs are sent to a dashboard; give http://HEAD:8265")
    headers = {"Authorization": f"Bearer {_read_token(token_file)}"} if token_file else None
    with _explained(address), _without_addresses():
        return Client(address, headers=headers)


def _read_token(path: Path) -> str:
    try:
        token = path.expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--token-file {path} can't be read: {getattr(error, 'strerror', None) or error}") from None
    if not token or any(c.isspace() for c in token):
        raise UserError(f"--token-file {path}: it should hold one token and nothing else")
    return token


@contextmanager
def _without_addresses() -> Iterator[None]:
    """Ray's client prefers them to the address that it is given."""
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    found = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(found)


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """What Ray's client raises, as one sentence."""
    try:
        yield
    except AuthenticationError as error:
        was_sent = "Authentication failed" in str(error)
        raise UserError(
            f"{address} {'does not accept the token' if was_sent else 'asks for a token'}; set RAY_AUTH_MODE=token "
            "and RAY_AUTH_TOKEN, or give --token-file FILE"
        ) from None
    except (ConnectionError, requests.exceptions.ConnectionError, requests.exceptions.Timeout) as error:
        reason = "does not answer" if isinstance(error, requests.exceptions.Timeout) else "can't be reached"
        raise UserError(
            f"{address} {reason}; see that the head of the cluster runs with its dashboard and that its port is open "
            f"from here (ssh -L 8265:localhost:8265 HEAD, or kubectl port-forward){_by_proxy(address)}"
        ) from error
    except requests.exceptions.RequestException as error:  # HTML in place of JSON, a proxy's error
        said = f"{address} answers, but not as a Ray dashboard does: {one_line(error)}{_by_proxy(address)}"
        raise UserError(said) from error
    except (RuntimeError, ValueError) as error:  # some hold the traceback of the dashboard
        said = one_line(str(error).strip().splitlines()[-1])
        raise UserError(f"{address}: {said}{_by_proxy(address)}") from error


def _by_proxy(address: str) -> str:
    """What to set where the environment sends a request by way of a proxy; else empty."""
    found = requests.utils.get_environ_proxies(address)
    scheme, host = urlsplit(address).scheme, urlsplit(address).hostname
    if not found.get(scheme) and not found.get("all"):
        return ""
    return f"; {scheme}_proxy is set in the environment: add {host} to no_proxy if it is not behind the proxy"


def ask(client: Client, question: Callable[[], T]) -> T:
    """A request to the cluster, with its failures as UserError."""
    with _explained(client.get_address()):
        return question()


# ---------------------------------------------------------------------------------------------- a log and its job


def _print(text: str) -> None:
    print(text, end="", flush=True)


class Log:
    """A text that is read from its start again and again, of which each character is shown once."""

    def __init__(self, out: Callable[[str], object] = _print) -> None:
        self.shown = 0
        self._out = out

    def show(self, text: str, position: int = 0) -> int:
        """Text that begins at a position of the log; gives the position of its end."""
        end = position + len(text)
        if end > self.shown:
            self._out(text[max(0, self.shown - position) :])
            self.shown = end
        return end


def follow(client: Client, job: str, log: Log | None = None) -> JobDetails:
    """Show the log of a job until the job is over; its status is the truth, as a log may end at any time.

    The status is asked for before each reading: what is read after the end of a job is all there is. UserError if the
    head is away for PATIENCE_S.
    """
    log = log or Log()
    while True:
        details = _patiently(client, lambda: client.get_job_info(job))
        try:
            asyncio.run(_read(client, job, log))
        except (ClientError, RuntimeError, OSError):
            with suppress(RuntimeError, OSError):  # requests' errors are OSErrors
                log.show(client.get_job_logs(job))
        if details.status.is_terminal():
            return details
        time.sleep(1)


async def _read(client: Client, job: str, log: Log) -> None:
    """Until the log ends or is silent. The cluster sends it from its start."""
    position = 0
    lines = cast(AsyncGenerator[str, None], client.tail_job_logs(job))  # which it is, and must be closed as one
    async with aclosing(lines) as stream:
        with suppress(StopAsyncIteration, TimeoutError):
            while True:
                position = log.show(await asyncio.wait_for(anext(stream), SILENCE_S), position)


def _patiently(client: Client, question: Callable[[], T]) -> T:
    """Asked again while the head is away."""
    since = None
    while True:
        try:
            return question()
        except (ConnectionError, requests.exceptions.RequestException) as error:
            since = since or _now_away(client)
            if time.monotonic() - since > PATIENCE_S:
                away = f"{client.get_address()} has not answered for {PATIENCE_S // 60} minutes"
                raise UserError(f"{away}; the job may go on: follow it with --logs once the head is back") from error
            time.sleep(2)
        except (RuntimeError, AuthenticationError):
            return ask(client, question)


def _now_away(client: Client) -> float:
    logger.warning("%s does not answer; the job goes on, and the question is repeated", client.get_address())
    return time.monotonic()


def exit_status(details: JobDetails) -> int:
    """The job driver's exit status; 1 where it never had one, 130 where it was stopped."""
    if details.status == JobStatus.SUCCEEDED:
        return 0
    return STOPPED_STATUS if details.status == JobStatus.STOPPED else details.driver_exit_code or 1


def jobs_of(client: Client, run: str) -> list[JobDetails]:
    """All jobs that were submitted for a run, the newest last."""
    jobs = [job for job in ask(client, client.list_jobs) if (job.metadata or {}).get(RUN_KEY) == run]
    return sorted(jobs, key=lambda job: job.start_time or 0)


def id_of(job: JobDetails) -> str:
    """The id of one of jobs_of(); only what was not submitted has none."""
    assert job.submission_id is not None
    return job.submission_id


def free_id(client: Client, run: str) -> str:
    """The run's name, or with -2, -3, … where that was used: Ray takes an id once."""
    used = {job.submission_id for job in ask(client, client.list_jobs)}
    number, candidate = 1, run
    while candidate in used:
        number += 1
        candidate = f"{run}-{number}"
    return candidate


# ------------------------------------------------------------------------------------------------------ the probe


def probe_cluster(client: Client, wanted: dict[str, list[str]]) -> dict[str, Any]:
    """What probe.look() finds, by a job of a second or two.

    It stays in the cluster's list: deleted at once, Ray would put it there again as one that died.
    """
    source = Path(probe.__file__).read_text(encoding="utf-8")
    command = f"exec python -c {shlex.quote(source)} {shlex.quote(json.dumps(wanted))}"
    job = f"gist-dist-look-{uuid.uuid4().hex[:12]}"
    ask(client, lambda: client.submit_job(entrypoint=command, submission_id=job))
    ended = time.monotonic() + PROBE_S
    while not ask(client, lambda: client.get_job_status(job)).is_terminal():
        if time.monotonic() > ended:
            ask(client, lambda: client.stop_job(job))
            raise UserError(f"{client.get_address()}: the cluster started no job in {PROBE_S} s; see its dashboard")
        time.sleep(0.2)
    log = ask(client, lambda: client.get_job_logs(job))
    found = [line for line in log.splitlines() if line.startswith(probe.MARK)]
    if not found:
        message = ask(client, lambda: client.get_job_info(job)).message
        last = log.strip().splitlines()[-1:] or [message or "no reason given"]
        raise UserError(f"{client.get_address()}: a job can't run there: {one_line(last[0])}")
    return json.loads(found[0].removeprefix(probe.MARK))
