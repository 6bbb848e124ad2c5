# Machines: sourced by the other scripts. A machine is a set of namespaces (mount, network, process,
# UTS, IPC, time) with a first process of its own. When that process is killed, the kernel kills everything that was
# started in the machine, and unmounts and removes everything: nothing needs to be cleaned up by name.
cluster=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
state=$(realpath -m "${KIRSA_CLUSTER:-/tmp/kirsa-cluster}")
[ ! -f "$state/settings" ] || . "$state/settings"

say() { echo "cluster: $*" >&2; }
die() { say "$*"; exit 1; }

# Retries a command until it succeeds; on timeout, prints what it waited for.
wait_for() { # seconds what command...
  local end=$((SECONDS + $1)) what=$2; shift 2
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || die "no $what"
    read -rt 0.1 <> <(:) || true
  done
}

machine_pid() { cat "$state/$1/pid"; }
machine_runs() { [ -s "$state/$1/pid" ] && kill -0 "$(machine_pid "$1")"; }

machine_start() { # name
  local dir=$state/$1 up
  mkdir -p "$dir"; rm -f "$dir/pid"
  read -r up _ </proc/uptime
  # Its own clock says that it booted now, so starting it again is a reboot, with what a reboot leaves behind.
  setsid unshare --mount --net --pid --uts --ipc --time --boottime "-${up%.*}" --fork --kill-child \
    "$cluster/machine-init.sh" "$dir" "$1" </dev/null >>"$dir/init.log" 2>&1 &
  wait_for 30 "machine $1 (see $dir/init.log)" machine_runs "$1"
}

machine_stop() { # name
  machine_runs "$1" 2>/dev/null || return 0
  local pid; pid=$(machine_pid "$1")
  kill -KILL "$pid" 2>/dev/null || true
  wait_for 60 "end of machine $1" gone "$pid"
  rm -f "$state/$1/pid"
}
gone() { ! kill -0 "$1"; }

on() { # machine command...
  local pid; pid=$(machine_pid "$1"); shift
  nsenter -t "$pid" --all -- "$@"
}

daemon() { # machine name command...: runs in the background; keeps its output and its PID (in the machine)
  local machine=$1 name=$2; shift 2
  mkdir -p "$state/$machine/log"
  on "$machine" setsid bash -c 'echo $$ >"$1"; shift; exec "$@"' - "$state/$machine/$name.pid" "$@" \
    </dev/null >>"$state/$machine/log/$name.log" 2>&1 &
}

daemon_stop() { # machine name [signal]
  local number; number=$(cat "$state/$1/$2.pid")
  on "$1" kill "-${3:-TERM}" "$number"
  wait_for 60 "end of $2" daemon_gone "$1" "$number"
}
daemon_gone() { ! on "$1" kill -0 "$2"; }

kubectl() { on vpc "$bin/kubectl" --kubeconfig "$state/admin.kubeconfig" "$@"; }

# Settings that kubelet, kube-proxy and containerd change for a whole machine.
tunables() {
  sysctl -a 2>/dev/null | grep -E \
    '^(vm\.(overcommit_memory|panic_on_oom)|kernel\.(panic|panic_on_oops|keys\.root_.*)|net\.ipv[46]\.(ip_forward|conf\.(all|default)\..*)|net\.bridge\..*) ='
}

# The kubelet creates its cgroups below one of ours, in every hierarchy.
cgroups() {
  if [ -e /sys/fs/cgroup/cgroup.controllers ]; then echo /sys/fs/cgroup; return; fi
  find /sys/fs/cgroup -mindepth 1 -maxdepth 1 -type d
}
cgroup_make() { # path
  local top part at
  for top in $(cgroups); do
    at=$top
    for part in ${1//\// }; do
      at=$at/$part; mkdir -p "$at"
      # An empty cpuset accepts no process.
      for file in cpuset.cpus cpuset.mems; do
        if [ -e "$at/$file" ] && [ ! -s "$at/$file" ]; then cat "${at%/*}/$file" >"$at/$file"; fi
      done
      if [ -e "$at/cgroup.subtree_control" ]; then
        sed 's/\(\S\+\)/+\1/g' "$top/cgroup.controllers" >"${at%/*}/cgroup.subtree_control" 2>/dev/null || true
      fi
    done
  done
}
cgroup_remove() { # path
  local top
  for top in $(cgroups); do
    [ -d "$top/$1" ] || continue
    # A killed process leaves its cgroup slightly later than its namespace.
    wait_for 60 "empty cgroup $top/$1" cgroup_rmdir "$top/$1"
  done
}
cgroup_rmdir() { find "$1" -depth -type d -exec rmdir {} + 2>/dev/null; [ ! -d "$1" ]; }
