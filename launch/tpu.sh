#!/usr/bin/env bash
# Trains on slices of Cloud TPUs, through gcloud, and starts again on new ones after a preemption. docs/launching.md.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/tpu.sh COMMAND --name NAME --zone ZONE [OPTION]... [-- TRAIN_FLAG...]

  run      all there is to do: create, install, start, and watch until the run has ended; what is there already is used.
           Ends with the run's status. A preempted or silent resource is deleted, created anew and started again.
  create   asks for the TPUs, as a queued resource, and waits for them
  install  brings this checkout (what is committed) and Python to every worker, and installs both
  start    starts `python -m latentjax.train TRAIN_FLAG...` on every worker, and returns
  status   prints the resource's state, and of each worker running, idle, stopped, or the run's exit status
  logs     follows what worker 0 prints; connects again when the connection drops
  stop     tells the run to save and leave
  delete   gives the TPUs back, and what is on their disks is lost

The run's directory (--workdir) and the data must be where all workers see them: docs/launching.md.

  --name NAME             of the queued resource (NAME)
  --zone ZONE             (ZONE)
  --project ID            (PROJECT; gcloud's own setting)
  --accelerator_type TYPE of a slice, such as v5p-128 (ACCELERATOR_TYPE)
  --num_slices N          slices that train together (NUM_SLICES, 1)
  --runtime_version NAME  image of the workers (RUNTIME_VERSION; the one for the accelerator type)
  --create_flag FLAG      a further flag for gcloud's create, such as --create_flag=--spot; may be given again
  --ssh_flag FLAG         a further flag for gcloud's ssh and scp, such as --ssh_flag=--tunnel-through-iap; likewise
  --setup COMMAND         shell commands on every worker before each start, such as mounting a disk (SETUP)
  --python VERSION        of Python on the workers (PYTHON_VERSION, 3.12)
  --poll SECONDS          between two looks (POLL, 60)
  --attempts N            how often a connection is tried in a row (ATTEMPTS, 10)
  --max_restarts N        starts again at most so often (MAX_RESTARTS, 100)
  --dry_run               prints the commands that would be run, and runs none
  --help

In brackets: the environment variable that sets it too, and the default.
END
}

fail() {
  echo "tpu.sh: error: $*" >&2
  exit 2
}

escaped="'\''" # an apostrophe within apostrophes

say() { echo "tpu.sh: $*" >&2; }

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

# Runs a command, or shows it.
call() {
  if [ "$dry_run" = 1 ]; then
    show "$@"
  else
    "$@"
  fi
}

pause() { [ "$dry_run" = 1 ] || sleep "$poll"; }

resource() { # VERB ARGUMENT...
  call gcloud compute tpus queued-resources "$1" "${@:2}" "${where[@]}"
}

on_workers() { # NODES WORKERS COMMAND
  # A connection that has died is noticed within a minute.
  resource ssh "$name" "--node=$1" "--worker=$2" "--command=$3" --ssh-flag=-oConnectTimeout=30 \
    --ssh-flag=-oServerAliveInterval=15 ${ssh_flags[@]+"${ssh_flags[@]}"}
}

# Tries something until it works; a worker that has just come up does not answer at once.
persistently() { # WHAT COMMAND...
  local attempt
  for ((attempt = 1; attempt <= attempts; attempt++)); do
    if "${@:2}"; then
      return
    fi
    say "$1 did not work on every worker (attempt $attempt of $attempts)"
    [ "$attempt" = "$attempts" ] || pause
  done
  return 1
}

# Prints the state of the queued resource: ACTIVE, SUSPENDED, ..., or NONE. Status 1 where that cannot be found out.
state() {
  local answer
  if answer=$(resource describe "$name" '--format=value(state.state)' 2>&1); then
    echo "${answer##*$'\n'}"
  elif [[ $answer == *NOT_FOUND* || $answer == *"not found"* ]]; then
    echo NONE
  else
    say "${answer##*$'\n'}"
    return 1
  fi
}

known_state() { persistently "asking for the state of $name" state || fail "the state of $name cannot be found out"; }

request() {
  local nodes=("--node-id=$name")
  [ "$num_slices" = 1 ] || nodes=("--node-count=$num_slices" "--node-prefix=$name")
  resource create "$name" "${nodes[@]}" "--accelerator-type=$accelerator_type" "--runtime-version=$runtime_version" \
    ${create_flags[@]+"${create_flags[@]}"}
}

