#!/usr/bin/env bash
# Trains on TPU slices or GPU nodes of a GKE cluster, as a JobSet. docs/launching.md.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/gke.sh COMMAND --name NAME [OPTION]... [-- TRAIN_FLAG...]

  start     creates the JobSet that runs `python -m latentjax.train TRAIN_FLAG...`, and waits until its pods are there.
            JobSet starts all pods again when one ends, unless it ended with a mistake (status 1 or 2).
  manifest  prints the JobSet that start would create
  status    prints the JobSet's state and its pods
  logs      follows what process 0 prints, over restarts; ends as the run does
  stop      tells the run to save and leave, and deletes the JobSet

kubectl must point at the cluster, which has node pools with the accelerators and the JobSet controller.

  --name NAME              of the JobSet (NAME)
  --namespace NAME         (NAMESPACE, default)
  --image IMAGE            made from launch/Dockerfile (IMAGE)
  --accelerator NAME       the nodes' label: tpu-v5p-slice, tpu-v6e-slice, nvidia-h100-80gb, ... (ACCELERATOR)
  --topology SIZES         of a TPU slice, such as 4x4x4; none: GPUs (TOPOLOGY)
  --num_slices N           TPU slices (NUM_SLICES, 1)
  --nodes N                GPU nodes (NODES, 1)
  --chips_per_node N       TPU chips or GPUs of a node (CHIPS_PER_NODE, 4 and 8)
  --claim NAME             a PersistentVolumeClaim for runs and data, which all pods can write: ReadWriteMany (CLAIM)
  --mount PATH             where the pods see it (MOUNT, /data)
  --spot                   on spot nodes
  --service_account NAME   of Kubernetes, for gs:// (SERVICE_ACCOUNT, default)
  --user ID                that the pods run as; 0 where the accelerators' devices are root's alone (RUN_AS, 1000)
  --grace SECONDS          for saving, after the pods are told to leave (GRACE, 300)
  --wait SECONDS           for the pods to be there (WAIT, 1800)
  --max_restarts N         (MAX_RESTARTS, 100)
  --poll SECONDS           between two looks (POLL, 30)
  --dry_run                prints the commands that would be run, and runs none
  --help

In brackets: the environment variable that sets it too, and the default.
END
}

fail() {
  echo "gke.sh: error: $*" >&2
  exit 2
}

say() { echo "gke.sh: $*" >&2; }

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

# Runs kubectl, or shows what would be run.
cluster() {
  if [ "$dry_run" = 1 ]; then
    show kubectl --namespace "$namespace" "$@"
  else
    kubectl --namespace "$namespace" "$@"
  fi
}

# Whether the cluster has something.
has() { # KIND NAME
  if [ "$dry_run" = 1 ]; then
    cluster get "$1" "$2" --output=name
  else
    cluster get "$1" "$2" --output=name >/dev/null
  fi
}

