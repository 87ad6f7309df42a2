#!/usr/bin/env bash
# Tries the library on a GPU, in ten minutes, on a machine without a network. See `tools/gpu_check.sh help`.
set -Euo pipefail

usage() {
  cat <<'HELP'
usage: tools/gpu_check.sh prepare FOLDER   here: puts into FOLDER what the other machine lacks, packed: the headers and
                                           libraries of Debian packages, exported models without their large weights
       tools/gpu_check.sh run FOLDER       there: builds, runs the differential tests on the GPU, measures
       tools/gpu_check.sh help

The machine of `run` needs g++, CMake 3.25, ninja, nvcc, and a Python with PyTorch 2.11 or later that has CUDA; with
transformers in it, decode steps of that are timed too, and with compute-sanitizer one pass is checked for accesses out
of bounds. Nothing is downloaded. A step that fails is reported, and the others go on. What was found goes to
FOLDER/out/figures.json, what each step printed to FOLDER/out/STEP.log. The exit status is 1 if a step failed.

Environment:
  PYTHON                     the Python with PyTorch (default: python3); `prepare` needs transformers in it
  LLMCACHE_MODELS_DIR        prepare: folder of the exported tiny models (default: build/models)
  LLMCACHE_GPU_CHECK_MODELS  prepare: which models are measured (default: all of tools/gpu/hollow_models.py)
  LLMCACHE_GPU_CHECK_DEVICE  run: cuda (default), or cpu, to try all but the GPU with small models
  LLMCACHE_GPU_CHECK_SECONDS run: no step goes on for longer, all together (default: 570)
  LLMCACHE_GPU_CHECK_BIN     run: programs that are there already; nothing is built
  LLMCACHE_GPU_CHECK_OUT     run: where logs and figures go (default: FOLDER/out)
  LLMCACHE_GPU_CHECK_TESTS   run: the filter of the differential tests (default: those of all tiny models)
  LLMCACHE_JOBS              run: compile jobs at once (default: one a core)
HELP
}

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
readonly ROOT
readonly PYTHON="${PYTHON:-python3}"
# With what their CMake packages name.
readonly PACKAGES=(libeigen3-dev libfmt-dev libfmt9 libgtest-dev libgmock-dev nlohmann-json3-dev libcli11-dev
  libxxhash-dev libsodium-dev libsodium23 libbenchmark-dev libbenchmark1debian)

die() {
  echo "gpu_check.sh: $1" >&2
  exit 1
}

# --- prepare --------------------------------------------------------------------------------------

