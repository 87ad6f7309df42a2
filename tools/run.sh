#!/usr/bin/env bash
# From nothing on a fresh Debian 12 to test results or a benchmark report. See `tools/run.sh help`.
set -Eeuo pipefail

usage() {
  cat <<'HELP'
usage: tools/run.sh test  [ctest arguments]            build everything, run all tests, then some of them with sanitizers,
                                                       which fuzz the readers of files too
       tools/run.sh bench [llmcache-bench arguments]   build, measure, end in a summary and an HTML report
       tools/run.sh data  [--only NAME...]             download real data sets from the Hugging Face hub
       tools/run.sh peers [benchmarks/peers/compare.py arguments]   measure beside ONNX Runtime, llama.cpp and others
       tools/run.sh help

All install what is missing (Debian packages with apt-get, Python packages in a virtual environment), export
the models, prepare the data, configure and build. A second call does only what is missing.
`bench --config NAME` runs a configuration of benchmarks/configs. `bench --model NAME...` and `bench --workload NAME...`
export and prepare only those. `bench --workload openbookqa-5shot` puts five solved examples in front of each
question, the same for all. `bench --fidelity budget` fits probes on a part of the training text, the rest of which
calibrates. `bench --download` is `data`, then `bench`; where the hub cannot be reached it goes on with what is there.

Environment:
  LLMCACHE_BUILD_DIR   where everything goes (default: build, in the repository)
  LLMCACHE_RAW_DATA    folder with raw data sets (default: what `data` downloaded, and what that lacks from
                       ../shared/data beside the repository, if there; for workloads without any, the benchmark uses
                       the sample in data/sample)
  LLMCACHE_PIP_ARGS    further arguments for pip install, such as an index with CPU builds of torch
  LLMCACHE_JOBS        jobs at once: compilers, tests, small models exported (default: one for each core and 2 GiB of free memory)
  LLMCACHE_BUILD_TYPE  CMake build type (default: Release)
  LLMCACHE_CMAKE_ARGS  further arguments for cmake
  LLMCACHE_SKIP_SANITIZERS  1: test without AddressSanitizer, UndefinedBehaviorSanitizer, ThreadSanitizer and libFuzzer
  PYTHON               Python 3.11 or newer (default: /usr/bin/python3)
  Torch_DIR            a LibTorch's share/cmake/Torch (default: that of the virtual environment's torch)
HELP
}

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
readonly ROOT
readonly PACKAGES=(cmake ninja-build g++ ccache python3 python3-venv git ca-certificates libeigen3-dev libfmt-dev
  libgtest-dev libgmock-dev libbenchmark-dev nlohmann-json3-dev libcli11-dev libxxhash-dev libsodium-dev
  libhiredis-dev)
# Of the tests only: a compiler with libFuzzer, a formatter, a browser that opens the report, what serves metrics, a
# server that they start as a store.
readonly TEST_PACKAGES=(clang clang-format libclang-rt-14-dev chromium fonts-dejavu-core prometheus-cpp-dev redis-server)

BUILD="${LLMCACHE_BUILD_DIR:-$ROOT/build}"
BUILD="$(realpath -m -- "$BUILD")"
readonly BUILD
readonly MODELS="$BUILD/models" RAW="$BUILD/raw" DATA="$BUILD/data" BIN="$BUILD/bin" CMAKE_DIR="$BUILD/cmake"
readonly TESTS_DIR="$BUILD/tests"
readonly VENV="$BUILD/venv"
readonly VENV_PYTHON="$VENV/bin/python"
readonly PEERS_VENV="$BUILD/peers-venv"

PROBE_SHARE_FOR_BUDGETS=0.4
HUB_UNREACHABLE=3  # exit status of download_data.py
STEP="" HINT="" STARTED=0

step() {  # step NAME HINT: what is about to run, and what to do should it fail
  end_step
  STEP="$1" HINT="$2" STARTED=$SECONDS
  printf '\n== %s\n' "$STEP"
}

end_step() {
  if [[ -n $STEP ]]; then
    printf -- '-- %s: %d s\n' "$STEP" $((SECONDS - STARTED))
  fi
  STEP=""
}

on_exit() {
  local status=$?
  if ((status != 0)) && [[ -n $STEP ]]; then
    printf '\nrun.sh: step failed: %s (exit status %d)\n        %s\n' "$STEP" "$status" "$HINT" >&2
  fi
}
trap on_exit EXIT

die() {
  HINT="$1"
  exit 1
}

# --- steps ----------------------------------------------------------------------------------------

