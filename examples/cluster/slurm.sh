#!/bin/sh
#SBATCH --job-name=grpo
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=4
#SBATCH --time=08:00:00
#
# Train on the first node of a job, with a worker on each GPU of the others:
#
#   sbatch examples/cluster/slurm.sh prod --set workers=auto --set output_dir="$PWD/run"
#
# The arguments are those of grpo train, which places learner, workers and evaluator on the GPUs of the first node. The
# folder from which the job is submitted is on a file system of all nodes, for the key. After a time limit or a lost node,
# submit the same command again: the run continues from its last checkpoint.
set -eu

head=$(hostname)
port=$((20000 + SLURM_JOB_ID % 20000))
name=slurm-$SLURM_JOB_ID
key=$SLURM_SUBMIT_DIR/$name.key

grpo keys new "$name" --output "$key"
trap 'grpo keys revoke "$name"; rm -f "$key"' EXIT

if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    # shellcheck disable=SC2016 # the variables are those of the other nodes
    srun --relative=1 --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks-per-node=1 sh -c '
        device=0
        while [ $device -lt "${SLURM_GPUS_ON_NODE:-1}" ]; do
            grpo worker --connect "$1" --key "$2" --device $device &
            device=$((device + 1))
        done
        wait
    ' workers "tcp://$head:$port" "$key" &
fi

grpo train "$@" --set scheme=tcp --set host=0.0.0.0 --set port="$port"
wait
