"""`gist-dist cluster render`: a recipe as a manifest for KubeRay, Slurm, or `ray up` on AWS or Google Cloud.

What is not in the recipe (images, machines, storage, spot) comes from values: templates/cluster/values.yaml, and over
it a file of the user's. Costs neither torch nor ray.
"""

import json
import math
import re
import shlex
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import Field, ValidationError

from gist_dist.common.errors import UserError
from gist_dist.common.plain_yaml import load_plain
from gist_dist.common.redact import printable
from gist_dist.config import RunConfig, Section
from gist_dist.planning.cost_model import host_memory
from gist_dist.planning.model_shape import model_shape

TARGETS = {
    "kuberay": "a RayJob with its storage claim: Kubernetes runs the recipe to its end",
    "kuberay-cluster": "a RayCluster that stays, for gist-dist submit",
    "slurm": "a batch script",
    "aws": "a cluster for `ray up`, for gist-dist submit",
    "gcp": "a cluster for `ray up`, for gist-dist submit",
    "values": "the values that all of these take, to start a --values file from",
}
TEMPLATES = {
    "kuberay": "kuberay.yaml.j2",
    "kuberay-cluster": "kuberay-cluster.yaml.j2",
    "slurm": "slurm.sh.j2",
    "aws": "aws.yaml.j2",
    "gcp": "gcp.yaml.j2",
}
LONGEST_RESOURCE_NAME = 40
"""Characters of a Kubernetes name: KubeRay takes 47 for a RayJob and makes longer ones of it."""
PLAIN_SCALAR = re.compile(r"[A-Za-z_/.][A-Za-z0-9_/.+@=-]*(:[A-Za-z0-9_/.+@=-]+)*")


Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_./:@%+,=-]+$")]
"""Written where nothing can be quoted."""


class Image(Section):
    gpu: str
    cpu: str
    pull_policy: Literal["Always", "IfNotPresent", "Never"]


class Sizes(Section):
    gpus_per_node: int = Field(ge=0)
    workers_per_cpu_node: int = Field(ge=1)
    cpus_per_worker: float = Field(gt=0)
    memory_gb_per_worker: float | None = Field(gt=0)
    shm_gb: int = Field(ge=1)
    head_cpus: int = Field(ge=1)
    head_memory_gb: int = Field(ge=1)


class Storage(Section):
    mount: str = Field(pattern=r"^/[^\s:]+$")
    claim: str
    storage_class: str | None
    size_gb: int = Field(ge=1)
    nfs: str
    checkpoint_dir: str | None


class Spot(Section):
    use: Literal["never", "surplus", "all"]
    idle_minutes: int = Field(ge=1)


class KubeRay(Section):
    ray_version: str
    namespace: str
    env_secret: str | None
    service_account: str | None
    retries: int = Field(ge=0)
    keep_seconds: int = Field(ge=0)
    head_node_selector: dict[str, str]
    gpu_node_selector: dict[str, str]
    spot_node_selector: dict[str, str]
    tolerations: list[dict[str, Any]]
    spot_tolerations: list[dict[str, Any]]


class Slurm(Section):
    partition: Word | None
    account: Word | None
    time: str = Field(pattern=r"^[0-9:-]+$")
    notice_seconds: int = Field(ge=30)
    interface: str | None
    setup: list[str]


class Aws(Section):
    region: str
    zones: str
    head_type: str
    gpu_type: str
    cpu_type: str
    head_image: str
    worker_image: str
    instance_profile: str | None
    disk_gb: int = Field(ge=50)
    ssh_user: str


class Gcp(Section):
    project: str
    region: str
    zone: str
    head_type: str
    gpu_type: str
    accelerator: str | None
    cpu_type: str
    head_image: str
    worker_image: str
    disk_gb: int = Field(ge=50)
    ssh_user: str


class Values(Section):
    """Everything of values.yaml, whose comments say what it is; the defaults stand there and nowhere else."""

    image: Image
    sizes: Sizes
    storage: Storage
    spot: Spot
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str]
    kuberay: KubeRay
    slurm: Slurm
    aws: Aws
    gcp: Gcp


