#!/usr/bin/env bash
# Restarts one program of a machine with the same command line: restart.sh MACHINE containerd|kubelet|...
set -euo pipefail
. "$(dirname "$0")/machine.sh"
machine=$1 name=$2
number=$(cat "$state/$machine/$name.pid")
mapfile -d '' -t command < <(on "$machine" cat "/proc/$number/cmdline")
daemon_stop "$machine" "$name"
daemon "$machine" "$name" "${command[@]}"
