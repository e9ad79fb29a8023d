#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under ten minutes: build, test suite with the CUDA and with the Triton
# kernels, benchmarks of both, compute-sanitizer. A stage that fails or runs out of time does not keep the later ones
# from running. Logs, figures and summary.txt go to $OUT (default: benches/results), all of them flat. Exit status 1 if
# a stage failed, 2 without a GPU.
set -u
cd "$(dirname "$0")/.." || exit 2
OUT=${OUT:-benches/results}
mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)
DEADLINE=585 # of $SECONDS, which counts from the start of this shell
export PYTHONUNBUFFERED=1 UNIGEN_FAST_REQUIRE_BUILD=1
summary=$OUT/summary.txt
failed=0
: >"$summary"

note() { echo "$*" | tee -a "$summary"; }

# stage LOG SECONDS NAME COMMAND…: runs the command for at most SECONDS, and no longer than the whole may take
stage() {
    local log=$OUT/$1 limit=$2 name=$3 start=$SECONDS status
    shift 3
    if ((DEADLINE - SECONDS < limit)); then limit=$((DEADLINE - SECONDS)); fi
    echo "== $name: $*" >>"$log"
    if ((limit > 5)); then
        timeout -k 5 "$limit" "$@" >>"$log" 2>&1
        status=$?
    else
        status=124
    fi
    case $status in
        0) note "ok      $name ($((SECONDS - start)) s)" ;;
        124 | 137) note "TIMEOUT $name (${limit} s)" ;;
        *) note "FAILED  $name (status $status, $((SECONDS - start)) s): see $(basename "$log")" ;;
    esac
    if ((status != 0)); then failed=1; fi
    return "$status"
}

if ! nvidia-smi --query-gpu=name,driver_version --format=csv,noheader; then
    echo "no GPU here" >&2
    exit 2
fi
device=$(python3 -c 'import torch
from unigen_fast.bench.harness import device_name
print(device_name(torch.device("cuda")))') || exit 2
slug=$(echo "$device" | tr '[:upper:]' '[:lower:]')
note "on an $device"
rm -f "$OUT"/{build,tests,triton,sanitizer,bench}.log "$OUT/$slug"-{cuda,triton}.json

for module in pytest_benchmark mlxtend matplotlib; do
    python3 -c "import $module" 2>/dev/null || echo "not installed, and done without: $module"
done

# ---- build: nvcc keeps the processors busy and the GPU idle, so Inductor's autotuning can have that --------------------
UNIGEN_FAST_DISABLE=cpu,cuda,triton,autograd timeout 150 python3 -m unigen_fast bench --seconds 0 >/dev/null 2>&1 &
compiling_peers=$!
stage build.log 150 build python3 -m unigen_fast build
kill "$compiling_peers" 2>/dev/null # tests would disturb its timings
wait "$compiling_peers" 2>/dev/null
stage build.log 30 "CUDA kernels loaded" python3 -c 'import sys, unigen_fast as uf
print(uf.info())
sys.exit(not any(b.name == "cuda" and b.loaded for b in uf.info().backends))'

# ---- tests -------------------------------------------------------------------------------------------------------------
# one row for each op, at sizes that end within a vector
SMALL="test_row_equals_eager and float32 and (log_mean_exp_64 or iwae_loss_50 or importance_weights or effective \
or logits_64 or patchgan or iwgan_generator or gaussian_kl_tiny or kl_latent or bernoulli_784_small \
or iwae_bernoulli_original)"
pytest=(python3 -m pytest -q -p no:cacheprovider)
workers=()
if python3 -c "import xdist" 2>/dev/null; then workers=(-n 12 --dist worksteal); fi
stage tests.log 150 "tests, CUDA" "${pytest[@]}" "${workers[@]}" tests
triton_tests=()
for name in triton bench importance adversarial divergence likelihood objectives; do
    if [[ -f tests/test_$name.py ]]; then triton_tests+=("tests/test_$name.py"); fi
done
stage triton.log 90 "tests, Triton" env UNIGEN_FAST_DISABLE=cuda "${pytest[@]}" "${workers[@]}" "${triton_tests[@]}"

# ---- benchmarks --------------------------------------------------------------------------------------------------------
bench=(python3 -m unigen_fast bench --device cuda --seconds 0.4)
stage bench.log 240 "benchmarks, CUDA" "${bench[@]}" --all --json "$OUT/$slug-cuda.json"
stage bench.log 90 "benchmarks, Triton" env UNIGEN_FAST_DISABLE=cuda "${bench[@]}" --dtype float32 \
    --json "$OUT/$slug-triton.json"

# ---- compute-sanitizer: without PyTorch's cache of memory, which would hide a write past the end of a tensor ------------
if command -v compute-sanitizer >/dev/null; then
    sanitize=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --target-processes all --error-exitcode 86)
    stage sanitizer.log 120 memcheck "${sanitize[@]}" --tool memcheck "${pytest[@]}" tests/test_bench.py -k "$SMALL"
    if ((DEADLINE - SECONDS > 45)); then
        stage sanitizer.log 120 racecheck "${sanitize[@]}" --tool racecheck "${pytest[@]}" tests/test_bench.py -k "$SMALL"
    else
        note "left out: racecheck, no time"
    fi
else
    note "left out: compute-sanitizer is not installed"
fi

grep -hE "^(faster in|[0-9]+ rows with)" "$OUT/bench.log" | tee -a "$summary"
for log in tests triton; do
    echo "$log: $(tail -n 1 "$OUT/$log.log")" | tee -a "$summary"
done
note "$SECONDS s in all"
exit "$failed"