create() {
  local now="" before
  request || fail "the queued resource $name cannot be created"
  if [ "$dry_run" = 1 ]; then
    resource describe "$name" '--format=value(state.state)'
    return
  fi
  while [ "$now" != ACTIVE ]; do
    before=$now
    now=$(known_state)
    case $now in
      ACTIVE) ;;
      FAILED | SUSPENDED | SUSPENDING | DELETING | NONE) fail "the queued resource $name is $now; $see" ;;
      *)
        [ "$now" = "$before" ] || say "waiting for $name: $now"
        pause
        ;;
    esac
  done
}

send() { resource scp "$1" "$name:latentjax.tar" --node=all --worker=all ${ssh_flags[@]+"${ssh_flags[@]}"}; }

install() {
  local archive steps
  # The images have an older Python than this project takes; uv brings one.
  steps="set -e; mkdir -p latentjax; tar -xf latentjax.tar -C latentjax; cd latentjax"
  steps+="; python3 -m pip install --quiet --user uv; uv=\$(python3 -m site --user-base)/bin/uv"
  steps+="; \"\$uv\" venv --quiet --allow-existing --python $(printf %q "$python_version") .venv"
  steps+="; \"\$uv\" pip install --quiet --python .venv/bin/python -e '.[tpu]' gcsfs"
  archive=${TMPDIR:-/tmp}/latentjax-$name-$$.tar
  call git -C "$root" archive "--output=$archive" HEAD || fail "git cannot pack what is committed in $root"
  if ! persistently "copying the code" send "$archive"; then
    rm -f "$archive"
    fail "the code cannot be copied to every worker; $kept"
  fi
  call rm -f "$archive"
  persistently "installing" on_workers all all "$steps" || fail "it cannot be installed on every worker; $kept"
}

start() {
  local words
  words=$(printf ' %q' "$setup" "${train_flags[@]}")
  persistently "starting" on_workers all all "latentjax/launch/tpu_worker.sh start$words" ||
    fail "it cannot be started on every worker; $kept"
}

# Before anything is installed there is nobody to ask.
report() { on_workers all all "latentjax/launch/tpu_worker.sh status || echo \"worker \$(hostname) idle\""; }

# Prints one word for the run on all workers: running, idle, stopped, or the status that decides what is to be done.
outcome() {
  local answer words
  answer=$(report) || return 1
  words=$(sed -n 's/^worker [^ ]* //p' <<<"$answer" | sort -u)
  case $words in
    0 | idle | stopped) echo "$words" ;;
    *running*) echo running ;; # the others end by themselves
    *stopped*) echo stopped ;;
    *)
      # A mistake (1, 2) comes before what it did to the others.
      { grep -x '[12]' <<<"$words" || grep -vx -e 0 -e idle <<<"$words" || echo idle; } | head -n 1
      ;;
  esac
}

begin_anew() {
  restarts=$((restarts + 1))
  [ "$restarts" -le "$max_restarts" ] ||
    fail "$1, after $max_restarts restarts, which is all that --max_restarts allows"
  say "$1: restart $restarts"
}

give_back() { resource delete "$name" --force; }

run() {
  local now found silent=0 requested=0 was_active=0 restarts=0 looked=0
  if [ "$dry_run" = 1 ]; then
    create && install && start && report
    return
  fi
  while true; do
    now=$(known_state)
    case $now in
      ACTIVE)
        if [ "$requested" = 1 ] && [ "$was_active" = 0 ]; then
          found=idle # nothing is there that could be asked
        else
          found=$(outcome) || found=silent
        fi
        was_active=1
        ;;
      NONE) found=absent ;;
      FAILED | SUSPENDED) found=gone ;;
      *) found=waiting ;; # also while it is being suspended or deleted
    esac
    [ "$found" = silent ] || silent=0
    case $found in
      0)
        say "done; launch/tpu.sh delete gives the TPUs back"
        return
        ;;
      stopped)
        if [ "$looked" = 1 ]; then
          say "stopped; the same command goes on from there"
          return
        fi
        start
        ;;
      1 | 2)
        say "the run ended with status $found, and is not started again; its last lines:"
        on_workers 0 0 'tail -n 20 latentjax/run.log' >&2 || true
        say "$kept"
        return "$found"
        ;;
      running | waiting) ;;
      silent)
        silent=$((silent + 1))
        say "$name is ACTIVE, but not every worker answers (look $silent of $attempts)"
        if [ "$silent" -ge "$attempts" ]; then
          begin_anew "$name does not answer"
          persistently "deleting" give_back || fail "$name cannot be deleted"
          silent=0
        fi
        ;;
      gone)
        [ "$requested" = 0 ] || [ "$was_active" = 1 ] || fail "the queued resource $name is $now; $see"
        begin_anew "$name is $now"
        persistently "deleting" give_back || fail "$name cannot be deleted"
        requested=0 was_active=0
        ;;
      absent)
        if [ "$restarts" = 0 ]; then # a mistake shows at once
          request || fail "the queued resource $name cannot be created"
        else
          persistently "creating" request || fail "the queued resource $name cannot be created again"
        fi
        requested=1
        ;;
      idle) install && start ;;
      *)
        begin_anew "the run ended with status $found"
        start
        ;;
    esac
    looked=1
    pause
  done
}

