#!/usr/bin/env bash
# Builds the cluster's binaries from the Go modules that are pinned here.
#   build.sh [-o DIR] NAME...     DIR defaults to <repository>/target/cluster/bin
# A binary is rebuilt only if its go.mod or go.sum changes.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$here/../../target/cluster/bin
if [ "${1:-}" = -o ]; then out=$2; shift 2; fi
[ $# -gt 0 ] || { echo "usage: build.sh [-o DIR] NAME..." >&2; exit 2; }
mkdir -p "$out"; out=$(cd "$out" && pwd)

# Takes a lock: two concurrent builds would compile the same packages twice.
exec 9>"$out/.lock"; flock 9

version=$(sed -n 's/^\s*k8s.io\/kubernetes v\([^ ]*\).*/\1/p' "$here/go.mod")
stamp=k8s.io/component-base/version

build() { # name module-folder package ldflags [tags]
  local name=$1 dir=$2 package=$3 flags=$4 tags=${5:-} sum
  sum=$(cat "$dir/go.mod" "$dir/go.sum" | sha256sum | cut -d' ' -f1)
  [ -x "$out/$name" ] && [ "$(cat "$out/.$name.sum" 2>/dev/null)" = "$sum" ] && return
  go=${go:-$("$here/find-go.sh")}
  echo "building $name (minutes, the first time)" >&2
  (cd "$dir" && CGO_ENABLED=0 GOTOOLCHAIN=local "$go" build -buildvcs=false -mod=readonly -tags "$tags" -ldflags "$flags" -o "$out/$name" "$package") >&2
  echo "$sum" >"$out/.$name.sum"
}

go=
for name in "$@"; do
  case $name in
    kube-apiserver | kube-controller-manager | kube-scheduler | kube-proxy | kubelet | kubectl)
      IFS=. read -r major minor _ <<<"$version"
      build "$name" "$here" "k8s.io/kubernetes/cmd/$name" \
        "-s -w -X $stamp.gitVersion=v$version -X $stamp.gitMajor=$major -X $stamp.gitMinor=$minor" ;;
    etcd) build "$name" "$here/etcd" go.etcd.io/etcd/server/v3 "-s -w" ;;
    containerd | containerd-shim-runc-v2 | ctr)
      build "$name" "$here/containerd" "github.com/containerd/containerd/v2/cmd/$name" "-s -w" ;;
    helm) build "$name" "$here/tools" helm.sh/helm/v4/cmd/helm "-s -w" ;;
    kustomize) build "$name" "$here/tools" sigs.k8s.io/kustomize/kustomize/v5 "-s -w" ;;
    # Leaves out service discovery, which is most of its code.
    promtool) build "$name" "$here/tools" github.com/prometheus/prometheus/cmd/promtool "-s -w" remove_all_sd ;;
    registry) build "$name" "$here/registry" github.com/distribution/distribution/v3/cmd/registry "-s -w" ;;
    *) echo "build.sh: no such binary: $name" >&2; exit 2 ;;
  esac
done
