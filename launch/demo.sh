#!/usr/bin/env bash
# The README's five commands, one after another, each timed. Finished stages are reused: every command knows its own.
set -euo pipefail
cd "$(dirname "$0")/.."

stage() {
    local name=$1 begin=$SECONDS
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    "$@"
    printf '== %s took %d s\n' "$name" "$((SECONDS - begin))"
}

stage text     python examples/make_demo_corpus.py
stage data     python data/prepare.py +experiment=demo
stage train    torchrun --nproc-per-node "${RANKS:-2}" train/pretrain.py +experiment=demo
stage export   python eval/export.py +experiment=demo
stage evaluate python eval/run.py +experiment=demo

cat <<'END'

The demo is done.
  checkpoints   runs/demo/checkpoints
  HF model      runs/demo/hf
  curves        runs/demo/curves.png
  scores        runs/demo/eval.json
  metrics       runs/demo/metrics.jsonl
END
