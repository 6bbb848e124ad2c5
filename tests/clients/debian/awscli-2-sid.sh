# The command line interface, version 2, of the release of Debian that is yet to come.
. "$PROGRAMS/debian/own_python.sh"
start_python with_awscli.py
