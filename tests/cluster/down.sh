#!/usr/bin/env bash
# Ends the cluster in any state and leaves nothing behind: no process, mount, namespace, cgroup, setting or file.
# Verifies this; otherwise prints what is left and exits with 1.
set -euo pipefail
. "$(dirname "$0")/machine.sh"
[ -d "$state" ] || exit 0
[ -f "$state/settings" ] || die "$state is no cluster's state"
for dir in "$state"/*/; do [ ! -f "$dir/pid" ] || machine_stop "$(basename "$dir")"; done
# Removes a machine that was not complete yet.
pgrep -f "machine-init.sh $state/" | xargs -r kill -KILL 2>/dev/null || true
cgroup_remove "$cgroup"

left() { pgrep -f "$state/" | grep -vxE "$$|$BASHPID"; }
none_left() { ! left; }
wait_for 30 "end of what runs with $state: $(left | xargs -r ps -o pid=,args= -p)" none_left
! grep -F "$state" /proc/self/mountinfo >&2 || die "mounts are left (above)"
[ ! -f "$state/tunables" ] || tunables | diff "$state/tunables" - >&2 || die "settings of this machine were changed (above)"
rm -rf "$state"
