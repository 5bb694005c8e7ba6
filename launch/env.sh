# What NCCL, CUDA and torch's allocator are told on every rank, each with its reason; what is set already stays as it is.
# launch/slurm/pretrain.sbatch reads it; without Slurm: `TENSOR_PARALLEL=1; . launch/env.sh` before torchrun. No GPU has tried it yet.
# A cluster's own settings go to slurm.env or the environment (the list at the end).

default() { export "$1=${!1-$2}"; }

# the reason of an error, once, instead of silence; INFO writes a page per rank
default NCCL_DEBUG WARN

# 4.096 us x 2^22 = 17 s a try, 7 tries: a link that flaps or a switch that reboots is waited for. NCCL's shorter default ends the
# run (user guide: larger on large networks); health.hang_seconds ends what stays away for good.
default NCCL_IB_TIMEOUT 22

# torch keeps the last collectives of each rank and writes them down when one does not end: which rank never came.
# The files are pickles for torch's own flight recorder tools; nothing here reads them.
default TORCH_FR_BUFFER_SIZE 2000
default TORCH_NCCL_DUMP_ON_TIMEOUT 1
default TORCH_FR_DUMP_TEMP_FILE "${LOGS:-/tmp}/nccl-rank-"

# one hardware queue, so that kernels start in the order they are called: megatron-core's linear layers count on it to sum
# an input's gradient while they compute the weight's. Without tensor parallelism more queues are better: CUDA's default of 8.
if [ "${TENSOR_PARALLEL:-1}" -gt 1 ]; then default CUDA_DEVICE_MAX_CONNECTIONS 1; fi

# a stage with a longer context brings other sizes: pages are mapped anew instead of lying free in pieces that do not fit
default PYTORCH_ALLOC_CONF expandable_segments:True

# Left to the cluster, for a wrong value is worse than none:
#   NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME   where NCCL meets, and where the loop sums its losses, if the first interface is wrong
#   NCCL_IB_HCA                              which adapters, if some are for storage
#   NCCL_NET_PLUGIN, FI_PROVIDER             networks that are no InfiniBand (EFA)
# Left to the libraries, whose defaults are right:
#   TORCH_NCCL_ASYNC_ERROR_HANDLING          3: a rank whose collective failed ends, and torchrun with it
#   NCCL_NVLS_ENABLE                         sums inside NVSwitch where there is one; 0 saves its buffers when memory is short
#   NCCL_ALGO, NCCL_PROTO                    chosen by size and topology; pinned (Ring), sums keep their order from run to run
