# The command line interface, version 2, on the Python that it is built for.
PYTHONPATH=$CLIENT/root/usr/lib/python3/dist-packages exec /usr/bin/python3 "$PROGRAMS/python/with_awscli.py"
