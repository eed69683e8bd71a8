#!/usr/bin/env bash
# Everything that needs a GPU, in one run: scripts/gpu_report.sh OUT [COMMIT]
#
# The processes of benchmarks.sites build side by side, and the GPU tests run meanwhile; then each measures alone. Takes
# about 10 minutes on 16 cores. Writes CSV files and the test and sanitizer summaries into OUT.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=$1
COMMIT=${2:-$(git rev-parse HEAD 2>/dev/null || echo uncommitted)}
TURNS=$(mktemp -d)
export PYTHONUNBUFFERED=1 TORCHINDUCTOR_COMPILE_THREADS=2
KINDS=(idle add monitor row_monitor clamp capture)
PROCESSES=10
PATIENCE=${PATIENCE:-330}
mkdir -p "$OUT"

sites() { # sites MODEL LAYERS TOKENS EXTRA...
    local model=$1 layers=$2 tokens=$3
    shift 3
    python3 -m benchmarks.sites --model "$model" --layers "$layers" --tokens "$tokens" --rounds 7 --calls 8 \
        --turns "$TURNS" --processes "$PROCESSES" --patience "$PATIENCE" --commit "$COMMIT" --out "$OUT" "$@" \
        >"$OUT/log-$model-$tokens-${#}" 2>&1
}

for tokens in 1 64; do sites 1b 16 "$tokens" --kinds "${KINDS[@]}" all add_opaque & done
for tokens in 8 256 1024 4096; do sites 1b 16 "$tokens" --kinds "${KINDS[@]}" & done
for tokens in 1 4096; do sites 8b 6 "$tokens" --kinds "${KINDS[@]}" & done
sites 1b 16 1 --plain-graphs --kinds idle add all &
python3 -m pytest tests/kernels/test_site.py tests/gpu -q -p no:cacheprovider >"$OUT/gpu_tests.txt" 2>&1 &
tests=$!
(
    for tool in memcheck racecheck; do
        echo "compute-sanitizer --tool $tool"
        timeout 150 compute-sanitizer --tool "$tool" python3 -m pytest tests/kernels/test_site.py -q -p no:cacheprovider \
            -k "any_number or forms_for_few or (wide_rows and rms_wide) or exact or (norm_and_multiplier and layer)" 2>&1 | tail -4
    done
) >"$OUT/sanitizer.txt" 2>&1
wait "$tests"
touch "$TURNS/built-tests"
wait
cat "$OUT"/log-* >"$OUT/sites.log"
rm -f "$OUT"/log-*
timeout 100 python3 -m benchmarks.decode --commit "$COMMIT" --out "$OUT" | grep family
timeout 150 python3 -m benchmarks.kernels --commit "$COMMIT" --out "$OUT" | grep family
