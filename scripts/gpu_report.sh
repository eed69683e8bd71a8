#!/usr/bin/env bash
# What needs a GPU, in three parts: scripts/gpu_report.sh OUT [COMMIT] [tests|models|kernels ...]      (default: all)
#
#   tests    the GPU tests, and compute-sanitizer's memcheck and racecheck on a part of them; about 8 minutes
#   models   benchmarks.sites: processes that build side by side, then measure one at a time; about 11 minutes on 16 cores
#   kernels  benchmarks.decode and benchmarks.kernels; about 3 minutes
#
# Writes eight files at most into OUT: CSV tables, logs and summaries.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=$1
COMMIT=${2:-$(git rev-parse HEAD 2>/dev/null || echo uncommitted)}
PARTS=("${@:3}")
[ "${#PARTS[@]}" -gt 0 ] || PARTS=(tests models kernels)
LOGS=$(mktemp -d)
trap 'rm -rf "$LOGS"' EXIT
export PYTHONUNBUFFERED=1 TORCHINDUCTOR_COMPILE_THREADS=2
mkdir -p "$OUT"

run_tests() {
    local clean="any_number or widest or forms_for_few or (wide_rows and rms_wide) or exact or (norm_and_multiplier and layer)"
    python3 -m pytest tests/kernels/test_site.py tests/gpu -q -p no:cacheprovider >"$OUT/gpu_tests.txt" 2>&1
    for tool in memcheck racecheck; do
        echo "compute-sanitizer --tool $tool"
        timeout 150 compute-sanitizer --tool "$tool" python3 -m pytest tests/kernels/test_site.py -q \
            -p no:cacheprovider -k "$clean" 2>&1 | grep -E "Error|hazard|SUMMARY|passed|failed" | sort | uniq -c | sort -rn | head -40
    done >"$OUT/sanitizer.txt"
}

sites() { # sites NAME MODEL LAYERS TOKENS ARGUMENT...
    local name=$1 model=$2 layers=$3 tokens=$4
    shift 4
    python3 -m benchmarks.sites --model "$model" --layers "$layers" --tokens "$tokens" --rounds 7 --calls 8 \
        --turns "$LOGS/turns" --processes 9 --patience "${PATIENCE:-330}" --commit "$COMMIT" --out "$OUT" "$@" \
        >"$LOGS/$name" 2>&1
    cat "$LOGS/$name" >>"$OUT/sites.log"
}

run_models() {
    local kinds=(idle add monitor row_monitor clamp capture)
    for tokens in 1 64; do sites "1b-$tokens" 1b 16 "$tokens" --kinds "${kinds[@]}" all add_opaque & done
    for tokens in 8 256 1024 4096; do sites "1b-$tokens" 1b 16 "$tokens" --kinds "${kinds[@]}" & done
    for tokens in 1 4096; do sites "8b-$tokens" 8b 6 "$tokens" --kinds "${kinds[@]}" & done
    sites plain-1 1b 16 1 --plain-graphs --kinds idle add all &
    wait
}

run_kernels() {
    python3 -m benchmarks.decode --commit "$COMMIT" --out "$OUT"
    python3 -m benchmarks.kernels --commit "$COMMIT" --out "$OUT"
}

for part in "${PARTS[@]}"; do "run_$part"; done
