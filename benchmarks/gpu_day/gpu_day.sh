#!/usr/bin/env bash
# Half an hour on one H200 without a network: what to run, in which order, in steps of at most 10 minutes.
#   here:   bash benchmarks/gpu_day/gpu_day.sh prepare      (makes the folder .gpu, 21 MB: all that travels)
#   there:  bash .gpu/gpu_day.sh call1      ... call2 to call6
# Every step installs what it needs, so each also works on a fresh machine. Logs and JSON are put into $OUT.
set -uo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

prepare() {  # needs a network; 25 MB
    local main data to pip="python3 -m pip" v
    main=$(cd "$HERE/../.." && pwd); data=${DATA:-$main/runs/data/demo}; to=${TO:-$main}/.gpu; v=${PYTHON:-$main/.venv/bin/python}
    rm -rf "$to" && mkdir -p "$to/whl" "$to/sdist" "$to/main/runs/data/demo"
    git -C "$main" archive HEAD | tar x -C "$to/main"
    cp -r "$data"/{shards,tokenizer} "$to/main/runs/data/demo/"
    cp "$HERE/gpu_day.sh" "$to/"
    rm -f "$to/main/tests/eval/conftest.py" "$to/main/tests/benchmarks/conftest.py"  # import lm_eval, which is not there, and stop all of collection
    $v "$HERE/old_torch.py" "$to/main" || return 1
    # wheels for CPython 3.12
    for p in hydra-core==1.3.8 omegaconf==2.3.1 megatron-core==0.16.1 hjson==3.1.0 pydantic==2.14.4 pydantic-core==2.50.5 \
        annotated-types typing-inspection liger-kernel==0.8.5 jax-linear-attention==0.1.0; do
        $pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 \
            --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d "$to/whl" "$p" || return 1
    done
    export DS_BUILD_OPS=0 DS_ACCELERATOR=cpu MAMBA_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE
    for p in antlr4-python3-runtime==4.9.3 deepspeed==0.19.8; do $v -m pip wheel -q --no-deps --no-build-isolation -w "$to/whl" "$p" || return 1; done
    for p in mamba-ssm==2.3.2.post1 causal-conv1d==1.7.0; do
        $v -m pip download -q --no-deps --no-binary=:all: --no-build-isolation -d "$to/sdist" "$p" || return 1
    done
    for f in "$to"/sdist/*.tar.gz; do tar xzf "$f" -C "$to/sdist" && rm "$f"; done
    # their setup.py names nine architectures whatever TORCH_CUDA_ARCH_LIST says: keep sm_90 alone, which is a ninth of the time
    $v - "$to"/sdist/*/setup.py <<'P'
import re, sys
for path in sys.argv[1:]:
    text = open(path).read()
    text = re.sub(r'( *)cc_flag\.append\("-gencode"\)\n *cc_flag\.append\("arch=compute_(?!90,)\d+,code=sm_\d+"\)', r"\1pass", text)
    open(path, "w").write(text)
P
    # dist-info of mamba-ssm asks for tilelang and quack, which the Mamba-1 scan does not need: --no-deps there
    du -sm "$to"; ls "$to/whl"
}