# Prints how many hosts a slice has: the product of its sizes over the chips of a host.
hosts_of_slice() {
  local size chips=1
  for size in ${topology//x/ }; do
    chips=$((chips * size))
  done
  [ $((chips % chips_per_node)) = 0 ] ||
    fail "--topology $topology has $chips chips, no multiple of --chips_per_node $chips_per_node"
  echo $((chips / chips_per_node))
}

manifest() {
  local each arguments="" spot_selector="" text
  for each in "${train_flags[@]}"; do
    [[ $each != *$'\n'* ]] || fail "a flag for the trainer has a line break: ${each%%$'\n'*}"
    each=${each//\'/\'\'}       # as YAML wants it within apostrophes
    each=${each//\$(/\$\$(}     # for Kubernetes $( begins a variable
    arguments+=$'\n                    - '"'$each'"
  done
  [ "$spot" = 0 ] || spot_selector=$'\n                cloud.google.com/gke-spot: "true"'
  text=$(cat "$root/launch/gke/$kind.yaml")
  text=${text//@NAME@/"$name"}
  text=${text//@NAMESPACE@/"$namespace"}
  text=${text//@IMAGE@/"$image"}
  text=${text//@ACCELERATOR@/"$accelerator"}
  text=${text//@TOPOLOGY@/"$topology"}
  text=${text//@NUM_SLICES@/"$num_slices"}
  text=${text//@HOSTS@/"$hosts"}
  text=${text//@CHIPS_PER_NODE@/"$chips_per_node"}
  text=${text//@CLAIM@/"$claim"}
  text=${text//@MOUNT@/"$mount"}
  text=${text//@SPOT@/"$spot_selector"}
  text=${text//@SERVICE_ACCOUNT@/"$service_account"}
  text=${text//@USER@/"$run_as"}
  text=${text//@GRACE@/"$grace"}
  text=${text//@MAX_RESTARTS@/"$max_restarts"}
  text=${text/@ARGS@/"$arguments"} # the last, for what the user wrote stays as it is
  printf '%s\n' "$text"
}

terminal_state() { cluster get jobset "$name" '--output=jsonpath={.status.terminalState}'; }

start() {
  local wanted=$((hosts * num_slices)) there waited=0 ended
  has crd jobsets.jobset.x-k8s.io ||
    fail "this cluster knows no JobSet, or does not answer: docs/launching.md says how to install it"
  has persistentvolumeclaim "$claim" || fail "there is no claim $claim in namespace $namespace"
  if [ "$dry_run" = 1 ]; then
    show kubectl --namespace "$namespace" create --filename=- && manifest
    return
  fi
  manifest | cluster create --filename=- ||
    fail "the JobSet $name cannot be created; launch/gke.sh stop removes one of that name"
  while true; do
    there=$(cluster get pods "--selector=$selector" --field-selector=status.phase=Running --output=name | wc -l)
    ended=$(terminal_state) || ended=""
    [ "$there" -lt "$wanted" ] || break
    case $ended in
      Failed) fail "the JobSet $name has failed; launch/gke.sh logs says why" ;;
      Completed) break ;;
    esac
    if [ "$waited" -ge "$wait" ]; then
      cluster get pods "--selector=$selector" --output=wide >&2 || true
      fail "$there of $wanted pods run after $wait s; the JobSet is kept, and goes on waiting: launch/gke.sh stop"
    fi
    sleep "$poll"
    waited=$((waited + poll))
  done
  say "$there of $wanted pods run; launch/gke.sh logs --name $name follows them"
}

logs() {
  local ended first="$selector,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
  while true; do
    cluster logs "--selector=$first" --container=train --follow --tail=100 ||
      say "no pod answers, or the connection dropped"
    if [ "$dry_run" = 1 ]; then
      return
    fi
    ended=$(terminal_state) || fail "there is no JobSet $name, or the cluster does not answer"
    case $ended in
      Completed) return ;;
      Failed) fail "the JobSet $name has failed" ;;
    esac
    sleep "$poll"
  done
}

[ $# -gt 0 ] || fail "no command: launch/gke.sh start --name NAME ... (--help)"
name=${NAME:-} namespace=${NAMESPACE:-default} image=${IMAGE:-} accelerator=${ACCELERATOR:-} topology=${TOPOLOGY:-}
num_slices=${NUM_SLICES:-1} nodes=${NODES:-1} chips_per_node=${CHIPS_PER_NODE:-} claim=${CLAIM:-} mount=${MOUNT:-/data}
service_account=${SERVICE_ACCOUNT:-default} run_as=${RUN_AS:-1000} grace=${GRACE:-300} wait=${WAIT:-1800}
max_restarts=${MAX_RESTARTS:-100} poll=${POLL:-30} spot=0 dry_run=0 verb=$1
[ "$verb" = --help ] || shift
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    --help) usage && exit ;;
    --dry_run) dry_run=1 && shift && continue ;;
    --spot) spot=1 && shift && continue ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --*) [ $# -ge 2 ] || fail "$1 has no value (--help lists the flags)" ;;
    *) fail "flags for the trainer come behind --: launch/gke.sh start --name NAME ... -- --config RECIPE" ;;
  esac
  case $1 in
    --name | --namespace | --image | --accelerator | --topology | --num_slices | --nodes | --chips_per_node | \
      --claim | --mount | --service_account | --grace | --wait | --max_restarts | --poll) declare "${1#--}=$2" ;;
    --user) run_as=$2 ;;
    *) fail "unknown flag $1 (--help lists them)" ;;
  esac
  shift 2
done
[ "${1:-}" != -- ] || shift
train_flags=("$@")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

case $verb in
  start | manifest | status | logs | stop) ;;
  *) fail "unknown command '$verb': one of start, manifest, status, logs, stop" ;;
esac
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "--name must be lower-case letters, digits and dashes, not '$name'"
kind=gpu
[ -z "$topology" ] || kind=tpu
if [ -z "$chips_per_node" ]; then
  if [ "$kind" = tpu ]; then chips_per_node=4; else chips_per_node=8; fi
fi
for each in num_slices nodes chips_per_node run_as grace wait max_restarts poll; do
  [[ ${!each} =~ ^[0-9]+$ ]] || fail "--$each must be a whole number, not '${!each}'"
done
selector=jobset.sigs.k8s.io/jobset-name=$name
if [ "$verb" = start ] || [ "$verb" = manifest ]; then
  for each in image accelerator claim namespace service_account; do
    [[ ${!each} =~ ^[-A-Za-z0-9_./:@]+$ ]] || fail "--$each is missing or no name: '${!each}'"
  done
  [[ $topology =~ ^([1-9][0-9]*(x[1-9][0-9]*){1,2})?$ ]] ||
    fail "--topology must be sizes, such as 4x4x4, not '$topology'"
  [ "$chips_per_node" != 0 ] || fail "--chips_per_node must not be 0"
  [[ $mount =~ ^/[-A-Za-z0-9_./]+$ ]] || fail "--mount must be a path such as /data, not '$mount'"
  [ $# -gt 0 ] || fail "no flags for the trainer: launch/gke.sh $verb ... -- --config RECIPE --workdir $mount/run"
  hosts=$nodes
  if [ "$kind" = tpu ]; then
    hosts=$(hosts_of_slice)
  else
    num_slices=1
  fi
fi
[ "$dry_run" = 1 ] || [ "$verb" = manifest ] || command -v kubectl >/dev/null || fail "kubectl is not on PATH"

case $verb in
  status)
    cluster get jobset "$name" || fail "there is no JobSet $name, or the cluster does not answer"
    cluster get pods "--selector=$selector" --output=wide
    ;;
  stop) cluster delete jobset "$name" --cascade=foreground || fail "the JobSet $name cannot be deleted" ;;
  *) "$verb" ;;
esac
