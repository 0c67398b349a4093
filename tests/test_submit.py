"""`gist-dist submit` against a real head on loopback, from processes that are not part of its cluster."""

import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from facts import assert_tells
from ray.job_submission import JobStatus
from ray_head import Head, plain_environment, ray_head
from tiny import recipe, save_tiny_model, words, write_jsonl

from gist_dist import cli
from gist_dist.common.errors import UserError
from gist_dist.config import ClusterConfig
from gist_dist.on_ray.cluster.capacity import check_room
from gist_dist.on_ray.doctor.machine import required_packages
from gist_dist.on_ray.jobs import client as jobs
from gist_dist.on_ray.jobs import package, submit
from gist_dist.on_ray.jobs.client import Log, connect, exit_status, follow, free_id, jobs_of
from gist_dist.recipe import load_recipe, parse_config
from gist_dist.runs.metrics_file import read_metrics

pytestmark = pytest.mark.ray

STEPS = 4000


@pytest.fixture(scope="module")
def head():
    with ray_head() as head:
        yield head


@pytest.fixture(scope="module")
def client(head):
    return connect(head.address, head.token_file)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A user's folder: a recipe, its data beside it, a model that the cluster sees too."""
    import random

    random.seed(5)
    folder = tmp_path_factory.mktemp("laptop")
    save_tiny_model(folder / "model")
    (folder / "data").mkdir()
    rows = [{"anchor": words(random, 2, 6), "positive": words(random, 2, 8)} for _ in range(64)]
    write_jsonl(folder / "data" / "pairs.jsonl", rows)
    tree = recipe(
        folder / "runs", folder / "model", None, Path("data/pairs.jsonl"),
        name="mine", batch={"global_size": 16}, optim={"steps": STEPS, "learning_rate": 1e-3},
        checkpoint={"every_steps": 100000}, cluster={"num_workers": 1},
    )  # fmt: skip
    (folder / "mine.yaml").write_text(yaml.safe_dump(tree))
    return folder


