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

stage text     python examples/make_demo_corpus.py
stage data     python data/prepare.py +experiment=demo
stage train    torchrun --nproc-per-node "${RANKS:-2}" train/pretrain.py +experiment=demo
stage export   python eval/export.py +experiment=demo
stage evaluate python eval/run.py +experiment=demo

cat <<'END'

The demo has finished.
  checkpoints   runs/demo/checkpoints
  HF model      runs/demo/hf
  curves        runs/demo/curves.png
  scores        runs/demo/eval.json
  metrics       runs/demo/metrics.jsonl
END
