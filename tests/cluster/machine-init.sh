#!/usr/bin/env bash
# First process of a machine (machine.sh): gives the machine its own file system, then reaps children.
#   machine-init.sh DIR NAME
set -euo pipefail
dir=$1 name=$2
# The outer /proc is still mounted, so this is our PID outside.
read -r outside _ </proc/self/stat

mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mkdir -p /run/lock /run/netns
hostname "$name"
ip link set lo up

# Directories that this host lacks can be created here without creating them on the host.
for parent in /etc /var/lib; do
  mkdir -p "/run/over$parent/upper" "/run/over$parent/work"
  mount -t overlay overlay -o "lowerdir=$parent,upperdir=/run/over$parent/upper,workdir=/run/over$parent/work" "$parent"
done
# The machine's disk, under the real paths: programs find their files as on any node.
for path in /var/lib/cni /var/lib/kirsa /var/lib/kubelet /var/lib/containerd /var/lib/etcd /var/log /etc/cni/net.d; do
  mkdir -p "$dir/disk$path" "$path"
  mount --bind "$dir/disk$path" "$path"
done

# The kubelet requires these values and would set them for the whole kernel: show it that they are set.
tunable() {
  [ "$(cat "/proc/sys/$1")" = "$2" ] && return
  mkdir -p /run/tunables; echo "$2" >"/run/tunables/${1//\//.}"
  mount --bind "/run/tunables/${1//\//.}" "/proc/sys/$1"
}
tunable vm/overcommit_memory 1
tunable vm/panic_on_oom 0
tunable kernel/panic 10
tunable kernel/panic_on_oops 1
tunable kernel/keys/root_maxkeys 1000000
tunable kernel/keys/root_maxbytes 25000000

echo "$outside" >"$dir/pid.new"; mv "$dir/pid.new" "$dir/pid"
trap 'exit 0' TERM
while :; do sleep infinity & wait $! || true; done
