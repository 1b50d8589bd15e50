#!/usr/bin/env bash
# Start the workers of one node with msrun, by MindFormers' positional forms:
#
#   msrun_launcher.sh COMMAND                                              8 workers, all on this node
#   msrun_launcher.sh COMMAND WORKERS                                      WORKERS workers, all on this node
#   msrun_launcher.sh COMMAND WORKERS PORT LOG_DIR JOIN TIMEOUT            the same, with msrun's settings
#   msrun_launcher.sh COMMAND WORKERS LOCAL_WORKERS ADDRESS PORT NODE_RANK LOG_DIR JOIN TIMEOUT    one of several nodes
#
# COMMAND is one argument: a Python script (or python -m MODULE) and its arguments, quoted as in a shell.

set -euo pipefail

usage() {
    sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 1
}

workers=8 local_workers=8 address=127.0.0.1 port=8118 node_rank=0 log_dir=output/msrun_log join=False timeout=7200
case $# in
    1) ;;
    2) workers=$2 local_workers=$2 ;;
    6) workers=$2 local_workers=$2 port=$3 log_dir=$4 join=$5 timeout=$6 ;;
    9) workers=$2 local_workers=$3 address=$4 port=$5 node_rank=$6 log_dir=$7 join=$8 timeout=$9 ;;
    *) usage ;;
esac

if ! [[ $workers =~ ^[0-9]+$ ]]; then
    echo "error: $workers is not a number of workers: WORKERS: give a number" >&2
    exit 1
fi
if [[ $workers == 1 ]]; then
    echo "One worker needs no launcher; run this instead: python $1"
    exit 0
fi

options=(--worker_num="$workers" --local_worker_num="$local_workers" --master_port="$port" --log_dir="$log_dir"
    --join="$join" --cluster_time_out="$timeout")
if [[ $workers != "$local_workers" ]]; then
    options+=(--master_addr="$address" --node_rank="$node_rank")
fi

if ! command -v msrun >/dev/null; then
    echo "error: no command msrun: PATH: install mindspore on this node" >&2
    exit 1
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
ulimit -u unlimited 2>/dev/null || true # HCCL starts many threads; without the right to lift the limit, it stays
eval "command=($1)"
exec msrun "${options[@]}" "${command[@]}"
