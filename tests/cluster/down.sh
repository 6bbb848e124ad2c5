#!/usr/bin/env bash
# End the cluster, whatever state it is in, and leave nothing: no process, mount, namespace, cgroup or file.
set -euo pipefail
. "$(dirname "$0")/machine.sh"
[ -d "$state" ] || exit 0
[ -f "$state/settings" ] || die "$state is no cluster's state"
for dir in "$state"/*/; do [ ! -f "$dir/pid" ] || machine_stop "$(basename "$dir")"; done
cgroup_remove "$cgroup"
rm -rf "$state"
