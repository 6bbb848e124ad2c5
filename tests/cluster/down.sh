#!/usr/bin/env bash
# End the cluster, whatever state it is in, and leave nothing: no process, mount, namespace, cgroup, setting or file.
# Looks whether that is so; exits with 1 and says what is left if not.
set -euo pipefail
. "$(dirname "$0")/machine.sh"
[ -d "$state" ] || exit 0
[ -f "$state/settings" ] || die "$state is no cluster's state"
for dir in "$state"/*/; do [ ! -f "$dir/pid" ] || machine_stop "$(basename "$dir")"; done
# A machine that was still being made.
pgrep -f "machine-init.sh $state/" | xargs -r kill -KILL 2>/dev/null || true
cgroup_remove "$cgroup"

left() { pgrep -f "$state/" | grep -vxE "$$|$BASHPID"; }
none_left() { ! left; }
wait_for 30 "end of what runs with $state: $(left | xargs -r ps -o pid=,args= -p)" none_left
! grep -F "$state" /proc/self/mountinfo >&2 || die "mounts are left (above)"
[ ! -f "$state/tunables" ] || tunables | diff "$state/tunables" - >&2 || die "settings of this machine were changed (above)"
rm -rf "$state"
