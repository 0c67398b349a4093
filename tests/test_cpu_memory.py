"""A process that keeps what it frees takes no new pages for the next step."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from gist_dist.models.cpu_memory import keep_freed_memory

def step():
    kept = [torch.ones(2**20) for _ in range(64)] + [torch.ones(2**25)]

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(4):
    step()
before = faults()
step()
print(faults() - before)
"""


def pages_taken(how: str) -> int:
    """By the last of five equal steps."""
    return int(subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="keeps what glibc's malloc frees, which is Linux's")
def test_the_next_step_finds_its_memory():
    assert pages_taken("default") > 10_000 and pages_taken("keep") < 500
