#!/usr/bin/env bash
# The whole PAPO pipeline, one command per stage. Stages exchange data only through the directories named here.
#
#   bash run_all.sh [--config FILE] [--name NAME] [--set SECTION.KEY=VALUE ...] [--stages 1,2,4-6] [--resident] [--dry-run]
#
#   --config   configuration (default configs/demo.yaml: a tiny Qwen2.5-VL learns to count, on a CPU)
#   --name     the run is made in runs/NAME (default: the name of the configuration file)
#   --set      override one configuration value; may be repeated
#   --stages   run only these stages (default all)
#   --resident stages 4 and 5 stay up for all iterations: the same outputs, no process start and no reload in between
#   --dry-run  print the commands instead of running them
#
# Killed or failed? The same command continues where it stopped: finished stages are recognised by their manifests.
# TRAIN_LAUNCHER and SFT_LAUNCHER replace the torchrun of stages 5 and 2 (several nodes: see stages/submit.slurm).
set -euo pipefail
cd "$(dirname "$0")"

CONFIG=configs/demo.yaml NAME='' CHOSEN=all DRY_RUN=0 RESIDENT=0 OVERRIDES=()
while (($#)); do
  case $1 in
    --config | --name | --set | --stages)
      (($# > 1)) || { echo "error: $1 needs a value: see --help" >&2; exit 2; }
      case $1 in
        --config) CONFIG=$2 ;;
        --name) NAME=$2 ;;
        --set) OVERRIDES+=(--set "$2") ;;
        --stages) CHOSEN=$2 ;;
      esac
      shift 2 ;;
    --dry-run) DRY_RUN=1; shift ;;
    --resident) RESIDENT=1; shift ;;
    -h | --help) sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "error: unknown argument $1: see --help" >&2; exit 2 ;;
  esac
done
[[ -n $NAME ]] || NAME=$(basename "$CONFIG" .yaml)
[[ $NAME =~ ^[A-Za-z0-9._-]+$ ]] || { echo "error: --name $NAME: use letters, digits, dot, dash and underscore" >&2; exit 2; }

bash tools/setup_environment.sh
export PATH=$PWD/.venv/bin:$PATH OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
PLAN=$(python -m tools.plan --config "$CONFIG" "${OVERRIDES[@]}" --stages "$CHOSEN")
eval "$PLAN" # BASE_MODEL ITERATIONS SFT_PROCESSES TRAIN_PROCESSES ROLLBACK_ITERATIONS STAGES
SETTINGS=(--config "$CONFIG" "${OVERRIDES[@]}")

RUN=runs/$NAME
DATA=$RUN/data
BASE=${BASE_MODEL:-$DATA/model}
START=$([[ $SFT_PROCESSES -gt 0 ]] && echo "$RUN/sft" || echo "$BASE")
REFERENCE=$RUN/reference
SERVER=$RUN/server
read -ra TRAIN_LAUNCHER <<<"${TRAIN_LAUNCHER:-torchrun --standalone --nproc-per-node $TRAIN_PROCESSES}"
read -ra SFT_LAUNCHER <<<"${SFT_LAUNCHER:-torchrun --standalone --nproc-per-node $SFT_PROCESSES}"