[ $# -gt 0 ] || fail "no command: launch/tpu.sh run --name NAME --zone ZONE ... (--help)"
name=${NAME:-} zone=${ZONE:-} project=${PROJECT:-} accelerator_type=${ACCELERATOR_TYPE:-} num_slices=${NUM_SLICES:-1}
runtime_version=${RUNTIME_VERSION:-} setup=${SETUP:-} python_version=${PYTHON_VERSION:-3.12} poll=${POLL:-60}
attempts=${ATTEMPTS:-10} max_restarts=${MAX_RESTARTS:-100}
create_flags=() ssh_flags=() dry_run=0 verb=$1
[ "$verb" = --help ] || shift
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    --help) usage && exit ;;
    --dry_run) dry_run=1 && shift && continue ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --*) [ $# -ge 2 ] || fail "$1 has no value (--help lists the flags)" ;;
    *) fail "flags for the trainer come behind --: launch/tpu.sh run --name NAME ... -- --config RECIPE" ;;
  esac
  case $1 in
    --name | --zone | --project | --accelerator_type | --num_slices | --runtime_version | --setup | --poll | \
      --attempts | --max_restarts) declare "${1#--}=$2" ;;
    --python) python_version=$2 ;;
    --create_flag) create_flags+=("$2") ;;
    --ssh_flag) ssh_flags+=("$2") ;;
    *) fail "unknown flag $1 (--help lists them)" ;;
  esac
  shift 2
done
[ "${1:-}" != -- ] || shift
train_flags=("$@")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

case $verb in
  run | create | install | start | status | logs | stop | delete) ;;
  *) fail "unknown command '$verb': one of run, create, install, start, status, logs, stop, delete" ;;
esac
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "--name must be lower-case letters, digits and dashes, not '$name'"
[ -n "$zone" ] || fail "--zone is missing, such as --zone us-east5-a"
for each in num_slices attempts max_restarts; do
  [[ ${!each} =~ ^[0-9]+$ ]] || fail "--$each must be a whole number, not '${!each}'"
done
[[ $poll =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail "--poll must be a number of seconds, not '$poll'"
if [ "$verb" = run ] || [ "$verb" = create ]; then
  [ -n "$accelerator_type" ] || fail "--accelerator_type is missing, such as --accelerator_type v5p-128"
  if [ -z "$runtime_version" ]; then
    case $accelerator_type in
      v4-*) runtime_version=tpu-ubuntu2204-base ;;
      v5litepod-*) runtime_version=v2-alpha-tpuv5-lite ;;
      v5p-*) runtime_version=v2-alpha-tpuv5 ;;
      v6e-*) runtime_version=v2-alpha-tpuv6e ;;
      *) fail "no image is known for $accelerator_type: give --runtime_version" ;;
    esac
  fi
fi
if [ "$verb" = run ] || [ "$verb" = start ]; then
  [ $# -gt 0 ] || fail "no flags for the trainer: launch/tpu.sh $verb ... -- --config RECIPE --workdir DIRECTORY"
fi
where=(--quiet "--zone=$zone") # without questions: nobody may be there to answer
[ -z "$project" ] || where+=("--project=$project")
[ "$dry_run" = 1 ] || command -v gcloud >/dev/null || fail "gcloud is not on PATH: install the Google Cloud CLI"

kept="$name is kept, and costs money: launch/tpu.sh delete"
see="gcloud compute tpus queued-resources describe $name says why, launch/tpu.sh delete removes it"

case $verb in
  status)
    call state
    report
    ;;
  logs)
    persistently "following the log" on_workers 0 0 'tail -n 100 -F latentjax/run.log' ||
      fail "worker 0 does not answer"
    ;;
  stop) on_workers all all latentjax/launch/tpu_worker.sh\ stop || fail "not every worker could be told" ;;
  delete) give_back || fail "$name cannot be deleted" ;;
  *) "$verb" ;;
esac
