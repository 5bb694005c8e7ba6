# Environment of every rank for NCCL, CUDA and torch's allocator. Variables that are already set keep their values.
# launch/slurm/pretrain.sbatch sources it; without Slurm: `TENSOR_PARALLEL=1; . launch/env.sh` before torchrun. Not yet run on GPUs.
# Put a cluster's own settings into slurm.env or the environment (list at the end).

default() { export "$1=${!1-$2}"; }

# print the reason of an error; INFO prints a page per rank
default NCCL_DEBUG WARN

# 4.096 us x 2^22 = 17 s per try, 7 tries: long enough for a flapping link or a switch that reboots, where NCCL's shorter default
# ends the run (user guide: larger on large networks). health.hang_seconds ends a run whose peer never returns.
default NCCL_IB_TIMEOUT 22

# torch's flight recorder keeps each rank's last collectives and dumps them at a timeout, which shows the missing rank.
# The dumps are pickles for torch's tools; this repository does not read them.
default TORCH_FR_BUFFER_SIZE 2000
default TORCH_NCCL_DUMP_ON_TIMEOUT 1
default TORCH_FR_DUMP_TEMP_FILE "${LOGS:-/tmp}/nccl-rank-"

# one hardware queue, so that kernels start in launch order: megatron-core's linear layers rely on it to overlap the all-reduce of
# the input gradient with the weight gradient. Without tensor parallelism CUDA's default of 8 queues is better.
if [ "${TENSOR_PARALLEL:-1}" -gt 1 ]; then default CUDA_DEVICE_MAX_CONNECTIONS 1; fi

# a stage with a longer context allocates other sizes: expandable segments avoid fragmentation
default PYTORCH_ALLOC_CONF expandable_segments:True

# Not set here, since a wrong value is worse than none:
#   NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME   interfaces of NCCL's bootstrap and of gloo's loss reduction, if the first one is wrong
#   NCCL_IB_HCA                              InfiniBand adapters to use, if some are for storage
#   NCCL_NET_PLUGIN, FI_PROVIDER             networks other than InfiniBand (EFA)
# Not set here, since the defaults are right:
#   TORCH_NCCL_ASYNC_ERROR_HANDLING          3: a rank whose collective failed exits, and torchrun with it
#   NCCL_NVLS_ENABLE                         all-reduce inside NVSwitch; 0 saves its buffers when memory is short
#   NCCL_ALGO, NCCL_PROTO                    chosen by size and topology; NCCL_ALGO=Ring keeps the order of sums between runs
