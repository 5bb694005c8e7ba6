#!/usr/bin/env bash
# The virtual environment of a checkout, with everything pinned: `make install` calls this.
# TORCH=cpu takes torch from PyTorch's index of CPU builds, which spares gigabytes of CUDA.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} log=.venv/install.log
command -v "$python" >/dev/null || { echo "error: no $python: set PYTHON" >&2; exit 2; }
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' ||
    { echo "error: $python is not 3.11, 3.12 or 3.13: set PYTHON=python3.12 or so" >&2; exit 2; }
command -v g++ >/dev/null || { echo 'error: g++ is missing: apt-get install g++' >&2; exit 2; }

case ${TORCH:-} in
    '' | cpu) ;;
    *) echo "error: TORCH=$TORCH is unknown: cpu, or nothing for PyPI's build with CUDA" >&2; exit 2 ;;
esac

# a line every ten seconds, of the hundreds that pip says or of its silence
progress() {
    local packages=0 said=$SECONDS line doing='' code=0
    while ((code == 0 || code > 128)); do  # 129 and more: ten seconds without a line
        code=0
        IFS= read -r -t 10 line || code=$?
        [[ $line == Collecting* ]] && packages=$((packages + 1))
        [[ $line =~ ^\ *((Collecting|Downloading|Building|Installing).*) ]] && doing=${BASH_REMATCH[1]}
        if ((SECONDS - said >= 10)); then
            said=$SECONDS
            printf '  %d s, %d packages found: %.70s\n' "$SECONDS" "$packages" "$doing"
        fi
    done
}

install() {
    DS_BUILD_OPS=0 .venv/bin/pip install --disable-pip-version-check --progress-bar off -c constraints.txt "$@" 2>&1 | tee -a "$log" | progress && return
    tail -n 15 "$log" >&2
    echo "error: pip failed; $log has all it said" >&2
    exit 1
}

"$python" -m venv .venv
: >"$log"
echo "installing into .venv; pip's output goes to $log"
# torch only, and before the rest: that index has old releases of other packages
[ -z "${TORCH:-}" ] || install --no-deps --index-url https://download.pytorch.org/whl/cpu "torch==$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' constraints.txt)+cpu"
install -e '.[all,dev]'
echo "installed in $SECONDS s"
