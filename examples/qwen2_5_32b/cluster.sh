# shellcheck shell=bash
# The machines of this launch; each can be set in the environment instead.
: "${NODES:=4}"             # all of them; slurm.sbatch asks for as many
: "${GPUS_PER_NODE:=8}" "${GPU:=h100}"
: "${SERVER_NODES:=0}"       # rollouts are sampled in the training processes
: "${OUTPUT_DIR:=runs/qwen2_5_32b}" # on a file system that all nodes see
