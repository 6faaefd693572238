# shellcheck shell=bash
# One node of a launch; sourced by every examples/*/torchrun.sh, which Slurm's scripts start on each node.
#
# From cluster.sh of the scale, or from the environment, which wins:
#   NODES SERVER_NODES GPUS_PER_NODE GPU SERVER_GPUS SERVER_MAX_LEN OUTPUT_DIR CONFIG
# From whoever starts several nodes, the same on all of them:
#   HEAD PORT            the first training node, where the ranks meet
#   RUN_ID               a name for this start
#   SERVER_HOSTS         names of the last SERVER_NODES nodes, separated by spaces
#   UNISD_SERVER_TOKEN   a secret between trainer and servers
#   STOP_FILE            on a file system that all see: while it is there, ranks are asked to stop (optional)
# and of this node: ROLE   train (default) or server
: "${PYTHON:=python3}" "${ROLE:=train}" "${HEAD:=localhost}" "${PORT:=29500}" "${RUN_ID:=unisd}" "${MAX_RESTARTS:=3}"
: "${SERVER_NODES:=0}" "${SERVER_GPUS:=$GPUS_PER_NODE}" "${SERVER_PORT:=8000}" "${SERVER_HOSTS:=}" "${DRY_RUN:=}" "${CHECK:=1}" "${STOP_FILE:=}"
SIGNALLED=""
SERVERS=() # not of a function: the trap at the end reads it when there is none

REPOSITORY="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)"
cd -- "$REPOSITORY" || exit # paths in configurations are relative to it
TRAIN_NODES=$((NODES - SERVER_NODES))

environment() {
    # Kernels reach the GPU in the order they were issued, so that the communication of tensor and sequence parallelism starts
    # before the computation it is to hide behind. Megatron asks for it on GPUs up to Hopper.
    export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
    # Transformer Engine's norms leave some multiprocessors to that communication.
    export NVTE_FWD_LAYERNORM_SM_MARGIN="${NVTE_FWD_LAYERNORM_SM_MARGIN:-16}"
    export NVTE_BWD_LAYERNORM_SM_MARGIN="${NVTE_BWD_LAYERNORM_SM_MARGIN:-16}"
    # A collective that failed or ran out of time ends its process, so that torchrun can restart; else it would hang.
    export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
    # A restart of the ranks needs a store of its own: in the one that torchrun shares with them by default they find the
    # addresses of the ranks that died, and wait for those (seen with gloo: "connectFullMesh failed ... Connection refused").
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"
    # NCCL says what is wrong. Its choice of network is left alone; where hosts have several, set NCCL_SOCKET_IFNAME,
    # NCCL_IB_HCA and GLOO_SOCKET_IFNAME (token ids and numbers travel by gloo).
    export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
    # Memory for NVLink SHARP is taken beside what the plan counts.
    export NCCL_NVLS_ENABLE="${NCCL_NVLS_ENABLE:-0}"
    # Each rank has threads of its own; without this every one of them would start as many as the host has cores.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
    export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}" # it must not have threads when writers are forked
    export PYTHONUNBUFFERED=1                                        # the last words of a rank that dies reach the log
    # Hundreds of ranks must not ask the hub; fetch before the start, into an HF_HOME that all nodes see.
    export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
    # The time that ranks have to end before torchrun kills them, seconds.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-30}"
    export PYTHONPATH="$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}"
}

server_urls() {
    local host number urls=()
    for host in $SERVER_HOSTS; do
        for ((number = 0; number < GPUS_PER_NODE / SERVER_GPUS; number++)); do
            urls+=("http://$host:$((SERVER_PORT + number))")
        done
    done
    (IFS=,; echo "${urls[*]}")
}

