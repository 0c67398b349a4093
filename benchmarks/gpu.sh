#!/bin/sh
# benchmarks/gpu.py on a machine that may lack pydantic: at most 8 minutes on one H100 or H200.
#
#     benchmarks/gpu.sh [RESULTS_FOLDER] [flags of gpu.py]
#
# Where pydantic is missing and nothing can be downloaded, put its wheels into .gpu-wheels beforehand, for the Python and
# platform of that machine (here 3.12 on Linux):
#
#     pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 \
#         -d .gpu-wheels pydantic==2.14.3 pydantic_core==2.50.4 annotated_types==0.8.0 typing_inspection==0.4.5
#
# A copy of the tree without its git history is told its commit by GIST_DIST_COMMIT.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
if ! $PYTHON -c 'import pydantic, typing_inspection' 2>/dev/null; then
    site=$(mktemp -d)
    $PYTHON -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" .gpu-wheels/*.whl
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
results=${1:-benchmarks/results}
[ $# -gt 0 ] && shift
export CUBLAS_WORKSPACE_CONFIG=:4096:8 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
exec timeout 450 $PYTHON benchmarks/gpu.py --results "$results" --work "${TMPDIR:-/tmp}/gist-dist-bench" "$@"
