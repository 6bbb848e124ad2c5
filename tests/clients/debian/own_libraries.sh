# For launchers: `root`, where the packages are, and `start PROGRAM ARGUMENT...` with their libraries.
set -eu
root=$CLIENT/root
for library in "$root"/lib/*-linux-gnu "$root"/usr/lib/*-linux-gnu "$root"/usr/lib/*-linux-gnu/blas \
  "$root"/usr/lib/*-linux-gnu/lapack "$root"/usr/lib; do
  [ ! -d "$library" ] || libraries=${libraries:+$libraries:}$library
done
start() {
  # Those of another release have a C library of their own, which goes by its own loader only.
  for loader in "$root"/lib/*-linux-gnu/ld-linux-*.so.? "$root"/usr/lib/*-linux-gnu/ld-linux-*.so.?; do
    [ ! -f "$loader" ] || exec "$loader" --library-path "$libraries" "$@"
  done
  export LD_LIBRARY_PATH="$libraries"
  exec "$@"
}
