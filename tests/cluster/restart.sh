#!/usr/bin/env bash
# Restart one program of a machine, with the command line that it has: restart.sh MACHINE containerd|kubelet|...
set -euo pipefail
. "$(dirname "$0")/machine.sh"
machine=$1 name=$2
number=$(cat "$state/$machine/$name.pid")
mapfile -d '' -t command < <(on "$machine" cat "/proc/$number/cmdline")
daemon_stop "$machine" "$name"
daemon "$machine" "$name" "${command[@]}"