install_packages() {  # packages
  step "Debian packages" "read apt's messages above; with a network problem, try again"
  if ! command -v dpkg-query >/dev/null; then
    echo "not a Debian system: expecting the equivalents of $* to be installed"
    return
  fi
  local package missing=()
  for package in "$@"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  if ((${#missing[@]} == 0)); then
    echo "all $# are installed, skipped"
    return
  fi
  echo "missing: ${missing[*]}"
  local sudo=()
  if ((EUID != 0)); then
    command -v sudo >/dev/null || die "run as root: apt-get install ${missing[*]}"
    sudo=(sudo)
  fi
  "${sudo[@]}" apt-get update
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"
}

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} /usr/bin/python3 python3; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
    [[ -z ${PYTHON:-} ]] || break
  done
  return 1
}

make_venv() {
  step "Python packages" "read pip's messages above; a download that was cut off continues with the next call"
  local python stamp wanted
  python="$(find_python)" || die "no Python 3.11 or newer with venv${PYTHON:+ at PYTHON=$PYTHON}; set PYTHON to one"
  stamp="$VENV/.requirements"
  wanted="$(cat "$ROOT"/tools/requirements*.txt <("$python" --version) | sha256sum)"
  if [[ -x $VENV_PYTHON && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    echo "$VENV is up to date, skipped"
    return
  fi
  "$python" -m venv "$VENV"
  # shellcheck disable=SC2086  # several arguments in one variable
  "$VENV_PYTHON" -m pip install ${LLMCACHE_PIP_ARGS:-} -r "$ROOT/tools/requirements.txt"
  # shellcheck disable=SC2086
  "$VENV_PYTHON" -m pip install ${LLMCACHE_PIP_ARGS:-} --no-deps -r "$ROOT/tools/requirements-nodeps.txt"
  echo "$wanted" >"$stamp"
}

export_models() {  # names or groups
  step "models: $*" "the names are shown by: $VENV_PYTHON tools/models/export_models.py --list"
  "$VENV_PYTHON" "$ROOT/tools/models/export_models.py" --out "$MODELS" --only "$@"
}

export_small_models() {  # names or groups: several at once
  export_models "$@" --jobs "$(jobs_at_once)"
}

# Fails with HUB_UNREACHABLE, and nothing else to say, where there is no hub.
download_data() {  # arguments for download_data.py
  step "download" "see the message above; a next call goes on with what is missing"
  local status=0
  "$VENV_PYTHON" "$ROOT/tools/data/download_data.py" --out "$RAW" "$@" || status=$?
  if ((status == HUB_UNREACHABLE)); then
    STEP=""
  fi
  return "$status"
}

prepare_data() {  # arguments for prepare_data.py
  step "data" "see the message above; LLMCACHE_RAW_DATA names the folder with the raw data sets"
  "$VENV_PYTHON" "$ROOT/tools/data/prepare_data.py" --downloaded "$RAW" --out "$DATA" "$@"
}

fit_probes() {  # arguments for fit_probe.py
  step "probes" "see the message above; they are fitted on the token files in $DATA"
  "$VENV_PYTHON" "$ROOT/tools/models/fit_probe.py" --models "$MODELS" --data "$DATA" "$@"
}

jobs_at_once() {
  local cores free_gib
  cores="$(nproc)"
  free_gib="$(awk '/^MemAvailable:/ {print int($2 / 1048576)}' /proc/meminfo)"
  local by_memory=$((free_gib / 2))
  ((by_memory >= 1)) || by_memory=1
  echo "${LLMCACHE_JOBS:-$((cores < by_memory ? cores : by_memory))}"
}

configure() {  # preset, folder, arguments for cmake
  local preset="$1" folder="$2"
  shift 2
  step "configure $preset" "see CMake's message above; a torch with CUDA needs the CUDA toolkit: without one, remove
        $VENV and set LLMCACHE_PIP_ARGS to install a CPU build, or set Torch_DIR"
  local arguments=("$@")
  if [[ -n ${Torch_DIR:-} ]]; then
    arguments+=(-DTorch_DIR="$Torch_DIR")
  else
    local prefix
    prefix="$("$VENV_PYTHON" -c 'import torch; print(torch.utils.cmake_prefix_path)')"
    arguments+=(-DCMAKE_PREFIX_PATH="$prefix")
  fi
  # shellcheck disable=SC2086
  cmake -S "$ROOT" --preset "$preset" -B "$folder" "${arguments[@]}" ${LLMCACHE_CMAKE_ARGS:-}
}

# What another compiler than Debian's warns of stops nobody who only wants to measure.
configure_release() {
  configure release "$CMAKE_DIR" -DCMAKE_BUILD_TYPE="${LLMCACHE_BUILD_TYPE:-Release}" \
    -DCMAKE_RUNTIME_OUTPUT_DIRECTORY="$BIN" -DLLMCACHE_WERROR=OFF
}

build() {  # folder, target
  local count
  count="$(jobs_at_once)"
  step "build $2 in $1 ($count jobs)" "see the compiler's first error above; short of memory? set LLMCACHE_JOBS=1"
  cmake --build "$1" --target "$2" --parallel "$count"
}

run_tests() {  # arguments for ctest
  step "tests" "run one alone: tools/run.sh test -R NAME"
  ctest --test-dir "$TESTS_DIR" --parallel "$(jobs_at_once)" --output-on-failure "$@"
}

# Each sanitizer has a build of its own, of the library and its tests, below $BUILD. What is built how, which tests are
# run and what is suppressed stands in CMakePresets.json and tests/sanitizers.
run_sanitizer() {  # preset, target
  local preset="$1" target="$2" folder="$BUILD/$1" plain_addresses=()
  configure "$preset" "$folder"
  build "$folder" "$target"
  # ThreadSanitizer's runtime cannot start where the kernel randomises addresses by more bits than it knows of.
  if command -v setarch >/dev/null && setarch --addr-no-randomize true 2>/dev/null; then
    plain_addresses=(setarch --addr-no-randomize)
  fi
  step "tests with $preset" "the report above says where; LLMCACHE_SKIP_SANITIZERS=1 leaves the sanitizers out"
  (cd "$ROOT" && "${plain_addresses[@]}" ctest --preset "$preset" --parallel "$(jobs_at_once)" --test-dir "$folder")
}

run_benchmark() {  # arguments for llmcache-bench
  step "benchmark" "see the message above; the arguments are shown by: $BIN/llmcache-bench --help"
  "$BIN/llmcache-bench" --models "$MODELS" --data "$DATA" --json "$BUILD/results.json" "$@"
}

replay_trace() {  # eviction policies on a request trace, where the raw data has one
  local trace="${LLMCACHE_RAW_DATA:-$ROOT/../shared/data}/traces/mooncake_conversation.jsonl"
  step "eviction policies on a trace" "see the message above; the arguments are shown by: $BIN/llmcache-trace --help"
  if [[ -f $trace ]]; then
    "$BIN/llmcache-trace" --trace "$trace" --json "$BUILD/trace.json"
  else
    rm -f "$BUILD/trace.json"
    echo "no $trace: skipped"
  fi
}

write_report() {
  step "report" "the figures are in $BUILD/results.json"
  local figures=("$BUILD/results.json")
  [[ ! -f $BUILD/trace.json ]] || figures+=("$BUILD/trace.json")
  "$VENV_PYTHON" "$ROOT/tools/report/report.py" "${figures[@]}" -o "$BUILD/report.html"
  "$VENV_PYTHON" "$ROOT/tools/report/summary.py" "${figures[@]}" --report "$BUILD/report.html"
}

# --- commands -------------------------------------------------------------------------------------

setup() {  # further Debian packages
  mkdir -p "$BUILD"
  install_packages "${PACKAGES[@]}" "$@"
  make_venv
}

main_test() {
  setup "${TEST_PACKAGES[@]}"
  export_small_models tiny zoo minilm
  export_small_models exported --format pt2
  prepare_data --only sample
  configure tests "$TESTS_DIR" ${LLMCACHE_BUILD_TYPE:+-DCMAKE_BUILD_TYPE="$LLMCACHE_BUILD_TYPE"}
  build "$TESTS_DIR" all
  export LLMCACHE_MODELS_DIR="$MODELS" LLMCACHE_DATA_DIR="$DATA" LLMCACHE_BIN_DIR="$TESTS_DIR/bin" \
    LLMCACHE_PYTHON="$VENV_PYTHON"
  run_tests "$@"
  if (($# > 0)); then
    return  # only some tests were asked for
  fi
  if [[ ${LLMCACHE_SKIP_SANITIZERS:-0} == 1 ]]; then
    step "tests with sanitizers" ""
    echo "LLMCACHE_SKIP_SANITIZERS=1: skipped"
    return
  fi
  run_sanitizer asan-ubsan all
  run_sanitizer tsan llmcache-thread-tests
}

main_data() {
  setup
  download_data "$@"
}

main_bench() {
  local models workloads sample budgets argument arguments=() download=0
  for argument in "$@"; do
    case "$argument" in
      --download) download=1 ;;
      *) arguments+=("$argument") ;;
    esac
  done
  set -- "${arguments[@]}"
  setup
  if ((download)); then
    local status=0
    download_data || status=$?
    ((status == 0 || status == HUB_UNREACHABLE)) || exit "$status"
  fi
  configure_release
  build "$CMAKE_DIR" llmcache-bench
  build "$CMAKE_DIR" llmcache-trace
  if [[ " $* " =~ \ (-h|--help|--list|--schema|--version)\  ]]; then
    "$BIN/llmcache-bench" --models "$MODELS" --data "$DATA" "$@"
    return
  fi
  step "what the run needs" "see the message above; the arguments are shown by: $BIN/llmcache-bench --help"
  local needs
  needs="$("$BIN/llmcache-bench" --needs "$@")"
  echo "$needs"
  read -ra models < <(sed -n 's/^models //p' <<<"$needs")
  read -ra workloads < <(sed -n 's/^workloads //p' <<<"$needs")
  read -r sample < <(sed -n 's/^sample //p' <<<"$needs") || true
  read -r budgets < <(sed -n 's/^budgets //p' <<<"$needs")
  ((${#models[@]} == 0)) || export_models "${models[@]}"
  prepare_data ${workloads[0]:+--only "${workloads[@]}"}
  [[ -z $sample ]] || prepare_data --only "$sample"
  # The probes judge what a cache does to the answers on labelled workloads; they need one of these models.
  # An error budget is calibrated on training text that the probe was not fitted on, so that takes a part only.
  if [[ " ${models[*]} " =~ \ (bench|minilm-pooled|minilm-pooled-mask)\  ]]; then
    fit_probes ${budgets:+--fit-share "$PROBE_SHARE_FOR_BUDGETS"}
  fi
  run_benchmark "$@"
  replay_trace
  write_report
}

# A virtual environment of its own, which sees the packages of the other: the peers are for this comparison only.
make_peers_venv() {
  step "Python packages of the comparison" "read pip's messages above"
  local wanted
  wanted="$(cat "$ROOT/benchmarks/peers/requirements.txt" "$VENV/.requirements" | sha256sum)"
  if [[ -f $PEERS_VENV/.requirements && $(<"$PEERS_VENV/.requirements") == "$wanted" ]]; then
    echo "$PEERS_VENV is up to date, skipped"
    return
  fi
  "$VENV_PYTHON" -m venv "$PEERS_VENV"
  "$VENV_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$(
    "$PEERS_VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/tools.pth"
  local package missing=0
  while read -r package; do
    # shellcheck disable=SC2086
    "$PEERS_VENV/bin/python" -m pip install ${LLMCACHE_PIP_ARGS:-} "$package" </dev/null ||
      { echo "left out: $package"; missing=1; }
  done < <(grep -v '^#' "$ROOT/benchmarks/peers/requirements.txt")
  ((missing)) || echo "$wanted" >"$PEERS_VENV/.requirements"
}

main_peers() {
  local models workloads
  setup
  make_peers_venv
  local compare=("$PEERS_VENV/bin/python" "$ROOT/benchmarks/peers/compare.py") needs
  if [[ " $* " =~ \ (-h|--help|--list)\  ]]; then
    "${compare[@]}" "$@"
    return
  fi
  step "what the comparison needs" "see the message above; the arguments are shown by: benchmarks/peers/compare.py --help"
  needs="$("${compare[@]}" --needs "$@")"
  read -ra models < <(sed -n 's/^models //p' <<<"$needs")
  read -ra workloads < <(sed -n 's/^workloads //p' <<<"$needs")
  configure_release
  build "$CMAKE_DIR" llmcache-peer
  export_models "${models[@]}"
  ((${#workloads[@]} == 0)) || prepare_data --only "${workloads[@]}"
  step "comparison" "see the message above; the arguments are shown by: benchmarks/peers/compare.py --help"
  "${compare[@]}" --models "$MODELS" --bin "$BIN" --data "$DATA" \
    --onnx "$BUILD/onnx" --json "$BUILD/peers.json" --markdown "$BUILD/peers.md" "$@"
}

case "${1:-help}" in
  test | bench | data | peers)
    command="$1"
    shift
    "main_$command" "$@"
    end_step
    printf '\nrun.sh %s: done in %d s\n' "$command" "$SECONDS"
    ;;
  help | -h | --help) usage ;;
  *)
    usage >&2
    exit 2
    ;;
esac
