"""What each node of a cluster has, and whether the nodes fit together: versions, storage, models, clocks."""

import logging
import time
import uuid
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gist_dist.common.errors import UserError
from gist_dist.common.storage import join, open_store
from gist_dist.common.text import one_line
from gist_dist.config import RunConfig
from gist_dist.on_ray.doctor.machine import MIN_FREE_GB, MIN_MEMORY_GB, MIN_SHM_GB, Finding, describe_node
from gist_dist.recipe import parse_config

logger = logging.getLogger(__name__)

START_S, LOAD_S = 60.0, 300.0
"""For a process to start on a node, and for a node to load the models or the data of a task."""
SEEN_S = 10
"""NFS shows other nodes what one has written after a few seconds."""
MAX_CLOCK_S = 1.0
PINGS = 9


class Node:
    """Runs on a node as an actor."""

    def describe(self, folders: list[str]) -> dict[str, Any]:
        return describe_node(folders)

    def now(self) -> float:
        return time.time()

    def write(self, place: str, name: str) -> str | None:
        """Why it can't, or None."""
        try:
            open_store(place).write_bytes(name, b"gist-dist doctor")
        except (OSError, UserError) as error:
            return f"can't write: {getattr(error, 'strerror', None) or error}"
        return None

    def missing(self, place: str, names: list[str]) -> list[str]:
        """Those of the names that are still not to be seen there after SEEN_S."""
        ended = time.monotonic() + SEEN_S
        while True:
            try:
                left = sorted(set(names) - set(open_store(place).infos()))
            except (OSError, UserError):
                left = names
            if not left or time.monotonic() > ended:
                return left
            time.sleep(0.5)

    def remove(self, place: str, folder: str) -> None:
        open_store(place).delete_folder(folder)

    def load(self, recipe: dict[str, Any], what: str) -> str | None:
        """Why a model or the tasks of a recipe can't be loaded, or None."""
        config = parse_config(recipe)
        try:
            LOADS[what](config)
        except Exception as error:  # whatever libraries raise about models and data
            return one_line(error)
        return None


def _load_student(config: RunConfig) -> None:
    from gist_dist.models.encoder import Student

    Student(config.student)


def _load_guide(config: RunConfig) -> None:
    from gist_dist.models.encoder import Guide

    Guide(config.guide_or_student)


def _load_tasks(config: RunConfig) -> None:
    """Where the Hub is out of reach, also their data, which then have to be on the node."""
    from gist_dist.common.hub import go_offline_if_unreachable
    from gist_dist.evaluation.suites import check_evaluation, expanded
    from gist_dist.evaluation.tasks import load_task

    check_evaluation(config.evaluate, config.watched)
    if go_offline_if_unreachable():
        for task in expanded(config.evaluate).tasks:
            try:
                load_task(task, config.evaluate.local_tasks).load_data()
            except Exception as error:
                raise UserError(f"{task}, without the Hub: {one_line(error, 200)}") from error


LOADS: dict[str, Callable[[RunConfig], None]] = {
    "student.model": _load_student,
    "guide.model": _load_guide,
    "evaluate.tasks": _load_tasks,
}
LOAD_REMEDIES = {
    "student.model": "put the model on storage that all nodes share, or bake it into their image",
    "guide.model": "put the model on storage that all nodes share, or bake it into their image",
    "evaluate.tasks": "put the data of tasks into a shared folder and set evaluate.local_tasks, or give nodes the Hub",
}


