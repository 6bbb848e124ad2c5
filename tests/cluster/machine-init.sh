#!/usr/bin/env bash
# The first process of a machine (machine.sh): makes its file system the machine's own, then reaps.
#   machine-init.sh DIR NAME
set -euo pipefail
dir=$1 name=$2
# The outer /proc is still mounted, so this is our number out there.
read -r outside _ </proc/self/stat

mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mkdir -p /run/lock /run/netns
hostname "$name"
ip link set lo up

# Folders that this host may not have can be made here without making them there.
for parent in /etc /var/lib; do
  mkdir -p "/run/over$parent/upper" "/run/over$parent/work"
  mount -t overlay overlay -o "lowerdir=$parent,upperdir=/run/over$parent/upper,workdir=/run/over$parent/work" "$parent"
done
# What a machine keeps on its disk, under the real paths: everything finds its files where it does on any node.
for path in /var/lib/cni /var/lib/kirsa /var/lib/kubelet /var/lib/containerd /var/lib/etcd /var/log /etc/cni/net.d; do
  mkdir -p "$dir/disk$path" "$path"
  mount --bind "$dir/disk$path" "$path"
done

# kubelet wants these values and sets them for the whole kernel: show it that they are set.
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
