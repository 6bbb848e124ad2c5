#!/usr/bin/env bash
# Starts the machine node<n>, or restarts it: then it keeps its disk. up.sh calls it.
#   node.sh N
#   TAINTS=, BOOT_RULES=    taints to register with, nftables rules that a node image loads at boot
set -euo pipefail
. "$(dirname "$0")/machine.sh"
n=$1 name=node$1
address=10.250.0.$n
taints=${TAINTS:-$taints}
machine_start "$name"
disk=$state/$name/disk

# Connects to the network outside with a veth pair, created in the two machines and never on this host. After a crash the
# kernel may still be removing the old one.
on vpc ip link del "$name" 2>/dev/null || true
ip link add eth0 netns "$(machine_pid "$name")" type veth peer name "$name" netns "$(machine_pid vpc)"
on vpc ip link set "$name" master vpc0 up
on "$name" ip link set eth0 up
on "$name" ip addr add "$address/24" dev eth0
on "$name" ip route add default via 10.250.0.254
on "$name" sysctl -qw net.ipv4.ip_forward=1
on vpc ip route replace "10.244.$n.0/24" via "$address"
addresses=$address pods=10.244.0.0/16 ranges="[{\"subnet\":\"10.244.$n.0/$pod_mask\"}]" routes='{"dst":"0.0.0.0/0"}'
if [ "$dual" = yes ]; then
  on "$name" ip addr add "fd00:250::$n/64" dev eth0 nodad
  on "$name" ip route add default via fd00:250::254
  on "$name" sysctl -qw net.ipv6.conf.all.forwarding=1
  on vpc ip route replace "fd00:244:$n::/64" via "fd00:250::$n"
  addresses+=,fd00:250::$n pods+=,fd00:244::/32
  ranges+=",[{\"subnet\":\"fd00:244:$n::/64\"}]" routes+=',{"dst":"::/0"}'
fi

# Rules that a node image may load before the kubelet starts.
[ -z "${BOOT_RULES:-}" ] || on "$name" nft -f "$BOOT_RULES"

case $cni in
  ptp) shape='"type":"ptp","ipMasq":false' ;;
  bridge) shape='"type":"bridge","bridge":"cni0","isGateway":true,"forceAddress":true,"ipMasq":false' ;;
  routed) shape='"type":"routed"' ;;
  *) die "CNI=$cni: must be ptp, bridge or routed" ;;
esac
# host-local loses its state with the machine, as on a node whose CNI keeps it in memory or in /run: after a reboot
# addresses are assigned anew.
cat >"$disk/etc/cni/net.d/10-pods.conflist" <<T
{"cniVersion": "1.0.0", "name": "pods", "plugins": [{$shape,
  "ipam": {"type": "host-local", "dataDir": "/run/ipam", "ranges": [$ranges], "routes": [$routes]}}]}
T

# restrict_oom_score_adj, KubeletInUserNamespace: where root may not lower an oom_score_adj (a container, a build
# machine) runc would fail with nothing but "can't get final child's PID from pipe: EOF".
cat >"$state/$name/containerd.toml" <<T
version = 3
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "docker.io/library/kirsa-box:1"
[plugins.'io.containerd.cri.v1.images'.registry]
  config_path = "$state/registries"
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = ["$cluster/cni", "/usr/lib/cni"]
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    runtime_path = "$bin/containerd-shim-runc-v2"
T
# The registry that registry.sh starts, which has no TLS.
mkdir -p "$state/registries/10.250.0.254:5000"
echo 'server = "http://10.250.0.254:5000"' >"$state/registries/10.250.0.254:5000/hosts.toml"
cgroup_make "$cgroup/$name"
# NeverVerify: after a pull from a registry, the kubelet would not let a pod use the same image by the name under which
# images.sh imported it.
cat >"$state/$name/kubelet.yaml" <<T
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {x509: {clientCAFile: $state/pki/ca.crt}, webhook: {enabled: false}, anonymous: {enabled: false}}
authorization: {mode: AlwaysAllow}
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
cgroupDriver: cgroupfs
cgroupRoot: /$cgroup/$name
failCgroupV1: false
failSwapOn: false
enforceNodeAllocatable: []
evictionHard: {memory.available: "0%", nodefs.available: "0%", nodefs.inodesFree: "0%", imagefs.available: "0%"}
imageGCHighThresholdPercent: 100
imagePullCredentialsVerificationPolicy: NeverVerify
localStorageCapacityIsolation: false
clusterDomain: cluster.local
resolvConf: /dev/null
maxPods: 250
featureGates: {KubeletInUserNamespace: true}
T

daemon "$name" containerd "$bin/containerd" -c "$state/$name/containerd.toml"
wait_for 60 "containerd (see $state/$name/log/containerd.log)" on "$name" "$bin/ctr" version
"$cluster/images.sh" "$name"
daemon "$name" proxy "$bin/kube-proxy" --kubeconfig="$state/proxy.kubeconfig" --hostname-override="$name" --proxy-mode="$proxy_mode" \
  --cluster-cidr="$pods" --conntrack-max-per-core=0 --conntrack-tcp-timeout-established=0 --conntrack-tcp-timeout-close-wait=0
daemon "$name" kubelet "$bin/kubelet" --config="$state/$name/kubelet.yaml" --kubeconfig="$state/$name.kubeconfig" \
  --hostname-override="$name" --node-ip="$addresses" --root-dir=/var/lib/kubelet \
  --tls-cert-file="$state/pki/$name.crt" --tls-private-key-file="$state/pki/$name.key" \
  --node-labels=topology.kubernetes.io/region=eu-central-1,topology.kubernetes.io/zone=eu-central-1a \
  ${taints:+--register-with-taints="$taints"}
