#!/usr/bin/env bash
# Index a workload on SLURM, then score it, then report: three jobs, each when the one before is done.
#
#     bash jobs/slurm/submit.sh configs/digits.toml
#     WORKERS=64 OPTIONS='{memory = "32GB", queue = "gpu", walltime = "08:00:00"}' \
#         bash jobs/slurm/submit.sh my.toml
#
# needs      sbatch; an environment with tda-engine[slurm] that the nodes see (activate it first);
#            the run's path and the data on a file system that all nodes share
# hardware   WORKERS jobs of one process each, and one small job that gives out the work
# time       `tda plan CONFIG` says how many worker hours
# expected   the three job ids; RUN/report.html in the end
#
# The workers are jobs of their own, submitted by dask-jobqueue from inside the first two; OPTIONS
# are its arguments (memory is needed). jobs/slurm/worker.sbatch shows the script that it submits.
# Preempted, requeued or out of time, nothing is lost but a chunk a worker: step.sbatch puts itself
# back into the queue and resumes.
set -euo pipefail
config=${1:?usage: bash jobs/slurm/submit.sh CONFIG.toml}
here=$(cd "$(dirname "$0")" && pwd)
workers=${WORKERS:-8}
options=${OPTIONS:-'{memory = "16GB", walltime = "04:00:00"}'}
cluster=(--set cluster.kind=slurm --set "cluster.workers=$workers" --set "cluster.options=$options")

index=$(sbatch --parsable --job-name=tda-index "$here/step.sbatch" index "$config" "${cluster[@]}")
score=$(sbatch --parsable --job-name=tda-score --dependency="afterok:$index" \
    "$here/step.sbatch" score "$config" "${cluster[@]}")
report=$(sbatch --parsable --job-name=tda-report --dependency="afterok:$score" \
    "$here/step.sbatch" report "$config")
echo "index $index, score $score, report $report"
