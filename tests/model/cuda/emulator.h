// Runs CUDA kernels on the CPU, to test their logic: one block after another, its threads as fibers on one core.
// A barrier or shuffle switches to the next fiber; all threads of a kernel must reach these in the same order.
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#define EMULATED 1
#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline unsigned __float_as_uint(float x) { unsigned u; memcpy(&u, &x, 4); return u; }
inline float __uint_as_float(unsigned u) { float x; memcpy(&x, &u, 4); return x; }
inline int min(int a, int b) { return a < b ? a : b; }

// The hardware's approximate functions with the errors that the PTX manual allows; denormal results are zero.
inline float rounded(float x, int bits) {  // to a multiple of 2^bits of its units in the last place
    if (fabsf(x) < 1.17549435e-38f) return 0.0f;
    const unsigned half = 1u << (bits - 1);
    return __uint_as_float((__float_as_uint(x) + half) & ~(2 * half - 1));
}
inline float ex2(float x) { return rounded(exp2f(x), 2); }  // relative error 2^-22
inline float reciprocal(float x) { return rounded(1.0f / x, 1); }  // relative error 2^-23

struct Dim { int x = 1, y = 1, z = 1; };
static Dim threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
static std::vector<ucontext_t> fibers;
static std::vector<bool> done;
static std::vector<float> exchange;
static std::vector<std::vector<std::function<void()>>> copies;
static ucontext_t scheduler;
static int current;
static std::function<void()> body;
static void start() {
    body();
    done[current] = true;
    swapcontext(&fibers[current], &scheduler);
}
static void wait() {
    swapcontext(&fibers[current], &scheduler);
    threadIdx.x = current;
}
static void run_block(int threads, bool falling) {
    static std::vector<std::vector<char>> stacks;
    stacks.resize(threads, std::vector<char>(1 << 16));
    fibers.assign(threads, {}), done.assign(threads, false), exchange.assign(threads, 0.0f), copies.assign(threads, {});
    for (int i = 0; i < threads; i++) {
        getcontext(&fibers[i]);
        fibers[i].uc_stack.ss_sp = stacks[i].data(), fibers[i].uc_stack.ss_size = stacks[i].size();
        makecontext(&fibers[i], start, 0);
    }
    for (bool left = true; left;) {
        left = false;
        for (int i = 0; i < threads; i++) {
            current = falling ? threads - 1 - i : i;
            if (done[current]) continue;
            threadIdx.x = current, left = true;
            swapcontext(&scheduler, &fibers[current]);
        }
    }
}
typedef std::function<void(void **)> Call;
static std::map<std::string, Call> &kernels() { static std::map<std::string, Call> table; return table; }
template <class... P, size_t... I>
Call unpack(void (*kernel)(P...), std::index_sequence<I...>) {
    return [kernel](void **arguments) { kernel(*(std::decay_t<P> *)arguments[I]...); };
}
template <class... P>
bool add(const char *name, void (*kernel)(P...)) {
    kernels()[name] = unpack(kernel, std::index_sequence_for<P...>{});
    return true;
}
}  // namespace emulator

inline void __syncthreads() { emulator::wait(); }
// Copies to shared memory: the old values are lost at once, the new ones are visible after async_wait().
template <class P> inline void async_copy(P *to, const void *from) {
    memset(to, 0xff, sizeof(P));  // not a number
    emulator::copies[emulator::current].push_back([=] { memcpy(to, from, sizeof(P)); });
}
inline void async_wait() {
    for (auto &copy : emulator::copies[emulator::current]) copy();
    emulator::copies[emulator::current].clear();
}
inline float __shfl_xor_sync(unsigned, float value, int mask) {
    emulator::exchange[emulator::current] = value;
    emulator::wait();
    const float other = emulator::exchange[emulator::current ^ mask];
    emulator::wait();
    return other;
}

extern "C" int emulate(const char *name, int gx, int gy, int gz, int threads, int falling, void **arguments) {
    auto kernel = emulator::kernels().find(name);
    if (kernel == emulator::kernels().end()) return 1;
    gridDim = {gx, gy, gz}, blockDim = {threads, 1, 1};
    for (blockIdx.z = 0; blockIdx.z < gz; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < gy; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < gx; blockIdx.x++) {
                emulator::body = [&] { kernel->second(arguments); };
                emulator::run_block(threads, falling);
            }
    return 0;
}
