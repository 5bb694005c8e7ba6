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

# loss and scores, what they mean, and what to do next
python - "$SECONDS" <<'END'
import json
import sys

with open("runs/demo/metrics.jsonl") as file:
    steps = [record for record in map(json.loads, file) if record.get("loss") is not None]
with open("runs/demo/eval.json") as file:
    score = json.load(file)["heldout"]["all"]
bits, unigram = score["bits_per_byte"], score["unigram_bits_per_byte"]
first, last = steps[0], steps[-1]
print(f"""
The demo has finished after {int(sys.argv[1]) / 60:.1f} minutes; everything is in runs/demo.
  training loss   {first["loss"]:.2f} at step 1, {last["loss"]:.2f} at step {last["step"]:,} (nats per token)
  held-out text   {bits:.2f} bits per byte; {unigram:.2f} by the unigram model
The unigram model knows only how frequent each token is. The trained one needs {1 - bits / unigram:.0%} fewer bits for
text that it has never seen: so much it has learnt about which token follows which.

Next:
  python train/report.py runs/demo                                            # curves and tables on one page
  python eval/generate.py +experiment=demo generate.prompt="import os"        # let it write
  python data/prepare.py +experiment=own data.input=FOLDER                    # then train on your own text
""")
END
