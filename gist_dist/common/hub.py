"""Whether the Hugging Face Hub can be asked."""

import functools
import http.client
import os
import sys
import urllib.error
import urllib.request
from typing import Any


@functools.cache
def go_offline_if_unreachable(timeout_s: float = 5) -> bool:
    """True if the Hub is out of reach; then its clients are told so, and answer at once from their caches.

    Left alone they try every file of a model six times over half a minute before they look there.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return True
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=timeout_s).close()
    except urllib.error.HTTPError:
        return False  # it answered
    except (OSError, ValueError, http.client.HTTPException):  # the last: what answers there speaks no HTTP
        os.environ["HF_HUB_OFFLINE"] = "1"  # also for the processes that this one starts
        for module in ("huggingface_hub.constants", "datasets.config"):
            settings: Any = sys.modules.get(module)
            if settings:
                settings.HF_HUB_OFFLINE = True
        return True
    return False
