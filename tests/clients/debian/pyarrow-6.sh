# pyarrow has none of that age for the Python of today.
. "$PROGRAMS/debian/own_python.sh"
start_python with_pyarrow.py
