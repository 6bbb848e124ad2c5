# The image: a static kirsa, and the nft and iptables that it runs with just the libraries that these load.
#
# FROM scratch and one COPY, because there is nothing to pull: no base image, no build stage, hence the same image
# on a laptop, on a build machine without a registry, and under buildah as under docker. daemonset/image.sh prepares
# the context (target/image/rootfs) from the build machine's Debian packages, builds the binary, runs this file and
# prints the size. The package database entries of what was taken are in /var/lib/dpkg/status.d, where
# vulnerability scanners look for them; the licences are in /usr/share/doc.
FROM scratch

ARG VERSION=dev
LABEL org.opencontainers.image.title="kirsa" \
      org.opencontainers.image.description="IRSA for programs that only know the instance metadata service" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"

COPY rootfs/ /

# nft and iptables-restore are looked up here; there is no shell.
ENV PATH=/usr/bin:/usr/sbin
# Not a USER: the CNI records are root's, 0600. The DaemonSet drops every capability but one instead.
ENTRYPOINT ["/usr/bin/kirsa"]
CMD ["run"]
