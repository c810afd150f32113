#!/usr/bin/env bash
# Measures latentjax on a machine with an NVIDIA GPU (H100, H200): step times for every R, and the same step in PyTorch.
#
#     pip install -e '.[cuda,peer,gpu-masks]'
#     launch/bench_gpu.sh
#
# Leaves one JSON file for each part in $OUT, with its log beside it, and prints a summary of them. A part that fails is
# named at the end, and the others are measured all the same. All may be set in the environment:
#
#   OUT         where results go (./bench-results)
#   RECIPES     what is measured (configs/pile_410m.py configs/pile_1b.py)
#   BATCHES     sequences of a step, one number for each recipe (16 4); both ours and the peer
#               are in memory at once, which 80 GB allow
#   ATTENTION   backends (cudnn tokamax xla)
#   MASKS       whether documents are kept apart (false true)
#   OVERRIDES   further --config flags, for every part
#   ROUNDS      turns of each program (5), and STEPS, training steps of a turn (2)
#   LARGEST     1: also seek the largest batch that fits each (takes long); 0: do not
#   PYTHON      the interpreter (python)
#   PART_LIMIT  seconds after which a part is given up (7200)
#
# Ends with status 1 if a part failed; a step time out of proportion is reported, and is no failure.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

OUT=${OUT:-./bench-results}
PYTHON=${PYTHON:-python}
ROUNDS=${ROUNDS:-5}
STEPS=${STEPS:-2}
LARGEST=${LARGEST:-1}
PART_LIMIT=${PART_LIMIT:-7200}
read -ra recipes <<<"${RECIPES:-configs/pile_410m.py configs/pile_1b.py}"
read -ra batches <<<"${BATCHES:-16 4}"
read -ra backends <<<"${ATTENTION:-cudnn tokamax xla}"
read -ra masks <<<"${MASKS:-false true}"
read -ra overrides <<<"${OVERRIDES:-}"

if [ "${#batches[@]}" -ne "${#recipes[@]}" ]; then
  echo "BATCHES has ${#batches[@]} numbers for ${#recipes[@]} recipes: give one for each" >&2
  exit 2
fi
mkdir -p "$OUT" || exit 2
failed=()

# measure NAME ARGUMENTS: one part, whose JSON goes to NAME.json.
measure() {
  local name=$1 status
  shift
  echo "== $name"
  # Results go to the file, and what is said on the way to the log and the terminal.
  # shellcheck disable=SC2069
  timeout "$PART_LIMIT" "$PYTHON" -m latentjax.bench "$@" --rounds "$ROUNDS" --steps "$STEPS" --json \
    2>&1 >"$OUT/$name.part" | tee "$OUT/$name.log" >&2
  status=${PIPESTATUS[0]}
  # Status 1 with results: a promised figure was missed or a largest batch not found, as the results or the log say.
  if [ "$status" -gt 1 ] || [ ! -s "$OUT/$name.part" ]; then
    rm -f "$OUT/$name.part"
    failed+=("$name (status $status): $(tail -n 1 "$OUT/$name.log" 2>/dev/null)")
    echo "== $name failed with status $status, going on" >&2
    return
  fi
  mv "$OUT/$name.part" "$OUT/$name.json"
}

if command -v nvidia-smi >/dev/null; then
  nvidia-smi | tee "$OUT/nvidia-smi.txt"
fi

for index in "${!recipes[@]}"; do
  recipe=${recipes[$index]}
  for mask in "${masks[@]}"; do
    for backend in "${backends[@]}"; do
      name="$(basename "${recipe%.py}")-$backend-masks-$mask"
      common=(
        --config "$recipe"
        "--config.data.sequence_length=2048"
        "--config.data.batch_size=${batches[$index]}"
        "--config.model.dtype=bfloat16"
        "--config.model.attention=$backend"
        "--config.data.mask_documents=$mask"
        ${overrides[@]+"${overrides[@]}"}
      )
      measure "step-$name" step "${common[@]}"
      largest=()
      # The largest batch does not depend on much else: it is sought with the first backend.
      if [ "$LARGEST" = 1 ] && [ "$backend" = "${backends[0]}" ]; then
        largest=(--largest_batch)
      fi
      measure "peer-$name" peer "${common[@]}" "--config.recurrence.train_jacobi_iterations=(3,)" \
        ${largest[@]+"${largest[@]}"}
    done
  done
done

echo
echo "== summary of $OUT"
"$PYTHON" - "$OUT" <<'END'
import json
import sys
from pathlib import Path

for path in sorted(Path(sys.argv[1]).glob("*.json")):
    report = json.loads(path.read_text())
    if path.name.startswith("step-"):
        for each in report["programs"]:
            mfu = "" if each["mfu"] is None else f", MFU {each['mfu']:.1%}"
            print(
                f"{path.stem}: C={each['num_latent_thoughts']} R={each['num_jacobi_iterations']} "
                f"{1e3 * each['median']:,.1f} ms a step, {each['tokens_per_second']:,.0f} tokens/s{mfu}"
            )
        for each in report["ratios"]:
            (c, r), (base_c, base_r) = each["large"], each["small"]
            verdict = "" if each["holds"] else "  OUT OF PROPORTION"
            print(
                f"{path.stem}: C={c} R={r} / C={base_c} R={base_r}: time {each['time_median']:.3f}, token-forwards "
                f"{each['token_forwards']:.3f}, model FLOPs {each['model_flops']:.3f}{verdict}"
            )
    else:
        largest = report.get("largest_batch", {})
        print(
            f"{path.stem}: ours / peer {report['best_ratio']:.3f} best, {report['median_ratio']:.3f} median "
            f"(peer: {report['variant']})" + "".join(f"; largest batch, {side}: {n}" for side, n in largest.items())
        )
END

if [ "${#failed[@]}" -gt 0 ]; then
  echo
  echo "== parts that failed"
  printf '%s\n' "${failed[@]}"
  exit 1
fi
