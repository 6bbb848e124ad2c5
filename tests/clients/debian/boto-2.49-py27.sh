# boto 2 on the last Python 2.
. "$PROGRAMS/debian/own_python.sh"
start_python with_boto2.py
