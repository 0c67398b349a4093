"""What tests share: offline models, one local Ray, process groups."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_metrics_report_interval_ms", "1000")  # ten times as often as usual

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start Ray first: they take longest, and of two processes none shall begin one when the other ends."""
    with_ray = {item.path for item in items if item.get_closest_marker("ray")}
    items.sort(key=lambda item: item.path not in with_ray)


@pytest.fixture(scope="session")
def minilm(tmp_path_factory) -> Path:
    """all-MiniLM-L6-v2, the offline guide."""
    import offline_models

    return offline_models.minilm(tmp_path_factory.mktemp("models") / "all-MiniLM-L6-v2")


@pytest.fixture(scope="session")
def minilm_l2(minilm) -> Path:
    """Its first two layers, the offline student."""
    import offline_models

    return offline_models.truncated(minilm, 2, minilm.parent / "MiniLM-L2")


@pytest.fixture(scope="session")
def fuzz_models(tmp_path_factory):
    """The tiny models that hostile input is tried on; their folder is what fuzz.run_case needs."""
    import fuzz

    return fuzz.models(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("the developers' data pack ../shared/data is not here: it is no part of the repository")
    return folder


@pytest.fixture(scope="session")
def ray_session():
    """One local Ray for all tests that need one."""
    from gist_dist.config import ClusterConfig
    from gist_dist.on_ray.cluster.connect import connected

    with connected(ClusterConfig()) as resources:
        yield resources
