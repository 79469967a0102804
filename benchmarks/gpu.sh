#!/usr/bin/env bash
# What one GPU does with this project, in two calls: gpu.sh probes (under 4 minutes), then gpu.sh runs (under 7). What they measure, and the
# options, stand in gpu.py. Results: benchmarks/results/gpu-<card>-probes.json and -runs.json, written after each part.
#
# On a machine without network: put the wheels of what it lacks into ./wheels (or name their folder in WHEELS); they are installed aside.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
wheels=${WHEELS:-wheels}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 DS_BUILD_OPS=0
if [ -d "$wheels" ]; then
    site=${TMPDIR:-/tmp}/dpo-dist-site
    if [ ! -f "$site/.complete" ]; then
        rm -rf "$site"
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl
        touch "$site/.complete"
    fi
    export PYTHONPATH=$site:$PYTHONPATH
fi
exec "$python" benchmarks/gpu.py "$@"
