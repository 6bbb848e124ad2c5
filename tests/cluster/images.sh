#!/usr/bin/env bash
# Imports images into a node's containerd: kirsa-box:1 (busybox, also the pod sandbox) and the given archives.
#   images.sh NODE [ARCHIVE...]
set -euo pipefail
. "$(dirname "$0")/machine.sh"
node=$1; shift

box=$state/box.tar
if [ ! -f "$box" ]; then
  busybox=$(command -v busybox) || die "busybox is missing: apt-get install busybox-static"
  work=$(mktemp -d "$state/box.XXXXXX"); trap 'rm -rf "$work"' EXIT
  mkdir -p "$work/root/bin" "$work/root/etc"
  cp "$busybox" "$work/root/bin/busybox"
  for applet in $("$busybox" --list); do [ "$applet" = busybox ] || ln -s busybox "$work/root/bin/$applet"; done
  echo 'root:x:0:0:root:/:/bin/sh' >"$work/root/etc/passwd"
  printf 'FROM scratch\nCOPY root/ /\nENV PATH=/bin\nENTRYPOINT ["/bin/sleep", "infinity"]\n' >"$work/Dockerfile"
  b="buildah --root $work/store --runroot $work/storerun --storage-driver vfs"
  $b build -q --isolation chroot -f "$work/Dockerfile" -t docker.io/library/kirsa-box:1 "$work" >/dev/null
  $b push -q docker.io/library/kirsa-box:1 "oci-archive:$work/box.tar:docker.io/library/kirsa-box:1" >/dev/null
  mv "$work/box.tar" "$box"
fi
for archive in "$box" "$@"; do
  on "$node" "$bin/ctr" -n k8s.io images import "$(realpath "$archive")" 2>&1 >/dev/null | { grep -v 'cgroup v1 is deprecated' >&2 || true; }
done
