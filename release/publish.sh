#!/usr/bin/env bash
# Push what build.sh left to a registry, with the chart and the manifests that name it by digest:
#   REGISTRY/kirsa:VERSION          the image index
#   REGISTRY/charts/kirsa:VERSION   the chart, whose default image is the digest of that index
#   target/dist                     chart, install.yaml, uninstall.yaml, digests, SHA256SUMS
# A version that is published already with other contents is refused. Credentials are those of `skopeo login`, `helm
# registry login` or `docker login`.
#   publish.sh [check]     check: only whether the registry answers
#   REGISTRY=HOST/PATH     required
#   DIST=DIR               instead of target/dist
#   PLAIN_HTTP=1           a registry without TLS
set -euo pipefail
. "$(dirname "$0")/common.sh"
dist=$(realpath -m "${DIST:-$repo/target/dist}")
check_registry
tls=true helm_http=
[ "${PLAIN_HTTP:-}" != 1 ] || { tls=false helm_http=--plain-http; }
PATH=$PATH:$repo/target/cluster/bin
need skopeo skopeo
need jq jq
for tool in helm kustomize; do command -v "$tool" >/dev/null || die "$tool is missing: tests/setup.sh release builds it"; done
layout=$dist/image image=$REGISTRY/kirsa charts=$REGISTRY/charts
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT

published() { # repository: the digest of the version there, or nothing
  if skopeo inspect --raw --tls-verify=$tls "docker://$1:$version" >"$work/raw" 2>"$work/error"; then
    echo "sha256:$(sha256sum <"$work/raw" | cut -d' ' -f1)"
  elif ! grep -qiE 'manifest unknown|name unknown|repository name not known' "$work/error"; then
    cat "$work/error" >&2
    die "cannot ask $1 whether $version is published"
  fi
}

if [ "${1:-}" = check ]; then published "$image" >/dev/null; exit; fi

[ -f "$layout/index.json" ] || die "no image in $layout: release/build.sh makes it"
digest=$(jq -r --arg version "$version" '.manifests[] | select(.annotations["org.opencontainers.image.ref.name"] == $version).digest' "$layout/index.json")
[ -n "$digest" ] || die "$layout has no version $version: release/build.sh makes it"
epoch=${SOURCE_DATE_EPOCH:-$(git -C "$repo" log -1 --format=%ct)}

# The manifests with the image by digest; kustomize reads daemonset/ through a relative path.
manifests() { # folder of daemonset/
  mkdir -p "$work/overlay"
  cat >"$work/overlay/kustomization.yaml" <<K
resources: [$(realpath --relative-to="$work/overlay" "$repo/daemonset/$1")]
images: [{name: localhost/kirsa, newName: "$image", digest: "$digest"}]
K
  kustomize build "$work/overlay"
}

chart() {
  local chart=$work/kirsa
  # Through the links in files/.
  cp -rL "$repo/daemonset/chart" "$chart"
  sed -i -e "s|^  repository: localhost/kirsa\$|  repository: $image|" -e "s|^  digest: \"\"\$|  digest: $digest|" "$chart/values.yaml"
  grep -qF "  repository: $image" "$chart/values.yaml" && grep -qF "  digest: $digest" "$chart/values.yaml" ||
    die "image.repository and image.digest are not where they were in daemonset/chart/values.yaml"
  find "$chart" -exec touch -d "@$epoch" {} +
  helm package "$chart" --destination "$dist" >/dev/null
}

say "image $image:$version"
already=$(published "$image")
[ -z "$already" ] || [ "$already" = "$digest" ] ||
  die "$image:$version is published already, as $already, and this is $digest: a version's contents do not change; raise the version"

manifests . >"$dist/install.yaml"
manifests uninstall >"$dist/uninstall.yaml"
chart
archive=kirsa-$version.tgz
touch -d "@$epoch" "$dist/$archive"
skopeo copy -q --all --preserve-digests --dest-tls-verify=$tls "oci:$layout:$version" "docker://$image:$version"
[ "$(published "$image")" = "$digest" ] || die "$image:$version is not what was pushed, $digest"
# shellcheck disable=SC2086
(cd "$dist" && helm push $helm_http "$archive" "oci://$charts") >"$work/push" 2>&1 || { cat "$work/push" >&2; die "cannot push the chart"; }
chart_digest=$(sed -n 's/^Digest: //p' "$work/push")
[ -n "$chart_digest" ] || { cat "$work/push" >&2; die "helm printed no digest of the chart (above)"; }
printf '%s\n' "$image:$version@$digest" "$charts/kirsa:$version@$chart_digest" >"$dist/digests"
(cd "$dist" && sha256sum -- kirsa-* ./*.yaml digests | sed 's, \./, ,' >SHA256SUMS)
cat "$dist/digests"
