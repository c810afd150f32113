#!/usr/bin/env bash
# Trains on nodes of a Slurm cluster, and goes on after a preemption, a time limit or a lost node. docs/launching.md.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/slurm.sh [OPTION]... -- TRAIN_FLAG...

Submits a job that runs `python -m latentjax.train TRAIN_FLAG...` on every node, as one run. Before its time limit, or
when it is preempted, the run saves and the job is requeued; so it is when a node is lost. A mistake (status 1 or 2)
ends it.
From the root of a clone that all nodes see, as they must see the run's directory and the data.

  --nodes N               how many nodes (NODES, 1)
  --gpus_per_node N       GPUs of each; 0: it has none (GPUS_PER_NODE, 8)
  --processes_per_node N  1, or up to one per GPU, which are shared out evenly (PROCESSES_PER_NODE, 1)
  --time LIMIT            of one start, as Slurm writes it (TIME, 24:00:00)
  --warning SECONDS       how long before that limit the run is told to save; Slurm may be a minute early (WARNING, 300)
  --max_restarts N        starts again at most so often (MAX_RESTARTS, 100)
  --partition NAME, --account NAME, --job_name NAME     as sbatch has them (PARTITION, ACCOUNT, JOB_NAME=latentjax)
  --log FILE              where all processes write, %j is the job's number (LOG, latentjax-%j.log)
  --sbatch FLAG           a further flag for sbatch, such as --sbatch=--qos=long; may be given again
  --setup COMMAND         shell commands before the run, such as 'module load cuda' (SETUP)
  --python PATH           the interpreter (PYTHON, python)
  --dry_run               prints the command that would be run, and runs nothing
  --help

In brackets: the environment variable that sets it too, and the default.
END
}

fail() {
  echo "slurm.sh: error: $*" >&2
  exit 2
}

escaped="'\''" # an apostrophe within apostrophes

# Prints a command as a shell would read it.
show() {
  local word
  for word in "$@"; do
    if [[ $word =~ ^[-A-Za-z0-9_./:=,@%+]+$ ]]; then
      printf '%s ' "$word"
    else
      printf "'%s' " "${word//\'/$escaped}"
    fi
  done
  echo
}

# One start of the job, on its first node: sbatch runs this file again with --in_job before the settings.
run_in_job() {
  local max_restarts=$1 setup=$2 python=$3 status=0 ended_by_slurm=0
  shift 3
  # This shell gets SIGTERM when others cancel or requeue the job, and then what follows is not for it to decide.
  trap 'ended_by_slurm=1' TERM
  set +u # what is sourced here may not be written for it
  eval "$setup"
  set -u
  echo "slurm.sh: start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST"
  # Slurm ends no process for the end of another: they see to that themselves, after they have saved.
  # Nor does it bind them: each would have one core to read data with.
  srun --kill-on-bad-exit=0 --wait=0 --cpu-bind=none "$python" -m latentjax.train "$@" || status=$?
  case $status in
    0 | 1 | 2) exit "$status" ;;
  esac
  if [ "$ended_by_slurm" = 1 ]; then
    exit "$status"
  fi
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "$max_restarts" ]; then
    echo "slurm.sh: status $status after $max_restarts restarts, which is all that --max_restarts allows" >&2
    exit "$status"
  fi
  echo "slurm.sh: status $status: the job is requeued, to go on from its last checkpoint" >&2
  scontrol requeue "$SLURM_JOB_ID" || exit "$status"
  sleep 60 # until Slurm ends this shell: to leave by itself would end the job
  exit "$status"
}

if [ "${1:-}" = --in_job ]; then
  shift
  run_in_job "$@"
fi

nodes=${NODES:-1} gpus_per_node=${GPUS_PER_NODE:-8} processes_per_node=${PROCESSES_PER_NODE:-1}
time=${TIME:-24:00:00} warning=${WARNING:-300} max_restarts=${MAX_RESTARTS:-100}
partition=${PARTITION:-} account=${ACCOUNT:-} job_name=${JOB_NAME:-latentjax} log=${LOG:-latentjax-%j.log}
setup=${SETUP:-} python=${PYTHON:-python}
further=() dry_run=0
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    --help) usage && exit ;;
    --dry_run) dry_run=1 && shift && continue ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --*) [ $# -ge 2 ] || fail "$1 has no value (--help lists the flags)" ;;
    *) fail "flags for the trainer come behind --: launch/slurm.sh --nodes 2 -- --config RECIPE" ;;
  esac
  case $1 in
    --nodes) nodes=$2 ;;
    --gpus_per_node) gpus_per_node=$2 ;;
    --processes_per_node) processes_per_node=$2 ;;
    --time) time=$2 ;;
    --warning) warning=$2 ;;
    --max_restarts) max_restarts=$2 ;;
    --partition) partition=$2 ;;
    --account) account=$2 ;;
    --job_name) job_name=$2 ;;
    --log) log=$2 ;;
    --sbatch) further+=("$2") ;;
    --setup) setup=$2 ;;
    --python) python=$2 ;;
    *) fail "unknown flag $1 (--help lists them)" ;;
  esac
  shift 2
done
[ "${1:-}" = -- ] && shift
[ $# -gt 0 ] || fail "no flags for the trainer: launch/slurm.sh --nodes 2 -- --config configs/pile_1b.py"
for name in nodes gpus_per_node processes_per_node warning max_restarts; do
  [[ ${!name} =~ ^[0-9]+$ ]] || fail "--$name must be a whole number, not '${!name}'"
done
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

command=(
  sbatch "--job-name=$job_name" "--nodes=$nodes" "--ntasks-per-node=$processes_per_node"
  # The warning goes to the processes and not to the shell above them (B:): a second signal would cut the first short.
  "--time=$time" "--signal=USR1@$warning"
  --requeue "--output=$log" --open-mode=append "--chdir=$root"
)
# All processes of a node see all of its GPUs, which each other's traffic goes through; latentjax shares them out.
[ "$gpus_per_node" = 0 ] || command+=("--gpus-per-node=$gpus_per_node" --exclusive --mem=0)
[ -z "$partition" ] || command+=("--partition=$partition")
[ -z "$account" ] || command+=("--account=$account")
command+=(${further[@]+"${further[@]}"} "$root/launch/slurm.sh" --in_job "$max_restarts" "$setup" "$python" "$@")
if [ "$dry_run" = 1 ]; then
  show "${command[@]}"
  exit
fi
command -v sbatch >/dev/null || fail "sbatch is not on PATH: run this on a login node of a Slurm cluster"
"${command[@]}"
