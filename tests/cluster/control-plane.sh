#!/usr/bin/env bash
# Starts the machine vpc: the network outside the nodes, with the control plane. up.sh calls it.
set -euo pipefail
. "$(dirname "$0")/machine.sh"
address=10.250.0.254 services=10.96.0.0/16
[ "$dual" = no ] || services+=,fd00:96::/112

machine_start vpc
on vpc ip link add vpc0 type bridge
on vpc ip addr add $address/24 dev vpc0
on vpc ip link set vpc0 up
on vpc sysctl -qw net.ipv4.ip_forward=1
# The metadata address is outside the node, as on EC2.
on vpc ip addr add 169.254.169.254/32 dev lo
if [ "$dual" = yes ]; then
  on vpc ip addr add fd00:250::254/64 dev vpc0 nodad
  on vpc sysctl -qw net.ipv6.conf.all.forwarding=1
  on vpc ip addr add fd00:ec2::254/128 dev lo
fi

mkdir -p "$state/pki"; cd "$state/pki"
if [ ! -f ca.crt ]; then
  {
    openssl req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.crt -subj /CN=ca -days 30
    openssl genrsa -out sa.key 2048; openssl rsa -in sa.key -pubout -out sa.pub
  } 2>/dev/null
fi
certificate() { # name subject san
  [ -f "$1.crt" ] && return
  {
    openssl req -newkey rsa:2048 -nodes -keyout "$1.key" -out "$1.csr" -subj "$2"
    openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -days 30 -out "$1.crt" \
      -extfile <(printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth,clientAuth\n' "$3")
  } 2>/dev/null
}
kubeconfig() { # name
  cat >"$state/$1.kubeconfig" <<T
apiVersion: v1
kind: Config
current-context: kirsa
contexts: [{name: kirsa, context: {cluster: kirsa, user: $1}}]
clusters: [{name: kirsa, cluster: {server: "https://$address:6443", certificate-authority: $state/pki/ca.crt}}]
users: [{name: $1, user: {client-certificate: $state/pki/$1.crt, client-key: $state/pki/$1.key}}]
T
}
names=DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local,DNS:localhost
certificate apiserver /CN=kube-apiserver "$names,IP:127.0.0.1,IP:10.96.0.1,IP:$address"
certificate admin /O=system:masters/CN=admin DNS:admin
certificate controller-manager /CN=system:kube-controller-manager DNS:controller-manager
certificate scheduler /CN=system:kube-scheduler DNS:scheduler
certificate proxy /CN=system:kube-proxy DNS:proxy
certificate to-kubelet /O=system:masters/CN=to-kubelet DNS:to-kubelet
for n in $(seq "$nodes"); do certificate "node$n" "/O=system:nodes/CN=system:node:node$n" "DNS:node$n,IP:10.250.0.$n"; done
for name in admin controller-manager scheduler proxy; do kubeconfig $name; done
for n in $(seq "$nodes"); do kubeconfig "node$n"; done

pki=$state/pki
daemon vpc etcd "$bin/etcd" --data-dir /var/lib/etcd --unsafe-no-fsync \
  --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 --listen-peer-urls http://127.0.0.1:2380
daemon vpc apiserver "$bin/kube-apiserver" --etcd-servers=http://127.0.0.1:2379 --secure-port=6443 --advertise-address=$address \
  --service-cluster-ip-range=$services --allow-privileged=true \
  --tls-cert-file="$pki/apiserver.crt" --tls-private-key-file="$pki/apiserver.key" --client-ca-file="$pki/ca.crt" \
  --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction \
  --service-account-issuer=https://kubernetes.default.svc.cluster.local \
  --service-account-jwks-uri=https://$address:6443/openid/v1/jwks \
  --service-account-key-file="$pki/sa.pub" --service-account-signing-key-file="$pki/sa.key" \
  --kubelet-preferred-address-types=InternalIP \
  --kubelet-client-certificate="$pki/to-kubelet.crt" --kubelet-client-key="$pki/to-kubelet.key"
wait_for 120 "API server (see $state/vpc/log/apiserver.log)" kubectl get --raw /readyz
daemon vpc controller-manager "$bin/kube-controller-manager" --kubeconfig="$state/controller-manager.kubeconfig" \
  --service-account-private-key-file="$pki/sa.key" --root-ca-file="$pki/ca.crt" --use-service-account-credentials \
  --controllers='*,-node-ipam-controller' --leader-elect=false
daemon vpc scheduler "$bin/kube-scheduler" --kubeconfig="$state/scheduler.kubeconfig" --leader-elect=false
