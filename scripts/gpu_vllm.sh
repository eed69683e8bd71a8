#!/usr/bin/env bash
# vLLM on a GPU: scripts/gpu_vllm.sh OUT COMMIT [tests|conditions|steps ...]      (default: tests steps)
#
#   tests        tests/vllm against both model runners
#   conditions   features of autoencoders, gates, controllers, captures and the operator's own steering
#   steps        benchmarks.vllm_steps
#
# vLLM must be importable by python3 (0.26.0 was used, with torch 2.11.0+cu130). Writes logs and tables into OUT.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=$1 COMMIT=$2
PARTS=("${@:3}")
[ "${#PARTS[@]}" -gt 0 ] || PARTS=(tests steps)
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_USE_FLASHINFER_SAMPLER=0 \
    VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL="${VLLM_LOGGING_LEVEL:-WARNING}"
mkdir -p "$OUT"

suite() { # suite NAME FILE...: each in a process and a cache of its own
    local name=$1
    shift
    timeout "${LIMIT:-400}" python3 -m pytest -m vllm "$@" -p no:cacheprovider -q >"$OUT/$name.txt" 2>&1
    echo "$name: $(tail -1 "$OUT/$name.txt")"
}

run_tests() {
    export TORCHINDUCTOR_COMPILE_THREADS=2
    local both="tests/vllm/test_parity.py tests/vllm/test_requests_in_engines.py"
    VLLM_USE_V2_MODEL_RUNNER=1 TORCHINDUCTOR_CACHE_DIR=$(mktemp -d) suite runner_v2 $both &
    VLLM_USE_V2_MODEL_RUNNER=0 TORCHINDUCTOR_CACHE_DIR=$(mktemp -d) suite runner_v1 $both &
    TORCHINDUCTOR_CACHE_DIR=$(mktemp -d) suite pieces tests/vllm/test_pieces.py tests/vllm/test_checkpoints.py &
    TORCHINDUCTOR_CACHE_DIR=$(mktemp -d) suite captures tests/vllm/test_captures.py &
    wait
}

run_conditions() { # features of autoencoders, gates, controllers and the operator's own steering
    export TORCHINDUCTOR_COMPILE_THREADS=2
    for each in features gates dynamic global; do
        TORCHINDUCTOR_CACHE_DIR=$(mktemp -d) suite $each "tests/vllm/test_$each.py" &
    done
    TORCHINDUCTOR_CACHE_DIR=$(mktemp -d) suite captures tests/vllm/test_captures.py tests/vllm/test_capture_requests.py &
    wait
}

run_steps() {
    python3 -m benchmarks.vllm_steps --commit "$COMMIT" --out "$OUT" ${STEPS:-} 2>&1 | tee "$OUT/steps.log" | tail -90
}

for part in "${PARTS[@]}"; do "run_$part"; done