class Nodes:
    """The living nodes of the cluster that this process is connected to, with an actor on each."""

    def __init__(self) -> None:
        alive = [node for node in ray.nodes() if node["Alive"]]
        self.resources = {node["NodeID"]: node["Resources"] for node in alive}
        addresses = [node["NodeManagerAddress"] for node in alive]
        self.names = {
            node["NodeID"]: node["NodeManagerAddress"] + f"/{node['NodeID'][:6]}" * (addresses.count(address) > 1)
            for node, address in zip(alive, addresses, strict=True)
        }
        actor = ray.remote(num_cpus=0)(Node)
        self._actors: dict[str, Any] = {
            node: actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
            for node in self.names
        }
        self.findings: list[Finding] = []

    def examine(self, config: RunConfig | None, places: dict[str, str]) -> list[Finding]:
        """places: recipe key → path or URI that all nodes are to write and see."""
        local = sorted({place for place in places.values() if "://" not in place})
        described = self._ask("describe", START_S, local)
        self._each_node(described)
        here = describe_node([])
        self._versions(described, here)
        self._hub_caches(described, here, config)
        self._clocks({node: self._clock(node) for node in described})
        for key, place in places.items():
            self._storage(key, place, list(described))
        if config:
            self._loads(config, list(described))
        return self.findings

    def close(self) -> None:
        for actor in self._actors.values():
            ray.kill(actor)

    def _ask(self, method: str, timeout_s: float, *arguments: Any) -> dict[str, Any]:
        """Answers by node; a node that gives none is told of and left out from then on."""
        asked = {node: getattr(actor, method).remote(*arguments) for node, actor in self._actors.items()}
        ended, answers = time.monotonic() + timeout_s, {}
        for node, reference in asked.items():
            try:
                answers[node] = ray.get(reference, timeout=max(0.1, ended - time.monotonic()))
            except ray.exceptions.GetTimeoutError:
                self._lost(node, f"gave no answer within {timeout_s:g} s", "see its logs; it may be out of memory")
            except ray.exceptions.RayError as error:
                lines = str(error).strip().splitlines()
                reason = next((line for line in lines if "ModuleNotFoundError" in line), lines[-1])
                remedy = "install gist_dist there, or look at it through http://HEAD:8265, which takes it along"
                self._lost(node, f"can't run it: {reason.strip()[:300]}", remedy)
        return answers

    def _lost(self, node: str, found: str, remedy: str) -> None:
        del self._actors[node]
        self._add(f"node {self.names[node]}", "fail", found, remedy)

    def _add(self, name: str, state: Literal["ok", "warn", "fail"], found: str, remedy: str = "") -> None:
        self.findings.append(Finding(name, state, found, remedy))

    def _each_node(self, described: dict[str, dict[str, Any]]) -> None:
        for node, it in described.items():
            name, resources = f"node {self.names[node]}", self.resources[node]
            disks = ", ".join(f"{free:.0f} GB free in {folder}" for folder, free in it["disk_gb"].items())
            gpus = "; ".join(it["gpus"]) or "no GPU"
            found = f"{resources.get('CPU', 0):g} CPUs, {gpus}, {it['memory_gb']:.0f} GB memory free, {disks}"
            self._add(name, "ok", found)
            promised = int(resources.get("GPU", 0))
            if promised != len(it["gpus"]):
                text = f"Ray was told of {promised} GPUs and the driver shows {len(it['gpus'])}"
                self._add(name, "warn", text, "start ray with the right --num-gpus, or fix the driver")
            if it["memory_gb"] < MIN_MEMORY_GB:
                self._add(name, "warn", f"{it['memory_gb']:.1f} GB memory free", "a worker takes 1 to 2 GB and more")
            if it["shm_gb"] is not None and it["shm_gb"] < MIN_SHM_GB:
                text = f"{it['shm_gb']:.2f} GB in /dev/shm"
                self._add(name, "warn", text, "docker run --shm-size=4g, or a Memory emptyDir in Kubernetes")
            for folder, free in it["disk_gb"].items():
                if free < MIN_FREE_GB:
                    self._add(name, "warn", f"{free:.1f} GB free in {folder}", f"have {MIN_FREE_GB} GB there")

    def _versions(self, described: dict[str, dict[str, Any]], here: dict[str, Any]) -> None:
        """here: this process, which prepares what the nodes train."""
        shown = []
        prefixes = self._holders({node: it["prefix"] for node, it in described.items()}, here["prefix"])
        for package in here["versions"] if described else ():
            versions = {node: it["versions"][package] or "none" for node, it in described.items()}
            holders = self._holders(versions, here["versions"][package] or "none")
            if len(holders) > 1 or "none" in holders:
                found = _told(holders) + (f" (Python is in {_told(prefixes)})" if len(prefixes) > 1 else "")
                self._add(f"version of {package}", "fail", found, "install the same on every node: one image for all")
            else:
                shown.append(f"{package} {next(iter(holders))}")
        if shown:
            self._add("versions", "ok", f"equal here and on all nodes: {', '.join(shown)}")

    def _hub_caches(self, described: dict[str, dict[str, Any]], here: dict[str, Any], config: RunConfig | None) -> None:
        """Where they differ, each downloads models anew, or finds none where the Hub is out of reach."""
        given = config.cluster.runtime_env.get("env_vars", {}) if config else {}
        is_given = "HF_HOME" in given or "HF_HUB_CACHE" in given  # then the nodes are meant to differ from here
        own = {node: it["hub_cache"] for node, it in described.items()}
        holders = self._holders(own, None if is_given else here["hub_cache"])
        if len(holders) > 1:
            remedy = "set HF_HOME alike everywhere, or cluster.runtime_env: {env_vars: {HF_HOME: a shared folder}}"
            self._add("HF_HOME", "warn", f"models from the Hub are kept in {_told(holders)}", remedy)

    def _holders(self, values: dict[str, str], here: str | None) -> dict[str, list[str]]:
        """Value → who has it; here: this process's."""
        holders = defaultdict[str, list[str]](list)
        for node, value in values.items():
            holders[value].append(self.names[node])
        if here is not None and here not in holders:
            holders[here].append("here")
        return holders

    def _clock(self, node: str) -> float:
        """Seconds that it is ahead of this process's, by the fastest of several answers."""
        pings = []
        for _ in range(PINGS):
            before = time.time()
            theirs = self._one(node, "now")
            after = time.time()
            pings.append((after - before, theirs - (before + after) / 2))
        return min(pings)[1]

    def _clocks(self, offsets: dict[str, float]) -> None:
        if not offsets:
            return
        spread = max(offsets.values()) - min(offsets.values())
        worst = self.names[max(offsets, key=lambda node: abs(offsets[node]))]
        if spread > MAX_CLOCK_S:
            remedy = "run chrony or ntpd on every node; object storage refuses clocks that are far off"
            self._add("clocks", "warn", f"{spread:.1f} s apart, {worst} is furthest from here", remedy)
        else:
            self._add("clocks", "ok", f"within {1e3 * spread:.0f} ms")

    def _storage(self, key: str, place: str, nodes: list[str]) -> None:
        """Each node writes a file below the place, and then looks for those of all."""
        name = f".gist-dist-doctor-{uuid.uuid4().hex[:12]}"
        folder, problems, written = join(place, name), [], []
        try:
            for node in nodes:
                if refusal := self._one(node, "write", folder, node):
                    remedy = "mount it there, or fix its permissions"
                    problems.append((f"{self.names[node]} {refusal} in {place}", remedy))
                else:
                    written.append(node)
            for node in written:
                if unseen := self._one(node, "missing", folder, written):
                    others = _some([self.names[n] for n in unseen])
                    remedy = (
                        f"mount the same storage (NFS, …) at {place} on every node, or set {key} to s3://… or gs://…"
                    )
                    problems.append((f"{self.names[node]} does not see what {others} wrote in {place}", remedy))
        finally:
            for node in written:
                with suppress(Exception):  # gone with another node's; what was to be told is told
                    self._one(node, "remove", place, name)
        for found, remedy in problems:
            self._add(key, "fail", found, remedy)
        if not problems:
            who = f"all {len(nodes)} nodes write it and see each other's files" if len(nodes) > 1 else "is written"
            self._add(key, "ok", f"{place}: {who}")

    def _one(self, node: str, method: str, *arguments: Any) -> Any:
        return ray.get(getattr(self._actors[node], method).remote(*arguments), timeout=START_S)

    def _loads(self, config: RunConfig, nodes: list[str]) -> None:
        recipe = config.model_dump(mode="json")
        wanted = ["student.model"]
        if config.guide and config.guide.model:
            wanted.append("guide.model")
        if config.evaluate.is_wanted:
            wanted.append("evaluate.tasks")
        for what in wanted:
            started = time.monotonic()
            answers = self._ask("load", LOAD_S, recipe, what)
            problems = {node: problem for node, problem in answers.items() if problem}
            for node, problem in problems.items():
                self._add(what, "fail", f"on {self.names[node]}: {problem}", LOAD_REMEDIES[what])
            if not problems and answers:
                self._add(what, "ok", f"loads on every node ({time.monotonic() - started:.0f} s)")


def _told(holders: dict[str, list[str]]) -> str:
    return "; ".join(f"{value} {'' if names == ['here'] else 'on '}{_some(names)}" for value, names in holders.items())


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
