#!/usr/bin/env bash
# Starts a cluster of real parts: etcd, kube-apiserver, controller-manager, scheduler; and per node kubelet, kube-proxy,
# containerd, runc, CNI plugins. Needs root; touches no network, mount or process of this machine outside its own
# namespaces, and no packet leaves them.
#   up.sh                        exits when every node is Ready; then: enter.sh, down.sh
#   KIRSA_CLUSTER=DIR            state directory (default /tmp/kirsa-cluster)
#   NODES=1                      number of nodes
#   CNI=ptp|bridge|routed        routed: the host end of a pod's veth has no address, as with AWS VPC CNI and Calico
#   PROXY_MODE=nftables|iptables
#   DUAL_STACK=auto|no           IPv6 in addition to IPv4, if the kernel supports it
#   POD_MASK=24                  size of a node's pod network
#   TAINTS=...                   kubelet's --register-with-taints
#   BIN=DIR                      existing binaries, instead of building them
#
#   machine vpc    10.250.0.254  control plane, STS stand-in; owns 169.254.169.254: a request that reaches it is a leak
#   machine node<n> 10.250.0.<n> pods 10.244.<n>.0/24
set -euo pipefail
. "$(dirname "$0")/machine.sh"
[ "$(id -u)" = 0 ] || die "needs root, for namespaces, mounts and cgroups: sudo $0"
for tool in unshare nsenter ip runc openssl jq conntrack iptables nft buildah; do
  command -v "$tool" >/dev/null || die "$tool is missing: apt-get install iproute2 runc openssl jq conntrack iptables nftables buildah"
done
[ -x /usr/lib/cni/ptp ] || die "/usr/lib/cni is missing: apt-get install containernetworking-plugins"
[ ! -e "$state/settings" ] || die "$state: there is one already (down.sh ends it)"

programs="etcd kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubelet kubectl containerd containerd-shim-runc-v2 ctr"
bin=${BIN:-}
if [ -z "$bin" ]; then bin=$cluster/../../target/cluster/bin; "$cluster/build.sh" -o "$bin" $programs; fi
bin=$(realpath "$bin")

mkdir -p "$state"
dual=no
if [ "${DUAL_STACK:-auto}" = auto ] && [ -e /proc/sys/net/ipv6 ]; then dual=yes; fi
cat >"$state/settings" <<T
bin=$bin
nodes=${NODES:-1}
cni=${CNI:-ptp}
proxy_mode=${PROXY_MODE:-nftables}
dual=$dual
pod_mask=${POD_MASK:-24}
taints=${TAINTS:-}
cgroup=kirsa-$(basename "$state" | tr -dc 'a-zA-Z0-9-')
T
tunables >"$state/tunables.new"; mv "$state/tunables.new" "$state/tunables"
trap 'code=$?; [ $code = 0 ] || { say "failed: logs are in $state/*/log"; }' EXIT

"$cluster/control-plane.sh"
. "$state/settings"
for n in $(seq "$nodes"); do "$cluster/node.sh" "$n"; done
node_ready() { kubectl wait --for=condition=Ready "node/node$1" --timeout=5s; }
for n in $(seq "$nodes"); do
  wait_for 120 "Ready node$n (see $state/node$n/log)" node_ready "$n"
done
# No pod is admitted before that.
wait_for 60 "default service account" kubectl get serviceaccount default
say "$nodes node(s) Ready: $cluster/enter.sh node1, $cluster/enter.sh kubectl get pods -A; $cluster/down.sh ends it"
