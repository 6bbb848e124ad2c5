# The image contains a static kirsa, and the nft and iptables that it runs, with only the libraries that these load.
#
# It is FROM scratch with one COPY, so the build pulls nothing: no base image and no build stage. The image is the same
# on a laptop, on a build machine without a registry, and with buildah or docker. daemonset/image.sh prepares the context
# (target/image/rootfs) from the build machine's Debian packages, builds the binary, runs this file and prints the size.
# The package database entries of the copied files are in /var/lib/dpkg/status.d, where vulnerability scanners look for
# them; the licenses are in /usr/share/doc.
FROM scratch

ARG VERSION=dev
LABEL org.opencontainers.image.title="kirsa" \
      org.opencontainers.image.description="IRSA for programs that only know the instance metadata service" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"

COPY rootfs/ /

# kirsa finds nft and iptables-restore in this PATH; there is no shell.
ENV PATH=/usr/bin:/usr/sbin
# No USER: CNI records belong to root, with mode 0600. The DaemonSet drops all capabilities but two instead.
ENTRYPOINT ["/usr/bin/kirsa"]
CMD ["run"]
