#!/usr/bin/env bash
# The whole PAPO pipeline, one command per stage. Stages exchange data only through directories below runs/NAME.
#
#   bash run_all.sh [--config FILE] [--name NAME] [--set SECTION.KEY=VALUE ...] [--stages 1,2,4-6] [--resident]
#                   [--dry-run [--plan SIZE]]
#
#   --config   configuration of a new run (default configs/demo.yaml: a tiny Qwen2.5-VL learns to count, on a CPU)
#   --name     the run is made in runs/NAME (default: the name of the configuration file)
#   --set      one configuration value; may be repeated. Of a run that exists: only keys that may change while it lives
#   --stages   run only these stages (default all)
#   --resident stages 4 and 5 stay up for all iterations: the same outputs, no process start and no reload in between
#   --dry-run  print the commands, what they read and what they make, and touch nothing
#   --plan     with --dry-run: what training needs on GPUs of this size, e.g. 80GB (docs/plan.md); known plans are printed anyway
#
# Killed or failed? bash run_all.sh --name NAME continues where it stopped: the run has its configuration in config.yaml.
# How far is it? .venv/bin/python -m tools.status --run runs/NAME
# On a machine with GPUs the demo, a tiny model, computes on its CPUs; DEVICE=cuda takes the GPUs, DEVICE=cpu the CPUs of any run.
# About to be killed? kill -USR1 its number: training ends its step and saves, and this ends with status 75.
# TRAIN_LAUNCHER, SFT_LAUNCHER replace torchrun of stages 5, 2; SERVER_LAUNCHER starts servers on nodes (docs/gpu.md).
set -euo pipefail
[[ " $* " != *" -h "* && " $* " != *" --help "* ]] || { sed -n '2,19s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0; }
trap 'exit 75' USR1
CALLER=$PWD ARGUMENTS=("$@")
printf -v RUN_ALL '%q ' bash run_all.sh "$@"
cd "$(dirname "${BASH_SOURCE[0]}")"
unset PYTHONPATH PYTHONHOME PYTHONOPTIMIZE PYTHONWARNINGS PYTHONSTARTUP PYTHONINSPECT # another project's
bash tools/setup_environment.sh --without-sglang
export RUN_ALL PATH=$PWD/.venv/bin:$PATH OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
[[ ! -t 1 ]] || export PAPO_TERMINAL=1
PYTHON=.venv/bin/python
source tools/pipeline.sh

plan() { # [--write]: sets RUN DRY_RUN DEVICE HIDE_GPUS, with --write ITERATIONS TODO FIRST RESIDENT SUMMARY START_SFT START_TRAIN
  local assignments
  assignments=$($PYTHON -m tools.start_run "${ARGUMENTS[@]}" --caller "$CALLER" "$@")
  eval "$assignments"
}

plan
((!HIDE_GPUS)) || export CUDA_VISIBLE_DEVICES=
DEVICE=$DEVICE bash tools/setup_environment.sh # SGLang for that device
if ((!DRY_RUN)); then
  lock_run
  rm -f "$RUN/stage5_train.end" # a request to the one before
  trap finish EXIT
  trap end_soon USR1
  trap 'exit 130' INT
  trap 'exit 143' TERM
fi
plan --write
read -ra SFT <<<"${SFT_LAUNCHER:-$START_SFT}"
read -ra TRAIN <<<"${TRAIN_LAUNCHER:-$START_TRAIN}"

# 1. Prompts and pictures, of every evaluation set, too (and the tiny model of the demo)
stage 1 $PYTHON -m stages.stage1_prepare_data --run "$RUN"

# 2. Supervised cold start with DeepSpeed, if the configuration has one
stage 2 "${SFT[@]}" -m -- stages.stage2_sft --run "$RUN"

# 3. Hugging Face -> Megatron: the start of training and the frozen reference of KL_ref
stage 3 $PYTHON -m stages.stage3_convert_to_megatron --run "$RUN"

# 7. How good is the model before PAPO?
stage 7:0 $PYTHON -m stages.stage7_evaluate --run "$RUN" --iteration 0

if ((RESIDENT && FIRST)); then # 4 and 5 side by side for all iterations; 5 does 6's work, 4 does 7's but for the last
  start 4 $PYTHON -m stages.stage4_rollout --run "$RUN" --iterations "$FIRST-$ITERATIONS"
  start 5 "${TRAIN[@]}" -m -- stages.stage5_train --run "$RUN" --iterations "$FIRST-$ITERATIONS"
  side_by_side
  if ((DRY_RUN)); then TODO=7:$ITERATIONS; else plan --write; fi # what is left
fi

# 4, 5, 6. Rollouts, PAPO, back to Hugging Face: once per iteration; 7 every evaluate_every iterations and at the end
for ((i = 1; i <= ITERATIONS; i++)); do
  stage "4:$i" $PYTHON -m stages.stage4_rollout --run "$RUN" --iteration "$i"
  stage "5:$i" "${TRAIN[@]}" -m -- stages.stage5_train --run "$RUN" --iteration "$i"
  stage "6:$i" $PYTHON -m stages.stage6_convert_to_hf --run "$RUN" --iteration "$i"
  stage "7:$i" $PYTHON -m stages.stage7_evaluate --run "$RUN" --iteration "$i"
done

((!DRY_RUN)) || printf '%s' "$NEEDS"
((DRY_RUN || !SUMMARY)) || $PYTHON -m tools.summarize --run "$RUN"
