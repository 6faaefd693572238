# shellcheck shell=bash
# A whole Slurm job; sourced by every examples/*/slurm.sbatch. One task per node, which runs torchrun.sh of the scale's folder.
#
# What ends a job and what becomes of the run:
#   its time limit      Slurm sends USR1 (#SBATCH --signal) before; the ranks stop with a checkpoint, the job requeues itself
#                       if there is one that was not there at its start; without, every start would end where this one did
#   a rank that fails   torchrun restarts all ranks from the last complete checkpoint, MAX_RESTARTS times
#   a node that fails   Slurm requeues the job (#SBATCH --requeue)
#   the last step       RUN/finished.json is there; nothing is requeued

newest_checkpoint() {
    # Half-written ones have another ending. Numbers are as wide as sorting by name needs.
    { find "$OUTPUT_DIR/checkpoints" -maxdepth 1 -name 'step_*' ! -name '*.*' 2>/dev/null || true; } | sort | tail -n 1
}

# job FOLDER [--dry-run] [flags of `unisd train`]
job() {
    local here="$1" word hosts=() servers=() trainers=() step server_step='' status=0 before
    shift
    for word in "$@"; do
        [[ $word != --dry-run && $word != --dry_run ]] || DRY_RUN=1
    done
    if [[ -n ${DRY_RUN:-} ]]; then
        echo "srun --nodes=$((NODES - SERVER_NODES)) on the first nodes, --nodes=$SERVER_NODES on the last ones, one task each: torchrun.sh"
        DRY_RUN=1 bash "$here/torchrun.sh" "$@"
        return
    fi
    if [[ -z ${SLURM_JOB_ID:-} ]]; then
        echo "slurm.sbatch: start it with sbatch, or with --dry-run" >&2
        return 2
    fi
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    if ((${#hosts[@]} != NODES)); then
        echo "slurm.sbatch: ${#hosts[@]} nodes were given and cluster.sh says NODES=$NODES; change one" >&2
        return 2
    fi
    trainers=("${hosts[@]:0:NODES-SERVER_NODES}")
    servers=("${hosts[@]:NODES-SERVER_NODES}")
    export HEAD="${trainers[0]}" PORT="${PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
    export RUN_ID="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" SERVER_HOSTS="${servers[*]}"
    # By a file and not by a signal through srun, which reaches every process of a step: programs that are being scored, servers.
    export STOP_FILE="$OUTPUT_DIR.stop-$RUN_ID"
    mkdir -p -- "$(dirname -- "$OUTPUT_DIR")"
    before="$(newest_checkpoint)"
    trap 'touch -- "$STOP_FILE"' USR1 TERM
    trap 'rm -f -- "$STOP_FILE"' EXIT
    DRY_RUN=1 bash "$here/torchrun.sh" "$@" # into the log; an impossible request ends here
    if ((SERVER_NODES > 0)); then
        UNISD_SERVER_TOKEN="${UNISD_SERVER_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}"
        export UNISD_SERVER_TOKEN
        ROLE=server srun --nodes="$SERVER_NODES" --ntasks="$SERVER_NODES" --nodelist="$(IFS=,; echo "${servers[*]}")" \
            bash "$here/torchrun.sh" "$@" &
        server_step=$!
    fi
    srun --nodes="${#trainers[@]}" --ntasks="${#trainers[@]}" --nodelist="$(IFS=,; echo "${trainers[*]}")" --kill-on-bad-exit=1 \
        bash "$here/torchrun.sh" "$@" &
    step=$!
    while kill -0 "$step" 2>/dev/null; do
        wait "$step" || true # a signal ends the wait too
    done
    wait "$step" || status=$?
    [[ -z $server_step ]] || kill -TERM "$server_step" 2>/dev/null || true
    [[ -z $server_step ]] || wait "$server_step" || true
    if ((status == 0)) && [[ ! -f $OUTPUT_DIR/finished.json ]]; then
        if [[ $(newest_checkpoint) == "$before" ]]; then
            echo "slurm.sbatch: this start has made no checkpoint, so the job is not requeued; look above for what it waited for" >&2
            return 1
        fi
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$status"
}
