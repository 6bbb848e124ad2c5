# For launchers: `start_python PROGRAM` on the Python of another release, with what pip or Debian put beside it.
. "$PROGRAMS/debian/own_libraries.sh"
export PYTHONHOME="$root/usr" PYTHONPATH="$PYTHONPATH:$root/usr/lib/python3/dist-packages"
for python in "$root"/usr/bin/python[23].*[0-9]; do :; done
start_python() { start "$python" "$PROGRAMS/python/$1"; }