prepare() {  # folder
  local folder="$1" models="${LLMCACHE_MODELS_DIR:-$ROOT/build/models}" work
  set -e
  compgen -G "$models/tiny-*.json" >/dev/null || die "no tiny models in $models: export them, or set LLMCACHE_MODELS_DIR"
  mkdir -p "$folder"
  work="$(mktemp -d)"
  # shellcheck disable=SC2064  # of now
  trap "rm -rf '$work'" EXIT
  local package
  for package in "${PACKAGES[@]}"; do
    dpkg -L "$package" || die "the Debian package $package is not installed"
  done | grep -E '^/usr/(include|lib|share/(cmake|eigen3))/' | sort -u | while read -r file; do
    [[ -d $file && ! -L $file ]] || echo "${file#/}"
  done >"$work/files"
  tar -czf "$folder/packages.tar.gz" -C / -T "$work/files"
  # shellcheck disable=SC2086  # several names in one variable
  "$PYTHON" "$ROOT/tools/gpu/hollow_models.py" make "$work/models" ${LLMCACHE_GPU_CHECK_MODELS:-}
  find "$models" -maxdepth 1 -name 'tiny-*' -exec cp -t "$work/models" {} +
  rm -f "$work/models/.lock"
  tar -czf "$folder/models.tar.gz" -C "$work" models
  du -h "$folder"/*.tar.gz
}

# --- run ------------------------------------------------------------------------------------------

left() { echo $((STARTED + LIMIT - SECONDS)); }

attempt() {  # name, seconds, command...: says what became of it, and goes on
  local name="$1" seconds="$2" status=0 began=$SECONDS
  shift 2
  ((seconds <= $(left))) || seconds="$(left)"
  printf '== %s\n' "$name"
  if ((seconds <= 0)); then
    status=124
    echo "no time was left" >"$OUT/$name.log"
  else
    timeout --kill-after=5 "$seconds" "$@" >"$OUT/$name.log" 2>"$OUT/$name.err" </dev/null || status=$?
  fi
  printf '%s %d %d\n' "$name" "$status" $((SECONDS - began)) >>"$OUT/steps"
  if ((status == 0)); then
    printf -- '-- %s: %d s\n' "$name" $((SECONDS - began))
  else
    printf -- '-- %s: FAILED (exit status %d) after %d s\n' "$name" "$status" $((SECONDS - began))
    tail -n 15 "$OUT/$name.log" "$OUT/$name.err" 2>/dev/null
  fi
  return 0
}

build() {  # build folder, targets
  local folder="$1" prefix
  shift
  prefix="$("$PYTHON" -c 'import torch; print(torch.utils.cmake_prefix_path)')"
  if [[ $DEVICE == cuda ]]; then  # nothing is compiled for it, but CMake's package of PyTorch asks
    TORCH_CUDA_ARCH_LIST="$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)"
    export TORCH_CUDA_ARCH_LIST
  fi
  # No unity build: with many cores many small files are done sooner.
  attempt configure 90 cmake -S "$ROOT" -B "$folder" -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_CXX_FLAGS_RELEASE="-O2 -DNDEBUG" \
    "-DCMAKE_PREFIX_PATH=$WORK/usr;$prefix" -DCMAKE_RUNTIME_OUTPUT_DIRECTORY="$BIN" \
    -DLLMCACHE_WERROR=OFF -DLLMCACHE_BUILD_EXAMPLES=OFF -DLLMCACHE_INSTALL=OFF
  attempt build 330 cmake --build "$folder" --target "$@" --parallel "${LLMCACHE_JOBS:-$(nproc)}" -- -k 0
}

measure() {  # model, arguments
  local model="$1"
  shift
  attempt "bench-$model" 150 "$BIN/llmcache-device-bench" --device "$DEVICE" --model "$MODELS/$model.pt" "$@"
}

versions() {
  uname -sr
  "$PYTHON" --version
  "$PYTHON" -c 'import torch; print("torch", torch.__version__)'
  "$PYTHON" -c 'import transformers; print("transformers", transformers.__version__)' || echo "no transformers"
  cmake --version | head -n 1
  c++ --version | head -n 1
  if [[ $DEVICE == cuda ]]; then
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    nvcc --version | tail -n 2
  fi
}

unpack() {
  mkdir -p "$WORK"
  tar -xzf "$FOLDER/packages.tar.gz" -C "$WORK" && tar -xzf "$FOLDER/models.tar.gz" -C "$WORK"
}

run() {  # folder
  FOLDER="$(realpath -- "$1")"
  [[ -f $FOLDER/packages.tar.gz && -f $FOLDER/models.tar.gz ]] || die "nothing was prepared in $FOLDER"
  DEVICE="${LLMCACHE_GPU_CHECK_DEVICE:-cuda}"
  OUT="$(realpath -m -- "${LLMCACHE_GPU_CHECK_OUT:-$FOLDER/out}")"
  WORK="$OUT/work"
  MODELS="$WORK/models"
  BIN="${LLMCACHE_GPU_CHECK_BIN:-$WORK/bin}"
  LIMIT="${LLMCACHE_GPU_CHECK_SECONDS:-570}"
  STARTED=$SECONDS
  rm -rf "$OUT"
  mkdir -p "$OUT"
  export LLMCACHE_MODELS_DIR="$MODELS" OMP_NUM_THREADS=1
  export -f unpack versions
  export FOLDER WORK DEVICE PYTHON
  [[ $DEVICE != cuda || -x $(command -v nvcc) ]] || export PATH="$PATH:/usr/local/cuda/bin"
  local models=(bert-base-bf16 gpt2-bf16) contexts=(128 512 1000) sizes=()
  if [[ $DEVICE == cpu ]]; then  # shows that the script works, not how fast anything is
    models=(bert-small-bf16 gpt2-small-bf16)
    contexts=(16 64)
    sizes=(--rounds 3 --tokens 32 --lasts 32 64 --contexts 16 64 --prefixes 128 256)
  fi
  attempt unpack 60 bash -c unpack
  attempt versions 60 bash -c versions
  [[ -n ${LLMCACHE_GPU_CHECK_BIN:-} ]] || build "$WORK/build" llmcache-tests llmcache-device-bench
  attempt differential 120 "$BIN/llmcache-tests" --device="$DEVICE" \
    --gtest_output="json:$OUT/tests.json" \
    --gtest_filter="${LLMCACHE_GPU_CHECK_TESTS:-Tiny/Differential.*:All/Prefix.AnswersAsThePlainModelDoes/tiny_*}"
  attempt fill 90 "$PYTHON" "$ROOT/tools/gpu/hollow_models.py" fill "$MODELS" "${models[@]}"
  local model
  for model in "${models[@]}"; do measure "$model" "${sizes[@]}"; done
  attempt transformers 90 "$PYTHON" "$ROOT/tools/gpu/transformers_steps.py" "$MODELS/${models[1]}.json" \
    --device "$DEVICE" --contexts "${contexts[@]}"
  local sanitizer
  if sanitizer="$(command -v compute-sanitizer)" && [[ $DEVICE == cuda ]]; then
    attempt memcheck 90 "$sanitizer" --tool memcheck --error-exitcode 9 "$BIN/llmcache-tests" --device=cuda \
      --gtest_filter=All/Prefix.AnswersAsThePlainModelDoes/tiny_gpt2_sdpa
  else
    echo "-- memcheck: left out, no compute-sanitizer"
  fi
  "$PYTHON" "$ROOT/tools/gpu/figures.py" "$OUT" --device "$DEVICE"
}

case "${1:-help}" in
  prepare | run)
    (($# == 2)) || { usage >&2; exit 2; }
    "$1" "$2"
    ;;
  help | -h | --help) usage ;;
  *)
    usage >&2
    exit 2
    ;;
esac
