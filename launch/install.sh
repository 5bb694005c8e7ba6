#!/usr/bin/env bash
# Create .venv with the packages of constraints.txt; `make install` calls this.
# TORCH=cpu installs torch's CPU build, gigabytes smaller than the CUDA build.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} log=.venv/install.log
command -v "$python" >/dev/null || { echo "error: no $python: set PYTHON" >&2; exit 2; }
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' ||
    { echo "error: $python is not 3.11, 3.12 or 3.13: set PYTHON, for example PYTHON=python3.12" >&2; exit 2; }
compiler=${CXX:-g++}
command -v "${compiler%% *}" >/dev/null ||
    echo "no ${compiler%% *}: the CPU kernels cannot be compiled, and runs on CPUs are three times as slow; at any time: apt-get install g++"

case ${TORCH:-} in
    '' | cpu) ;;
    *) echo "error: TORCH=$TORCH is unknown: set TORCH=cpu, or unset it for the CUDA build" >&2; exit 2 ;;
esac

# print one line of pip's progress every ten seconds
progress() {
    local packages=0 printed_at=$SECONDS line activity='' code=0
    while ((code == 0 || code > 128)); do  # read returns > 128 after ten seconds without a line
        code=0
        IFS= read -r -t 10 line || code=$?
        [[ $line == Collecting* ]] && packages=$((packages + 1))
        [[ $line =~ ^\ *((Collecting|Downloading|Building|Installing).*) ]] && activity=${BASH_REMATCH[1]}
        if ((SECONDS - printed_at >= 10)); then
            printed_at=$SECONDS
            printf '  %d s, %d packages found: %.70s\n' "$SECONDS" "$packages" "$activity"
        fi
    done
}

install() {
    DS_BUILD_OPS=0 .venv/bin/pip install --disable-pip-version-check --progress-bar off -c constraints.txt "$@" 2>&1 | tee -a "$log" | progress && return
    tail -n 15 "$log" >&2
    echo "error: pip failed; see $log" >&2
    exit 1
}

"$python" -m venv .venv
: >"$log"
echo "installing into .venv; pip's output goes to $log"
# torch only, and first: PyTorch's index has old releases of other packages
[ -z "${TORCH:-}" ] || install --no-deps --index-url https://download.pytorch.org/whl/cpu "torch==$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' constraints.txt)+cpu"
install -e '.[all,dev]'
echo "installed in $SECONDS s"
