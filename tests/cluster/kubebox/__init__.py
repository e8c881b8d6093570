"""A real Kubernetes of several nodes on one Linux machine, made of processes and namespaces alone.

Who calls it: `tests/cluster/cluster` (a person, the Makefile, the end-to-end tests). Standard library only, so that
it runs on Debian's python3 before anything is installed. From the outside in:

    cli      words on the command line → one function of `cluster`
    cluster  the verbs: up, down, join, leave, load, status; each leaves the machine in a named state
    control  etcd, API server, controller manager, scheduler, DNS
    node     containerd, kubelet and kube-proxy in namespaces of their own
    network  namespaces, cables, routes      pki      certificates and kubeconfigs
    processes  start in a cgroup, end by it  waiting  conditions with a deadline
    build    sources → binaries, cached      oci      files → an image archive
    image_store  images unpacked once, for every node to link to
    settings versions, addresses, paths
"""
