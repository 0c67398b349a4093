"""On the PYTHONPATH of a run whose scenario needs it: what can only be done from inside of a worker.

GIST_CHAOS_INSIDE is a JSON object. pace: seconds that every step takes longer, so that a run of tiny models lasts while
nodes go and come. fault, rank, step, once: in that step of that rank, once (a file remembers), the thread never returns
("hang"), or the process gets no more memory ("memory").
"""

import json
import os
import resource
import sys
import threading
import time
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

MODULE = "gist_dist.core.step"


class _Wrapper(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            module.train_step = _wrapped(module.train_step, json.loads(os.environ["GIST_CHAOS_INSIDE"]))

        spec.loader.exec_module = exec_module
        return spec


def _wrapped(train_step, plan):
    def wrapped(train_state, batch, *arguments, **options):
        time.sleep(plan.get("pace", 0))
        is_here = plan.get("rank") == train_state.world.rank and plan.get("step") == batch.step
        if is_here and not os.path.exists(plan["once"]):
            open(plan["once"], "w").close()
            _FAULTS[plan["fault"]]()
        return train_step(train_state, batch, *arguments, **options)

    return wrapped


def _limit_memory():
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now, now))


_FAULTS = {"hang": lambda: threading.Event().wait(), "memory": _limit_memory}

if "GIST_CHAOS_INSIDE" in os.environ:
    sys.meta_path.insert(0, _Wrapper())
