# shellcheck shell=bash
# What run_all.sh needs around its commands: one run_all.sh per run, the log, and an end that leaves nothing running.
# Sourced, with RUN, TODO, DRY_RUN and PATHS set by tools.start_run.

lock_run() { # one run_all.sh at a time: the lock goes when this shell and what it started are gone
  local status=0 reason
  reason=$({ mkdir -p "$RUN" && : >>"$RUN/.lock"; } 2>&1) || {
    echo "error: $RUN: cannot be written (${reason##*: }): make it writable, or choose another --name" >&2
    exit 2
  }
  exec 8>>"$RUN/.lock"
  flock -n 8 || status=$?
  case $status in
    0) echo "process $$ on $(hostname) since $(date '+%F %T')" >"$RUN/.lock" ;;
    1) echo "error: $RUN: in use by $(<"$RUN/.lock"): wait for it, or choose another --name" >&2; exit 2 ;;
    *) echo "error: $RUN: the file system $(stat -f -c %T "$RUN") has no locks: mount it with them (Lustre: -o flock; NFS: its lock service)" >&2
       exit 2 ;;
  esac
}

CHILDREN=() TRAINING=
finish() {
  trap - EXIT INT TERM
  trap '' USR1
  ((${#CHILDREN[@]} == 0)) || kill -TERM "${CHILDREN[@]}" 2>/dev/null || true
  if [[ -d $RUN/server ]]; then .venv/bin/python -m tools.sglang_server stop --server "$RUN/server" || true; fi
}

end_soon() { # training ends its step and saves (megatron_papo/run/end_request.py); what else is under way loses nothing by ending
  local child
  trap '' USR1
  : >"$RUN/stage5_train.end"
  for child in "${CHILDREN[@]}"; do [[ $child == "$TRAINING" ]] || kill -TERM "$child" 2>/dev/null || true; done
  [[ -z $TRAINING ]] || wait "$TRAINING" || true
  exit 75
}

start() { # KEY COMMAND..., in the background, with its output in the log
  local key=$1 shown
  shift
  printf -v shown '%q ' "$@"
  if ((DRY_RUN)); then echo "$shown"; return; fi
  echo "== $shown"
  echo "$(date '+%F %T') run: == $shown" >>"$RUN/log.txt" || true # the log describes, no more
  "$@" > >(python3 tools/log_lines.py "$RUN/log.txt" "stage $key") 2>&1 &
  CHILDREN+=($!)
  [[ $key != 5* ]] || TRAINING=$!
}

stage() { # KEY COMMAND..., if it is left to do
  [[ " $TODO " == *" $1 "* ]] || return 0
  if ((DRY_RUN)); then printf '%q ' "${@:2}"; printf '\n%s' "${PATHS[$1]}"; return; fi
  start "$@"
  wait "${CHILDREN[0]}"
  CHILDREN=() TRAINING=
}

side_by_side() { # two commands after start: the first that fails ends the run, and finish() the other
  ((${#CHILDREN[@]})) || return 0
  wait -n "${CHILDREN[@]}"
  local child
  for child in "${CHILDREN[@]}"; do wait "$child"; done
  CHILDREN=() TRAINING=
}
