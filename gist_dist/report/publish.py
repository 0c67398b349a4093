"""The finished model on the Hugging Face Hub, for a recipe that names a repository (tracking.hub.repo_id)."""

import json
import logging
from pathlib import Path
from typing import Any

from gist_dist.common.errors import UserError
from gist_dist.common.files import write_text
from gist_dist.common.redact import redact_text
from gist_dist.common.text import one_line
from gist_dist.config import HubConfig, RunConfig

logger = logging.getLogger(__name__)
HUB_NAME = "hub.json"


def check_hub(hub: HubConfig) -> None:
    """UserError, before anything is trained, if the model is to be pushed and there is no token to do so."""
    if hub.repo_id is None:
        return
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError(
            f"tracking.hub.repo_id = {hub.repo_id}: there is no token to push with; set HF_TOKEN, log in with "
            "`hf auth login`, or set repo_id to null"
        )


def push_model(config: RunConfig, run_dir: Path) -> str | None:
    """Push run_dir/model to the recipe's repository and note in run_dir/hub.json where it went; its address.

    A run is never lost to the Hub: what goes wrong is a warning that says how to push by hand.
    """
    hub, model = config.tracking.hub, Path(run_dir) / "model"
    if hub.repo_id is None:
        return None
    try:
        commit = _push(hub, model)
    except Exception as error:  # of the network, the Hub, its client or the recipe: the run has its result either way
        reason = redact_text(one_line(error))
        by_hand = f"hf upload {hub.repo_id} {model} ." + " --private" * hub.private
        logger.warning("the model was not pushed to %s (%s); to push it by hand: %s", hub.repo_id, reason, by_hand)
        return None
    place = json.dumps({"repo_id": hub.repo_id, "commit": commit.oid, "url": str(commit.repo_url)}, indent=1)
    write_text(Path(run_dir) / HUB_NAME, place)
    logger.info("pushed the model to %s", commit.repo_url)
    return str(commit.repo_url)


def pushed_commit(run_dir: Path, repo_id: str | None) -> str | None:
    """The commit that holds the run's model in that repository; None if it was not pushed there."""
    try:
        place = json.loads((Path(run_dir) / HUB_NAME).read_text(encoding="utf-8"))
        return place["commit"] if place["repo_id"] == repo_id else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _push(hub: HubConfig, model: Path) -> Any:
    from huggingface_hub import HfApi

    assert hub.repo_id is not None
    api = HfApi()
    api.create_repo(hub.repo_id, private=hub.private, exist_ok=True)
    if hub.private and not api.model_info(hub.repo_id).private:
        raise UserError("it is public already, and tracking.hub.private is true; set private=false or another repo_id")
    return api.upload_folder(repo_id=hub.repo_id, folder_path=model, commit_message="Model trained by gist_dist")