# The ranks are torchrun's children; torchrun itself, and what ranks start, must not get the signal.
tell_ranks() {
    local ranks=()
    read -r -a ranks <"/proc/$1/task/$1/children" || true
    ((${#ranks[@]} == 0)) || kill -USR1 "${ranks[@]}" 2>/dev/null || true
}

# Whether this script was sent USR1 or TERM, or the job's stop file is there.
asked() {
    [[ -n $SIGNALLED ]] || [[ -n $STOP_FILE && -e $STOP_FILE ]]
}

# Runs torchrun. Where the end is asked for, the ranks stop after the step they are in, with a checkpoint.
train() {
    local status=0 torchrun
    # Ignored until a rank is ready for it: the signal would end a process that has not come so far.
    (
        trap '' USR1
        exec "${TORCHRUN[@]}"
    ) &
    torchrun=$!
    while kill -0 "$torchrun" 2>/dev/null; do
        # Again and again: ranks that were starting have ignored it.
        ! asked || tell_ranks "$torchrun"
        sleep 5 &
        wait -n "$torchrun" $! || true
    done
    wait "$torchrun" || status=$?
    say_how_it_ended
    return "$status"
}

say_how_it_ended() {
    if [[ -f $OUTPUT_DIR/finished.json ]]; then
        echo "launch: $OUTPUT_DIR is finished"
    else
        echo "launch: $OUTPUT_DIR is not finished; the same command goes on from its last complete checkpoint"
    fi
}

# The servers of this node, until one ends or this script is told to end.
serve() {
    local number gpus model="$MODEL" address="${SLURMD_NODENAME:-$(hostname)}"
    "$PYTHON" -c 'import socket, sys
if socket.gethostbyname(sys.argv[1]).startswith("127."):
    sys.exit(f"launch: this host calls itself {sys.argv[1]}, which other hosts cannot reach (127.x); correct /etc/hosts")' "$address"
    [[ -d $model ]] || model="$("$PYTHON" -c 'import sys, huggingface_hub as hub; print(hub.snapshot_download(sys.argv[1]))' "$model")"
    trap 'kill "${SERVERS[@]}" 2>/dev/null || true' EXIT
    trap 'exit 0' TERM INT
    trap '' USR1 # it is for the ranks
    for ((number = 0; number < GPUS_PER_NODE / SERVER_GPUS; number++)); do
        gpus="$(seq -s, $((number * SERVER_GPUS)) $((number * SERVER_GPUS + SERVER_GPUS - 1)))"
        CUDA_VISIBLE_DEVICES="$gpus" "$PYTHON" tools/serve_vllm.py --model "$model" --host "$address" \
            --port "$((SERVER_PORT + number))" --tensor_parallel_size "$SERVER_GPUS" --max_model_len "$SERVER_MAX_LEN" &
        SERVERS+=($!)
    done
    wait -n || true # one that ended is missed by the trainer, which goes on with the others
    wait
    echo "launch: all rollout servers of $address have ended" >&2
    return 1
}

wait_for_servers() {
    "$PYTHON" - "$1" <<'PYTHON'
import sys, time, urllib.request
deadline = time.time() + 3600
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # not by way of a proxy that leads out of the cluster
for url in sys.argv[1].split(","):
    while True:
        try:
            direct.open(url + "/health", timeout=5)
            break
        except OSError as error:
            if time.time() > deadline:
                sys.exit(f"launch: the rollout server {url} did not start within an hour ({error})")
            time.sleep(5)
PYTHON
}

# launch [--dry-run] [flags of `unisd train`]
launch() {
    local flags=() word urls machines
    for word in "$@"; do
        if [[ $word == --dry-run || $word == --dry_run ]]; then DRY_RUN=1; else flags+=("$word"); fi
    done
    if ((SERVER_NODES > 0)); then
        if [[ -z $SERVER_HOSTS && -n $DRY_RUN ]]; then
            SERVER_HOSTS="$(seq -s ' ' -f 'node%g' $((TRAIN_NODES + 1)) "$NODES")" # their names are not known yet
        fi
        : "${SERVER_HOSTS:?names of the $SERVER_NODES nodes of rollout servers}"
        urls="$(server_urls)"
        flags=(--vllm_server_urls "$urls" "${flags[@]}")
    fi
    flags=(--config "$CONFIG" --output_dir "$OUTPUT_DIR" --resume_from_checkpoint auto ${MODEL:+--model_name "$MODEL"} "${flags[@]}")
    # c10d and not static rendezvous: only so do the launchers of all nodes begin a restart together. Its launchers do not see a
    # link that goes silent (docs/failures.md); Slurm's --kill-on-bad-exit ends those, without Slurm whoever started them.
    MODEL="${MODEL:-$(sed -n 's/^model_name: *//p' "$CONFIG")}"
    TORCHRUN=("$PYTHON" -m torch.distributed.run --nnodes "$TRAIN_NODES" --nproc-per-node "$GPUS_PER_NODE"
        --rdzv-backend c10d --rdzv-id "$RUN_ID" --rdzv-endpoint "$HEAD:$PORT" --max-restarts "$MAX_RESTARTS"
        -m unisd_megatron train "${flags[@]}")
    machines=(--gpus $((TRAIN_NODES * GPUS_PER_NODE)) --gpus-per-node "$GPUS_PER_NODE" --gpu "$GPU")
    ((SERVER_NODES == 0)) || machines+=(--server-gpus "$SERVER_GPUS")
    environment
    if [[ -n $DRY_RUN ]]; then
        echo "nodes 1 to $TRAIN_NODES: $GPUS_PER_NODE ranks each"
        printf '  %s\n' "${TORCHRUN[*]}"
        if ((SERVER_NODES > 0)); then
            echo "nodes $((TRAIN_NODES + 1)) to $NODES: $((GPUS_PER_NODE / SERVER_GPUS)) rollout servers of $SERVER_GPUS GPUs each"
            echo "  $PYTHON tools/serve_vllm.py --model $MODEL --port $SERVER_PORT.. --tensor_parallel_size $SERVER_GPUS --max_model_len $SERVER_MAX_LEN"
        fi
        "$PYTHON" -m unisd_megatron train "${flags[@]}" --dry-run "${machines[@]}"
        return
    fi
    ((SERVER_NODES == 0)) || : "${UNISD_SERVER_TOKEN:?a secret of trainer and servers, the same on all nodes: openssl rand -hex 32}"
    if [[ $ROLE == server ]]; then
        serve
        return
    fi
    trap 'SIGNALLED=1' USR1 TERM
    # A second now instead of an hour in a queue of restarts; CHECK=0 leaves it out.
    [[ $CHECK == 0 ]] || "$PYTHON" -m unisd_megatron train "${flags[@]}" --dry-run "${machines[@]}" >/dev/null
    ((SERVER_NODES == 0)) || wait_for_servers "$urls"
    if asked; then say_how_it_ended; else train; fi
}