@dataclass(frozen=True)
class Layout:
    """How a recipe's workers lie on nodes of one size."""

    min_workers: int
    max_workers: int
    gpus_per_worker: float
    cpus_per_worker: float
    memory_gb_per_worker: int
    memory_from: str
    """Where that figure comes from, in words."""
    workers_per_node: int
    on_demand: int
    """Most nodes that nobody takes away."""
    spot: int
    """Most nodes besides them."""

    @property
    def min_nodes(self) -> int:
        return math.ceil(self.min_workers / self.workers_per_node)

    @property
    def max_nodes(self) -> int:
        return math.ceil(self.max_workers / self.workers_per_node)

    @property
    def pools(self) -> list[dict[str, Any]]:
        """Name, fewest and most nodes of each pool in use."""
        always = min(self.on_demand, self.min_nodes)
        pools = [
            {"name": "workers", "min": always, "max": self.on_demand, "spot": False},
            {"name": "spot", "min": self.min_nodes - always, "max": self.spot, "spot": True},
        ]
        return [pool for pool in pools if pool["max"]]

    @property
    def grows(self) -> bool:
        """Whether an autoscaler has anything to do."""
        return any(pool["min"] < pool["max"] for pool in self.pools)

    @property
    def summary(self) -> str:
        """For the head of a manifest."""
        workers, nodes = _range(self.min_workers, self.max_workers), _range(self.min_nodes, self.max_nodes)
        gpus = f"{self.gpus_per_worker:g} GPU" if self.gpus_per_worker else "no GPU"
        return (
            f"{workers} workers, each with {gpus}, {self.cpus_per_worker:g} CPU and {self.memory_gb_per_worker} GB; "
            f"{self.workers_per_node} a node: {nodes} nodes"
        )

    @property
    def node_gpus(self) -> int:
        return math.ceil(self.workers_per_node * self.gpus_per_worker)

    @property
    def node_cpus(self) -> int:
        return math.ceil(self.workers_per_node * self.cpus_per_worker)

    @property
    def node_memory_gb(self) -> int:
        return self.workers_per_node * self.memory_gb_per_worker


