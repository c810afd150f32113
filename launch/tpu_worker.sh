#!/usr/bin/env bash
# What launch/tpu.sh has every TPU worker do, in the checkout that it has installed there.
#
#   tpu_worker.sh start SETUP TRAIN_FLAG...   starts the run and returns; a run at work is left alone
#   tpu_worker.sh status                      prints "worker HOST WORD": running, idle, stopped, or the exit status
#   tpu_worker.sh stop                        tells the run to save and leave
#
# run.log holds what the run prints, run.status the word. As long as one of its processes is there, run.lock is locked.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

at_work() { ! flock --nonblock run.lock true; }

case $1 in
  start)
    exec 9>run.lock
    flock --nonblock 9 || exit 0
    rm -f run.stop
    echo running >run.status
    nohup setsid launch/tpu_worker.sh supervise "${@:2}" >>run.log 2>&1 </dev/null &
    ;;
  supervise) # the process that stays, with the lock that it was born with
    status=0
    set +eu # the setup is not written for them
    eval "$2"
    setup_status=$?
    if [ "$setup_status" != 0 ]; then
      echo "tpu_worker.sh: error: --setup ended with status $setup_status on $(hostname)"
      status=2
    else
      .venv/bin/python -m latentjax.train "${@:3}" &
      echo $! >run.pid
      wait $!
      status=$?
    fi
    if [ -e run.stop ]; then
      status=stopped
    fi
    echo "$status" >run.status
    ;;
  status)
    word=idle
    if [ -e run.status ]; then
      word=$(cat run.status)
      # Its shell had no time to write how it ended: killed, or the machine was started anew.
      if [ "$word" = running ] && ! at_work; then
        word=137
      fi
    fi
    echo "worker $(hostname) $word"
    ;;
  stop)
    if at_work; then
      touch run.stop
      kill -TERM "$(cat run.pid)"
    fi
    ;;
  *)
    echo "tpu_worker.sh: error: unknown command '$1'" >&2
    exit 2
    ;;
esac
