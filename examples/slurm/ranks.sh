# What the batch scripts share: one torchrun per node until its ranks end, and the job's way back to the queue.
# Source it from the root of the repository.

if [[ -n "${CONTAINER_IMAGE:-}" ]]; then
    mounts="$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
    container=(--container-image="$CONTAINER_IMAGE" --container-mounts="$mounts" --container-workdir="$PWD")
else
    container=()
    # shellcheck disable=SC1091
    source .venv/bin/activate
fi

# run_ranks NODELIST JOB "SRUN OPTIONS" SCRIPT [ARGUMENT ...]: ends this script, with the ranks' exit code or requeued.
run_ranks() {
    local nodes port step code back= is_warned=
    mapfile -t nodes < <(scontrol show hostnames "$1")
    local job=$2
    local -a launch
    read -ra launch <<< "srun --kill-on-bad-exit=1 $3"
    shift 3
    port=$(( 20000 + SLURM_JOB_ID % 10000 ))

    export OMP_NUM_THREADS=8
    export CUDA_DEVICE_MAX_CONNECTIONS=1  # megatron orders communication before computation by it
    export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True  # packs differ in their number of patches
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=540  # torchrun kills ranks that need longer to save: below --signal's seconds

    warn() {
        echo "$(date --iso-8601=seconds) SIGTERM: the ranks save and stop"
        is_warned=yes
        # The job's steps, not srun: upon a signal of its own srun kills its tasks at once.
        scancel --signal=TERM "$job" || true
    }
    trap warn TERM

    "${launch[@]}" "${container[@]}" python examples/torchrun.py \
        --nnodes="${#nodes[@]}" --nproc-per-node="${SLURM_GPUS_ON_NODE:-8}" \
        --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="${nodes[0]}:$port" "$@" &
    step=$!

    wait "$step" || true
    while kill -0 "$step" 2>/dev/null; do  # a trapped signal ends `wait` early
        wait "$step" || true
    done
    code=0
    wait "$step" || code=$?  # bash keeps the code of a child that has ended

    case "$code" in
        0 | 2 | 3 | 76) back= ;;  # done; or would come again: a refusal, a step that is not finite, a hang
        75) back=yes ;;           # saved and stopped for a signal
        77) if (( ${SLURM_RESTART_COUNT:-0} < 10 )); then back=yes; fi ;;  # all rollout engines were lost
        *) back=$is_warned ;;     # warned: saved, or killed while it was saving, when the checkpoint before is whole
    esac
    if [[ -n "$back" ]]; then
        echo "$(date --iso-8601=seconds) exit code $code: back to the queue"
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
    exit "$code"
}