def render(target: str, config: RunConfig, values: Values) -> str:
    """The manifest of a target of TARGETS; UserError if the workers fit on no node."""
    layout = lay_out(config, values)
    environment = Environment(
        loader=PackageLoader("gist_dist", "templates/cluster"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"scalar": _scalar, "shell": shlex.quote, "flow": _flow}
    return environment.get_template(TEMPLATES[target]).render(
        name=config.name,
        resource=_resource_name(config.name),
        recipe=_recipe_text(config, layout, values),
        run_dir=f"{config.output_dir.rstrip('/')}/{config.name}",
        layout=layout,
        image=values.image.gpu if layout.node_gpus else values.image.cpu,
        **{section: getattr(values, section) for section in Values.model_fields if section != "image"},
        pull_policy=values.image.pull_policy,
        object_store=values.sizes.shm_gb * 10**9 // 2,
        with_recipe=target == "kuberay",
    )


def lay_out(config: RunConfig, values: Values) -> Layout:
    """Whole workers on each node, as evenly as the most workers allow."""
    cluster, sizes = config.cluster, values.sizes
    gpus = cluster.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if sizes.gpus_per_node else 0.0
    if gpus > sizes.gpus_per_node:
        raise UserError(
            f"cluster.gpus_per_worker = {gpus:g}: a node has {sizes.gpus_per_node} (sizes.gpus_per_node of the "
            "values); set one of the two"
        )
    fit = int(sizes.gpus_per_node // gpus) if gpus else sizes.workers_per_cpu_node
    nodes = math.ceil(cluster.max_workers / fit)
    workers_per_node = math.ceil(cluster.max_workers / nodes)
    least = math.ceil(cluster.min_workers / workers_per_node)
    on_demand = {"never": nodes, "surplus": least, "all": 0}[values.spot.use]
    memory, memory_from = sizes.memory_gb_per_worker, "sizes.memory_gb_per_worker"
    if memory is None:
        memory, memory_from = _memory(config, on_gpu=gpus > 0)
    return Layout(
        min_workers=cluster.min_workers,
        max_workers=cluster.max_workers,
        gpus_per_worker=gpus,
        cpus_per_worker=cluster.cpus_per_worker or sizes.cpus_per_worker,
        memory_gb_per_worker=math.ceil(memory),
        memory_from=memory_from,
        workers_per_node=workers_per_node,
        on_demand=on_demand,
        spot=nodes - on_demand,
    )


def _memory(config: RunConfig, on_gpu: bool) -> tuple[float, str]:
    """Gigabytes of host memory of a worker, and what that rests on."""
    student = model_shape(config.student.model)
    guide_name = config.guide_or_student.model if config.has_guide_model else None
    guide = model_shape(guide_name) if guide_name else None
    unknown = [shape.model for shape in (student, guide) if shape and shape.is_assumed]
    size = f"{student.num_parameters / 1e6:,.0f} M parameters"
    names = " ".join(printable(" and ".join(unknown)).split())  # it goes into a comment, and must stay in its line
    assumed = f"; {names} not found here: {size} each assumed" if unknown else ""
    return host_memory(config, student, guide, on_gpu) / 1e9, f"estimated{assumed}"


def load_values(file: str | None = None) -> Values:
    """The packaged values with those of a file over them. UserError names a wrong line."""
    tree, origin = load_plain(default_values()), file or "values.yaml"
    if file:
        try:
            own = load_plain(Path(file).expanduser().read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--values {file}: can't be read as UTF-8 text: {error}") from None
        except ValueError as error:
            raise UserError(f"--values {file}: {error}") from None
        if not isinstance(own, dict):
            raise UserError(f"--values {file}: values are a mapping of sections; found {type(own).__name__}")
        tree = _merged(tree, own)
    try:
        return Values.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(_explain(problem, origin) for problem in error.errors()[:5])) from None


def default_values() -> str:
    return resources.files("gist_dist").joinpath("templates/cluster/values.yaml").read_text("utf-8")


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Sections line by line; a mapping within a section (a selector) as one piece, but environment by variable."""
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(under.get(key), dict)
        merged[key] = under[key] | value if both else value
    return merged


def _explain(problem: Any, origin: str) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        section: Any = Values.model_fields.get(str(problem["loc"][0])) if len(problem["loc"]) > 1 else None
        known = section.annotation.model_fields if section else Values.model_fields
        return f"{origin}: unknown value '{path}'; known here: {', '.join(known)}"
    return f"{origin}: {path}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _recipe_text(config: RunConfig, layout: Layout, values: Values) -> str:
    """The recipe as it runs there: overrides applied, what the cluster would be asked for filled in."""
    tree = config.model_dump(mode="json", exclude_unset=True)
    asked = {key: value for key, value in tree.get("cluster", {}).items() if key != "address"}
    filled = {"gpus_per_worker": _tidy(layout.gpus_per_worker), "cpus_per_worker": _tidy(layout.cpus_per_worker)}
    tree["cluster"] = asked | filled
    if values.storage.checkpoint_dir and config.checkpoint.dir is None:
        tree["checkpoint"] = tree.get("checkpoint", {}) | {"dir": values.storage.checkpoint_dir}
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=110)


def _range(fewest: int, most: int) -> str:
    return f"{fewest}" if fewest == most else f"{fewest} to {most}"


def _tidy(number: float | int) -> float | int:
    return int(number) if number == int(number) else number


def _resource_name(name: str) -> str:
    """As Kubernetes and clouds take names: lower case, digits and '-', beginning with a letter."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    plain = plain if plain[:1].isalpha() else f"run-{plain}"
    return plain[:LONGEST_RESOURCE_NAME].rstrip("-")


def _scalar(value: Any) -> str:
    """One YAML scalar that reads back as the value it came from."""
    if isinstance(value, str) and PLAIN_SCALAR.fullmatch(value) and yaml.safe_load(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)


def _flow(value: Any) -> str:
    """A mapping or list in one line of YAML."""
    return json.dumps(value, ensure_ascii=False)
