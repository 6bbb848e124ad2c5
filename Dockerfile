# The image contains a static kirsa, and the nft and iptables that it runs, with only the libraries that these load.
#
# FROM scratch and one COPY: there is no base image to pull and nothing is executed, so every architecture is built the
# same way, under buildah as under docker. release/rootfs.sh prepares rootfs/ from pinned Debian packages. Their database
# entries are in /var/lib/dpkg/status.d, where vulnerability scanners look for them; licenses are in /usr/share/doc.
FROM scratch

ARG VERSION=dev
ARG REVISION=
LABEL org.opencontainers.image.title="kirsa" \
      org.opencontainers.image.description="IRSA for programs that only know the instance metadata service" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

COPY rootfs/ /

# kirsa finds nft and iptables-restore in this PATH; there is no shell.
ENV PATH=/usr/bin:/usr/sbin
# No USER: CNI records belong to root, with mode 0600. The DaemonSet drops all capabilities but two instead.
ENTRYPOINT ["/usr/bin/kirsa"]
CMD ["run"]