def gist_dist(head: Head, place: Path, *arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-u", "-m", "gist_dist.cli", "submit", *arguments]
    command += ["--address", head.address, "--token-file", str(head.token_file)]
    return subprocess.Popen(
        command,
        cwd=place,
        env=plain_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def said(process: subprocess.Popen, text: str, timeout_s: float = 200) -> str:
    """What the process says until it has said the text."""
    deadline, lines = time.monotonic() + timeout_s, []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
        assert time.monotonic() < deadline, "".join(lines)
    raise AssertionError(f"ended with {process.wait()} and without '{text}':\n{''.join(lines)}")


def test_a_run_is_followed_detached_from_found_again_and_stopped(head, client, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    target = submit.Target(head.address, head.token_file)
    shown = run_until_stopped(head, client, place, "mine")
    capsys.readouterr()
    assert submit.stop("mine", target) == 0
    assert "job mine of run 'mine' is over: STOPPED" in capsys.readouterr().out
    assert submit.status("mine", target) == 0
    told = capsys.readouterr().out
    assert told.startswith("mine  STOPPED  ") and head.token not in shown + told


def test_resuming_takes_the_recipe_of_the_newest_job(head, client, place):
    """And goes through all checks with it. A run that is really resumed takes a minute: below."""
    target, tree = submit.Target(head.address, head.token_file), load_recipe(str(place / "mine.yaml"), ["name=gone"])
    kept = json.dumps(tree.model_dump(mode="json") | {"data": {"sources": [{"path": "/gone.jsonl"}]}})
    job = client.submit_job(entrypoint="true", metadata={jobs.RUN_KEY: "gone", jobs.RECIPE_KEY: kept})
    while not client.get_job_status(job).is_terminal():
        time.sleep(0.1)
    with pytest.raises(UserError, match=r"/gone\.jsonl is neither here nor on the head"):
        submit.resume("gone", target)
    client.submit_job(entrypoint="true", metadata={jobs.RUN_KEY: "gone"})
    with pytest.raises(UserError, match="recipe; submit that again"):
        submit.resume("gone", target)


@pytest.mark.slow
def test_a_stopped_run_is_resumed_and_does_each_step_once(head, client, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    run_until_stopped(head, client, place, "again")
    (checkpoint,) = (place / "runs" / "again" / "checkpoints").glob("step-*")
    stopped_at = int(checkpoint.name.removeprefix("step-"))
    assert 0 < stopped_at < STEPS
    capsys.readouterr()

    target = submit.Target(head.address, head.token_file)
    assert submit.resume("again", target) == 0
    log = capsys.readouterr().out
    assert "submitted as job again-2, with 1 data file of this machine" in log and "job again-2: SUCCEEDED" in log
    recipes = [json.loads(job.metadata[jobs.RECIPE_KEY]) for job in jobs_of(client, "again")]
    assert recipes[0] == recipes[1] == load_recipe("mine.yaml", ["name=again"]).model_dump(mode="json")
    assert submit.status("again", target) == 0
    told = capsys.readouterr().out
    assert re.search(r"^again  STOPPED  .*\nagain-2  SUCCEEDED  ", told), told
    assert f"resuming after step {stopped_at}" in log and log.count(f"step {STEPS}/{STEPS}") == 1
    lines = read_metrics(place / "runs" / "again" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert (place / "runs" / "again" / "model" / "model.safetensors").exists()


def run_until_stopped(head: Head, client, place: Path, run: str) -> str:
    """Submit, kill the follower, look again, detach, stop; gives what was shown."""
    target = submit.Target(head.address, head.token_file)
    first = gist_dist(head, place, "mine.yaml", f"name={run}")
    shown = said(first, "loading models")
    assert f"submitted as job {run}, with 1 data file of this machine" in shown
    first.send_signal(signal.SIGKILL)
    first.wait()

    with pytest.raises(
        UserError, match=f"run '{run}' is running as job {run}; follow it with `gist-dist submit --logs"
    ):
        submit.submit(load_recipe("mine.yaml", [f"name={run}"]), target)

    reattached = gist_dist(head, place, "--logs", run)
    shown += said(reattached, "step 1/")
    assert f"Running entrypoint for job {run}: exec python -m gist_dist.cli train recipe.yaml" in shown
    reattached.send_signal(signal.SIGINT)
    detached = reattached.communicate(timeout=30)[0]
    assert f"detached; job {run} goes on. Follow it: gist-dist submit --logs {run} --address {head.address}" in detached
    assert reattached.returncode == 130
    assert client.get_job_status(run) == JobStatus.RUNNING

    assert submit.stop(run, target) == 0
    assert client.get_job_status(run) == JobStatus.STOPPED
    assert list((place / "runs" / run / "checkpoints").glob("step-*/COMMIT.json"))
    assert not (place / "runs" / run / "model").exists()
    return shown + detached


@pytest.mark.slow
def test_the_same_recipe_gives_the_same_losses_through_train_and_submit(head, place):
    short = ["optim.steps=20", "checkpoint.every_steps=10"]
    job = gist_dist(head, place, "mine.yaml", "name=submitted", *short)
    log = job.communicate(timeout=300)[0]
    assert job.returncode == 0, log
    command = [sys.executable, "-m", "gist_dist.cli", "train", "mine.yaml", "name=trained", *short]
    subprocess.run(command, cwd=place, env=plain_environment(), check=True, capture_output=True, timeout=300)
    submitted, trained = (read_metrics(place / "runs" / name / "metrics.jsonl") for name in ("submitted", "trained"))
    assert [line["loss"] for line in submitted] == [line["loss"] for line in trained]
    assert len(trained) == 20 and trained[-1]["loss"] < trained[0]["loss"]


# --------------------------------------------------------------------------------- refused before anything is sent


REFUSED_HERE = [
    ("optim.learnin_rate=0.1", r"unknown key 'optim.learnin_rate'; did you mean 'learning_rate'\?"),
    ("data.sources.0.columns.positive=answer", r"data\.sources\[0\]: column 'answer' not in pairs\.jsonl"),
    ("data.sources.0.path=data/none.jsonl", r"data\.sources\[0\]: no file or folder data/none\.jsonl"),
    ("evaluate.tasks=[STSBenchmrk]", r"STSBenchmrk"),
    ("output_dir=runs", r"output_dir = runs: a job's own folder goes with the job; set output_dir to an absolute"),
    ("student.model=model", r"student\.model = model is a folder of this machine, and only data files are sent"),
    ("cluster.runtime_env={{working_dir: .}}", r"cluster\.runtime_env: working_dir is what submit sends the code with"),
]
REFUSED_THERE = [
    ("data.sources.0.path=/none.jsonl", r"data\.sources\[0\]: /none\.jsonl is neither here nor on the head"),
    (
        "output_dir={place}/mine.yaml/runs",
        r"output_dir = .*: on the head of the cluster, .*/mine\.yaml can't be written",
    ),
    ("student.model=/none", r"student\.model = /none is not on the head of the cluster"),
    ("cluster.num_workers=9", r"cluster\.num_workers = 9 with cpus_per_worker = 0\.5: the cluster has room for 4 "),
    ("cluster.gpus_per_worker=1", r"gpus_per_worker = 1: the cluster has room for 0 \(1 node with 2 CPUs\); ask"),
]


def refusal(place: Path, target: submit.Target, change: str) -> str:
    with pytest.raises(UserError) as error:
        submit.submit(load_recipe("mine.yaml", ["name=refused", change.format(place=place)]), target)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("change, sentence", REFUSED_HERE)
def test_a_mistake_in_the_recipe_is_told_before_the_cluster_is_asked(place, change, sentence, monkeypatch):
    monkeypatch.chdir(place)
    assert re.search(sentence, refusal(place, submit.Target("http://127.0.0.1:1"), change))


@pytest.mark.parametrize("change, sentence", REFUSED_THERE)
def test_what_the_cluster_lacks_is_told_before_anything_is_sent(
    head, client, place, seen, change, sentence, monkeypatch
):
    monkeypatch.chdir(place)
    monkeypatch.setattr(submit, "probe_cluster", lambda *_: seen)
    assert re.search(sentence, refusal(place, submit.Target(head.address, head.token_file), change))
    assert not jobs_of(client, "refused")


@pytest.fixture(scope="module")
def seen(client, place) -> dict:
    """What one look at the cluster finds of everything that REFUSED_THERE asks for."""
    runs, model = place / "runs", place / "model"
    wanted = {
        "packages": list(required_packages()),
        "places": ["/none.jsonl", "/none", str(model)],
        "folders": [str(runs), f"{place}/mine.yaml/runs"],
    }
    found = jobs.probe_cluster(client, wanted)
    assert found["packages"]["torch"] and found["nodes"][0]["CPU"] == 2 and found["groups"] == []
    assert found["places"][str(model)][0] > 3 and found["folders"][str(runs)] is None
    return found


def test_a_folder_that_is_too_large_is_named_with_its_files_before_any_contact(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(package, "MAX_DATA_BYTES", 2**20)
    (tmp_path / "pairs").mkdir()
    row = {"anchor": "river", "positive": "engine " * 100}
    for name, rows in (("a", 900), ("b", 1500), ("c", 10)):
        write_jsonl(tmp_path / "pairs" / f"{name}.jsonl", [row] * rows)
    config = parse_config(recipe(tmp_path, Path("some/model"), None, Path("pairs")))
    with pytest.raises(UserError) as refusal:
        submit.submit(config, submit.Target("http://127.0.0.1:1"))
    assert re.search(
        r"data\.sources\[0\]: .*/pairs has 1\.\d MiB \(b\.jsonl 1\.\d MiB, a\.jsonl 0\.6 MiB, c\.jsonl 0\.0 MiB\), "
        r"and a job takes along at most 1\.0 MiB; put it on storage that all nodes of the cluster share .* and set "
        r"data\.sources\[0\]\.path to its place there",
        str(refusal.value),
    ), refusal.value


def test_a_head_that_is_dead_or_stopped_is_told_within_seconds(monkeypatch):
    assert jobs.CONNECT_S + jobs.ANSWER_S < 15
    (port,) = [s.getsockname()[1] for s in [socket.create_server(("127.0.0.1", 0))]]  # closed at once: refuses
    monkeypatch.setattr(jobs, "ANSWER_S", 1)
    with pytest.raises(UserError, match=rf"127\.0\.0\.1:{port} can't be reached; see that the head"):
        connect(f"http://127.0.0.1:{port}")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(UserError, match="does not answer; see that the head"):
            connect(f"http://127.0.0.1:{silent.getsockname()[1]}")
    with pytest.raises(UserError, match=r"dashboard.* give http://HEAD:8265"):
        connect("ray://127.0.0.1:10001")


def test_without_the_token_nothing_is_told_and_the_token_is_never_shown(head, tmp_path):
    (tmp_path / "wrong").write_text("0" * 64)
    # Which of the two: another test's Ray in this process may have left its own token.
    with pytest.raises(UserError, match=r"token.* RAY_AUTH_MODE=token .*RAY_AUTH_TOKEN"):
        connect(head.address)
    with pytest.raises(UserError, match="does not accept the token") as refusal:
        connect(head.address, tmp_path / "wrong")
    assert "000000" not in str(refusal.value)
    with pytest.raises(UserError, match=r"--token-file .*none can't be read"):
        connect(head.address, tmp_path / "none")


def test_room_is_counted_by_node_and_with_what_an_autoscaler_may_add():
    def needs(num_workers, gpus=0.0):
        return ClusterConfig(num_workers=num_workers, cpus_per_worker=4.0, gpus_per_worker=gpus)

    check_room(needs(2), [{"CPU": 4.0}, {"CPU": 7.0}], [])
    with pytest.raises(UserError, match=r"num_workers = 2 .* room for 1 \(2 nodes with 3 CPUs, 1 node with 4 CPUs\)"):
        check_room(needs(2), [{"CPU": 3.0}, {"CPU": 3.0}, {"CPU": 4.0}], [])
    pool = {"most": 3, "resources": {"CPU": 8.0, "GPU": 1.0}}
    check_room(needs(3, gpus=1.0), [{"CPU": 0.0}], [pool])
    with pytest.raises(UserError, match=r"room for 3 \(1 node with 0 CPUs, and grows no further\)"):
        check_room(needs(4, gpus=1.0), [{"CPU": 0.0}], [pool])
    check_room(needs(400, gpus=1.0), [{"CPU": 0.0}], [pool | {"most": -1}])


# ------------------------------------------------------------------------------------------------ what is taken along


@pytest.mark.parametrize(
    "path, root, expected, files",
    [
        ("data/pairs.jsonl", None, "data/pairs.jsonl", ["data/pairs.jsonl"]),
        ("data", None, "data", ["data/pairs.jsonl", "data/more.jsonl"]),
        ("da*/*.jsonl", None, "da*/*.jsonl", ["data/pairs.jsonl", "data/more.jsonl"]),
        ("../here/data/*.jsonl", None, "sent/0/*.jsonl", ["sent/0/pairs.jsonl", "sent/0/more.jsonl"]),
        ("{here}/data", None, "sent/0/data", ["sent/0/data/pairs.jsonl", "sent/0/data/more.jsonl"]),
        ("pairs.jsonl", "{here}/data", "pairs.jsonl", ["data-root/pairs.jsonl"]),
    ],
)  # fmt: skip
def test_data_go_along_under_a_path_that_finds_the_same_files(tmp_path, monkeypatch, path, root, expected, files):
    here = tmp_path / "here"
    (here / "data").mkdir(parents=True)
    for name in ("pairs", "more"):
        write_jsonl(here / "data" / f"{name}.jsonl", [{"anchor": "a", "positive": name}])
    (here / "data" / "notes.txt").write_text("not data")
    monkeypatch.chdir(here)
    tree = recipe(tmp_path / "runs", Path("some/model"), None, Path(path.format(here=here)))
    tree["data"]["root"] = root and root.format(here=here)
    config = parse_config(tree)
    local = package.local_sources(config)
    sent = package.choose_sent(config, local, {place: [0, 0] for place in package.asked_places(config)})
    (tmp_path / "job").mkdir()
    environment = package.pack(config, sent, tmp_path / "job")
    work = Path(environment["working_dir"])
    job = load_recipe(str(work / package.RECIPE_NAME))
    assert job.data.sources[0].path == expected
    assert sorted(str(f.relative_to(work)) for f in work.rglob("*.jsonl")) == sorted(files)
    monkeypatch.chdir(work)
    assert sum(len(source.files) for source in package.local_sources(job)) == len(files)
    assert not list(work.rglob("notes.txt"))
    assert (Path(environment["py_modules"][0]) / "cli.py").exists()


def test_data_that_the_cluster_has_too_stay_where_they_are(tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", [{"anchor": "a", "positive": "b"}])
    config = parse_config(recipe(tmp_path, Path("some/model"), None, path))
    local = package.local_sources(config)
    assert package.choose_sent(config, local, {str(path): [1, path.stat().st_size]}) == []
    assert package.choose_sent(config, local, {str(path): [1, 5]}) == local  # another file of that name


def test_named_variables_reach_the_job_and_no_other_does(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz")
    monkeypatch.setenv("OTHER", "x")
    assert submit.Target("", variables=("HF_TOKEN",)).environment() == {"HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyz"}
    with pytest.raises(UserError, match="--env ABSENT: there is no such variable here"):
        submit.Target("", variables=("ABSENT",)).environment()


def test_a_recipe_with_a_secret_is_not_left_with_the_cluster():
    tree = recipe(Path("/runs"), Path("some/model"), None, Path("/pairs.jsonl"))
    assert json.loads(submit._metadata(parse_config(tree), [])[jobs.RECIPE_KEY])["name"] == "tiny"
    tree["cluster"] = {"runtime_env": {"env_vars": {"HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyz"}}}
    metadata = submit._metadata(parse_config(tree), [])
    assert jobs.RECIPE_KEY not in metadata and metadata[jobs.RUN_KEY] == "tiny"


# ------------------------------------------------------------------------------------------------- following a job


def test_no_line_is_lost_or_doubled_when_connections_break(head, monkeypatch):
    """Through a relay that cuts every connection after a while, and refuses them for a while in the middle."""
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.2)))
    with Relay(head.dashboard_port) as relay:
        client = connect(f"http://127.0.0.1:{relay.port}", head.token_file)
        script = "import sys,time\nfor i in range(150): print('line', i); time.sleep(0.02)\nsys.exit(7)"
        job = client.submit_job(entrypoint=f'exec python -c "{script}"', submission_id="chatty")
        out = io.StringIO()
        relay.lifetime_s = 0.5
        details = follow(client, job, Log(out.write))
    assert relay.num_cut >= 3
    numbers = [int(n) for n in re.findall(r"^line (\d+)$", out.getvalue(), re.MULTILINE)]
    assert numbers == list(range(150))
    assert details.status == JobStatus.FAILED and exit_status(details) == 7


def test_a_run_keeps_its_name_over_several_jobs(client):
    for number in range(2):
        job = free_id(client, "sleepy")
        assert job == ("sleepy", "sleepy-2")[number]
        client.submit_job(entrypoint="true", submission_id=job, metadata={jobs.RUN_KEY: "sleepy"})
    assert [job.submission_id for job in jobs_of(client, "sleepy")] == ["sleepy", "sleepy-2"]
    assert jobs_of(client, "sleepy-2") == []


class Relay:
    """Passes bytes on to a port of this machine, and cuts each connection after lifetime_s."""

    def __init__(self, target: int) -> None:
        self.target, self.lifetime_s, self.num_cut = target, 3600.0, 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]

    def __enter__(self) -> "Relay":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self.target))
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()
            threading.Timer(self.lifetime_s, self._cut, (near, far)).start() if self.lifetime_s < 60 else None

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for each in (source, sink):
                each.close()

    def _cut(self, *sockets: socket.socket) -> None:
        for each in sockets:
            try:
                each.shutdown(socket.SHUT_RDWR)
                self.num_cut += 1
            except OSError:
                pass


# ----------------------------------------------------------------------------------------------- the command line


def test_overrides_may_stand_behind_options():
    arguments = cli._parse(["submit", "my.yaml", "seed=1", "--address", "http://head:8265", "optim.steps=3"])
    assert arguments.recipe == "my.yaml" and arguments.overrides == ["seed=1", "optim.steps=3"]
    with pytest.raises(SystemExit):
        cli._parse(["submit", "my.yaml", "--adress", "http://head:8265"])
    with pytest.raises(SystemExit):
        cli._parse(["report", "runs/my", "--out", "page.html", "-x"])


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (
            ["train", "quickstart", "--address", "http://head:8265"],
            "http://head:8265 … dashboard … gist-dist submit",
        ),
        (["submit", "quickstart"], "--address … dashboard … http://HEAD:8265"),
        (["submit"], "submit … recipe … --logs, --status, --stop … --resume"),
        (["submit", "quickstart", "--logs", "my"], "submit … recipe … --logs"),
    ],
)
def test_a_command_that_makes_no_sense_is_one_sentence(arguments, sentence, capsys, monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert cli.main(arguments) == 1
    assert_tells(capsys.readouterr().err, sentence)


def test_train_with_an_address_is_a_driver_on_that_cluster(monkeypatch):
    asked = []
    monkeypatch.setattr("gist_dist.on_ray.driver.train_and_evaluate", asked.append)
    with pytest.raises(AttributeError):  # nothing was trained, so there is no summary
        cli.main(["train", "quickstart", "--address", "head:6379"])
    assert asked[0].cluster.address == "head:6379"
