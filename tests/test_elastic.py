"""cluster.num_workers: [fewest, most]. Groups that shrink and grow on real nodes: tests/faults/test_nodes.py."""

import json

import pytest

from gist_dist.common.errors import UserError
from gist_dist.config import ClusterConfig
from gist_dist.on_ray.cluster.capacity import check_resources, cpus_per_worker
from gist_dist.recipe import parse_config


@pytest.mark.parametrize(("value", "bounds"), [(3, (3, 3)), ([1, 4], (1, 4)), ((2, 2), (2, 2))])
def test_number_or_bounds(value, bounds):
    config = ClusterConfig(num_workers=value)
    assert (config.min_workers, config.max_workers) == bounds
    again = ClusterConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json"))))
    assert again == config


@pytest.mark.parametrize("value", [0, [0, 2], [3, 2], [1, 2, 3], [1], 1.5, "2", [True, 2], None])
def test_other_numbers_are_refused_in_one_sentence(value):
    tree = {"name": "x", "student": {"model": "m"}, "data": {"sources": [{"path": "p"}]}}
    with pytest.raises(UserError, match=r"^recipe: cluster\.num_workers: .* is neither a number of workers.*$"):
        parse_config({**tree, "cluster": {"num_workers": value}})


def test_only_the_fewest_must_have_room():
    config = ClusterConfig(num_workers=(2, 64))
    assert cpus_per_worker(config, {"CPU": 2.0}) == 1.0
    check_resources(config, {"CPU": 2.0})
    with pytest.raises(UserError, match=r"num_workers = \[5, 64\] with cpus_per_worker = 0.5 needs 2.5 CPUs"):
        check_resources(ClusterConfig(num_workers=(5, 64)), {"CPU": 2.0})
