#!/usr/bin/env bash
# Run the README's five commands in order and time each. Every command reuses its finished work.
set -euo pipefail
cd "$(dirname "$0")/.."

stage() {
    local name=$1 started_at=$SECONDS
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    "$@"
    printf '== %s took %d s\n' "$name" "$((SECONDS - started_at))"
}

# a rank per GPU, which gives the first steps' 16 sequences to at most 16; else per core, four sequences each
ranks=${RANKS:-$(python -c 'import os, torch; print(min(torch.cuda.device_count(), 16) or min(len(os.sched_getaffinity(0)), 4))')}
[[ $ranks =~ ^[1-9][0-9]*$ ]] || { echo "error: RANKS=$ranks is no number of ranks: set 1 or more, or unset it" >&2; exit 2; }

stage text     python examples/make_demo_corpus.py
stage data     python data/prepare.py +experiment=demo
stage train    torchrun --nproc-per-node "$ranks" train/pretrain.py +experiment=demo
stage export   python eval/export.py +experiment=demo
stage evaluate python eval/run.py +experiment=demo

python launch/demo_summary.py runs/demo "$SECONDS"
