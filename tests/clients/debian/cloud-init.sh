# Debian: cloud-init=22.4.2-1+deb12u4
PYTHONPATH=$CLIENT/root/usr/lib/python3/dist-packages exec /usr/bin/python3 "$PROGRAMS/python/with_cloud_init.py"