CHILDREN=()
finish() {
  trap - EXIT INT TERM
  ((${#CHILDREN[@]} == 0)) || kill -TERM "${CHILDREN[@]}" 2>/dev/null || true
  if [[ -d $SERVER ]]; then python -m tools.sglang_server stop --server "$SERVER" || true; fi
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

stage() { # NUMBER COMMAND...
  local number=$1
  shift
  [[ " $STAGES " == *" $number "* ]] || return 0
  if ((DRY_RUN)); then printf '%q ' "$@"; echo; return; fi
  start "$@"
  wait "${CHILDREN[0]}"
  CHILDREN=()
}

start() { # COMMAND..., in the background
  mkdir -p "$RUN"
  { echo; printf '== '; printf '%q ' "$@"; echo; } | tee -a "$RUN/log.txt"
  "$@" > >(tee -a "$RUN/log.txt") 2>&1 &
  CHILDREN+=($!)
}

# 1. Prompts and pictures (and the tiny model of the demo)
stage 1 python -m stages.stage1_prepare_data "${SETTINGS[@]}" --output "$DATA"

# 2. Supervised cold start with DeepSpeed, if the configuration has one
if ((SFT_PROCESSES > 0)); then
  stage 2 "${SFT_LAUNCHER[@]}" -m stages.stage2_sft "${SETTINGS[@]}" --data "$DATA" --hf "$BASE" --output "$START"
fi

# 3. Hugging Face -> Megatron: the start of training and the frozen reference of KL_ref
stage 3 python -m stages.stage3_convert_to_megatron "${SETTINGS[@]}" --hf "$START" --output "$REFERENCE"

# 7. How good is the model before PAPO?
stage 7 python -m stages.stage7_evaluate "${SETTINGS[@]}" --data "$DATA" --hf "$START" --server "$SERVER" --output "$RUN/evaluation/iteration_0000"

# 4, 5, 6. Rollouts, PAPO, back to Hugging Face: once per iteration
HF=$START
if ((RESIDENT)); then
  ROLLOUT=(python -m stages.stage4_rollout "${SETTINGS[@]}" --follow "$RUN")
  TRAIN=("${TRAIN_LAUNCHER[@]}" -m stages.stage5_train "${SETTINGS[@]}" --follow "$RUN")
  if ((DRY_RUN)); then
    stage 4 "${ROLLOUT[@]}"
    stage 5 "${TRAIN[@]}"
  elif [[ $STAGES == *"4 5 6"* ]]; then
    start "${ROLLOUT[@]}"
    start "${TRAIN[@]}"
    wait -n "${CHILDREN[@]}" # whichever ends first; a failed one ends the run, and finish() the other
    for child in "${CHILDREN[@]}"; do wait "$child"; done
    CHILDREN=()
  elif [[ $STAGES == *[456]* ]]; then
    echo "error: --resident runs stages 4, 5 and 6 together: --stages $CHOSEN leaves some out" >&2
    exit 2
  fi
  HF=$RUN/iterations/$(printf %04d "$ITERATIONS")/hf
else
  MEGATRON=$REFERENCE PREVIOUS=() ROLLBACK=() CHECKPOINTS=("$REFERENCE")
  for ((i = 1; i <= ITERATIONS; i++)); do
    IT=$RUN/iterations/$(printf %04d "$i")
    stage 4 python -m stages.stage4_rollout "${SETTINGS[@]}" --iteration "$i" --data "$DATA" --hf "$HF" --server "$SERVER" "${PREVIOUS[@]}" \
      --output "$IT/rollouts"
    stage 5 "${TRAIN_LAUNCHER[@]}" -m stages.stage5_train "${SETTINGS[@]}" --iteration "$i" --data "$DATA" --rollouts "$IT/rollouts" \
      --megatron "$MEGATRON" --reference "$REFERENCE" "${ROLLBACK[@]}" --output "$IT/megatron"
    stage 6 python -m stages.stage6_convert_to_hf "${SETTINGS[@]}" --megatron "$IT/megatron" --output "$IT/hf"
    stage 6 python -m tools.keep_checkpoints "${SETTINGS[@]}" --iterations "$RUN/iterations" --newest "$i"
    HF=$IT/hf MEGATRON=$IT/megatron PREVIOUS=(--previous "$IT/rollouts")
    CHECKPOINTS+=("$MEGATRON")
    if ((ROLLBACK_ITERATIONS > 0)); then # where the hacking guard of the next iteration may go back to
      ROLLBACK=(--rollback "${CHECKPOINTS[i > ROLLBACK_ITERATIONS ? i - ROLLBACK_ITERATIONS : 0]}")
    fi
  done
fi

# 7. And after?
LAST=$RUN/evaluation/iteration_$(printf %04d "$ITERATIONS")
stage 7 python -m stages.stage7_evaluate "${SETTINGS[@]}" --data "$DATA" --hf "$HF" --server "$SERVER" --output "$LAST"
stage 7 python -m tools.summarize --run "$RUN" --cold-start "$RUN/evaluation/iteration_0000" --papo "$LAST" --hf "$HF"
