# shellcheck shell=bash
# The machines of this launch; each can be set in the environment instead.
: "${NODES:=10}"             # all of them; slurm.sbatch asks for as many
: "${GPUS_PER_NODE:=8}" "${GPU:=h100}"
: "${SERVER_NODES:=2}"       # the last of them hold rollout servers
: "${SERVER_GPUS:=4}" "${SERVER_MAX_LEN:=4096}" # of each server; its longest prompt and completion, tokens
: "${OUTPUT_DIR:=runs/llama3_1_70b}" # on a file system that all nodes see
