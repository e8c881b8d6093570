#!/bin/bash
# What a kernel has, for `record_bcc` and BCC: run in the VM, into $VM_OUT.
set -euo pipefail
cp /sys/kernel/btf/vmlinux "$VM_OUT/vmlinux"
uname -r >"$VM_OUT/release"
# Modules that the workload and the programs of the packages name; what a kernel lacks is passed over.
for module in loop ext4 xfs btrfs nfs kvm; do modprobe "$module" 2>/dev/null || true; done
awk '{print $1}' /sys/kernel/tracing/available_filter_functions | sort -u >"$VM_OUT/functions"
awk '{print $3}' /proc/kallsyms | sort -u >"$VM_OUT/symbols"
cat /sys/kernel/tracing/available_events >"$VM_OUT/tracepoints"
# tracefs gives no sizes, so tar would pack nothing: one text, each format behind its path.
cd /sys/kernel/tracing/events
tail -n +1 -- */*/format >"$VM_OUT/formats"
