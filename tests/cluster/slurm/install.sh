#!/bin/sh
# Installs Slurm where it is not there and can be: by root on Debian and Ubuntu. Elsewhere its tests are skipped.
set -e
for program in slurmctld slurmd munged sbatch ip nsenter; do
    PATH="$PATH:/usr/sbin:/sbin" command -v "$program" >/dev/null || missing="$missing $program"
done
test -n "$missing" || exit 0
if test "$(id -u)" != 0 || ! command -v apt-get >/dev/null; then
    echo "not installed:$missing; on Debian, root gets them by: apt-get install slurmctld slurmd munge iproute2" >&2
    exit 0
fi
apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    slurmctld slurmd slurm-client munge iproute2 util-linux || echo "Slurm could not be installed" >&2