start() {  # on the GPU machine: packages once, environment always
    OUT=${OUT:-/tmp/out}; mkdir -p "$OUT" /tmp/logs; rm -f /tmp/logs/*
    trap 'tar czf "$OUT/logs.tgz" -C /tmp/logs .' EXIT  # one archive
    export PYTHONPATH=/tmp/site:$HERE/main PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline OMP_NUM_THREADS=4 \
        PYTHONDONTWRITEBYTECODE=1 XLA_PYTHON_CLIENT_PREALLOCATE=false GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo TOKENIZERS_PARALLELISM=false
    [ -d /tmp/site/hydra ] || python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target /tmp/site "$HERE"/whl/*.whl || exit 1
    [ -d "$HERE/built" ] && [ ! -e /tmp/mamba.done ] && cat "$HERE"/built/wheels.tar.* | tar x -C /tmp && touch /tmp/mamba.done
    if ls /tmp/*_ssm-*.whl /tmp/causal_conv1d-*.whl >/dev/null 2>&1 && [ ! -d /tmp/site/mamba_ssm ]; then
        python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site /tmp/mamba_ssm-*.whl /tmp/causal_conv1d-*.whl
    fi
    cd "$HERE/main" || exit 1
}

log() {  # NAME SECONDS COMMAND...: its output in $OUT/NAME.log, the last lines here
    local name=$1 limit=$2 begin=$SECONDS; shift 2
    echo "== $name"; timeout -k 5 "$limit" "$@" >"/tmp/logs/$name.log" 2>&1; local rc=$?
    grep -v -i -E "warning|^$|warn_once" "/tmp/logs/$name.log" | tail -n "${LINES_OF:-14}" | cut -c1-220; echo "== $name rc $rc, $((SECONDS - begin)) s"
}

build_mamba() {  # nvcc is there; 9 + 3 sources, sm_90 alone: estimated 3 to 5 minutes on 16 cores
    export MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE MAX_JOBS=${JOBS:-8}  # FORCE: else it looks for a wheel on GitHub, and fails
    export CUDA_HOME=${CUDA_HOME:-$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")}
    cp -r "$HERE/sdist" /tmp/sdist 2>/dev/null
    for d in /tmp/sdist/causal_conv1d-* /tmp/sdist/mamba_ssm-*; do
        python3 -m pip wheel -q --no-index --no-deps --no-build-isolation -w /tmp "$d" || echo "failed: $d"
    done
    touch /tmp/mamba.done
}

call1() {  # is it right? 8 minutes. The rival is compiled beside it, on half of the cores
    start
    (setsid bash -c "$(declare -f build_mamba); HERE=$HERE; build_mamba" >/tmp/mamba.log 2>&1 &)
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    LINES_OF=30 log smoke 120 python3 -m benchmarks.gpu_day.smoke
    local t="python3 -m pytest -q -m gpu -p no:cacheprovider --maxfail=12 --durations=5"
    # each file in a process of its own: after a fault of a kernel nothing works in that process
    LINES_OF=25 log cuda 140 $t tests/model/test_cuda.py
    log generate 60 $t tests/model/test_generation.py
    log compiled 80 $t tests/model/test_kernels.py
    LINES_OF=20 log matrix 110 $t tests/train/test_matrix.py
    while [ ! -e /tmp/mamba.done ] && [ $SECONDS -lt 560 ]; do sleep 3; done
    tail -3 /tmp/mamba.log; ls -la /tmp/*.whl 2>/dev/null
    # into .gpu/built, for a later machine
    (cd /tmp && ls mamba_ssm-*.whl causal_conv1d-*.whl >/dev/null 2>&1 && tar c mamba_ssm-*.whl causal_conv1d-*.whl | split -b 15m -a 1 - "$OUT/wheels.tar.")
}

call2() {  # how fast? 6 minutes: ceilings, our kernels, layer, a rank's step of the 7B; then the jax rival
    start
    LINES_OF=60 log bench 420 python3 -m benchmarks.gpu --budget 1 --no-reference --sections ceilings check scan convolution norms embedding loss layer rank
    LINES_OF=12 log jax 120 python3 -m benchmarks.gpu --no-reference --sections jax --jax-python python3
    cp benchmarks/results/gpu-*.json "$OUT/" 2>/dev/null
}

ONE='data.stages=[{name: one, tokens: %d, seq_len: %d, mixture: {code: 50, math: 50}}]'
RUN="+experiment=demo data.block_tokens=8192 cluster.ranks_per_node=1 cluster.device=cuda cluster.peak_tflops=989.5 metrics.wandb_project=null
 schedule.warmup_tokens=200000 schedule.ramp_tokens=0 schedule.decay_tokens=200000 compute.precision=bf16 metrics.console_seconds=1
 validation.every_tokens=100000000 checkpoint.every_tokens=100000000 optim.lr=1e-3 train.profile.steps=3 train.profile.after_steps=8 train.profile.timed_steps=15"

train() {  # NAME TOKENS SEQ_LEN SEQUENCES OVERRIDES...: one process without a launcher, killed at the limit
    local name=$1 one; one=$(printf "$ONE" "$2" "$3"); local n=$4; shift 4
    LINES_OF=24 log "$name" "${LIMIT:-60}" python3 train/pretrain.py $RUN "$one" run.name="$name" schedule.batch_start_sequences="$n" schedule.batch_end_sequences="$n" "$@"
    cp "runs/$name/profile/"*.txt "/tmp/logs/$name.profile.txt" 2>/dev/null; cp "runs/$name/metrics.jsonl" "/tmp/logs/$name.metrics.jsonl" 2>/dev/null
}

call3() {  # does it train? 8 minutes
    start; . launch/env.sh
    LINES_OF=20 log doctor 60 python3 launch/doctor.py +experiment=demo cluster.ranks_per_node=1 metrics.wandb_project=null
    # the demo, stopped once and gone on: NCCL and gloo, pinned copies, checkpoints, loss beside the CPU's record
    LINES_OF=8 log demo1 60 torchrun --standalone --nproc-per-node 1 train/pretrain.py +experiment=demo cluster.ranks_per_node=1 metrics.wandb_project=null health.stop_after_seconds=140 health.stop_margin_seconds=120
    LINES_OF=12 log demo2 90 torchrun --standalone --nproc-per-node 1 train/pretrain.py +experiment=demo cluster.ranks_per_node=1 metrics.wandb_project=null
    train 130m-deepspeed 4000000 2048 64 model=130m parallel.micro_batch_tokens=65536
    train 130m-megatron 4000000 2048 64 model=130m parallel.micro_batch_tokens=65536 parallel.engine=megatron
    LIMIT=40 train 130m-small 4000000 2048 64 model=130m parallel.micro_batch_tokens=8192 parallel.engine=megatron  # what launches cost
    LIMIT=90 train 130m-compile 4000000 2048 64 model=130m parallel.micro_batch_tokens=65536 parallel.engine=megatron compute.compile=true
    LIMIT=80 train 1b-megatron 4000000 8192 16 model=1b parallel.micro_batch_tokens=16384 parallel.engine=megatron train.profile.after_steps=3 train.profile.timed_steps=6 train.profile.steps=2
    cp runs/demo/metrics.jsonl /tmp/logs/demo.metrics.jsonl; cp "$(ls runs/130m-megatron/profile/*.json.gz | head -1)" "$OUT/" 2>/dev/null
}

call4() {  # why that fast? 7 minutes: counters of each kernel, memory checker, decoding
    start
    cat >/tmp/one.py <<'P'
import sys, torch
from benchmarks.gpu_bench import Bench
from benchmarks.gpu_operations import scan_inputs
from tests.compose import run_config
from model.kernels import CUDA
b = Bench(torch.device("cuda"), run_config("7b"), 8192, [1], 0.0, 1)
x = scan_inputs(b, 1, 0); y, _ = CUDA.selective_scan(*x); torch.autograd.grad(y, x, torch.randn_like(y))
u = torch.randn(1, 8192, 8192, device="cuda").bfloat16().requires_grad_(); w = torch.randn(8192, 4, device="cuda").requires_grad_()
o = CUDA.causal_conv1d(u, w, torch.zeros(8192, device="cuda")); o.backward(torch.randn_like(o))
h = torch.randn(8192, 4096, device="cuda").requires_grad_(); g = torch.ones(4096, device="cuda").requires_grad_()
n = CUDA.rms_norm(h, g, 1e-5, dtype=torch.bfloat16); n.backward(torch.randn_like(n)); torch.cuda.synchronize()
P
    LINES_OF=90 log ncu 150 ncu --clock-control none -k 'regex:^(scan|conv|norm)_' --section SpeedOfLight --section Occupancy --section WarpStateStats --section LaunchStats python3 /tmp/one.py
    log memcheck 120 compute-sanitizer --tool memcheck --error-exitcode 9 python3 -m benchmarks.gpu_day.smoke --small
    log racecheck 120 compute-sanitizer --tool racecheck --error-exitcode 9 python3 -m benchmarks.gpu_day.smoke --small
    LINES_OF=20 log generate 150 python3 -c '
from benchmarks.generation import Limits, bench
from core.command import compose_config, convert
from eval.config import EvaluationConfig
words = ["+experiment=demo", "model=130m", "run.name=gen"]
bench(convert(EvaluationConfig, compose_config(words)), Limits(4096, 1024, 8192, 8.0))
'
}

call5() {  # the public kernels, 6 minutes; on a fresh machine carry .gpu/built (call1's parts), or it builds again
    start
    if ! python3 -c "import selective_scan_cuda" 2>/dev/null; then JOBS=16 log build 300 bash -c "$(declare -f build_mamba); HERE=$HERE; build_mamba"; start; fi
    log public 80 python3 -m pytest -q -m gpu -p no:cacheprovider tests/model/test_cuda.py -k mamba_ssm
    LINES_OF=40 log baselines 170 python3 -m benchmarks.gpu --budget 1 --no-reference --layers 32 --sections check scan convolution layer rank
    cp benchmarks/results/gpu-*.json "$OUT/" 2>/dev/null
}

call6() { start; "$@"; }  # whatever the first ones left open: bash .gpu/gpu_day.sh call6 python3 -m pytest -x ...

"$@"
