#!/bin/sh
# Train on this host, with a worker on each GPU of other hosts, over plain ssh:
#
#   ADDRESS=10.0.0.1 examples/cluster/ssh.sh "gpu-1:4 gpu-2:4" prod --set max_updates=1000
#
# The first argument lists the hosts, each with the number of its GPUs (1 on a Mac); the others are those of grpo train.
# ADDRESS is this host as the others reach it, PORT the first of three ports. On every host, grpo is on PATH, and the
# model has the same name. Workers end with the run.
set -eu

hosts=$1
shift
address=${ADDRESS:-$(hostname)}
port=${PORT:-7000}
name=ssh-$$
key=$(mktemp -d)/$name.key

grpo keys new "$name" --output "$key"
trap 'grpo keys revoke "$name"; rm -f "$key"; rmdir "$(dirname "$key")"' EXIT

for host in $hosts; do
    # A Mac or a host without a GPU has one device too, number 0. The key is read from ssh's standard input.
    # shellcheck disable=SC2029 # what is not escaped is this host's
    ssh "${host%:*}" "
        umask 077
        cat >.grpo-$name.key
        trap 'rm -f .grpo-$name.key' EXIT
        device=0
        while [ \$device -lt ${host##*:} ]; do
            grpo worker --connect tcp://$address:$port --key .grpo-$name.key --device \$device &
            device=\$((device + 1))
        done
        wait
    " <"$key" &
done

grpo train "$@" --set scheme=tcp --set host="${LISTEN:-0.0.0.0}" --set port="$port"
wait
